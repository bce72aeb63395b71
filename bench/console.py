"""How long the console takes for a page where a ledger has 1,000 versions and 10,000 rows: at the server, without a browser.

The peer is the same page over a ledger that is verified from its first row for each request, as decisions are. Needs no
data.
"""

from __future__ import annotations

import datetime
import statistics
import time
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from bench.serving import say
from components.contracts.records import canonical_json, sha256_text
from flows.console.app import make_app
from flows.console.application import Application
from flows.console.config import ConsoleConfig
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace
from registry import approval
from registry.ledger import FollowedLedger, Ledger, Principal

NUM_VERSIONS = 1_000
NUM_ROWS = 10_000
NUM_REQUESTS, NUM_WHOLE = 20, 3
"""Of each page; where the ledger is verified whole for every one, a request takes seconds."""
SHORT = {"NUM_VERSIONS": 20, "NUM_ROWS": 100, "NUM_REQUESTS": 3, "NUM_WHOLE": 1}
_MODEL = "shapes"
_FLOW = Principal(name="flows/train", method="machine")
_CLASSES = [f"class {number}" for number in range(100)]
_BUDGET_MS = 300.0
_LATER = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=7)).isoformat(timespec="microseconds")


class _VerifiedWhole(FollowedLedger):
    """A ledger that forgets what it verified."""

    def entries(self, model: str | None = None) -> list[Any]:
        return Ledger.entries(self, model)


def run(_data: Path | None, scratch: Path) -> dict[str, Any]:
    """Median milliseconds of the slowest page; the ratio is that of the ledger verified whole to ours."""
    workspace = Workspace.create(scratch / "workspace")
    settings = read_settings(workspace.state)
    num_rows = _fill(Ledger(settings.ledger_url))
    say(f"a ledger of {NUM_VERSIONS} versions and {num_rows} rows")
    config = ConsoleConfig(port=80)
    application = Application(workspace, settings, config)
    whole = Application(workspace, settings, config)
    object.__setattr__(whole, "ledger", _VerifiedWhole(settings.ledger_url))
    pages = {
        "queue": "/",
        "candidate": f"/models/{_MODEL}/versions/{NUM_VERSIONS}",
        "an old candidate": f"/models/{_MODEL}/versions/{NUM_VERSIONS // 2}",
        "history": f"/models/{_MODEL}/history",
        "loop": f"/models/{_MODEL}/loop",
        "labels": f"/models/{_MODEL}/labels",
    }
    ours: dict[str, tuple[float, float, float]] = {}
    peer: dict[str, tuple[float, float, float]] = {}
    with TestClient(make_app(application), base_url="http://127.0.0.1:80") as client:
        with TestClient(make_app(whole), base_url="http://127.0.0.1:80") as other:
            for name, address in pages.items():
                ours[name], peer[name] = _timed(client, address, NUM_REQUESTS), _timed(other, address, NUM_WHOLE)
                median, least, most = ours[name]
                say(f"{name:18} {median:7.1f} ms [{least:.1f}, {most:.1f}], verified whole {peer[name][0]:.1f}")
    slowest = max(ours, key=lambda name: ours[name][0])
    return {
        "ours": round(ours[slowest][0], 1),
        "peers": {"verified whole": round(peer[slowest][0], 1)},
        "ratio": round(peer[slowest][0] / ours[slowest][0], 2),
        "n": NUM_REQUESTS,
        "unit": f"median milliseconds of the slowest page ({slowest}); at most {_BUDGET_MS:g}",
        "pages_ms": {name: [round(value, 1) for value in found] for name, found in ours.items()},
        "rows": num_rows,
    }


def _timed(client: TestClient, address: str, num: int) -> tuple[float, float, float]:
    """Median, least and most milliseconds of a page, after the first one."""
    taken = []
    for _ in range(num + 1):
        begun = time.perf_counter()
        answer = client.get(address)
        taken.append(1000 * (time.perf_counter() - begun))
        assert answer.status_code == 200, (address, answer.status_code, answer.text[-2000:])
    return statistics.median(taken[1:]), min(taken[1:]), max(taken[1:])


