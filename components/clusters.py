"""Clusters: which pictures belong together, so that no split has one of them where another has the rest.

Pictures are together when they are verified near-duplicates (`data.clusters.csv`, which only grows), or of one group
(`data.attributes.csv`): the same part, patient or clip. Likeness that nobody verified joins nothing.

A picture is named by the first 32 hex digits of the digest of its pixels. The file that showed it is kept beside it
(`data.files.csv`), so that a decoder that makes other pixels of the same file finds the picture that it was.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from components.companions import APART, ATTRIBUTES, CLUSTERS, FILES, REVIEWS

if TYPE_CHECKING:
    import pandas as pd

_DIGITS = 32
"""Of a file's sha256, as of a picture's digest."""


@dataclass(frozen=True)
class Clusters:
    """What a data version knows of which pictures belong together, of all that were ever in it."""

    near: Mapping[str, str] = field(default_factory=dict)
    """The cluster of near-duplicates of a picture that has some: the lowest digest among them."""
    apart: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Pairs, the lower digest first, that a person took for pictures of their own, and how they are alike."""
    files: Mapping[str, str] = field(default_factory=dict)
    """The picture that a file was when it was first seen, by the first 32 hex digits of its sha256."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """The group of a file; so are the next two, and each holds only files that something is known of."""
    captured_at: Mapping[str, str] = field(default_factory=dict)
    of_models: frozenset[str] = frozenset()
    """Files that a model labelled."""
    no_problems: frozenset[str] = frozenset()
    """Issues, by id, of which a person said that they are none."""

    @classmethod
    def read(cls, root: Path) -> Clusters:
        """Of the workspace `root`; empty where its version has no companions. Raises DataError."""
        near, apart, files = CLUSTERS.read(root), APART.read(root), FILES.read(root)
        reviews = REVIEWS.read(root)
        return cls(
            near=dict(zip(near["picture"], near["cluster"], strict=True)),
            apart={
                _pair(*pair.partition("-")[::2]): how for pair, how in zip(apart["pair"], apart["relation"], strict=True)
            },
            files=dict(zip(files["file"], files["picture"], strict=True)),
            no_problems=frozenset(reviews.loc[reviews["decision"] == "not_a_problem", "issue"]),
        ).with_attributes_of(root)

    def with_attributes_of(self, root: Path) -> Clusters:
        """With what the workspace `root` says of files now."""
        known = ATTRIBUTES.read(root)
        keys = known["sha256"].str[:_DIGITS]
        grouped, timed = known["group"] != "", known["captured_at"] != ""
        return replace(
            self,
            groups=dict(zip(keys[grouped], known.loc[grouped, "group"], strict=True)),
            captured_at=dict(zip(keys[timed], known.loc[timed, "captured_at"], strict=True)),
            of_models=frozenset(keys[known["label_source"] == "model"]),
        )

    def write(self, root: Path) -> None:
        """Write what this module owns: near-duplicates, what is none of them, and files."""
        CLUSTERS.write(root, CLUSTERS.frame({picture: (cluster,) for picture, cluster in self.near.items()}))
        APART.write(root, APART.frame({"-".join(pair): (relation,) for pair, relation in self.apart.items()}))
        FILES.write(root, FILES.frame({file: (picture,) for file, picture in self.files.items()}))

    def first_seen(self, table: pd.DataFrame, known: Mapping[str, object]) -> pd.Series:
        """The picture of each row (sha256, picture), by the name that `known` has for it.

        That is its own, and where that one is unknown the name that the same file had when it was first seen.
        """
        before = table["sha256"].str[:_DIGITS].map(self.files)
        renamed = ~table["picture"].isin(known.keys()) & before.isin(known.keys())
        return table["picture"].mask(renamed, before)

    def grown(self, pairs: Iterable[tuple[str, str]], files: Mapping[str, str] | None = None) -> Clusters:
        """With pairs of near-duplicates and files, by sha256, that are seen; what was known stays joined."""
        joined = joined_by([*self.near.items(), *pairs])
        more = {sha256[:_DIGITS]: picture for sha256, picture in (files or {}).items()}
        return replace(self, near=joined, files={**more, **self.files})

    def with_apart(self, pairs: Mapping[tuple[str, str], str]) -> Clusters:
        """With pairs of pictures of their own, and how they are alike; what is joined stays joined."""
        return replace(self, apart={**self.apart, **{_pair(*pair): relation for pair, relation in pairs.items()}})

    def are_apart(self, one: str, other: str) -> bool:
        """Whether a person took two pictures that are alike for pictures of their own."""
        return _pair(one, other) in self.apart

    def with_groups(self, groups: Mapping[str, str]) -> Clusters:
        """With the groups of more files, by sha256."""
        return replace(self, groups={**self.groups, **{sha256[:_DIGITS]: group for sha256, group in groups.items()}})

    def together(self, table: pd.DataFrame, *, groups: bool = True) -> dict[str, str]:
        """The cluster of each picture that belongs to others, by near-duplicates and, with `groups`, by group.

        `table` (sha256, picture) are the files that are there; files that once were count as well.
        """
        edges = list(self.near.items())
        if groups and self.groups:
            pictures = {**self.files, **dict(zip(table["sha256"].str[:_DIGITS], table["picture"], strict=True))}
            first: dict[str, str] = {}
            for file, group in self.groups.items():
                if (picture := pictures.get(file)) is not None:
                    edges.append((first.setdefault(group, picture), picture))
        return joined_by(edges)

    def by_models(self, table: pd.DataFrame) -> set[str]:
        """The pictures of a table (sha256, picture) that only files show which a model labelled."""
        if not self.of_models:
            return set()
        is_models = table["sha256"].str[:_DIGITS].isin(self.of_models)
        return set(table.loc[is_models, "picture"]) - set(table.loc[~is_models, "picture"])

    def times(self, table: pd.DataFrame) -> dict[str, str]:
        """When each picture of a table (sha256, picture) was captured, the latest of its files; only where it is known."""
        known = table["sha256"].str[:_DIGITS].map(self.captured_at)
        return {str(picture): time for picture, time in known.groupby(table["picture"]).max().dropna().items()}


def _pair(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one < other else (other, one)


def joined_by(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The lowest name among all that are joined, by each name that is joined to another; a pair of equals joins nothing."""
    parent: dict[str, str] = {}

    def top(name: str) -> str:
        while (above := parent.setdefault(name, name)) != name:
            parent[name] = parent[above]
            name = parent[name]
        return name

    for one, other in pairs:
        if one != other:
            first, second = top(one), top(other)
            parent[max(first, second)] = min(first, second)
    return {name: top(name) for name in sorted(parent)}


