from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from killed import Moment, trainings
from safetensors.torch import load_file, save_file
from shapes import KINDS, picture
from small_network import pass_request
from small_splits import write_splits_without_test_pictures
from torch import nn

from components import plugins
from components.checkpoints import assemble, restore, shapes_of
from components.contracts.data import Splits
from components.contracts.errors import ConfigError, UnknownName
from components.contracts.families import Backbone
from components.contracts.models import Checkpoint
from components.contracts.records import Stored
from components.fake_quantisation import RoundedActivation, calibrate, insert, layers, remove
from components.graphs import to_onnx
from components.optimisation import OptimisationConfig, check, fine_tuning, optimise
from components.targets.openvino import _Quantiser
from components.training import TrainingConfig, train

FIT = {"epochs": 2, "batch_size": 16, "learning_rate": 0.003, "checkpoint_every_s": 0}
NETWORK = {"image_size": 16, "width": 8, "embedding_dim": 16}
TRAINING = TrainingConfig.model_validate({"backbone": "small_cnn", "backbone_settings": NETWORK, "fit": FIT | {"epochs": 6}})
OUTLIER = 700.0
"""How many times as large one channel is as the others beside it."""
World = tuple[Path, Stored[Splits], Stored[Checkpoint]]


def passes(*before: dict[str, Any], fit: dict[str, Any] = FIT, **settings: Any) -> OptimisationConfig:
    one = {"pass": "quantisation_aware", "settings": settings, "phases": [{"trains": "all", "fit": fit}]}
    return OptimisationConfig.model_validate_json(json.dumps({"passes": [*before, one]}), strict=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A network that answers rightly in float, and in int8 sees one channel of a layer alone; no picture of test is there."""
    root = tmp_path_factory.mktemp("world")
    splits = write_splits_without_test_pictures(root, per_class=40)
    out = root / "trained"
    out.mkdir()
    record = train(splits, root / "data", TRAINING, out=out, cache=root / "cache", root=root, num_threads=1)
    shutil.copytree(out, root / "unharmed")
    state = load_file(out / "weights.safetensors")
    # What is made smaller after a convolution, and made up for in the next: in float nothing changes.
    for name in ("backbone.5.weight", "backbone.5.bias"):
        state[name][1:] /= OUTLIER
    state["backbone.7.weight"][:, 1:] *= OUTLIER
    save_file(state, out / "weights.safetensors")
    (out / "checkpoint.json").write_text(json.dumps(record.to_json()))
    (root / "splits.json").write_text(json.dumps(splits.record.to_json()))
    return root, splits, Stored(record, out)


def optimised(world: World, out: Path, config: OptimisationConfig) -> Stored[Checkpoint]:
    root, splits, trained = world
    out.mkdir(exist_ok=True)
    record = optimise(trained, splits, root / "data", config, TRAINING, out=out, cache=root / "cache", num_threads=1)
    return Stored(record, out)


def answered(checkpoint: Stored[Checkpoint], path: Path) -> tuple[float, float]:
    """The shares of new pictures that are answered rightly in float and by OpenVINO with every layer in int8."""
    shown = np.stack([picture(KINDS[i % 3], 1000 + i) for i in range(240)])[..., None]
    to_onnx(restore(checkpoint), checkpoint.record.preprocessing, path)
    quantiser = _Quantiser(openvino.Core().read_model(path), shown[:60])
    models = (quantiser.in_float(), quantiser.quantised(()))
    logits = [np.concatenate(list(quantiser.logits(model, shown[60:]))) for model in models]
    # The classes of a checkpoint are in the order of their names.
    wanted = np.array([sorted(KINDS).index(KINDS[i % 3]) for i in range(60, 240)])
    right = [float((each.argmax(axis=1) == wanted).mean()) for each in logits]
    return right[0], right[1]


def test_an_engine_in_int8_answers_what_it_lost_without_the_pass(world: World, tmp_path: Path) -> None:
    in_float, in_int8 = answered(world[2], tmp_path / "before.onnx")
    assert in_float - in_int8 > 0.2
    found = optimised(world, tmp_path / "out", passes())
    assert in_float - answered(found, tmp_path / "after.onnx")[1] < (in_float - in_int8) / 2
    assert found.record.optimised is not None
    (applied,) = found.record.optimised.passes
    num_valid = sum(applied.valid)
    before, after = (applied.compared[f"int8 {when}"] for when in ("before", "after"))
    assert sum(before) == sum(after) == num_valid == 40
    # What it says of itself is what the engine does.
    assert (before[1] - before[2]) / num_valid == pytest.approx(in_float - in_int8, abs=0.1)
    assert after[1] - after[2] < (before[1] - before[2]) / 2
    assert applied.epochs == 2
    assert len(applied.notes) == 2
    # Plain weights of the same network, each channel of them on a grid of its own.
    assert shapes_of(load_file(found.folder / "weights.safetensors")) == shapes_of(
        load_file(world[2].folder / "weights.safetensors")
    )
    for layer in layers(restore(found)).values():
        weight = layer.get_parameter("weight").detach().flatten(1)
        steps = weight / weight.abs().amax(1, keepdim=True) * 127
        assert (steps - steps.round()).abs().max() < 1e-3


def test_a_network_that_int8_does_not_harm_stays_as_it_is(world: World, tmp_path: Path) -> None:
    root, splits, trained = world
    found = optimised((root, splits, Stored(trained.record, root / "unharmed")), tmp_path / "out", passes())
    told = found.record.optimised
    assert told is not None
    (applied,) = told.passes
    assert (applied.epochs, set(applied.compared)) == (0, {"int8 before"})
    assert applied.notes[0].endswith("within the limit of 0.01: nothing had to be trained")
    before, after = (load_file(folder / "weights.safetensors") for folder in (root / "unharmed", found.folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    # A network that loses more than none goes the other way, and what is allowed is what was said.
    (other,) = optimised(world, tmp_path / "other", passes(limit=1.0)).record.optimised.passes  # type: ignore[union-attr]
    assert (other.epochs, other.notes[0].endswith("of 1: nothing had to be trained")) == (0, True)


def test_a_fine_tuning_that_wins_nothing_back_leaves_the_network_as_it_was(world: World, tmp_path: Path) -> None:
    config = passes(fit=FIT | {"epochs": 1, "learning_rate": 1e-12})
    (chosen,) = config.passes
    phases = tuple(phase.model_copy(update={"batch_norm": "frozen"}) for phase in chosen.phases)
    config = config.model_copy(update={"passes": (chosen.model_copy(update={"phases": phases}),)})
    found = optimised(world, tmp_path / "out", config)
    assert found.record.optimised is not None
    assert found.record.optimised.passes[0].notes[1].endswith("no better, and the network is left as it was")
    before, after = (load_file(folder / "weights.safetensors") for folder in (world[2].folder, found.folder))
    assert all(torch.equal(before[name], value) for name, value in after.items())


MOMENTS = [
    Moment("step", "2/0/1"),
    Moment("renamed", "out/progress-2.json"),
    Moment("writing", "out/fine-tuning.json"),
]


def test_what_is_killed_ends_in_the_same_bits_after_pruning_too(world: World, tmp_path: Path) -> None:
    phases = [{"trains": "all", "fit": FIT | {"epochs": 1, "learning_rate": 1e-6}}]
    config = passes({"pass": "prune", "settings": {"share": 0.2, "steps": 1}, "phases": phases})
    root = world[0]
    with trainings() as start:
        assert start.attempt(TRAINING, root, tmp_path / "whole", optimisation=config).status == 0
        for moment in MOMENTS:
            attempt = start.attempt(TRAINING, root, tmp_path / "killed", moment, optimisation=config)
            assert attempt.status == -signal.SIGKILL, moment
        assert start.attempt(TRAINING, root, tmp_path / "killed", optimisation=config).status == 0
    for name in ("weights.safetensors", "fine-tuning.json"):
        assert (tmp_path / "killed" / "out" / name).read_bytes() == (tmp_path / "whole" / "out" / name).read_bytes(), name
    history = json.loads((tmp_path / "whole" / "out" / "fine-tuning.json").read_text())
    assert [row["pass"] for row in history] == [1, 2, 2]


@pytest.mark.parametrize(
    ("backbone", "settings", "summed"),
    [
        # What ends each block, shortcuts with weights, and the pooling before the first; a block's only ReLU has two places.
        ("resnet18", {"image_size": 32}, 8 + 3 + 1),
        # Nine blocks with a shortcut, and what comes before the first of them in each of five stages.
        ("efficientnet_lite0", {"image_size": 64}, 9 + 5),
    ],
)
def test_sums_are_rounded_too_and_taken_back_to_the_bit(backbone: str, settings: dict[str, Any], summed: int) -> None:
    member: Backbone = plugins.load("backbones", backbone, settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = assemble(member, plugins.load("tasks", "classification"), 3).eval()
        size = member.preprocessing
        shown = torch.randint(256, (2, size.height, size.width, size.channels), dtype=torch.uint8)
    before, state = model(shown), {name: value.clone() for name, value in model.state_dict().items()}
    insert(model, shown[:1], layers(model))
    assert calibrate(model, [shown]) == []
    roundings = {name: module for name, module in model.named_modules() if isinstance(module, RoundedActivation)}
    assert sum(name.endswith("rounded_output") for name in roundings) == summed
    # Ranges stay those of the calibration while valid images are answered.
    ranges = [(float(rounding.low), float(rounding.high)) for rounding in roundings.values()]
    assert not torch.equal(model(shown)[0], before[0])
    model(255 - shown)
    assert [(float(rounding.low), float(rounding.high)) for rounding in roundings.values()] == ranges
    remove(model, keep_grids=False)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(one, other) for one, other in zip(model(shown), before, strict=True))


def test_what_is_no_number_stays_none_when_it_is_rounded() -> None:
    """Else a training that diverges would go on, and nobody would see it."""
    rounding = RoundedActivation().eval()
    rounding.low.fill_(-1.0)
    rounding.high.fill_(1.55)
    assert rounding(torch.tensor([[0.004, 0.006, -9.0]]))[0].tolist() == pytest.approx([0.0, 0.01, -1.0])
    for odd in ("nan", "inf", "-inf"):
        assert not rounding(torch.tensor([[float(odd), 0.004]])).isfinite().any()


def test_ranges_go_with_what_a_training_makes_of_the_activations() -> None:
    rounding = RoundedActivation()
    rounding.high.fill_(1.0)
    for _ in range(100):
        rounding(torch.tensor([[-1.0, 0.5], [-3.0, 9.0]]))
    assert (float(rounding.low), float(rounding.high)) == pytest.approx((-2.0, 4.75), rel=1e-2)
    rounding.eval()(torch.tensor([[100.0]]))
    assert float(rounding.high) == pytest.approx(4.75, rel=1e-2)


class _Attending(nn.Module):
    """Multi-head attention uses the weights of a layer that it does not ask."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.other = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = images.float().flatten(1).reshape(len(images), -1, 4) / 255
        tokens = tokens + self.stem(tokens)
        tokens = self.attention(tokens, tokens, tokens)[0]
        embedding = self.other(tokens, tokens, tokens)[0].mean(1)
        return self.head(embedding), embedding


@pytest.mark.parametrize(
    ("keep", "error", "why"),
    [
        ((), ConfigError, "keep: layers whose weights .* in keep: attention.out_proj, other.out_proj$"),
        (("other",), ConfigError, "in keep: attention.out_proj$"),
        (("attention", "other"), None, ""),
        (
            ("attention", "other", "head", "stem"),
            ConfigError,
            "keep: nothing is left to round without attention, other, head",
        ),
        (
            ("attentoin",),
            UnknownName,
            "unknown layer in keep 'attentoin'; valid: attention.out_proj, head, other.out_proj, stem",
        ),
        (("",), ConfigError, "keep.0: String should have at least 1 character"),
    ],
)
def test_layers_that_cannot_be_rounded_are_named(keep: tuple[str, ...], error: type[Exception] | None, why: str) -> None:
    network, images = _Attending().eval(), torch.randint(256, (6, 4, 4, 1), dtype=torch.uint8)
    with pytest.raises(error, match=why) if error else contextlib.nullcontext():
        chosen = plugins.load("passes", "quantisation_aware", {"keep": list(keep)})
        chosen.begin(network, pass_request(network, images, torch.arange(6) % 3))


@pytest.mark.parametrize("keep", [(), ("stem",)])
def test_what_is_kept_gives_its_sums_as_it_computes_them(keep: tuple[str, ...]) -> None:
    network, images = _Attending().eval(), torch.randint(256, (6, 4, 4, 1), dtype=torch.uint8)
    chosen = plugins.load("passes", "quantisation_aware", {"keep": ["attention", "other", *keep], "limit": 0})
    request = pass_request(network, images, torch.arange(6) % 3)
    chosen.begin(network, dataclasses.replace(request, rehearsal=True))
    found = {name.rpartition(".")[0] for name, module in network.named_modules() if isinstance(module, RoundedActivation)}
    assert found == {"head", "stem"} - set(keep)


def test_what_cannot_be_is_refused_when_the_recipe_is_read() -> None:
    prune = {"pass": "prune", "settings": {"steps": 1}}
    (one,) = passes().to_json()["passes"]
    other_way = OptimisationConfig.model_validate_json(json.dumps({"passes": [one, prune]}), strict=True)
    with pytest.raises(
        ConfigError,
        match="'prune' after 'quantisation_aware' would undo what it learned of int8; let 'quantisation_aware' be",
    ):
        check(other_way, TRAINING)
    check(passes(prune), TRAINING)
    said_nothing = OptimisationConfig.model_validate({"passes": [prune, {"pass": "quantisation_aware"}]})
    assert [fine_tuning(each, TRAINING)[0].batch_norm for each in said_nothing.passes] == [None, "frozen"]
    zeros = {"pass": "unstructured", "settings": {"steps": 1}}
    with pytest.raises(ConfigError, match="'quantisation_aware' after 'unstructured' would undo the zeros that it makes"):
        check(passes(zeros), TRAINING)
    with pytest.raises(ConfigError, match=r"settings: keep: nothing is left to round without backbone, head"):
        check(passes(keep=["backbone", "head"]), TRAINING)
    for setting, value in (("limit", -0.1), ("limit", float("nan")), ("num_images", 9)):
        with pytest.raises(ConfigError, match=f"passes.quantisation_aware: {setting}: Input should be"):
            plugins.load("passes", "quantisation_aware", {setting: value})
    head = OptimisationConfig.model_validate({"passes": [one | {"phases": [{"trains": "head", "fit": FIT}]}]})
    with pytest.raises(ConfigError, match="passes.0.phases: .*what is frozen below the head cannot; use trains: all"):
        check(head, TRAINING)
