"""A training on a Ray cluster: what answers there is asked first, and what happens to a worker is told."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from ray_head import ray_head
from shapes import free_port
from small_splits import NETWORK, write_small_splits

from components import ray_cluster, ray_job
from components.contracts.data import Splits
from components.contracts.errors import ClusterUnavailable, ConfigError, TrainingDiverged, WorkerLost
from components.contracts.records import Stored
from components.ray_address import RayAddress
from components.training import TrainingConfig, on_this_machine, train

FIT = {"epochs": 3, "batch_size": 8, "learning_rate": 0.01, "checkpoint_every_s": 0}
PHASES = ({"trains": "head", "fit": FIT}, {"trains": "all", "augmentations": [{"augmentation": "flip"}], "fit": FIT})
STEPS = 9
"""Of a phase."""


def section(*phases: Any, **compute: Any) -> TrainingConfig:
    values = {"backbone": "small_cnn", "backbone_settings": NETWORK, "weights": "start.safetensors"}
    return TrainingConfig.model_validate({**values, "phases": phases or PHASES, "compute": {"processes": 2} | compute})


def test_an_address_that_is_none_or_does_not_answer_is_refused_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    for needed_by in ((), ("--ray",)):
        named = needed_by[0] if needed_by else "training.compute.launcher: ray"
        with pytest.raises(
            ConfigError, match=f"^{named} needs a Ray cluster that exists, and VISIONLOOP_RAY_ADDRESS names none"
        ):
            ray_cluster.expect_answers(RayAddress(), *needed_by)
    for address in ("local", "auto", "ray://head:10001", "head", "head:port", "head:6379/x"):
        with pytest.raises(ConfigError, match="expected the address of a cluster's head as HOST:PORT"):
            ray_cluster.expect_answers(RayAddress(address))
    monkeypatch.setattr(ray_cluster, "_ANSWERS_S", 1.0)
    with pytest.raises(ClusterUnavailable, match=r"no Ray cluster answers at 127.0.0.1:\d+, .*UNAVAILABLE.*start one"):
        ray_cluster.expect_answers(RayAddress(f"127.0.0.1:{free_port()}"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(ClusterUnavailable, match="DEADLINE_EXCEEDED|UNAVAILABLE"):
            ray_cluster.expect_answers(RayAddress(f"127.0.0.1:{silent.getsockname()[1]}"))
    monkeypatch.setattr(ray_cluster, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"Ray is not installed here; run: python -m pip install 'visionloop\[ray\]'"):
        ray_cluster.expect_answers(RayAddress("127.0.0.1:6379"))


def serving_head(credentials: grpc.ServerCredentials | None = None) -> tuple[grpc.Server, str]:
    """What answers as the head of a cluster does, at an address of this machine."""
    answers = grpc.unary_unary_rpc_method_handler(lambda *_: b"\x08\x01")
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": answers})])
    place = "127.0.0.1:0"
    port = server.add_secure_port(place, credentials) if credentials else server.add_insecure_port(place)
    server.start()
    return server, f"127.0.0.1:{port}"


def test_a_cluster_is_asked_as_ray_asks_past_proxies_and_by_its_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "_ANSWERS_S", 5.0)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    server, plain = serving_head()
    ray_cluster.expect_answers(RayAddress(plain))
    server.stop(None)
    files = certificate(tmp_path)
    cert, key = (Path(file).read_bytes() for file in files[:2])
    server, secure = serving_head(grpc.ssl_server_credentials([(key, cert)], cert, require_client_auth=True))
    ray_cluster.expect_answers(RayAddress(secure, files))
    with pytest.raises(ClusterUnavailable, match="no Ray cluster answers"):
        ray_cluster.expect_answers(RayAddress(secure))
    with pytest.raises(
        ConfigError, match="RAY_USE_TLS is on, and a file of it cannot be read .*'none'.*; set RAY_TLS_SERVER"
    ):
        ray_cluster.expect_answers(RayAddress(secure, (files[0], files[1], "none")))
    server.stop(None)


def certificate(folder: Path) -> tuple[str, str, str]:
    """Files of a certificate for this machine, its key, and the authority, which it is itself."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "head")])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(7)
    made = made.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    signed = made.add_extension(names, critical=False).sign(key, hashes.SHA256())
    plain = serialization.NoEncryption()
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return str(folder / "cert.pem"), str(folder / "key.pem"), str(folder / "cert.pem")


