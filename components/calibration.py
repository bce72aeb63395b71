"""Which pictures an int8 engine is made with: its ranges come from calibration alone, its layers are chosen on valid alone.

Test judges the engine afterwards, so its pictures are never read here; only their digests are, to prove that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from components.contracts.data import Splits
from components.contracts.errors import ExportError
from components.contracts.families import Task
from components.contracts.records import Stored
from components.contracts.wording import counted
from components.samples import rows

if TYPE_CHECKING:
    import pandas as pd


def calibration_rows(splits: Stored[Splits], task: Task) -> pd.DataFrame:
    """The calibration split, stratified; raises ExportError where it is empty or holds a picture of test."""
    found, test = rows(splits, "calibration"), rows(splits, "test")
    if found.empty:
        raise ExportError(
            "the calibration split is empty, and int8 ranges come from no other pictures: raise splitting.calibration_share"
        )
    leaked = found["path"][found["sha256"].isin(test["sha256"]) | found["picture"].isin(test["picture"])]
    if len(leaked):
        raise ExportError(
            f"{counted(len(leaked), 'calibration image')} {'is' if len(leaked) == 1 else 'are'} in test, too: "
            f"{', '.join(leaked[:3])}{', ...' if len(leaked) > 3 else ''}; "
            f"an engine must not be fitted to what judges it: split the data again"
        )
    return stratified(found, task)


def valid_rows(splits: Stored[Splits], task: Task) -> pd.DataFrame:
    """The valid split, stratified."""
    return stratified(rows(splits, "valid"), task)


def stratified(table: pd.DataFrame, task: Task) -> pd.DataFrame:
    """Images in an order whose every beginning has the task's strata in their shares of the whole.

    The first image of each stratum comes before any second one. Inside a stratum the order is that of the pictures'
    digests, so that neighbours in a folder, such as frames of one film, are not chosen together.
    """
    ordered = table.sort_values("picture", kind="stable", ignore_index=True)
    strata = ordered["label"].map(task.stratum)
    members = ordered.groupby(strata.to_numpy(), sort=False)["picture"]
    place = members.cumcount() / members.transform("size")
    return ordered.assign(_place=place, _stratum=strata).sort_values(
        ["_place", "_stratum"], kind="stable", ignore_index=True
    )[list(table.columns)]
