"""What gates did not decide is a version that a second person may except, approve and promote; until then it moves nothing."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

from shapes import FEW, visionloop


def answer(root: Path, *arguments: str, status: int = 0) -> dict[str, Any]:
    done = visionloop(*arguments, "--json", cwd=root)
    assert done.returncode == status, (done.stdout, done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_an_undecided_version_goes_live_by_an_exception_that_is_told_everywhere(
    trained: Path, tmp_path: Path, prefect_server: str
) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    asked = ("train", "-r", "smoke", "--as", "Ann", "--set", FEW)
    told = visionloop(*asked, cwd=root)
    assert told.returncode == 1, told.stderr
    assert "UNDECIDED" in told.stdout
    assert 'visionloop except 2 --gate class_recall --as WHO --reason "..."' in told.stdout
    summary = answer(root, *asked, status=1)
    assert (summary["outcome"], summary["verdict"], summary["version"]) == ("undecided", "inconclusive", "2")
    assert summary["undecided"] == ["class_recall"]
    assert "visionloop except 2 --gate class_recall" in Path(summary["report"]).read_text()
    assert answer(root, "runs")["runs"][-1]["outcome"] == "undecided"
    assert [(c["version"], c["status"]) for c in answer(root, "candidates")["candidates"]] == [
        ("1", "waiting"),
        ("2", "undecided"),
    ]
    assert "undecided: class_recall" in visionloop("candidates", cwd=root).stdout
    assert "visionloop except 2 --gate class_recall" in visionloop("show", "2", cwd=root).stdout

    # Refused, each with what would do, and nothing is written.
    refused = visionloop("approve", "2", "--as", "Bob", "--reason", "fine", cwd=root)
    assert refused.returncode == 2
    assert "visionloop except 2 --gate class_recall" in refused.stderr
    assert visionloop("promote", "2", cwd=root).returncode == 2
    signing = ("except", "2", "--gate", "class_recall", "--reason", "I looked at all of them")
    assert "requested version 2" in visionloop(*signing, "--as", "ANN", cwd=root).stderr
    wrong = visionloop("except", "2", "--gate", "parity", "--as", "Bob", "--reason", "fine", cwd=root)
    assert "'parity'; valid: class_recall" in wrong.stderr
    kinds = [entry["kind"] for entry in answer(root, "history")["entries"]]
    assert kinds == ["requested", "requested"]

    signed = answer(root, *signing, "--as", "Bob")
    assert (signed["kind"], signed["missing"]) == ("excepted", [])
    # The page of the run is drawn anew with it, and nothing is registered twice.
    again = answer(root, *asked, status=1)
    assert again["version"] == "2"
    assert "Excepted: class_recall, which did not decide, by Bob" in Path(again["report"]).read_text()
    shown = visionloop("show", "2", cwd=root).stdout
    assert "class_recall did not decide; excepted by Bob" in shown
    assert "Next: visionloop approve 2" in shown
    answer(root, "approve", "2", "--as", "Bob", "--reason", "fine")
    assert answer(root, "promote", "2")["version"] == "2"
    now = datetime.datetime.now(datetime.UTC).isoformat()
    served = answer(root, "who-served", "--at", now)
    assert served["version"] == "2"
    assert {gate: e["by"] for gate, e in served["exceptions"].items()} == {"class_recall": "Bob"}
    text = visionloop("who-served", "--at", now, cwd=root).stdout
    assert "under an exception: class_recall did not decide; excepted by Bob" in text
    assert "I looked at all of them" in text
    assert "class_recall: I looked at all of them" in visionloop("history", cwd=root).stdout
    assert answer(root, "ledger", "verify")["rows"] == 5
    assert answer(root, "reconcile")["differences"] == []
    bundle = tmp_path / "bundle"
    answer(root, "engine", "bundle", "--out", str(bundle))
    assert "Excepted: class_recall, which did not decide, by Bob" in (bundle / "model-card.md").read_text()
