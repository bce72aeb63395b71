"""Splitting: Dataset -> Splits. Same bytes, same split, on any machine and in any file order.

Test membership is frozen in a ledger that travels with the data version: a picture that was ever test stays test, and
one that was ever seen outside test never becomes test, whatever is appended, removed, re-added or relabelled.
The unit is the cluster: pictures that are verified near-duplicates of each other, or of one group
(`components/clusters.py`), are in one split. A picture that belongs to none is its own, by its decoded pixels: files whose
pixels are equal are one picture, whatever they are called and however they are stored.
What is frozen stays frozen: where a cluster has a frozen test picture, its pictures outside test are in no split.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from components import issues
from components.clusters import Clusters, Units
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

    valid_share: float = Field(default=0.10, ge=0, lt=0.5)
    """0 for none at all: all pictures train, which only a head that is computed can be trained on (recipe fewshot)."""
    calibration_share: float = Field(default=0.03, ge=0, lt=0.5)
    """For choosing int8 ranges: seen neither by training nor by any score. 0 for none at all, without int8 engines."""
    seed: int = Field(default=0, ge=0)
    order: Literal["random", "captured_at"] = "random"
    """Which pictures are valid: any, or by `captured_at` the newest of each class, then calibration, and the oldest train.
    The frozen test is always drawn at random."""
    groups: bool = True
    """Whether pictures of one group stay in one split; near-duplicates always do."""

    @model_validator(mode="after")
    def _room_for_train(self) -> SplittingConfig:
        if self.valid_share + self.calibration_share > 0.6:
            raise ValueError("valid_share + calibration_share leave less than 40 % for training")
        return self

    @property
    def none(self) -> tuple[SplitName, ...]:
        """The splits that are to have no pictures."""
        shares: dict[SplitName, float] = {"valid": self.valid_share, "calibration": self.calibration_share}
        return tuple(name for name, share in shares.items() if share == 0)


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
            return cls.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} is not a readable test ledger ({error}); restore it with `git checkout -- {path.name}`"
            ) from error

    @classmethod
    def parse(cls, text: str) -> TestLedger:
        """The ledger of a file's text; raises ValueError for anything but what this module wrote."""
        header, *lines = text.splitlines()
        if not header.startswith(_HEADER):
            raise ValueError(f"first line is {header!r}")
        share = float(header.removeprefix(_HEADER))
        members: dict[str, bool] = {}
        for line in lines:
            picture, membership = line.split(",")
            if len(picture) != 32 or membership not in ("test", "rest") or picture in members:
                raise ValueError(f"line {line!r}")
            members[picture] = membership == "test"
        return cls(share, members)

    def write(self, path: Path) -> None:
        lines = [f"{_HEADER}{self.test_share!r}"]
        lines += [f"{picture},{'test' if test else 'rest'}" for picture, test in sorted(self.members.items())]
        write_atomically(path, ("\n".join(lines) + "\n").encode())

    def with_sides(self, sides: Mapping[str, bool]) -> TestLedger:
        """The ledger after seeing pictures whose side (True: test) somebody else chose; known ones keep theirs."""
        return TestLedger(self.test_share, {**sides, **self.members})

    def moved_from(self, earlier: TestLedger) -> list[str]:
        """The pictures that are on another side than in an earlier ledger."""
        return [picture for picture, test in earlier.members.items() if self.members.get(picture, test) != test]

    def extended(
        self,
        pictures: Iterable[tuple[str, str]],
        *,
        together: Mapping[str, str] | None = None,
        near: Mapping[str, str] | None = None,
    ) -> TestLedger:
        """The ledger after seeing (picture, class) pairs: known ones keep their side, `test_share` of the others join test.

        Within a class the pictures with the lowest digests join. A fraction of a picture is drawn by its digest, so the
        share also holds over many appends of one picture.

        `together` tells the cluster of pictures that belong to others, and `near` that of their near-duplicates alone. New
        pictures of one cluster join one side, the one where it was seen before. What belongs to a picture that was ever
        outside test stays outside, and so does a near-duplicate of a test picture, which would tell a test nothing.
        """
        together, near = together or {}, near or {}
        label_of: dict[str, str] = {}
        for picture, label in pictures:
            if picture not in self.members:
                # A picture under two classes is decided once, by the first class; validation quarantines it anyway.
                label_of[picture] = min(label, label_of.get(picture, label))
        members = dict(self.members)
        seen: dict[bool, set[str]] = {True: set(), False: set()}
        near_test: set[str] = set()
        for picture, cluster in together.items():
            if (test := self.members.get(picture)) is not None:
                seen[test].add(cluster)
                if test and picture in near:
                    near_test.add(near[picture])
        for picture in label_of:
            cluster = together.get(picture, picture)
            if cluster in seen[True] or cluster in seen[False]:
                members[picture] = cluster not in seen[False] and near.get(picture) not in near_test
        drawn: dict[str, list[str]] = defaultdict(list)
        for picture, label in label_of.items():
            if picture not in members:
                drawn[label].append(picture)
        wanted = {label: _share(self.test_share, drawn[label]) for label in drawn}
        units = Units()
        for label in sorted(drawn):
            for picture in drawn[label]:
                units.add(picture, label, together.get(picture))
        for unit, share in units.divided([wanted], order=sorted(units.sizes, key=lambda unit: _rank("test", unit))).items():
            members |= dict.fromkeys(units.pictures(unit), share == 0)
        return TestLedger(self.test_share, members)


