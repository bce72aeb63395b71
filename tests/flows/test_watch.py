"""Watching through the command line, on a champion that was really trained and a log as a server writes it."""

from __future__ import annotations

import csv
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from failpoints import Died, Failpoints
from looped import MODEL, champion, loop_of, now, predict
from shapes import visionloop

from components import attributes, predictionlog
from components.contracts.errors import ConfigError, RegistryUnavailable
from components.objects import open_objects
from components.predictionlog import read_stretch
from components.store import seal, unseal
from flows.loop import alarms, windows
from flows.loop.alarms import announce
from flows.loop.window_store import WindowStore
from flows.workspace.desk import desk
from monitoring import outbox as outbox_module
from monitoring.evidently_report import Measured
from monitoring.outbox import Outbox
from registry.ledger import Ledger
from serving.log.sealing import seal_all


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried at once: the seconds between are Prefect's."""
    from flows import watch as flow

    for task in (flow.judging, flow.announcing, flow.sweeping):
        monkeypatch.setattr(task, "retry_delay_seconds", [0, 0])


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Prefect server is known to our own code: nothing is started, alarms wait."""

    def without(folder: Path, model: str | None) -> Any:
        import dataclasses

        found = desk(folder, model)
        return dataclasses.replace(found, settings=dataclasses.replace(found.settings, prefect_api_url=""))

    monkeypatch.setattr(windows, "desk", without)


def told(*arguments: str, cwd: Path) -> dict[str, Any]:
    done = visionloop(*arguments, "--json", cwd=cwd)
    assert done.stdout.strip(), done.stderr
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "exit": done.returncode, "stderr": done.stderr}


def watch(root: Path, since: str) -> dict[str, Any]:
    found = told("watch", "--since", since, cwd=root)
    assert len(found["windows"]) == 1, found
    return {**found, "window": found["windows"][0]}


def open_journal(root: Path) -> Path:
    """A journal of a hundred predictions that nobody has sealed yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("looped.seal_all", lambda *_: 0)
        predict(root, 100, name="open")
    (journal,) = (root / ".visionloop" / "serving" / "journal").glob("*.journal")
    return journal


@pytest.mark.usefixtures("alone")
def test_clean_traffic_is_a_pass_and_is_judged_once(root: Path) -> None:
    since, until = now(), (datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5)).isoformat()
    predict(root, 300)
    (whole,) = (root / ".visionloop" / "predictions").rglob("*.parquet")
    shutil.copy(whole, whole.with_name("half.parquet"))  # its manifest was never written: it is not read
    first = told("watch", "--since", since, "--until", until, cwd=root)
    assert (first["exit"], first["windows"][0]["status"], first["alarms"]) == (0, "pass", [])
    assert first["windows"][0]["window"]["rows"] == 300
    # A moment with another offset is the same moment, and the window says UTC: it was not judged anew.
    elsewhere = datetime.datetime.fromisoformat(since).astimezone(datetime.timezone(datetime.timedelta(hours=5.5)))
    moved = told("watch", "--since", elsewhere.isoformat(), "--until", until, cwd=root)
    assert (moved["windows"][0]["window"]["since"], moved["windows"][0]["judged_now"]) == (since, False)
    again = told("watch", "--since", since, "--until", until, cwd=root)
    assert (first["windows"][0]["judged_now"], again["windows"][0]["judged_now"]) == (True, False)
    folder = Path(first["windows"][0]["folder"])
    assert {path.name for path in folder.iterdir()} == {"rows.parquet", "verdict.json"}
    listed = told("windows", cwd=root)["windows"]
    assert [window["status"] for window in listed] == ["pass"]


