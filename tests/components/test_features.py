from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from shapes import write_pictures
from torch import nn

from components import features, plugins, segments
from components.backbones.efficientnet_lite0 import Backbone as Lite0
from components.checkpoints import ImageModel
from components.contracts.errors import ConfigError, DataDiffers
from components.contracts.families import Backbone
from components.features import AS_IT_IS, Frozen, View, maps
from components.images import batches, decode, pixel_digest


@pytest.fixture
def backbone() -> Backbone:
    loaded: Backbone = plugins.load("backbones", "small_cnn", {"image_size": 16, "width": 8, "embedding_dim": 24})
    return loaded


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    write_pictures(tmp_path / "data", 9)
    return sorted((tmp_path / "data").rglob("*.png"))


def state_of(backbone: Backbone, seed: int = 0) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return backbone.build().state_dict()


def embed(paths: list[Path], backbone: Backbone, state: dict[str, torch.Tensor], cache: Path) -> np.ndarray:
    pictures = [pixel_digest(decode(path.read_bytes()))[:32] for path in paths]
    return features.embed(pictures, paths, "small_cnn", backbone, state, cache=cache)


def test_cached_features_equal_live_ones(paths: list[Path], backbone: Backbone, tmp_path: Path) -> None:
    state = state_of(backbone)
    module = backbone.build()
    module.load_state_dict(state)
    model = ImageModel(module, torch.nn.Identity(), backbone.preprocessing).eval()
    images = np.concatenate(list(batches(paths, backbone.preprocessing, batch_size=8)))
    with torch.inference_mode():
        live = model(torch.from_numpy(images))[1].numpy()
    first = embed(paths, backbone, state, tmp_path)
    again = embed(paths, backbone, state, tmp_path)
    assert np.array_equal(first, again)
    assert np.abs(first - live).max() < 1e-4 * max(1.0, np.abs(live).max())


