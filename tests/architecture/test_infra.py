"""What a team's files say is what the code says: checked as far as it can be without a container engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from shapes import make_workspace

from flows.loop.alarms import DATA, DRIFT
from flows.up.deployments import POOL
from flows.workspace import settings

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
    return found


def test_every_setting_of_compose_exists(compose: dict[str, Any]) -> None:
    known = set(re.findall(r"VISIONLOOP_[A-Z_]+", Path(settings.__file__).read_text()))
    named = {
        name
        for service in compose["services"].values()
        for name in (service.get("environment") or {})
        if name.startswith("VISIONLOOP_")
    }
    assert len(named) >= 4
    assert named <= known
    readme = (ROOT / "README.md").read_text()
    assert {name for name in known if name not in readme} == set()


def test_compose_publishes_on_loopback_alone_and_holds_no_secret(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    text = (INFRA / "compose.yaml").read_text()
    for line in text.splitlines():
        if re.search(r"(PASSWORD|SECRET_KEY|ACCESS_KEY|AUTH_STRING)[A-Z_]*:", line):
            assert "${" in line, line


def test_services_depend_on_services(compose: dict[str, Any]) -> None:
    names = set(compose["services"])
    assert {"postgres", "s3", "mlflow", "prefect", "worker", "serving"} <= names
    for service in compose["services"].values():
        for other, how in (service.get("depends_on") or {}).items():
            assert other in names
            if how["condition"] == "service_healthy":
                assert "healthcheck" in compose["services"][other], other
    volumes = set(compose["volumes"])
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in volumes or (INFRA / source).exists(), volume


@pytest.mark.parametrize("name", ["Dockerfile", "serving.Dockerfile"])
def test_the_images_copy_every_package(compose: dict[str, Any], name: str) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    dockerfile = (INFRA / "images" / name).read_text()
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert len(packages) == 5
    for package in (pattern.removesuffix("*") for pattern in packages):
        assert f"COPY {package} {package}" in dockerfile
    assert "USER visionloop" in dockerfile
    builds = {service["build"]["dockerfile"] for service in compose["services"].values() if "build" in service}
    assert f"infra/images/{name}" in builds


def test_the_serving_image_installs_its_own_lock_and_nothing_else() -> None:
    image = (INFRA / "images" / "serving.Dockerfile").read_text().replace("\\\n", " ").rpartition("\nFROM ")[2]
    installs = [
        command for command in re.split(r"&&|\n|;", image) if re.search(r"\b(pip|uv|apt-get|apk) .*(install|sync)", command)
    ]
    lock, wheel = (" ".join(command.removeprefix("RUN").split()) for command in installs)
    assert lock == "pip install --no-cache-dir --no-deps --require-hashes --requirement /tmp/serve.txt"
    assert wheel == "pip install --no-cache-dir --no-deps /tmp/wheels/*.whl"
    assert "COPY infra/locks/serve.txt /tmp/serve.txt" in image


def test_prefect_takes_the_deployments(prefect_server: str, tmp_path: Path) -> None:
    """Deployed for real, on the session's server, by Prefect's own command."""
    from prefect.client.orchestration import get_client

    from flows.up.deployments import make_pool

    make_pool()
    workspace = make_workspace(tmp_path / "workspace", per_class=12)
    environment = {
        **os.environ,
        "PREFECT_API_URL": prefect_server,
        "VISIONLOOP_MODEL": "team",
        "VISIONLOOP_RECIPE": "smoke",
        "VISIONLOOP_WORKSPACE": str(workspace),
        "VISIONLOOP_CODE": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "infra/prefect.yaml"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with get_client(sync_client=True) as client:
        train, watch, promote = (client.read_deployment_by_name(f"{name}/team") for name in ("train", "watch", "promote"))
        automations: list[Any] = list(client.read_automations())
    assert {d.work_pool_name for d in (train, watch, promote)} == {POOL}
    assert train.parameters["recipe"] == "smoke"
    assert [(s.slug, s.parameters) for s in train.schedules] == [("nightly", {"cause": "schedule", "reason": "nightly"})]
    (automation,) = [found for found in automations if "visionloop.model.team" in str(found.trigger)]
    assert set(automation.trigger.expect) == {DRIFT, DATA}
    (action,) = automation.actions
    assert "event.payload.alarm" in str(action.parameters)
    (every,) = watch.schedules
    assert (every.slug, every.schedule.interval.total_seconds()) == ("every-window", 900)  # type: ignore[union-attr]
    assert every.schedule.anchor_date.timestamp() == 30  # type: ignore[union-attr]
