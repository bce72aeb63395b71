"""What is looked at before a person is asked: the facts of all files, and what the findings see in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from components import dataversions
from components.contracts.families import Known
from components.contracts.progress import Progress, silent
from components.facts import File, facts
from components.issues import chosen, look
from components.splitting import TestLedger
from flows.reviewing.cards import Card, CardFile, cards_of, files_of
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace


@dataclass(frozen=True)
class Seen:
    """The issues of a data version, and its files that can be used."""

    data_version: str
    cards: Sequence[Card]
    files: Sequence[CardFile]
    not_looked_for: Mapping[str, str]


def see(workspace: Workspace, *, progress: Progress = silent) -> Seen:
    """Look at the pinned version with all findings that need no network; raises DataDiffers where data/ is another one."""
    root, data = workspace.root, workspace.data
    version = dataversions.verify(root)
    md5 = dataversions.hashes(root)
    files = [
        File(path, name := path.relative_to(data).as_posix(), label, md5.get(name, ""))
        for label, paths in dataversions.listing(data).classes.items()
        for path in paths
    ]
    found = facts(files, cache=workspace.cache, accepted=read_settings(workspace.state).accepted, progress=progress)
    ledger = TestLedger.read(root / dataversions.TEST_LEDGER)
    usable = found["reason"] == ""
    table = found[usable].sort_values("path", ignore_index=True)
    table["split"] = ["test" if ledger.members.get(picture, False) else "rest" for picture in table["picture"]]
    known = Known(table=table, refused=found[~usable], classes=tuple(sorted({file.label for file in files})))
    issues, looked = look(known, chosen(None))
    there = files_of(data, found, ledger)
    unusable = set(found.loc[~usable, "path"])
    return Seen(
        version.dvc_hash,
        cards_of(issues, there),
        [file for file in there if file.path not in unusable],
        {each.name: each.reason for each in looked if not each.ran},
    )
