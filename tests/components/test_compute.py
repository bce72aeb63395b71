"""On what a training computes: what is refused, what a recipe's digest holds, and that nothing mixes devices."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import GPU, fake_gpu
from pydantic import ValidationError
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from torch._subclasses.fake_tensor import DataDependentOutputException

from components import fitting, phases, plugins
from components.checkpoints import assemble
from components.compute import Compute, ComputeConfig, resolve
from components.contracts.errors import ConfigError
from components.fitting import Examples
from components.hooks import Checkpointing
from components.phases import Phase
from components.training import TrainingConfig, check, expect_enough, fit_phase

ROOT = Path()


def section(**compute: object) -> TrainingConfig:
    fit = {"batch_size": 32}
    return TrainingConfig.model_validate({"backbone": "small_cnn", "compute": compute, "fit": fit})


def a_gpu(monkeypatch: pytest.MonkeyPatch, *, generation: int = 9) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: generation >= 8)


def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_what_is_left_at_its_default_is_left_out_and_what_is_said_reads_back() -> None:
    plain = section()
    assert "compute" not in plain.to_json()
    assert plain.digest() == TrainingConfig.model_validate({"backbone": "small_cnn", "fit": {"batch_size": 32}}).digest()
    said = section(device="auto", precision="bf16", accumulate=4, channels_last=True, compile=True)
    assert TrainingConfig.model_validate_json(json.dumps(said.to_json()), strict=True) == said
    assert said.to_json()["compute"]["accumulate"] == 4
    assert said.digest() != plain.digest()


def test_settings_that_cannot_go_together_are_refused_in_the_recipe() -> None:
    with pytest.raises(ValidationError, match="fp16 is for GPUs, and device is cpu; use bf16 or fp32, or set device"):
        section(precision="fp16")
    with pytest.raises(ConfigError, match=r"training.compute.accumulate: a batch of 32 images \(training.fit: batch_size\)"):
        check(section(accumulate=17), ROOT)
    check(section(accumulate=16), ROOT)
    expect_enough(section(accumulate=16), 32)
    with pytest.raises(ConfigError, match=r"a batch of 31 images \(training.fit: the train split\) cannot .* in 16 parts"):
        expect_enough(section(accumulate=16), 31)
    expect_enough(section(), 1)


def test_a_gpu_that_is_not_there_is_an_error_and_auto_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    monkeypatch.setattr("components.compute.gpu_driver", lambda: "")
    with pytest.raises(
        ConfigError, match=r"^training.compute.device is cuda, and torch finds no GPU here .*driver: none\); train where one"
    ):
        resolve(ComputeConfig(device="cuda"))
    assert resolve(ComputeConfig(device="auto")) == Compute()
    with pytest.raises(ConfigError, match="precision: fp16 is for GPUs, and device: auto finds none here"):
        resolve(ComputeConfig(device="auto", precision="fp16"))
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="this torch was built without CUDA"):
        resolve(ComputeConfig(device="cuda"))


def test_a_gpu_is_named_in_the_key_and_says_that_it_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Compute().key, Compute().told) == ("", "")
    assert resolve(ComputeConfig(precision="bf16", accumulate=2)).told == "the processor, in bf16, every batch in 2 parts"
    a_gpu(monkeypatch)
    for device in ("auto", "cuda"):
        found = resolve(ComputeConfig(device=device, precision="fp16"))
        assert (found.device, found.key) == ("cuda:0", "cuda Some GPU")
        assert found.told == "Some GPU, in fp16, not exact to the bit"
    assert resolve(ComputeConfig()).key == ""
    a_gpu(monkeypatch, generation=7)
    with pytest.raises(ConfigError, match="the GPU here, Some GPU, does not compute in bf16; use fp16 or fp32"):
        resolve(ComputeConfig(device="cuda", precision="bf16"))


def test_compiling_without_a_compiler_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ConfigError, match=r"training.compute.compile: torch.compile needs a C\+\+ compiler .* install it"):
        resolve(ComputeConfig(compile=True))
    a_gpu(monkeypatch)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(ConfigError, match="needs Triton on a GPU"):
        resolve(ComputeConfig(compile=True, device="cuda"))


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_the_fake_gpu_refuses_what_mixes_devices() -> None:
    with fake_gpu():
        there = torch.empty(3, 4, device=GPU)
        with pytest.raises(RuntimeError, match="on the same device, but found at least two devices"):
            torch.where(torch.ones(3, 1) > 0, there, there)


@pytest.mark.parametrize("name", plugins.shipped("augmentations"))
def test_an_augmentation_draws_in_memory_and_computes_where_the_images_lie(name: str) -> None:
    augmentation = plugins.load("augmentations", name)
    for seed in range(6):  # of the draws, a few choose another operation
        with fake_gpu():
            images = torch.empty(8, 24, 32, 3, dtype=torch.uint8, device=GPU)
            if augmentation.mixes:
                shares = torch.empty(8, 5, device=GPU)
                images, shares = augmentation.mix(images, shares, seeded(seed), channels_last=True)
                assert (shares.device.type, tuple(shares.shape)) == (GPU, (8, 5))
            else:
                images = augmentation.change(images, seeded(seed))
                assert images.dtype == torch.uint8
            assert (images.device.type, tuple(images.shape)) == (GPU, (8, 24, 32, 3))


@pytest.mark.parametrize("loss", [None, *plugins.shipped("losses")])
def test_a_step_mixes_no_devices_up_to_the_first_look_at_its_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str | None
) -> None:
    """Pictures reach the device as uint8, are changed and mixed there; targets and weights of classes are there, too."""
    # What only a driver can do: the state of a GPU's generator, and moving parameters, which are made there below.
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    monkeypatch.setattr(fitting, "_place", lambda model, compute: None)
    task: Any = plugins.load("tasks", "classification")
    backbone = plugins.load("backbones", "small_cnn", {"image_size": 16, "width": 4, "embedding_dim": 8})
    mixing = [{"augmentation": "mixup"}] if loss in (None, "cross_entropy") else []
    chosen = [{"augmentation": "flip"}, {"augmentation": "affine"}, *mixing]
    phase = Phase.model_validate({"trains": "all", "augmentations": chosen, "loss": loss and {"loss": loss}})
    seen: list[tuple[str, torch.dtype, tuple[int, ...]]] = []

    def change(augmentations: Any, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seen.append((images.device.type, images.dtype, tuple(images.shape)))
        for augmentation in augmentations:
            images = augmentation.change(images, generator)
        return images

    monkeypatch.setattr(phases, "_change", change)
    pictures = Examples(torch.zeros(8, 16, 16, 1, dtype=torch.uint8), torch.arange(8) % 3)
    with fake_gpu():
        model = on_the_gpu(assemble(backbone, task, 3))
        with pytest.raises(DataDependentOutputException):
            fit_phase(
                phase,
                model,
                task,
                pictures,
                pictures,
                3,
                groups=[],
                checkpointing=Checkpointing(tmp_path, "a"),
                hooks=[],
                setting="",
                compute=Compute(GPU),
            )
    assert seen == [(GPU, torch.uint8, (8, 16, 16, 1))]


def on_the_gpu(model: torch.nn.Module) -> torch.nn.Module:
    """With parameters made anew: one in memory cannot become one on a GPU that is not there."""
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(value.detach().to(GPU)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(GPU))
    return model
