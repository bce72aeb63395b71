"""A folder, a table or a bucket through the same engine: one row an image, in shards, resumable.

    OUT/plan.json                what is answered by which release; another plan does not fit into this folder
    OUT/part-00000.parquet       rows in the order of the inputs; a bad image is an error row
    OUT/part-00000.json          written last: digest and rows

A shard whose manifest verifies is not done again, so a job that was killed goes on where it stopped and ends with the same
rows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from components import plugins
from components.contracts.errors import ConfigError, StoreError
from components.contracts.progress import Progress, silent
from components.contracts.records import Stored, canonical_json, sha256_text
from components.contracts.releases import Release
from components.contracts.wording import counted
from components.formats import Accepted
from components.images import STATISTICS
from components.objects import Objects, open_objects
from components.store import seal, sha256_file, unseal
from components.tables import read_table
from serving.engines.deployment import Deployment
from serving.engines.frames import Facts, Form
from serving.engines.limits import Limits, NotServing
from serving.inference import decide
from serving.metrics import Metrics

_OUTSTANDING = 64
_SHOWN = 20
"""Most images that are named because they got no answer; the shards name all."""


class Inputs(Protocol):
    """Images by a name, in a fixed order."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def fingerprint(self) -> str:
        """Changes when an image does."""
        ...

    def read(self, index: int) -> bytes:
        """The bytes of one image; raises OSError or StoreError."""
        ...


class _Files:
    """A folder or a bucket; hidden files are left out."""

    def __init__(self, url: str, largest: int) -> None:
        self._objects, self._largest = open_objects(url), largest
        stamps = {
            name: stamp
            for name, stamp in self._objects.stamps().items()
            if not any(part.startswith(".") for part in name.split("/"))
        }
        self._stored = list(stamps)
        # A name that is not UTF-8 is told with its bytes written out.
        self.names: Sequence[str] = [name.encode("utf-8", "backslashreplace").decode() for name in stamps]
        self.fingerprint = sha256_text(canonical_json([url, list(self.names), list(stamps.values())]))

    def read(self, index: int) -> bytes:
        data = self._objects.read(self._stored[index], most=self._largest)
        if data is None:
            raise StoreError("the file is not there any more")
        return data


class _Table:
    """A Parquet file with a column `image` of bytes, or `path` of files beside it; `name` names the rows if it is there."""

    def __init__(self, path: Path, largest: int) -> None:
        self._largest = largest
        try:
            table = read_table(path)
        except Exception as error:
            # pyarrow raises OSError, ArrowInvalid and others for what is no Parquet file.
            raise ConfigError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
        if "image" not in table.column_names and "path" not in table.column_names:
            raise ConfigError(f"{path} has no column `image` (bytes) or `path`; it has {', '.join(table.column_names)}")
        self.fingerprint = sha256_file(path)
        self._images = table["image"] if "image" in table.column_names else None
        self._folder = path.parent
        self.names: Sequence[str]
        if "name" in table.column_names:
            self.names = [str(name) for name in table["name"].to_pylist()]
        elif self._images is None:
            self.names = [str(name) for name in table["path"].to_pylist()]
        else:
            self.names = [f"row {index}" for index in range(len(table))]
        self._paths = table["path"].to_pylist() if self._images is None else []
        if self._images is None:
            # The table names its images and does not hold them: another image under a name is another input.
            stamps = [_stamp(self._folder / str(path)) for path in self._paths]
            self.fingerprint = sha256_text(canonical_json([self.fingerprint, stamps]))

    def read(self, index: int) -> bytes:
        if self._images is not None:
            data = self._images[index].as_py()
            if not isinstance(data, bytes):
                raise StoreError("the row holds no bytes")
            return data
        path = self._folder / str(self._paths[index])
        if path.stat().st_size > self._largest:
            raise StoreError(f"the file is larger than {self._largest} bytes")
        return path.read_bytes()


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return []  # an error row, told by `read`
    return [status.st_size, status.st_mtime_ns]


