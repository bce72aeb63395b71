from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failpoints import Died, Failpoints
from stores import s3_bucket

from components import objects as objects_module
from components import predictionlog
from components.contracts.errors import ConfigError, SchemaTooNew, TamperedArtefact
from components.journals import HEAD_BYTES, encode_row, read_losses, read_rows
from components.objects import open_objects
from components.store import seal, unseal
from serving.log import audit, sealing
from serving.log.journal import Journal, JournalConfig
from serving.metrics import Metrics


def row(number: int, *, model: str = "m", at: float | None = None) -> bytes:
    facts = {"prediction_id": f"{number:032x}", "model": model, "version": "1", "ingest_at": at or 1_770_000_000.0 + number}
    facts |= {"event_at": facts["ingest_at"], "confidence": 0.5, "unsure": False, "predicted": "a", "latency_ms": 1.0}
    probabilities = np.array([0.5, 0.5], dtype="<f4").tobytes()
    return encode_row(facts, probabilities, np.arange(4, dtype="<f2").tobytes())


def ids(path: Path) -> list[int]:
    return [int(facts["prediction_id"], 16) for facts, _ in read_rows(path)]


class Desk:
    """A journal on an event loop, and the metrics it reports to."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.metrics = Metrics()
        self.rotations = 0
        self.journal = Journal(folder, JournalConfig(**config), self.metrics, rotated=self._rotated)

    def _rotated(self) -> None:
        self.rotations += 1

    def figure(self, name: str) -> float:
        found = [s.value for m in self.metrics.registry.collect() for s in m.samples if s.name == f"visionloop_{name}"]
        return sum(found)

    def run(self, *writes: list[bytes], close: bool = True) -> list[bool]:
        async def write() -> list[bool]:
            self.journal.start()
            return [await self.journal.write(rows) for rows in writes]

        done = asyncio.run(write())
        if close:
            self.journal.close()
        return done


def test_what_was_written_is_there_before_anything_is_closed(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    assert desk.run([row(1)], [row(2), row(3)], close=False) == [True, True]
    (path,) = tmp_path.glob("*.journal")
    assert ids(path) == [1, 2, 3]
    facts, arrays = next(read_rows(path))
    assert facts["predicted"] == "a"
    assert np.frombuffer(arrays[1], dtype="<f2").tolist() == [0, 1, 2, 3]
    assert (path.stat().st_mode & 0o777) == 0o600
    desk.journal.close()
    assert desk.rotations == 1


def test_a_journal_cut_anywhere_gives_its_whole_rows(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.run([row(1)], [row(2)], [row(3)])
    (path,) = tmp_path.glob("*.journal")
    data = path.read_bytes()
    size = len(row(1))
    for end in range(HEAD_BYTES, len(data) + 1, 7):
        path.write_bytes(data[:end])
        whole = (end - HEAD_BYTES) // size
        assert ids(path) == list(range(1, whole + 1))


def test_a_flipped_bit_ends_the_journal_there(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.run([row(1)], [row(2)])
    (path,) = tmp_path.glob("*.journal")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    assert ids(path) == [1]
    path.write_bytes(b"not a journal at all")
    with pytest.raises(ValueError, match="is not a journal"):
        list(read_rows(path))


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set: a full disk, on which nothing can be made or become longer, and what is there can be overwritten."""
    full, write, opened = threading.Event(), os.pwrite, os.open

    def pwrite(descriptor: int, data: Any, place: int) -> int:
        if full.is_set() and place + len(data) > os.fstat(descriptor).st_size:
            write(descriptor, bytes(data[:9]), place)  # a torn frame, as a full disk leaves it
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data, place)

    def open_(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if full.is_set() and flags & os.O_CREAT and str(path).endswith(".opening"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, flags, *rest, **named)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr("serving.log.journal.os.open", open_)
    return full


def test_a_full_disk_is_a_gap_that_is_told(tmp_path: Path, full: threading.Event) -> None:
    desk = Desk(tmp_path)

    async def scene() -> list[bool]:
        desk.journal.start()
        done = [await desk.journal.write([row(1)])]
        full.set()
        done += [await desk.journal.write([row(2), row(3)]), await desk.journal.write([row(4)])]
        assert "ENOSPC" in desk.journal.problem
        full.clear()
        return [*done, await desk.journal.write([row(5)])]

    assert asyncio.run(scene()) == [True, False, False, True]
    desk.journal.close()
    (path,) = tmp_path.glob("*.journal")
    found = [facts for facts, _ in read_rows(path)]
    assert [facts.get("gap") or int(facts["prediction_id"], 16) for facts in found] == [3, 1, 5]
    assert desk.figure("journal_lost_rows_total") == 3
    assert desk.figure("journal_rows_total") == 2
    assert desk.journal.problem == ""


def test_a_slow_disk_makes_rows_late_and_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, answer_wait_s=0.02)
    slow = threading.Event()
    real = Journal._append

    def append(self: Journal, rows: list[bytes]) -> bool:
        slow.wait(5)
        return real(self, rows)

    monkeypatch.setattr(Journal, "_append", append)
    assert desk.run([row(1)], [row(2)], close=False) == [False, False]
    assert desk.figure("journal_late_rows_total") == 2
    slow.set()
    desk.journal.close()
    (path,) = tmp_path.glob("*.journal")
    assert ids(path) == [1, 2]
    assert desk.figure("journal_lost_rows_total") == 0


