"""The map of a review: from what is wrong with the data, by a person's file, to the next data version."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from components import dataversions, plugins
from components.contracts.errors import DataError, UnknownName
from components.contracts.progress import Progress, silent
from components.reviews import reviews
from components.store import write_atomically
from flows.reviewing import applying, page, sheet
from flows.reviewing.applying import Applied, Plan
from flows.reviewing.cards import Card, CardFile, asked, by_cost, cards_of, files_of, keep
from flows.reviewing.deciding import Decision, decide, targets
from flows.terminal import Console
from flows.workspace.checking import check_data
from flows.workspace.workspace import Workspace

PURPOSE = "visionloop data review apply"
CSV, PAGE = "review.csv", "review.html"


@dataclass(frozen=True)
class Asked:
    """A review that waits for a person."""

    data_version: str
    cards: tuple[Card, ...]
    """What costs most to leave first."""
    left_out: int
    """Issues that are open and not among them, by `kinds` or `limit`."""
    num_reviewed: int
    """Issues that are not asked again."""
    csv: Path | None
    """None where nothing is asked."""
    page: Path | None
    not_looked_for: Mapping[str, str] = field(default_factory=dict)
    """Why a kind of issue was not looked for, by its name."""


def review(
    workspace: Workspace,
    *,
    recipe: str | None = None,
    kinds: Collection[str] = (),
    limit: int | None = None,
    out: Path | None = None,
    console: Console,
) -> Asked:
    """Look at the pinned data for all findings or those of a recipe, and ask about what nobody reviewed; see `ask`.

    Raises UnknownName, and DataDiffers where data/ is not what is pinned.
    """
    valid = plugins.names("findings")
    for kind in kinds:
        if kind not in valid:
            raise UnknownName("kind of issue", kind, valid)
    with console.stage("looking at images", 1) as (progress, _):
        version = dataversions.verify(workspace.root).dvc_hash
        checked = check_data(workspace, recipe, progress=progress)
    assert checked.examined is not None  # nothing was kept
    known = checked.examined.known
    there, refused = files_of(workspace.data, known.table), files_of(workspace.data, known.refused)
    cards = cards_of(checked.issues, [*there, *refused])
    with console.stage("drawing cards", 2) as (progress, _):
        found = ask(workspace, version, cards, there, kinds=kinds, limit=limit, out=out, progress=progress)
    return replace(found, not_looked_for={each.name: each.reason for each in checked.looked if not each.ran})


def ask(
    workspace: Workspace,
    version: str,
    cards: Sequence[Card],
    there: Sequence[CardFile],
    *,
    kinds: Collection[str] = (),
    limit: int | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> Asked:
    """Ask a person about the issues that nobody reviewed: one CSV file and a page beside it, in the folder `out`.

    `cards` are the issues of the data version, `there` its files that can be used. Raises DataError for a folder that holds
    decisions which were not applied.
    """
    reviewed = reviews(workspace.root)
    still_open = by_cost(card for card in cards if card.issue.id not in reviewed)
    chosen = [card for card in still_open if not kinds or card.issue.kind in kinds][:limit]
    left_out = len(still_open) - len(chosen)
    if not chosen:
        return Asked(version, (), left_out, len(cards) - len(still_open), None, None)
    out = out or workspace.state / "reviews" / version.removesuffix(".dir")
    _expect_free(out / CSV, reviewed)
    keep(workspace, version, chosen)
    examples = page.chosen_examples(chosen, there)
    shown = [file for card in chosen for file in page.pictured(card)] + [
        file for files in examples.values() for file in files
    ]
    thumbnails = page.draw(workspace.data, shown, out / page.THUMBNAILS, progress=progress)
    classes = sorted({file.label for file in there})
    html = page.render(version, chosen, classes, examples, thumbnails, csv_name=CSV, left_out=left_out)
    write_atomically(out / PAGE, html.encode())
    write_atomically(out / CSV, sheet.text([sheet.asked_row(version, card) for card in chosen]))
    return Asked(version, tuple(chosen), left_out, len(cards) - len(still_open), out / CSV, out / PAGE)


def _expect_free(path: Path, reviewed: Collection[str]) -> None:
    """Raise DataError where a file would be lost in which a person decided something that was not applied."""
    if not path.exists():
        return
    waiting = [row for row in sheet.read(path) if row.values["issue"] not in reviewed]
    if waiting:
        raise DataError(
            f"{path} holds decisions that were not applied (line {waiting[0].line}): apply it with `visionloop data review "
            f"apply`, move it away, or name another folder with --out"
        )


def apply_file(
    workspace: Workspace,
    file: Path,
    *,
    who: str,
    why: str,
    test_pictures: bool = False,
    new_classes: Collection[str] = (),
    dry_run: bool = False,
) -> Applied:
    """Make the next data version by what a person filled into a review's CSV file; all of it or nothing.

    Raises DataError with every problem of the file by line, and what `apply` raises.
    """
    rows = sheet.read(file)
    found = sheet.decisions(file, rows, lambda version: asked(workspace, version))
    if not found:
        raise DataError(
            f"{file} decides nothing: fill the column `decision`, rows without one stay open. What was decided in the page "
            f"is in the file that it saved into the browser's downloads"
        )
    versions = {row.values["data_version"] for row in rows}
    others = [card for version in versions for card in asked(workspace, version).values()]
    return apply(
        workspace,
        found,
        others,
        who=who,
        why=why,
        test_pictures=test_pictures,
        new_classes=new_classes,
        dry_run=dry_run,
        place=str(file),
    )


def apply(
    workspace: Workspace,
    decisions: Sequence[Decision],
    others: Sequence[Card] = (),
    *,
    who: str,
    why: str,
    test_pictures: bool = False,
    new_classes: Collection[str] = (),
    dry_run: bool = False,
    place: str = "the review",
) -> Applied:
    """Make the next data version by decisions on cards; all of it or nothing. A run that was killed is completed first.

    `others` are the cards that were asked beside them. Files leave data/ by a decision alone, and stay in DVC's cache.
    Raises DataError with every problem, also for frozen test pictures without `test_pictures` and for a label that is
    neither a class nor one of `new_classes`; ConfigError for one of these that cannot be the name of a class.
    """
    applying.check_words(who, why)
    with contextlib.nullcontext() if dry_run else workspace.making_version(PURPOSE):
        if dry_run and applying.pending(workspace) is not None:
            raise DataError("an earlier review was cut short while it was applied; without --dry-run it is completed first")
        completed = applying.complete(workspace)
        version = dataversions.verify(workspace.root).dvc_hash
        earlier, there = reviews(workspace.root), dataversions.files_of(workspace.root)
        new = [each for each in decisions if each.card.issue.id not in earlier]
        num_already = len(decisions) - len(new)
        problems = [
            f"{each.place}: issue {each.card.issue.id} is {each.said!r} here, and was decided as {said.decision!r} by "
            f"{said.who} on {said.when}"
            for each in decisions
            if (said := earlier.get(each.card.issue.id)) is not None and said.decision != each.said
        ]
        if not new and not problems:
            return completed or Applied(version, {}, (), 0, num_already, (), (), "", dry_run)
        problems += applying.unchanged(workspace, new, there)
        classes = applying.classes_of(there)
        applying.check_new_classes(workspace, new_classes, classes)
        outcome = decide(new, {*classes, *new_classes})
        problems += outcome.problems
        if not test_pictures:
            problems += [
                f"{at}: {path} is a frozen test picture, and both models are judged by it; if it is meant: --test-pictures"
                for path, at in outcome.test.items()
            ]
        if len(outcome.removed) == len(there):
            problems.append("no file would be left")
        sheet.refuse(place, problems)
        sha256s = {file.path: file.sha256 for each in new for file in each.card.files}
        moves = targets(outcome, sha256s, there)
        num_fine = sum(each.said == "not_a_problem" for each in new)
        applied = Applied(
            data_version=version,
            relabelled={path: target for path, target in moves.items() if target is not None},
            removed=outcome.removed,
            num_not_a_problem=num_fine,
            num_already=num_already,
            test_pictures=tuple(outcome.test),
            notes=applying.notes(outcome, there, moves),
            message=applying.message(who, why, outcome, num_fine),
            dry_run=dry_run,
            completed=completed is not None,
        )
        if dry_run:
            return applied
        written = applying.reviews_of(new, outcome, others, earlier, who, why)
        labelled = tuple(sha256s[path] for path in outcome.relabelled)
        return applying.carry_out(workspace, Plan(version, there, moves, written, labelled, applied))