def test_the_folder_of_a_run_that_was_killed_goes_with_the_next_one(tmp_path: Path) -> None:
    code = "import os, pathlib, sys, components.ray_cluster as c; s = c.shared_folder(pathlib.Path(sys.argv[1])); s.__enter__(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -signal.SIGKILL
    (left,) = (tmp_path / "ray").iterdir()
    with ray_cluster.shared_folder(tmp_path) as one, ray_cluster.shared_folder(tmp_path) as other:
        assert {str(path) for path in (tmp_path / "ray").iterdir()} == {one["shared"], other["shared"]}
    assert not left.exists()


def test_a_machine_that_cannot_train_what_is_asked_is_named_and_no_trial_is_to_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ray_cluster.versions()
    with ray_cluster.shared_folder(tmp_path) as shared:
        request = {**shared, "versions": here, "config": section(launcher="ray").to_json()}
        ray_job.expect_able(request, "node a")
        with pytest.raises(
            ClusterUnavailable, match="the Ray worker on node b does not see .*/elsewhere: .*share, at the same path"
        ):
            ray_job.expect_able({**request, "shared": str(tmp_path / "elsewhere")}, "node b")
        with pytest.raises(ClusterUnavailable, match="does not see"):
            ray_job.expect_able({**request, "token": "of another run"}, "node b")
        for others in (("visionloop",), ("torch", "visionloop")):
            with pytest.raises(ClusterUnavailable, match=f"on node b has another version of {', '.join(others)} than this"):
                ray_job.expect_able({**request, "versions": here | dict.fromkeys(others, "0.1")}, "node b")
        with monkeypatch.context() as installed:
            installed.setattr(metadata, "version", lambda library: {"torch": "0.1"}.get(library, here[library]))
            with pytest.raises(ClusterUnavailable, match="on node b has another version of torch than this"):
                ray_job.expect_able(request, "node b")
        on_gpus = section(launcher="ray", device="cuda").to_json()
        with pytest.raises(
            ClusterUnavailable, match="on node b cannot train this: training.compute.device is cuda, and torch"
        ):
            ray_job.expect_able({**request, "config": on_gpus}, "node b")
    assert list(tmp_path.iterdir()) == []
    small: dict[str, Any] = {"processes": 6, "cpus": 1, "gpus": 0, "ray_address": "head:6379"}
    with pytest.raises(ClusterUnavailable, match=r"at head:6379 is too small for 6 workers, which need 6 CPUs \(it has 4\)"):
        ray_job._expect_room(small, {"CPU": 4.0})


def test_a_device_of_this_machine_is_none_of_a_cluster() -> None:
    with pytest.raises(ValueError, match="launcher is ray; set device to cpu or cuda"):
        section(launcher="ray", device="auto")
    # Whether a GPU is there is asked where it is to be.
    found = on_this_machine(section(launcher="ray", device="cuda", precision="fp16"))
    assert (found.key, found.num_processes) == ("cuda GPUs of a Ray cluster", 2)
    assert found.told == "GPUs of a Ray cluster, in fp16, by 2 processes, not exact to the bit"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ray_head(tmp_path_factory.mktemp("ray") / "log") as address:
        yield address


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Stored[Splits]]:
    root = tmp_path_factory.mktemp("world")
    return root, write_small_splits(root)


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if any("RayTrainWorker" in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def trained(
    world: tuple[Path, Stored[Splits]],
    out: Path,
    config: TrainingConfig,
    address: str,
    at: Mapping[str, Callable[[], object]] | None = None,
) -> Path:
    root, splits = world
    out.mkdir(exist_ok=True)

    def progress(done: int, total: int, note: str = "") -> None:
        (at or {}).get(note, lambda: None)()

    places: dict[str, Any] = {"out": out, "cache": root / "cache", "root": root, "num_threads": 2}
    train(splits, root / "data", config, **places, progress=progress, ray_address=RayAddress(address))
    return out


@pytest.mark.slow
@pytest.mark.timeout(1800)  # Ray takes half a minute to begin with each
def test_workers_of_a_cluster_train_as_processes_here_do_and_go_on_after_one_was_killed(
    world: tuple[Path, Stored[Splits]], tmp_path: Path, cluster: str
) -> None:
    here = trained(world, tmp_path / "here", section(launcher="torchrun"), "")
    there = trained(world, tmp_path / "there", section(launcher="ray"), cluster)
    found, expected = (json.loads((out / "history.json").read_text()) for out in (there, here))
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, abs=1e-5)
    out = tmp_path / "killed"
    told = next(note for note in notes(found) if note.startswith("phase 2, epoch 1"))
    with pytest.raises(WorkerLost, match=r"a worker on the Ray cluster ended before its end .*run again to go on"):
        trained(world, out, section(launcher="ray"), cluster, at={told: lambda: workers()[1].kill()})
    trained(world, out, section(launcher="ray"), cluster)
    for name in ("weights.safetensors", "history.json"):
        assert (out / name).read_bytes() == (there / name).read_bytes()
    assert not (world[0] / "cache" / "ray").exists()


