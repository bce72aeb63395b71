"""On which side of the frozen test each picture is that was ever seen: what the ledger says, and what is known beside it.

The ledger is a file in git, which a person may take back to an older one. A side that was forgotten so would be drawn again,
and could put a picture into test that the champion was trained on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from components import dataversions, git
from components.companions import PIN, TEST_LEDGER
from components.contracts.data import Splits
from components.contracts.errors import DataError
from components.contracts.wording import counted
from components.splitting import TestLedger
from components.tables import read_frame
from flows.workspace.workspace import Workspace

DEFAULT_TEST_SHARE = 0.2
_TAKEN_AWAY = re.compile(r"^-([0-9a-f]{32}),(test|rest)$", re.MULTILINE)
"""A row of the ledger in a patch that removes it."""


@dataclass(frozen=True)
class FrozenSides:
    """The ledger to go on from."""

    ledger: TestLedger
    num_only_split: int
    """Pictures of it that neither its file nor git knew any more, and a run of this workspace had split."""


def frozen_sides(workspace: Workspace, test_share: float | None) -> FrozenSides:
    """The test ledger with every side that git or the store knows, an empty one for a first version.

    Raises DataError where it is lost or of another share, or where a picture changed sides; TamperedArtefact.
    """
    root, path = workspace.root, workspace.root / TEST_LEDGER
    if not path.exists():
        if not dataversions.adoptable(root):
            raise DataError(f"{path} is missing; restore it with `git checkout -- {path.name}`")
        ledger = TestLedger(test_share or DEFAULT_TEST_SHARE, {})
    else:
        ledger = _with_all_that_git_knows(root, TestLedger.read(path))
        if test_share is not None and test_share != ledger.test_share:
            raise DataError(
                f"the test share of this data set is frozen at {ledger.test_share}; "
                f"leave --test-share out, or start another workspace"
            )
    complete = _with_all_that_was_split(workspace, ledger)
    return FrozenSides(complete, len(complete.members) - len(ledger.members))


def _with_all_that_git_knows(root: Path, ledger: TestLedger) -> TestLedger:
    """The ledger with every row of the staged and the committed one, and of all before: who goes back to an older version,
    reverts one or takes one side of a merge forgets no side. Raises DataError where a picture changed sides.
    """
    own = (root / TEST_LEDGER).read_text(encoding="utf-8")
    for revision, told in (("", "git's index"), ("HEAD", "HEAD")):
        known = _ledger_at(root, revision, own)
        if known is not None and (moved := ledger.moved_from(known)):
            raise DataError(
                f"{root / TEST_LEDGER} has {counted(len(moved), 'picture')} on another side than {told} has them (first: "
                f"{moved[0]}), and what is frozen as test, or as none, stays so. Restore it with `git checkout HEAD -- "
                f"{PIN} 'data.*.csv'`; of two branches that froze a picture on different sides take one whole, commit that, "
                f"and add the images of the other"
            )
        ledger = ledger.with_sides(known.members) if known is not None else ledger
    # Where two branches froze a picture on different sides, the one that was taken whole counts.
    return ledger.with_sides(_taken_away(root))


def _taken_away(root: Path) -> dict[str, bool]:
    """The rows that some commit of HEAD's history took from the ledger, a merge also those of the side that it left."""
    options = ("--full-history", "-m", "--patch", "--unified=0", "--text", "--no-renames", "--no-ext-diff")
    told = git.ask(root, "log", *options, "--no-show-signature", "--format=", "HEAD", "--", TEST_LEDGER) or ""
    return {row[1]: row[2] == "test" for row in _TAKEN_AWAY.finditer(told)}


def _ledger_at(root: Path, revision: str, own: str) -> TestLedger | None:
    """The ledger of a revision; None where it has none, no valid one, or one of the text `own`."""
    text = git.ask(root, "cat-file", "blob", f"{revision}:./{TEST_LEDGER}")
    try:
        return TestLedger.parse(text) if text and text != own else None
    except ValueError:  # in git, and of no use to anybody
        return None


def _with_all_that_was_split(workspace: Workspace, ledger: TestLedger) -> TestLedger:
    """The ledger with the pictures of every split in the store: who takes the commit of a version back (`git reset --hard`)
    forgets no side by which a model was trained or judged. A commit that nothing was trained on may be taken back for good.
    """
    for folder in sorted((workspace.store.root / "splitting").glob("*/manifest.json")):  # those of folds lie deeper
        splits = workspace.store.open("splitting", folder.parent.name, Splits)
        assert splits is not None
        table = read_frame(splits.folder / splits.record.table.name, ["picture", "split"])
        ledger = ledger.with_sides(dict(zip(table["picture"], table["split"] == "test", strict=True)))
    return ledger
