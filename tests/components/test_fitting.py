from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.optim import lr_scheduler

from components import memory
from components.contracts.errors import CheckpointMismatch, ConfigError, TamperedArtefact, TrainingDiverged
from components.contracts.progress import silent
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
        self.last = {name: value.numpy().tobytes() for name, value in fitting.model.state_dict().items()}
        fitting.stopped |= fitting.epoch == self.epochs

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean, self.count = state["mean"], state["count"]


class Faults(Hook):
    """A loss that is no number once, and a batch that is too large for the memory: at an epoch and step, until recovered."""

    def __init__(self, nan_at: tuple[int, int] | None = None, full_at: tuple[int, int] | None = None) -> None:
        self.nan_at, self.full_at, self.notes = nan_at, full_at, list[str]()

    def on_start(self, fitting: Fitting) -> None:
        self.fitting = fitting

    def on_fault(self, fitting: Fitting, note: str) -> None:
        self.notes.append(note)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        place = (self.fitting.epoch, self.fitting.step)
        if place == self.full_at and len(logits) > 4:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        value = nn.functional.cross_entropy(logits, targets)
        return value * math.nan if place == self.nan_at and self.fitting.halvings == 0 else value


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


def mixup(inputs: torch.Tensor, targets: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    share = torch.rand(len(inputs), 1, generator=generator)
    whole = nn.functional.one_hot(targets, 3).float()
    return share * inputs + (1 - share) * inputs.flip(0), share * whole + (1 - share) * whole.flip(0)


def fitted_as(**changes: object) -> FittingConfig:
    return FittingConfig.model_validate(CONFIG.to_json() | changes)


def faulty() -> dict[str, Any]:
    faults = Faults(nan_at=(1, 3), full_at=(2, 4))
    return {"hooks": [faults], "loss": faults.loss, "config": fitted_as(optimizer="sgd", ema_decay=0.9)}


WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "adamw": dict,
    "sgd, one cycle": lambda: {"config": fitted_as(optimizer="sgd", nesterov=True, schedule="one_cycle")},
    "ema, balanced, mixed": lambda: {"config": fitted_as(ema_decay=0.9), "sampling": "balanced", "mix": mixup},
    "faults": faulty,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_killed_at_any_step_ends_in_the_same_bits_and_so_do_its_hooks(tmp_path: Path, way: str) -> None:
    def again(out: Path, **changes: Any) -> tuple[FitResult, Remembering]:
        hook, arguments = Remembering(), WAYS[way]()
        return run(out, hooks=[hook, *arguments.pop("hooks", [])], **arguments, **changes), hook

    whole, hook = again(tmp_path / "whole")
    for kills in ((1,), (7,), (8,), (28,), (3, 9, 10, 18, 22)):
        out = tmp_path / str(kills)
        for kill_at in kills:
            with pytest.raises(Killed):
                again(out, kill_at=kill_at)
        resumed, resumed_hook = again(out)
        assert bits(resumed) == bits(whole), kills
        assert (resumed.history, resumed.best_epoch) == (whole.history, whole.best_epoch)
        assert (resumed_hook.count, resumed_hook.mean.tolist()) == (hook.count, hook.mean.tolist()), kills
    assert hook.count == 28
    recovered = [(row.get("rate_halvings", 0), row.get("micro_batches", 1)) for row in whole.history]
    assert recovered == ([(0, 1), (1, 1), (1, 2), (1, 2)] if way == "faults" else [(0, 1)] * 4)


def test_a_fit_of_a_first_recipe_is_the_textbook_loop_bit_for_bit(tmp_path: Path) -> None:
    """Seeds, order of draws, AdamW, warm-up and cosine: what is drawn or rounded otherwise moves every golden weight."""

    def drawn(*place: int) -> torch.Generator:
        seed = 0
        for part in place:
            seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
        return torch.Generator().manual_seed(seed)

    model, inputs = network(), TRAIN.inputs.take(torch.arange(50), None)
    split = [[p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim <= 1]]
    optimizer = torch.optim.AdamW(
        [{"params": params, "weight_decay": d} for params, d in zip(split, (0.01, 0), strict=True)]
    )
    with torch.random.fork_rng():
        for step in range(28):
            chosen = torch.randperm(50, generator=drawn(0, step // 7))[step % 7 * 8 : step % 7 * 8 + 8]
            rate = 0.01 * 0.5 * (1 + math.cos(math.pi * (step - 7) / 21)) if step >= 7 else 0.01 * (step + 1) / 8
            for group in optimizer.param_groups:
                group["lr"] = rate
            generator = drawn(0, step // 7, step % 7)
            batch = noise(inputs[chosen], generator)
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(batch), TRAIN.targets[chosen]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    found = run(tmp_path / "out", hooks=[hook := Remembering()])
    assert len(found.history) == 4
    assert hook.last == {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


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
        CheckpointMismatch, match="other hooks .*expected .*1-Remembering.*remove .* to train from the start"
    ):
        run(tmp_path / "out", hooks=[Remembering()])


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("where", ["progress-*", "state-1-00001-0000000-*", "state-1-00001-0000003-*"])
def test_a_tampered_checkpoint_is_refused_before_it_is_parsed(tmp_path: Path, where: str, missing: bool) -> None:
    """The pointer, the state at the start of the epoch, and the last one; without a pointer there is no checkpoint."""
    with pytest.raises(Killed):
        run(tmp_path / "out", kill_at=11)
    (path,) = (tmp_path / "out").glob(where)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if missing:
        path.unlink()
    if missing and where == "progress-*":
        assert len(run(tmp_path / "out").history) == 4
        return
    with pytest.raises(TamperedArtefact, match="remove .* to train from the start"):
        run(tmp_path / "out")


@pytest.mark.parametrize("what", ["loss", "gradient", "valid loss"])
def test_what_is_never_finite_stops_the_run_after_two_halvings_and_is_not_saved(tmp_path: Path, what: str) -> None:
    arguments: dict[str, Any] = {}
    if what == "loss":
        broken = TRAIN.inputs.take(torch.arange(50), None)
        broken[17] = math.nan
        arguments["train"] = Examples(broken, TRAIN.targets)
    elif what == "gradient":
        # The root of nothing is nothing, and its slope there is infinite.
        arguments["loss"] = lambda logits, _: (logits * 0).abs().sum().sqrt()
    else:
        arguments["config"] = fitted_as(learning_rate=1e30, epochs=1, batch_size=64)
    said: list[str] = []
    for _ in range(2):
        with pytest.raises(TrainingDiverged, match=rf"^the {what}.* became (nan|inf) at epoch 1.*2 times") as error:
            run(tmp_path / "out", hooks=[faults := Faults()], setting="training.phases.1.fit", **arguments)
        assert "Lower training.phases.1.fit.learning_rate" in str(error.value)
        said += [*faults.notes, str(error.value)]
    # What was resumed had halved the rate already.
    assert said[-1] == said[2]
    assert all("half the learning rate" in note for note in said[:2])


def test_a_fit_that_diverges_once_is_from_there_the_fit_of_half_the_rate(tmp_path: Path) -> None:
    faults, told = Faults(nan_at=(0, 5)), list[str]()
    progress = ProgressReporting(lambda done, total, note="": told.append(note), "accuracy", "phase 2, ")
    config = fitted_as(optimizer="sgd", ema_decay=0.9)
    whole = run(tmp_path / "whole", config, hooks=[hook := Remembering(), faults, progress], loss=faults.loss)
    half = config.model_copy(update={"learning_rate": config.learning_rate / 2})
    expected = run(tmp_path / "half", half, hooks=[expected_hook := Remembering()])
    assert bits(whole) == bits(expected)
    assert (hook.count, hook.mean.tolist()) == (expected_hook.count, expected_hook.mean.tolist())
    assert whole.history == [{**row, "rate_halvings": 1.0} for row in expected.history]
    notes = [note for note in told if note and "valid" not in note]
    assert notes == [
        "phase 2, epoch 1",
        "phase 2, the loss became nan at epoch 1, step 6: back to the start of the epoch with half the learning rate",
    ]


def test_a_fit_that_is_taken_up_says_in_which_epoch(tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(Killed):
        run(tmp_path / "fit", kill_at=10, hooks=[ProgressReporting(silent, "accuracy")])  # of seven steps an epoch
    run(tmp_path / "fit", hooks=[ProgressReporting(lambda done, total, note="": told.append(note), "accuracy")])
    assert told[0] == "epoch 2"


def test_a_batch_that_memory_does_not_hold_is_computed_in_parts_with_the_same_step(tmp_path: Path) -> None:
    plain = [nn.Sequential(nn.Linear(6, 3)) for _ in range(2)]
    plain[1].load_state_dict(plain[0].state_dict())
    faults = Faults(full_at=(0, 2))
    parts = run(tmp_path / "parts", model=plain[0], hooks=[faults], loss=faults.loss)
    whole = run(tmp_path / "whole", model=plain[1])
    assert all(torch.allclose(parts.best[name], value, atol=1e-5) for name, value in whole.best.items())
    assert [row["micro_batches"] for row in parts.history] == [2.0] * 4
    (note,) = faults.notes
    assert "a batch of 8: back to the start of the epoch, every batch in 2 parts" in note

    def full(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError(f"no room for {len(logits)}")

    with pytest.raises(ConfigError, match="in 4 parts.*end other programs, or choose smaller images"):
        run(tmp_path / "full", hooks=[again := Faults()], loss=full)
    assert len(again.notes) == 2
    with pytest.raises(RuntimeError, match="another"):
        run(tmp_path / "other", mix=lambda *_: (_ for _ in ()).throw(RuntimeError("another error")))


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
        return mixup(inputs, targets, generator)

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
    # No gradient was computed for them, and the next fit may train them.
    assert [name for name, value in model.named_parameters() if value.grad is not None] == ["4.weight", "4.bias"]
    assert all(value.requires_grad for value in model.parameters())


def scheduled(name: str, optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> lr_scheduler.LRScheduler:
    """Torch's own schedule of 12 epochs with `steps` steps each."""
    rise = lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), 1.0, warmup) if warmup else None
    if name == "one_cycle":
        return lr_scheduler.OneCycleLR(optimizer, 0.1, 12 * steps, cycle_momentum=False)
    if name == "cyclical":
        return lr_scheduler.CyclicLR(optimizer, 0.025, 0.1, 2 * steps, cycle_momentum=False)
    if name == "constant":
        return rise or lr_scheduler.ConstantLR(optimizer, 1.0)
    if name == "step":
        falls = lr_scheduler.StepLR(optimizer, 5 * steps, 0.3)
        return lr_scheduler.ChainedScheduler([rise, falls]) if rise else falls
    falling = lr_scheduler.CosineAnnealingLR(optimizer, 12 * steps - warmup)
    return lr_scheduler.SequentialLR(optimizer, [rise, falling], [warmup]) if rise else falling


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize(
    ("changes", "warmup_epochs"),
    [
        ({"schedule": "cosine"}, 0),
        ({"schedule": "cosine"}, 2),
        ({"schedule": "constant"}, 2),
        ({"schedule": "step", "step_epochs": 5, "step_factor": 0.3}, 2),
        ({"schedule": "step", "step_epochs": 5, "step_factor": 0.3}, 0),
        ({"schedule": "one_cycle"}, None),
        ({"schedule": "cyclical", "cycle_epochs": 4}, None),
    ],
)
def test_schedules_are_torchs_own(changes: dict[str, Any], warmup_epochs: int | None) -> None:
    own = {} if warmup_epochs is None else {"warmup_epochs": warmup_epochs}
    config = FittingConfig.model_validate({"epochs": 12, "learning_rate": 0.1, **changes, **own})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = scheduled(changes["schedule"], optimizer, 7, 7 * (warmup_epochs or 0))
    expected = []
    for _ in range(12 * 7):
        expected.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert [config.rate(step, 7) for step in range(12 * 7)] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_fit_of_one_step_does_not_fall_before_it_begins() -> None:
    rates = {
        schedule: FittingConfig.model_validate({"epochs": 1, "learning_rate": 1, "schedule": schedule}).rate(0, 1)
        for schedule in ("cosine", "constant", "step", "one_cycle", "cyclical")
    }
    assert rates == {"cosine": 0.5, "constant": 0.5, "step": 0.5, "one_cycle": 1, "cyclical": 0.25}


def test_keys_that_do_nothing_are_refused_and_new_ones_keep_the_digest_of_old_fits() -> None:
    for changes, message in (
        ({"momentum": 0.5}, "momentum has an effect with optimizer: sgd, not with adamw"),
        ({"step_epochs": 3}, "step_epochs has an effect with schedule: step, not with cosine"),
        ({"schedule": "one_cycle", "warmup_epochs": 2}, "warmup_epochs has an effect with .*, not with one_cycle"),
        ({"optimizer": "sgd", "momentum": 0, "nesterov": True}, "raise momentum or remove nesterov"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"learning_rate": 1e31}, "less than or equal to"),
    ):
        with pytest.raises(ValidationError, match=message):
            FittingConfig.model_validate(changes)
    assert FittingConfig().to_json().keys() == {
        "schema_version",
        "epochs",
        "batch_size",
        "learning_rate",
        "weight_decay",
        "warmup_epochs",
        "patience",
        "checkpoint_every_s",
        "seed",
    }
    config = fitted_as(optimizer="sgd", ema_decay=0.5)
    assert FittingConfig.read(config.to_json()) == config


def moved(tmp_path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """How far each parameter goes in one step of SGD on a batch that is larger than the data."""
    ways: dict[str, Any] = {"optimizer": "sgd", "schedule": "constant", "warmup_epochs": 0, "weight_decay": 0}
    arguments = {key: changes.pop(key) for key in ("groups", "model") if key in changes}
    config = fitted_as(epochs=1, batch_size=1000, **ways, **changes)
    out = tmp_path / str(len(list(tmp_path.iterdir())))
    found = run(out, config, **arguments).best
    return {name: found[name] - before.detach() for name, before in network().named_parameters()}


def test_layer_decay_slows_the_first_blocks_and_clipping_shortens_the_whole_gradient(tmp_path: Path) -> None:
    plain = moved(tmp_path)
    model = network()
    groups = [list(model[0].parameters()), list(model[1].parameters())]
    slowed = moved(tmp_path, layer_decay=0.5, groups=[*groups, list(model[4].parameters())], model=model)
    for name, value in plain.items():
        factor = {"0": 0.25, "1": 0.5, "4": 1.0}[name[0]]
        assert torch.allclose(slowed[name], factor * value, atol=1e-7), name
    clipped = torch.cat([value.flatten() for value in moved(tmp_path, clip_norm=0.1).values()])
    whole = torch.cat([value.flatten() for value in plain.values()])
    assert float(clipped.norm()) == pytest.approx(CONFIG.learning_rate * 0.1, rel=2e-3)
    assert float(whole.norm()) > 0.2 * CONFIG.learning_rate
    assert float(nn.functional.cosine_similarity(clipped, whole, dim=0)) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ConfigError, match="training.fit.layer_decay: 0.5 .* blocks .* not known; remove it"):
        moved(tmp_path, layer_decay=0.5)
    with pytest.raises(ConfigError, match="nothing of the network trains"):
        moved(tmp_path, model=network().requires_grad_(False))


def test_the_mean_of_the_weights_is_measured_and_kept_with_the_models_own_statistics(tmp_path: Path) -> None:
    class Steps(Hook):
        def on_start(self, fitting: Fitting) -> None:
            self.mean = [value.detach().clone() for value in fitting.model.parameters()]

        def on_step(self, fitting: Fitting) -> None:
            decay = min(0.5, (1 + fitting.step) / (10 + fitting.step))
            now = [value.detach() for value in fitting.model.parameters()]
            self.mean = [decay * old + (1 - decay) * new for old, new in zip(self.mean, now, strict=True)]
            self.buffers = {name: value.clone() for name, value in fitting.model.named_buffers()}

    result = run(tmp_path / "out", fitted_as(ema_decay=0.5, epochs=1), hooks=[steps := Steps()])
    names = [name for name, _ in network().named_parameters()]
    assert all(torch.allclose(result.best[n], value, atol=1e-6) for n, value in zip(names, steps.mean, strict=True))
    assert all(torch.equal(result.best[name], value) for name, value in steps.buffers.items())
    model = network()
    model.load_state_dict(result.best)
    with torch.no_grad():
        expected = Task().loss(model.eval()(VALID.inputs.take(torch.arange(30), None)), VALID.targets)
    assert result.history[0]["valid_loss"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("model", "frozen", "expected"),
    [
        (network(), False, [8, 8, 8, 8, 8, 9]),
        (network(), True, [8, 8, 8, 8, 8, 8, 1]),
        (nn.Sequential(nn.Linear(6, 3)), False, [8, 8, 8, 8, 8, 8, 1]),
    ],
    ids=["batch norm", "frozen batch norm", "none"],
)
def test_a_single_example_that_is_left_joins_the_batch_before_it_where_batch_norm_trains(
    tmp_path: Path, model: nn.Sequential, frozen: bool, expected: list[int]
) -> None:
    sizes: list[int] = []

    def mix(inputs: torch.Tensor, targets: torch.Tensor, _: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(inputs))
        return inputs, targets

    run(
        tmp_path / "out",
        fitted_as(epochs=1),
        model=model,
        train=examples(49, 1),
        mix=mix,
        frozen=[model[1]] if frozen else [],
    )
    assert sizes == expected


@pytest.mark.parametrize(("n", "batch_size"), [(1, 8), (4, 1)])
def test_batch_norm_on_one_example_is_an_error_that_says_what_to_do(tmp_path: Path, n: int, batch_size: int) -> None:
    with pytest.raises(ConfigError, match="training.fit.batch_size: batch normalisation .* one image; raise it"):
        run(tmp_path / "out", fitted_as(batch_size=batch_size), train=examples(n, 1))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives every large piece of memory back at once")
def test_memory_that_is_freed_stays_until_the_end_of_a_fit_and_no_longer() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    size = 400 << 20
    before = resident()
    with memory.reused():
        piece = torch.zeros(size // 4)
        del piece
        assert resident() - before > size * 0.9
    assert resident() - before < size * 0.1