def notes(history: list[dict[str, float]]) -> list[str]:
    """What is told at the end of each epoch of these rows."""
    return [
        f"phase {row['phase']:.0f}, epoch {row['epoch'] - 3 * (row['phase'] - 1):.0f}: "
        f"valid accuracy {row['valid_accuracy']:.4f}"
        for row in history
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # Ray takes half a minute to begin with each
def test_what_a_worker_raises_is_raised_here_and_a_cluster_that_is_too_small_is_told(
    world: tuple[Path, Stored[Splits]], tmp_path: Path, cluster: str
) -> None:
    wild = {"trains": "all", "fit": {**FIT, "learning_rate": 1e30, "warmup_epochs": 0}}
    with pytest.raises(TrainingDiverged, match="ower training.phases.0.fit.learning_rate"):
        trained(world, tmp_path / "wild", section(wild, launcher="ray"), cluster)
    many = {"trains": "head", "fit": FIT | {"batch_size": 24}}
    with pytest.raises(ClusterUnavailable, match=r"too small for 6 workers, which need 6 CPUs \(it has 4\)"):
        trained(world, tmp_path / "many", section(many, launcher="ray", processes=6), cluster)
    with pytest.raises(ClusterUnavailable, match=r"which need 2 GPUs \(it has 0\)"):
        trained(world, tmp_path / "gpus", section(launcher="ray", device="cuda"), cluster)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # Ray takes half a minute to begin with each
def test_a_run_that_is_killed_ends_its_workers_on_the_cluster(
    world: tuple[Path, Stored[Splits]], tmp_path: Path, cluster: str
) -> None:
    root, splits = world
    out = tmp_path / "out"
    out.mkdir()
    long = {"trains": "all", "fit": FIT | {"epochs": 10_000, "patience": 10_000}}
    (tmp_path / "splits.json").write_text(json.dumps(splits.record.to_json()))
    (tmp_path / "config.json").write_text(json.dumps(section(long, launcher="ray").to_json()))
    code = f"""
import json
from pathlib import Path
from components.contracts.data import Splits
from components.contracts.records import Stored
from components.ray_address import RayAddress
from components.training import TrainingConfig, train
here, root = Path({str(tmp_path)!r}), Path({str(root)!r})
config = TrainingConfig.model_validate_json((here / "config.json").read_text(), strict=True)
splits = Stored(Splits.read(json.loads((here / "splits.json").read_text())), root)
def progress(done, total, note=""):
    print(note, flush=True)
train(splits, root / "data", config, out=here / "out", cache=here / "cache", root=root, progress=progress, ray_address=RayAddress({cluster!r}))
"""
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    for line in run.stdout:
        if "epoch 3" in line:
            break
    going_on = workers()
    assert len(going_on) == 2
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert psutil.wait_procs(going_on, timeout=60)[1] == []
    left = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    time.sleep(1)
    assert left == {path: path.stat().st_mtime_ns for path in out.iterdir()}
