"""Parquet in: the one place that reads it.

Bytes that belong to Python must never reach a thread of pyarrow. It lets go of them when it likes, needs the interpreter's
lock for that, and aborts a process that is just ending ("terminate called without an active exception"): a command that did
all its work then has exit status 134. By pyarrow's defaults (25.0) that befell 24 of 40 processes that ended soon after a
read. So a Parquet file is read in the thread that asks for it, and bytes are first copied into memory of pyarrow's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq


def arrow_reader(content: bytes) -> pa.BufferReader:
    """Bytes as a file whose memory is pyarrow's own, for a reader of pyarrow's that has threads."""
    import pyarrow as pa

    copy = pa.BufferOutputStream()
    copy.write(content)
    return pa.BufferReader(copy.getvalue())


def read_table(source: Path | bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or its bytes; all columns, or those named. Raises what pyarrow raises for what is none."""
    with _open(source) as file:
        return file.read(columns=list(columns) if columns is not None else None, use_threads=False)


def num_rows(source: Path) -> int:
    """How many rows a Parquet file says it has, without reading them."""
    with _open(source) as file:
        return int(file.metadata.num_rows)


def column_names(source: Path | bytes) -> list[str]:
    """The columns of a Parquet file, without reading them."""
    with _open(source) as file:
        return list(file.schema_arrow.names)


def read_frame(source: Path | bytes, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """The same as a pandas frame."""
    frame: pd.DataFrame = read_table(source, columns).to_pandas(use_threads=False)
    return frame


def _open(source: Path | bytes) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    # What pyarrow reads ahead of the caller, it reads in a thread of its own.
    return pq.ParquetFile(arrow_reader(source) if isinstance(source, bytes) else source, pre_buffer=False)
