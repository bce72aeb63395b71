"""Cards: the issues that a person is asked about, each with what its files were when it was asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from components.contracts.errors import DataError, StoreError
from components.contracts.issues import SEVERITIES, Issue, issue_id
from components.contracts.records import Record, canonical_json
from components.store import sha256_file, write_atomically
from flows.workspace.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd

_VERSION = re.compile(r"[0-9a-f]{32}\.dir")


class CardFile(Record):
    """One file of an issue."""

    path: str
    """Relative to data/."""
    label: str
    sha256: str
    test: bool
    """Whether its picture is frozen as test."""


class Card(Record):
    """An issue with its files, in the issue's order."""

    issue: Issue
    files: tuple[CardFile, ...]
    """Those of its issue, and of issues of the same id: what is decided of a file holds for every copy of its bytes."""

    @property
    def file(self) -> CardFile | None:
        """The file to decide on; None where the issue is about a class, or the data as a whole."""
        return self.files[0] if self.files else None

    @property
    def is_test(self) -> bool:
        """Whether one of its files is frozen as test."""
        return any(file.test for file in self.files)

    @property
    def is_leak(self) -> bool:
        """Whether its files are on both sides of the frozen test set."""
        return len({file.test for file in self.files}) > 1

    @property
    def twins(self) -> tuple[CardFile, ...]:
        """The other files, the one that the issue would keep first."""
        return tuple(sorted(self.files[1:], key=lambda file: (file.path != self.issue.candidate, file.path)))

    @property
    def label(self) -> str:
        """The label that the issue proposes for its files; empty where it proposes another thing, or none."""
        candidate = self.issue.candidate
        return candidate if candidate and "/" not in candidate and self.not_labelled(candidate) else ""

    def not_labelled(self, label: str) -> tuple[CardFile, ...]:
        """Its files with another label: those of one issue show the same picture, so that they get one label together."""
        return tuple(file for file in self.files if file.label != label)

    @property
    def copies(self) -> tuple[CardFile, ...]:
        """The files that it proposes to remove, since another one of it shows the same; a leak's test pictures stay."""
        if self.issue.candidate not in [file.path for file in self.files]:
            return ()
        if self.is_leak:
            return tuple(file for file in self.files if not file.test)
        return tuple(file for file in self.files if file.path != self.issue.candidate)

    @property
    def leaving(self) -> tuple[CardFile, ...]:
        """What `remove` takes: the file to decide on, and its equals in bytes and label unless one of them is to stay."""
        if self.issue.candidate in [file.path for file in self.files]:
            return self.files[:1]
        return tuple(file for file in self.files if (file.sha256, file.label) == (self.files[0].sha256, self.files[0].label))

    @property
    def proposal(self) -> str:
        """What `accept` does, in words; empty where the issue proposes nothing that can be done by itself."""
        if self.label:
            changed = len(self.not_labelled(self.label))
            return f"relabel:{self.label}" + (f" ({changed} files)" if changed > 1 else "")
        return "remove " + " | ".join(file.path for file in self.copies) if self.copies else ""

    def id_after(self, labels: Mapping[str, str]) -> str:
        """The id that the same issue would have once its files have other labels."""
        own = [file for file in self.files if file.path in self.issue.files]
        return issue_id(self.issue.kind, [(file.sha256, labels.get(file.path, file.label)) for file in own])


def files_of(data: Path, facts: pd.DataFrame) -> list[CardFile]:
    """The files that facts are about (path, label, sha256; split where it is known), in their order.

    Nobody knows the side of a file that cannot be decoded, and it is not test.
    """
    splits = facts["split"] if "split" in facts else [""] * len(facts)
    return [
        CardFile(path=path, label=label, sha256=sha256 or sha256_file(data / path), test=split == "test")
        for path, label, sha256, split in zip(facts["path"], facts["label"], facts["sha256"], splits, strict=True)
    ]


def cards_of(issues: Iterable[Issue], files: Iterable[CardFile]) -> list[Card]:
    """A card for each id of an issue; `files` are those of the data version, as far as issues name them.

    An id tells bytes and labels, so that issues of copies have the same one; the first of them stands for all.
    """
    by_path = {file.path: file for file in files}
    found: dict[str, tuple[Issue, dict[str, CardFile]]] = {}
    for issue in issues:
        _, theirs = found.setdefault(issue.id, (issue, {}))
        theirs.update({path: by_path[path] for path in issue.files})
    return [Card(issue=issue, files=tuple(theirs.values())) for issue, theirs in found.values()]


def by_cost(cards: Iterable[Card]) -> list[Card]:
    """What costs most to leave first: frozen test pictures and leaks into them, then severity, then score."""

    def cost(card: Card) -> tuple[bool, int, float, str, str]:
        issue = card.issue
        return not card.is_test, SEVERITIES.index(issue.severity), issue.score, issue.kind, issue.id

    return sorted(cards, key=cost)


def keep(workspace: Workspace, version: str, cards: Sequence[Card]) -> None:
    """Remember what was asked about a data version, beside what was asked before."""
    found = {**asked(workspace, version), **{card.issue.id: card for card in cards}}
    path = _place(workspace, version)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, canonical_json([found[name].to_json() for name in sorted(found)]).encode())


def asked(workspace: Workspace, version: str) -> dict[str, Card]:
    """The cards that were asked about a data version here, by the issue's id; none of a version that nobody asked about."""
    if not _VERSION.fullmatch(version):
        return {}
    path = _place(workspace, version)
    try:
        cards = [Card.read(values) for values in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, StoreError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove it and run `visionloop data review` again") from error
    return {card.issue.id: card for card in cards}


def _place(workspace: Workspace, version: str) -> Path:
    return workspace.state / "reviews" / version.removesuffix(".dir") / "asked.json"