def _fill(ledger: Ledger) -> int:
    """Versions that were requested, mostly approved and promoted, and rows of rejected models up to the number asked for."""
    people = [approval.person(name) for name in ("Ann", "Bob")]
    num_rows = champion = 0
    rejected = max(0, NUM_ROWS - 3 * NUM_VERSIONS) // NUM_VERSIONS
    for number in range(1, NUM_VERSIONS + 1):
        for other in range(rejected):
            refused = {"status": "fail", "reasons": ["accuracy too low"], "bound": _bound(number, champion)}
            key = f"refused {number} {other}"
            ledger.append("rejected", model=_MODEL, subject=sha256_text(key), actor=people[0], body=refused, key=key)
        version = str(number)
        body: dict[str, Any] = {
            "version": version,
            "manifest_sha256": sha256_text(version),
            "bound": _bound(number, champion),
            "summary": _summary(number),
            "mlflow_run_id": f"run{number}",
        }
        subject = sha256_text(f"candidate {number}")
        requested = ledger.append("requested", model=_MODEL, subject=subject, actor=_FLOW, body=body, key=f"r{number}")
        num_rows += 1 + rejected
        if number > NUM_VERSIONS - 10:
            continue  # these wait
        # As the rules of approval write them; through these, each row would cost a look at all before.
        same = {name: body[name] for name in ("version", "bound", "manifest_sha256")} | {"requested_seq": requested.seq}
        seen = same | {"reason": "looked at it", "expires_at": _LATER}
        approved = ledger.append("approved", model=_MODEL, subject=subject, actor=people[1], body=seen, key=f"a{number}")
        num_rows += 1
        if number % 2:
            moved: dict[str, Any] = {name: same[name] for name in ("version", "requested_seq", "manifest_sha256")}
            moved |= {"approved_seq": approved.seq, "release": sha256_text(f"release {number}"), "previous": None}
            moved |= {"engine": body["bound"]["engines"]["onnxruntime-fp32"]}
            ledger.append("promoted", model=_MODEL, subject=subject, actor=_FLOW, body=moved, key=f"p{number}")
            champion, num_rows = number, num_rows + 1
    return num_rows


def _bound(number: int, champion: int) -> dict[str, Any]:
    return {
        "data": sha256_text(f"data {number}"),
        "split": sha256_text("split"),
        "weights": sha256_text(f"weights {number}"),
        "policy": sha256_text("policy"),
        "engines": {"onnxruntime-fp32": sha256_text(f"engine {number}")},
        "serving": "onnxruntime-fp32",
        "evidence": {},
        "release": sha256_text(f"release {number}"),
        "champion": sha256_text(f"engine {champion}") if champion else "none",
    }


def _summary(number: int) -> dict[str, Any]:
    """As large as that of a real version of a hundred classes."""
    estimate = {"value": 0.95, "low": 0.93, "high": 0.97, "n": 1000}
    return {
        "run": f"run-{number}",
        "reason": "manual",
        "recipe": "smoke",
        "git": "0" * 40,
        "data_version": sha256_text(f"data {number}")[:32] + ".dir",
        "images": {"train": 8000, "valid": 500, "calibration": 500, "test": 1000},
        "classes": _CLASSES,
        "serving_engine": "onnxruntime-fp32",
        "metrics": dict.fromkeys(("accuracy", "mean_class_accuracy", "log_loss", "ece"), estimate),
        "recall": dict.fromkeys(_CLASSES, estimate),
        "champion": {"accuracy": estimate},
        "champion_version": str(max(1, number - 1)),
        "champion_images": 1000,
        "champion_reason": "",
        "classes_new": [],
        "classes_gone": [],
        "decision": None,
        "evidence": {"sentence": canonical_json(["Better than the champion by 0.4 points"]), "flips": None},
        "data_since": None,
        "spent": None,
        "findings": [
            {
                "engine": "onnxruntime-fp32",
                "gate": gate,
                "status": "pass",
                "message": "all of the interval is above the floor",
            }
            for gate in ("accuracy", "class_recall", "parity", "latency", "no_regression", "slices", "robustness", "serves")
        ],
        "policy": {"gates": [], "engines": {}, "serving": "onnxruntime-fp32"},
        "at": datetime.datetime.now(datetime.UTC).isoformat(),
    }
