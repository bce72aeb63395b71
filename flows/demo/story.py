"""The demo's story: the loop closes once, through what a user has, on digits that are in no data version.

Of the 1,000 digits outside the data set one half is traffic (A) and the other half is asked before and after (B); labels
come for images of A alone. The demo plays the world, the second person and the person who labels: it changes how pictures
look, approves, and fills in labels that it knows. It never starts the
retraining; the alarm's event does, or the sweep when the demo was stopped in the middle of it.

Each phase is remembered when it is done, so a demo that was stopped goes on with the one it was in.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.contracts.errors import VisionloopError
from components.contracts.wording import counted
from components.store import write_atomically
from flows.demo.client import ask, command_line, post, start_server, tail
from flows.demo.workspace import MODEL, commit
from flows.demo.world import Picture, black, fill, halves, moved
from flows.loop.alarms import sweep
from flows.loop.loop import Loop
from flows.terminal import Say, figure
from flows.up.processes import Up
from flows.workspace.desk import desk
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace
from registry import approval

APPROVER, LABELLER = "demo-approver", "demo-labeller"
_CLEAN, _SHIFTED, _BLACK = 400, 500, 300
_RETRAIN_S = 900.0


@dataclass
class Story:
    """What the demo has done so far."""

    path: Path
    told: Say
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, workspace: Workspace, say: Say) -> Story:
        path = workspace.state / "demo.json"
        phases = json.loads(path.read_text()) if path.is_file() else {}
        return cls(path, say, phases)

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

    def __init__(self, workspace: Workspace, train: Callable[[], dict[str, Any]], say: Say, *, port: int | None) -> None:
        self.workspace, self._train, self._told, self._port = workspace, train, say, port
        self.story = Story.open(workspace, say)
        self._world: tuple[list[Picture], list[Picture]] | None = None

    @property
    def loop(self) -> Loop:
        return Loop(self.workspace, read_settings(self.workspace.state), MODEL)

    @property
    def world(self) -> tuple[list[Picture], list[Picture]]:
        """A and B."""
        if self._world is None:
            self._world = halves(self.workspace)
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
            with start_server(self.workspace, self._told) as port:
                phase("clean", f"{_CLEAN} pictures that are in no data version", lambda: self._clean(port))
                phase("shifted", "the world moves: noise, blur, brightness", lambda: self._shift(port))
                phase("labels", "a person labels, the data get a new version, the loop retrains", self._label)
                phase("switch", "a second person approves, the champion changes under load", lambda: self._switch(port))
                phase("camera", "the camera breaks: black frames", lambda: self._camera(port))
        return self.story.phases

    def finish(self, pages: dict[str, str]) -> dict[str, Any]:
        """Draw the page of the loop, and gather what a person wants to know at the end."""
        from flows.loop.report import write_loop_report

        phases = self.story.phases
        path = self.workspace.root / "report.html"
        write_loop_report(self.loop, path, story=phases, pages=pages)
        done = command_line(self.workspace, "predictions", "verify", accepted=(0, 1))
        chain = command_line(self.workspace, "ledger", "verify")
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
        from flows.training.summary import told

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
            shown = ", ".join(f"{name} {there}" for name, there in answer["pages"].items() if name != "Console")
            lines += [
                f"console {answer['pages']['Console']}: both versions with their evidence, who decided what, and the loop",
                f"pages   {shown}",
                f"        Prefect and MLflow ask for the user and password in {self.workspace.state / 'up' / 'auth'}",
                f"stop    visionloop down -w {self.workspace.root}",
            ]
        return "\n".join(lines)

    def _keep_up(self, up: Up) -> dict[str, Any]:
        from flows.up.stack import keep_up

        return keep_up(up, [MODEL], port=self._port, say=lambda line: self._told(f"  {line}"))

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
        answers = ask(port, [*traffic[: _CLEAN // 2], *asked[: _CLEAN // 2]])
        verdict = self._watch(since)
        self._told(f"  accuracy {figure(answers['accuracy'])}; watch says {verdict['status']}: {verdict['reasons'][0]}")
        _expect(verdict["status"] == "pass", f"clean traffic is {verdict['status']}, expected pass", verdict)
        return {"answers": answers, "verdict": verdict}

    def _shift(self, port: int) -> dict[str, Any]:
        from flows.loop.flow_runs import trail

        traffic, asked = self.world
        since = _now()
        answers = ask(port, [moved(picture) for picture in traffic[:_SHIFTED]])
        self._told(f"  accuracy on shifted pictures {figure(answers['accuracy'])}")
        verdict = self._watch(since)
        for reason in verdict["reasons"]:
            self._told(f"  watch: {reason}")
        _expect(verdict["status"] == "drift", f"shifted traffic is {verdict['status']}, expected drift", verdict)
        # After the window: what is measured with must not be proposed for labelling.
        before = ask(port, [moved(picture) for picture in asked])
        self._told(f"  other shifted pictures, before retraining: accuracy {figure(before['accuracy'])}")
        alarm = self.loop.outbox.alarms(MODEL)[-1]
        self._await_decision(alarm.id, 1)
        made = trail(self.loop, alarm.id, wait_s=20)
        told = self.loop.governor.history(MODEL)[-1]
        self._told(f"  alarm {alarm.id}: the event woke {made[0]['automation']!r}, flow run {made[0]['name']}")
        self._told(f"  governor: {told['decision']} ({told['rule']}): {told['reason']}")
        _expect(told["rule"] == "no new data", f"the governor said {told['rule']}, expected no new data", told)
        return {"answers": answers, "verdict": verdict, "before": before, "alarm": alarm.id, "trail": made}

    def _label(self) -> dict[str, Any]:
        from flows.loop.flow_runs import trail
        from flows.loop.windows import TO_LABEL

        story = self.story.phases["shifted"]
        traffic, asked = self.world
        known = {moved(picture).sha256: picture.label for picture in traffic[:_SHIFTED]}
        asked_for = self.loop.window_store.read(story["verdict"]["id"], TO_LABEL) or b""
        filled = self.workspace.state / "tmp" / "labelled.csv"
        filled.parent.mkdir(exist_ok=True)
        images = fill(asked_for.decode(), filled, known, LABELLER)
        other = {moved(picture).sha256 for picture in asked} | {picture.sha256 for picture in asked}
        _expect(not images & other, "an image that is measured with was labelled", sorted(images & other))
        done = command_line(self.workspace, "labels", "import", str(filled), "--as", LABELLER, "-m", MODEL)
        self._told(f"  {counted(done['new'], 'label')} imported from to-label.csv by {LABELLER}")
        added = command_line(self.workspace, "data", "add", "--from-predictions", MODEL)
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
                status, told = post(port, traffic[index % len(traffic)].data)
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
        after = ask(port, [moved(picture) for picture in asked])
        clean = ask(port, asked)
        before = self.story.phases["shifted"]["before"]
        self._told(
            f"  other shifted pictures: accuracy {figure(before['accuracy'])} before, {figure(after['accuracy'])} after; "
            f"clean ones {figure(clean['accuracy'])}"
        )
        return {"requests": len(seen), "failed": len(failed), "after": after, "clean_after": clean, "version": version}

    def _camera(self, port: int) -> dict[str, Any]:
        since = _now()
        ask(port, [black(number) for number in range(_BLACK)])
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
        found = command_line(self.workspace, "watch", "-m", MODEL, "--since", since, accepted=(0, 1))
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
                time.monotonic() < deadline, f"nothing asked the governor about {key} within 120 s", tail(self._worker_log)
            )
            time.sleep(0.3)

    @property
    def _worker_log(self) -> Path:
        return self.workspace.state / "up" / "worker.log"

    def _await_training(self, key: str) -> dict[str, Any]:
        """The granted training run of a key, once it has ended; says which stage it is in."""
        from flows.loop.flow_runs import training_runs
        from flows.training.run import STAGES

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
                _expect(not over, "the training run failed", [dead[:1], tail(self._worker_log)])
                sweep(self.loop, say=self._told)
            _expect(
                time.monotonic() < deadline, f"the retraining did not end within {_RETRAIN_S:g} s", tail(self._worker_log)
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
