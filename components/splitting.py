"""Splitting: Dataset -> Splits. Same bytes, same split, on any machine and in any file order.

Test membership is frozen in a ledger that travels with the data version: a picture that was ever test stays test, and
one that was ever seen outside test never becomes test, whatever is appended, removed, re-added or relabelled.
The unit is the decoded picture: files whose pixels are equal always fall on one side, whatever they are called and however
they are stored. One that was resized or stored with loss has other pixels, counts as another picture, and may fall on the
other side.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from components.contracts.data import SPLITS, Dataset, SplitName, Splits
from components.contracts.errors import DataError
from components.contracts.families import Task
from components.contracts.progress import Progress, silent
from components.contracts.records import Record, Stored, canonical_json, sha256_text
from components.contracts.wording import counted
from components.store import describe, write_atomically
from components.tables import read_frame

if TYPE_CHECKING:
    import pandas as pd

_HEADER = "# visionloop test ledger 1, test_share="


class SplittingConfig(Record):
    """How pictures outside the frozen test set are divided; shares are of those pictures, train takes the rest."""

    valid_share: float = Field(default=0.10, gt=0, lt=0.5)
    calibration_share: float = Field(default=0.03, gt=0, lt=0.5)
    """For choosing int8 ranges: seen neither by training nor by any score."""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _room_for_train(self) -> SplittingConfig:
        if self.valid_share + self.calibration_share > 0.6:
            raise ValueError("valid_share + calibration_share leave less than 40 % for training")
        return self


@dataclass(frozen=True)
class TestLedger:
    """Every picture ever seen in this data set, and whether it is test.

    Keys are the first 32 hex digits of the picture's pixel digest.
    """

    __test__ = False  # not a pytest class, whatever its name

    test_share: float
    members: Mapping[str, bool]

    @classmethod
    def read(cls, path: Path) -> TestLedger:
        """Raises DataError for anything but a ledger this module wrote."""
        try:
            header, *lines = path.read_text(encoding="utf-8").splitlines()
            if not header.startswith(_HEADER):
                raise ValueError(f"first line is {header!r}")
            share = float(header.removeprefix(_HEADER))
            members: dict[str, bool] = {}
            for line in lines:
                picture, membership = line.split(",")
                if len(picture) != 32 or membership not in ("test", "rest") or picture in members:
                    raise ValueError(f"line {line!r}")
                members[picture] = membership == "test"
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} is not a readable test ledger ({error}); restore it with `git checkout -- {path.name}`"
            ) from error
        return cls(share, members)

    def write(self, path: Path) -> None:
        lines = [f"{_HEADER}{self.test_share!r}"]
        lines += [f"{picture},{'test' if test else 'rest'}" for picture, test in sorted(self.members.items())]
        write_atomically(path, ("\n".join(lines) + "\n").encode())

    def with_sides(self, sides: Mapping[str, bool]) -> TestLedger:
        """The ledger after seeing pictures whose side (True: test) somebody else chose; known ones keep theirs."""
        return TestLedger(self.test_share, {**sides, **self.members})

    def extended(self, pictures: Iterable[tuple[str, str]]) -> TestLedger:
        """The ledger after seeing (picture, class) pairs: known ones keep their side, `test_share` of the others join test.

        Within a class the pictures with the lowest digests join. A fraction of a picture is drawn by its digest, so the
        share also holds over many appends of one picture.
        """
        new: dict[str, set[str]] = defaultdict(set)
        for picture, label in pictures:
            if picture not in self.members:
                new[label].add(picture)
        members = dict(self.members)
        for label in sorted(new):
            # A picture under two classes is decided once, by the first class; validation quarantines it anyway.
            ranked = sorted((p for p in new[label] if p not in members), key=lambda p: _rank("test", p))
            whole, fraction = divmod(self.test_share * len(ranked), 1)
            count = int(whole)
            if count < len(ranked) and int(_rank("fraction", ranked[count])[:8], 16) / 2**32 < fraction:
                count += 1
            members |= {picture: index < count for index, picture in enumerate(ranked)}
        return TestLedger(self.test_share, members)


def _rank(purpose: str, picture: str) -> str:
    return hashlib.sha256(f"{purpose}:{picture}".encode()).hexdigest()


def split(
    dataset: Stored[Dataset],
    ledger: TestLedger,
    config: SplittingConfig,
    task: Task,
    *,
    out: Path,
    progress: Progress = silent,
) -> Splits:
    """Assign every kept image to a split; writes splits.parquet (path, label, sha256, picture, split).

    The strata are the task's. Raises DataError when an image is not in the ledger or one of the task's classes would be
    missing from a split.
    """
    table = read_frame(dataset.folder / dataset.record.samples.name)
    unseen = table[~table["picture"].isin(ledger.members.keys())]
    if len(unseen):
        raise DataError(
            f"the test ledger lacks {counted(len(unseen), 'image')} (first: {unseen['path'].iloc[0]}); "
            f"run `visionloop data add` so that their side is decided once and for ever"
        )
    side = _assign(table, ledger, config, task)
    table = table.assign(split=table["picture"].map(side)).sort_values(["split", "path"], ignore_index=True)
    counts: dict[SplitName, int] = {name: int((table["split"] == name).sum()) for name in SPLITS}
    class_counts: dict[SplitName, dict[str, int]] = {
        name: dict(sorted(Counter(table.loc[table["split"] == name, "label"]).items())) for name in SPLITS
    }
    classes = set(task.classes(dataset.record.classes))
    for name in SPLITS:
        missing = sorted(classes - set(task.classes(list(class_counts[name]))))
        if missing:
            raise DataError(
                f"class {missing[0]!r} has no image in the {name} split ({counted(len(missing), 'class')} without one); "
                f"add images of it with `visionloop data add`"
            )
    out_table = out / "splits.parquet"
    table[["path", "label", "sha256", "picture", "split"]].to_parquet(out_table, index=False)
    test = table[table["split"] == "test"]
    progress(len(table), len(table))
    return Splits(
        data=dataset.record.data,
        table=describe(out_table, within=out),
        classes=dataset.record.classes,
        counts=counts,
        class_counts=class_counts,
        num_duplicate_groups=int((table["picture"].value_counts() > 1).sum()),
        test_digest=sha256_text(
            canonical_json([list(dataset.record.classes), *zip(test["sha256"], test["label"], strict=True)])
        ),
    )


def _assign(table: pd.DataFrame, ledger: TestLedger, config: SplittingConfig, task: Task) -> dict[str, SplitName]:
    side: dict[str, SplitName] = {}
    pictures = table.drop_duplicates("picture")
    for _, members in pictures.groupby(pictures["label"].map(task.stratum), sort=True):
        rest = [picture for picture in members["picture"] if not ledger.members[picture]]
        side |= {picture: "test" for picture in members["picture"] if ledger.members[picture]}
        rest.sort(key=lambda picture: _rank(f"{config.seed}", picture))
        # Every class needs an image in each split; rounding down must not empty a small one.
        num_valid = max(1, round(config.valid_share * len(rest)))
        num_calibration = max(1, round(config.calibration_share * len(rest)))
        for index, picture in enumerate(rest):
            if index < num_valid:
                side[picture] = "valid"
            elif index < num_valid + num_calibration:
                side[picture] = "calibration"
            else:
                side[picture] = "train"
    return side
