"""What differs between two versions of the data, told by names and hashes of bytes: no file is read.

A file is known by its bytes. The same bytes under another name of the same class are a renamed file; in the folder of
another class they are a relabelled one. A class whose every file went to one new class is a renamed class.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from components.contracts.data import Renames, names_after

Files = Mapping[str, str]
"""DVC's hash of a file's bytes by its path in `data/`."""


@dataclass(frozen=True)
class Moved:
    """The same bytes at another path."""

    before: str
    after: str
    oid: str


@dataclass(frozen=True)
class RenamedClass:
    """A class that goes by another name."""

    old: str
    new: str
    num_files: int
    """Files whose class this alone changed."""
    recorded: bool
    """Whether the version says so; else it is what the files look like, and models of the old name do not know the new."""


@dataclass(frozen=True)
class Difference:
    """Every file that differs, under one heading each; paths are those of `data/`, sorted."""

    added: dict[str, str]
    """Hash of the bytes by path."""
    removed: dict[str, str]
    changed: dict[str, tuple[str, str]]
    """Other bytes under the same path: the hashes before and after."""
    relabelled: tuple[Moved, ...]
    renamed: tuple[Moved, ...]
    renamed_classes: tuple[RenamedClass, ...]
    class_counts_before: dict[str, int]
    class_counts_after: dict[str, int]

    @property
    def counts(self) -> dict[str, int]:
        """Files, and classes that were renamed, by heading."""
        return {
            "added": len(self.added),
            "removed": len(self.removed),
            "changed": len(self.changed),
            "relabelled": len(self.relabelled),
            "renamed": len(self.renamed),
            "renamed_classes": len(self.renamed_classes),
        }

    def __bool__(self) -> bool:
        return any(self.counts.values())


@dataclass(frozen=True)
class TestChanges:
    """Which of the files that differ are in the frozen test set; paths are those of `data/`, sorted."""

    __test__ = False  # not a pytest class, whatever its name

    joined: tuple[str, ...] = ()
    """Added files whose picture is test."""
    left: tuple[str, ...] = ()
    """Removed files whose picture was test."""
    relabelled: tuple[str, ...] = ()
    """Test pictures that have another label now: every model is judged on them by that."""
    changed: tuple[str, ...] = ()
    """Files whose bytes changed, and whose picture was or is test."""
    undecided: tuple[str, ...] = ()
    """Pictures whose side no ledger decided yet: `data add` does."""
    rewritten: int = 0
    """Pictures whose side is another than it was, which no command of ours does."""
    problem: str = ""
    """Why it cannot be told; empty where it can."""


def class_of(path: str) -> str:
    """The class of a file by its path in `data/`; empty for one that lies in no class folder, or is hidden."""
    label, *rest = path.split("/")
    return label if len(rest) == 1 and not label.startswith(".") and not rest[0].startswith(".") else ""


def class_counts(files: Iterable[str]) -> dict[str, int]:
    """Files by class, sorted; files of no class are left out."""
    counts = Counter(map(class_of, files))
    return {label: counts[label] for label in sorted(counts) if label}


def difference(before: Files, after: Files, renames: Renames = ()) -> Difference:
    """What differs; `renames` are the classes that were renamed on the way from one version to the other."""
    counts_before, counts_after = class_counts(before), class_counts(after)
    names = dict(zip(counts_before, names_after(list(counts_before), renames), strict=True))
    names = {old: new for old, new in names.items() if old != new}
    # Under the new names of their classes, files of renamed classes are where they were.
    origin = {f"{names[label]}/{path.partition('/')[2]}": path for path in before if (label := class_of(path)) in names}
    moved = set(origin.values())
    at = {path: oid for path, oid in before.items() if path not in moved} if moved else before
    at = {**at, **{path: before[old] for path, old in origin.items()}} if moved else at
    removed, added = dict(at.items() - after.items()), dict(after.items() - at.items())
    relabelled, renamed = _matched(removed, added)
    changed = {path: (removed.pop(path), added.pop(path)) for path in sorted(removed.keys() & added.keys())}
    found = Difference(
        added=dict(sorted(added.items())),
        removed={origin.get(path, path): oid for path, oid in sorted(removed.items())},
        changed=changed,
        relabelled=tuple(replace(one, before=origin.get(one.before, one.before)) for one in relabelled),
        renamed=tuple(replace(one, before=origin.get(one.before, one.before)) for one in renamed),
        renamed_classes=tuple(RenamedClass(old, new, counts_before[old], True) for old, new in names.items()),
        class_counts_before=counts_before,
        class_counts_after=counts_after,
    )
    return _with_moved_classes(found)


@dataclass(frozen=True)
class Balance:
    """A class before and after: files, and their share of all that are in a class."""

    name: str
    was: str
    """The name before, where it is another."""
    before: int
    after: int
    share_before: float
    share_after: float


def balance(found: Difference) -> list[Balance]:
    """The classes of two versions, those that changed most first."""
    names = {one.old: one.new for one in found.renamed_classes}
    olds = {new: old for old, new in names.items()}
    before = {names.get(label, label): count for label, count in found.class_counts_before.items()}
    after = found.class_counts_after
    totals = max(1, sum(before.values())), max(1, sum(after.values()))
    rows = [
        Balance(
            name,
            olds.get(name, ""),
            before.get(name, 0),
            after.get(name, 0),
            before.get(name, 0) / totals[0],
            after.get(name, 0) / totals[1],
        )
        for name in {*before, *after}
    ]
    return sorted(rows, key=lambda row: (-abs(row.after - row.before), not row.was, row.name))


def _matched(removed: dict[str, str], added: dict[str, str]) -> tuple[list[Moved], list[Moved]]:
    """Relabelled and renamed files, which are taken out of both."""
    found: list[Moved] = []
    # Of several files of the same bytes, those that have most in common belong together.
    for key in (class_of, _name_of, _none_of):
        waiting: dict[tuple[str, str], list[str]] = defaultdict(list)
        for path in sorted(added, reverse=True):
            waiting[added[path], key(path)].append(path)
        for before in sorted(removed):
            oid = removed[before]
            if after := waiting.get((oid, key(before))):
                found.append(Moved(before, after.pop(), oid))
                del removed[before], added[found[-1].after]
    found.sort(key=_place)
    renamed = [one for one in found if class_of(one.before) == class_of(one.after)]
    return [one for one in found if class_of(one.before) != class_of(one.after)], renamed


def _name_of(path: str) -> str:
    return path.rpartition("/")[2]


def _none_of(_: str) -> str:
    return ""


def _place(moved: Moved) -> tuple[str, str]:
    return moved.before, moved.after


def _with_moved_classes(found: Difference) -> Difference:
    """Relabelled files that are a whole class under a name that is new, told as that class."""
    went: dict[str, set[str]] = defaultdict(set)
    came: dict[str, set[str]] = defaultdict(set)
    for one in found.relabelled:
        went[class_of(one.before)].add(class_of(one.after))
        came[class_of(one.after)].add(class_of(one.before))
    named = {
        old: next(iter(new))
        for old, new in went.items()
        if old
        and old not in found.class_counts_after
        and len(new) == 1
        and new.isdisjoint(found.class_counts_before)
        and came[next(iter(new))] == {old}
        and "" not in new
    }
    if not named:
        return found
    counts = Counter(class_of(one.before) for one in found.relabelled)
    classes = tuple(RenamedClass(old, named[old], counts[old], False) for old in sorted(named))
    rest = tuple(one for one in found.relabelled if class_of(one.before) not in named)
    return replace(found, relabelled=rest, renamed_classes=(*found.renamed_classes, *classes))
