"""Nothing reports to its maker: no command asks the network for anything that was not configured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from overheard import Listener
from served import MODEL, png, server
from shapes import SMOKE, commit, write_pictures

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = (
    "dvc.repo, evidently, great_expectations, huggingface_hub, mlflow, nncf, onnxruntime, openvino, openvino.tools.ovc, "
    "prefect.main, timm, torch, torchvision"
)
UNHEARD = re.compile("TELEMETRY|ANALYTICS|DO_NOT_TRACK")


@pytest.fixture
def listener(tmp_path: Path) -> Listener:
    (tmp_path / "home").mkdir()
    return Listener(tmp_path)


def run(listener: Listener, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A program in the environment of a person who has set nothing, with a home of its own."""
    home = cwd if (cwd / "shim.so").exists() else cwd.parent
    env = listener.environment({"HOME": str(home / "home"), "PYTHONPATH": str(ROOT), "GIT_CONFIG_NOSYSTEM": "1"})
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300
    )


def test_the_listener_hears_names_and_addresses_of_children_too(listener: Listener, tmp_path: Path) -> None:
    asks = (
        "import socket, subprocess, sys\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "for ask in (lambda: socket.getaddrinfo('telemetry.invalid', 443), lambda: s.sendto(b'x', ('192.0.2.7', 53)),\n"
        "            lambda: socket.create_connection(('2001:db8::7', 443)), lambda: socket.getaddrinfo('localhost', 1)):\n"
        "    try: ask()\n"
        "    except OSError: pass\n"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {asks!r}])"
    assert run(listener, "-c", code, cwd=tmp_path).returncode == 0
    heard = [line.rpartition(" (")[0] for line in listener.heard()]
    assert heard == ["name telemetry.invalid", "datagram 192.0.2.7:53", "address 2001:db8::7:443"]


def test_importing_and_serving_ask_for_nothing(listener: Listener, tmp_path: Path) -> None:
    with tarfile.open(next((ROOT / "tests" / "older").glob("*.tar.xz"))) as archive:
        archive.extractall(tmp_path, filter="tar")
    unset = {name: "" for name in os.environ if UNHEARD.search(name)}
    with ThreadPoolExecutor(1) as beside:
        # The environment first, as every command does; components alone is what the engine's process imports.
        imports = f"import flows.cli.app, components\nimport {LIBRARIES}"
        importing = beside.submit(run, listener, "-c", imports, cwd=tmp_path)
        # The program of a bundle runs without any of ours but its own runner.
        runner = ROOT / "components" / "runners" / "openvino.py"
        code = (
            f"import runpy\ntry: runpy.run_path({str(runner)!r})['load']('none.xml', 1)\nexcept RuntimeError: print('tried')"
        )
        bundled = beside.submit(run, listener, "-c", code, cwd=tmp_path)
        with server(tmp_path / "workspace", env=listener.environment(unset)) as running:
            assert running.predict(png("disc", 90_001)).status == 200
            assert running.stop() == 0
        done = importing.result()
        assert bundled.result().stdout == "tried\n", bundled.result().stderr
    assert (done.returncode, listener.heard()) == (0, []), done.stderr


def test_what_a_person_has_set_stays_and_an_empty_value_is_none(listener: Listener, tmp_path: Path) -> None:
    code = (
        "import os; os.environ.update(PREFECT_SERVER_ANALYTICS_ENABLED='true', DO_NOT_TRACK=''); import flows; "
        "print(*(os.environ[n] for n in ('PREFECT_SERVER_ANALYTICS_ENABLED', 'DO_NOT_TRACK', 'ORT_DISABLE_TELEMETRY')))"
    )
    assert run(listener, "-c", code, cwd=tmp_path).stdout.split() == ["true", "1", "1"]


@pytest.mark.slow
def test_the_whole_tour_asks_for_nothing(listener: Listener, tmp_path: Path) -> None:
    write_pictures(tmp_path / "photos", 60)
    root = tmp_path / "workspace"
    steps = [
        ("init", str(root)),
        ("data", "add", str(tmp_path / "photos"), "--test-share", "0.3"),
        ("train", "-r", "smoke"),
        ("candidates",),
        ("approve", "1", "--as", "Ann", "--reason", "good"),
        ("promote", "1"),
        ("predict", str(root / "data"), "--out", str(tmp_path / "out"), "-m", MODEL),
        ("report",),
        ("up",),
        ("watch", "-m", MODEL),
        ("status",),
        ("train", "-r", "smoke"),
        ("down",),
    ]
    heard: dict[str, list[str]] = {}
    for step in steps:
        done = run(listener, "-m", "flows", *step, cwd=root if root.exists() else tmp_path)
        assert done.returncode in (0, 1), (step, done.stdout, done.stderr)
        if step[0] == "init":
            (root / "recipes" / "smoke.yaml").write_text(SMOKE)
            subprocess.run(["git", "add", "."], cwd=root, check=True)
            commit(root)
        heard[" ".join(step[:2])] = listener.heard()
    assert {step: asked for step, asked in heard.items() if asked} == {}
