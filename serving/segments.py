"""Journals to Parquet segments, and what can be asked of them.

`serving/sealing.py` seals, in a process of its own.

    log/date=2026-03-01/<journal>.parquet   rows, schema version in the file's metadata
    log/date=2026-03-01/<journal>.json      written last: digest, rows, gaps; sealed

A segment is named after its journal, so sealing again after a crash replaces it by the same rows; the journal is removed
only when the segment was read back. LOG is a folder or s3://bucket/prefix.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from components.contracts import ConfigError, RegistryUnavailable, SchemaTooNew, StoreError, TamperedArtefact, counted
from components.images import STATISTICS
from components.objects import Objects, open_objects
from components.store import explained, seal, sha256_file, unseal
from components.tables import column_names, read_table
from serving.journal import SUFFIX, holds_something, read_losses, read_rows

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1
DAMAGED = ".damaged"
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, struct.error)
_VERSION_KEY = b"visionloop.schema_version"
_TEXT = (
    "prediction_id",
    "idempotency_key",
    "model",
    "version",
    "release",
    "engine_digest",
    "role",
    "protocol",
    "form",
    "image_sha256",
    "predicted",
)
_TIMES = ("event_at", "ingest_at")


def schema() -> pa.Schema:
    """Columns of a segment; times are UTC, latency runs from the request's last byte to the row."""
    import pyarrow as pa

    fields = [pa.field(name, pa.string()) for name in _TEXT]
    fields += [pa.field(name, pa.timestamp("us", tz="UTC")) for name in _TIMES]
    fields += [pa.field("latency_ms", pa.float32()), pa.field("confidence", pa.float32()), pa.field("unsure", pa.bool_())]
    fields += [pa.field("width", pa.int32()), pa.field("height", pa.int32()), pa.field("bytes", pa.int64())]
    fields += [pa.field(name, pa.float32()) for name in STATISTICS]
    fields += [pa.field("probabilities", pa.list_(pa.float32())), pa.field("embedding", pa.list_(pa.float16()))]
    return pa.schema(fields, metadata={_VERSION_KEY: str(SCHEMA_VERSION)})


@dataclass(frozen=True)
class Segment:
    """One sealed piece of the log."""

    name: str
    sha256: str
    rows: int
    gaps: tuple[dict[str, Any], ...]
    first: str
    last: str

    @property
    def journal(self) -> str:
        """The journal that it was."""
        return Path(self.name).stem


def seal_all(journals: Path, log_url: str) -> int:
    """Seal every journal that nobody writes any more; returns how many. Safe to run at any time, by anyone."""
    objects = open_objects(log_url)
    sealed = 0
    for path in sorted(journals.glob(f"*{SUFFIX}")) if journals.is_dir() else []:
        with path.open("rb") as file:
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
            except _UNREADABLE:
                # Not ours, or damaged beyond reading: kept for a person, reported by verify, and out of the others' way.
                path.rename(path.with_suffix(DAMAGED))
                continue
            if rows:
                _seal(path, rows, objects)
                sealed += 1
            path.unlink()
    return sealed


def _tabulated(rows: Iterable[tuple[dict[str, Any], list[bytes]]]) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Rows of a journal as the table of a segment, and the gaps among them."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {name: [] for name in schema().names}
    gaps = []
    for facts, arrays in rows:
        if "gap" in facts:
            gaps.append(facts)
            continue
        for name in columns:
            if name not in ("probabilities", "embedding"):
                columns[name].append(facts.get(name))
        probabilities, embedding = arrays
        columns["probabilities"].append(_floats(probabilities, "<f4"))
        columns["embedding"].append(_floats(embedding, "<f2"))
    for name in _TIMES:
        columns[name] = [None if t is None else datetime.datetime.fromtimestamp(t, datetime.UTC) for t in columns[name]]
    return pa.table(columns, schema=schema()), gaps


def _seal(path: Path, rows: list[tuple[dict[str, Any], list[bytes]]], objects: Objects) -> None:
    import pyarrow.parquet as pq

    table, gaps = _tabulated(rows)
    times = [moment for moment in table["ingest_at"].to_pylist() if moment is not None]
    day = (times[0] if times else datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)).date()
    name = f"date={day.isoformat()}/{path.name.removesuffix(SUFFIX)}"
    with tempfile.TemporaryDirectory(prefix="visionloop-seal-") as scratch:
        file = Path(scratch) / "segment.parquet"
        # A dictionary and least and greatest values of half a million different numbers cost time and find nothing.
        plain = [field.name for field in table.schema if field.name not in ("probabilities", "embedding")]
        pq.write_table(
            table, file, compression="zstd", row_group_size=10_000, use_dictionary=list(_TEXT), write_statistics=plain
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
    }
    objects.swap(f"{name}.json", lambda _: seal(body))


def _floats(data: bytes, kind: str) -> Any:
    import numpy as np

    return np.frombuffer(data, dtype=kind)


def segments(objects: Objects) -> list[Segment]:
    """Every sealed segment in order of time; raises TamperedArtefact or SchemaTooNew."""
    found = [_segment(objects, name) for name in objects.stamps() if name.endswith(".json")]
    return sorted(found, key=lambda segment: (segment.first, segment.name))


