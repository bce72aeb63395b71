"""The demo's story: the loop closes once, through what a user has, on digits that are in no data version.

Of the 1,000 digits outside the data set one half is traffic (A) and the other half is asked before and after (B); labels
come for images of A alone. The demo plays the world, the second person and the person who labels: it changes how pictures
look, approves, and fills in labels that it knows. It never starts the
retraining; the alarm's event does, or the sweep when the demo was stopped in the middle of it.

Each phase is remembered when it is done, so a demo that was stopped goes on with the one it was in.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import hashlib
import http.client
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from components import plugins
from components.contracts import VisionloopError, counted
from components.store import write_atomically
from components.tasks.classification import wilson
from flows.alarming import sweep
from flows.deciding import desk
from flows.demo import MODEL, commit
from flows.evidence import estimate_json
from flows.looping import Loop
from flows.run import Workspace
from flows.settings import environment_with, read_settings
from flows.standing import Up
from registry import approval

APPROVER, LABELLER = "demo-approver", "demo-labeller"
_CLEAN, _SHIFTED, _BLACK = 400, 500, 300
_RETRAIN_S = 900.0
Told = Callable[[str], None]


@dataclass(frozen=True)
class Picture:
    """One digit of the world: what it is, and its encoded bytes."""

    name: str
    label: str
    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass
class Story:
    """What the demo has done so far."""

    path: Path
    told: Told
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, workspace: Workspace, told: Told) -> Story:
        path = workspace.state / "demo.json"
        phases = json.loads(path.read_text()) if path.is_file() else {}
        return cls(path, told, phases)

    def phase(self, name: str, title: str, act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a phase unless it was done; returns what it found."""
        if name in self.phases:
            self.told(f"[{name}] done before ({self.phases[name]['phase_s']:.0f} s)")
            return self.phases[name]
        self.told(f"[{name}] {title}")
        since, at = time.monotonic(), datetime.datetime.now(datetime.UTC)
        found = act()
        self.phases[name] = found | {"phase_s": round(time.monotonic() - since, 1), "began": at.isoformat()}
        write_atomically(self.path, json.dumps(self.phases).encode())
        return self.phases[name]


