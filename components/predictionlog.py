"""The prediction log as it is read: its schema, its segments, and the rows of a stretch of time."""

from __future__ import annotations

import datetime
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.contracts.errors import RegistryUnavailable, SchemaTooNew, StoreError, TamperedArtefact
from components.images import STATISTICS
from components.journals import SUFFIX, read_rows
from components.objects import Objects, open_objects
from components.store import unseal
from components.tables import column_names, read_table

if TYPE_CHECKING:
    import pyarrow as pa


SCHEMA_VERSION = 1
DAMAGED = ".damaged"
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, struct.error)
_VERSION_KEY = b"visionloop.schema_version"
TEXT_COLUMNS = (
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
TIME_COLUMNS = ("event_at", "ingest_at")


def schema() -> pa.Schema:
    """Columns of a segment; times are UTC, latency runs from the request's last byte to the row."""
    import pyarrow as pa

    fields = [pa.field(name, pa.string()) for name in TEXT_COLUMNS]
    fields += [pa.field(name, pa.timestamp("us", tz="UTC")) for name in TIME_COLUMNS]
    fields += [pa.field("latency_ms", pa.float32()), pa.field("confidence", pa.float32()), pa.field("unsure", pa.bool_())]
    fields += [pa.field("width", pa.int32()), pa.field("height", pa.int32()), pa.field("bytes", pa.int64())]
    fields += [pa.field(name, pa.float32()) for name in STATISTICS]
    fields += [pa.field("probabilities", pa.list_(pa.float32())), pa.field("embedding", pa.list_(pa.float16()))]
    return pa.schema(fields, metadata={_VERSION_KEY: str(SCHEMA_VERSION)})


class Count(NamedTuple):
    """How many predictions of one hour are alike."""

    model: str
    version: str
    hour: str
    """UTC, `2026-03-01T12`."""
    predicted: str
    unsure: bool
    number: int


COUNTED_COLUMNS = ("model", "version", "ingest_at", "predicted", "unsure")


def counts_of(table: pa.Table) -> tuple[Count, ...]:
    """The predictions of a table, counted; those without a moment are not among them."""
    columns = [table[name].to_pylist() for name in COUNTED_COLUMNS]
    found = Counter(
        (str(model), str(version), hour_of(at), str(predicted), bool(unsure))
        for model, version, at, predicted, unsure in zip(*columns, strict=True)
        if at is not None
    )
    return tuple(Count(*alike, number) for alike, number in sorted(found.items()))


def hour_of(moment: datetime.datetime) -> str:
    """The hour of a moment in UTC, as a Count names it: later ones sort after earlier ones."""
    return moment.astimezone(datetime.UTC).isoformat()[:13]


@dataclass(frozen=True)
class Segment:
    """One sealed piece of the log."""

    name: str
    sha256: str
    rows: int
    gaps: tuple[dict[str, Any], ...]
    first: str
    last: str
    counts: tuple[Count, ...] | None = None
    """What it holds, counted; None where it was sealed before that was written down."""

    @property
    def journal(self) -> str:
        """The journal that it was."""
        return Path(self.name).stem


def tabulated(rows: Iterable[tuple[dict[str, Any], list[bytes]]]) -> tuple[pa.Table, list[dict[str, Any]]]:
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
    for name in TIME_COLUMNS:
        columns[name] = [None if t is None else datetime.datetime.fromtimestamp(t, datetime.UTC) for t in columns[name]]
    return pa.table(columns, schema=schema()), gaps


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
    counts = tuple(Count(*row) for row in body["counts"]) if "counts" in body else None
    return Segment(parquet, body["sha256"], body["rows"], tuple(body["gaps"]), body["first"], body["last"], counts)


def open_segment(objects: Objects, name: str) -> Segment:
    """What the manifest of this name says of its segment; raises TamperedArtefact, SchemaTooNew, KeyError or TypeError."""
    return _segment(objects, name)


def stamps_of(objects: Objects, since: datetime.datetime, until: datetime.datetime) -> dict[str, str]:
    """What lies in the log of these days and the ones beside them: names, each with what changes when its bytes do."""
    first, last = since.date() - _DAY, until.date() + _DAY
    if (last - first).days > _MANY_DAYS:
        return objects.stamps()
    found: dict[str, str] = {}
    for number in range((last - first).days + 1):
        found |= objects.stamps(f"date={(first + number * _DAY).isoformat()}")
    return found


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
            table, told = tabulated(read_rows(path))
        except FileNotFoundError:
            continue  # sealed a moment ago: it is read as a segment
        except UNREADABLE as error:
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
_DAY = datetime.timedelta(days=1)
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
    names = stamps_of(objects, since, until)
    if late is not None:
        names |= objects.stamps(f"date={(late + _DAY).date().isoformat()}")
    return sorted(name for name in names if name.endswith(".json"))


def _overlaps(segment: Segment, since: datetime.datetime, until: datetime.datetime) -> bool:
    if not segment.first:
        return bool(segment.gaps)
    return datetime.datetime.fromisoformat(segment.first) < until and datetime.datetime.fromisoformat(segment.last) >= since


def described(
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
