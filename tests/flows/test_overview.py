"""One look at a model in production: what is counted of its traffic, and what is open."""

from __future__ import annotations

import datetime
import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
from looped import MODEL, champion, loop_of, predict
from served import unpacked

from components import predictionlog
from components.contracts.errors import RegistryUnavailable
from components.objects import open_objects
from components.predictionlog import read_stretch
from components.store import seal, unseal
from flows.loop import traffic as traffic_module
from flows.loop.governing import answered_alarms, switch
from flows.loop.labelling import give_labels, to_label
from flows.loop.loop import Loop
from flows.loop.overview import overview
from flows.loop.traffic import Traffic, traffic_of
from flows.loop.windows import Span, judge_window
from flows.workspace.renaming import rename_class
from monitoring.governor import Request

HOUR = datetime.timedelta(hours=1)
NOW = datetime.datetime.now(datetime.UTC).replace(minute=30, second=0, microsecond=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(tmp_path_factory.mktemp("older"))


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "workspace", symlinks=True))


@pytest.fixture
def loop(root: Path) -> Loop:
    return loop_of(root)


def ago(hours: float) -> datetime.datetime:
    return NOW - hours * HOUR


def log_of(loop: Loop) -> Path:
    return Path(loop.settings.predictions_url)


def without_counts(loop: Loop) -> int:
    """Let the manifests of the log be those of an older server; returns how many have counts now."""
    objects, changed = open_objects(loop.settings.predictions_url), 0
    for name in objects.stamps():
        if name.endswith(".json"):
            body = unseal(objects.read(name, most=1 << 20) or b"")
            assert body is not None
            changed += "counts" in body
            older = seal({key: value for key, value in body.items() if key != "counts"})
            objects.swap(name, functools.partial(_replaced, by=older))
    return changed


def _replaced(_: bytes | None, *, by: bytes) -> bytes:
    return by


def counted(found: Traffic) -> dict[str, int]:
    return {f"{hour:%H}": number for hour, number in found.by_hour if number}


def test_the_traffic_of_a_day_is_what_the_log_holds(root: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[float, int, dict[str, Any]]] = [
        (30, 7, {}),
        (20, 40, {"predicted": "disc"}),
        (3, 30, {"predicted": "cross", "unsure": True}),
        (3, 5, {"model": "another"}),
        (0, 20, {"predicted": "stripes"}),
    ]
    for hours, count, changes in served:
        predict(root, count, name=f"{hours} {count}", at=ago(hours), **changes)
    with monkeypatch.context() as patch:
        patch.setattr("looped.seal_all", lambda *_: 0)
        predict(root, 10, name="open", at=NOW, predicted="disc")
    found = traffic_of(loop, NOW)
    assert (found.since, found.until, found.is_whole) == (ago(24.5), NOW, True)
    assert (found.num_predictions, found.num_unsure, found.share_unsure) == (100, 30, 0.3)
    assert found.by_class == (("disc", 50), ("cross", 30), ("stripes", 20))
    assert counted(found) == {f"{ago(20):%H}": 40, f"{ago(3):%H}": 30, f"{NOW:%H}": 30}
    log = read_stretch(
        loop.settings.predictions_url,
        loop.workspace.state / "serving" / "journal",
        model=MODEL,
        since=found.since,
        until=NOW + HOUR,
    )
    assert sum(map(len, log.tables)) == found.num_predictions
    # A class is told by its name of today, and those beyond the first ten together.
    for number in range(12):
        predict(root, 1, name=f"rare {number}", at=NOW, predicted=f"rare {number:02d}")
    rename_class(loop.workspace, "disc", "circle")
    found = traffic_of(loop, NOW)
    assert found.by_class[0] == ("circle", 50)
    assert (len(found.by_class), found.num_other_classes, found.num_predictions) == (10, 5, 112)


