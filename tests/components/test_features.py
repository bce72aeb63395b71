from __future__ import annotations

import errno
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from shapes import write_pictures
from torch import nn

from components import features, plugins, segments
from components.checkpoints import ImageModel
from components.contracts.errors import ConfigError, DataDiffers
from components.contracts.families import Backbone
from components.features import AS_IT_IS, Frozen, View, maps
from components.images import batches, decode, pixel_digest

Network = tuple[str, Backbone, nn.Module]


def network(name: str, **settings: Any) -> Network:
    """A backbone of blocks, and its module with statistics that are not those of a new one."""
    backbone: Backbone = plugins.load("backbones", name, settings)
    contract = backbone.preprocessing
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = backbone.build().train()
        with torch.no_grad():
            for _ in range(20):
                module(torch.randn(8, contract.channels, contract.height, contract.width))
    return name, backbone, module.eval()


@pytest.fixture(scope="module")
def small() -> Network:
    return network("small_cnn", image_size=16, width=8, embedding_dim=24)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures that no test changes."""
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, 9)
    return sorted(folder.rglob("*.png"))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoders")


@pytest.fixture
def cache(tmp_path: Path, encoders: Path) -> Path:
    """A cache of one's own that finds the encoders that another test has made: to make one takes seconds."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "encoders").symlink_to(encoders)
    return tmp_path / "cache"


def pictures_of(paths: list[Path]) -> list[str]:
    return [pixel_digest(decode(path.read_bytes()))[:32] for path in paths]


def embed(paths: list[Path], network: Network, cache: Path) -> np.ndarray:
    name, backbone, module = network
    return features.embed(pictures_of(paths), paths, name, backbone, module.state_dict(), cache=cache)


def test_cached_features_equal_live_ones(paths: list[Path], small: Network, cache: Path) -> None:
    _, backbone, module = small
    model = ImageModel(module, torch.nn.Identity(), backbone.preprocessing).eval()
    images = np.concatenate(list(batches(paths, backbone.preprocessing, batch_size=8)))
    with torch.inference_mode():
        live = model(torch.from_numpy(images))[1].numpy()
    first = embed(paths, small, cache)
    again = embed(paths, small, cache)
    assert np.array_equal(first, again)
    assert np.abs(first - live).max() < 1e-4 * max(1.0, np.abs(live).max())


def test_appended_images_cost_only_themselves(
    paths: list[Path], small: Network, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    real = features.rows_of

    def counted(model: Any, members: list[tuple[Path, str]], *rest: Any) -> Any:
        computed.append(len(members))
        return real(model, members, *rest)

    monkeypatch.setattr(features, "rows_of", counted)
    few = embed(paths[:20], small, cache)
    more = embed(paths, small, cache)
    embed(list(reversed(paths)), small, cache)
    assert computed == [20, 7]
    assert np.array_equal(more[:20], few)


@pytest.mark.parametrize("kind", ["features", "encoders"])
def test_a_damaged_cache_is_computed_anew(paths: list[Path], small: Network, cache: Path, tmp_path: Path, kind: str) -> None:
    first = embed(paths, small, cache)
    mine = Path(shutil.copytree(cache, tmp_path / "damaged"))
    if kind == "encoders":
        shutil.rmtree(mine / "features")
        (path,) = (mine / "encoders").rglob("*.onnx")
    else:
        (path,) = (mine / "features").rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-10] ^= 255
    path.write_bytes(data)
    assert np.array_equal(embed(paths, small, mine), first)


