"""Whether the log is whole, and its export."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from components.contracts.errors import ConfigError, StoreError
from components.contracts.wording import counted
from components.journals import SUFFIX, holds_something, read_losses, read_rows
from components.objects import open_objects
from components.predictionlog import DAMAGED, UNREADABLE, described, read_log, read_segment, schema, segments
from components.store import explained

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and what it could not."""

    rows: int
    lost: int


def export(
    log_url: str,
    out: Path,
    *,
    journals: Path | None = None,
    model: str | None = None,
    since: datetime.datetime | None = None,
    until: datetime.datetime | None = None,
) -> Exported:
    """Write the log to a .parquet, .csv or .jsonl file; lists become JSON where the format has none. Raises ConfigError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if out.suffix not in (".parquet", ".csv", ".jsonl"):
        raise ConfigError(f"{out.name}: expected a name that ends in .parquet, .csv or .jsonl")
    tables = list(read_log(log_url, model=model, since=since, until=until))
    table = pa.concat_tables(tables) if tables else schema().empty_table()
    with explained("write", out):
        temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        try:
            if out.suffix == ".parquet":
                pq.write_table(table, temporary, compression="zstd")
            else:
                _write_text(table, temporary, out.suffix)
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    # A server that runs has no segment yet of what it is losing now. Journals first: one that is sealed meanwhile is then
    # there twice, and counts once.
    losing: dict[str, Sequence[dict[str, Any]]] = {}
    for path in journals.glob(f"*{SUFFIX}") if journals is not None and journals.is_dir() else []:
        with contextlib.suppress(FileNotFoundError):
            losing[path.stem] = read_losses(path).gaps()
    found = segments(open_objects(log_url))
    lost = sum(gap["gap"] for segment in found for gap in segment.gaps if described(gap, segment, since, until))
    for journal in losing.keys() - {segment.journal for segment in found}:
        lost += sum(gap["gap"] for gap in losing[journal] if described(gap, None, since, until))
    return Exported(len(table), lost)


def _write_text(table: pa.Table, path: Path, suffix: str) -> None:
    import csv

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        if suffix == ".csv":
            writer.writerow(table.column_names)
        for batch in table.to_batches(max_chunksize=1000):
            for row in batch.to_pylist():
                plain = {
                    name: value.isoformat()
                    if isinstance(value, datetime.datetime)
                    else [float(x) for x in value]
                    if isinstance(value, list)
                    else value
                    for name, value in row.items()
                }
                if suffix == ".jsonl":
                    file.write(orjson.dumps(plain).decode() + "\n")
                else:
                    writer.writerow(orjson.dumps(v).decode() if isinstance(v, list) else v for v in plain.values())


def unsealed(journals: Path) -> int:
    """Journals that are still written, or wait to be sealed."""
    return sum(map(holds_something, journals.glob(f"*{SUFFIX}"))) if journals.is_dir() else 0


@dataclass(frozen=True)
class Loss:
    """Predictions that were answered and are not in the log."""

    journal: str
    """The journal that should hold them; its segment has the same name."""
    lost: int
    since: str
    until: str
    """Both empty where a journal was damaged: nobody knows when."""
    reason: str

    def __str__(self) -> str:
        when = f" between {self.since} and {self.until}" if self.until else ""
        return f"{counted(self.lost, 'prediction')} of {self.journal} lost{when}: {self.reason}"


def _loss(journal: str, gap: dict[str, Any]) -> Loss:
    since, until = (
        datetime.datetime.fromtimestamp(gap[name], datetime.UTC).isoformat(timespec="seconds") if gap[name] else ""
        for name in ("since", "until")
    )
    return Loss(journal, int(gap["gap"]), since, until, str(gap["reason"]))


@dataclass(frozen=True)
class LogAudit:
    """What `verify` found."""

    segments: int
    rows: int
    lost_rows: int
    losses: tuple[Loss, ...]
    duplicates: int
    broken: tuple[str, ...]
    unsealed: int
    """Journals that are still written, or wait to be sealed."""


def verify(log_url: str, journals: Path) -> LogAudit:
    """Check every segment's digest, that no prediction is there twice, and what was lost, sealed or not."""
    objects = open_objects(log_url)
    broken: list[str] = []
    seen: set[str] = set()
    rows = duplicates = 0
    # Journals first, and by name: one that is sealed meanwhile is then there twice, and counts once.
    gaps: dict[str, Sequence[dict[str, Any]]] = {}
    for path in sorted(journals.glob(f"*{SUFFIX}")) if journals.is_dir() else []:
        try:
            gaps[path.stem] = [facts for facts, _ in read_rows(path) if "gap" in facts]
        except FileNotFoundError:
            continue  # sealed a moment ago
        except UNREADABLE as error:
            broken.append(f"{path.name} cannot be read as a journal ({error})")
    try:
        found = segments(objects)
    except StoreError as error:
        return LogAudit(0, 0, 0, (), 0, (str(error),), 0)
    gaps |= {segment.journal: segment.gaps for segment in found}
    losses = tuple(_loss(journal, gap) for journal, told in sorted(gaps.items()) for gap in told)
    listed = {segment.name for segment in found}
    for name in objects.stamps():
        if name.endswith(".parquet") and name not in listed:
            broken.append(f"{name} has no manifest: its sealing was cut short, and is done again from its journal")
    for path in sorted(journals.glob(f"*{DAMAGED}")) if journals.is_dir() else []:
        broken.append(f"{path.name} cannot be read as a journal; look at it, then remove it")
    for segment in found:
        try:
            table = read_segment(objects, segment)
        except StoreError as error:
            broken.append(str(error))
            continue
        if len(table) != segment.rows:
            broken.append(f"{segment.name} holds {counted(len(table), 'row')}, its manifest says {segment.rows}")
        rows += len(table)
        for identifier in table["prediction_id"].to_pylist():
            duplicates += identifier in seen
            seen.add(identifier)
    lost = sum(loss.lost for loss in losses)
    return LogAudit(len(found), rows, lost, losses, duplicates, tuple(broken), unsealed(journals))
