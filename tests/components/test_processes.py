"""Two processes train as one would: the same metrics, and the same bits however often one of them is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from small_splits import NETWORK, write_small_splits

from components.contracts.data import Splits
from components.contracts.errors import ConfigError, TrainingDiverged, WorkerLost
from components.contracts.records import Stored
from components.training import TrainingConfig, train

pytestmark = pytest.mark.slow
FIT = {"epochs": 2, "batch_size": 11, "learning_rate": 0.01, "checkpoint_every_s": 0}
"""Of 24 images two are left in the last batch, which no two processes can share."""
MOVING = [{"augmentation": "flip"}, {"augmentation": "mixup"}]
HEAD = {"trains": "head", "fit": FIT}
LAST = {"trains": {"last": 2}, "views": 2, "augmentations": MOVING, "sampling": "balanced", "fit": FIT | {"ema_decay": 0.9}}
EVERYTHING = {"trains": "all", "augmentations": MOVING, "fit": FIT | {"optimizer": "sgd", "clip_norm": 1.0}}
TWO = {"launcher": "torchrun", "processes": 2}
PHASES = (HEAD, LAST, EVERYTHING)
STEPS = 3 * 2
"""Of a phase."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Stored[Splits]]:
    root = tmp_path_factory.mktemp("world")
    return root, write_small_splits(root)


def section(*phases: Any, **compute: Any) -> TrainingConfig:
    values = {"backbone": "small_cnn", "backbone_settings": NETWORK, "weights": "start.safetensors"}
    return TrainingConfig.model_validate({**values, "phases": phases, "compute": compute})


def without_dropout(config: TrainingConfig) -> TrainingConfig:
    return config.model_copy(update={"backbone_settings": NETWORK | {"dropout": 0.0}})


def workers() -> list[psutil.Process]:
    """The processes that train together now, in the order of their ranks."""
    found = {}
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if "components.training_worker" in command and "torch.distributed.run" not in command:
                found[int(process.environ()["RANK"])] = process
        except (psutil.Error, KeyError):
            continue
    return [found[rank] for rank in sorted(found)]


def trained(
    world: tuple[Path, Stored[Splits]],
    out: Path,
    config: TrainingConfig,
    at: Mapping[int, Callable[[], object]] | None = None,
    **arguments: Any,
) -> Path:
    """Train into `out`; of all steps of all phases, when so many are done something happens."""
    root, splits = world
    out.mkdir(exist_ok=True)
    steps = 0

    def progress(done: int, total: int, note: str = "") -> None:
        nonlocal steps
        if total == STEPS and not note:
            steps += 1
            (at or {}).get(steps, lambda: None)()

    places: dict[str, Any] = {"out": out, "cache": root / "cache", "root": root, "num_threads": 2}
    train(splits, root / "data", config, **places, progress=progress, **arguments)
    assert workers() == []
    return out


def history(out: Path) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = json.loads((out / "history.json").read_text())
    return rows


def same_files(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in ("weights.safetensors", "history.json"))


def test_two_processes_measure_what_one_does(world: tuple[Path, Stored[Splits]], tmp_path: Path) -> None:
    """To rounding where nothing is drawn and no batch normalisation trains; else to 0.1 of a loss of about one.

    By plain descent: Adam makes as large a step of a gradient that is nothing but rounding as of any other.
    """
    plain = FIT | {"optimizer": "sgd", "learning_rate": 0.1}
    frozen = {"trains": "all", "batch_norm": "frozen", "fit": plain}
    moved = {"trains": "all", "fit": FIT | {"batch_size": 8}}
    for name, phase, tolerance, parts in (
        ("head", {"trains": "head", "fit": plain}, 1e-5, 1),
        ("frozen", frozen, 1e-5, 2),
        ("moved", moved, 0.1, 1),
    ):
        one = trained(world, tmp_path / f"{name}-1", without_dropout(section(phase)))
        two = trained(world, tmp_path / f"{name}-2", without_dropout(section(phase, **TWO, accumulate=parts)))
        for row, expected in zip(history(two), history(one), strict=True):
            for key in ("train_loss", "valid_loss"):
                assert row[key] == pytest.approx(expected[key], abs=tolerance), (name, key)
            assert row["learning_rate"] == expected["learning_rate"]
        if tolerance < 0.1:
            before, after = (load_file(out / "weights.safetensors") for out in (one, two))
            assert all(torch.allclose(value, after[key], atol=1e-5) for key, value in before.items())