@pytest.mark.usefixtures("alone")
def test_drift_is_an_alarm_with_its_evidence(root: Path) -> None:
    since, until = now(), (datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5)).isoformat()
    ids = predict(root, 300, shift=4, capture=True)
    found = told("watch", "--since", since, "--until", until, cwd=root)
    (window,) = found["windows"]
    assert (found["exit"], window["status"], window["diagnosis"]) == (1, "drift", "appearance")
    (alarm,) = found["alarms"]
    assert alarm == f"drift:{MODEL}:{window['id']}"
    folder = Path(window["folder"])
    assert "<html" in (folder / "report.html").read_text()[:2000]
    lines = (folder / "to-label.csv").read_text().splitlines()
    assert len(lines) == 21
    assert lines[0].startswith("prediction_id,image_sha256,predicted")
    assert all(line.split(",")[0] in ids for line in lines[1:])
    assert all((root / line.split(",")[5]).is_file() for line in lines[1:])
    again = told("watch", "--since", since, "--until", until, cwd=root)
    assert again["alarms"] == []
    predict(root, 20, shift=4, name="late")
    late = told("watch", "--since", since, "--until", until, cwd=root)
    assert late["windows"][0]["judged_now"]
    assert late["windows"][0]["window"]["rows"] == 320
    assert late["alarms"] == []
    assert [a["alarm"] for a in told("alarms", cwd=root)["alarms"]] == [alarm]
    swept = told("sweep", "-m", MODEL, cwd=root)
    assert swept["started"] == []
    assert any("no Prefect server is known here: visionloop up" in note for note in swept["notes"])


@pytest.mark.usefixtures("alone")
def test_a_camera_that_is_stuck_is_an_alarm_with_a_page(root: Path) -> None:
    since = now()
    predict(root, 120, image_sha256="ab" * 32)
    done = visionloop("watch", "--since", since, cwd=root)
    assert done.returncode == 1
    assert "120 predictions about 1 image only" in done.stdout
    (page,) = [line.split()[-1] for line in done.stdout.splitlines() if line.strip().startswith("page ")]
    assert "<html" in Path(page).read_text()[:2000]


@pytest.mark.usefixtures("alone")
def test_nothing_served_is_no_data(root: Path) -> None:
    window = watch(root, now())["window"]
    assert window["status"] == "no data"
    assert window["reasons"] == ["no prediction of version 1 in this window"]


@pytest.mark.usefixtures("alone")
def test_scheduled_windows_are_those_that_ended(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import watch as flow

    loop = loop_of(root)
    promoted = datetime.datetime.fromisoformat(Ledger(loop.settings.ledger_url).entries(MODEL)[-1].at)
    hour = datetime.timedelta(hours=1)
    end = promoted.replace(minute=0, second=0, microsecond=0)
    spans = windows.stretches(loop, promoted)
    assert [(s.since, s.until) for s in spans] == [(end - 2 * hour, end - hour), (end - hour, end)]
    # Nobody reigned before the promotion, so such windows are not judged. A full hour may have struck since it.
    monkeypatch.setattr(flow, "stretches", lambda *_, **__: spans)
    found = told("watch", cwd=root)
    assert (found["exit"], found["windows"]) == (0, [])


def test_a_model_without_a_champion_says_so(trained: Path, tmp_path: Path) -> None:
    fresh = Path(shutil.copytree(trained, tmp_path / "fresh", symlinks=True))
    done = visionloop("watch", "--minutes", "5", cwd=fresh)
    assert done.returncode == 2
    assert "shapes has no champion: nothing is served that could drift" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["watch", "--minutes", "0"], "is no length of a window"),
        (["watch", "--minutes", "5", "--since", "2026-03-01"], "not both"),
        (["watch", "--since", "noon"], "--since 'noon' is not a moment"),
        (["watch", "--since", "2026-03-02", "--until", "2026-03-01"], "has no length"),
        (["watch", "--since", "9000-01-01"], "which has not come yet"),
        (
            ["predictions", "export", "x.csv", "--since", "2026-03-02T01:00+02:00", "--until", "2026-03-01T23:00Z"],
            "not before",
        ),
        (["watch", "-m", "other"], "unknown model 'other'; valid: shapes"),
        (["governor", "stop", "--as", " ", "--reason", "r"], "names nobody"),
        (["labels", "import", "none.csv"], "is not a file"),
        (["data", "add", "--from-predictions", "shapes"], "both captured and labelled"),
    ],
)
def test_wrong_words_are_refused(champions: Path, arguments: list[str], why: str) -> None:
    done = visionloop(*arguments, cwd=champions)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert why in done.stderr


