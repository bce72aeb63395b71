"""Parquet in: the one place that reads it.

pyarrow 25's reader threads abort more than half of the processes that end soon after a read ("terminate called without an
active exception", 24 of 40 here), which turns a finished command into exit status 134. Reading on one thread does not.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def read_table(source: Path | bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or its bytes; all columns, or those named. Raises what pyarrow raises for what is none."""
    import pyarrow.parquet as pq

    opened = io.BytesIO(source) if isinstance(source, bytes) else source
    with pq.ParquetFile(opened) as file:
        return file.read(columns=list(columns) if columns is not None else None, use_threads=False)


def num_rows(source: Path) -> int:
    """How many rows a Parquet file says it has, without reading them."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(source) as file:
        return int(file.metadata.num_rows)


def column_names(source: Path | bytes) -> list[str]:
    """The columns of a Parquet file, without reading them."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
        return list(file.schema_arrow.names)


def read_frame(source: Path | bytes, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """The same as a pandas frame."""
    frame: pd.DataFrame = read_table(source, columns).to_pandas(use_threads=False)
    return frame
