"""What `data add` looks for before the side of a picture is frozen: near-duplicates that would poison the frozen test set.

Only small descriptors are compared, and what they propose is verified on the pixels; what needs embeddings is looked for by
`data check`. Nothing is written here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from components import data_folder, dataversions, duplicates
from components.clusters import Clusters
from components.companions import PIN, TEST_LEDGER
from components.contracts.errors import DataError
from components.contracts.issues import Pair
from components.contracts.progress import Progress, silent
from components.contracts.wording import counted
from components.facts import File, facts
from components.images import decode
from components.splitting import TestLedger
from flows.workspace.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd

Handling = Literal["refuse", "exclude", "ignore"]
"""What becomes of new pictures that would poison the frozen test set: nothing is added, they are added and kept out of what
they would poison, or they are taken for pictures of their own."""
MAX_CLUSTER_SHARE = 0.05
_SMALL_CLUSTER = 10
"""Pictures of one cluster that are never too many, however few pictures there are."""
_SHOWN = 10
_Kind = Literal[
    "copy of a test picture", "test picture with a copy", "copy across splits", "group across splits", "other label"
]
_WHY: Mapping[_Kind, tuple[str, str]] = {
    "copy of a test picture": ("shows what", "shows, a frozen test picture"),
    "test picture with a copy": ("is a frozen test picture and shows what", "shows, which is none"),
    "copy across splits": ("shows what", "shows, on the other side of the given splits"),
    "group across splits": ("is of one group with", "which is on the other side of the given splits"),
    "other label": ("shows what", "shows, under another label"),
}


@dataclass(frozen=True)
class Conflict:
    """A new file that would poison the frozen test set, and the file that it belongs to."""

    kind: _Kind
    file: str
    label: str
    twin: str
    twin_label: str


class PoisonsTest(DataError):
    """New pictures would poison the frozen test set, and nobody said what to do with them. Nothing was changed."""

    def __init__(self, message: str, conflicts: Sequence[Conflict] = ()) -> None:
        super().__init__(message)
        self.conflicts = tuple(conflicts)


@dataclass(frozen=True)
class Looked:
    """What was found among all pictures, new and old."""

    clusters: Clusters
    """With the near-duplicates that count."""
    not_test: frozenset[str] = frozenset()
    """New pictures that must not become test."""
    conflicts: tuple[Conflict, ...] = ()
    handling: Handling = "refuse"
    of_small: str = ""
    """What a person should know of pictures that are too small to be compared; empty where there are none."""


def look_for(
    workspace: Workspace,
    clusters: Clusters,
    files: Sequence[tuple[str, Path]],
    folder: Path,
    groups: Mapping[Path, str],
    *,
    ledger: TestLedger,
    handling: Handling = "refuse",
    max_cluster_share: float = MAX_CLUSTER_SHARE,
    keep_splits: bool = False,
    progress: Progress = silent,
) -> Looked:
    """Look for near-duplicates among what lies in data/ and (class, file) of `folder` that are to be added to it.

    `ledger` knows the sides that given splits chose, and `groups` what is said of files. Raises PoisonsTest by `handling`.
    """
    table = _table(workspace, files, folder, progress)
    said = {str(path): group for path, group in groups.items()}
    in_groups = table[table["place"].isin(said.keys())]
    clusters = clusters.with_groups(dict(zip(in_groups["sha256"], in_groups["place"].map(said), strict=True)))
    return look(
        table,
        clusters,
        ledger,
        handling=handling,
        max_cluster_share=max_cluster_share,
        keep_splits=keep_splits,
        cache=workspace.cache,
        progress=progress,
    )


def join_again(workspace: Workspace) -> None:
    """Join the near-duplicates in data/ once labels were changed there: mirror images of one label are copies.

    The side of no picture changes. The next pin makes it part of a version.
    """
    clusters, ledger = Clusters.read(workspace.root), TestLedger.read(workspace.root / TEST_LEDGER)
    looked = look_for(workspace, clusters, [], workspace.root, {}, ledger=ledger, handling="exclude", max_cluster_share=1.0)
    looked.clusters.write(workspace.root)


def _table(workspace: Workspace, files: Sequence[tuple[str, Path]], folder: Path, progress: Progress) -> pd.DataFrame:
    """What `look` takes; a file is new when the pinned version has none of its bytes in its class."""
    root, data = workspace.root, workspace.data
    listed = data_folder.listing(data).classes if data.is_dir() else {}
    hashes = dataversions.hashes(root) if listed else {}
    is_pinned = (root / PIN).exists() and not dataversions.adoptable(root)
    pinned = dataversions.pinned_hashes(root) if is_pinned else {}
    there = [(label, path, path.relative_to(data).as_posix()) for label, paths in listed.items() for path in paths]
    looked = [
        *(File(path, f"{data_folder.DATA}/{name}", label, hashes.get(name, "")) for label, path, name in there),
        *(File(path, data_folder.shown(path.relative_to(folder)), label) for label, path in files),
    ]
    table = facts(looked, cache=workspace.cache, progress=progress)
    table["place"] = [str(file.place) for file in looked]
    as_pinned = [name in pinned and pinned[name] == hashes.get(name) for _, _, name in there]
    contents = list(zip(table["label"], table["sha256"], strict=True))
    decided = {content for content, is_old in zip(contents, as_pinned, strict=False) if is_old}
    table["new"] = [
        *(not is_old for is_old in as_pinned),
        *(content not in decided for content in contents[len(there) :]),
    ]
    return table[table["reason"] == ""].drop_duplicates("path")


def look(
    table: pd.DataFrame,
    clusters: Clusters,
    ledger: TestLedger,
    *,
    handling: Handling = "refuse",
    max_cluster_share: float = MAX_CLUSTER_SHARE,
    keep_splits: bool = False,
    cache: Path | None = None,
    progress: Progress = silent,
) -> Looked:
    """Look for near-duplicates among files: place, path, label, sha256, picture, descriptor, short_side and new."""
    table = table.assign(picture=clusters.first_seen(table, ledger.members))
    places = dict(zip(table["path"], table["place"], strict=True))
    found = duplicates.pairs(
        table, read=lambda path: decode(Path(places[path]).read_bytes()), cache=cache, progress=progress
    )
    seen = _Seen(table, ledger)
    alike = {(seen.picture[pair.first], seen.picture[pair.second]): pair.relation for pair in found if seen.counts(pair)}
    by_picture = [pair for pair in alike if not clusters.are_apart(*pair)]
    grown = clusters.grown(by_picture)
    together = grown.together(table[table["new"]]) if keep_splits else grown.near
    conflicts = [*seen.on_both_sides(together, grown.near), *seen.contradictions(by_picture)]
    if conflicts and handling == "refuse":
        raise PoisonsTest(_told(conflicts), conflicts)
    not_test: frozenset[str] = frozenset()
    if handling == "ignore":
        ignored = {
            (one, other)
            for one, other in by_picture
            if not seen.new_files.keys().isdisjoint((one, other))
            and not (one in clusters.near and clusters.near[one] == clusters.near.get(other))
        }
        grown = clusters.grown(pair for pair in by_picture if pair not in ignored)
        grown = grown.with_apart({pair: alike[pair] for pair in ignored})
    else:
        contradicted = {seen.picture[conflict.file] for conflict in conflicts if conflict.kind == "other label"}
        not_test = frozenset(picture for picture in contradicted if picture not in ledger.members)
    _expect_small(clusters, grown, seen, max_cluster_share)
    return Looked(grown, not_test, tuple(conflicts), handling, duplicates.told_of_small(table))


class _Seen:
    """Files by the pictures that they show."""

    def __init__(self, table: pd.DataFrame, ledger: TestLedger) -> None:
        self.ledger = ledger
        self.picture: dict[str, str] = dict(zip(table["path"], table["picture"], strict=True))
        self.label: dict[str, str] = dict(zip(table["path"], table["label"], strict=True))
        self.new_files: dict[str, list[str]] = {}
        self.files: dict[str, list[str]] = {}
        for path, picture, is_new in zip(table["path"], table["picture"], table["new"], strict=True):
            self.files.setdefault(picture, []).append(path)
            if is_new:
                self.new_files.setdefault(picture, []).append(path)

    def labels(self, picture: str) -> set[str]:
        return {self.label[path] for path in self.files[picture]}

    def counts(self, pair: Pair) -> bool:
        """Whether a pair joins two pictures.

        Mirror images of several labels are several things, such as arrows to the left and to the right.
        """
        one, other = self.picture[pair.first], self.picture[pair.second]
        if one == other:
            return False
        return pair.relation != "flipped" or self.labels(one) == self.labels(other)

    def on_both_sides(self, together: Mapping[str, str], near: Mapping[str, str]) -> list[Conflict]:
        """New files of clusters, by picture, that have pictures in test and outside; `near` joins copies alone."""
        members: dict[str, list[str]] = defaultdict(list)
        for picture, cluster in together.items():
            members[cluster].append(picture)
        found = []
        for picture, paths in self.new_files.items():
            others = members.get(together.get(picture, ""), [])
            is_test = self.ledger.members.get(picture, False)
            against = [other for other in others if self.ledger.members.get(other, False) != is_test and other in self.files]
            if is_test:  # told once, by what is outside test, unless that was there before
                against = [other for other in against if other not in self.new_files]
            if not against:
                continue
            copies = [other for other in against if picture in near and near.get(other) == near[picture]]
            kind: _Kind = "group across splits"
            if copies:
                one_side: _Kind = "test picture with a copy" if is_test else "copy of a test picture"
                kind = "copy across splits" if copies[0] in self.new_files else one_side
            found += [self._conflict(kind, path, (copies or against)[0]) for path in paths]
        return found

    def contradictions(self, pairs: Iterable[tuple[str, str]]) -> list[Conflict]:
        """New files that show what others show under another label, by their pixels or as near-duplicates."""
        found = []
        for picture, paths in self.new_files.items():
            if len(self.labels(picture)) > 1:
                found += [self._conflict("other label", path, picture) for path in paths]
        for one, other in pairs:
            for picture, twin in ((one, other), (other, one)):
                if self.labels(one) != self.labels(other):
                    found += [self._conflict("other label", path, twin) for path in self.new_files.get(picture, ())]
        return found

    def _conflict(self, kind: _Kind, path: str, twin: str) -> Conflict:
        others = [other for other in self.files[twin] if other != path]
        other = next((other for other in others if self.label[other] != self.label[path]), others[0])
        return Conflict(kind, path, self.label[path], other, self.label[other])


def told_of(looked: Looked) -> Iterator[str]:
    """What a person should know of what was looked for, and how."""
    near = looked.clusters.near
    if near:
        yield (
            f"{counted(len(near), 'picture')} are near-duplicates of others ({counted(len({*near.values()}), 'cluster')}), "
            f"looked for without embeddings, with which `data check` may find more"
        )
    files = len({conflict.file for conflict in looked.conflicts})
    if files:
        became = "were taken for pictures of their own"
        if looked.handling == "exclude":
            of_labels = {conflict.kind == "other label" for conflict in looked.conflicts}
            ways = {False: "are kept out of every split", True: "are never test where their label is contradicted"}
            became = " or ".join(way for is_of_labels, way in ways.items() if is_of_labels in of_labels)
        shown = ", ".join(f"{one.file} (with {one.twin})" for one in looked.conflicts[:3])
        more = ", ..." if len(looked.conflicts) > 3 else ""
        yield f"{counted(files, 'new file')} would poison the frozen test set and {became}: {shown}{more}"
    if looked.of_small:
        yield looked.of_small


def _told(conflicts: Sequence[Conflict]) -> str:
    """What is asked, with files by name."""
    files = list(dict.fromkeys(conflict.file for conflict in conflicts))
    lines = [
        f"\n  {one.file} ({one.label}) {_WHY[one.kind][0]} {one.twin} ({one.twin_label}) {_WHY[one.kind][1]}"
        for one in conflicts[:_SHOWN]
    ]
    more = f"\n  ... and {len(conflicts) - _SHOWN} more" if len(conflicts) > _SHOWN else ""
    return (
        f"{counted(len(files), 'new file')} would poison the frozen test set:{''.join(lines)}{more}\n"
        f"Nothing was changed. Remove them or mend their labels, or run it again with one of these:\n"
        f"  --near-duplicates exclude  adds them; what belongs to a test picture is in no split, what has two labels never "
        f"test\n"
        f"  --near-duplicates ignore   takes them for pictures of their own, because they only look alike"
    )


def _expect_small(before: Clusters, clusters: Clusters, seen: _Seen, max_share: float) -> None:
    """Raises PoisonsTest for a cluster that grew and is so large that it is likelier a chain of look-alikes."""
    sizes = Counter(clusters.near[picture] for picture in seen.files if picture in clusters.near)
    limit = max(max_share * len(seen.files), _SMALL_CLUSTER)
    grew = {
        cluster
        for picture, cluster in clusters.near.items()
        if picture in seen.new_files or before.near.get(picture) != cluster
    }
    for cluster, size in sizes.most_common():
        if size > limit and cluster in grew:
            files = [paths[0] for picture, paths in seen.files.items() if clusters.near.get(picture) == cluster]
            raise PoisonsTest(
                f"{counted(size, 'picture')} of {len(seen.files)} ({size / len(seen.files):.0%}) are one cluster of "
                f"near-duplicates ({', '.join(files[:3])}, ...), and all of it would fall on one side. If they are copies, "
                f"go on with --max-cluster-share {min(1.0, size / len(seen.files) + 0.005):.2f}; if not, with "
                f"--near-duplicates ignore. Nothing was changed"
            )
