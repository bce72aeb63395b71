"""A workspace that an older commit made still opens, verifies, serves, trains on and rolls back.

`tests/older/make_workspace.py` made it. Unpacked anywhere, it is also a workspace that was moved.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

import pytest
from served import MODEL, png, server
from shapes import LENIENT, visionloop

from components.splitting import TestLedger
from components.store import unseal
from registry.models import MANIFEST, bound_in

ARCHIVES = sorted((Path(__file__).parent / "older").glob("*.tar.xz"))


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: str(path.name).split(".")[0])
def older(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Path:
    """The workspace of one older commit; the tests of this module use it in their order."""
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(request.param) as archive:
        archive.extractall(folder, filter="tar")
    return folder / "workspace"


def answer(*arguments: str, cwd: Path, status: int = 0) -> dict[str, Any]:
    done = visionloop(*arguments, "--json", cwd=cwd)
    assert done.returncode == status, (arguments, done.stdout, done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def split_of(folder: Path) -> dict[str, str]:
    """The split of every picture, as the run of this folder recorded it."""
    import pandas as pd

    frame = pd.read_parquet(next(folder.glob("2-splitting/*.parquet")))
    return dict(zip(frame["path"], frame["split"], strict=True))


def test_there_is_one() -> None:
    assert ARCHIVES


def test_it_opens_and_verifies(older: Path) -> None:
    assert answer("data", "status", cwd=older)["changes"] == {}
    assert answer("store", "verify", cwd=older)["broken"] == []
    assert [entry["kind"] for entry in answer("history", cwd=older)["entries"]] == [
        "requested",
        "approved",
        "promoted",
        "rejected",
    ]
    shown = answer("show", "1", cwd=older)
    assert (shown["status"], shown["champion_version"]) == ("champion", "1")
    assert {window["status"] for window in answer("windows", cwd=older)["windows"]} == {"pass", "drift"}
    assert len(answer("alarms", cwd=older)["alarms"]) == 1
    assert {run["outcome"] for run in answer("runs", cwd=older)["runs"]} == {"candidate", "rejection"}


def test_what_its_approvals_are_bound_to_is_found_again(older: Path) -> None:
    """Else a version that waits for approval or promotion while visionloop is upgraded could never be promoted."""
    judged = [path.parents[1] for path in older.rglob("evidence/verdict.json")]
    assert len(judged) == 2
    for folder in judged:
        sealed = unseal((folder / MANIFEST).read_bytes())
        assert sealed is not None
        assert bound_in(folder) == sealed["bound"]


def test_it_serves_and_its_log_is_whole(older: Path) -> None:
    with server(older) as running:
        reply = running.predict(png("disc", 90_001))
        assert (reply.status, reply.json["label"]) == (200, "disc")
        assert running.stop() == 0
    # 185 of the older server, five of them in the journal that a kill left, and this one.
    exported = older / "log.parquet"
    answer("predictions", "export", str(exported), cwd=older)
    import pandas as pd

    assert len(pd.read_parquet(exported)) == 186


@pytest.mark.slow
def test_it_trains_on_and_rolls_back(older: Path) -> None:
    before = TestLedger.read(older / "data.test-ledger.csv")
    (first,) = [Path(run["folder"]) for run in answer("runs", cwd=older)["runs"] if run["version"] == "1"]
    summary = answer("train", "-r", "smoke", "--set", f"gating.gates={LENIENT}", cwd=older)
    assert (summary["version"], summary["outcome"]) == ("2", "candidate")
    assert split_of(Path(summary["run_folder"])) == split_of(first)
    assert TestLedger.read(older / "data.test-ledger.csv") == before
    assert answer("show", "2", cwd=older)["summary"]["champion"] is not None
    answer("approve", "2", "--as", "Ann", "--reason", "as good", cwd=older)
    assert answer("promote", "2", cwd=older)["version"] == "2"
    assert answer("rollback", "--as", "Ann", "--reason", "back", cwd=older)["body"]["version"] == "1"
    answer("reconcile", cwd=older)
    now = datetime.datetime.now(datetime.UTC).isoformat()
    assert f"{MODEL} version 1" in visionloop("who-served", "--at", now, cwd=older).stdout
    # Nothing that is kept leads back to the place where it was made.
    made_in = json.loads((older / "made-by.json").read_text())["made_in"]
    with contextlib.closing(sqlite3.connect(older / ".visionloop" / "mlflow.db")) as tables:
        assert [line for line in tables.iterdump() if made_in in line] == []
    assert made_in not in (older / ".dvc" / "config.local").read_text()
