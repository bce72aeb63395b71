from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from components.tables import arrow_reader, read_frame, read_table


def test_a_table_is_read_from_a_file_or_from_bytes(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [1, 2], "b": [[1.0], [2.0, 3.0]]})
    path = tmp_path / "t.parquet"
    frame.to_parquet(path)
    assert read_frame(path, ["a"])["a"].tolist() == [1, 2]
    assert read_table(path.read_bytes())["b"].to_pylist() == [[1.0], [2.0, 3.0]]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted where Linux lists them")
def test_a_table_is_read_in_the_thread_that_asks(tmp_path: Path) -> None:
    """A thread of pyarrow's that lets go of Python's bytes while the process ends aborts it: SIGABRT for 2 of 100 of them."""
    path = tmp_path / "t.parquet"
    pd.DataFrame({"a": range(5000), "b": [[float(i)] * 20 for i in range(5000)]}).to_parquet(path)
    code = f"""
import os, pathlib, pyarrow.parquet
from components.tables import column_names, num_rows, read_frame, read_table
path = pathlib.Path({str(path)!r})
pyarrow.array([1] * 1000)  # its allocator has a thread, which never runs Python
threads = set(os.listdir("/proc/self/task"))
for source in (path, path.read_bytes()):
    read_table(source), read_frame(source), column_names(source)
num_rows(path)
print(len(set(os.listdir("/proc/self/task")) - threads))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "0"


def test_what_pyarrow_reads_in_threads_is_memory_of_its_own() -> None:
    content = b"1,2\n" * 1000
    held = sys.getrefcount(content)
    reader = arrow_reader(content)
    assert sys.getrefcount(content) == held
    assert reader.read() == content


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    with pytest.raises((OSError, pa.ArrowInvalid)):
        read_table(b"nothing")