@pytest.fixture(scope="module")
def whole(world: tuple[Path, Stored[Splits]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training by two processes ends in that nobody killed."""
    return trained(world, tmp_path_factory.mktemp("whole"), section(*PHASES, **TWO))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_and_the_next_one_ends_in_the_same_bits(
    world: tuple[Path, Stored[Splits]], tmp_path: Path, whole: Path, rank: int
) -> None:
    out, told = tmp_path / "out", list[str]()
    for steps in (1, 4, 5, 4):  # of what is left: in every phase, within and between epochs
        with pytest.raises(WorkerLost, match=r"was killed before its end .*run again to go on") as lost:
            trained(world, out, section(*PHASES, **TWO), at={steps: lambda: workers()[rank].kill()})
        told.append(str(lost.value))
        until = time.monotonic() + 10
        while workers():
            assert time.monotonic() < until, "processes go on"
    trained(world, out, section(*PHASES, **TWO))
    assert same_files(out, whole)
    assert len(set(told)) == 4  # each names another process


def test_a_run_that_is_killed_leaves_nobody_who_writes_and_goes_on_to_the_same_bits(
    world: tuple[Path, Stored[Splits]], tmp_path: Path, whole: Path
) -> None:
    root, splits = world
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "splits.json").write_text(json.dumps(splits.record.to_json()))
    (tmp_path / "config.json").write_text(json.dumps(section(*PHASES, **TWO).to_json()))
    code = f"""
import json
from pathlib import Path
from components.contracts.data import Splits
from components.contracts.records import Stored
from components.training import TrainingConfig, train
here, root = Path({str(tmp_path)!r}), Path({str(root)!r})
config = TrainingConfig.model_validate_json((here / "config.json").read_text(), strict=True)
splits = Stored(Splits.read(json.loads((here / "splits.json").read_text())), root)
def progress(done, total, note=""):
    print(done, total, note, flush=True)
train(splits, root / "data", config, out=here / "out", cache=root / "cache", root=root, progress=progress)
"""
    for steps in (2, 5):
        run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert run.stdout is not None
        seen = 0
        for line in run.stdout:
            seen += line.split()[1] == str(STEPS)
            if seen == steps:
                break
        going_on = workers()
        assert len(going_on) == 2
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        gone, alive = psutil.wait_procs(going_on, timeout=10)
        assert (len(gone), alive) == (2, [])
        left = {path: path.stat().st_mtime_ns for path in out.iterdir()}
        time.sleep(1)
        assert left == {path: path.stat().st_mtime_ns for path in out.iterdir()}
        run.stdout.close()
    trained(world, out, section(*PHASES, **TWO))
    assert same_files(out, whole)


def test_what_one_process_alone_meets_ends_all_of_them_with_its_error(
    world: tuple[Path, Stored[Splits]], tmp_path: Path
) -> None:
    wild = {"trains": "all", "fit": {**FIT, "learning_rate": 1e30, "warmup_epochs": 0}}
    with pytest.raises(TrainingDiverged, match=r"2 times.*ower training.phases.0.fit.learning_rate"):
        trained(world, tmp_path / "wild", section(wild, **TWO))
    folder = tmp_path / "plugins" / "losses"
    folder.mkdir(parents=True)
    (folder / "greedy.py").write_text(GREEDY)
    from components import plugins

    plugins.use_workspace(folder.parent)
    try:
        greedy = {"trains": "all", "loss": {"loss": "greedy"}, "fit": FIT}
        with pytest.raises(
            ConfigError, match=r"training.compute.accumulate: memory is not enough .* 2 processes.*set it to 2"
        ):
            trained(world, tmp_path / "greedy", section(greedy, **TWO), plugin_folder=folder.parent)
        assert workers() == []
    finally:
        plugins.use_workspace(None)


GREEDY = '''"""A loss that needs more memory than one of the processes has."""

from pydantic import BaseModel, ConfigDict


class Loss(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def takes_shares(self):
        return False

    def loss(self, logits, targets, *, counts):
        import torch

        def full(*_):
            raise torch.OutOfMemoryError("no room")

        if torch.distributed.get_rank() == 1:
            torch.Tensor.backward = full
        return torch.nn.functional.cross_entropy(logits, targets)
'''


def test_no_picture_is_computed_twice(world: tuple[Path, Stored[Splits]], tmp_path: Path) -> None:
    """The first process fills the cache while the other waits, and then finds all of it."""
    root, splits = world
    out, cache = tmp_path / "out", tmp_path / "cache"
    out.mkdir()
    places: dict[str, Any] = {"out": out, "cache": cache, "root": root}
    train(splits, root / "data", section(LAST, **TWO), **places, num_threads=2)
    segments = [load_file(path)["names"] for path in cache.glob("maps/*/*/*.safetensors")]
    # 24 pictures in two views, and 12 in one.
    assert sum(map(len, segments)) == 24 * 2 + 12


def test_more_processes_than_the_data_or_the_threads_allow_are_refused_before_any_work(
    world: tuple[Path, Stored[Splits]], tmp_path: Path
) -> None:
    many = {**FIT, "batch_size": 64}
    with pytest.raises(
        ConfigError, match=r"training.compute.processes: a batch of 24 images .*the train split.* by 13 proc"
    ):
        train(
            world[1],
            world[0] / "data",
            section({"trains": "all", "fit": many}, launcher="torchrun", processes=13),
            out=tmp_path,
            cache=tmp_path,
            root=world[0],
            num_threads=16,
        )
    with pytest.raises(
        ConfigError, match="3 processes share 2 threads, and each needs one; lower it, or raise VISIONLOOP_NUM"
    ):
        trained(world, tmp_path / "threads", section(HEAD, launcher="torchrun", processes=3))
