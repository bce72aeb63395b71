from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from components.contracts.errors import CheckpointMismatch, TamperedArtefact, TrainingDiverged
from components.contracts.progress import MetricSink
from components.fitting import LEFTOVERS, PROGRESS, Examples, FitResult, FittingConfig, fit
from components.tasks.classification import Task

CONFIG = FittingConfig(epochs=4, batch_size=8, learning_rate=0.01, checkpoint_every_s=0)


def examples(n: int, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 6, generator=generator)
    return Examples(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 1).long())


TRAIN, VALID = examples(50, 1), examples(30, 2)


class Killed(Exception):
    pass


def noise(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)


def run(
    out: Path,
    config: FittingConfig = CONFIG,
    *,
    identity: str = "a",
    kill_at: int | None = None,
    train: Examples = TRAIN,
    sink: MetricSink | None = None,
) -> FitResult:
    out.mkdir(exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))

    def progress(done: int, total: int, note: str = "") -> None:
        if kill_at is not None and done == kill_at and not note:
            raise Killed

    return fit(
        model,
        lambda module, inputs: module(inputs),
        Task(),
        train,
        VALID,
        config,
        identity=identity,
        out=out,
        augment=noise,
        sink=sink,
        progress=progress,
    )


def bits(result: FitResult) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in result.best.items()}


def test_a_killed_run_ends_in_the_same_bits_wherever_it_was_killed(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    for kill_at in (1, 2, 7, 8, 13, 14, 20, 28):
        out = tmp_path / str(kill_at)
        with pytest.raises(Killed):
            run(out, kill_at=kill_at)
        resumed = run(out)
        assert bits(resumed) == bits(whole), kill_at
        assert resumed.history == whole.history
        assert resumed.best_epoch == whole.best_epoch


def test_a_run_killed_again_and_again_still_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    for kill_at in (3, 9, 10, 22):
        with pytest.raises(Killed):
            run(tmp_path / "out", kill_at=kill_at)
    assert bits(run(tmp_path / "out")) == bits(whole)


def test_another_seed_gives_other_bits(tmp_path: Path) -> None:
    other = CONFIG.model_copy(update={"seed": 1})
    assert bits(run(tmp_path / "a")) != bits(run(tmp_path / "b", other))


def test_the_global_generator_and_settings_are_left_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    run(tmp_path / "out")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "out", kill_at=10)
    with pytest.raises(CheckpointMismatch, match="another config or other data.*remove .* to train from the start"):
        run(tmp_path / "out", identity="b")


@pytest.mark.parametrize("where", ["pointer", "state", "missing"])
def test_a_tampered_checkpoint_is_refused_before_it_is_parsed(tmp_path: Path, where: str) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "out", kill_at=10)
    state = next((tmp_path / "out").glob("state-*.safetensors"))
    path = tmp_path / "out" / PROGRESS if where == "pointer" else state
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if where == "missing":
        path.unlink()
    with pytest.raises(TamperedArtefact, match="remove .* to train from the start"):
        run(tmp_path / "out")


def test_a_nan_loss_stops_the_run_at_once(tmp_path: Path) -> None:
    broken = TRAIN.inputs.clone()
    broken[17] = math.nan
    with pytest.raises(TrainingDiverged, match=r"nan at epoch 1, step \d+.*Lower training.fit.learning_rate"):
        run(tmp_path / "out", train=Examples(broken, TRAIN.targets))


def test_early_stopping_keeps_the_best_epoch(tmp_path: Path) -> None:
    config = FittingConfig(epochs=60, batch_size=8, learning_rate=0.5, patience=3, checkpoint_every_s=0)
    result = run(tmp_path / "out", config)
    losses = [row["valid_loss"] for row in result.history]
    assert len(losses) < 60
    assert result.best_epoch == losses.index(min(losses)) + 1
    assert len(losses) == result.best_epoch + 3


def test_every_epoch_reaches_the_sink(tmp_path: Path) -> None:
    seen: list[int] = []

    class Sink:
        def log(self, epoch: int, metrics: Mapping[str, float]) -> None:
            assert metrics["valid_loss"] > 0
            seen.append(epoch)

    run(tmp_path / "out", sink=Sink())
    assert seen == [1, 2, 3, 4]


def test_only_safetensors_and_json_are_written_and_all_of_it_serves_to_resume(tmp_path: Path) -> None:
    run(tmp_path / "out")
    written = list((tmp_path / "out").iterdir())
    assert {path.suffix for path in written} == {".safetensors", ".json"}
    assert all(any(path.match(pattern) for pattern in LEFTOVERS) for path in written)


def test_a_finished_fit_is_taken_up_without_a_step(tmp_path: Path) -> None:
    whole = run(tmp_path / "out")
    assert bits(run(tmp_path / "out", kill_at=1)) == bits(whole)


def test_every_step_draws_other_random_numbers(tmp_path: Path) -> None:
    drawn: list[float] = []

    def augment(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        drawn.append(float(torch.rand((), generator=generator)))
        return inputs

    model = nn.Linear(6, 3)
    fit(
        model,
        lambda module, inputs: module(inputs),
        Task(),
        TRAIN,
        VALID,
        CONFIG,
        identity="a",
        out=tmp_path,
        augment=augment,
    )
    assert len(set(drawn)) == len(drawn) == 28
