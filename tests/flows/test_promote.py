"""The decisions on the command line, on a candidate that was really trained."""

from __future__ import annotations

import datetime
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from PIL import Image
from shapes import LENIENT, commit, picture, visionloop

from components.contracts.verdicts import Robustness
from flows.orchestrator.notifications import notify
from flows.workspace.settings import Settings
from registry import approval


@pytest.fixture(scope="module")
def decided(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose candidate was approved and promoted through the command line."""
    root = Path(shutil.copytree(trained, tmp_path_factory.mktemp("decided") / "workspace", symlinks=True))
    for arguments in (
        ["approve", "1", "--as", "Ann", "--reason", "the figures are good"],
        ["promote", "1"],
    ):
        done = visionloop(*arguments, cwd=root)
        assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def waiting(trained: Path, tmp_path: Path) -> Path:
    """A workspace whose candidate waits."""
    return Path(shutil.copytree(trained, tmp_path / "workspace", symlinks=True))


LOOSER = (
    "class_recall no longer judges (looser); latency no longer judges (looser); no_regression.margin 0.02 -> 0.3 (looser); "
    "no_regression.max_negative_flips 0.05 -> 0.3 (looser); parity no longer judges (looser)"
)


def told(*arguments: str, cwd: Path) -> dict[str, Any]:
    done = visionloop(*arguments, "--json", cwd=cwd)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "exit": done.returncode}


def test_a_candidate_is_shown_with_all_that_a_person_needs(waiting: Path) -> None:
    (candidate,) = told("candidates", cwd=waiting)["candidates"]
    assert (candidate["version"], candidate["status"]) == ("1", "waiting")
    page = visionloop("show", "1", cwd=waiting).stdout
    for part in (
        "shapes version 1: waits for approval",
        "It serves openvino-int8, trained by recipe smoke on data version",
        "accuracy",
        "no champion then",
        "The first model judged on these",
        "Weakest classes:",
        '"unsure"',
        "parity",
        "An approval is bound to:",
        "report.html",
        "visionloop approve 1 --as WHO",
    ):
        assert part in page, part
    shown = told("show", "1", cwd=waiting)
    assert set(shown["bound"]) >= {"data", "split", "weights", "engines", "policy", "evidence", "release", "champion"}
    assert len(shown["bound"]["release"]) == 64


def test_who_trained_it_cannot_approve_it(waiting: Path) -> None:
    requester = told("candidates", cwd=waiting)["candidates"][0]["requested_by"]
    done = visionloop("approve", "1", "--as", requester.upper(), "--reason", "mine", cwd=waiting)
    assert done.returncode == 2
    assert "a second person has to" in done.stderr


def test_what_is_not_approved_is_not_promoted(waiting: Path) -> None:
    done = visionloop("promote", "1", cwd=waiting)
    assert done.returncode == 2
    assert "version 1 cannot be promoted: it waits for a person's approval (visionloop approve)" in done.stderr
    assert not (waiting / ".visionloop" / "releases").exists()
    done = visionloop("promote", "9", cwd=waiting)
    assert "unknown version '9'; valid: 1" in done.stderr


def test_a_rejected_candidate_stays_rejected(waiting: Path) -> None:
    assert told("reject", "1", "--as", "bob", "--reason", "too small", cwd=waiting)["exit"] == 0
    for arguments in (["approve", "1", "--as", "ann", "--reason", "r"], ["promote", "1"]):
        done = visionloop(*arguments, cwd=waiting)
        assert done.returncode == 2
        assert "it was rejected by bob" in done.stderr
    assert "nothing waits" in visionloop("candidates", cwd=waiting).stdout


def test_wrong_words_are_refused(waiting: Path) -> None:
    for arguments, why in [
        (["approve", "1", "--as", " ", "--reason", "r"], "names nobody"),
        (["approve", "1", "--as", "flows/x", "--reason", "r"], "belong to flows"),
        (["approve", "1", "--as", "ann", "--reason", " "], "needs a --reason"),
        (["approve", "1", "--as", "ann", "--reason", "r", "--days", "0"], "days"),
        (["show", "x"], "unknown version 'x'; valid: 1"),
        (["candidates", "-m", "other"], "unknown model 'other'; valid: shapes"),
        (["rollback", "--as", "ann", "--reason", "r"], "no champion to roll back from"),
        (["who-served", "--at", "noon"], "not a moment"),
        (["who-served", "--at", "2990-01-01"], "has not come yet"),
    ]:
        done = visionloop(*arguments, cwd=waiting)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert why in done.stderr, (arguments, done.stderr)


def test_a_rollback_stops_for_no_garbage(waiting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    during: list[bool] = []
    monkeypatch.setattr(approval, "champion", lambda _: during.append(gc.isenabled()))
    assert visionloop("rollback", "--as", "ann", "--reason", "r", cwd=waiting).returncode == 2
    assert (during, gc.isenabled()) == ([False], True)


def test_a_promoted_version_is_champion_everywhere(decided: Path) -> None:
    (candidate,) = told("candidates", cwd=decided)["candidates"]
    assert (candidate["status"], candidate["decided_by"]) == ("champion", "Ann")
    kinds = [entry["kind"] for entry in told("history", cwd=decided)["entries"]]
    assert kinds == ["requested", "approved", "promoted"]
    assert "Ann (name not verified): the figures are good" in visionloop("history", cwd=decided).stdout
    assert told("ledger", "verify", cwd=decided)["rows"] == 3
    assert told("reconcile", cwd=decided)["differences"] == []
    uri = f"sqlite:///{decided / '.visionloop' / 'mlflow.db'}"
    assert str(MlflowClient(uri, registry_uri=uri).get_model_version_by_alias("shapes", "champion").version) == "1"
    done = visionloop("promote", "1", cwd=decided)
    assert done.returncode == 0
    assert [entry["kind"] for entry in told("history", cwd=decided)["entries"]] == kinds


def test_who_served_when_and_why(decided: Path) -> None:
    before = told("who-served", "--at", "2020-01-01", cwd=decided)
    assert before["version"] is None
    elsewhere = datetime.timezone(datetime.timedelta(hours=2))
    now = told("who-served", "--at", datetime.datetime.now(elsewhere).isoformat(), cwd=decided)
    assert (now["version"], now["approved_by"], now["reason"]) == ("1", "Ann", "the figures are good")


def test_an_alias_moved_by_hand_is_reported_and_repaired(decided: Path) -> None:
    uri = f"sqlite:///{decided / '.visionloop' / 'mlflow.db'}"
    client = MlflowClient(uri, registry_uri=uri)
    client.delete_registered_model_alias("shapes", "champion")
    found = told("reconcile", cwd=decided)
    assert (found["exit"], found["differences"][0]["found"]) == (1, "none")
    assert told("reconcile", "--repair", cwd=decided)["exit"] == 0
    assert told("reconcile", cwd=decided)["differences"] == []


def test_a_rejudged_model_is_compared_with_the_champion(decided: Path) -> None:
    """The same recipe again: all from the store, but the evidence is new, for it names the champion."""
    done = visionloop("train", "-r", "smoke", "--set", f"gating.gates={LENIENT}", "--json", cwd=decided)
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert summary["version"] == "2", summary["reasons"]
    assert summary["seconds"]["training"]["cached"]
    shown = told("show", "2", cwd=decided)
    assert shown["bound"]["champion"] == told("show", "1", cwd=decided)["bound"]["engines"]["openvino-int8"]
    assert shown["summary"]["champion"]["accuracy"] == shown["summary"]["metrics"]["accuracy"]
    assert shown["notes"] == [f"The gate policy is not the champion's (version 1): {LOOSER}."]
    page = visionloop("show", "2", cwd=decided).stdout
    assert "the champion then, version 1" in page
    assert shown["notes"][0] in page
    n = shown["summary"]["metrics"]["accuracy"]["n"]
    assert "Not shown to be better or worse than the champion: +0.0 points" in page
    assert "in none of 2 slices is it shown to be worse." in page
    assert (
        f"Of the champion's answers 0 right ones are wrong now and 0 wrong ones are right (both right {n}, neither 0)."
        in page
    )
    assert "Since the data of the champion (version 1) no file changed." in page
    assert {"slices", "shown"} <= set(shown["bound"])
    answered = json.loads(
        (Path(summary["run_folder"]) / "5-evaluation" / "champion-corrupted" / "manifest.json").read_text()
    )
    assert shown["bound"]["champion_corrupted"] == Robustness.read(answered["record"]).digest()
    # The figures of then stay those of version 1 when another one is champion.
    for arguments in (["approve", "2", "--as", "Ann", "--reason", "equal"], ["promote", "2"]):
        done = visionloop(*arguments, cwd=decided)
        assert done.returncode == 0, done.stderr
    approved = told("history", cwd=decided)["entries"][-2]["body"]
    assert approved["shown"] == shown["notes"]
    page = visionloop("show", "2", cwd=decided).stdout
    assert "the champion then, version 1" in page
    assert "declared as Ann by the account that also asked for the training" in page
    assert "Champion today: version 2" in visionloop("show", "1", cwd=decided).stdout
    assert visionloop("rollback", "--as", "bob", "--reason", "worse", cwd=decided).returncode == 0
    page = visionloop("show", "2", cwd=decided).stdout
    assert "shapes version 2: left by a rollback of bob" in page
    assert "bob went back from it to version 1" in page
    assert "visionloop approve 2" in page


ONE_ENGINE = ("--set", "export.targets=[{target: onnxruntime}]", "--set", "export.serving=onnxruntime-fp32")
WARM = ("train", "-r", "smoke", "--set", "training.weights=champion", "--set", "training.fit.epochs=1")


@pytest.mark.slow
def test_a_training_goes_on_from_the_champion_and_stays_what_it_was_when_another_one_is(decided: Path) -> None:
    first = json.loads(visionloop(*WARM, *ONE_ENGINE, "--json", cwd=decided).stdout.strip().splitlines()[-1])
    run = Path(first["run_folder"])
    weights = told("show", "1", cwd=decided)["bound"]["weights"]
    kept = json.loads((run / "warm_start.json").read_text())
    assert (kept["version"], kept["weights"]) == ("1", weights)
    assert f"champion, version 1 (weights {weights[:16]})" in (run / "report.html").read_text()
    assert json.loads((run / "3-training" / "manifest.json").read_text())["inputs"]["weights"] == weights
    before = json.loads((run / "3-training" / "history.json").read_text())
    assert before[0]["valid_accuracy"] > 0.9, "one epoch, and it knows already what the champion knew"
    # What is champion now makes no other run of the same command.
    done = visionloop("train", "-r", "smoke", "--set", f"gating.gates={LENIENT}", "--json", cwd=decided)
    version = json.loads(done.stdout.strip().splitlines()[-1])["version"]
    for arguments in (["approve", version, "--as", "Ann", "--reason", "equal"], ["promote", version]):
        assert visionloop(*arguments, cwd=decided).returncode == 0
    again = json.loads(visionloop(*WARM, *ONE_ENGINE, "--json", cwd=decided).stdout.strip().splitlines()[-1])
    assert again["run"] == first["run"]
    assert again["seconds"]["training"]["cached"]
    assert visionloop("rollback", "--as", "bob", "--reason", "worse", cwd=decided).returncode == 0
    other = visionloop(*WARM, "--set", "training.backbone_settings.image_size=24", cwd=decided)
    assert other.returncode == 2
    assert (
        "a warm start goes on with the same network and task, and version 1 of shapes, the champion, has the" in other.stderr
    )
    (run / "warm_start.json").write_text((run / "warm_start.json").read_text().replace('"1"', '"2"'))
    changed = visionloop(*WARM, *ONE_ENGINE, cwd=decided)
    assert changed.returncode == 2
    assert "warm_start.json was changed after it was written; remove it" in changed.stderr


def test_a_warm_start_without_a_champion_is_refused_before_any_work(waiting: Path) -> None:
    done = visionloop(*WARM, "--set", "training.fit.epochs=3", cwd=waiting)
    assert done.returncode == 2
    assert "shapes has no champion, since none of its versions was promoted yet; train from other weights" in done.stderr
    assert "validation" not in done.stdout + done.stderr


def test_a_class_that_is_new_and_one_that_is_gone_do_not_keep_a_model_from_approval(decided: Path) -> None:
    """The champion knows three classes; one gets another name and one is added, and the model passes."""
    bars = decided / "bars"
    bars.mkdir()
    for index in range(60):
        Image.fromarray(picture("stripes", 1000 + index).T).save(bars / f"{index:04d}.png")
    shutil.move(bars, decided / "data" / "bars")
    shutil.move(decided / "data" / "disc", decided / "data" / "ring")
    assert visionloop("data", "add", cwd=decided).returncode == 0
    commit(decided)
    before = set(decided.rglob("warm_start.json"))
    refused = visionloop(*WARM, *ONE_ENGINE, cwd=decided)
    assert refused.returncode == 2
    assert "answers about other classes than the data have (new: bars, ring; gone: disc)" in refused.stderr
    assert set(decided.rglob("warm_start.json")) == before, "the champion that was refused is not held on to"
    gates = LENIENT.removesuffix("]") + ", {gate: robustness, settings: {margin: 0.5}}]"
    done = visionloop("train", "-r", "smoke", "--set", f"gating.gates={gates}", *ONE_ENGINE, "--json", cwd=decided)
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert summary["outcome"] == "candidate", summary["reasons"]
    (robust,) = [f for f in summary["findings"] if f["gate"] == "robustness" and f["engine"] == "onnxruntime-fp32"]
    assert robust["status"] == "pass"
    assert f"(n={robust['n']} images, among the 2 classes that both know)" in robust["message"]
    (finding,) = [f for f in summary["findings"] if f["gate"] == "no_regression" and f["engine"] == "onnxruntime-fp32"]
    assert finding["status"] == "pass"
    assert "of the 2 classes that both know (cross, stripes)" in finding["message"]
    assert "new: bars, ring, judged by the floors alone; no longer known: disc" in finding["message"]
    shown = told("show", summary["version"], cwd=decided)["summary"]
    assert (shown["classes_new"], shown["classes_gone"]) == (["bars", "ring"], ["disc"])
    assert shown["champion_images"] == finding["n"] == robust["n"] < shown["metrics"]["accuracy"]["n"]
    page = visionloop("show", summary["version"], cwd=decided).stdout
    assert "New classes, which the champion did not know: bars, ring." in page
    assert "Classes of the champion that this version does not know: disc." in page
    report = Path(summary["report"]).read_text()
    assert "does not know: <b>bars, ring</b>" in report
    assert "this model does not: <b>disc</b>" in report


def test_what_happens_is_told_to_prefect(decided: Path, prefect_server: str) -> None:
    """Read back from the server's own record of events."""
    import time
    import urllib.request

    wanted = {"visionloop.model.requested", "visionloop.model.approved", "visionloop.model.promoted"}
    deadline, seen = time.monotonic() + 30, set[str]()
    while not wanted <= seen:
        assert time.monotonic() < deadline, seen
        request = urllib.request.Request(
            f"{prefect_server}/events/filter",
            data=json.dumps({"filter": {"event": {"prefix": ["visionloop.model."]}}, "limit": 50}).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            events = json.loads(response.read())["events"]
        seen = {event["event"] for event in events if event["resource"]["prefect.resource.id"] == "visionloop.model.shapes"}
        time.sleep(0.5)
    (promoted,) = [event for event in events if event["event"] == "visionloop.model.promoted"][-1:]
    assert promoted["payload"]["version"] == "1"


@pytest.fixture
def inbox() -> Any:
    """A web hook that keeps what it is sent."""
    received: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return None

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"json://127.0.0.1:{server.server_port}/", received
    server.shutdown()


def settings(*destinations: str) -> Settings:
    return Settings("", True, "", 1, "", "", "", "", destinations, "")


def test_people_are_told_of_every_step(inbox: Any, waiting: Path) -> None:
    url, received = inbox
    for arguments in (
        ["approve", "1", "--as", "ann", "--reason", "good"],
        ["promote", "1"],
        ["train", "-r", "smoke", "--set", f"gating.gates={LENIENT}"],  # compared with a champion now: another version
        ["approve", "2", "--as", "ann", "--reason", "equal"],
        ["promote", "2"],
    ):
        done = visionloop(*arguments, cwd=waiting, VISIONLOOP_NOTIFY=url)
        assert done.returncode == 0, done.stderr
    # In a process of its own: all that is told costs it no loading of Prefect, whose server is there.
    code = "import sys\nfrom flows.cli import main\ntry:\n    main()\nfinally:\n    print('prefect' in sys.modules)"
    command = [sys.executable, "-c", code, "rollback", "--as", "bob", "--reason", "complaints"]
    environment = {**os.environ, "VISIONLOOP_NOTIFY": url}
    done = subprocess.run(command, cwd=waiting, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "False"
    assert done.stderr.splitlines() == ["moved: version 1 is champion again (ledger row 7); servers switch to it now"]
    assert received[0]["message"] == "shapes version 1 was approved by ann: good"
    assert [str(message["message"]).partition(" by ")[0] for message in received] == [
        "shapes version 1 was approved",
        "shapes version 1 is champion now, promoted",
        "shapes version 2 waits for approval, asked for",
        "shapes version 2 was approved",
        "shapes version 2 is champion now, promoted",
        "shapes version 1 is champion again, rolled back",
    ]


def test_a_destination_that_is_down_costs_a_line_and_tells_no_secret(inbox: Any) -> None:
    url, received = inbox
    lines: list[str] = []
    facts = {"version": "1", "by": "ann", "reason": "good"}
    dead = "json://user:secret@127.0.0.1:9/"
    problems = notify(settings(dead, "nonsense://x", "no-such-block", url), "approved", "m", facts, say=lines.append)
    assert len(problems) == 3
    assert len(received) == 1
    assert all("it is on record all the same" in line for line in lines)
    assert "secret" not in "".join(lines)


def test_people_are_told_by_a_block_of_prefect(inbox: Any, prefect_server: str) -> None:
    """A block that is saved in the Prefect server, named as `type/name`."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    url, received = inbox
    address = url.replace("json://", "http://")
    body = {"title": "{{subject}}", "text": "{{body}}"}
    block = CustomWebhookNotificationBlock(name="reviewers", url=address, json_data=body, headers=None, cookies=None)
    block.save("reviewers", overwrite=True)
    facts = {"version": "1", "by": "ann", "reason": "good"}
    problems = notify(settings("custom-webhook/reviewers", "custom-webhook/nobody"), "approved", "m", facts)
    assert received == [{"title": "visionloop", "text": "m version 1 was approved by ann: good"}]
    assert len(problems) == 1
    assert "nobody" in problems[0]
