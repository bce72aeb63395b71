"""`data add`: images come into a workspace and become its next data version, and a person reads what to look at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.companions import PIN
from components.contracts.wording import counted
from components.samples import class_twins
from flows.terminal import Console
from flows.workspace import data
from flows.workspace.amounts import Amount, amounts
from flows.workspace.data import Added
from flows.workspace.differences import notes_on_labels, pinned_so_far
from flows.workspace.near_duplicates import MAX_CLUSTER_SHARE, Handling, told_of
from flows.workspace.settings import read_settings
from flows.workspace.sources import Chosen, choose, staged
from flows.workspace.workspace import Workspace

_MOST_REASONS = 10
_MOST_CLASSES = 5
"""So many small classes are named."""
PURPOSE = "visionloop data add"


@dataclass(frozen=True)
class NotedVersion:
    """A new data version, and what a person should know of it."""

    added: Added
    notes: tuple[str, ...]
    amounts: tuple[Amount, ...]
    """What its test images can and cannot decide, by recipe."""
    is_new: bool = True
    """False where it was pinned exactly so before."""


def add_images(
    workspace: Workspace,
    given: str | None,
    *,
    source: str | None,
    source_settings: Mapping[str, Any] | None = None,
    test_share: float | None,
    keep_splits: bool | None = None,
    near_duplicates: Handling = "refuse",
    max_cluster_share: float = MAX_CLUSTER_SHARE,
    console: Console,
) -> NotedVersion:
    """Add what a person names: a folder's images, or those that a source brings, or data/ as it is where nothing is named.

    What holds train/, test/ and perhaps val/ keeps its test/ as the frozen test by `keep_splits`, and is merged by False.
    Raises what `flows.workspace.sources.choose` and `flows.workspace.data.add` raise.
    """
    accepted = read_settings(workspace.state).accepted
    chosen = choose(given, source, source_settings or {})
    with workspace.making_version(PURPOSE), contextlib.ExitStack() as stack:
        before, pin = pinned_so_far(workspace), _pin(workspace)
        written, folder = None, chosen if isinstance(chosen, Path) else None
        number = total = 1 + isinstance(chosen, Chosen)
        console.total = total
        if isinstance(chosen, Chosen):
            with console.stage(f"bringing images by source {chosen.name}", 1) as (progress, _):
                bringing = staged(workspace, chosen.name, chosen.settings, progress=progress)
                written = stack.enter_context(bringing)
        with console.stage("looking at images", number) as (progress, _):
            added = data.add(
                workspace,
                folder,
                test_share=test_share,
                keep_splits=keep_splits,
                source=written,
                near_duplicates=near_duplicates,
                max_cluster_share=max_cluster_share,
                accepted=accepted,
                progress=progress,
            )
        of_labels = notes_on_labels(workspace, before, pinned_so_far(workspace))
    notes = (*of_labels, *notes_on(added))
    return NotedVersion(added, notes, tuple(provable(workspace, added)), is_new=_pin(workspace) != pin)


def _pin(workspace: Workspace) -> bytes | None:
    """What pins the data version and its companions; None before the first."""
    path = workspace.root / PIN
    return path.read_bytes() if path.exists() else None


def provable(workspace: Workspace, added: Added) -> list[Amount]:
    """What the test images of a new version can and cannot decide by the gates of the workspace's recipes."""
    return amounts(added.test_counts, added.test_share, workspace=workspace.root)


def notes_on(added: Added) -> Iterator[str]:
    """What a person should look at: what training will object to, and files that are no part of the version."""
    from components.validation import ValidationConfig

    yield from _of_classes(added.class_counts, ValidationConfig().min_images_per_class)
    if added.refused:
        named = "; ".join(f"{name}: {why}" for name, why in list(added.refused.items())[:3])
        yield f"not copied, no picture that is accepted: {counted(len(added.refused), 'file')} ({named})"
    if added.undecodable:
        shown = ", ".join(added.undecodable[:3])
        yield f"{counted(len(added.undecodable), 'file')} cannot be decoded and will be quarantined: {shown}"
    for names, text in (
        (
            added.sides.leaked,
            "of train/ or val/ show the same pictures as test/ does; they are test, and nothing trains on them",
        ),
        (added.sides.stay_test, "of train/ or val/ were frozen as test by an earlier add, and stay test"),
        (added.sides.stay_rest, "of test/ were frozen outside test by an earlier add, and stay outside"),
    ):
        if names:
            yield f"{counted(len(names), 'image')} {text}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    if added.num_only_split:
        yield (
            f"the test ledger lacked {counted(added.num_only_split, 'picture')} that runs of this workspace trained or "
            f"judged models on; each stays on the side that it had then"
        )
    if added.looked is not None:
        yield from told_of(added.looked)
    if added.new_classes:
        named = ", ".join(f"{label!r} ({added.class_counts[label]})" for label in added.new_classes[:3])
        more = ", ..." if len(added.new_classes) > 3 else ""
        yield f"new beside the classes that were there: {named}{more}"
    if added.changed_attributes:
        named = "; ".join(added.changed_attributes[:3])
        yield f"{counted(len(added.changed_attributes), 'attribute')} said otherwise than before ({named})"
    others = [entry for entry in added.left_out if entry.file not in added.refused]
    reasons = list(dict.fromkeys(entry.reason for entry in others))
    for reason in reasons[:_MOST_REASONS]:
        files = [entry.file for entry in others if entry.reason == reason]
        shown = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        yield f"{len(files)} left out, {reason}: {shown}"
    if rest := [entry for entry in others if entry.reason in reasons[_MOST_REASONS:]]:
        yield f"{len(rest)} more left out for {counted(len(reasons) - _MOST_REASONS, 'reason')} more; --json names them all"


def _of_classes(class_counts: dict[str, int], minimum: int) -> Iterator[str]:
    """What training will object to, said early."""
    if len(class_counts) < 2:
        yield "only one class so far: training needs at least two"
    yield from class_twins(class_counts)
    small = [(label, count) for label, count in class_counts.items() if count < minimum]
    for label, count in small[:_MOST_CLASSES]:
        yield f"class {label!r} has {counted(count, 'image')}: training needs at least {minimum}"
    if len(small) > _MOST_CLASSES:
        yield f"{len(small) - _MOST_CLASSES} more classes have fewer than {minimum} images"
