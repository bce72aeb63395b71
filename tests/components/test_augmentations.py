"""Augmentations: shapes, a draw of its own for every picture, and nothing drawn from anywhere but the generator."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from components import plugins
from components.contracts.errors import ConfigError

PICTURES = [name for name in plugins.shipped("augmentations") if not plugins.load("augmentations", name).mixes]


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def images(channels: int = 3, n: int = 8) -> torch.Tensor:
    one = torch.randint(0, 255, (1, 24, 32, channels), dtype=torch.uint8, generator=seeded(0))
    return one.repeat(n, 1, 1, 1)


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_picture_is_changed_by_a_draw_of_its_own(name: str, channels: int) -> None:
    augmentation, given = plugins.load("augmentations", name), images(channels)
    before = torch.random.get_rng_state()
    found = augmentation.change(given, seeded(1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (found.shape, found.dtype) == (given.shape, torch.uint8)
    assert torch.equal(found, augmentation.change(given, seeded(1)))
    torch.manual_seed(99)
    assert torch.equal(found, augmentation.change(given, seeded(1)))
    assert not torch.equal(found, augmentation.change(given, seeded(2)))
    assert len({row.numpy().tobytes() for row in found}) > 1


def mixed(name: str, inputs: torch.Tensor, *, channels_last: bool, seed: int = 3, **settings: Any) -> Any:
    shares = torch.eye(len(inputs))
    return plugins.load("augmentations", name, settings).mix(inputs, shares, seeded(seed), channels_last=channels_last)


@pytest.mark.parametrize("shape", [(4, 8, 8, 3), (4, 3, 8, 8), (4, 10)])
def test_mixup_adds_up_inputs_and_shares_alike(shape: tuple[int, ...]) -> None:
    inputs = torch.rand(shape, generator=seeded(0))
    found, shares = mixed("mixup", inputs, channels_last=True, alpha=1.0)
    expected = (shares @ inputs.flatten(1)).reshape(shape)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(shares.sum(dim=1), torch.ones(4))
    assert (shares > 0).sum() > 4


@pytest.mark.parametrize("channels_last", [True, False])
def test_cutmix_shares_are_the_area_of_each_picture(channels_last: bool) -> None:
    shape = (5, 8, 6, 1) if channels_last else (5, 1, 8, 6)
    # Each picture is its own number, so an area can be counted.
    numbers = torch.arange(5.0)[:, None, None, None]
    for seed in range(12):
        found, shares = mixed("cutmix", numbers.expand(shape).clone(), channels_last=channels_last, seed=seed)
        counted = torch.stack([(found == number).flatten(1).float().mean(dim=1) for number in range(5)], dim=1)
        assert torch.allclose(shares, counted, atol=1e-6)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", PICTURES)
def test_a_change_depends_on_no_number_of_threads(name: str) -> None:
    augmentation, given = plugins.load("augmentations", name), images(n=16)
    with threads(1):
        alone = augmentation.change(given, seeded(1))
    with threads(4):
        assert torch.equal(augmentation.change(given, seeded(1)), alone)


def test_threads_that_change_pictures_at_once_do_not_draw_from_each_other() -> None:
    augmentation, given = plugins.load("augmentations", "jitter"), images()
    expected = [augmentation.change(given, seeded(seed)) for seed in range(8)]
    found: dict[int, list[torch.Tensor]] = {}

    def change(seed: int) -> None:
        found[seed] = [augmentation.change(given, seeded(seed)) for _round in range(5)]

    running = [threading.Thread(target=change, args=(seed,)) for seed in range(8)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert all(torch.equal(each, expected[seed]) for seed in range(8) for each in found[seed])


def test_a_change_seeds_no_generator_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU was seeded"))
    plugins.load("augmentations", "jitter").change(images(), seeded(1))


def test_a_crop_shows_a_part_of_the_picture_alone() -> None:
    across = torch.arange(64, dtype=torch.uint8)[None, None, :, None].expand(16, 64, 64, 1) * 4
    shown = plugins.load("augmentations", "crop", {"least_share": 0.25}).change(across, seeded(1))
    spans = (shown[:, 0, -1, 0].int() - shown[:, 0, 0, 0].int()).tolist()
    # Of 252: half of the side, or a little more or less where the piece is no square.
    assert min(spans) > 95
    assert max(spans) <= 252
    assert min(spans) < 180


def test_rotation_blacks_the_corners_and_leaves_the_middle() -> None:
    white = torch.full((16, 33, 33, 3), 255, dtype=torch.uint8)
    turned = plugins.load("augmentations", "rotation", {"degrees": 45}).change(white, seeded(1))
    assert (turned[:, 16, 16] == 255).all()
    assert 0 in turned[:, 0, 0].flatten().tolist()


def test_erasing_fills_one_box_that_is_as_large_as_is_allowed_at_most() -> None:
    black = torch.zeros((32, 40, 40, 3), dtype=torch.uint8)
    erased = plugins.load("augmentations", "erasing", {"probability": 1, "most_share": 0.3}).change(black, seeded(1))
    assert set(erased.flatten().tolist()) == {0, 128}
    for box in erased[..., 0] > 0:
        assert int(box.sum()) == int(box.any(0).sum()) * int(box.any(1).sum())
        assert 0 < float(box.float().mean()) < 0.32


def test_a_blur_narrows_what_neighbours_differ_by_on_a_picture_of_any_size() -> None:
    blur, given = plugins.load("augmentations", "blur", {"probability": 1}), images()
    assert blur.change(given, seeded(1)).float().diff(dim=2).abs().mean() < given.float().diff(dim=2).abs().mean()
    assert blur.change(given[:, :2, :2], seeded(1)).shape == (8, 2, 2, 3)


def test_proportions_of_mixing_are_those_of_beta() -> None:
    """Beta(a, a) has the variance 1 / (4 (2 a + 1))."""
    from components.augmentations._share import drawn

    for alpha in (0.2, 1.0, 4.0):
        generator = seeded(1)
        kept = torch.tensor([drawn(alpha, generator) for _ in range(4000)])
        assert float(kept.mean()) == pytest.approx(0.5, abs=0.02)
        assert float(kept.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_cutmix_refuses_features_and_says_so_before() -> None:
    assert plugins.load("augmentations", "cutmix").needs_space
    with pytest.raises(ConfigError, match="features have neither height nor width; use mixup, or train more than the head"):
        mixed("cutmix", torch.zeros(4, 8), channels_last=False)
