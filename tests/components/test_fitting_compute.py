"""A fit in other precisions, in parts, with other layouts and compiled: near the plain one, and as exact to resume."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from components.compute import Compute
from components.contracts.errors import ConfigError, TrainingDiverged
from components.fitting import Examples, FitResult, FittingConfig, fit, predict
from components.hooks import Checkpointing, Fitting, Hook, ProgressReporting
from components.tasks.classification import Task

CONFIG = FittingConfig(epochs=3, batch_size=16, learning_rate=0.02, checkpoint_every_s=0, warmup_epochs=0, ema_decay=0.5)


def examples(n: int, seed: int) -> Examples:
    inputs = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Examples(inputs, (inputs[:, 0].mean((1, 2)) > 0).long() + (inputs[:, 1].mean((1, 2)) > 0.1).long())


TRAIN, VALID = examples(70, 1), examples(30, 2)


def network(*, normalised: bool = True) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        middle = [nn.BatchNorm2d(8)] if normalised else []
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), *middle, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        )


class Killed(Exception):
    pass


def run(
    out: Path,
    compute: Compute,
    *,
    config: FittingConfig = CONFIG,
    kill_at: int | None = None,
    hook: Hook | None = None,
    **changes: Any,
) -> FitResult:
    out.mkdir(exist_ok=True)

    def progress(done: int, total: int, note: str = "") -> None:
        if kill_at is not None and done == kill_at and not note:
            raise Killed

    arguments: dict[str, Any] = {"model": network()} | changes
    return fit(
        arguments.pop("model"),
        lambda module, inputs: module(inputs),
        Task(),
        TRAIN,
        VALID,
        config,
        checkpointing=Checkpointing(out, "a"),
        hooks=[*([hook] if hook else []), ProgressReporting(progress, "accuracy")],
        compute=compute,
        **arguments,
    )


def bits(result: FitResult) -> dict[str, bytes]:
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in result.best.items()}


def away(one: FitResult, other: FitResult) -> float:
    """How far two fits ended from each other, the largest over all weights."""
    return max(float((one.best[name].float() - value.float()).abs().max()) for name, value in other.best.items())


class Overflows(Hook):
    """A loss so large that its gradient overflows in fp16 until it is scaled less."""

    def __init__(self, factor: float) -> None:
        self.factor, self.scales = factor, list[float]()

    def on_start(self, fitting: Fitting) -> None:
        self.fitting = fitting

    def on_step(self, fitting: Fitting) -> None:
        assert fitting.scaler is not None
        self.scales.append(fitting.scaler.get_scale())

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # The gradient of the logits is of half precision on its way back.
        return nn.functional.cross_entropy(logits, targets) * self.factor


WAYS: Mapping[str, Compute] = {
    "bf16": Compute(precision="bf16"),
    "fp16": Compute(precision="fp16"),
    "parts": Compute(accumulate=3),
    "channels last": Compute(channels_last=True),
    "compiled": Compute(compile=True),
}


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow if way == "compiled" else ()) for way in WAYS])
def test_a_fit_comes_near_the_plain_one_and_resumes_to_its_own_bits(tmp_path: Path, way: str) -> None:
    plain = run(tmp_path / "plain", Compute())
    whole = run(tmp_path / "whole", WAYS[way])
    assert away(whole, plain) > 0
    losses = [[row["valid_loss"] for row in fitted.history] for fitted in (whole, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=0.03)
    assert [row.keys() for row in whole.history] == [row.keys() for row in plain.history]
    for kills in ((1,), (4, 5, 9)):
        out = tmp_path / str(kills)
        for kill_at in kills:
            with pytest.raises(Killed):
                run(out, WAYS[way], kill_at=kill_at)
        resumed = run(out, WAYS[way])
        assert (bits(resumed), resumed.history) == (bits(whole), whole.history), kills


def test_parts_of_a_batch_make_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    """Without batch normalisation, to rounding."""
    sizes: list[int] = []
    model = network(normalised=False)
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])) if module.training else None)
    whole = run(tmp_path / "whole", Compute(), model=network(normalised=False))
    parts = run(tmp_path / "parts", Compute(accumulate=4), model=model)
    assert away(parts, whole) < 1e-4
    assert sizes[:6] == [4, 4, 4, 4, 4, 4]
    assert sizes[16:19] == [2, 2, 2]  # of six that are left
    assert "micro_batches" not in parts.history[0]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_step_is_computed_in_the_precision_and_an_answer_in_fp32(
    tmp_path: Path, precision: Any, dtype: torch.dtype
) -> None:
    seen: set[tuple[bool, torch.dtype]] = set()
    model = network()
    model.register_forward_hook(lambda module, _, answer: seen.add((module.training, answer.dtype)))
    losses: set[torch.dtype] = set()

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses.add(logits.dtype)
        return nn.functional.cross_entropy(logits, targets)

    result = run(tmp_path / "out", Compute(precision=precision), model=model, loss=loss)
    assert seen == {(True, dtype), (False, torch.float32)}
    assert losses == {torch.float32}
    assert {value.dtype for value in result.best.values() if value.is_floating_point()} == {torch.float32}


def test_an_overflow_in_fp16_leaves_out_the_step_and_is_no_divergence(tmp_path: Path) -> None:
    """And a killed fit goes on with the scale that it had."""
    arguments: dict[str, Any] = {"config": CONFIG.model_copy(update={"epochs": 1, "ema_decay": 0.0})}
    fp16 = WAYS["fp16"]
    hook = Overflows(64.0)
    whole = run(tmp_path / "whole", fp16, hook=hook, loss=hook.loss, **arguments)
    assert "rate_halvings" not in whole.history[0]
    assert hook.scales[0] == 2**15
    assert hook.scales[-1] < 2**15
    for kill_at in (1, 2, 4):
        killed, rest = Overflows(64.0), Overflows(64.0)
        with pytest.raises(Killed):
            run(tmp_path / str(kill_at), fp16, hook=killed, loss=killed.loss, kill_at=kill_at, **arguments)
        resumed = run(tmp_path / str(kill_at), fp16, hook=rest, loss=rest.loss, **arguments)
        assert bits(resumed) == bits(whole)
        # The step before the kill was not saved.
        assert killed.scales[:-1] + rest.scales == hook.scales


def test_a_step_that_overflows_changes_nothing_but_the_scale(tmp_path: Path) -> None:
    hook, model = Overflows(1e9), network()
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(Killed):
        run(tmp_path / "out", WAYS["fp16"], hook=hook, loss=hook.loss, model=model, kill_at=3)
    assert hook.scales == [2**15, 2**14, 2**13]
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_a_gradient_that_overflows_at_any_scale_is_a_divergence_that_proposes_bf16(tmp_path: Path) -> None:
    hook = Overflows(1e30)
    config = CONFIG.model_copy(update={"epochs": 9})
    with pytest.raises(
        TrainingDiverged, match="the gradient's norm became .*Lower .*set training.compute.precision to bf16"
    ):
        run(tmp_path / "out", WAYS["fp16"], hook=hook, loss=hook.loss, config=config)
    assert min(hook.scales) == 1.0
    wrong = Overflows(math.nan)
    with pytest.raises(TrainingDiverged, match="the loss became nan"):
        run(tmp_path / "nan", WAYS["fp16"], hook=wrong, loss=wrong.loss)
    assert wrong.scales == []


def test_memory_that_is_not_enough_divides_the_parts_further(tmp_path: Path) -> None:
    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if len(logits) > 4:
            raise torch.OutOfMemoryError
        return nn.functional.cross_entropy(logits, targets)

    result = run(tmp_path / "out", Compute(accumulate=2), loss=loss)
    assert [row["micro_batches"] for row in result.history] == [4.0] * 3


def test_channels_last_lays_weights_and_their_state_so_after_a_resumption_too(tmp_path: Path) -> None:
    class Layouts(Hook):
        def on_step(self, fitting: Fitting) -> None:
            weight = fitting.model[0].weight  # type: ignore[index]
            tensors = [weight, weight.grad, *fitting.optimizer.state[weight].values()]
            self.found = {t.is_contiguous(memory_format=torch.channels_last) for t in tensors if t.ndim == 4}

    for kill_at in (3, None):
        layouts = Layouts()
        try:
            run(tmp_path / "out", WAYS["channels last"], hook=layouts, kill_at=kill_at)
        except Killed:
            assert kill_at
        assert layouts.found == {True}


def test_what_cannot_be_compiled_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> Any:
        raise NotImplementedError("no such backend")

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compiled(model, backend=refuses, dynamic=dynamic))
    with pytest.raises(
        ConfigError, match="training.compute.compile: torch.compile cannot compile this network here .*no such"
    ):
        run(tmp_path / "out", Compute(compile=True))


def test_answers_come_into_memory_in_fp32_wherever_the_network_is() -> None:
    model = network().double()
    found = predict(model, lambda module, inputs: module(inputs.double()), VALID.inputs, 8)
    assert (found.dtype, found.device.type, tuple(found.shape)) == (torch.float32, "cpu", (30, 3))
