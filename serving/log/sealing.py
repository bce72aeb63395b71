"""Journals to Parquet segments, and what can be asked of them.

`serving/log/seal_process.py` seals, in a process of its own.

    log/date=2026-03-01/<journal>.parquet   rows, schema version in the file's metadata
    log/date=2026-03-01/<journal>.json      written last: digest, rows, gaps, counts by hour and class; sealed

A segment is named after its journal, so sealing again after a crash replaces it by the same rows; the journal is removed
only when the segment was read back. LOG is a folder or s3://bucket/prefix.
"""

from __future__ import annotations

import datetime
import fcntl
import tempfile
from pathlib import Path
from typing import Any

from components.contracts.errors import StoreError
from components.journals import SUFFIX, read_rows
from components.objects import Objects, open_objects
from components.predictionlog import DAMAGED, SCHEMA_VERSION, TEXT_COLUMNS, UNREADABLE, counts_of, tabulated
from components.store import seal, sha256_file


def seal_all(journals: Path, log_url: str) -> int:
    """Seal every journal that nobody writes any more; returns how many. Safe to run at any time, by anyone."""
    objects = open_objects(log_url)
    sealed = 0
    for path in sorted(journals.glob(f"*{SUFFIX}")) if journals.is_dir() else []:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            continue  # sealed by another a moment ago
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # being written, or being sealed
            if not path.exists():
                continue
            try:
                rows = list(read_rows(path))
                if any(len(arrays) != 2 for facts, arrays in rows if "gap" not in facts):
                    raise ValueError("a row without its arrays")
            except UNREADABLE:
                # Not ours, or damaged beyond reading: kept for a person, reported by verify, and out of the others' way.
                path.rename(path.with_suffix(DAMAGED))
                continue
            if rows:
                _seal(path, rows, objects)
                sealed += 1
            path.unlink()
    return sealed


def _seal(path: Path, rows: list[tuple[dict[str, Any], list[bytes]]], objects: Objects) -> None:
    import pyarrow.parquet as pq

    table, gaps = tabulated(rows)
    times = [moment for moment in table["ingest_at"].to_pylist() if moment is not None]
    day = (times[0] if times else datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)).date()
    name = f"date={day.isoformat()}/{path.name.removesuffix(SUFFIX)}"
    with tempfile.TemporaryDirectory(prefix="visionloop-seal-") as scratch:
        file = Path(scratch) / "segment.parquet"
        # A dictionary and least and greatest values of half a million different numbers cost time and find nothing.
        plain = [field.name for field in table.schema if field.name not in ("probabilities", "embedding")]
        pq.write_table(
            table, file, compression="zstd", row_group_size=10_000, use_dictionary=list(TEXT_COLUMNS), write_statistics=plain
        )
        digest = sha256_file(file)
        objects.put(f"{name}.parquet", file)
        if objects.digest(f"{name}.parquet") != digest:
            raise StoreError(f"{name}.parquet was not stored as it was written; the journal is kept")
    body = {
        "schema_version": SCHEMA_VERSION,
        "sha256": digest,
        "rows": len(table),
        "gaps": gaps,
        "first": min(times).isoformat() if times else "",
        "last": max(times).isoformat() if times else "",
        # What pages show of the day's traffic: a hundredth of the bytes, and nobody reads the segment for it.
        "counts": counts_of(table),
    }
    objects.swap(f"{name}.json", lambda _: seal(body))
