from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from components.contracts.errors import CheckpointMismatch, ConfigError, TamperedArtefact, TrainingDiverged
from components.fitting import Examples, FitResult, FittingConfig, fit
from components.hooks import LEFTOVERS, Checkpointing, Fitting, Hook, MetricLogging, ProgressReporting
from components.tasks.classification import Task

CONFIG = FittingConfig(epochs=4, batch_size=8, learning_rate=0.01, checkpoint_every_s=0)


def examples(n: int, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 6, generator=generator)
    return Examples(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 1).long())


TRAIN, VALID = examples(50, 1), examples(30, 2)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


class Killed(Exception):
    pass


class Remembering(Hook):
    """A hook that needs its state to go on: a mean of the weights, a count, and a stop after `epochs`."""

    def __init__(self, epochs: int = 99) -> None:
        self.epochs, self.count = epochs, 0

    def on_start(self, fitting: Fitting) -> None:
        self.model = fitting.model
        self.mean = next(fitting.model.parameters()).detach().clone()

    def on_step(self, fitting: Fitting) -> None:
        self.count += 1
        self.mean.lerp_(next(fitting.model.parameters()).detach(), 0.1)

    def on_epoch(self, fitting: Fitting) -> None:
        fitting.stopped |= fitting.epoch == self.epochs

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean, self.count = state["mean"], state["count"]


def noise(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)


def run(
    out: Path,
    config: FittingConfig = CONFIG,
    *,
    identity: str = "a",
    kill_at: int | None = None,
    train: Examples = TRAIN,
    hooks: Sequence[Hook] = (),
    **changes: Any,
) -> FitResult:
    out.mkdir(exist_ok=True)

    def progress(done: int, total: int, note: str = "") -> None:
        if kill_at is not None and done == kill_at and not note:
            raise Killed

    arguments: dict[str, Any] = {
        "checkpointing": Checkpointing(out, identity),
        "augment": noise,
        "hooks": (*hooks, ProgressReporting(progress, "accuracy")),
    } | changes
    model = arguments.pop("model", None) or network()
    return fit(model, lambda module, inputs: module(inputs), Task(), train, VALID, config, **arguments)


def bits(result: FitResult) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in result.best.items()}


def test_a_run_killed_at_any_step_ends_in_the_same_bits_and_so_do_its_hooks(tmp_path: Path) -> None:
    hook = Remembering()
    whole = run(tmp_path / "whole", hooks=[hook])
    for kills in ((1,), (2,), (7,), (8,), (13,), (14,), (20,), (28,), (3, 9, 10, 22)):
        out = tmp_path / str(kills)
        for kill_at in kills:
            with pytest.raises(Killed):
                run(out, kill_at=kill_at, hooks=[Remembering()])
        again = Remembering()
        resumed = run(out, hooks=[again])
        assert bits(resumed) == bits(whole), kills
        assert (resumed.history, resumed.best_epoch) == (whole.history, whole.best_epoch)
        assert (again.count, again.mean.tolist()) == (hook.count, hook.mean.tolist()), kills
    assert hook.count == 28


@pytest.mark.parametrize("epochs", [2, 99])
def test_a_finished_fit_is_taken_up_without_a_step(tmp_path: Path, epochs: int) -> None:
    """A hook may have stopped it."""
    whole = run(tmp_path / "out", hooks=[Remembering(epochs)])
    assert len(whole.history) == min(epochs, 4)
    again = run(tmp_path / "out", kill_at=7 * len(whole.history) + 1, hooks=[Remembering()])
    assert (bits(again), again.history) == (bits(whole), whole.history)
    written = list((tmp_path / "out").iterdir())
    assert {path.suffix for path in written} == {".safetensors", ".json"}
    assert all(any(path.match(pattern) for pattern in LEFTOVERS) for path in written)


def test_another_seed_gives_other_bits_and_global_state_is_left_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    other = CONFIG.model_copy(update={"seed": 1})
    assert bits(run(tmp_path / "a")) != bits(run(tmp_path / "b", other))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_checkpoint_of_another_config_or_of_other_hooks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "out", kill_at=10)
    with pytest.raises(CheckpointMismatch, match="another config or other data.*remove .* to train from the start"):
        run(tmp_path / "out", identity="b")
    with pytest.raises(
        CheckpointMismatch, match="other hooks .*expected .*2-Remembering.*remove .* to train from the start"
    ):
        run(tmp_path / "out", hooks=[Remembering()])


@pytest.mark.parametrize("where", ["progress-*", "state-*", "missing"])
def test_a_tampered_checkpoint_is_refused_before_it_is_parsed(tmp_path: Path, where: str) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "out", kill_at=10)
    (path,) = (tmp_path / "out").glob("state-*" if where == "missing" else where)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if where == "missing":
        path.unlink()
    with pytest.raises(TamperedArtefact, match="remove .* to train from the start"):
        run(tmp_path / "out")