def _segment(objects: Objects, name: str) -> Segment:
    raw = objects.read(name, most=64 << 20)
    body = unseal(raw) if raw is not None else None
    if body is None:
        raise TamperedArtefact(f"{name} of the prediction log was changed after it was sealed")
    if body["schema_version"] > SCHEMA_VERSION:
        raise SchemaTooNew(
            f"{name} has schema version {body['schema_version']}, this visionloop reads up to {SCHEMA_VERSION}; upgrade"
        )
    parquet = name.removesuffix(".json") + ".parquet"
    return Segment(parquet, body["sha256"], body["rows"], tuple(body["gaps"]), body["first"], body["last"])


def read_segment(objects: Objects, segment: Segment, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a segment, all columns or some, after its digest was found right; raises TamperedArtefact."""
    import hashlib

    data = b"".join(objects.chunks(segment.name))
    if hashlib.sha256(data).hexdigest() != segment.sha256:
        raise TamperedArtefact(f"{segment.name} of the prediction log was changed after it was sealed; it was not read")
    if columns is None:
        return _conformed(read_table(data))
    there = column_names(data)
    return _conformed(read_table(data, [name for name in columns if name in there]), columns)


def _conformed(table: pa.Table, columns: Sequence[str] | None = None) -> pa.Table:
    """A table of an older schema with today's columns, all or some; what it did not have yet is null."""
    import pyarrow as pa

    wanted = schema()
    if columns is not None:
        wanted = pa.schema([wanted.field(name) for name in columns], metadata=wanted.metadata)
    if table.schema.equals(wanted):
        return table
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in wanted
    ]
    return pa.table(columns, schema=wanted)


@dataclass(frozen=True)
class Stretch:
    """What the log holds for a stretch of time, and what is missing from it."""

    tables: tuple[pa.Table, ...]
    lost: int
    """Predictions that the log says it lost in this time."""
    problems: tuple[str, ...]
    """Segments that could not be read."""


def read_stretch(
    log_url: str,
    journals: Path | None,
    *,
    model: str,
    since: datetime.datetime,
    until: datetime.datetime,
    columns: Sequence[str] | None = None,
    now: datetime.datetime | None = None,
) -> Stretch:
    """The rows of [since, until) by ingest time, sealed or still in a journal of this machine; a row may come twice.

    Some of the columns when they are named (`model` and `ingest_at` among them), else all. What does not verify, is damaged,
    or is dated after `now` is a problem that is told, not an end: the reader decides what silence is worth then.
    Raises RegistryUnavailable when the log's store does not answer.
    """
    objects = open_objects(log_url)
    late = now + _CLOCKS if now is not None else None
    tables: list[pa.Table] = []
    gaps: dict[str, list[dict[str, Any]]] = {}  # by journal: one that is sealed meanwhile is read twice
    problems: list[str] = []
    # Journals first: one that is sealed meanwhile is then there twice, which is nothing, and never missing.
    for path in sorted(journals.glob(f"*{SUFFIX}")) if journals is not None and journals.is_dir() else []:
        try:
            table, told = _tabulated(read_rows(path))
        except FileNotFoundError:
            continue  # sealed a moment ago: it is read as a segment
        except _UNREADABLE as error:
            problems.append(f"{path.name} cannot be read as a journal ({error})")
            continue
        if late is not None and len(table) and _latest(table) > late:
            problems.append(f"{path.name} holds predictions dated {_latest(table).isoformat()}: {_WRONG_CLOCK}")
        damaged = [gap for gap in told if not gap["until"]]
        problems += [f"{path.name}: {gap['reason']}, what was there is lost" for gap in damaged]
        table = _between(table, model, since, until)
        tables.append(table.select(list(columns)) if columns is not None else table)
        gaps[path.stem] = [gap for gap in told if gap["until"]]
    problems += [f"{aside.name} cannot be read as a journal" for aside in _set_aside(journals, since, until)]
    for name in _manifests(objects, since, until, late):
        try:
            segment = _segment(objects, name)
            if late is not None and segment.last and datetime.datetime.fromisoformat(segment.last) > late:
                problems.append(f"{name} holds predictions dated {segment.last}: {_WRONG_CLOCK}")
            if not _overlaps(segment, since, until):
                continue
            tables.append(_between(read_segment(objects, segment, columns), model, since, until))
            problems += [f"{name}: {gap['reason']}, what was there is lost" for gap in segment.gaps if not gap["until"]]
            gaps[segment.journal] = [gap for gap in segment.gaps if gap["until"]]
        except RegistryUnavailable:
            raise
        except (StoreError, KeyError, TypeError, ValueError) as error:
            problems.append(str(error))
    lost = sum(
        int(gap["gap"])
        for told in gaps.values()
        for gap in told
        if gap["until"] >= since.timestamp() and gap["since"] < until.timestamp()
    )
    return Stretch(tuple(table for table in tables if len(table)), lost, tuple(problems))


