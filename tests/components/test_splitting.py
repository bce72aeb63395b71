from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from components.contracts.data import SPLITS, Dataset, DataVersion, Splits
from components.contracts.errors import DataError
from components.contracts.records import FileDigest, Stored
from components.splitting import SplittingConfig, TestLedger, split
from components.store import describe
from components.tasks.classification import Task

VERSION = DataVersion(dvc_hash="h", num_files=1, bytes=1, ledger_sha256="l")


def pictures(label: str, count: int, start: int = 0) -> list[tuple[str, str]]:
    return [(hashlib.sha256(f"{label}{i}".encode()).hexdigest()[:32], label) for i in range(start, start + count)]


def dataset(folder: Path, members: list[tuple[str, str]]) -> Stored[Dataset]:
    folder.mkdir(exist_ok=True)
    table = pd.DataFrame(
        [{"path": f"{label}/{i}-{p}", "label": label, "sha256": p * 2, "picture": p} for i, (p, label) in enumerate(members)]
    )
    table.to_parquet(folder / "samples.parquet", index=False)
    digest = describe(folder / "samples.parquet", within=folder)
    classes = tuple(sorted({label for _, label in members}))
    record = Dataset(
        data=VERSION,
        samples=digest,
        quarantine=FileDigest(name="q", sha256="", bytes=0),
        classes=classes,
        class_counts=dict(Counter(label for _, label in members)),
        num_input=len(members),
        num_kept=len(members),
        num_quarantined=0,
        warnings=(),
    )
    return Stored(record, folder)


def sides(splits: Splits, folder: Path) -> dict[str, str]:
    table = pd.read_parquet(folder / splits.table.name)
    return dict(zip(table["picture"], table["split"], strict=True))


def run(tmp_path: Path, name: str, members: list[tuple[str, str]], ledger: TestLedger) -> tuple[Splits, dict[str, str]]:
    out = tmp_path / f"{name}-out"
    out.mkdir()
    found = split(dataset(tmp_path / name, members), ledger, SplittingConfig(), Task(), out=out)
    return found, sides(found, out)


def test_every_image_is_in_one_split_and_classes_are_balanced(tmp_path: Path) -> None:
    members = pictures("a", 100) + pictures("b", 300)
    found, where = run(tmp_path, "d", members, TestLedger(0.2, {}).extended(members))
    assert sum(found.counts.values()) == 400
    assert set(where.values()) == set(SPLITS)
    assert found.class_counts["test"]["a"] in (20, 21)
    assert found.class_counts["test"]["b"] in (60, 61)
    assert found.class_counts["valid"]["b"] == 24


def test_file_order_and_names_do_not_matter(tmp_path: Path) -> None:
    members = pictures("a", 50) + pictures("b", 50)
    ledger = TestLedger(0.2, {}).extended(members)
    _, first = run(tmp_path, "x", members, ledger)
    backwards = list(reversed(members))
    _, second = run(tmp_path, "y", backwards, TestLedger(0.2, {}).extended(backwards))
    assert first == second


def test_duplicates_stay_together(tmp_path: Path) -> None:
    members = pictures("a", 40) + pictures("b", 40) + pictures("a", 40) + pictures("a", 40)
    found, where = run(tmp_path, "d", members, TestLedger(0.2, {}).extended(members))
    assert found.num_duplicate_groups == 40
    assert sum(found.counts.values()) == 160
    assert len(where) == 80


def test_appended_data_never_moves_an_image_between_test_and_the_rest(tmp_path: Path) -> None:
    members = pictures("a", 60) + pictures("b", 60)
    ledger = TestLedger(0.25, {}).extended(members)
    before = dict(ledger.members)
    for step in range(1, 6):
        # Removed, re-added and relabelled images are in there too.
        again = pictures("a", 30) + [(picture, "b") for picture, _ in pictures("a", 10)]
        ledger = ledger.extended(again + pictures("a", 17, start=60 * step) + pictures("b", 5, start=60 * step))
        assert {p: ledger.members[p] for p in before} == before
        before = dict(ledger.members)


def test_the_share_holds_over_many_appends_of_one_picture() -> None:
    ledger = TestLedger(0.2, {})
    for picture in pictures("a", 2000):
        ledger = ledger.extended([picture])
    assert 340 <= sum(ledger.members.values()) <= 460


def test_an_image_outside_the_ledger_is_refused(tmp_path: Path) -> None:
    members = pictures("a", 50) + pictures("b", 50)
    ledger = TestLedger(0.2, {}).extended(members[:-1])
    with pytest.raises(DataError, match="the test ledger lacks 1 image .*data add"):
        run(tmp_path, "d", members, ledger)


def test_a_class_that_misses_a_split_is_refused(tmp_path: Path) -> None:
    members = pictures("a", 50) + pictures("b", 2)
    ledger = TestLedger(0.2, {p: False for p, _ in members} | {members[0][0]: True})
    with pytest.raises(DataError, match="class 'b' has no image in the"):
        run(tmp_path, "d", members, ledger)


def test_the_ledger_survives_its_file_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    ledger = TestLedger(0.2, {}).extended(pictures("a", 30))
    path = tmp_path / "ledger.csv"
    ledger.write(path)
    assert TestLedger.read(path) == ledger
    path.write_text(path.read_text().replace(",rest", ",maybe", 1))
    with pytest.raises(DataError, match="not a readable test ledger.*git checkout"):
        TestLedger.read(path)
    path.write_text("")
    with pytest.raises(DataError, match="not a readable test ledger"):
        TestLedger.read(path)


def test_the_test_digest_names_images_and_labels_alone(tmp_path: Path) -> None:
    members = pictures("a", 50) + pictures("b", 50)
    ledger = TestLedger(0.2, {}).extended(members)
    first, _ = run(tmp_path, "x", members, ledger)
    more = members + pictures("a", 1, start=900)
    second, _ = run(tmp_path, "y", more, TestLedger(0.2, {**ledger.members, more[-1][0]: False}))
    third, _ = run(tmp_path, "z", more, TestLedger(0.2, {**ledger.members, more[-1][0]: True}))
    assert first.test_digest == second.test_digest
    assert first.test_digest != third.test_digest