def _rank(purpose: str, picture: str) -> str:
    return hashlib.sha256(f"{purpose}:{picture}".encode()).hexdigest()


def _share(share: float, pictures: list[str]) -> int:
    """How many of these pictures a share of them is; a fraction of one is drawn by the digest of whose turn it is."""
    whole, fraction = divmod(share * len(pictures), 1)
    count = int(whole)
    if fraction and count < len(pictures):
        turn = sorted(pictures, key=lambda picture: _rank("test", picture))[count]
        count += int(_rank("fraction", turn)[:8], 16) / 2**32 < fraction
    return count


def split(
    dataset: Stored[Dataset],
    ledger: TestLedger,
    config: SplittingConfig,
    task: Task,
    *,
    clusters: Clusters | None = None,
    out: Path,
    progress: Progress = silent,
) -> Splits:
    """Assign every kept image to a split; writes splits.parquet (path, label, sha256, picture, split).

    The strata are the task's. Images that can be in no split without a leak are left out, counted and named in
    left_out.parquet (path, label, sha256, picture, reason, belongs_to). Raises DataError when an image is not in the ledger
    or one of the task's classes would be missing from a split.
    """
    clusters = clusters or Clusters()
    table = read_frame(dataset.folder / dataset.record.samples.name)
    table["named"] = clusters.first_seen(table, ledger.members)
    unseen = table[~table["named"].isin(ledger.members.keys())]
    if len(unseen):
        raise DataError(
            f"the test ledger lacks {counted(len(unseen), 'image')} (first: {unseen['path'].iloc[0]}); "
            f"run `visionloop data add` so that their side is decided once and for ever"
        )
    known = table[["path", "label", "sha256"]].assign(picture=table["named"])
    clusters = clusters.grown(_leaks(dataset, table.assign(picture=table["named"]), clusters))
    assigned = _assign(known, ledger, config, task, clusters)
    table["split"] = table["named"].map(assigned.side)
    left_out = table[table["split"].isna()].sort_values("path", ignore_index=True)
    table = table[table["split"].notna()].sort_values(["split", "path"], ignore_index=True)
    assert len(table) + len(left_out) == dataset.record.num_kept, "splitting lost an image"
    _expect_disjoint(table, assigned.together)
    counts: dict[SplitName, int] = {name: int((table["split"] == name).sum()) for name in SPLITS}
    class_counts: dict[SplitName, dict[str, int]] = {
        name: dict(sorted(Counter(table.loc[table["split"] == name, "label"]).items())) for name in SPLITS
    }
    classes = set(task.classes(dataset.record.classes))
    for name in (each for each in SPLITS if each not in config.none):
        missing = sorted(classes - set(task.classes(list(class_counts[name]))))
        if missing:
            raise DataError(
                f"class {missing[0]!r} has no image in the {name} split ({counted(len(missing), 'class')} without one); "
                f"add images of it with `visionloop data add`{_too_few(missing[0], name, table, config)}"
                f"{_why_missing(missing[0], known, left_out, assigned)}"
            )
    out_table = out / "splits.parquet"
    table[["path", "label", "sha256", "picture", "split"]].to_parquet(out_table, index=False)
    told: dict[str, Any] = {}
    if len(left_out):
        left_out["reason"], left_out["belongs_to"] = zip(*left_out["named"].map(assigned.left_out), strict=True)
        paths = known.drop_duplicates("picture").set_index("picture")["path"]
        left_out["belongs_to"] = left_out["belongs_to"].map(lambda picture: paths.get(picture, picture))
        left_out[["path", "label", "sha256", "picture", "reason", "belongs_to"]].to_parquet(
            out / "left_out.parquet", index=False
        )
        told["left_out"] = describe(out / "left_out.parquet", within=out)
        told["num_left_out"] = {str(reason): int(num) for reason, num in left_out["reason"].value_counts().items()}
    if assigned.together:
        told |= _balance(known, assigned)
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
        notes=(*_told_of_left_out(left_out), *_told_of_clusters(told), *assigned.notes),
        **told,
    )


