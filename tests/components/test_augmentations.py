"""Augmentations: shapes, a draw of its own for every picture, and nothing drawn from anywhere but the generator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from components import plugins

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