def test_appended_images_cost_only_themselves(
    paths: list[Path], backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(backbone)
    computed: list[int] = []
    real = features._run

    def counted(model: Any, members: list[tuple[Path, str]], *rest: Any) -> Any:
        computed.append(len(members))
        return real(model, members, *rest)

    monkeypatch.setattr(features, "_run", counted)
    few = embed(paths[:20], backbone, state, tmp_path)
    more = embed(paths, backbone, state, tmp_path)
    embed(list(reversed(paths)), backbone, state, tmp_path)
    assert computed == [20, 7]
    assert np.array_equal(more[:20], few)


def test_other_weights_have_other_features(paths: list[Path], backbone: Backbone, tmp_path: Path) -> None:
    first = embed(paths, backbone, state_of(backbone, 0), tmp_path)
    second = embed(paths, backbone, state_of(backbone, 1), tmp_path)
    assert not np.allclose(first, second)


@pytest.mark.parametrize("kind", ["features", "encoders"])
def test_a_damaged_cache_is_computed_anew(paths: list[Path], backbone: Backbone, tmp_path: Path, kind: str) -> None:
    state = state_of(backbone)
    first = embed(paths, backbone, state, tmp_path)
    if kind == "encoders":
        for segment in (tmp_path / "features").rglob("*.safetensors"):
            segment.unlink()
    path = next(p for p in (tmp_path / kind).rglob("*") if p.suffix in (".safetensors", ".onnx"))
    data = bytearray(path.read_bytes())
    data[-10] ^= 255
    path.write_bytes(data)
    assert np.array_equal(embed(paths, backbone, state, tmp_path), first)


def test_an_image_that_changes_during_the_run_does_not_poison_the_cache(
    paths: list[Path], backbone: Backbone, tmp_path: Path
) -> None:
    pictures = [pixel_digest(decode(path.read_bytes()))[:32] for path in paths]
    paths[3].write_bytes(paths[4].read_bytes())
    with pytest.raises(DataDiffers, match="was changed while the run read it"):
        features.embed(pictures, paths, "small_cnn", backbone, state_of(backbone), cache=tmp_path)
    assert list((tmp_path / "features").rglob("*.safetensors")) == []


MIRRORED = View("mirrored", lambda images, _: np.ascontiguousarray(images[:, :, ::-1]))


class Blocked(Lite0):
    """EfficientNet-Lite0 at 64 pixels, which knows its blocks."""

    image_size: int = 64

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        parts: Any = module
        middle = list(parts.blocks)
        first = nn.Sequential(parts.conv_stem, parts.bn1, middle[0])
        last = nn.Sequential(middle[-1], parts.conv_head, parts.bn2, parts.global_pool)
        return [first, *middle[1:-1], last]


@pytest.fixture(scope="module")
def lite0() -> tuple[Backbone, nn.Module]:
    """A backbone of blocks, and its module with statistics that are not those of a new one."""
    backbone = cast("Backbone", Blocked())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = backbone.build().train()
        with torch.no_grad():
            for _ in range(20):
                module(torch.randn(8, 3, 64, 64))
    return backbone, module.eval()


def inputs_of(paths: list[Path], lite0: tuple[Backbone, nn.Module], cache: Path, *views: View, **settings: Any) -> Any:
    pictures = [pixel_digest(decode(path.read_bytes()))[:32] for path in paths]
    frozen = Frozen("efficientnet_lite0", lite0[0], lite0[1].state_dict(), settings.pop("num_blocks", 2))
    return maps(pictures, paths, frozen, [AS_IT_IS, *views], cache=cache, **settings)


@pytest.mark.parametrize("num_blocks", [1, 2, 5])
def test_maps_are_what_torch_makes_below_the_cut_within_a_thousandth(
    paths: list[Path], lite0: tuple[Backbone, nn.Module], tmp_path: Path, num_blocks: int
) -> None:
    backbone, module = lite0
    images = torch.from_numpy(np.concatenate(list(batches(paths, backbone.preprocessing, batch_size=8))))
    blocks = cast("Any", backbone).blocks(module)
    below, above = (nn.Sequential(*part).eval() for part in (blocks[:-num_blocks], blocks[-num_blocks:]))
    inputs = inputs_of(paths, lite0, tmp_path, MIRRORED, num_blocks=num_blocks)
    with torch.inference_mode():
        views = [below(view.float().permute(0, 3, 1, 2) / 127.5 - 1) for view in (images, images.flip(2))]
        whole = module(images.float().permute(0, 3, 1, 2) / 127.5 - 1)
        found = inputs.take(torch.arange(len(paths)), None)
        assert found.dtype == torch.float16
        # Half of the last of 11 bits is 0.0005 of a number; the engine's own rounding is a twentieth of that.
        assert float((found.float() - views[0]).norm() / views[0].norm()) < 1e-3
        assert float((found.float() - views[0]).abs().max() / views[0].abs().max()) < 1e-3
        assert float((above(found.float()) - whole).norm() / whole.norm()) < 2e-3
        generator = torch.Generator().manual_seed(0)
        drawn = inputs.take(torch.arange(len(paths)), generator).float()
        nearest = torch.stack([(drawn - view).flatten(1).norm(dim=1) for view in views])
        sizes = views[0].flatten(1).norm(dim=1)
    assert bool((nearest.min(dim=0).values < 1e-3 * sizes).all())
    assert set(nearest.argmin(dim=0).tolist()) == {0, 1}


def test_another_view_costs_only_itself_and_every_picture_is_decoded_once_for_all(
    paths: list[Path], lite0: tuple[Backbone, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[int, list[str]]] = []
    real = features._run

    def counted(model: Any, members: Any, frozen: Any, views: Sequence[View], progress: Any) -> Any:
        computed.append((len(members), [view.name for view in views]))
        return real(model, members, frozen, views, progress)

    monkeypatch.setattr(features, "_run", counted)
    monkeypatch.setattr(segments, "_CHUNK_ROWS", 10)
    told: list[tuple[int, int]] = []
    whole = torch.arange(len(paths))
    first = inputs_of(paths[:15], lite0, tmp_path, MIRRORED).take(whole[:15], None)
    assert computed == [(10, ["as-it-is", "mirrored"]), (5, ["as-it-is", "mirrored"])]
    computed.clear()
    turned = View("turned", lambda images, _: np.ascontiguousarray(images[:, ::-1]))
    inputs = inputs_of(
        paths, lite0, tmp_path, MIRRORED, turned, progress=lambda done, total, note="": told.append((done, total))
    )
    every = ["as-it-is", "mirrored", "turned"]
    assert sorted(computed) == [(2, every), (5, ["turned"]), (10, every), (10, ["turned"])]
    assert told[-1] == (27, 27)
    assert torch.equal(inputs.take(whole, None)[:15], first)


def test_a_view_is_told_which_pictures_it_changes(
    paths: list[Path], lite0: tuple[Backbone, nn.Module], tmp_path: Path
) -> None:
    seen: dict[str, bytes] = {}

    def look(images: np.ndarray, pictures: Sequence[str]) -> np.ndarray:
        seen.update({picture: image.tobytes() for picture, image in zip(pictures, images, strict=True)})
        return images

    inputs_of(paths, lite0, tmp_path, View("looked-at", look))
    (images,) = batches(paths, lite0[0].preprocessing, batch_size=99)
    wanted = [pixel_digest(decode(path.read_bytes()))[:32] for path in paths]
    assert seen == {picture: image.tobytes() for picture, image in zip(wanted, images, strict=True)}


def test_weights_above_the_cut_make_nothing_anew_and_those_below_everything(
    paths: list[Path], lite0: tuple[Backbone, nn.Module], tmp_path: Path
) -> None:
    backbone, module = lite0
    state = {name: value.clone() for name, value in module.state_dict().items()}
    pictures = [pixel_digest(decode(path.read_bytes()))[:32] for path in paths]

    def folders(num_blocks: int) -> int:
        maps(pictures, paths, Frozen("efficientnet_lite0", backbone, state, num_blocks), cache=tmp_path)
        return len(list((tmp_path / "maps").iterdir()))

    assert folders(2) == 1
    state["conv_head.weight"] += 1
    state["blocks.5.0.bn1.running_mean"] += 1
    assert folders(2) == 1
    state["blocks.4.2.bn1.running_mean"] += 1
    assert folders(2) == 2
    assert folders(1) == 3


def test_a_full_disk_slows_and_does_not_fail(
    paths: list[Path], lite0: tuple[Backbone, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    chosen = torch.tensor([4, 20, 4])
    expected = inputs_of(paths, lite0, tmp_path / "whole", MIRRORED).take(chosen, None)
    monkeypatch.setattr(segments, "write_atomically", refuse)
    monkeypatch.setattr(segments, "_CHUNK_ROWS", 10)
    told: list[str] = []
    done: list[int] = []
    inputs = inputs_of(
        paths, lite0, tmp_path / "full", MIRRORED, say=told.append, progress=lambda count, *_: done.append(count)
    )
    # Nothing more is computed in advance for a disk that takes nothing.
    assert done[-1] == 10
    found = inputs.take(chosen, None)
    assert len(told) == 1
    # Another size of batch may round otherwise in the last bit of 32, and so in the last of 16.
    assert float((found.float() - expected.float()).abs().max()) <= 1e-3 * float(expected.abs().max())
    assert not list((tmp_path / "full").rglob("*.*"))


def test_what_16_bits_do_not_hold_and_a_cut_that_is_none_are_refused(
    paths: list[Path], lite0: tuple[Backbone, nn.Module], tmp_path: Path, backbone: Backbone
) -> None:
    state = {name: value.clone() for name, value in lite0[1].state_dict().items()}
    state["blocks.4.2.bn3.weight"] *= 1e6
    huge = lite0[0].build()
    huge.load_state_dict(state)
    with pytest.raises(ConfigError, match="16 bits, in which they are cached, hold at most 65504"):
        inputs_of(paths, (lite0[0], huge), tmp_path)
    with pytest.raises(ConfigError, match="it has 7 blocks; expected from 1 to 6"):
        inputs_of(paths, lite0, tmp_path, num_blocks=7)