def fold(
    dataset: Stored[Dataset],
    ledger: TestLedger,
    number: int,
    of: int,
    config: SplittingConfig,
    task: Task,
    *,
    clusters: Clusters | None = None,
) -> TestLedger:
    """The ledger by which the images of fold `number`, from 0, of all kept ones are test, and those of the others are not.

    `ledger` is the frozen one, which names pictures. Folds are stratified, hold clusters whole, and hold no image that a
    model labelled. What is split by such a ledger is no test of a model that is released.
    """
    clusters = clusters or Clusters()
    table = read_frame(dataset.folder / dataset.record.samples.name)
    table["picture"] = clusters.first_seen(table, ledger.members)
    clusters = clusters.grown(_leaks(dataset, table, clusters))
    together, by_models = clusters.together(table, groups=config.groups), clusters.by_models(table)
    pictures = table.drop_duplicates("picture")
    units, totals = Units(), Counter[str]()
    for picture, label in zip(pictures["picture"], pictures["label"], strict=True):
        if picture not in by_models:
            stratum = task.stratum(label)
            totals[stratum] += 1
            units.add(picture, stratum, together.get(picture))
    wanted = [
        {stratum: round(num * (index + 1) / of) - round(num * index / of) for stratum, num in totals.items()}
        for index in range(of - 1)
    ]
    order = sorted(units.sizes, key=lambda unit: _rank(f"fold {config.seed}", unit))
    members = dict.fromkeys(pictures["picture"], False)
    for unit, share in units.divided(wanted, order=order).items():
        members |= dict.fromkeys(units.pictures(unit), share == number)
    return TestLedger(ledger.test_share, members)


def _leaks(dataset: Stored[Dataset], table: pd.DataFrame, clusters: Clusters) -> list[tuple[str, str]]:
    """Copies of test pictures outside test, and those, by their names in `table` (path, label, picture).

    They are what validation found and no version knows of: by embeddings, or since an older version was pinned. What a
    person took for pictures of their own is none of them, and of two labels there are mirror images that are no copies.
    """
    if dataset.record.issues is None:
        return []
    known = dict(zip(table["path"], zip(table["picture"], table["label"], strict=True), strict=True))
    found = []
    for issue in issues.read(dataset.folder / dataset.record.issues.name):
        if issue.kind != "leak" or issue.id in clusters.no_problems or issue.candidate not in known:
            continue
        test, label = known[issue.candidate]
        for picture, other in (known[file] for file in issue.files if file in known and file != issue.candidate):
            if other == label and not clusters.are_apart(picture, test):
                found.append((picture, test))
    return found


