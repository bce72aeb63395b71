"""Captured and labelled images of production become the next data version; an alarm that waited for data is told."""

from __future__ import annotations

from components.contracts.wording import counted
from flows.loop.alarms import tell_of_data
from flows.loop.labels import gathered, move_relabelled
from flows.loop.loop import Loop
from flows.terminal import Console, Say
from flows.workspace import data
from flows.workspace.adding import PURPOSE, NotedVersion, notes_on, provable
from flows.workspace.differences import notes_on_labels, pinned_so_far


def add_labelled(loop: Loop, *, console: Console, say: Say) -> NotedVersion:
    """Add what people labelled, move what they relabelled; raises DataError when nothing is both captured and labelled."""
    with loop.workspace.making_version(PURPOSE):
        before = pinned_so_far(loop.workspace)
        with gathered(loop) as labelled, console.stage("looking at images", 1) as (progress, _):
            relabelled = move_relabelled(loop)
            accepted = loop.settings.accepted
            # Nobody is there to be asked, and production sees things again that test pictures show.
            added = data.add(
                loop.workspace,
                None,
                test_share=None,
                source=labelled.staged,
                near_duplicates="exclude",
                max_cluster_share=1.0,
                accepted=accepted,
                progress=progress,
            )
        notes = notes_on_labels(loop.workspace, before, pinned_so_far(loop.workspace))
    if relabelled:
        notes.append(f"{counted(relabelled, 'image')} moved to the class that they are said to show now")
    if labelled.not_kept:
        notes.append(f"{counted(labelled.not_kept, 'labelled image')} not captured, so not added")
    notes += [f"alarm {key} waited for data and was raised again" for key in tell_of_data(loop, say=say)]
    return NotedVersion(added, (*notes, *notes_on(added)), tuple(provable(loop.workspace, added)))
