"""Records of the data: its pinned version, what passed validation, its splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import SerializerFunctionWrapHandler, field_validator, model_serializer

from components.contracts.issues import Looked, Severity
from components.contracts.records import FileDigest, Record

Renames = tuple[tuple[str, str], ...]
"""Classes that people renamed, (old, new), in the order in which they did."""


def names_after(classes: Sequence[str], renames: Renames) -> tuple[str, ...]:
    """Classes, in their order, by the names that they have after these renames, one after the other.

    A rename to a name that another of the classes has is not theirs: two classes never become one by their names.
    """
    names = list(classes)
    for old, new in renames:
        if old in names and new not in names:
            names[names.index(old)] = new
    return tuple(names)


class _Grown(Record):
    """A record that got fields since its first version.

    Where all that a version added hold their defaults, it is written as the version before: what older ones say keeps its
    digest, and all that is keyed by it.
    """

    ADDED: ClassVar[Mapping[int, tuple[str, ...]]] = {}
    """The fields by the schema version that brought them; all have defaults."""

    @field_validator("schema_version", mode="before")
    @classmethod
    def _of_an_older_version(cls, value: Any) -> Any:
        newest: int = cls.model_fields["schema_version"].default
        return newest if value in range(1, newest) else value

    @model_serializer(mode="wrap")
    def _as_old_as_can_be(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        for version, names in sorted(self.ADDED.items(), reverse=True):
            fields = type(self).model_fields
            if any(getattr(self, name) != fields[name].get_default(call_default_factory=True) for name in names):
                break
            for name in names:
                del values[name]
            values["schema_version"] = version - 1
        return values


class DataVersion(_Grown):
    """A pinned state of `data/`: DVC's directory hash, and the digests of what is pinned beside it."""

    UPGRADES = {1: lambda values: values, 2: lambda values: values}
    ADDED = {2: ("companions_sha256",), 3: ("renamed",)}
    schema_version: int = 3
    dvc_hash: str
    num_files: int
    bytes: int
    ledger_sha256: str
    """Of the frozen test ledger."""
    companions_sha256: str = ""
    """Over the digests of all companions (`components/companions.py`), "" where there are none."""
    renamed: Renames = ()
    """Classes that people renamed since the data set began."""

    def renames_since(self, earlier: DataVersion) -> Renames:
        """The classes that were renamed after an earlier version, or after the two went different ways."""
        both = enumerate(zip(self.renamed, earlier.renamed, strict=False))
        return self.renamed[next((at for at, (one, other) in both if one != other), len(earlier.renamed)) :]


class Dataset(_Grown):
    """Images that decoded and passed validation; `num_input = num_kept + num_quarantined`."""

    UPGRADES = {1: lambda values: values}
    ADDED = {2: ("issues", "findings", "severities")}
    schema_version: int = 2
    data: DataVersion
    samples: FileDigest
    quarantine: FileDigest
    classes: tuple[str, ...]
    class_counts: dict[str, int]
    num_input: int
    num_kept: int
    num_quarantined: int
    warnings: tuple[str, ...]
    issues: FileDigest | None = None
    """All that was found (`components/issues.py`); None where nothing was looked for, as in version 1."""
    findings: tuple[Looked, ...] = ()
    """What was looked for, and why something was not."""
    severities: dict[Severity, int] = {}
    """How many issues there are of each severity that there are some of."""


SplitName = Literal["train", "valid", "calibration", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "valid", "calibration", "test")


class Splits(_Grown):
    """Every kept image in exactly one split, or left out; `test_digest` names the test images and their labels alone.

    No cluster (`components/clusters.py`) is in two splits.
    """

    UPGRADES = {1: lambda values: values}
    ADDED = {2: ("num_clusters", "largest_cluster", "off_balance", "num_left_out", "left_out", "notes")}
    schema_version: int = 2
    data: DataVersion
    table: FileDigest
    classes: tuple[str, ...]
    counts: dict[SplitName, int]
    class_counts: dict[SplitName, dict[str, int]]
    num_duplicate_groups: int
    test_digest: str
    num_clusters: int = 0
    """Of several pictures that are there."""
    largest_cluster: int = 0
    """Pictures of it."""
    off_balance: dict[SplitName, dict[str, int]] = {}
    """Pictures more or less than were wanted, by split and stratum, where clusters did not allow the number."""
    num_left_out: dict[str, int] = {}
    """Images in no split, by reason; `left_out` names them, each with what it belongs to."""
    left_out: FileDigest | None = None
    notes: tuple[str, ...] = ()
    """What a person should know of it."""