def test_an_image_that_changes_during_the_run_does_not_poison_the_cache(
    paths: list[Path], small: Network, cache: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed.png"
    changed.write_bytes(paths[4].read_bytes())
    read = [*paths[:3], changed, *paths[4:]]
    with pytest.raises(DataDiffers, match="was changed while the run read it"):
        features.embed(pictures_of(paths), read, small[0], small[1], small[2].state_dict(), cache=cache)
    assert list((cache / "features").rglob("*.safetensors")) == []


MIRRORED = View("mirrored", lambda images, _: np.ascontiguousarray(images[:, :, ::-1]))


def inputs_of(paths: list[Path], network: Network, cache: Path, *views: View, **settings: Any) -> Any:
    name, backbone, module = network
    frozen = Frozen(name, backbone, module.state_dict(), settings.pop("num_blocks", 2))
    return maps(pictures_of(paths), paths, frozen, [AS_IT_IS, *views], cache=cache, **settings)


@pytest.mark.parametrize(("name", "num_blocks"), [("small_cnn", 1), ("efficientnet_lite0", 2)])
def test_maps_are_what_torch_makes_below_the_cut_within_a_thousandth(
    paths: list[Path], small: Network, cache: Path, name: str, num_blocks: int
) -> None:
    """Of two layers, and of the fifty of a network that is used."""
    chosen = small if name == "small_cnn" else network(name, image_size=64)
    _, backbone, module = chosen
    images = torch.from_numpy(np.concatenate(list(batches(paths, backbone.preprocessing, batch_size=8))))
    blocks = cast("Any", backbone).blocks(module)
    below, above = (nn.Sequential(*part).eval() for part in (blocks[:-num_blocks], blocks[-num_blocks:]))
    inputs = inputs_of(paths, chosen, cache, MIRRORED, num_blocks=num_blocks)
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
    paths: list[Path], small: Network, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[int, list[str]]] = []
    real = features.rows_of

    def counted(model: Any, members: Any, frozen: Any, views: Sequence[View], progress: Any) -> Any:
        computed.append((len(members), [view.name for view in views]))
        return real(model, members, frozen, views, progress)

    monkeypatch.setattr(features, "rows_of", counted)
    monkeypatch.setattr(segments, "_CHUNK_ROWS", 10)
    told: list[tuple[int, int]] = []
    whole = torch.arange(len(paths))
    first = inputs_of(paths[:15], small, cache, MIRRORED).take(whole[:15], None)
    assert computed == [(10, ["as-it-is", "mirrored"]), (5, ["as-it-is", "mirrored"])]
    computed.clear()
    turned = View("turned", lambda images, _: np.ascontiguousarray(images[:, ::-1]))
    inputs = inputs_of(
        paths, small, cache, MIRRORED, turned, progress=lambda done, total, note="": told.append((done, total))
    )
    every = ["as-it-is", "mirrored", "turned"]
    assert sorted(computed) == [(2, every), (5, ["turned"]), (10, every), (10, ["turned"])]
    assert told[-1] == (27, 27)
    assert torch.equal(inputs.take(whole, None)[:15], first)


def test_a_view_is_told_which_pictures_it_changes(paths: list[Path], small: Network, cache: Path) -> None:
    seen: dict[str, bytes] = {}

    def look(images: np.ndarray, pictures: Sequence[str]) -> np.ndarray:
        seen.update({picture: image.tobytes() for picture, image in zip(pictures, images, strict=True)})
        return images

    inputs_of(paths, small, cache, View("looked-at", look))
    (images,) = batches(paths, small[1].preprocessing, batch_size=99)
    assert seen == {picture: image.tobytes() for picture, image in zip(pictures_of(paths), images, strict=True)}


def test_weights_above_the_cut_make_nothing_anew_and_those_below_everything(
    paths: list[Path], small: Network, cache: Path
) -> None:
    name, backbone, module = small
    state = {key: value.clone() for key, value in module.state_dict().items()}

    def folders(num_blocks: int) -> int:
        maps(pictures_of(paths), paths, Frozen(name, backbone, state, num_blocks), cache=cache)
        return len(list((cache / ("maps" if num_blocks else "features")).iterdir()))

    assert (folders(2), folders(0)) == (1, 1)
    state["7.weight"] += 1
    state["8.running_mean"] += 1
    assert (folders(2), folders(0)) == (1, 2)
    state["5.running_mean"] += 1
    assert folders(2) == 2
    assert folders(1) == 3


def test_a_full_disk_slows_and_does_not_fail(
    paths: list[Path], small: Network, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    chosen = torch.tensor([4, 20, 4])
    expected = inputs_of(paths, small, cache, MIRRORED).take(chosen, None)
    monkeypatch.setattr(segments, "write_atomically", refuse)
    monkeypatch.setattr(segments, "_CHUNK_ROWS", 10)
    told: list[str] = []
    done: list[int] = []
    inputs = inputs_of(
        paths, small, tmp_path / "full", MIRRORED, say=told.append, progress=lambda count, *_: done.append(count)
    )
    # Nothing more is computed in advance for a disk that takes nothing.
    assert done[-1] == 10
    found = inputs.take(chosen, None)
    assert len(told) == 1
    # Another size of batch may round otherwise in the last bit of 32, and so in the last of 16.
    assert float((found.float() - expected.float()).abs().max()) <= 1e-3 * float(expected.abs().max())
    assert not list((tmp_path / "full").rglob("*.*"))


def test_what_16_bits_do_not_hold_and_a_cut_that_is_none_are_refused(paths: list[Path], small: Network, cache: Path) -> None:
    name, backbone, module = small
    huge = backbone.build().eval()
    huge.load_state_dict({key: value * (1e6 if key == "5.weight" else 1) for key, value in module.state_dict().items()})
    with pytest.raises(ConfigError, match="16 bits, in which they are cached, hold at most 65504"):
        inputs_of(paths, (name, backbone, huge), cache)
    with pytest.raises(ConfigError, match="it has 4 blocks; expected from 1 to 3"):
        inputs_of(paths, small, cache, num_blocks=4)