def test_a_backlog_that_is_full_drops_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, answer_wait_s=0.01, max_backlog=3)
    hold = threading.Event()
    real = Journal._append

    def append(self: Journal, rows: list[bytes]) -> bool:
        hold.wait(5)
        return real(self, rows)

    monkeypatch.setattr(Journal, "_append", append)
    desk.run(*[[row(n)] for n in range(1, 9)], close=False)
    lost = desk.figure("journal_lost_rows_total")
    assert lost >= 3
    hold.set()
    desk.journal.close()
    (path,) = tmp_path.glob("*.journal")
    rows = [facts for facts, _ in read_rows(path)]
    assert len([f for f in rows if "gap" not in f]) == 8 - lost
    assert sum(f.get("gap", 0) for f in rows) in (0, lost)  # told with the next row, if one came


def test_a_sync_that_fails_once_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor is free for a moment: the thread lives on, and what was not synced then is synced later."""
    failures, synced, real = [1], threading.Event(), os.dup

    def dup(descriptor: int) -> int:
        if failures:
            failures.pop()
            raise OSError(errno.EMFILE, "too many open files")
        return real(descriptor)

    monkeypatch.setattr("serving.log.journal.os.dup", dup)
    monkeypatch.setattr("serving.log.journal.os.fdatasync", lambda _: synced.set())
    desk = Desk(tmp_path, sync_s=0.05)
    desk.run([row(1)], close=False)
    assert synced.wait(10)
    assert not failures
    desk.journal.close()


def test_a_journal_is_rotated_by_size_and_sealed_ones_hold_every_row(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "j", rotate_bytes=len(row(1)) * 2)
    desk.run(*[[row(n)] for n in range(10)])
    assert desk.rotations > 2
    url = str(tmp_path / "log")
    assert sealing.seal_all(tmp_path / "j", url) == desk.rotations
    assert list((tmp_path / "j").glob("*.journal")) == []
    found = [int(i, 16) for table in predictionlog.read_log(url) for i in table["prediction_id"].to_pylist()]
    assert found == list(range(10))
    checked = audit.verify(url, tmp_path / "j")
    assert (checked.rows, checked.duplicates, checked.broken, checked.lost_rows) == (10, 0, (), 0)


@pytest.fixture
def journals(tmp_path: Path) -> Path:
    desk = Desk(tmp_path / "j")
    desk.run([row(n) for n in range(5)])
    return tmp_path / "j"


def test_a_journal_that_is_written_is_left_alone(journals: Path, tmp_path: Path) -> None:
    (path,) = journals.glob("*.journal")
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert sealing.seal_all(journals, str(tmp_path / "log")) == 0
    assert sealing.seal_all(journals, str(tmp_path / "log")) == 1
    assert sealing.seal_all(journals, str(tmp_path / "log")) == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_death_at_any_step_of_sealing_keeps_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: Any
) -> None:
    places: list[tuple[Any, str]] = [
        (os, "replace"),
        (os, "fsync"),
        (Path, "unlink"),
        (objects_module, "write_atomically"),
        (objects_module._Folder, "put"),
        (objects_module._Folder, "digest"),
        (objects_module._Folder, "swap"),
    ]
    nth = 0
    while True:
        nth += 1
        desk = Desk(tmp_path / f"j{nth}")
        desk.run([row(n) for n in range(5)])
        url = str(tmp_path / f"log{nth}")
        with monkeypatch.context() as patched:
            Failpoints(places, nth=nth, when=when)(patched)
            died = False
            try:
                sealing.seal_all(tmp_path / f"j{nth}", url)
            except Died:
                died = True
        sealing.seal_all(tmp_path / f"j{nth}", url)
        found = [int(i, 16) for table in predictionlog.read_log(url) for i in table["prediction_id"].to_pylist()]
        assert found == list(range(5))
        checked = audit.verify(url, tmp_path / f"j{nth}")
        assert (checked.rows, checked.duplicates, checked.broken) == (5, 0, ())
        if not died:
            break
    assert nth > 8


def test_sealing_at_once_by_many_keeps_every_row_once(journals: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "log")
    # One that is listed and gone when it is opened, as where another process has sealed it.
    (journals / "gone.journal").symlink_to(tmp_path / "nowhere")
    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(lambda _: sealing.seal_all(journals, url), range(6))) >= 1
    assert audit.verify(url, journals).rows == 5
    assert audit.export(url, tmp_path / "rows.csv", journals=journals).rows == 5


def test_the_sealing_process_seals_and_imports_no_pandas(journals: Path, tmp_path: Path) -> None:
    """Importing it costs more than sealing, and pyarrow does so unasked."""
    url = str(tmp_path / "log")
    command = [sys.executable, "-X", "importtime", "-m", "serving.log.seal_process", str(journals), url, "low"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "pyarrow.parquet" in done.stderr
    assert "pandas.core" not in done.stderr
    checked = audit.verify(url, journals)
    assert (checked.rows, checked.broken, checked.unsealed) == (5, (), 0)


def test_a_changed_segment_is_refused_and_reported(journals: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "log")
    sealing.seal_all(journals, url)
    (path,) = (tmp_path / "log").rglob("*.parquet")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(TamperedArtefact, match="was changed after it was sealed"):
        list(predictionlog.read_log(url))
    assert len(audit.verify(url, journals).broken) == 1
    path.write_bytes(data)
    (manifest,) = (tmp_path / "log").rglob("*.json")
    sealed = manifest.read_bytes()
    manifest.write_bytes(sealed.replace(b'"rows":5', b'"rows":4'))
    assert "changed after it was sealed" in audit.verify(url, journals).broken[0]
    body = unseal(sealed)
    assert body is not None
    manifest.write_bytes(seal(body | {"schema_version": 99}))
    with pytest.raises(SchemaTooNew, match="schema version 99"):
        predictionlog.segments(open_objects(url))
    manifest.unlink()
    assert "has no manifest" in audit.verify(url, journals).broken[0]


def test_the_log_is_read_by_model_and_time(tmp_path: Path) -> None:
    import datetime

    desk = Desk(tmp_path / "j")
    start = 1_770_000_000.0
    desk.run([row(n, model="a" if n % 2 else "b", at=start + 60 * n) for n in range(10)])
    url = str(tmp_path / "log")
    sealing.seal_all(tmp_path / "j", url)

    def found(**options: Any) -> list[int]:
        return [int(i, 16) for t in predictionlog.read_log(url, **options) for i in t["prediction_id"].to_pylist()]

    def at(number: int) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(start + 60 * number, datetime.UTC)

    assert found(model="a") == [1, 3, 5, 7, 9]
    assert found(since=at(4), until=at(7)) == [4, 5, 6]
    assert found(since=at(100)) == []


def test_an_export_tells_of_the_losses_of_its_own_time(tmp_path: Path) -> None:
    import datetime

    journals, url, start = tmp_path / "j", str(tmp_path / "log"), 1_770_000_000.0
    gap = {"gap": 7, "since": start + 100, "until": start + 200, "reason": "disk"}
    journals.mkdir()
    (journals / "a.journal").write_bytes(b"VLJ1" + row(1, at=start) + encode_row(gap) + row(2, at=start + 1000))
    assert sealing.seal_all(journals, url) == 1

    def lost(since: float, until: float) -> int:
        moments = [datetime.datetime.fromtimestamp(start + at, datetime.UTC) for at in (since, until)]
        return audit.export(url, tmp_path / "out.csv", since=moments[0], until=moments[1]).lost

    assert audit.export(url, tmp_path / "out.csv").lost == 7
    assert [lost(0, 150), lost(150, 400), lost(0, 100), lost(201, 2000)] == [7, 7, 0, 0]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_an_export_holds_every_row(journals: Path, tmp_path: Path, suffix: str) -> None:
    import pandas as pd

    url = str(tmp_path / "log")
    sealing.seal_all(journals, url)
    out = tmp_path / f"out{suffix}"
    assert audit.export(url, out).rows == 5
    read: Any = {".parquet": pd.read_parquet, ".csv": pd.read_csv, ".jsonl": lambda p: pd.read_json(p, lines=True)}[suffix]
    frame = read(out)
    assert len(frame) == 5
    probabilities = frame["probabilities"].iloc[0]
    assert list(json.loads(probabilities) if isinstance(probabilities, str) else probabilities) == [0.5, 0.5]
    assert [path.name for path in tmp_path.glob(".*")] == []
    with pytest.raises(ConfigError, match=r"\.parquet, \.csv or \.jsonl"):
        audit.export(url, tmp_path / "out.xlsx")


def test_segments_go_to_s3_and_wait_when_it_is_away(tmp_path: Path, journals: Path) -> None:
    from components.contracts.errors import RegistryUnavailable

    with s3_bucket("log") as bucket:
        url = f"{bucket}/predictions"
        there = os.environ["AWS_ENDPOINT_URL"]
        os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
        with pytest.raises(RegistryUnavailable, match="does not answer"):
            sealing.seal_all(journals, url)
        assert len(list(journals.glob("*.journal"))) == 1
        os.environ["AWS_ENDPOINT_URL"] = there
        assert sealing.seal_all(journals, url) == 1
        assert sum(len(table) for table in predictionlog.read_log(url)) == 5
        assert audit.verify(url, journals).rows == 5


def test_a_sealer_never_sees_a_journal_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between making the file and locking it, an eager sealer sealed it empty and removed it from under the writer."""
    desk = Desk(tmp_path / "j")
    real = fcntl.flock

    def flock(file: Any, operation: int) -> None:
        if operation == fcntl.LOCK_EX:
            assert sealing.seal_all(tmp_path / "j", str(tmp_path / "log")) == 0
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert desk.run([row(1)], [row(2)]) == [True, True]
    monkeypatch.undo()
    assert sealing.seal_all(tmp_path / "j", str(tmp_path / "log")) == 1
    assert audit.verify(str(tmp_path / "log"), tmp_path / "j").rows == 2