_CLOCKS = datetime.timedelta(minutes=5)
"""Difference of the clocks of two machines that is nobody's fault."""
_WRONG_CLOCK = "the clock of a server is wrong"
_MANY_DAYS = 60


def _latest(table: pa.Table) -> datetime.datetime:
    import pyarrow.compute as pc

    found: datetime.datetime = pc.max(table["ingest_at"]).as_py()
    return found


def _set_aside(journals: Path | None, since: datetime.datetime, until: datetime.datetime) -> list[Path]:
    """Journals that nobody can read, of which predictions of this time may be missing.

    Such a file was written until it was last changed, and from the moment that its name begins with.
    """
    found = []
    for path in sorted(journals.glob(f"*{DAMAGED}")) if journals is not None and journals.is_dir() else []:
        try:
            changed = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
        except FileNotFoundError:
            continue  # looked at, and removed
        try:
            begun = datetime.datetime.strptime(path.name.split("-")[0], "%Y%m%dT%H%M%S").replace(tzinfo=datetime.UTC)
        except ValueError:
            begun = changed
        if begun < until and changed >= since:
            found.append(path)
    return found


def _manifests(
    objects: Objects, since: datetime.datetime, until: datetime.datetime, late: datetime.datetime | None
) -> list[str]:
    """Names of the manifests of these days and the ones beside them; a folder that is named after no day may hold any.

    What is dated after now is looked for too: in the days that have not come.
    """
    day = datetime.timedelta(days=1)
    first, last = (since - day).date(), (until + day).date()
    if (last - first).days > _MANY_DAYS:
        return [name for name in objects.stamps() if name.endswith(".json")]
    names: list[str] = []
    for number in range((last - first).days + 1):
        names += objects.stamps(f"date={(first + number * day).isoformat()}")
    if late is not None:
        names += objects.stamps(f"date={(late + day).date().isoformat()}")
    return sorted({name for name in names if name.endswith(".json")})


def _overlaps(segment: Segment, since: datetime.datetime, until: datetime.datetime) -> bool:
    if not segment.first:
        return bool(segment.gaps)
    return datetime.datetime.fromisoformat(segment.first) < until and datetime.datetime.fromisoformat(segment.last) >= since


def _told_of(
    gap: dict[str, Any], segment: Segment | None, since: datetime.datetime | None, until: datetime.datetime | None
) -> bool:
    """Whether what was lost may belong to [since, until); of which model it was, nobody knows."""
    if gap["until"]:
        begun, ended = (datetime.datetime.fromtimestamp(gap[name], datetime.UTC) for name in ("since", "until"))
    elif segment is not None and segment.first:
        begun, ended = datetime.datetime.fromisoformat(segment.first), datetime.datetime.fromisoformat(segment.last)
    else:
        return True
    return (until is None or begun < until) and (since is None or ended >= since)


def _between(
    table: pa.Table, model: str | None, since: datetime.datetime | None, until: datetime.datetime | None
) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    moment = pa.timestamp("us", tz="UTC")
    if model is not None:
        table = table.filter(pc.equal(table["model"], model))
    if since is not None:
        table = table.filter(pc.greater_equal(table["ingest_at"], pa.scalar(since, moment)))
    if until is not None:
        table = table.filter(pc.less(table["ingest_at"], pa.scalar(until, moment)))
    return table


def read_log(
    log_url: str, *, model: str | None = None, since: datetime.datetime | None = None, until: datetime.datetime | None = None
) -> Iterator[pa.Table]:
    """Tables of the log in order of time, of one model and [since, until) when they are given."""
    objects = open_objects(log_url)
    for segment in segments(objects):
        if not segment.rows:
            continue
        first, last = datetime.datetime.fromisoformat(segment.first), datetime.datetime.fromisoformat(segment.last)
        if (since is not None and last < since) or (until is not None and first >= until):
            continue
        table = _between(read_segment(objects, segment), model, since, until)
        if len(table):
            yield table


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
    found = segments(open_objects(log_url))
    lost = sum(gap["gap"] for segment in found for gap in segment.gaps if _told_of(gap, segment, since, until))
    # A server that runs has no segment yet of what it is losing now.
    for path in journals.glob(f"*{SUFFIX}") if journals is not None and journals.is_dir() else []:
        if all(segment.journal != path.stem for segment in found):
            lost += sum(gap["gap"] for gap in read_losses(path).gaps() if _told_of(gap, None, since, until))
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
class Checked:
    """What `verify` found."""

    segments: int
    rows: int
    lost_rows: int
    losses: tuple[Loss, ...]
    duplicates: int
    broken: tuple[str, ...]
    unsealed: int
    """Journals that are still written, or wait to be sealed."""


def verify(log_url: str, journals: Path) -> Checked:
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
        except _UNREADABLE as error:
            broken.append(f"{path.name} cannot be read as a journal ({error})")
    try:
        found = segments(objects)
    except StoreError as error:
        return Checked(0, 0, 0, (), 0, (str(error),), 0)
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
    return Checked(len(found), rows, lost, losses, duplicates, tuple(broken), unsealed(journals))
