"""Who trains the trials of a search: shares of this machine, and places on a cluster that lost machines."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from searched import Formula, go, recipe_of, searching, told

from components import ray_cluster
from components.compute import Compute
from components.contracts.errors import ClusterUnavailable, ConfigError
from components.ray_address import RayAddress
from components.training import TrainingConfig
from flows.tuning import cluster as on_cluster
from flows.tuning import workers as here
from flows.tuning.trial import ITS_OWN, Place, Trainer
from flows.tuning.workers import expect_trainers
from flows.workspace.recipes import RunConfig, load_recipe
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace


def section(**compute: object) -> TrainingConfig:
    return TrainingConfig.model_validate({"backbone": "small_cnn", "compute": compute, "fit": {"batch_size": 32}})


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")


def test_workers_that_would_share_a_gpu_or_a_thread_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISIONLOOP_NUM_THREADS", "4")
    settings = read_settings(tmp_path)
    two = section(launcher="torchrun", processes=2)
    expect_trainers(two, settings, 2, ray=False)
    expect_trainers(section(), settings, 9, ray=False)
    with pytest.raises(
        ConfigError,
        match="^--workers: 3 workers of 2 processes each need 6 threads, and VISIONLOOP_NUM_THREADS gives 4; use fewer "
        "workers, or lower training.compute.processes$",
    ):
        expect_trainers(two, settings, 3, ray=False)
    gpus(monkeypatch, 2)
    for device in ("cuda", "auto"):
        expect_trainers(section(device=device), settings, 2, ray=False)
        with pytest.raises(
            ConfigError, match="^--workers: 3 workers need 3 GPUs, and this machine has 2; use fewer workers$"
        ):
            expect_trainers(section(device=device), settings, 3, ray=False)
    with pytest.raises(ConfigError, match="2 workers of 2 processes each need 4 GPUs, and this machine has 2"):
        expect_trainers(section(device="cuda", launcher="torchrun", processes=2), settings, 2, ray=False)


ANSWERING = """
import json, os
place, order = json.loads(input()), json.loads(input())
print(json.dumps({"result": {"state": "failed", "reason": os.environ["CUDA_VISIBLE_DEVICES"], "schema_version": 1}}))
"""


@pytest.mark.parametrize(("each", "seen", "expected"), [(1, "4,GPU-5,6", ["4", "GPU-5"]), (2, "", ["0,1", "2,3"])])
def test_each_worker_sees_gpus_of_its_own(
    monkeypatch: pytest.MonkeyPatch, each: int, seen: str, expected: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    start, run = (
        subprocess.Popen,
        SimpleNamespace(
            config=SimpleNamespace(
                training=section(device="cuda", launcher="torchrun" if each > 1 else "local", processes=each)
            ),
            compute=Compute("cuda:0", hardware="Some GPU"),
            workspace=SimpleNamespace(root="root"),
            data=SimpleNamespace(to_json=dict),
        ),
    )
    splits = SimpleNamespace(folder=Path("splits"))
    monkeypatch.setattr(subprocess, "Popen", lambda _, **how: start([sys.executable, "-c", ANSWERING], **how))
    place = Place.of(run, splits, 1)  # type: ignore[arg-type]
    with here.workers(place, 2, lambda _: None) as found:
        config = load_recipe("digits")
        told = [one.train(0, config, lambda _: True, lambda *_: None).reason for one in found]
    assert told == expected


def test_a_worker_with_another_gpu_than_the_search_trains_nothing(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer.__new__(Trainer)
    trainer.workspace = Workspace.find(workspace)
    trainer.settings, trainer.data = (
        read_settings(trainer.workspace.state),
        SimpleNamespace(  # type: ignore[assignment]
            digest=lambda: "d", dvc_hash="d"
        ),
    )
    trainer.place = Place(str(workspace), {}, "splits", 1, "cuda Other GPU", 1)
    gpus(monkeypatch, 1)
    config = load_recipe("smoke", ["training.compute.device=cuda"], workspace=workspace)
    with pytest.raises(
        ConfigError, match="a worker trains on Some GPU, and the search began on Other GPU: .*VISIBLE_DEVICES"
    ):
        trainer.train(0, config, lambda _: True, lambda *_: None)


class RayError(Exception):
    pass


class Cluster:
    """As much of Ray as the workers of a search ask: actors of this process, on machines that have so many places."""

    exceptions = SimpleNamespace(RayError=RayError)

    def __init__(self, *cpus: float, free: int, actor: Callable[[], Any]) -> None:
        self.cpus, self.free, self.actor = cpus, free, actor
        self.lock, self.actors = threading.Lock(), set[Any]()

    def nodes(self) -> list[dict[str, Any]]:
        gone = {"Alive": False, "Resources": {"CPU": 64.0}}
        return [gone, *({"Alive": True, "Resources": {"CPU": cpus}} for cpus in self.cpus)]

    def remote(self, **_: Any) -> Callable[[Any], Any]:
        return lambda _: SimpleNamespace(remote=lambda: Actor(self))

    def wait(self, asked: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        with self.lock:
            actor = asked[0].actor
            if not actor.placed and self.free:
                self.free, actor.placed = self.free - 1, True
        return (asked, []) if actor.placed else ([], asked)

    def get(self, asked: Any) -> Any:
        return asked.what()

    def kill(self, actor: Any) -> None:
        self.actors.remove(actor)

    def shutdown(self) -> None:
        pass


class Actor:
    """One whose machine may be lost: then nothing that it is asked is answered, and its place does not come back."""

    def __init__(self, cluster: Cluster) -> None:
        self.placed = False
        self.does = cluster.actor()
        cluster.actors.add(self)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.does, name)
        return SimpleNamespace(remote=lambda *given: SimpleNamespace(actor=self, what=lambda: method(*given)))


class There:
    """Answers as the process on a machine of the cluster does, by a formula; lost machines answer nothing."""

    def __init__(self, formula: Formula, lost: Callable[[int], bool]) -> None:
        self.formula, self.lost = formula, lost
        self.said: list[dict[str, Any]] = []
        self.gone = False

    def look(self, root: str, alike: Any) -> tuple[str, str]:
        assert Path(alike["shared"], "token").read_text() == alike["token"]
        return "a node", ""

    def start(self) -> None:
        pass

    def tell(self, order: dict[str, Any]) -> None:
        if "config" in order:
            if self.gone or self.lost(order["number"]):
                self.gone = True
                raise RayError("The actor died: its node was lost")
            config = RunConfig.model_validate_json(json.dumps(order["config"]), strict=True)
            result = self.formula.train(order["number"], config, lambda _: True, lambda *_: None)
            self.said = [*({"epoch": row} for row in result.history), {"result": result.to_json()}]

    def hear(self, _: float) -> dict[str, Any] | None:
        return self.said.pop(0)


@contextlib.contextmanager
def searched(
    root: Path, monkeypatch: pytest.MonkeyPatch, *cpus: float, free: int, lost: Callable[[int], bool]
) -> Iterator[tuple[Any, Cluster, list[Any], list[str]]]:
    """A search and its workers on such a cluster, asked for three."""
    lines: list[str] = []
    search = searching(root, recipe_of(root), lines=lines)
    ray = Cluster(*cpus, free=free, actor=lambda: There(Formula(search.space), lost))
    monkeypatch.setattr(on_cluster, "_PLACED_S", 0.2)
    monkeypatch.setattr(on_cluster, "_LOOKS_S", 0.01)
    monkeypatch.setattr(on_cluster, "expect_answers", lambda *_: None)
    monkeypatch.setattr(on_cluster, "join", lambda _: None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with on_cluster.cluster(RayAddress("head:1"), Place(str(root), {}, "splits", 4), 3, lines.append) as found:
        yield search, ray, found, lines


def test_a_search_on_a_cluster_goes_on_with_the_places_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[int] = []

    def second_is_lost(number: int) -> bool:
        if number == 2 and not lost:
            lost.append(number)
            ray.free = 0
            return True
        return False

    # Twelve processors, and two workers of four: each is on one machine.
    with searched(tmp_path, monkeypatch, 6, 6, free=3, lost=second_is_lost) as (search, ray, found, lines):
        assert len(found) == 2
        go(search, *found)
    assert [row[2] for row in told(search)] == ["complete"] * 14
    assert lost == [2]
    (line,) = [line for line in lines if "waits for the place of another worker" in line]
    assert "gave a worker no place within 0.2 s" in line
    assert ray.actors == set()


def test_a_full_cluster_has_fewer_workers_and_one_without_any_place_ends_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with searched(tmp_path, monkeypatch, 64, free=1, lost=lambda number: number > 2) as (search, _, found, lines):
        assert len(found) == 1
        assert any("The search goes on with fewer workers than 3" in line for line in lines)
        with pytest.raises(ClusterUnavailable, match="gave a worker no place within 0.2 s; is it full"):
            go(search, *found)
    assert [row[2] for row in told(search)] == ["complete"] * 3 + ["running"]
    with pytest.raises(ClusterUnavailable, match="no place"):
        with searched(tmp_path, monkeypatch, 64, free=0, lost=bool):
            pass
    with pytest.raises(ConfigError, match="no machine of the Ray cluster at head:1 has 4 processors for a worker"):
        with searched(tmp_path, monkeypatch, 3, 3, free=9, lost=bool):
            pass


def test_what_a_machine_of_a_cluster_lacks_is_no_fault_of_a_trial(tmp_path: Path) -> None:
    alike = {"shared": str(tmp_path / "elsewhere"), "token": "t", "versions": ray_cluster.versions()}
    node, problem = on_cluster.Remote().look(str(tmp_path), alike)
    assert node
    assert "does not see" in problem
    assert not issubclass(ClusterUnavailable, ITS_OWN)