@pytest.mark.parametrize("tail", [bytes(64), bytes(5), b"\xff" * 40])
def test_what_a_power_loss_leaves_at_the_end_does_not_stop_sealing(journals: Path, tmp_path: Path, tail: bytes) -> None:
    (path,) = journals.glob("*.journal")
    path.write_bytes(path.read_bytes() + tail)
    (journals / "00-empty.journal").write_bytes(bytes(100))
    (journals / "01-other.journal").write_bytes(b"something else entirely")
    assert sealing.seal_all(journals, str(tmp_path / "log")) == 1
    checked = audit.verify(str(tmp_path / "log"), journals)
    assert (checked.rows, checked.lost_rows) == (5, 0)
    assert checked.broken == ("01-other.damaged cannot be read as a journal; look at it, then remove it",)


def test_damage_in_the_middle_costs_its_row_and_is_told(journals: Path, tmp_path: Path) -> None:
    (path,) = journals.glob("*.journal")
    data = bytearray(path.read_bytes())
    data[HEAD_BYTES + len(row(0)) + len(row(1)) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    sealing.seal_all(journals, str(tmp_path / "log"))
    checked = audit.verify(str(tmp_path / "log"), journals)
    assert (checked.rows, checked.lost_rows) == (4, 1)


def served(folder: Path, left: Path, lost: int, full: threading.Event, *, killed: bool) -> int:
    """What a server does whose disk is full, or fills up after one row: so many are lost. What it leaves goes to `left`."""
    desk, kept = Desk(folder), not full.is_set()

    async def scene() -> None:
        desk.journal.start()
        assert await desk.journal.write([row(int.from_bytes(os.urandom(4)))]) is kept
        while kept and not list(folder.glob("*.spare")):
            await asyncio.sleep(0.01)
        full.set()
        for _ in range(lost - (not kept)):
            assert not await desk.journal.write([row(0)])

    asyncio.run(scene())
    if not killed:
        desk.journal.close()
    shutil.copytree(folder, left)  # as it is at this moment, and nobody holds it
    desk.journal.close()
    assert desk.journal.uncounted == 0
    return int(kept)


@pytest.mark.parametrize("killed", [True, False])
def test_no_loss_is_forgotten_and_none_counted_twice_however_servers_end(
    tmp_path: Path, full: threading.Event, killed: bool
) -> None:
    """Three after one another on a disk that stays full: the second takes the spare, the third what the first left."""
    url = str(tmp_path / "log")
    rows = sum(
        served(tmp_path / str(number), tmp_path / str(number + 1), lost, full, killed=killed)
        for number, lost in enumerate((3, 2, 4))
    )
    full.clear()
    for sealed in (False, True, True):
        checked = audit.verify(url, tmp_path / "3")
        assert (checked.lost_rows, checked.rows, checked.broken) == (9, rows if sealed else 0, ())
        assert {loss.reason for loss in checked.losses} == {"No space left on device (ENOSPC)"}
        assert all(loss.since and loss.until >= loss.since for loss in checked.losses)
        assert audit.export(url, tmp_path / "out.csv", journals=tmp_path / "3").lost == 9
        sealing.seal_all(tmp_path / "3", url)


def test_a_count_that_was_cut_short_leaves_the_one_before_it_and_is_told(tmp_path: Path, full: threading.Event) -> None:
    served(tmp_path / "j", tmp_path / "left", 3, full, killed=True)
    full.clear()
    (path,) = (tmp_path / "left").glob("*.journal")
    counted = read_losses(path)
    assert (counted.count, counted.updates, counted.cut_short) == (3, 4, False)
    data = bytearray(path.read_bytes())
    data[counted.place + 20] ^= 1
    path.write_bytes(data)
    for _ in range(2):  # in the journal, and sealed
        checked = audit.verify(str(tmp_path / "log"), tmp_path / "left")
        assert sorted((loss.lost, loss.reason) for loss in checked.losses) == [
            (1, "the count of what was lost is damaged"),
            (2, "No space left on device (ENOSPC)"),
        ]
        sealing.seal_all(tmp_path / "left", str(tmp_path / "log"))


def test_a_journal_that_is_removed_under_its_server_is_a_loss(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "j", sync_s=0.01)
    desk.run([row(1)], [row(2)], close=False)
    # Moved away at once: the journal makes files there in a thread of its own, which a removal one by one would trip over.
    shutil.rmtree((tmp_path / "j").rename(tmp_path / "gone"))
    while desk.figure("journal_lost_rows_total") < 2:
        time.sleep(0.01)
    desk.journal.close()
    (loss,) = audit.verify(str(tmp_path / "log"), tmp_path / "j").losses
    assert (loss.lost, loss.reason) == (2, "the journal was removed")


def test_where_there_is_no_place_for_another_journal_the_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Journal, "_opened", refuse_after_the_first(Journal._opened))
    desk = Desk(tmp_path, rotate_bytes=HEAD_BYTES + 1)
    assert desk.run(*[[row(n)] for n in range(5)]) == [True] * 5
    (path,) = tmp_path.glob("*.journal")
    assert ids(path) == list(range(5))


