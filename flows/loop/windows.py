"""What `flows/watch.py` does with one window: read it, judge it, leave its evidence, and make an alarm durable.

    <VISIONLOOP_WINDOWS, by default .visionloop/monitoring>/<model>/windows/<window>/
        rows.parquet     what was judged: ids, digests, answers
        to-label.csv     the images whose labels would teach most, of a window that drifted
        report.html      Evidently's page, of a window that drifted
        verdict.json     written last, and the alarm's row first: a window without a verdict is judged again

A window is judged once for the rows it has. Rows that come late, or a policy that changed, judge it again; its alarm stays
one.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import io
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import plugins
from components.contracts.errors import ConfigError, MonitoringError, StoreError, in_short
from components.contracts.families import Task
from components.contracts.records import Stored
from components.contracts.releases import Release
from components.contracts.wording import utc_of
from components.releases import ReleaseStore
from components.store import MANIFEST, seal, unseal
from flows.loop.captures import kept_of, place_of
from flows.loop.loop import Loop
from flows.workspace.desk import desk
from flows.workspace.renaming import names_of_today
from flows.workspace.workspace import Workspace
from monitoring.outbox import Alarm, window_id
from monitoring.verdicts import DriftVerdict, Sample

if TYPE_CHECKING:
    import pandas as pd

    from monitoring.evidently_report import Measured
    from monitoring.labels import Label
    from monitoring.window import Window
    from registry.ledger import Entry

VERDICT, ROWS, PAGE, TO_LABEL = "verdict.json", "rows.parquet", "report.html", "to-label.csv"


@dataclass(frozen=True)
class Span:
    """When a window begins and ends, UTC."""

    since: datetime.datetime
    until: datetime.datetime


@dataclass(frozen=True)
class JudgedWindow:
    """One window and what came of it."""

    window: str
    verdict: DriftVerdict
    place: str
    """The folder or address of its evidence."""
    fresh: bool
    """JudgedWindow now; False when it had been judged with these rows before."""
    alarm: Alarm | None
    """The alarm, when this judgement made it."""
    problem: str = ""
    """What could not be kept beside the verdict."""
    files: tuple[str, ...] = ()
    """What a person may look at of it: Evidently's page, the list of images to label."""


def open_loop(folder: Path, model: str | None) -> Loop:
    """The loop of a model of the ledger; raises ConfigError or UnknownName."""
    found = desk(folder, model)
    return Loop(found.workspace, found.settings, found.model)


def stretches(
    loop: Loop,
    now: datetime.datetime,
    *,
    minutes: float | None = None,
    since: str | None = None,
    until: str | None = None,
) -> list[Span]:
    """The windows to look at: the scheduled ones that ended, oldest first, or the one that is asked for.

    Raises ConfigError for a window that has no length.
    """
    if since is not None or until is not None:
        end = _utc(until) if until else now
        begin = _utc(since) if since else end - datetime.timedelta(minutes=loop.config.every_minutes)
        if begin >= end:
            raise ConfigError(
                f"the window from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC has no length; name an earlier --since"
            )
        return [Span(begin, end)]
    if minutes is not None:
        if not 0 < minutes <= 366 * 24 * 60:
            raise ConfigError(f"--minutes {minutes:g} is no length of a window; expected more than 0, at most a year")
        return [Span(now - datetime.timedelta(minutes=minutes), now)]
    length = loop.config.every_minutes * 60
    last = int(now.timestamp()) // length * length
    moments = [last - length * number for number in range(loop.config.look_back, -1, -1)]
    at = [datetime.datetime.fromtimestamp(moment, datetime.UTC) for moment in moments]
    return [Span(since, until) for since, until in itertools.pairwise(at)]