def test_a_nan_loss_stops_the_run_at_once_and_is_not_saved(tmp_path: Path) -> None:
    broken = TRAIN.inputs.take(torch.arange(50), None)
    broken[17] = math.nan
    with pytest.raises(TrainingDiverged, match=r"nan at epoch 1, step \d+.*Lower training.fit.learning_rate") as first:
        run(tmp_path / "out", train=Examples(broken, TRAIN.targets))
    with pytest.raises(TrainingDiverged) as again:
        run(tmp_path / "out", train=Examples(broken, TRAIN.targets))
    assert str(again.value) == str(first.value)


def test_early_stopping_keeps_the_best_epoch(tmp_path: Path) -> None:
    config = FittingConfig(epochs=60, batch_size=8, learning_rate=0.5, patience=3, checkpoint_every_s=0)
    hook = Remembering()
    result = run(tmp_path / "out", config, hooks=[hook])
    losses = [row["valid_loss"] for row in result.history]
    assert len(losses) < 60
    assert result.best_epoch == losses.index(min(losses)) + 1
    assert len(losses) == result.best_epoch + 3
    assert all(torch.equal(tensor, result.best[name]) for name, tensor in hook.model.state_dict().items())


def test_every_epoch_reaches_the_sink_and_every_step_draws_other_random_numbers(tmp_path: Path) -> None:
    seen: list[int] = []
    drawn: list[float] = []

    class Sink:
        def log(self, epoch: int, metrics: Mapping[str, float]) -> None:
            assert metrics["valid_loss"] > 0
            seen.append(epoch)

    def augment(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        drawn.append(float(torch.rand((), generator=generator)))
        return inputs

    run(tmp_path / "out", hooks=[MetricLogging(Sink())], augment=augment)
    assert seen == [1, 2, 3, 4]
    assert len(set(drawn)) == len(drawn) == 28


def test_steps_see_a_view_augmented_then_mixed_and_the_valid_split_sees_none_of_it(tmp_path: Path) -> None:
    class Views:
        """Two views of a row: as it is, or with ten added."""

        def __len__(self) -> int:
            return 50

        def take(self, rows: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
            plain = TRAIN.inputs.take(rows, None)
            if generator is None:
                return plain
            return plain + 10 * torch.randint(0, 2, (len(rows), 1), generator=generator)

    mixed: list[torch.Tensor] = []
    shares_seen: list[torch.Tensor] = []

    def mix(inputs: torch.Tensor, targets: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        mixed.append(inputs)
        share = torch.rand(len(inputs), 1, generator=generator)
        whole = nn.functional.one_hot(targets, 3).float()
        return share * inputs + (1 - share) * inputs.flip(0), share * whole + (1 - share) * whole.flip(0)

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        shares_seen.append(targets)
        return nn.functional.cross_entropy(logits, targets) + 100

    views = Examples(Views(), TRAIN.targets)
    config = CONFIG.model_copy(update={"epochs": 1})
    result = run(tmp_path / "out", config, train=views, augment=lambda x, generator: x + 1000, mix=mix, loss=loss)
    added = torch.cat(mixed).mean(dim=1).sub(1000).div(10).round()
    assert sorted(set(added.tolist())) == [0, 1]
    assert all(shares.shape[1] == 3 and torch.allclose(shares.sum(1), torch.ones(len(shares))) for shares in shares_seen)
    assert result.history[0]["train_loss"] > 100 > result.history[0]["valid_loss"]
    with torch.no_grad():
        model = network()
        model.load_state_dict(result.best)
        expected = Task().loss(model.eval()(VALID.inputs.take(torch.arange(30), None)), VALID.targets)
    assert result.history[0]["valid_loss"] == pytest.approx(float(expected), rel=1e-6)


def test_balanced_sampling_draws_every_class_equally_often(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def mix(inputs: torch.Tensor, targets: torch.Tensor, _: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(targets)
        return inputs, targets

    rare = Examples(torch.randn(1000, 6), (torch.arange(1000) < 20).long())
    config = CONFIG.model_copy(update={"epochs": 2, "batch_size": 100})
    run(tmp_path / "out", config, train=rare, mix=mix, sampling="balanced")
    first, second = torch.cat(seen).reshape(2, 1000)
    # Six standard deviations of 1000 draws of a fair coin, which are 95.
    assert 405 < int(first.sum()) < 595
    assert not torch.equal(first, second)
    several = Examples(torch.randn(50, 6), torch.zeros(50, 3))
    with pytest.raises(ConfigError, match="one class each.*use sampling: shuffled"):
        run(tmp_path / "several", train=several, sampling="balanced")


def test_a_frozen_batch_norm_keeps_its_statistics_and_parameters_while_the_rest_trains(tmp_path: Path) -> None:
    model = network()
    seen: list[bool] = []
    model[1].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    result = run(tmp_path / "out", model=model, frozen=[model[0], model[1]])
    before = network().state_dict()
    moved = {name for name, value in result.best.items() if not torch.equal(value, before[name])}
    assert moved == {"4.weight", "4.bias"}
    assert not any(seen)
