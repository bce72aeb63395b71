"""The same commands on a team's stores: the ledger in PostgreSQL, releases and prediction log in S3."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import png, server
from shapes import LENIENT, visionloop_process
from stores import fresh_database, s3_bucket

from components import predictionlog

pytestmark = pytest.mark.slow


@pytest.fixture
def team(postgres: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fresh database and bucket, named by the environment as a team does it."""
    with s3_bucket("team") as bucket:
        monkeypatch.setenv("VISIONLOOP_LEDGER_URL", fresh_database(postgres))
        monkeypatch.setenv("VISIONLOOP_RELEASES", f"{bucket}/releases")
        monkeypatch.setenv("VISIONLOOP_PREDICTIONS", f"{bucket}/predictions")
        yield


@pytest.mark.usefixtures("team")
def test_promoted_on_postgresql_served_from_s3_and_logged_there(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "workspace", symlinks=True))
    local = [root / ".visionloop" / name for name in ("ledger.db", "releases", "predictions")]
    for path in local:
        if path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def run(*arguments: str) -> str:
        done = visionloop_process(*arguments, cwd=root)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def answered(mine: object) -> str:
        return str(mine.predict(png("disc", 1)).json["model_version"])  # type: ignore[attr-defined]

    monkeypatch.setenv(
        "VISIONLOOP_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}"
    )  # a registry that knows another ledger is refused
    run("train", "-r", "smoke")
    (candidate,) = json.loads(run("candidates", "--json").splitlines()[-1])["candidates"]
    version = str(candidate["version"])
    run("approve", version, "--as", "Ann", "--reason", "good")
    run("promote", version)
    with server(root, env=dict(os.environ)) as mine:
        assert answered(mine) == version
        run("train", "-r", "smoke", "--set", f"gating.gates={LENIENT}")
        following = str(int(version) + 1)
        run("approve", following, "--as", "Ann", "--reason", "equal")
        run("promote", following)
        mine.wait_for(lambda: answered(mine) == following)
        run("rollback", "--as", "Bob", "--reason", "complaints")
        mine.wait_for(lambda: answered(mine) == version)
        assert mine.stop() == 0
    kinds = [row["kind"] for row in json.loads(run("history", "--json").splitlines()[-1])["entries"]]
    assert kinds == ["requested", "approved", "promoted", "requested", "approved", "promoted", "rolled_back"]
    run("ledger", "verify")
    run("reconcile")
    versions = [v for table in predictionlog.read_log("s3://team/predictions") for v in table["version"].to_pylist()]
    assert set(versions) == {version, following}
    assert not any(path.exists() for path in local)  # nothing went to the laptop's defaults