@dataclass(frozen=True)
class _Assigned:
    """Where each picture goes, by its name in the ledger."""

    side: Mapping[str, SplitName]
    left_out: Mapping[str, tuple[str, str]]
    """Why a picture is in no split, and the picture that it belongs to."""
    together: Mapping[str, str]
    wanted: Mapping[SplitName, Mapping[str, int]]
    """Pictures of each stratum."""
    strata: Mapping[str, str]
    """The stratum of each picture that was divided."""
    notes: tuple[str, ...] = ()


_NEAR = "near-duplicate of a frozen test picture"
_GROUP = "of one group with a frozen test picture"
_MODEL = "labelled by a model, which only trains"


def _assign(table: pd.DataFrame, ledger: TestLedger, config: SplittingConfig, task: Task, clusters: Clusters) -> _Assigned:
    """`table`: path, label, sha256 and the picture by its name in the ledger."""
    together = clusters.together(table, groups=config.groups)
    by_models = clusters.by_models(table)
    test_of: dict[str, str] = {}
    near_test: dict[str, str] = {}
    for picture, joined in together.items():
        if ledger.members.get(picture):
            test_of.setdefault(joined, picture)
            if picture in clusters.near:
                near_test.setdefault(clusters.near[picture], picture)
    side: dict[str, SplitName] = {}
    shares: tuple[tuple[SplitName, float], ...] = (("valid", config.valid_share), ("calibration", config.calibration_share))
    left_out: dict[str, tuple[str, str]] = {}
    strata: dict[str, str] = {}
    units, only_train = Units(), []
    pictures = table.drop_duplicates("picture")
    for picture, label in zip(pictures["picture"], pictures["label"], strict=True):
        cluster = together.get(picture)
        tested = test_of.get(cluster or "")
        if ledger.members[picture]:
            if picture in by_models:
                left_out[picture] = _MODEL, picture
            else:
                side[picture] = "test"
        elif tested is not None:
            twin = near_test.get(clusters.near.get(picture, ""))
            left_out[picture] = (_NEAR, twin) if twin else (_GROUP, tested)
        elif picture in by_models:
            only_train.append(picture)
        else:
            strata[picture] = task.stratum(label)
            units.add(picture, strata[picture], cluster)
    order = sorted(units.sizes, key=lambda unit: _rank(f"{config.seed}", unit))
    notes: tuple[str, ...] = ()
    if config.order == "captured_at":
        order, notes = _newest_first(order, units, clusters.times(table))
    # Every class needs an image in each split; rounding down must not empty a small one.
    totals = Counter(strata.values())
    wanted: dict[SplitName, Mapping[str, int]] = {
        name: {stratum: max(1, round(share * num)) if share else 0 for stratum, num in totals.items()}
        for name, share in shares
    }
    names: tuple[SplitName, ...] = ("valid", "calibration", "train")
    divided = {unit: names[share] for unit, share in units.divided([*wanted.values()], order=order).items()}
    for unit, name in divided.items():
        side |= dict.fromkeys(units.pictures(unit), name)
    for picture in only_train:
        unit = together.get(picture, picture)
        if divided.get(unit, "train") == "train":
            side[picture] = "train"
        else:
            left_out[picture] = _MODEL, units.pictures(unit)[0]
    return _Assigned(side, left_out, together, wanted, strata, notes)


def _newest_first(order: list[str], units: Units, times: Mapping[str, str]) -> tuple[list[str], tuple[str, ...]]:
    """Units by the time of their newest picture; those of no known time are the oldest, in the order that they had."""
    latest = {unit: max(times.get(picture, "") for picture in units.pictures(unit)).removesuffix("Z") for unit in order}
    unknown = sum(time == "" for time in latest.values())
    if unknown == len(order):
        raise DataError(
            "splitting.order is captured_at, and of no picture outside test it is known when it was captured; add images by "
            "a source that says so (a manifest with the column captured_at), or set splitting.order to random"
        )
    note = f"{counted(unknown, 'picture')} or clusters of unknown captured_at count as the oldest" if unknown else ""
    return sorted(order, key=latest.__getitem__, reverse=True), (note,) if note else ()


