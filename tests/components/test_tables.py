from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from components.tables import read_frame, read_table


def test_a_table_is_read_from_a_file_or_from_bytes(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [1, 2], "b": [[1.0], [2.0, 3.0]]})
    path = tmp_path / "t.parquet"
    frame.to_parquet(path)
    assert read_frame(path, ["a"])["a"].tolist() == [1, 2]
    assert read_table(path.read_bytes())["b"].to_pylist() == [[1.0], [2.0, 3.0]]


def test_a_process_that_has_read_a_table_ends_well(tmp_path: Path) -> None:
    """With the reader's threads, most of these ended with SIGABRT."""
    path = tmp_path / "t.parquet"
    pd.DataFrame({"a": range(5000), "b": [[float(i)] * 20 for i in range(5000)]}).to_parquet(path)
    code = (
        f"from pathlib import Path; from components.tables import read_table; read_table(Path({str(path)!r}).read_bytes())"
    )
    done = [subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode for _ in range(8)]
    assert done == [0] * 8


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    with pytest.raises((OSError, pa.ArrowInvalid)):
        read_table(b"nothing")