def test_a_segment_is_looked_at_once_and_one_that_is_sealed_meanwhile_counts_once(
    root: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = predictionlog.open_segment

    def counting(objects: Any, name: str) -> Any:
        opened.append(name)
        return real(objects, name)

    monkeypatch.setattr(traffic_module, "open_segment", counting)
    predict(root, 30, at=ago(2))
    with monkeypatch.context() as patch:
        patch.setattr("looped.seal_all", lambda *_: 0)
        predict(root, 10, name="sealed twice", at=NOW)
    journals = loop.workspace.state / "serving" / "journal"
    copies = {path: path.read_bytes() for path in journals.glob("*.journal")}
    assert traffic_of(loop, NOW).num_predictions == 40
    predict(root, 5, name="q", at=NOW)  # seals the others too
    for path, data in copies.items():
        path.write_bytes(data)  # as a reader finds it between the segment and the removal of the journal
    before = len(opened)
    assert traffic_of(loop, NOW).num_predictions == 45
    assert len(opened) - before == 1
    assert traffic_of(loop, NOW).num_predictions == 45
    assert len(opened) - before == 1


def test_segments_without_counts_are_read_as_far_as_that_is_cheap(
    root: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hours in (20, 10, 2):
        predict(root, 10 * hours, name=f"{hours}", at=ago(hours))
    assert without_counts(loop) >= 3
    sizes = [path.stat().st_size for path in log_of(loop).rglob("*.parquet")]
    monkeypatch.setattr(traffic_module, "_MOST_BYTES", max(sizes))
    seen = []
    for _ in range(4):
        found = traffic_of(loop, NOW)
        seen.append((found.num_predictions, found.is_whole))
        assert len(found.by_hour) == (NOW - found.since) // HOUR + 1
    # Each look reaches farther back, and says from when on it counts.
    assert 20 <= seen[0][0] < 320
    assert not seen[0][1]
    assert seen == sorted(seen)
    assert seen[-1] == (320, True)


def test_what_cannot_be_read_is_said_and_hides_nothing_else(root: Path, loop: Loop) -> None:
    predict(root, 30, at=ago(2))
    predict(root, 20, name="damaged", at=NOW)
    (manifest,) = [path for path in log_of(loop).rglob("*.json") if b'"rows":20' in path.read_bytes().replace(b" ", b"")]
    manifest.write_bytes(manifest.read_bytes().replace(b'"rows"', b'"Rows"'))
    (loop.workspace.state / "serving" / "journal" / "x.journal").write_bytes(b"no journal at all")
    found = traffic_of(loop, NOW)
    assert found.num_predictions == 30
    assert sorted(problem.split(" ")[1] for problem in found.problems) == ["cannot", "of"]
    assert any("was changed after it was sealed" in problem for problem in found.problems)


def span(begin: float, end: float) -> Span:
    return Span(ago(begin), ago(end))


def test_one_look_shows_what_is_open_and_what_waits(root: Path, loop: Loop) -> None:
    _, digest = champion(root)
    first = overview(loop, NOW)
    assert first.champion is not None
    assert (first.champion.version, first.champion.release) == ("1", digest)
    assert (first.champion.since, first.champion.by) < (NOW, "Z")
    assert [window.name for window in first.windows] == loop.window_store.names()[::-1]
    assert [told.alarm.window for told in first.open_alarms] == [loop.window_store.names()[0]]
    assert first.open_alarms[0].alarm.diagnosis == first.windows[-1].verdict.diagnosis != "none"
    assert (first.stopped, first.runs, first.problems) == (None, (), ())
    assert first.asked.num_pictures == 50
    # A window of the same release that passed since speaks against the alarm, one that says nothing does not.
    loop.config = loop.config.model_copy(update={"look_back": 2})
    assert judge_window(loop, span(3, 2), NOW) is not None
    assert [window.status for window in overview(loop, NOW).windows][-1] == "no data"
    assert len(overview(loop, NOW).open_alarms) == 1
    predict(root, 300, at=ago(1.5))
    judged = judge_window(loop, span(2, 1), NOW)
    assert judged is not None
    assert judged.verdict.status == "pass"
    assert overview(loop, NOW).open_alarms == ()
    # It drifts again.
    predict(root, 300, shift=4, name="q", at=ago(0.5), capture=True)
    judged = judge_window(loop, span(1, 0), NOW)
    assert judged is not None
    assert judged.alarm is not None
    give_labels(loop, [(to_label(loop, limit=1)[0].image_sha256, "disc")], by="Ann")
    request = Request(judged.alarm.id, MODEL, "drift", "1", None, seen_by="1", champion="1")
    loop.governor.ask(request, holder="h")
    switch(loop, "stop", by="Ann", reason="enough")
    found = overview(loop, NOW)
    (told,) = found.open_alarms
    assert (told.alarm, [answer.row["decision"] for answer in told.answers]) == (judged.alarm, ["granted"])
    assert [run.key for run in found.runs] == [judged.alarm.id]
    assert found.decisions[-1].words == "granted: no rule forbids it"
    assert found.stopped is not None
    assert found.stopped.startswith("Ann since")
    assert found.windows[-1].accuracy is not None
    assert (found.windows[-1].accuracy["n"], found.labels.images) == (1, 1)
    assert found.traffic.num_predictions == 600
    # What the loop's file gets wrong hides nothing but what rests on it.
    (root / "loops" / f"{MODEL}.yaml").write_text("every_minuts: 5")
    broken = overview(loop_of(root), NOW)
    assert (broken.waiting, broken.open_alarms) == ((), found.open_alarms)
    assert "every_minuts" in broken.problems[0]


def test_what_is_long_is_cut_to_the_latest(loop: Loop) -> None:
    alarm = loop.outbox.alarms(MODEL)[0]
    for number in range(40):
        loop.governor.ask(Request(f"{alarm.id}{number}", MODEL, "drift", "1", "1", seen_by="0", champion="1"), holder="h")
    found = overview(loop, NOW)
    assert [answer.row["key"] for answer in found.decisions] == [f"{alarm.id}{number}" for number in range(10, 40)]
    later, _ = loop.outbox.raise_alarm(found.windows[-1].verdict, "2026-11-28T0000Z-0123456789")
    assert loop.outbox.alarms(MODEL, last=1) == [later]
    assert loop.outbox.alarms(MODEL, last=2) == loop.outbox.alarms(MODEL) == [alarm, later]
    assert [(told.alarm, told.answers) for told in answered_alarms(loop)] == [(alarm, ()), (later, ())]


def test_a_log_that_is_away_is_said(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("VISIONLOOP_PREDICTIONS", "s3://away/log")
    with pytest.raises(RegistryUnavailable, match="s3://away/log does not answer"):
        overview(loop_of(loop.workspace.root), NOW)