class Show:
    """The phases, in order."""

    def __init__(self, workspace: Workspace, train: Callable[[], dict[str, Any]], told: Told, *, port: int | None) -> None:
        self.workspace, self._train, self._told, self._port = workspace, train, told, port
        self.story = Story.open(workspace, told)
        self._world: tuple[list[Picture], list[Picture]] | None = None

    @property
    def loop(self) -> Loop:
        return Loop(self.workspace, read_settings(self.workspace.state), MODEL)

    @property
    def world(self) -> tuple[list[Picture], list[Picture]]:
        """A and B."""
        if self._world is None:
            self._world = _halves(self.workspace)
        return self._world

    def run(self) -> dict[str, Any]:
        """All of it; returns the phases by name. Raises VisionloopError where the story does not go as it has to."""
        phase = self.story.phase
        up = Up(self.workspace, read_settings(self.workspace.state))
        with up.locked():
            if "up" in self.story.phases:
                self._keep_up(up)  # whatever was done before, from here on it has to run
            phase(
                "up",
                "a Prefect server with a credential, deployments, schedules, automations, a worker",
                lambda: self._keep_up(up),
            )
        first = phase("train", "training, gates and registration, as a person would start them", self._first)
        if first["outcome"] != "candidate":
            return self.story.phases
        phase("live", "a second person approves, the release goes live", lambda: self._go_live(first["version"]))
        if "camera" not in self.story.phases:
            with _server(self.workspace, self._told) as port:
                phase("clean", f"{_CLEAN} pictures that are in no data version", lambda: self._clean(port))
                phase("shifted", "the world moves: noise, blur, brightness", lambda: self._shift(port))
                phase("labels", "a person labels, the data get a new version, the loop retrains", self._label)
                phase("switch", "a second person approves, the champion changes under load", lambda: self._switch(port))
                phase("camera", "the camera breaks: black frames", lambda: self._camera(port))
        return self.story.phases

    def finish(self, pages: dict[str, str]) -> dict[str, Any]:
        """Draw the page of the loop, and gather what a person wants to know at the end."""
        from flows.loop_report import write_loop_report

        phases = self.story.phases
        path = self.workspace.root / "report.html"
        write_loop_report(self.loop, path, story=phases, pages=pages)
        done = _command(self.workspace, "predictions", "verify", accepted=(0, 1))
        chain = _command(self.workspace, "ledger", "verify")
        found = {
            "report": str(path),
            "pages": pages,
            "predictions": done["rows"],
            "predictions_lost": done["lost_rows"],
            "ledger_rows": chain["rows"],
            "phases_s": {name: facts["phase_s"] for name, facts in phases.items()},
        }
        if "switch" in phases:
            found |= {
                "labels_spent": phases["labels"]["labels"],
                "shifted_before": phases["shifted"]["before"]["accuracy"],
                "shifted_after": phases["switch"]["after"]["accuracy"],
                "alarm_to_running_s": phases["labels"]["alarm_to_running_s"],
                "failed_during_switch": phases["switch"]["failed"],
            }
        return found

    def text(self, answer: dict[str, Any]) -> str:
        """The end of the story for a terminal."""
        from flows.answering import figure
        from flows.summary import told

        phases = self.story.phases
        lines = [told(phases["train"])]
        if "switch" in phases:
            clean, shifted, labels = phases["clean"], phases["shifted"], phases["labels"]
            lines += [
                "",
                f"LOOP CLOSED  version {phases['live']['version']} -> version {phases['switch']['version']}",
                f"clean        {clean['verdict']['status']}; accuracy {figure(clean['answers']['accuracy'])}",
                f"shifted      {shifted['verdict']['status']} ({shifted['verdict']['diagnosis']})",
                f"retraining   {counted(labels['labels'], 'label')}; event to running training "
                f"{answer['alarm_to_running_s']} s",
                f"accuracy     {figure(answer['shifted_before'])} before",
                f"             {figure(answer['shifted_after'])} after, on shifted pictures that nobody labelled",
                f"switch       {phases['switch']['requests']} requests during it, {answer['failed_during_switch']} failed",
                f"camera       {phases['camera']['verdict']['diagnosis']}; {phases['camera']['reason']}",
                f"records      {counted(answer['predictions'], 'prediction')} ({answer['predictions_lost']} lost), "
                f"{answer['ledger_rows']} ledger rows, both verified",
            ]
        spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in answer["phases_s"].items())
        lines += ["", f"phases  {spent}; together {sum(answer['phases_s'].values()):.0f} s", f"report  {answer['report']}"]
        if answer["pages"]:
            shown = ", ".join(f"{name} {address}" for name, address in answer["pages"].items())
            lines += [
                f"pages   {shown}",
                f"        Prefect and MLflow ask for the user and password in {self.workspace.state / 'up' / 'auth'}",
                f"stop    visionloop down -w {self.workspace.root}",
            ]
        return "\n".join(lines)

    def _keep_up(self, up: Up) -> dict[str, Any]:
        from flows.keeping import keep_up

        return keep_up(up, [MODEL], port=self._port, told=lambda line: self._told(f"  {line}"))

    def _first(self) -> dict[str, Any]:
        return self._train()

    def _go_live(self, version: str) -> dict[str, Any]:
        from flows.promote import promote

        found = desk(self.workspace.root, MODEL)
        state = approval.state_of(found.ledger.entries(MODEL), version, found.ledger.now())
        if state.status in ("waiting", "expired"):
            by = approval.person(APPROVER)
            rule = approval.approve(version, by, "demo: the gates passed and the report was read")
            entry = found.ledger.decide(model=MODEL, actor=by, rule=rule)
            self._told(f"  approved by {by.name}, who is not {state.requested.actor.name} (ledger row {entry.seq})")
        promote(version, MODEL, str(self.workspace.root), quiet=True)
        self._told(f"  version {version} is champion: release published, ledger, routes and MLflow's alias read back")
        return {"version": version, "approved_by": APPROVER}

    def _clean(self, port: int) -> dict[str, Any]:
        traffic, asked = self.world
        since = _now()
        answers = _ask(port, [*traffic[: _CLEAN // 2], *asked[: _CLEAN // 2]])
        verdict = self._watch(since)
        self._told(f"  accuracy {_figure(answers)}; watch says {verdict['status']}: {verdict['reasons'][0]}")
        _expect(verdict["status"] == "pass", f"clean traffic is {verdict['status']}, expected pass", verdict)
        return {"answers": answers, "verdict": verdict}

    def _shift(self, port: int) -> dict[str, Any]:
        from flows.tracing import trail

        traffic, asked = self.world
        since = _now()
        answers = _ask(port, [moved(picture) for picture in traffic[:_SHIFTED]])
        self._told(f"  accuracy on shifted pictures {_figure(answers)}")
        verdict = self._watch(since)
        for reason in verdict["reasons"]:
            self._told(f"  watch: {reason}")
        _expect(verdict["status"] == "drift", f"shifted traffic is {verdict['status']}, expected drift", verdict)
        # After the window: what is measured with must not be proposed for labelling.
        before = _ask(port, [moved(picture) for picture in asked])
        self._told(f"  other shifted pictures, before retraining: accuracy {_figure(before)}")
        alarm = self.loop.outbox.alarms(MODEL)[-1]
        self._await_decision(alarm.id, 1)
        made = trail(self.loop, alarm.id, wait_s=20)
        told = self.loop.governor.history(MODEL)[-1]
        self._told(f"  alarm {alarm.id}: the event woke {made[0]['automation']!r}, flow run {made[0]['name']}")
        self._told(f"  governor: {told['decision']} ({told['rule']}): {told['reason']}")
        _expect(told["rule"] == "no new data", f"the governor said {told['rule']}, expected no new data", told)
        return {"answers": answers, "verdict": verdict, "before": before, "alarm": alarm.id, "trail": made}

    def _label(self) -> dict[str, Any]:
        from flows.tracing import trail

        story = self.story.phases["shifted"]
        traffic, asked = self.world
        known = {moved(picture).sha256: picture.label for picture in traffic[:_SHIFTED]}
        path = Path(story["verdict"]["folder"]) / "to-label.csv"
        filled = self.workspace.state / "tmp" / "labelled.csv"
        filled.parent.mkdir(exist_ok=True)
        images = _fill(path, filled, known)
        other = {moved(picture).sha256 for picture in asked} | {picture.sha256 for picture in asked}
        _expect(not images & other, "an image that is measured with was labelled", sorted(images & other))
        done = _command(self.workspace, "labels", "import", str(filled), "--as", LABELLER, "-m", MODEL)
        self._told(f"  {counted(done['new'], 'label')} imported from to-label.csv by {LABELLER}")
        added = _command(self.workspace, "data", "add", "--from-predictions", MODEL)
        self._told(
            f"  data version {added['data_version'][:12]}: {counted(added['copied'], 'image')} more, "
            f"{added['new_test_images']} of them join the frozen test split"
        )
        with contextlib.suppress(VisionloopError):  # committed before, when this phase is taken up again
            commit(self.workspace, "Labelled images of production")
        self._told("  the new data raised the alarm again; its event starts the training deployment")
        run = self._await_training(story["alarm"])
        made = trail(self.loop, story["alarm"], wait_s=20)
        mine = next(found for found in made if found["flow_run"] == run["flow_run"])
        self._told(
            f"  Prefect's records: {mine['event']} -> {mine['automation']!r} -> flow run {mine['name']}, {mine['state']}"
        )
        granted = next(r for r in self.loop.governor.runs(MODEL) if r.key == story["alarm"])
        _expect(granted.outcome == "candidate", f"the retraining ended as {granted.outcome}", granted.body)
        counts = {"labels": done["labelled_images"], "added": added["copied"], "joined_test": added["new_test_images"]}
        return {
            **counts,
            "version": granted.body["version"],
            "run": granted.body["run"],
            "data_version": added["data_version"],
            "trail": made,
            "alarm_to_running_s": _seconds_between(mine["event_at"], mine["started"]),
            "labelled": sorted(images),
        }

    def _switch(self, port: int) -> dict[str, Any]:
        version = self.story.phases["labels"]["version"]
        traffic, asked = self.world
        seen: list[tuple[int, str]] = []
        stop = threading.Event()

        def keep_asking() -> None:
            index = 0
            while not stop.is_set():
                status, told = _post(port, traffic[index % len(traffic)].data)
                seen.append((status, str(told.get("model_version"))))
                index += 1
                time.sleep(0.005)

        asking = threading.Thread(target=keep_asking)
        asking.start()
        try:
            self._go_live(version)
            deadline = time.monotonic() + 60
            while not seen or seen[-1][1] != version:
                _expect(time.monotonic() < deadline, f"the server did not switch to version {version}", seen[-1:])
                time.sleep(0.05)
            time.sleep(0.5)
        finally:
            stop.set()
            asking.join()
        failed = [status for status, _ in seen if status != 200]
        self._told(f"  {len(seen)} requests during the change, {len(failed)} failed; version {version} answers")
        _expect(not failed, f"{len(failed)} requests failed while the champion changed", failed[:5])
        after = _ask(port, [moved(picture) for picture in asked])
        clean = _ask(port, asked)
        before = self.story.phases["shifted"]["before"]
        self._told(
            f"  other shifted pictures: accuracy {_figure(before)} before, {_figure(after)} after; "
            f"clean ones {_figure(clean)}"
        )
        return {"requests": len(seen), "failed": len(failed), "after": after, "clean_after": clean, "version": version}

    def _camera(self, port: int) -> dict[str, Any]:
        since = _now()
        _ask(port, [_black(number) for number in range(_BLACK)])
        verdict = self._watch(since)
        for reason in verdict["reasons"]:
            self._told(f"  watch: {reason}")
        _expect(verdict["status"] == "drift", f"black frames are {verdict['status']}, expected drift", verdict)
        alarm = self.loop.outbox.alarms(MODEL)[-1]
        told = self._await_decision(alarm.id, 1)[-1]
        self._told(f"  governor: {told['decision']} ({told['rule']}): {told['reason']}")
        _expect(told["rule"] == "broken input", f"the governor said {told['rule']}, expected broken input", told)
        runs = [run for run in self.loop.governor.runs(MODEL) if run.cause == "drift"]
        _expect(len(runs) == 1, f"{len(runs)} retrainings were started, expected one", [run.key for run in runs])
        return {"verdict": verdict, "alarm": alarm.id, "rule": told["rule"], "reason": told["reason"]}

    def _watch(self, since: str) -> dict[str, Any]:
        """`visionloop watch` on what was answered since a moment; its verdict."""
        found = _command(self.workspace, "watch", "-m", MODEL, "--since", since, accepted=(0, 1))
        (window,) = found["windows"]
        window["drifted"] = window["detectors"]
        return dict(window)

    def _await_decision(self, key: str, count: int) -> list[dict[str, Any]]:
        """The governor's answers to a key, once there are `count`."""
        deadline = time.monotonic() + 120
        while True:
            found = [row for row in self.loop.governor.history(MODEL) if row["key"] == key]
            if len(found) >= count:
                return found
            _expect(
                time.monotonic() < deadline, f"nothing asked the governor about {key} within 120 s", _tail(self._worker_log)
            )
            time.sleep(0.3)

    @property
    def _worker_log(self) -> Path:
        return self.workspace.state / "up" / "worker.log"

    def _await_training(self, key: str) -> dict[str, Any]:
        """The granted training run of a key, once it has ended; says which stage it is in."""
        from flows.run import STAGES
        from flows.tracing import training_runs

        deadline = time.monotonic() + _RETRAIN_S
        shown: set[str] = set()
        while True:
            granted = [run for run in self.loop.governor.runs(MODEL) if run.key == key]
            if granted:
                shown = self._show_stages(shown, STAGES)
            runs = training_runs(self.loop, request=key)
            if granted and granted[0].state == "finished":
                for run in runs:
                    if run["state"] == "Completed":
                        return run
            dead = [run for run in runs if run["state"] in ("Failed", "Crashed")]
            if dead and all(run["final"] for run in runs):
                # Stopped with its worker, when the demo was: taken up again as every watch would do it.
                over = len(dead) > 2 or (bool(granted) and granted[0].state == "finished")
                _expect(not over, "the training run failed", [dead[:1], _tail(self._worker_log)])
                sweep(self.loop, told=self._told)
            _expect(
                time.monotonic() < deadline, f"the retraining did not end within {_RETRAIN_S:g} s", _tail(self._worker_log)
            )
            time.sleep(1.0)

    def _show_stages(self, shown: set[str], stages: Sequence[str]) -> set[str]:
        folders = sorted(self.workspace.runs.iterdir(), key=lambda path: path.stat().st_mtime)
        done = {path.name for path in folders[-1].iterdir() if path.name[:1].isdigit()}
        for name in sorted(done - shown):
            stage = name.partition("-")[2]
            if stage in stages and not name.endswith(".failed"):
                self._told(f"  [{name[0]}/{len(stages)}] {stage}: done")
        return shown | done


def _expect(met: bool, problem: str, facts: Any) -> None:
    if not met:
        raise VisionloopError(f"the demo stops: {problem}. {json.dumps(facts, default=str)[:600]}")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat()


def _seconds_between(earlier: str | None, later: str | None) -> float | None:
    if earlier is None or later is None:
        return None
    moments = [datetime.datetime.fromisoformat(text) for text in (earlier, later)]
    return round((moments[1] - moments[0]).total_seconds(), 1)


def _halves(workspace: Workspace) -> tuple[list[Picture], list[Picture]]:
    """The world's pictures, every other one; the classes take turns."""
    folder = workspace.cache / "world"
    if not folder.exists():
        plugins.load("sources", "digits").fetch_world(out=folder)
    found = []
    for path in sorted(folder.rglob("*.bmp"), key=lambda p: p.name):
        data = io.BytesIO()
        Image.open(path).save(data, "PNG")
        found.append(Picture(path.stem, path.parent.name, data.getvalue()))
    traffic, asked = found[::2], found[1::2]
    assert not {p.name for p in traffic} & {p.name for p in asked}
    return traffic, asked


def moved(picture: Picture) -> Picture:
    """The picture as another camera would show it: noisier, blurred or darker, decided by its name."""
    kind = int(hashlib.sha256(picture.name.encode()).hexdigest()[:8], 16)
    image = Image.open(io.BytesIO(picture.data)).convert("L")
    pixels: npt.NDArray[np.floating[Any]] = np.asarray(image, dtype=np.float32)
    rng = np.random.default_rng(kind)
    if kind % 3 == 0:
        pixels = pixels + rng.normal(0, 42, pixels.shape)
    elif kind % 3 == 1:
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1.3)), dtype=np.float32)
    else:
        pixels = pixels * 0.3
    data = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(data, "PNG")
    return Picture(picture.name, picture.label, data.getvalue())


