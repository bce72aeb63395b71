"""Records of the data: its pinned version, what passed validation, its splits."""

from __future__ import annotations

from typing import Literal

from components.contracts.records import FileDigest, Record


class DataVersion(Record):
    """A pinned state of `data/`: DVC's directory hash and the digest of the frozen test ledger beside it."""

    dvc_hash: str
    num_files: int
    bytes: int
    ledger_sha256: str


class Dataset(Record):
    """Images that decoded and passed validation; `num_input = num_kept + num_quarantined`."""

    data: DataVersion
    samples: FileDigest
    quarantine: FileDigest
    classes: tuple[str, ...]
    class_counts: dict[str, int]
    num_input: int
    num_kept: int
    num_quarantined: int
    warnings: tuple[str, ...]


SplitName = Literal["train", "valid", "calibration", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "valid", "calibration", "test")


class Splits(Record):
    """Every kept image in exactly one split; `test_digest` names the test images and their labels alone."""

    data: DataVersion
    table: FileDigest
    classes: tuple[str, ...]
    counts: dict[SplitName, int]
    class_counts: dict[SplitName, dict[str, int]]
    num_duplicate_groups: int
    test_digest: str