def refuse_after_the_first(real: Callable[..., Any]) -> Callable[..., Any]:
    calls = []

    def opened(self: Journal, **options: Any) -> Any:
        calls.append(options)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, **options)

    return opened


def test_without_a_place_for_the_count_no_server_starts(tmp_path: Path, full: threading.Event) -> None:
    full.set()
    with pytest.raises(ConfigError, match=r"no place for the journal .*ENOSPC.*make room there"):
        Desk(tmp_path / "j").run()


def test_what_could_not_even_be_counted_is_known_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(descriptor: int, data: Any, place: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    desk = Desk(tmp_path)

    async def scene() -> list[bool]:
        desk.journal.start()
        written = [await desk.journal.write([row(1)])]
        monkeypatch.setattr(os, "pwrite", pwrite)
        return [*written, await desk.journal.write([row(2)])]

    assert asyncio.run(scene()) == [True, False]
    desk.journal.close()
    assert desk.journal.uncounted == 1


def test_times_with_an_offset_mean_the_same_moment(journals: Path, tmp_path: Path) -> None:
    import datetime

    url = str(tmp_path / "log")
    sealing.seal_all(journals, url)
    moment = datetime.datetime.fromtimestamp(1_770_000_002, datetime.UTC)
    for hours in (-11, 0, 9, 14):
        since = moment.astimezone(datetime.timezone(datetime.timedelta(hours=hours)))
        assert sum(len(table) for table in predictionlog.read_log(url, since=since)) == 3
