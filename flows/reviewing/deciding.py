"""From people's decisions on cards to what becomes of the files: nothing is guessed, and what contradicts is named."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from components.contracts.errors import DataError
from components.samples import alike
from flows.reviewing.cards import Card, CardFile

DECISIONS = ("accept", "relabel:LABEL", "remove", "not_a_problem")
"""What the issue proposes; what its files show; that the one to decide on first leaves, with its equals unless one of them
is to be kept; that nothing is to be done."""


_MAX_NAME_BYTES = 255


@dataclass(frozen=True)
class Decision:
    """What a person said of one card."""

    place: str
    """Where it was said, such as `line 3`, by which problems are named."""
    card: Card
    said: str
    """One of DECISIONS."""
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What becomes of the files of a version, as far as nothing contradicts."""

    relabelled: dict[str, str]
    """The new label by path."""
    removed: tuple[str, ...]
    test: dict[str, str]
    """The frozen test pictures among them by path, and where each was decided."""
    problems: tuple[str, ...]


def normalised(said: str) -> str:
    """A decision in its one spelling; what is none comes back as it is."""
    word, colon, label = said.strip().partition(":")
    word = word.strip().lower()
    return f"{word}:{label.strip()}" if colon else word


def decide(decisions: Sequence[Decision], classes: Collection[str]) -> Outcome:
    """Work out what decisions do to files; `classes` are the labels that can be given."""
    problems: list[str] = []
    wanted: dict[str, dict[str, list[Decision]]] = defaultdict(lambda: defaultdict(list))
    """Decisions by path and by what becomes of it: a label, or "" where it leaves."""
    files: dict[str, CardFile] = {}
    copies: list[tuple[set[str], Decision]] = []
    for decision in decisions:
        card = decision.card
        files |= {file.path: file for file in card.files}
        problem = _problem(decision, classes)
        if problem:
            problems.append(f"{decision.place}: {problem}")
            continue
        said = f"relabel:{card.label}" if decision.said == "accept" and card.label else decision.said
        if said == "accept":
            for file in card.copies:
                wanted[file.path][""].append(decision)
            copies.append(({file.path for file in card.files}, decision))
        elif said == "remove":
            for file in card.leaving:
                wanted[file.path][""].append(decision)
        elif said != "not_a_problem":
            label = said.partition(":")[2]
            for file in card.not_labelled(label):
                wanted[file.path][label].append(decision)
    for path, ways in sorted(wanted.items()):
        if len(ways) > 1:
            told = "; ".join(
                f"{', '.join(each.place for each in found)} {f'relabels it to {label!r}' if label else 'removes it'}"
                for label, found in ways.items()
            )
            problems.append(f"{path} is decided differently: {told}. Empty all but one")
    removed = {path for path, ways in wanted.items() if "" in ways}
    # Who says of a picture itself that it leaves means all of its copies.
    for_a_copy = {path for path in removed if all(each.said == "accept" for each in wanted[path][""])}
    for group, places in _joined(copies):
        if group <= for_a_copy:
            problems.append(
                f"{', '.join(places)}: of {' and '.join(sorted(group))}, which show the same, none would be left"
            )
    return Outcome(
        relabelled={path: next(iter(ways)) for path, ways in sorted(wanted.items()) if "" not in ways},
        removed=tuple(sorted(removed)),
        test={
            path: ", ".join(each.place for found in ways.values() for each in found)
            for path, ways in sorted(wanted.items())
            if files[path].test
        },
        problems=tuple(problems),
    )


def _problem(decision: Decision, classes: Collection[str]) -> str:
    """Why it cannot be done, or nothing."""
    card, said = decision.card, decision.said
    word, colon, label = said.partition(":")
    if said not in ("accept", "remove", "not_a_problem") and not (word == "relabel" and colon):
        return f"unknown decision {said[:80]!r}; expected {', '.join(DECISIONS)}"
    if said == "not_a_problem":
        return ""
    if card.file is None:
        return f"{card.issue.kind} is about no file ({card.issue.detail}); it can be not_a_problem, or stay undecided"
    if said == "accept" and not card.proposal:
        return f"nothing is proposed for {card.file.path}; say what is to be done: {', '.join(DECISIONS[1:])}"
    label = card.label if said == "accept" else label
    if label and label not in classes:
        shown = ", ".join(sorted(classes)[:20])
        return (
            f"there is no class {label[:80]!r}; classes: {shown}{', ...' if len(classes) > 20 else ''}; where a new one is "
            f"meant: --new-class {shlex.quote(label[:80])}"
        )
    if word == "relabel" and not label:
        return "relabel: names no label; expected relabel:LABEL"
    if word == "relabel" and not card.not_labelled(label):
        return f"{card.file.path} is labelled {label!r} already; if that is right, the decision is not_a_problem"
    return ""


def _joined(copies: Sequence[tuple[set[str], Decision]]) -> list[tuple[set[str], list[str]]]:
    """Files that show the same by what was accepted, and where, joined where they share a file."""
    above: dict[str, str] = {}

    def top(path: str) -> str:
        while above.setdefault(path, path) != path:
            path = above[path]
        return path

    for paths, _ in copies:
        first, *others = sorted(paths)
        for other in others:
            above[top(other)] = top(first)
    groups: dict[str, tuple[set[str], list[str]]] = {}
    for paths, decision in copies:
        group, places = groups.setdefault(top(min(paths)), (set(), []))
        group |= paths
        places.append(decision.place)
    return list(groups.values())


def targets(outcome: Outcome, sha256s: Mapping[str, str], there: Iterable[str]) -> dict[str, str | None]:
    """Where each decided file goes, None where it leaves; `there` are all paths of the version.

    A name that the other class has, or that another file system would not tell from one it has, gets a digest.
    """
    taken = {(str(PurePosixPath(path).parent), alike(PurePosixPath(path).name)) for path in there}
    found: dict[str, str | None] = dict.fromkeys(outcome.removed)
    for path, label in outcome.relabelled.items():
        name = PurePosixPath(path)
        digest = sha256s[path]
        for proposed in (name.name, *(f"{name.stem}-{digest[:length]}{name.suffix}" for length in (12, 64))):
            if (label, alike(proposed)) not in taken:
                break
        else:
            raise DataError(f"{path} cannot go to class {label!r}: {proposed} is there already; rename one of them first")
        if len(proposed.encode()) > _MAX_NAME_BYTES:
            raise DataError(f"{path} would become {label}/{proposed}, which is too long for a name; shorten its name first")
        taken.add((label, alike(proposed)))
        found[path] = f"{label}/{proposed}"
    return found
