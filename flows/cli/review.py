"""Commands of the review: what is wrong with data is asked, and what a person answered becomes the next version."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.contracts.wording import counted
from flows.cli.answers import HERE, AsJson, By, Commands, InWorkspace, Reason, finish

if TYPE_CHECKING:
    from flows.reviewing.applying import Applied


review_app = Commands(
    help="Ask about what is wrong with data/, and make the next version of what a person answered.",
    no_args_is_help=False,
    invoke_without_command=True,
)


@review_app.callback()
def data_review(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Option(help="Look for the findings of this recipe; else for all.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Only issues of this kind; may be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many, those that cost most to leave.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder for the CSV file, the page and its thumbnails.")] = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Write a CSV file and a page with a card for each issue that nobody reviewed, frozen test pictures and leaks first.

    The page is filled with keys and saves the CSV file; `visionloop data review apply FILE` makes the next version of it.
    """
    if context.invoked_subcommand is not None:
        return
    from flows.review import review
    from flows.terminal import Console
    from flows.workspace.workspace import Workspace

    found = Workspace.find(workspace)
    with Console(2, quiet=json_) as console:
        asked = review(
            found, recipe=recipe, kinds=kind or (), limit=limit, out=out.resolve() if out else None, console=console
        )
    kinds = Counter(card.issue.kind for card in asked.cards)
    answer = {
        "data_version": asked.data_version,
        "issues": len(asked.cards),
        "kinds": dict(kinds),
        "left_out": asked.left_out,
        "already_reviewed": asked.num_reviewed,
        "csv": str(asked.csv) if asked.csv else None,
        "page": str(asked.page) if asked.page else None,
        "not_looked_for": dict(asked.not_looked_for),
    }
    shown = ", ".join(f"{count} {name}" for name, count in kinds.most_common())
    lines = [
        f"{counted(len(asked.cards), 'issue')} to decide on{f' ({shown})' if shown else ''}; {asked.left_out} left out, "
        f"{asked.num_reviewed} reviewed before.",
        *(f"Not looked for: {name}, {reason}." for name, reason in asked.not_looked_for.items()),
    ]
    if asked.csv:
        lines += [
            f"Page: {asked.page}",
            f"CSV: {asked.csv}",
            "Next: open the page in a browser, decide and save (or fill in the CSV file), then "
            "visionloop data review apply FILE --as YOU --reason WHY",
        ]
    finish(answer, json_, lambda: "\n".join(lines))


@review_app.command("apply")
def data_review_apply(
    file: Annotated[Path, typer.Argument(help="The CSV file of a review, filled in.")],
    as_: By,
    reason: Reason,
    test_pictures: Annotated[
        bool,
        typer.Option("--test-pictures", help="Frozen test pictures may be relabelled and removed, too."),
    ] = False,
    new_class: Annotated[
        list[str] | None, typer.Option(help="A label that decisions may give though no class has it yet; may be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would become of the data.")] = False,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Make the next data version by a filled-in review, all of it or nothing: accept, relabel:LABEL, remove, not_a_problem.

    What leaves data/ stays in DVC's cache. A file that was applied before is said to be, and changes nothing.
    """
    from flows.review import apply_file
    from flows.workspace.workspace import Workspace

    applied = apply_file(
        Workspace.find(workspace),
        file,
        who=as_,
        why=reason,
        test_pictures=test_pictures,
        new_classes=new_class or (),
        dry_run=dry_run,
    )
    answer = {
        "data_version": applied.data_version,
        "relabelled": dict(applied.relabelled),
        "removed": list(applied.removed),
        "not_a_problem": applied.num_not_a_problem,
        "already_applied": applied.num_already,
        "test_pictures": list(applied.test_pictures),
        "notes": list(applied.notes),
        "message": applied.message,
        "dry_run": applied.dry_run,
        "completed": applied.completed,
    }
    finish(answer, json_, lambda: "\n".join(_applied_told(applied)))


def _applied_told(applied: Applied) -> Iterator[str]:
    if not applied.message:
        yield f"Already applied: {counted(applied.num_already, 'decision')}. Data version {applied.data_version}"
        return
    if applied.completed:
        yield "An earlier run was cut short; it is completed now."
    moved = list(applied.relabelled.items())
    yield f"{len(moved)} {'would be ' * applied.dry_run}relabelled{_some([f'{old} -> {new}' for old, new in moved])}"
    yield f"{len(applied.removed)} {'would be ' * applied.dry_run}removed{_some(applied.removed)}"
    yield f"{applied.num_not_a_problem} not a problem, {applied.num_already} already applied"
    for note in applied.notes:
        yield f"Note: {note}."
    if applied.dry_run:
        yield "Nothing was changed (--dry-run)."
        return
    yield f"Data version {applied.data_version}; what was removed stays in DVC's cache."
    yield f"Next: git commit -m {shlex.quote(applied.message)}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f": {shown}" if shown else ""
