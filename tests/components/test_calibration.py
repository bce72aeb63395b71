from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from components import plugins
from components.calibration import calibration_rows, stratified, valid_rows
from components.contracts.data import DataVersion, Splits
from components.contracts.errors import ExportError
from components.contracts.families import Task
from components.contracts.records import Stored
from components.store import describe

TASK: Task = plugins.load("tasks", "classification")
ROWS = [
    *((f"many/{i}.png", "many", f"{i:02}" * 32, f"{(i * 7) % 30:02}" * 16, "calibration") for i in range(30)),
    *((f"few/{i}.png", "few", f"f{i}" * 32, f"f{i}" * 16, "calibration") for i in range(3)),
    *((f"many/t{i}.png", "many", f"a{i}" * 32, f"a{i}" * 16, "test") for i in range(4)),
    *((f"many/v{i}.png", "many", f"b{i}" * 32, f"b{i}" * 16, "valid") for i in range(2)),
]


def splits_of(folder: Path, rows: list[tuple[str, str, str, str, str]]) -> Stored[Splits]:
    folder.mkdir(exist_ok=True)
    table = pd.DataFrame(rows, columns=["path", "label", "sha256", "picture", "split"])
    table.to_parquet(folder / "splits.parquet")
    record = Splits(
        data=DataVersion(dvc_hash="a", num_files=len(rows), bytes=1, ledger_sha256="b"),
        table=describe(folder / "splits.parquet", within=folder),
        classes=("few", "many"),
        counts={},
        class_counts={},
        num_duplicate_groups=0,
        test_digest="c",
    )
    return Stored(record, folder)


def test_every_beginning_of_the_calibration_images_has_the_classes_in_their_shares(tmp_path: Path) -> None:
    found = calibration_rows(splits_of(tmp_path, ROWS), TASK)
    assert sorted(found["path"]) == sorted(path for path, *_, split in ROWS if split == "calibration")
    assert set(found["label"][:2]) == {"few", "many"}
    for number in range(11, 34):
        assert abs(list(found["label"][:number]).count("few") - number / 11) <= 1
    assert list(found.columns) == ["path", "label", "sha256", "picture", "split"]
    # The order is that of what the pictures show, whatever the files are called or how the table is sorted.
    again = stratified(found.sample(frac=1, random_state=0), TASK)
    pd.testing.assert_frame_equal(found, again)
    of_many = [path for path in found["path"] if path.startswith("many")]
    assert of_many != sorted(of_many)
    assert list(valid_rows(splits_of(tmp_path, ROWS), TASK)["path"]) == ["many/v0.png", "many/v1.png"]


def test_an_empty_calibration_split_is_refused(tmp_path: Path) -> None:
    without = [row for row in ROWS if row[-1] != "calibration"]
    with pytest.raises(ExportError, match=r"calibration split is empty.* raise splitting\.calibration_share"):
        calibration_rows(splits_of(tmp_path, without), TASK)


@pytest.mark.parametrize(
    ("sha256", "picture"),
    [("a1" * 32, "99" * 16), ("99" * 32, "a1" * 16)],
    ids=["the same file", "the same picture in another file"],
)
def test_a_calibration_image_that_is_in_test_is_refused_and_named(tmp_path: Path, sha256: str, picture: str) -> None:
    leaked = [*ROWS, ("few/leaked.png", "few", sha256, picture, "calibration")]
    with pytest.raises(ExportError, match=r"1 calibration image is in test, too: few/leaked\.png"):
        calibration_rows(splits_of(tmp_path, leaked), TASK)