class Units:
    """What is divided as a whole: clusters, and pictures that belong to none."""

    def __init__(self) -> None:
        self.sizes: dict[str, Mapping[str, int]] = {}
        """Pictures of each stratum, by unit."""
        self._of_clusters: dict[str, list[str]] = {}
        self._alone: dict[str, Mapping[str, int]] = {}

    def add(self, picture: str, stratum: str, cluster: str | None) -> None:
        """A picture, and the cluster that it belongs to."""
        if cluster is None:
            # One size for all of a stratum: there may be millions of them.
            self.sizes[picture] = self._alone.setdefault(stratum, {stratum: 1})
        else:
            self._of_clusters.setdefault(cluster, []).append(picture)
            size = self.sizes.get(cluster, {})
            self.sizes[cluster] = {**size, stratum: size.get(stratum, 0) + 1}

    def pictures(self, unit: str) -> Sequence[str]:
        """The pictures of a unit that were added."""
        return self._of_clusters.get(unit, (unit,))

    def divided(self, wanted: Sequence[Mapping[str, int]], *, order: Iterable[str]) -> dict[str, int]:
        """The share of each unit: the first, in this order, that it brings closer to the pictures of each stratum it wants.

        What none of them takes is of the share behind the last one. A share that got nothing of a stratum although it wants
        some gets the smallest unit that has it, unless the last share would have none.
        """
        whole = Counter[str]()
        for size in self.sizes.values():
            whole.update(size)
        missing = [dict(each) for each in wanted]
        found: dict[str, int] = {}
        for unit in order:
            found[unit] = len(wanted)
            for share, left in enumerate(missing):
                # How the squared distances change, in shares of the stratum: a rare one counts as much as a common one.
                if sum(n * (n - 2 * left[stratum]) / whole[stratum] for stratum, n in self.sizes[unit].items()) < 0:
                    found[unit] = share
                    for stratum, n in self.sizes[unit].items():
                        left[stratum] -= n
                    break
        self._give_each_some(wanted, found)
        return found

    def _give_each_some(self, wanted: Sequence[Mapping[str, int]], found: dict[str, int]) -> None:
        have: list[set[str]] = [set() for _ in range(len(wanted) + 1)]
        for unit, share in found.items():
            have[share].update(self.sizes[unit])
        lacking = [
            (n, s) for n, each in enumerate(wanted) for s, count in sorted(each.items()) if count and s not in have[n]
        ]
        if not lacking:
            return
        last: dict[str, list[str]] = defaultdict(list)
        for unit, share in found.items():
            if share == len(wanted):
                for stratum in self.sizes[unit]:
                    last[stratum].append(unit)
        for share, stratum in lacking:
            for unit in sorted(last[stratum], key=lambda unit: sum(self.sizes[unit].values())):
                if all(len(last[each]) > 1 for each in self.sizes[unit]) and stratum not in have[share]:
                    found[unit] = share
                    have[share].update(self.sizes[unit])
                    for each in self.sizes[unit]:
                        last[each].remove(unit)
