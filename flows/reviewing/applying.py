"""Decisions become the next data version: all of them or none, and a run that is killed is completed by the next one."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from components import attributes, dataversions, transfers
from components.contracts.errors import ConfigError, DataError
from components.contracts.records import canonical_json
from components.contracts.wording import counted
from components.reviews import Review, add_reviews
from components.samples import alike, class_name_problem
from components.store import sha256_file, write_atomically
from flows.reviewing.cards import Card
from flows.reviewing.deciding import Decision, Outcome
from flows.workspace.near_duplicates import join_again
from flows.workspace.workspace import Workspace

_MAX_WHO, _MAX_WHY = 128, 500


@dataclass(frozen=True)
class Applied:
    """What decisions made of a data version, or would make of it."""

    data_version: str
    """The version there is now."""
    relabelled: Mapping[str, str]
    """Where each relabelled file lies now, by its path before."""
    removed: tuple[str, ...]
    num_not_a_problem: int
    num_already: int
    """Decisions that were applied before, word for word."""
    test_pictures: tuple[str, ...]
    """The frozen test pictures among the relabelled and removed."""
    notes: tuple[str, ...]
    message: str
    """For the git commit; empty where nothing changed."""
    dry_run: bool = False
    completed: bool = False
    """Whether an earlier run had begun it and was cut short."""


@dataclass(frozen=True)
class Plan:
    """All that is needed to make the next version, also by another process."""

    version: str
    """The one that it is made of."""
    before: Mapping[str, str]
    """DVC's hash of each of its files."""
    moves: Mapping[str, str | None]
    """Where files go, None where they leave."""
    reviews: tuple[Review, ...]
    labelled: tuple[str, ...]
    """The sha256 of each relabelled file: a person labelled it now, whoever did before."""
    applied: Applied


def check_words(who: str, why: str) -> None:
    """Raise ConfigError unless somebody is named and a reason is given, each on one line."""
    for option, words, most in (("--as", who, _MAX_WHO), ("--reason", why, _MAX_WHY)):
        if not words.strip() or len(words) > most or not words.isprintable():
            raise ConfigError(f"{option} {words[:40]!r}: expected one line of 1 to {most} characters")


def unchanged(workspace: Workspace, decisions: Iterable[Decision], there: Mapping[str, str]) -> list[str]:
    """Decisions on files that are not as they were when it was asked; `there` are the files of the version."""
    content = functools.cache(lambda path: sha256_file(workspace.data / path))
    problems = []
    for decision in decisions:
        for file in decision.card.files:
            if file.path not in there:
                problems.append(
                    f"{decision.place}: {file.path} is not in this data version any more; what is left of it is asked by "
                    f"`visionloop data review`"
                )
            elif file.sha256 != content(file.path):
                problems.append(f"{decision.place}: {file.path} has other bytes than when it was asked about")
    return problems


def check_new_classes(workspace: Workspace, names: Iterable[str], there: Collection[str]) -> None:
    """Raise ConfigError for a name that no new class beside those that are `there` can have."""
    for name in names:
        twin = next((label for label in there if alike(label) == alike(name)), None)
        problem = class_name_problem(name)
        if twin is not None and twin != name:
            problem = f"it differs from the class {twin!r} only in how it is written"
        elif twin is None and (workspace.data / name).is_file():
            problem = f"{workspace.data / name} is a file"
        if problem:
            raise ConfigError(f"--new-class {name[:80]!r} cannot be the name of a class: {problem}")


def classes_of(paths: Iterable[str]) -> set[str]:
    """The classes of files: the folders directly under data/ that hold one, hidden ones left out."""
    return {PurePosixPath(path).parts[0] for path in paths if path.count("/") == 1 and not path.startswith(".")}


def reviews_of(
    decisions: Sequence[Decision],
    outcome: Outcome,
    asked: Iterable[Card],
    earlier: Mapping[str, Review],
    who: str,
    why: str,
) -> tuple[Review, ...]:
    """What is written down of decisions.

    An issue's id holds the labels of its files. What was decided about a file counts under the label that it gets, too: a
    person who gave a label is not asked by the next check whether it is right.
    """
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    found = {each.card.issue.id: Review(each.card.issue.id, each.said, who, when, why, each.note) for each in decisions}
    known = {**earlier, **found}
    gone = set(outcome.removed)
    for card in [*asked, *(each.card for each in decisions)]:
        paths = {file.path for file in card.files}
        if card.issue.id in known and not paths & gone and paths & outcome.relabelled.keys():
            after = card.id_after(outcome.relabelled)
            if after not in known:
                found[after] = Review(after, "not_a_problem", who, when, why, f"as {card.issue.id}, under the new label")
    return tuple(found.values())