def open_inputs(source: str, *, largest: int) -> Inputs:
    """The images of a folder, a .parquet file or s3://bucket/prefix, each of at most `largest` bytes; raises ConfigError."""
    if source.startswith("s3://"):
        found: Inputs = _Files(source, largest)
    elif Path(source).is_dir():
        found = _Files(str(Path(source).resolve()), largest)
    elif source.endswith(".parquet") and Path(source).is_file():
        found = _Table(Path(source).resolve(), largest)
    else:
        raise ConfigError(f"{source} is no folder, .parquet file or s3:// address")
    if not found.names:
        raise ConfigError(f"{source} holds no images")
    return found


@dataclass(frozen=True)
class Done:
    """What a batch came to."""

    rows: int
    errors: int
    refused: tuple[tuple[str, str], ...]
    """The first of the images that got no answer, and why."""
    shards: int
    resumed: int
    """Shards that an earlier run had finished."""


@dataclass(frozen=True)
class BatchConfig:
    """How a batch is worked through."""

    shard_size: int = 2000
    embeddings: bool = False
    limits: Limits = field(default_factory=Limits)
    plugins: Path | None = None


def predict(
    release: Stored[Release],
    version: str,
    inputs: Inputs,
    out: str,
    config: BatchConfig,
    *,
    progress: Progress = silent,
) -> Done:
    """Answer every image of `inputs` by `release` into shards under `out`, a folder or s3:// address.

    Raises ConfigError when `out` holds another batch, StoreError when no engine can answer; running again goes on.
    """
    plugins.use_workspace(config.plugins)
    objects = open_objects(out)
    plan = {
        "release": release.record.digest(),
        "inputs": inputs.fingerprint,
        "images": len(inputs.names),
        "shard_size": config.shard_size,
        "embeddings": config.embeddings,
    }
    if config.limits.accepted != Accepted():
        plan["accepted"] = dataclasses.asdict(config.limits.accepted) | {"formats": list(config.limits.accepted.formats)}
    _expect_plan(objects, plan, out)
    starts = range(0, len(inputs.names), config.shard_size)
    finished = {start: _finished(objects, index) for index, start in enumerate(starts)}
    todo = [(index, start) for index, start in enumerate(starts) if finished[start] is None]
    if todo:
        asyncio.run(_answer_all(release, version, inputs, objects, config, todo, finished, progress))
    shards = [shard for shard in finished.values() if shard is not None]
    rows, errors = sum(shard.rows for shard in shards), sum(shard.errors for shard in shards)
    refused = tuple(itertools.islice((refusal for shard in shards for refusal in shard.refused), _SHOWN))
    if rows != len(inputs.names):
        raise StoreError(
            f"{out} holds {counted(rows, 'row')} for {counted(len(inputs.names), 'image')}; remove it and run again"
        )
    return Done(rows, errors, refused, len(shards), len(shards) - len(todo))


def _expect_plan(objects: Objects, plan: dict[str, Any], out: str) -> None:
    raw = objects.read("plan.json", most=1 << 20)
    if raw is None:
        if objects.stamps():
            raise ConfigError(f"{out} is not empty and holds no batch; name another folder with --out")
        objects.swap("plan.json", lambda _: seal(plan))
        return
    found = unseal(raw)
    if found != plan:
        changed = sorted(name for name in {*plan, *(found or {})} if (found or {}).get(name) != plan.get(name))
        raise ConfigError(f"{out} holds another batch ({', '.join(changed)} differ); name another folder with --out")


def _part(index: int) -> str:
    return f"part-{index:05d}"


@dataclass(frozen=True)
class _Shard:
    rows: int
    errors: int
    refused: tuple[tuple[str, str], ...]
    """The first names with errors, and these."""


def _finished(objects: Objects, index: int) -> _Shard | None:
    raw = objects.read(f"{_part(index)}.json", most=1 << 20)
    body = unseal(raw) if raw is not None else None
    if body is None or objects.digest(f"{_part(index)}.parquet") != body["sha256"]:
        return None
    # Shards of older batches name none.
    return _Shard(int(body["rows"]), int(body["errors"]), tuple((name, error) for name, error in body.get("refused", ())))


