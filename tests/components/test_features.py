from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shapes import write_pictures

from components import features, plugins
from components.checkpoints import ImageModel
from components.contracts.errors import DataDiffers
from components.contracts.families import Backbone
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

    def counted(model: Any, chunk: list[tuple[Path, str]], *rest: Any) -> Any:
        computed.append(len(chunk))
        return real(model, chunk, *rest)

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