def message(who: str, why: str, outcome: Outcome, num_not_a_problem: int) -> str:
    """What a git commit of the version says."""
    counts = (
        (len(outcome.relabelled), "relabelled"),
        (len(outcome.removed), "removed"),
        (num_not_a_problem, "not a problem"),
    )
    done = ", ".join(f"{count} {what}" for count, what in counts if count)
    return f"Data reviewed by {who}: {done} ({why})"


def notes(outcome: Outcome, there: Iterable[str], moves: Mapping[str, str | None]) -> tuple[str, ...]:
    """What a person should know of what comes of it."""
    left = {*there, *(target for target in moves.values() if target)} - moves.keys()
    told = [f"class {label!r} is new" for label in sorted(classes_of(left) - classes_of(there))]
    told += [f"class {label!r} has no image left" for label in sorted(classes_of(there) - classes_of(left))]
    if outcome.test:
        shown = ", ".join(list(outcome.test)[:5]) + (", ..." if len(outcome.test) > 5 else "")
        told.append(
            f"{counted(len(outcome.test), 'frozen test picture')} changed ({shown}): the next training judges champion and "
            f"candidate anew"
        )
    return tuple(told)


def carry_out(workspace: Workspace, plan: Plan) -> Applied:
    """Make the next version by a plan that is written down first, so that a killed run is completed by `complete`."""
    path = _journal(workspace)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, canonical_json(asdict(plan)).encode())
    return _go_on(workspace, plan)


def complete(workspace: Workspace) -> Applied | None:
    """Go on with a plan that was cut short; None where there is none, or nothing of it was done.

    Raises DataDiffers where files were changed by hand since.
    """
    plan = pending(workspace)
    if plan is None:
        return None
    root = workspace.root
    pinned, after = dataversions.files_of(root), transfers.moved(plan.before, plan.moves)
    untouched = bool(plan.moves) and pinned == plan.before and dataversions.hash_of(root, workspace.data) == plan.version
    if untouched or pinned not in (plan.before, after):
        # Killed before the first step, or taken back by a person since.
        _journal(workspace).unlink()
        return None
    return replace(_go_on(workspace, plan), completed=True)


def _go_on(workspace: Workspace, plan: Plan) -> Applied:
    """Every step leaves alone what is done already."""
    root = workspace.root
    transfers.move(root, plan.before, plan.moves)
    add_reviews(root, plan.reviews)
    _labelled_by_a_person(root, plan.labelled)
    if plan.labelled:
        join_again(workspace)
    version = dataversions.pin(root)
    if dataversions.files_of(root) != transfers.moved(plan.before, plan.moves):
        raise DataError(f"{workspace.data} changed while its next version was made; run `visionloop data status`")
    _journal(workspace).unlink()
    return replace(plan.applied, data_version=version.dvc_hash)


def _labelled_by_a_person(root: Path, sha256s: Iterable[str]) -> None:
    """Take the model's name from labels that a person gave; of other files nobody knows who labelled them."""
    known = attributes.read(root)
    models = [sha256 for sha256 in sha256s if sha256 in known and known[sha256].label_source == "model"]
    if models:
        said = attributes.Attributes(label_source="person")
        attributes.write(root, attributes.learned(known, [(sha256, said) for sha256 in models])[0])


def pending(workspace: Workspace) -> Plan | None:
    """A plan that an earlier run did not end; None where there is none."""
    path = _journal(workspace)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        applied: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values["applied"].items()
        }
        reviews = tuple(Review(**each) for each in values["reviews"])
        labelled = tuple(values["labelled"])
        return Plan(values["version"], values["before"], values["moves"], reviews, labelled, Applied(**applied))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); `visionloop data status` says how data/ is, then remove it"
        ) from error


def _journal(workspace: Workspace) -> Path:
    return workspace.state / "reviews" / "pending.json"