def _expect_disjoint(table: pd.DataFrame, together: Mapping[str, str]) -> None:
    """What is in one cluster, or one picture, has to be in one split."""
    clusters = table["named"].map(together).fillna(table["named"])
    assert (table.groupby(clusters)["split"].nunique() <= 1).all(), "splitting put one cluster into two splits"


def _balance(known: pd.DataFrame, assigned: _Assigned) -> dict[str, Any]:
    """How the clusters that are there were divided, and how far it is from what was wanted."""
    cluster = known.drop_duplicates("picture")["picture"].map(assigned.together).dropna()
    sizes = cluster.value_counts()
    off: dict[str, dict[str, int]] = {}
    got = Counter((assigned.side.get(picture), stratum) for picture, stratum in assigned.strata.items())
    for name, each in assigned.wanted.items():
        off[name] = {stratum: got[name, stratum] - num for stratum, num in sorted(each.items()) if got[name, stratum] != num}
    return {
        "num_clusters": int((sizes > 1).sum()),
        "largest_cluster": int(sizes.max()) if len(sizes) else 0,
        "off_balance": {name: each for name, each in off.items() if each},
    }


def _told_of_left_out(left_out: pd.DataFrame) -> list[str]:
    told = []
    for reason, rows in left_out.groupby("reason") if len(left_out) else ():
        shown = ", ".join(
            f"{path} (with {other})" for path, other in zip(rows["path"].head(3), rows["belongs_to"], strict=False)
        )
        more = ", ..." if len(rows) > 3 else ""
        told.append(f"{counted(len(rows), 'image')} in no split, {reason}: {shown}{more}")
    return told


def _told_of_clusters(told: Mapping[str, Any]) -> list[str]:
    if not told.get("num_clusters"):
        return []
    largest = counted(told["largest_cluster"], "picture")
    text = f"{counted(told['num_clusters'], 'cluster')} kept whole, the largest of {largest}"
    for name, off in told["off_balance"].items():
        worst = max(off, key=lambda stratum: abs(off[stratum]))
        text += f"; {name} is off by {sum(map(abs, off.values()))} (at most {off[worst]:+d}, class {worst!r})"
    return [text if told["off_balance"] else f"{text}; every split is of the size that was wanted"]


def _too_few(label: str, missing: SplitName, table: pd.DataFrame, config: SplittingConfig) -> str:
    """What else helps a class that has fewer pictures outside test than there are splits of them, for an error."""
    own = table[table["label"] == label]
    num = int((own["split"] != "test").sum())
    wanted = 3 - len(config.none)
    if missing == "test" or num >= wanted:
        return ""
    return (
        f". It has {counted(num, 'image')} outside test, and train, valid and calibration take one each at least; where "
        f"every class has few, the recipe fewshot trains on all of them (splitting.valid_share and calibration_share 0)"
    )


def _why_missing(label: str, known: pd.DataFrame, left_out: pd.DataFrame, assigned: _Assigned) -> str:
    """What clusters have to do with a class that misses a split, as the end of an error."""
    pictures = known.loc[known["label"] == label].drop_duplicates("picture")["picture"]
    num = pictures.map(assigned.together).fillna(pictures).nunique()
    if num == len(pictures) and not len(left_out):
        return ""
    outside = int((left_out["label"] == label).sum())
    return (
        f". Its {counted(len(pictures), 'picture')} are {counted(num, 'cluster')}, of which each is in one split, and "
        f"{counted(outside, 'image')} of it belong to frozen test pictures; splitting.groups=false keeps only "
        f"near-duplicates together"
    )