def _black(number: int) -> Picture:
    """A frame of a camera that sees nothing: sensor noise of a grey level or two."""
    noise = np.random.default_rng(number).integers(0, 3, (28, 28)).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, "PNG")
    return Picture(f"black-{number}", "", data.getvalue())


def _fill(path: Path, filled: Path, known: dict[str, str]) -> set[str]:
    """Fill in the labels of the images that the labeller knows; returns the images."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    labelled = set()
    for row in rows:
        row["label"] = known.get(row["image_sha256"], "")
        row["labelled_by"] = LABELLER if row["label"] else ""
        labelled |= {row["image_sha256"]} if row["label"] else set()
    with filled.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return labelled


def _command(workspace: Workspace, *arguments: str, accepted: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """A command of the product in a process of its own; its JSON answer."""
    done = subprocess.run(
        [sys.executable, "-m", "flows", *arguments, "--json"],
        cwd=workspace.root,
        env=environment_with({}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in accepted:
        raise VisionloopError(f"visionloop {' '.join(arguments)} failed:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@contextmanager
def _server(workspace: Workspace, told: Told) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = workspace.state / "serving.log"
    options = ["--port", str(port), "--grpc-port", "-1", "--capture-share", "1", "--seal-s", "5"]
    started = time.monotonic()
    with log.open("a") as stream:
        command = [sys.executable, "-m", "flows", "serve", "-m", MODEL, *options]
        process = subprocess.Popen(command, cwd=workspace.root, stdout=stream, stderr=stream)
    try:
        while not _ready(port):
            if process.poll() is not None or time.monotonic() - started > 60:
                raise VisionloopError(f"the server did not become ready; its log is {log}:\n{_tail(log)}")
            time.sleep(0.05)
        told(f"  the server answers after {time.monotonic() - started:.1f} s, without torch")
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    told(f"  SIGTERM: the server drained, exit status {status}")


def _tail(path: Path) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-15:])
    except OSError:
        return ""


def _ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _post(port: int, data: bytes) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/predict", data, {"content-type": "image/png"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def _ask(port: int, pictures: Sequence[Picture]) -> dict[str, Any]:
    """Ask for every picture, one after the other; accuracy with its interval, and what a request took."""
    right = unsure = sure_and_right = 0
    elapsed = []
    for picture in pictures:
        start = time.perf_counter()
        status, told = _post(port, picture.data)
        elapsed.append((time.perf_counter() - start) * 1e3)
        if status != 200:
            raise VisionloopError(f"the server answered {status}: {told.get('error')}")
        right += told["predicted"] == picture.label
        unsure += told["unsure"]
        sure_and_right += not told["unsure"] and told["label"] == picture.label
    sure = len(pictures) - unsure
    ordered = sorted(elapsed)
    return {
        "requests": len(pictures),
        "accuracy": estimate_json(wilson(right, len(pictures))),
        "unsure": unsure,
        "accuracy_when_sure": estimate_json(wilson(sure_and_right, sure)) if sure else None,
        "latency_p50_ms": ordered[len(ordered) // 2],
        "latency_p99_ms": ordered[int(len(ordered) * 0.99)],
    }


def _figure(answers: dict[str, Any]) -> str:
    from flows.answering import figure

    return figure(answers["accuracy"])
