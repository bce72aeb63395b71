"""What is known of the test images beside their labels, for the slices that they are in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from components import attributes
from components.contracts.data import Dataset
from components.contracts.records import Stored
from components.contracts.verdicts import Evaluation
from components.tables import read_frame
from flows.training.run import Run

if TYPE_CHECKING:
    import pandas as pd

_FACTS = ("brightness", "sharpness", "short_side")
_COLUMNS = ("captured_at", "source", "group", "label_source")


def facts_of_test(run: Run, dataset: Stored[Dataset], answered: Stored[Evaluation]) -> pd.DataFrame:
    """A row an answered test image, in the order of the answers: sha256, label, its facts and the columns of manifests."""
    assert answered.record.predictions is not None
    table = read_frame(answered.folder / answered.record.predictions.name, ["sha256", "path", "label"])
    samples = read_frame(dataset.folder / dataset.record.samples.name, ["path", *_FACTS]).set_index("path")
    known = attributes.read(run.workspace.root)
    nothing = attributes.Attributes()
    table[list(_FACTS)] = samples.loc[table["path"], list(_FACTS)].to_numpy()
    for column in _COLUMNS:
        table[column] = [getattr(known.get(sha256, nothing), column) for sha256 in table["sha256"]]
    own = [known.get(sha256, nothing).columns for sha256 in table["sha256"]]
    for column in sorted({name for columns in own for name in columns}):
        # A column of the project's own that is called like one of ours is told apart by its prefix.
        table[column if column not in table else f"column {column}"] = [columns.get(column, "") for columns in own]
    return table.drop(columns="path")