def test_a_loop_that_is_not_valid_is_refused_by_name(root: Path) -> None:
    path = root / "loops" / f"{MODEL}.yaml"
    for text, why in [
        ("every_minuts: 5", "every_minuts"),
        ("nightly: daily", "no cron line of five fields"),
        ("recipe: nothing", ".yaml: unknown recipe 'nothing'"),
        ("drift: {alpha: 2}", "drift.alpha"),
        ("recipe: digits", "makes model 'digits', not 'shapes'"),
        ("- a", "is not a mapping"),
        ("a: [", "is not valid YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(why)):
            _ = loop_of(root).recipe


def test_what_is_read_or_decided_needs_no_valid_recipe_loop_or_plug_in(root: Path) -> None:
    (root / "loops" / f"{MODEL}.yaml").write_text("every_minuts: 5")
    for file in (root / "recipes").iterdir():
        file.write_bytes(b"model: caf\xe9")
    (root / "plugins" / "gates").mkdir(parents=True)
    (root / "plugins" / "gates" / "broken.py").write_text("raise RuntimeError")
    for arguments in (
        ("windows",),
        ("alarms",),
        ("labels", "list"),
        ("governor", "history"),
        ("governor", "stop", "--as", "Ann", "--reason", "broken"),
        ("report",),
        ("candidates",),
        ("show", "1"),
        ("history",),
        ("runs",),
        ("recipe", "list"),
        ("down",),
    ):
        done = visionloop(*arguments, cwd=root)
        assert done.returncode == 0, (arguments, done.stderr)
    found = visionloop("status", "--json", cwd=root)
    body = json.loads(found.stdout.splitlines()[-1])
    assert body["models"][MODEL]["champion"] == "1"
    assert any("every_minuts" in problem for problem in body["problems"])


def test_loop_files_that_are_not_valid_are_named_and_the_others_go_on(root: Path) -> None:
    loops = root / "loops"
    (loops / "broken.yaml").write_text("a: [")
    (loops / "unknown.yaml").write_text("drift: {detectors: [{detector: nope}]}")
    (loops / "gone.yaml").symlink_to("nowhere")
    for command in ("status", "sweep"):
        done = visionloop(command, "--json", cwd=root)
        body = json.loads(done.stdout.splitlines()[-1])
        assert done.returncode == 1, done.stderr
        for name in ("broken", "unknown", "gone"):
            (problem,) = [told for told in body["problems"] if told.startswith(f"{name}: ")]
            assert str(loops / f"{name}.yaml") in problem
        assert MODEL in body["models"]


def test_of_two_recipes_the_loop_names_one(root: Path) -> None:
    other = root / "recipes" / "other.yaml"
    other.write_text((root / "recipes" / "smoke.yaml").read_text().replace("name: smoke", "name: other"))
    assert loop_of(root).recipe == "smoke"  # its file says so
    path = root / "loops" / f"{MODEL}.yaml"
    path.unlink()
    with pytest.raises(ConfigError, match="recipes other and smoke all make model 'shapes'") as refused:
        _ = loop_of(root).recipe
    line, place = re.findall(r"line `([^`]+)`.* into (\S+)$", str(refused.value))[0]
    Path(place).write_text(line)
    assert loop_of(root).recipe == "other"


@pytest.mark.usefixtures("alone")
def test_a_changed_segment_is_no_pass(root: Path) -> None:
    since = now()
    predict(root, 300)
    log = root / ".visionloop" / "predictions"
    (extra,) = log.rglob("*.parquet")
    predict(root, 50, name="q")
    data = bytearray(extra.read_bytes())
    data[100] ^= 1
    extra.write_bytes(data)
    window = watch(root, since)["window"]
    assert window["status"] == "inconclusive"
    assert any("was changed after it was sealed" in reason for reason in window["reasons"])


@pytest.mark.usefixtures("alone")
def test_a_segment_of_a_newer_schema_is_told(root: Path) -> None:
    since = now()
    predict(root, 300)
    objects = open_objects(str(root / ".visionloop" / "predictions"))
    (name,) = [n for n in objects.stamps() if n.endswith(".json")]
    body = unseal(objects.read(name, most=1 << 20) or b"")
    assert body is not None
    objects.swap(name, lambda _: seal({**body, "schema_version": 9}))
    window = watch(root, since)["window"]
    assert window["status"] == "no data"
    assert any("schema version 9, this visionloop reads up to 1" in reason for reason in window["reasons"])


@pytest.mark.usefixtures("alone")
def test_rows_that_are_still_in_a_journal_are_seen(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server seals every few minutes; a watch does not wait for that."""
    since = now()
    predict(root, 300)
    log, journal = root / ".visionloop" / "predictions", root / ".visionloop" / "serving" / "journal"
    shutil.rmtree(log)
    monkeypatch.setattr("looped.seal_all", lambda *_: 0)
    predict(root, 120, name="open")
    assert len(list(journal.glob("*.journal"))) == 1
    assert watch(root, since)["window"]["window"]["rows"] == 120


@pytest.mark.usefixtures("alone")
def test_a_reference_that_is_gone_is_no_pass_and_hides_no_other_window(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    since = now()
    predict(root, 300)
    swept: list[Any] = []

    def sweep(*_: Any, **__: Any) -> list[Any]:
        swept.append(1)
        return []

    monkeypatch.setattr("flows.watch.sweep", sweep)
    for path in (root / ".visionloop" / "releases").rglob("reference.parquet"):
        path.write_bytes(b"x")
    done = visionloop("watch", "--since", since, cwd=root)
    assert done.returncode == 2
    assert "reference.parquet" in done.stderr
    assert "could not be judged" in done.stderr
    assert told("windows", cwd=root)["windows"] == []
    assert swept == [1]  # what waits is started all the same


@pytest.mark.parametrize("where", ["flows.watch.sweep", "flows.watch.open_loop"])
def test_people_are_told_when_the_loop_s_database_is_away(root: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told_of: list[Any] = []

    def away(*_: Any, **__: Any) -> Any:
        raise RegistryUnavailable("the loop's database does not answer")

    monkeypatch.setattr(where, away)
    monkeypatch.setattr("flows.watch.notify", lambda *facts, **_: told_of.append(facts))
    from flows.watch import watch as flow

    call: Any = flow
    with pytest.raises(RegistryUnavailable):
        call(MODEL, str(root))
    ((_, event, model, facts),) = told_of
    assert (event, model) == ("unwatched", MODEL)
    assert "the loop's database does not answer" in facts["reason"]


@pytest.mark.usefixtures("alone")
def test_a_journal_that_nobody_can_read_is_no_pass_before_and_after_it_is_set_aside(root: Path) -> None:
    since = now()
    predict(root, 300)
    journal = open_journal(root)
    journal.write_bytes(b"\0" * 8 + journal.read_bytes()[8:])
    for _ in range(2):
        window = watch(root, since)["window"]
        assert window["status"] == "inconclusive"
        assert any("cannot be read as a journal" in reason for reason in window["reasons"])
        seal_all(journal.parent, str(root / ".visionloop" / "predictions"))
    assert not journal.exists()
    # It says nothing about another time.
    hour = datetime.timedelta(hours=1)
    ended = datetime.datetime.fromisoformat(since) - hour
    log, folder = str(root / ".visionloop" / "predictions"), journal.parent
    assert read_stretch(log, folder, model=MODEL, since=ended - hour, until=ended).problems == ()
    assert read_stretch(log, folder, model=MODEL, since=ended + 2 * hour, until=ended + 3 * hour).problems == ()


@pytest.mark.usefixtures("alone")
def test_a_damaged_journal_is_no_pass(root: Path) -> None:
    """Damage in the middle: the rows around it are read, and nobody can say how many were lost."""
    since = now()
    predict(root, 300)
    journal = open_journal(root)
    data = bytearray(journal.read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    journal.write_bytes(data)
    for _ in range(2):  # in the journal, and sealed
        window = watch(root, since)["window"]
        assert window["status"] == "inconclusive"
        assert any("damaged at byte" in reason for reason in window["reasons"])
        seal_all(journal.parent, str(root / ".visionloop" / "predictions"))


@pytest.mark.usefixtures("alone")
def test_a_clock_that_runs_ahead_is_told(root: Path) -> None:
    since = now()
    predict(root, 300)
    predict(root, 50, name="ahead", at=datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1))
    window = watch(root, since)["window"]
    assert window["status"] == "inconclusive"
    assert any("the clock of a server is wrong" in reason for reason in window["reasons"])


@pytest.mark.usefixtures("alone")
def test_only_the_days_of_a_window_are_looked_through(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A year of segments must not be listed for every quarter of an hour."""
    since = now()
    for days in (3, 30, 300):
        predict(root, 5, name=f"old{days}", at=datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days))
    predict(root, 300)

    read: list[str] = []
    real = predictionlog._segment

    def counted(objects: Any, name: str) -> Any:
        read.append(name)
        return real(objects, name)

    monkeypatch.setattr("components.predictionlog._segment", counted)
    assert watch(root, since)["window"]["window"]["rows"] == 300
    assert len(read) == 1


@pytest.mark.usefixtures("alone")
def test_old_windows_are_forgotten(root: Path) -> None:
    since = now()
    predict(root, 200, shift=4)
    watch(root, since)
    loop = loop_of(root)
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=100)
    assert windows.prune(loop, datetime.datetime.now(datetime.UTC)) == 0
    snapshots = list((root / ".visionloop" / "monitoring" / "evidently").rglob("snapshots/*.json"))
    assert len(snapshots) == 1
    assert windows.prune(loop, later) == 1
    assert windows.windows(loop) == []
    assert not snapshots[0].exists()
    assert len(loop.outbox.alarms(MODEL)) == 1  # what was decided stays


PLACES = [
    (WindowStore, "write"),
    (Measured, "save_page"),
    (Measured, "keep"),
    (Outbox, "raise_alarm"),
]


def test_a_watch_that_dies_anywhere_alarms_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after each step in turn, which is before the next one, and run again: one alarm, one verdict."""
    span = windows.Span(*(datetime.datetime.fromisoformat(now()) + datetime.timedelta(minutes=m) for m in (-1, 5)))
    predict(root, 200, shift=4, capture=True)
    loop = loop_of(root)
    died = []
    for nth in range(1, 12):
        with monkeypatch.context() as patch:
            points = Failpoints(PLACES, nth=nth, when="after")
            points(patch)
            try:
                # Another policy each time, so that the window is judged again.
                loop.config = loop.config.model_copy(
                    update={"drift": loop.config.drift.model_copy(update={"most_images": 1000 + nth})}
                )
                windows.judge_window(loop, span, datetime.datetime.now(datetime.UTC))
            except Died:
                died.append(points.hit)
        judged = windows.judge_window(loop, span, datetime.datetime.now(datetime.UTC))
        assert judged is not None
        assert judged.verdict.status == "drift"
        assert windows.recorded(loop, judged.window) == judged.verdict
        assert len(loop.outbox.alarms(MODEL)) == 1
        if not points.hit:
            break
    assert set(died) == {name for _, name in PLACES}


TELLING = [(alarms, "emit"), (Outbox, "emitted"), (alarms, "notify")]
_KILLED = """
import os, signal, sys
import pytest
from failpoints import Failpoints
from test_watch import PLACES, TELLING

def kill(name):
    print(name, file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

Failpoints([*PLACES, *TELLING], nth=int(sys.argv.pop(1)), when="after", fail=kill)(pytest.MonkeyPatch())
from flows.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_a_watch_killed_after_any_step_alarms_once(champions: Path, tmp_path: Path) -> None:
    """kill -9 of the command's own process after each thing that it does, and the command again: one alarm, one verdict."""
    since, until = now(), (datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)).isoformat()
    predicted = Path(shutil.copytree(champions, tmp_path / "predicted", symlinks=True))
    predict(predicted, 200, shift=4, capture=True)
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    died: list[str] = []
    while True:
        root = Path(shutil.copytree(predicted, tmp_path / f"{len(died)}", symlinks=True))
        arguments = ["watch", "--since", since, "--until", until, "--json"]
        command = [sys.executable, "-c", _KILLED, str(len(died) + 1), *arguments]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode == 1:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        died.append(done.stderr.strip().splitlines()[-1])
        found = told(*arguments, cwd=root)
        (window,) = found["windows"]
        assert (found["exit"], window["status"]) == (1, "drift")
        assert {path.name for path in Path(window["folder"]).iterdir()} == {
            "report.html",
            "rows.parquet",
            "to-label.csv",
            "verdict.json",
        }
        alarm = f"drift:{MODEL}:{window['id']}"
        assert [a["alarm"] for a in told("alarms", cwd=root)["alarms"]] == [alarm]
        # However far the first one had come in telling, the sweep has it until a training asked the governor.
        assert alarms.pending(loop_of(root)) == [alarm]
        shutil.rmtree(root)
    assert set(died) == {name for _, name in [*PLACES, *TELLING]}
    assert died.index("raise_alarm") < died.index("write") < died.index("emit") < died.index("notify")


@pytest.mark.parametrize(("nth", "when"), [(1, "before"), (1, "after"), (2, "after"), (3, "after")])
def test_a_watch_that_dies_while_it_tells_leaves_the_alarm_to_the_sweep(
    root: Path, when: Any, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    span = windows.Span(*(datetime.datetime.fromisoformat(now()) + datetime.timedelta(minutes=m) for m in (-1, 5)))
    predict(root, 120, shift=4)
    loop = loop_of(root)
    judged = windows.judge_window(loop, span, datetime.datetime.now(datetime.UTC))
    assert judged is not None
    assert judged.alarm is not None
    monkeypatch.setattr(alarms, "emit", lambda *_: True)
    with monkeypatch.context() as patch:
        points = Failpoints(TELLING, nth=nth, when=when)
        points(patch)
        with pytest.raises(Died):
            announce(loop, judged.alarm, say=lambda _: None)
    assert points.hit == ["emit", "emitted", "notify"][nth - 1]
    assert alarms.pending(loop) == [judged.alarm.id]
    again = windows.judge_window(loop, span, datetime.datetime.now(datetime.UTC))
    assert again is not None
    assert (again.fresh, again.alarm) == (False, None)
    assert len(loop.outbox.alarms(MODEL)) == 1


def test_what_is_refused_or_drifts_is_told_to_people(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    received: list[str] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["content-length"])))["message"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return None

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("VISIONLOOP_NOTIFY", f"json://127.0.0.1:{server.server_port}/")
    from flows.train import train

    since = now()
    predict(root, 200, shift=4)
    found = told("watch", "--since", since, cwd=root)
    call: Any = train
    skipped = call("smoke", str(root), cause="drift", request=found["alarms"][0], quiet=True)
    server.shutdown()
    assert skipped["rule"] == "no new data"
    assert received[0].startswith("shapes version 1 sees drift, by")
    assert received[1].startswith("shapes: a retraining was refused by the governor (no new data)")
    assert "to-label.csv]" in received[1]


@pytest.fixture
def labelled(root: Path) -> tuple[Path, str]:
    """A workspace with an alarm and the list of images to label."""
    since = now()
    predict(root, 200, shift=4, capture=True)
    found = watch(root, since)
    return root, found["window"]["folder"]


def fill(listed: Path, filled: Path, label: str) -> list[str]:
    """Write the list with a label in every row; returns the images."""
    with listed.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with filled.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows([row | {"label": label, "labelled_by": "bob"} for row in rows])
    return [row["image_sha256"] for row in rows]


@pytest.mark.usefixtures("alone")
def test_labels_come_back_and_become_data(labelled: tuple[Path, str]) -> None:
    root, folder = labelled
    ledger = (root / "data.test-ledger.csv").read_text().splitlines()
    listed = Path(folder) / "to-label.csv"
    filled, shas = root.parent / "filled.csv", fill(listed, root.parent / "filled.csv", "disc")
    unknown = root.parent / "unknown.csv"
    unknown.write_text("prediction_id,label\nnobody,disc\n")
    refused = visionloop("labels", "import", str(unknown), "--as", "bob", cwd=root)
    assert refused.returncode == 2
    assert "the log knows neither prediction nor image of 1 row (nobody)" in refused.stderr
    wrong = root.parent / "wrong.csv"
    wrong.write_text(filled.read_text().replace(",disc,", ",moon,"))
    refused = visionloop("labels", "import", str(wrong), cwd=root)
    assert "the model has no class 'moon'" in refused.stderr
    assert told("labels", "list", cwd=root)["images"] == 0
    done = told("labels", "import", str(filled), cwd=root)
    assert (done["new"], done["labelled_images"]) == (20, 20)
    assert told("labels", "import", str(filled), cwd=root)["known"] == 20
    (window,) = told("windows", cwd=root)["windows"]
    assert window["realised_accuracy"]["n"] == 20
    before = told("data", "status", cwd=root)["data_version"]
    first_sent = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=3)
    predict(root, 200, shift=4, name="sent before", at=first_sent)
    stale = root / ".visionloop" / "tmp" / "labelled-0123"  # of a command that was killed long ago
    stale.mkdir(parents=True)
    os.utime(stale, (0, 0))
    added = told("data", "add", "--from-predictions", MODEL, cwd=root)
    assert (added["copied"], stale.exists()) == (20, False)
    assert added["data_version"] != before
    after = (root / "data.test-ledger.csv").read_text().splitlines()
    assert set(ledger) <= set(after)  # nobody who was test, or was not, changed sides
    assert len(after) == len(ledger) + 20
    known = attributes.read(root)
    assert {(known[sha].source, known[sha].label_source) for sha in shas} == {(f"production of {MODEL}", "person")}
    assert {datetime.datetime.fromisoformat(known[sha].captured_at) for sha in shas} == {first_sent}
    assert (added["with_attributes"], added["changed_attributes"]) == (20, [])
    assert added["new_test_images"] == sum(line.endswith(",test") for line in set(after) - set(ledger)) > 0
    told_before = attributes.Attributes(captured_at="2026-03-01T13:00:00Z", source="camera 3", label_source="person")
    attributes.write(root, {**known, shas[2]: told_before})  # as a source told it
    assert told("data", "add", "--from-predictions", MODEL, cwd=root)["copied"] == 0
    assert attributes.read(root) == {**known, shas[2]: told_before}
    # Labelled anew: the image moves to its class of today, and stays on its side of the test ledger.
    moved = root.parent / "moved.csv"
    moved.write_text(f"image_sha256,label\n{shas[1]},cross\n")
    told("labels", "import", str(moved), "--as", "bob", cwd=root)
    again = told("data", "add", "--from-predictions", MODEL, cwd=root)
    assert "1 image moved to the class that they are said to show now" in again["notes"]
    assert [path.parent.name for path in (root / "data").glob(f"*/{shas[1][:24]}.*")] == ["cross"]
    assert (root / "data.test-ledger.csv").read_text().splitlines() == after
    erased = told("predictions", "erase", shas[0], "--as", "ann", "--reason", "asked for", cwd=root)
    assert erased["found"]
    (copy,) = erased["training_copies"]
    assert hashlib.sha256((root / copy).read_bytes()).hexdigest() == shas[0]
    assert told("predictions", "verify", cwd=root)["erasures"] == {"count": 1, "head": erased["hash"]}
    again = told("data", "add", "--from-predictions", MODEL, cwd=root)
    assert any("1 labelled image not captured" in note for note in again["notes"])


