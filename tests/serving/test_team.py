"""The same commands on a team's stores: the ledger in PostgreSQL, releases and prediction log in S3."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from served import png, server
from shapes import visionloop_process

from serving import segments

pytestmark = pytest.mark.slow
LENIENT = "[{gate: accuracy, settings: {floor: 0.6}}, {gate: no_regression, settings: {margin: 0.3}}]"


@pytest.fixture
def team(postgres: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fresh database and bucket, named by the environment as a team does it."""
    import boto3
    from moto.server import ThreadedMotoServer

    database, engine = f"team_{uuid.uuid4().hex[:8]}", sa.create_engine(postgres, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {database}"))
    engine.dispose()
    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    store.start()
    host, port = store.get_host_and_port()
    for name, value in {
        "VISIONLOOP_LEDGER_URL": postgres.rsplit("/", 1)[0] + f"/{database}",
        "VISIONLOOP_RELEASES": "s3://team/releases",
        "VISIONLOOP_PREDICTIONS": "s3://team/predictions",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="team")
    yield
    store.stop()


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
    versions = [v for table in segments.read_log("s3://team/predictions") for v in table["version"].to_pylist()]
    assert set(versions) == {version, following}
    assert not any(path.exists() for path in local)  # nothing went to the laptop's defaults