def _utc(text: str) -> datetime.datetime:
    try:
        return utc_of(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is {error}") from None


def champion_at(loop: Loop, moment: datetime.datetime) -> Entry | None:
    """The ledger's row that was in force at a moment."""
    from registry import approval

    return approval.served_at(loop.ledger.entries(loop.model), moment)


def release_of(loop: Loop, entry: Entry) -> Stored[Release]:
    """The verified release that a ledger row made champion."""
    return ReleaseStore(loop.settings.releases_url).fetch(loop.model, entry.body["release"], cache=_releases(loop))


def _releases(loop: Loop) -> Path:
    """Where verified copies of releases lie."""
    return loop.workspace.state / "monitoring" / loop.model / "releases"


def release_record(loop: Loop, digest: str) -> Release:
    """The record of a release, without the files that it is about: what tells its classes and its task.

    Raises StoreError or RegistryUnavailable.
    """
    return _record(loop.settings.releases_url, loop.model, digest, _releases(loop))


@functools.lru_cache(maxsize=64)
def _record(url: str, model: str, digest: str, cache: Path) -> Release:
    """From the copy that is here already, else from the store; named by its digest, it is right for good once it is read."""
    with contextlib.suppress(OSError, StoreError, KeyError, TypeError):
        body = unseal((cache / digest / MANIFEST).read_bytes())
        copied = Release.read(body["record"]) if body is not None else None
        if copied is not None and (copied.digest(), copied.model) == (digest, model):
            return copied
    found = ReleaseStore(url).manifest(model, digest)
    if found is None:
        raise StoreError(f"release {digest} of {model} was not published to {url}")
    return found


def task_of(release: Release) -> Task:
    """What reads the answers of a release."""
    task: Task = plugins.load("tasks", release.task, dict(release.task_settings))
    return task


def read_window(loop: Loop, stretch: Span, entry: Entry, release: Stored[Release], now: datetime.datetime) -> Window:
    """The rows of the champion's release in this stretch of the log."""
    from components.predictionlog import read_stretch
    from monitoring.window import open_window

    log = read_stretch(
        loop.settings.predictions_url,
        loop.workspace.state / "serving" / "journal",
        model=loop.model,
        since=stretch.since,
        until=stretch.until,
        now=now,
    )
    return open_window(
        log,
        release.record,
        task_of(release.record),
        entry.body["release"],
        entry.body["version"],
        since=stretch.since,
        until=stretch.until,
        most=loop.config.drift.most_images,
    )


def recorded(loop: Loop, window: str) -> DriftVerdict | None:
    """The verdict that a window has; None before its first, or when its file was changed by hand."""
    try:
        data = loop.window_store.read(window, VERDICT)
    except StoreError:
        return None
    return _read_verdict(data)


def _read_verdict(data: bytes | None) -> DriftVerdict | None:
    try:
        return _verdict(data) if data is not None else None
    except StoreError:
        return None


@functools.lru_cache(maxsize=1024)
def _verdict(data: bytes) -> DriftVerdict | None:
    body = unseal(data)
    return DriftVerdict.read(body) if body is not None else None


def rows_of(loop: Loop, window: str, *columns: str) -> pd.DataFrame | None:
    """Some columns of the rows that a window was judged by; None where they are not kept. Raises StoreError."""
    return _frame(window, loop.window_store.read(window, ROWS), columns)


def _frame(window: str, data: bytes | None, columns: Sequence[str]) -> pd.DataFrame | None:
    from components.tables import read_frame

    try:
        return read_frame(data, columns) if data is not None else None
    except Exception as error:
        # pyarrow raises what it likes for bytes that are no Parquet, and pandas for columns that are not there.
        raise StoreError(f"{ROWS} of window {window} was changed and cannot be read ({in_short(error)})") from error


def judge_window(loop: Loop, stretch: Span, now: datetime.datetime) -> JudgedWindow | None:
    """Judge a stretch of the log; None when there was no champion then."""
    entry = champion_at(loop, stretch.until)
    if entry is None:
        return None
    release = release_of(loop, entry)
    window = read_window(loop, stretch, entry, release, now)
    name = window_id(loop.model, window.facts.since, window.facts.until, window.facts.release)
    known = recorded(loop, name)
    policy = loop.config.drift.digest()
    if known is not None and (known.window, known.policy) == (window.facts, policy):
        files = _files_of(loop, name) if known.status == "drift" else ()
        return JudgedWindow(name, known, loop.window_store.place(name), False, None, files=files)
    return _judge(loop, window, release, name)


def _judge(loop: Loop, window: Window, release: Stored[Release], name: str) -> JudgedWindow:
    from monitoring.drift import judge
    from monitoring.reference import load_reference

    reference = load_reference(release, task_of(release.record))
    verdict, measured = judge(reference, window, loop.config.drift, reference_sha256=release.record.reference.sha256)
    alarm, drifted, store = None, verdict.status == "drift", loop.window_store
    if drifted:
        # Before anything that can fail: an alarm is a row first.
        alarm, new = loop.outbox.raise_alarm(verdict, name)
        alarm = alarm if new else None
    store.write(name, ROWS, _rows(window))
    if drifted:
        store.write(name, TO_LABEL, _list_to_label(loop, reference, window))
    problem = _keep_report(loop, (reference, window), measured, verdict, name)
    store.write(name, VERDICT, seal(verdict.to_json()))
    files = _files_of(loop, name) if drifted else ()
    return JudgedWindow(name, verdict, store.place(name), True, alarm, problem, files)


def _files_of(loop: Loop, name: str) -> tuple[str, ...]:
    return tuple(file for file in (PAGE, TO_LABEL) if loop.window_store.has(name, file))


def _keep_report(
    loop: Loop, compared: tuple[Sample, Window], measured: Measured | None, verdict: DriftVerdict, name: str
) -> str:
    """Evidently's page and history: for people, never needed for the verdict; returns what went wrong."""
    from monitoring.drift import draw_report

    try:
        if measured is None and verdict.status == "drift":
            measured = draw_report(*compared)
        if measured is None:
            return ""
        if verdict.status == "drift":
            with tempfile.TemporaryDirectory(prefix="visionloop-window-") as scratch:
                measured.save_page(Path(scratch) / PAGE)
                loop.window_store.write(name, PAGE, (Path(scratch) / PAGE).read_bytes())
        measured.keep(evidently_workspace(loop.workspace), loop.model, name, [verdict.status, verdict.diagnosis])
    except Exception as error:
        # Evidently's drawing and its storage raise what they like.
        return f"Evidently's page or history was not written ({type(error).__name__}: {str(error)[:120]})"
    return ""


def evidently_workspace(workspace: Workspace) -> Path:
    """Evidently's own folder: `evidently ui --workspace` shows its history."""
    return workspace.state / "monitoring" / "evidently"


def _rows(window: Window) -> bytes:
    data = io.BytesIO()
    window.frame.to_parquet(data, index=False)
    return data.getvalue()


def _list_to_label(loop: Loop, reference: Any, window: Window) -> bytes:
    from monitoring.label_selection import most_useful

    known = loop.labels.latest(loop.model).keys()
    chosen = most_useful(
        reference,
        window,
        available=kept_of(loop, set(window.frame["image_sha256"]) - known),
        known=known,
        count=loop.config.to_label,
    )
    table = chosen[["prediction_id", "image_sha256", "predicted", "confidence", "novelty"]].assign(
        image=[place_of(loop, sha) for sha in chosen["image_sha256"]], label="", labelled_by=""
    )
    data: bytes = table.to_csv(index=False).encode()
    return data


def _batches(names: Sequence[str], size: int = 32) -> Iterator[Sequence[str]]:
    return (names[start : start + size] for start in range(0, len(names), size))


def windows(loop: Loop, last: int = 200) -> list[tuple[str, DriftVerdict]]:
    """The latest judged windows with their verdicts, oldest first."""
    # Windows that were asked for overlap others, so the last one to end is not the last one to begin.
    judged: list[tuple[str, DriftVerdict]] = []
    for names in _batches(loop.window_store.names(2 * last)):
        read = zip(names, loop.window_store.read_all(names, VERDICT), strict=True)
        judged += [(name, verdict) for name, data in read if (verdict := _read_verdict(data)) is not None]
        if len(judged) >= 2 * last:
            break
    return sorted(judged, key=lambda pair: (pair[1].window.until, pair[1].window.since, pair[0]))[-last:]


def past_windows(loop: Loop, last: int) -> list[dict[str, Any]]:
    """The latest judged windows as JSON data, oldest first: id, verdict, and the accuracy that labels showed since."""
    from monitoring.drift import as_json

    judged = windows(loop, last)
    accuracies = realised_accuracies(loop, judged)
    return [{"id": name, **as_json(verdict), "realised_accuracy": accuracies[name]} for name, verdict in judged]


def prune(loop: Loop, now: datetime.datetime) -> int:
    """Remove windows older than the loop keeps them, with their reports; returns how many."""
    from monitoring.evidently_report import forget

    oldest = f"{now - datetime.timedelta(days=loop.config.keep_days):%Y-%m-%dT%H%M}Z"
    old = [name for name in loop.window_store.names() if name < oldest]
    for name in old:
        forget(evidently_workspace(loop.workspace), loop.model, name)
        loop.window_store.remove(name)
    return len(old)


def realised_accuracy(loop: Loop, name: str) -> dict[str, float | int] | None:
    """Share of a window's labelled images that were answered right, with its interval; None while none is labelled.

    Right is an answer that the task takes for the same as the label.
    Which images were labelled is not chance (uncertain ones come first), so it leans downwards; n is told with it.
    """
    verdict = recorded(loop, name)
    return realised_accuracies(loop, [(name, verdict)])[name] if verdict is not None else None


def realised_accuracies(loop: Loop, judged: Sequence[tuple[str, DriftVerdict]]) -> dict[str, dict[str, float | int] | None]:
    """The same of several windows, by name; None also for one whose rows cannot be read."""
    said = loop.labels.latest(loop.model)
    # A class that got another name is answered by its old one until the next model.
    name_of = names_of_today(loop.workspace)
    found: dict[str, dict[str, float | int] | None] = dict.fromkeys(name for name, _ in judged)
    if not said:
        return found
    read = loop.window_store.read_all([name for name, _ in judged], ROWS)
    for (name, verdict), data in zip(judged, read, strict=True):
        with contextlib.suppress(StoreError):
            rows = _frame(name, data, ["image_sha256", "predicted"])
            found[name] = _share_right(loop, rows, verdict, said, name_of) if rows is not None else None
    return found


def _share_right(
    loop: Loop, rows: pd.DataFrame, verdict: DriftVerdict, said: Mapping[str, Label], name_of: Callable[[str], str]
) -> dict[str, float | int] | None:
    from components.intervals import wilson
    from flows.training.results import estimate_json

    labelled = rows.drop_duplicates("image_sha256")
    labelled = labelled[labelled["image_sha256"].isin(said)]
    if labelled.empty:
        return None
    task = task_of(release_record(loop, verdict.window.release))
    labels = [name_of(said[sha].label) for sha in labelled["image_sha256"]]
    predicted = [name_of(answer) for answer in labelled["predicted"]]
    classes = task.classes([*labels, *predicted])
    same = task.targets(labels, classes) == task.targets(predicted, classes)
    right = same.reshape(len(labels), -1).all(axis=1)
    return estimate_json(wilson(int(right.sum()), len(right)))


def expect_champion(loop: Loop, judged: list[JudgedWindow]) -> None:
    """Raise MonitoringError when no window could be looked at because nothing was ever promoted."""
    if not judged and champion_at(loop, datetime.datetime.now(datetime.UTC)) is None:
        raise MonitoringError(f"{loop.model} has no champion: nothing is served that could drift (visionloop candidates)")