async def _answer_all(
    release: Stored[Release],
    version: str,
    inputs: Inputs,
    objects: Objects,
    config: BatchConfig,
    todo: Sequence[tuple[int, int]],
    finished: dict[int, _Shard | None],
    progress: Progress,
) -> None:
    deployment = Deployment(
        release, version=version, generation=1, limits=config.limits, metrics=Metrics(), plugins=config.plugins
    )
    total = len(inputs.names)
    done = sum(shard.rows for shard in finished.values() if shard is not None)
    try:
        await deployment.start()
        for index, start in todo:
            numbers = range(start, min(start + config.shard_size, total))
            slots = asyncio.Semaphore(_OUTSTANDING)
            shown = done

            async def one(number: int, slots: asyncio.Semaphore = slots) -> dict[str, Any]:
                async with slots:
                    row = await _row(deployment, inputs, number, config)
                nonlocal shown
                shown += 1
                progress(shown, total)
                return row

            rows = await asyncio.gather(*(one(number) for number in numbers))
            finished[start] = await asyncio.to_thread(_write, objects, index, rows, config)
            done += len(rows)
    finally:
        await deployment.close()


async def _row(deployment: Deployment, inputs: Inputs, number: int, config: BatchConfig) -> dict[str, Any]:
    row: dict[str, Any] = {"name": inputs.names[number], "version": deployment.version, "release": deployment.digest}
    try:
        data = await asyncio.to_thread(inputs.read, number)
    except (OSError, StoreError) as error:
        return row | {"error": f"cannot be read: {getattr(error, 'strerror', None) or error}"}
    row["image_sha256"] = hashlib.sha256(data).hexdigest()
    if not data:
        return row | {"error": "empty file"}
    try:
        (future,) = deployment.submit([(Form.ENCODED, data)])
        result = await future
    except NotServing:
        raise StoreError("no engine can answer; run the same command again, it goes on where it stopped") from None
    if not isinstance(result, Facts):
        return row | {"error": result.message}
    answer = decide(deployment.release, deployment.task, result)
    row |= {
        "label": answer.label,
        "predicted": answer.predicted,
        "confidence": answer.confidence,
        "unsure": answer.unsure,
        "probabilities": result.probabilities,
        "width": result.width,
        "height": result.height,
        "bytes": result.num_bytes,
        **dict(zip(STATISTICS, result.appearance, strict=True)),
    }
    if config.embeddings:
        import numpy as np

        row["embedding"] = np.frombuffer(result.embedding, dtype="<f2")
    return row


def _write(objects: Objects, index: int, rows: Sequence[dict[str, Any]], config: BatchConfig) -> _Shard:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = [pa.field(name, pa.string()) for name in ("name", "label", "predicted")]
    numbers = [pa.field("confidence", pa.float32()), pa.field("unsure", pa.bool_())]
    numbers.append(pa.field("probabilities", pa.list_(pa.float32())))
    numbers += [pa.field("width", pa.int32()), pa.field("height", pa.int32()), pa.field("bytes", pa.int64())]
    numbers += [pa.field(name, pa.float32()) for name in STATISTICS]
    if config.embeddings:
        numbers.append(pa.field("embedding", pa.list_(pa.float16())))
    about = [pa.field(name, pa.string()) for name in ("error", "image_sha256", "version", "release")]
    schema = pa.schema([*text, *numbers, *about], metadata={"visionloop.schema_version": "1"})
    columns = {name: [row.get(name) for row in rows] for name in schema.names}
    with tempfile.TemporaryDirectory(prefix="visionloop-batch-") as scratch:
        file = Path(scratch) / "part.parquet"
        pq.write_table(pa.table(columns, schema=schema), file, compression="zstd")
        digest = sha256_file(file)
        objects.put(f"{_part(index)}.parquet", file)
    failed = [(row["name"], row["error"]) for row in rows if row.get("error") is not None]
    shard = _Shard(len(rows), len(failed), tuple(failed[:_SHOWN]))
    body = {"sha256": digest, "rows": shard.rows, "errors": shard.errors, "refused": shard.refused}
    objects.swap(f"{_part(index)}.json", lambda _: seal(body))
    return shard