@pytest.mark.usefixtures("alone")
def test_the_page_of_the_loop_shows_it_all(labelled: tuple[Path, str]) -> None:
    root, _ = labelled
    path = Path(told("report", cwd=root)["report"])
    html = path.read_text()
    for part in ("Time line", "taken for", "approved by", "Evidently's page", "images to label", "embeddings"):
        assert part in html, part
    assert not re.search(r"\b1 (versions|windows|images|predictions)\b|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[ <]", html)
    links = [part.split('"')[0] for part in html.split('href="')[1:]]
    assert links
    missing = [link for link in links if ":" not in link and link[0] != "#" and not (path.parent / link).exists()]
    assert missing == []


def test_the_page_of_the_loop_opens_in_a_real_browser(labelled: tuple[Path, str], tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium on this machine to open the page in")
    path = Path(told("report", cwd=labelled[0])["report"])
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-sync",
    ]
    options = [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", path.as_uri()]
    done = subprocess.run([chromium, *flags, *options], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "What the champion saw" in done.stdout
    assert done.stdout.count("<svg") >= 6


def test_the_database_of_the_loop_away_is_said_and_nothing_is_judged(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONLOOP_LOOP_URL", "postgresql+psycopg2://nobody@127.0.0.1:9/none")
    since = now()
    predict(root, 200, shift=4)
    done = visionloop("watch", "--since", since, cwd=root)
    assert done.returncode == 2
    assert "the database of the loop at postgresql+psycopg2://nobody@127.0.0.1:9/none does not answer" in done.stderr
    monkeypatch.delenv("VISIONLOOP_LOOP_URL")
    found = told("watch", "--since", since, cwd=root)
    assert len(found["alarms"]) == 1  # the window without a verdict was judged again, with its alarm


def test_the_log_s_store_away_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONLOOP_PREDICTIONS", "s3://bucket/prefix")
    for name, value in {
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    done = visionloop("watch", "--minutes", "5", cwd=root)
    assert done.returncode == 2
    assert "does not answer" in done.stderr
    assert told("windows", cwd=root)["windows"] == []


def test_the_newest_window_speaks_for_all_that_saw_the_same(root: Path) -> None:
    loop = loop_of(root)
    _, digest = champion(root)
    for name in ("w1", "w2"):
        verdict = _drift(digest)
        loop.outbox.raise_alarm(verdict, name)
    assert alarms.pending(loop) == [outbox_module.alarm_id(MODEL, "w2")]


def _drift(digest: str) -> Any:
    from monitoring.verdicts import DriftVerdict, Shift, WindowFacts

    at = now()
    facts = WindowFacts(
        model=MODEL, version="1", release=digest, since=at, until=at, rows=9, judged=9, distinct_images=9, content="c"
    )
    shift = Shift(detector="embeddings", status="drift", message="m", statistic="s")
    return DriftVerdict(window=facts, status="drift", reasons=("r",), shifts=(shift,), alpha=0.01, policy="p", reference="f")
