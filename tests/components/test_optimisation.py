from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed import Moment, trainings
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from small_network import pass_request, pruned
from small_splits import write_splits_without_test_pictures

from components import optimisation, plugins
from components.checkpoints import assemble, reshape, restore, shapes_of
from components.contract_checks import whole_evidence
from components.contracts.data import Splits
from components.contracts.errors import (
    CheckpointMismatch,
    ConfigError,
    PassFailed,
    TrainingDiverged,
    UnknownName,
    WeightsUnavailable,
)
from components.contracts.families import Backbone, ExportRequest
from components.contracts.models import Checkpoint
from components.contracts.records import Stored
from components.graphs import to_onnx
from components.network_size import network_size
from components.optimisation import OptimisationConfig, check, fine_tuning, optimise
from components.training import TrainingConfig, expect_same_network, train
from components.weights import from_safetensors, packed, unpacked

FIT = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "checkpoint_every_s": 0}
NETWORK = {"image_size": 16, "width": 8, "embedding_dim": 16}


def section(**changes: object) -> TrainingConfig:
    values = {"backbone": "small_cnn", "backbone_settings": NETWORK} | (
        changes if "phases" in changes else {"fit": FIT} | changes
    )
    return TrainingConfig.model_validate_json(json.dumps(values), strict=True)


def passes(*chosen: Any, **settings: Any) -> OptimisationConfig:
    """These passes, or one pruning with these settings, in two steps of one epoch each."""
    one = {"pass": "prune", "settings": {"steps": 2} | settings, "phases": [{"trains": "all", "fit": FIT | {"epochs": 1}}]}
    return OptimisationConfig.model_validate_json(json.dumps({"passes": list(chosen) or [one]}), strict=True)


TRAINING = section()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Stored[Splits], Stored[Checkpoint]]:
    """A split data set with pictures of test that are not there, and a network that was trained on it."""
    root = tmp_path_factory.mktemp("world")
    splits = write_splits_without_test_pictures(root)
    out = root / "trained"
    out.mkdir()
    record = train(splits, root / "data", TRAINING, out=out, cache=root / "cache", root=root, num_threads=1)
    (out / "checkpoint.json").write_text(json.dumps(record.to_json()))
    (root / "splits.json").write_text(json.dumps(splits.record.to_json()))
    return root, splits, Stored(record, out)


World = tuple[Path, Stored[Splits], Stored[Checkpoint]]


def optimised(
    world: World, out: Path, config: OptimisationConfig, training: TrainingConfig = TRAINING
) -> Stored[Checkpoint]:
    root, splits, trained = world
    out.mkdir(exist_ok=True)
    record = optimise(trained, splits, root / "data", config, training, out=out, cache=root / "cache", num_threads=1)
    return Stored(record, out)


def images(number: int = 4) -> torch.Tensor:
    return torch.randint(256, (number, 16, 16, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_what_is_pruned_is_smaller_says_so_and_is_rebuilt_from_its_record(world: World, tmp_path: Path) -> None:
    """Pictures of test and calibration are not there at all: no pass reads them."""
    trained = world[2]
    found = optimised(world, tmp_path / "out", passes(share=0.5))
    told = found.record.optimised
    assert told is not None
    assert told.made_of == trained.record.digest()
    (applied,) = told.passes
    assert (applied.name, applied.epochs, applied.settings["round_to"], applied.settings["share"]) == ("prune", 2, 8, 0.5)
    assert applied.after.parameters <= 0.5 * applied.before.parameters
    assert applied.after.macs < applied.before.macs
    assert applied.after.stored_bytes == (found.folder / "weights.safetensors").stat().st_size
    assert applied.before.stored_bytes == (trained.folder / "weights.safetensors").stat().st_size
    assert sum(applied.valid) == 12
    module, whole = restore(found), restore(trained)
    assert sum(parameter.numel() for parameter in module.parameters()) == applied.after.parameters
    assert module.get_submodule("head.1").out_features == 3
    assert module.embedding_dim == found.record.embedding_dim < whole.embedding_dim
    assert module(images())[1].shape == (4, found.record.embedding_dim)
    history = json.loads((found.folder / told.history.name).read_text())
    assert [(row["pass"], row["step"], row["epoch"]) for row in history] == [(1, 1, 1), (1, 2, 2)]
    assert found.record.history.sha256 == trained.record.history.sha256
    assert Checkpoint.read(found.record.to_json()) == found.record
    assert "optimised" not in trained.record.to_json()


def test_a_file_that_does_not_fit_its_record_is_refused(world: World, tmp_path: Path) -> None:
    found = optimised(world, tmp_path / "out", passes())
    told = found.record.optimised
    assert told is not None
    shutil.copy(world[2].folder / "weights.safetensors", found.folder)
    with pytest.raises(CheckpointMismatch, match="with the channels that its record says were left: its .* has the shape"):
        restore(found)
    for shapes, why in (
        ({"backbone.0.weight": (99, 1, 5, 5)}, r"cannot have the shape \(99, 1, 5, 5\): this network has \(8, 1, 5, 5\)"),
        ({"backbone.0.weight": (4, 1, 5)}, "cannot have the shape"),
        ({"backbone.0.weight": (0, 1, 5, 5)}, "cannot have the shape"),
        ({"backbone.0.other": (4,)}, "backbone.0.other is no tensor of this network"),
    ):
        record = found.record.model_copy(update={"optimised": told.model_copy(update={"shapes": shapes})})
        with pytest.raises(CheckpointMismatch, match=why):
            restore(Stored(record, found.folder))


@pytest.mark.parametrize("share", [0, 1, -0.2, 1.5, float("nan")])
def test_a_share_that_leaves_nothing_or_takes_nothing_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="passes.prune: share: Input should be"):
        plugins.load("passes", "prune", {"share": share})


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"share": 0.98}, r"settings: share: 0.98 of the parameters cannot be taken .*: 0.9\d is the most; lower it"),
        ({"of": "macs", "share": 0.99}, r"share: 0.99 of the multiplications \(macs\) cannot be taken"),
        ({"keep": ["backbone.11", "backbone.7"]} | {"share": 0.9}, "share: 0.9 of the parameters cannot be taken"),
        ({"only": ["head.1"]}, r"only: head.1 cannot be pruned: the head gives one answer a class \(head.1\)"),
        ({"only": ["backbone.13"]}, "only: backbone.13 cannot be pruned: it has no channels that could go"),
        ({"only": ["backbone.99"]}, "unknown layer in only 'backbone.99'; valid: backbone.0, backbone.11"),
        ({"keep": ["backbone.99"]}, "unknown layer in keep 'backbone.99'"),
    ],
)  # fmt: skip
def test_what_a_network_cannot_lose_is_told_before_any_work(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=f"optimisation.passes.0.settings: .*{why}|{why}"):
        check(passes(**settings), TRAINING)


def test_a_warm_start_from_a_network_that_lost_channels_is_refused(world: World, tmp_path: Path) -> None:
    pruned = optimised(world, tmp_path / "out", passes()).record
    expect_same_network(TRAINING, world[2].record, "version 3 of pumps, the champion")
    with pytest.raises(
        ConfigError, match=r"version 3 of pumps, the champion, is one that passes took channels from \(prune\)"
    ):
        expect_same_network(TRAINING, pruned, "version 3 of pumps, the champion")


def test_what_is_kept_or_named_alone_is_all_that_stays_or_goes(world: World, tmp_path: Path) -> None:
    kept = optimised(world, tmp_path / "kept", passes(keep=["backbone.7"])).record.optimised
    alone = optimised(world, tmp_path / "alone", passes(only=["backbone.11"])).record.optimised
    assert kept is not None
    assert alone is not None
    assert "backbone.7.weight" not in kept.shapes
    assert kept.shapes["backbone.4.weight"][0] == 16  # whose channels are those that backbone.7 takes
    assert "backbone.11.weight" in kept.shapes
    assert {name.split(".")[1] for name in alone.shapes} == {"11", "12", "16"}


@pytest.mark.parametrize(
    ("backbone", "settings", "importance"),
    [
        ("resnet18", {"image_size": 32}, "taylor"),
        ("efficientnet_lite0", {"image_size": 64}, "magnitude"),
        ("timm", {"architecture": "vit_tiny_patch16_224", "image_size": 32}, "taylor"),
        ("timm", {"architecture": "convnext_atto", "image_size": 32}, "magnitude"),
    ],
)
def test_networks_lose_what_is_asked_and_are_rebuilt_by_shapes_alone(
    backbone: str, settings: dict[str, Any], importance: str
) -> None:
    member: Backbone = plugins.load("backbones", backbone, settings)
    task = plugins.load("tasks", "classification")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, again = assemble(member, task, 3).eval(), assemble(member, task, 3).eval()
    whole, contract = shapes_of(model.state_dict()), member.preprocessing
    shape = (2, contract.height, contract.width, contract.channels)
    noise = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = network_size(model, noise[:1])
    chosen = plugins.load("passes", "prune", {"steps": 1, "importance": importance})
    notes: list[str] = []
    chosen.begin(model, pass_request(model, noise, torch.tensor([0, 2]), note=notes.append))
    after = network_size(model, noise[:1])
    assert 0.6 < after.parameters / before.parameters <= 0.7
    assert after.macs < 0.9 * before.macs
    found = {name: new for name, new in shapes_of(model.state_dict()).items() if whole[name] != new}
    reshape(again, found)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(noise)[0], model(noise)[0])
    # What is as wide as two blocks stays a multiple of one.
    assert [new for name, new in found.items() if name.endswith("weight") and whole[name][0] >= 16 and new[0] % 8] == []
    if "vit" in str(settings):
        assert {name for name in found if "mlp" not in name} == set()
        assert any("the heads of attention stay whole" in note for note in notes)


def test_what_matters_most_stays(world: World) -> None:
    """Of channels that do nothing, by their scale and shift, none stays while others go."""
    model = restore(world[2])
    norm, layer = model.get_submodule("backbone.8"), model.get_submodule("backbone.7")
    assert isinstance(layer, torch.nn.Conv2d)
    dead = [1, 2, 6, 7, 9, 12, 13, 15]
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(1.0)
            parameter[dead] = 0.0
    example = images(8)
    wanted = layer.weight.detach().clone()[[i for i in range(16) if i not in dead]]
    request = pass_request(model, example, torch.arange(8) % 3)
    plugins.load("passes", "prune", {"share": 0.12, "steps": 1, "only": ["backbone.7"]}).begin(model, request)
    assert torch.equal(layer.weight, wanted)


def test_a_fine_tuning_of_which_nothing_is_said_trains_everything_on_what_training_saw(world: World) -> None:
    flip = {"augmentation": "flip", "settings": {"probability": 1.0}}
    phases = [
        {"trains": "head", "fit": FIT},
        {"trains": {"last": 2}, "views": 2, "augmentations": [flip], "loss": {"loss": "focal"}, "fit": FIT},
    ]
    training = section(phases=phases, weights="start.safetensors")
    config = passes({"pass": "prune"})
    check(config, training)
    (phase,) = fine_tuning(config.passes[0], training)
    assert (phase.trains, phase.views, phase.augmentations[0].augmentation) == ("all", 1, "flip")
    assert phase.loss is not None
    assert (phase.loss.loss, phase.fit.epochs, phase.fit.batch_size, phase.fit.learning_rate) == ("focal", 3, 8, 3e-4)


def test_what_lost_channels_is_fine_tuned_as_a_head_or_last_blocks_too(world: World, tmp_path: Path) -> None:
    phases = [{"trains": "head", "fit": FIT}, {"trains": {"last": 2}, "fit": FIT}]
    chosen = {"pass": "prune", "settings": {"steps": 1, "share": 0.4}, "phases": phases}
    found = optimised(world, tmp_path / "out", passes(chosen))
    assert found.record.optimised is not None
    assert found.record.optimised.passes[0].epochs == 4
    assert found.record.optimised.shapes


def test_a_checkpoint_of_another_task_network_or_of_passes_is_refused(world: World, tmp_path: Path) -> None:
    root, splits, _ = world
    for training, why in (
        (section(backbone_settings=NETWORK | {"dropout": 0.1}), "a checkpoint of the backbone 'small_cnn' .*'dropout': 0.1"),
        (section(task_settings={"label_smoothing": 0.2}), "a checkpoint of the task 'classification' {}, expected"),
    ):
        with pytest.raises(CheckpointMismatch, match=why):
            optimised(world, tmp_path / "out", passes(), training)
    once = optimised(world, tmp_path / "once", passes())
    with pytest.raises(CheckpointMismatch, match=r"went through passes already \(prune\); optimise the one it was made of"):
        optimised((root, splits, once), tmp_path / "twice", passes())


PLUGIN = (Path(plugins.__file__).parent / "passes" / "_template.py").read_text()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Where a workspace has a pass of its own, `mine`."""
    folder = tmp_path / "plugins" / "passes"
    folder.mkdir(parents=True)
    (folder / "mine.py").write_text(PLUGIN)
    plugins.use_workspace(tmp_path / "plugins")
    optimisation._check.cache_clear()  # by the recipe alone, and other tests have another pass of this name
    return folder / "mine.py"


MINE = {"pass": "mine", "phases": [{"trains": "all", "fit": FIT | {"epochs": 1}}]}


def test_zeros_of_a_pass_of_ones_own_stay_zero_through_fine_tuning(own: Path, world: World, tmp_path: Path) -> None:
    found = optimised(world, tmp_path / "out", passes(MINE))
    assert found.record.optimised is not None
    (applied,) = found.record.optimised.passes
    weights = load_file(found.folder / "weights.safetensors")
    convolutions = [value for name, value in weights.items() if value.ndim == 4]
    assert sum(int((value == 0).sum()) for value in convolutions) >= sum(
        round(0.1 * value.numel()) for value in convolutions
    )
    assert applied.after.zeros > applied.before.zeros
    assert found.record.optimised.shapes == {}


def test_an_order_in_which_one_pass_undoes_another_is_refused(own: Path) -> None:
    why = "passes.0: the pass 'prune' after 'mine' would undo the zeros that it makes; let 'mine' be the last one"
    with pytest.raises(ConfigError, match=why):
        check(passes(MINE, {"pass": "prune"}), TRAINING)
    check(passes({"pass": "prune", "settings": {"steps": 1}}, MINE), TRAINING)


def test_a_pass_that_computes_with_other_tensors_is_fine_tuned_as_a_whole(own: Path) -> None:
    chosen = {"pass": "mine", "phases": [{"trains": "head", "fit": FIT}]}
    with pytest.raises(ConfigError, match="passes.0.phases: .*what is frozen below the head cannot; use trains: all"):
        check(passes(chosen), TRAINING)


@pytest.mark.parametrize(
    ("where", "line", "error", "why"),
    [
        ("begin", "next(network.parameters()).data.fill_(float('nan'))", PassFailed, "'mine' fails on .* left NaN .* in backbone.0.weight"),
        ("end", "next(network.parameters()).data.fill_(float('inf'))", PassFailed, "'mine' fails on .* left NaN .* in backbone.0.weight"),
        ("end", "network.head[1].weight.data.fill_(3e38)", PassFailed, "after the pass 'mine' the valid loss is (nan|inf)"),
        ("begin", "network.head[1].weight.data.fill_(1e38)", TrainingDiverged, "Lower optimisation.passes.0.phases.0.fit"),
        ("end", "network.backbone[0].padding = (0, 0)", PassFailed, r"that answers nothing, in which backbone.16 \(Linear\) cannot compute any more: RuntimeError: mat1 and mat2"),
        ("end", "network.backbone[0].padding_mode = 'circular'", PassFailed, "answers otherwise when it is rebuilt from its"),
    ],
)  # fmt: skip
def test_a_network_that_cannot_answer_after_a_pass_is_refused(
    own: Path, world: World, tmp_path: Path, where: str, line: str, error: type[Exception], why: str
) -> None:
    """What is tried before the training is the network of random weights; what fails there has failed, too."""
    mark = {"begin": "        for layer", "end": '        """Make the zeros permanent."""\n'}[where]
    guarded = f"        if network.head[1].out_features == 3:\n            {line}\n"
    text = PLUGIN.replace(mark, guarded + mark, 1) if where == "begin" else PLUGIN.replace(mark, mark + guarded, 1)
    own.write_text(text)
    with pytest.raises(error, match=why):
        optimised(world, tmp_path / "out", passes(MINE))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("network.backbone[0].padding = (0, 0)", r"that answers nothing, in which backbone.16 \(Linear\) cannot compute any more"),
        ("network.backbone[0].padding_mode = 'circular'", "'mine' left of the backbone 'small_cnn' .* answers otherwise when it"),
        ("network.backbone[8] = nn.Identity()", "rebuilt from the shapes of its tensors: CheckpointMismatch"),
    ],
)  # fmt: skip
def test_what_leaves_no_network_that_answers_and_is_rebuilt_is_refused_before_any_work(
    own: Path, line: str, why: str
) -> None:
    mark = '        """Make the zeros permanent."""\n        from torch import nn\n'
    own.write_text(PLUGIN.replace(mark, f"{mark}        {line}\n", 1))
    with pytest.raises(ConfigError, match=why) as told:
        check(passes(MINE), TRAINING)
    assert "nothing was registered" not in str(told.value)


def test_a_network_that_cannot_be_pruned_is_told_by_its_name() -> None:
    """Its channels are shuffled, which torch-pruning cannot follow."""
    settings = {"architecture": "shufflenet_v2_x0_5", "image_size": 32}
    why = (
        r"^optimisation.passes.0: the pass 'prune' fails on the backbone 'torchvision' {'architecture': 'shufflenet_v2_x0_5', "
        r".*: it cannot change it: ZeroDivisionError: .*choose another network"
    )
    with pytest.raises(ConfigError, match=why):
        check(passes(), section(backbone="torchvision", backbone_settings=settings))


MOMENTS = [
    Moment("step", "1/0/1"),
    Moment("writing", "out/state-1-00001-*"),
    Moment("renamed", "out/progress-1.json"),
    Moment("step", "2/0/0"),
    Moment("renamed", "out/progress-2.json"),
    Moment("step", "2/0/2"),
    Moment("writing", "out/fine-tuning.json"),
]


def test_passes_that_are_killed_end_in_the_same_bits(world: World, tmp_path: Path) -> None:
    root, config = world[0], passes(share=0.4)
    with trainings() as start:
        whole = start.attempt(TRAINING, root, tmp_path / "whole", optimisation=config)
        assert whole.status == 0
        attempts = []
        for moment in MOMENTS:
            attempts.append(start.attempt(TRAINING, root, tmp_path / "killed", moment, optimisation=config))
            assert attempts[-1].status == -signal.SIGKILL, moment
        assert start.attempt(TRAINING, root, tmp_path / "killed", optimisation=config).status == 0
    for name in ("weights.safetensors", "fine-tuning.json", "history.json"):
        assert (tmp_path / "killed" / "out" / name).read_bytes() == (tmp_path / "whole" / "out" / name).read_bytes(), name
    steps = [where for attempt in attempts for what, where in attempt.done if what == "step"]
    assert len(steps) <= 6 + len(MOMENTS)  # a kill costs one step


def test_sizes_are_counted(tmp_path: Path) -> None:
    from torch import nn

    last = nn.Linear(4 * 3 * 3, 5, bias=False)
    depthwise = nn.Conv2d(4, 4, 3, groups=4, stride=2)
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), depthwise, nn.Flatten(), last)
    with torch.no_grad():
        last.weight[0] = 0
    size = network_size(network, torch.zeros(1, 2, 8, 8))
    weights = [2 * 4 * 9, 4 * 9, 36 * 5]
    assert size.parameters == sum(weights) + 4 + 4
    assert size.macs == weights[0] * 64 + weights[1] * 9 + weights[2]
    assert size.zeros == 36
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    assert size.stored_bytes == (tmp_path / "weights.safetensors").stat().st_size


def test_what_attention_projects_is_counted_where_it_asks_no_layer() -> None:
    """Three tokens ask two: by one weight for all, and by one each where the widths differ."""
    from torch import nn

    from components.passes.prune import _Costs

    class Attending(nn.Module):
        def __init__(self, **widths: int) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **widths)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            key, value = tokens[:, :2, : self.attention.kdim], tokens[:, :2, : self.attention.vdim]
            found: torch.Tensor = self.attention(tokens, key, value=value)[0]
            return found

    example = torch.zeros(1, 3, 4)
    for network, macs in (
        (Attending(), (3 + 2 + 2 + 3) * 4 * 4),
        (Attending(kdim=2, vdim=3), 3 * 4 * 4 + 2 * 2 * 4 + 2 * 3 * 4 + 3 * 4 * 4),
    ):
        size = network_size(network, example)
        assert size.macs == macs
        assert _Costs(network, example, (), of="macs").total() == macs
        assert _Costs(network, example, (), of="parameters").total() == size.parameters


@pytest.mark.parametrize(("name", "setting"), [("prune", "keep"), ("prune", "only"), ("unstructured", "keep")])
def test_a_layer_without_a_name_is_none(name: str, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"passes.{name}: {setting}.*: String should have at least 1 character"):
        plugins.load("passes", name, {setting: [""]})


def test_a_section_is_read_and_refused_by_its_keys() -> None:
    with pytest.raises(ValidationError, match="compare has no effect without passes"):
        OptimisationConfig.model_validate_json('{"compare": false}', strict=True)
    with pytest.raises(UnknownName, match="unknown pass 'prun'; valid: prune"):
        check(passes({"pass": "prun"}), TRAINING)
    with pytest.raises(UnknownName, match="unknown setting of pass 'prune' 'ratio'; valid: importance, keep"):
        check(passes({"pass": "prune", "settings": {"ratio": 0.3}}), TRAINING)
    said = passes().to_json()
    assert said["passes"][0]["pass"] == "prune"
    assert OptimisationConfig.model_validate_json(json.dumps(said), strict=True) == passes()
    assert np.isfinite(passes().passes[0].load().steps)


def test_zeros_are_made_in_steps_stay_through_fine_tuning_and_are_stored_without_their_places(
    world: World, tmp_path: Path
) -> None:
    """A moving mean of the weights and weight decay would fill or move what is not held."""
    fit = FIT | {"epochs": 1, "ema_decay": 0.5, "weight_decay": 0.1}
    chosen = {"pass": "unstructured", "settings": {"share": 0.7, "steps": 2}, "phases": [{"trains": "all", "fit": fit}]}
    found = optimised(world, tmp_path / "out", passes(chosen))
    told = found.record.optimised
    assert told is not None
    module = restore(found)
    weights = [layer.weight for layer in module.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == round(0.7 * sum(weight.numel() for weight in weights))
    assert told.shapes == {}
    applied = told.passes[0]
    assert applied.after.zeros >= zeros
    assert applied.after.parameters == applied.before.parameters
    # 30 % of the numbers, and a bit for each place.
    size = (found.folder / "weights.safetensors").stat().st_size
    assert applied.after.stored_bytes == size < 0.45 * applied.before.stored_bytes
    assert not [name for name in module.state_dict() if "mask" in name or "orig" in name]
    again = optimised(world, tmp_path / "again", passes(chosen))
    assert again.record == found.record


def test_a_share_that_leaves_nothing_of_a_layer_names_it(world: World, tmp_path: Path) -> None:
    root, splits, trained = world
    state = load_file(trained.folder / "weights.safetensors")
    state["backbone.7.weight"] *= 1e-9
    (tmp_path / "small").mkdir()
    save_file(state, tmp_path / "small" / "weights.safetensors")
    shutil.copy(trained.folder / "history.json", tmp_path / "small")
    small = Stored(trained.record, tmp_path / "small")
    chosen = {"pass": "unstructured", "settings": {"share": 0.5, "steps": 1}}
    with pytest.raises(ConfigError, match="nothing is left of backbone.7; lower it, or name it in keep"):
        optimised((root, splits, small), tmp_path / "out", passes(chosen))
    with pytest.raises(UnknownName, match="unknown layer in keep 'backbone.98'"):
        check(passes({"pass": "unstructured", "settings": {"keep": ["backbone.98"]}}), TRAINING)
    with pytest.raises(ConfigError, match="keep: nothing could lose weights without backbone, head"):
        check(passes({"pass": "unstructured", "settings": {"keep": ["backbone", "head"]}}), TRAINING)
    why = "the pass 'prune' after 'unstructured' would undo the zeros that it makes"
    with pytest.raises(ConfigError, match=why):
        check(passes({"pass": "unstructured"}, {"pass": "prune"}), TRAINING)
    why = (
        r"settings: share: 0.999999 of [\d,]+ weights leaves nothing of a layer: [\d,]+ of them are the most .* 6 layers can"
    )
    with pytest.raises(ConfigError, match=why):
        check(passes({"pass": "unstructured", "settings": {"share": 0.999999}}), TRAINING)


def test_packed_weights_are_whole_again_or_refused(tmp_path: Path) -> None:
    whole = torch.randn(30, 70, generator=torch.Generator().manual_seed(0))
    whole[whole.abs() < 0.7] = 0
    state = {"a.weight": whole, "b": torch.zeros(10), "c": torch.ones(2000), "n": torch.tensor(3)}
    found = packed(state)
    assert set(found) == {"a.weight#shape", "a.weight#places", "a.weight#values", "b", "c", "n"}
    again = unpacked(found)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())
    for broken, why in (
        ({"a.weight#values": None}, "a part of it is missing"),
        ({"a.weight#shape": torch.tensor([30, 700])}, "in 263 bytes for the shape"),
        ({"a.weight#values": found["a.weight#values"][1:]}, "values for"),
        (
            {"a.weight#shape": torch.tensor([-30, -70])},
            r"shape of torch.int64 \[-30, -70\], .* expected int64 sizes of 0 and more",
        ),
        ({"a.weight#shape": torch.tensor([30.0, 70.0])}, "shape of torch.float32"),
        ({"a.weight#shape": torch.tensor(2100)}, "shape of torch.int64 2100"),
        ({"a.weight#places": found["a.weight#places"].int()}, "places of torch.int32"),
        ({"a.weight#places": found["a.weight#places"][None]}, r"places of torch.uint8 in \(1, 263\)"),
        ({"a.weight#values": found["a.weight#values"][:, None]}, r"values in \(\d+, 1\)"),
    ):
        parts = {name: value for name, value in (found | broken).items() if value is not None}
        save_file(parts, tmp_path / "weights.safetensors")
        with pytest.raises(WeightsUnavailable, match=why):
            from_safetensors(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("backbone", "settings"),
    [
        ("small_cnn", {"image_size": 16}),
        ("resnet18", {"image_size": 32}),
        ("efficientnet_lite0", {"image_size": 64}),
        ("timm", {"architecture": "vit_tiny_patch16_224", "image_size": 32}),
    ],
)
def test_engines_of_a_pruned_network_answer_as_it_does(
    backbone: str, settings: dict[str, Any], target: str, tmp_path: Path
) -> None:
    member: Backbone = plugins.load("backbones", backbone, settings)
    task = plugins.load("tasks", "classification")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = assemble(member, task, 3).eval()
    stored = Stored(pruned(module, backbone, settings, member, tmp_path), tmp_path)
    to_onnx(restore(stored), member.preprocessing, tmp_path / "model.onnx")
    nothing: Any = None
    out = tmp_path / target
    out.mkdir()
    chosen = plugins.load("targets", target)
    built = chosen.export(ExportRequest(stored, tmp_path / "model.onnx", "fp32", nothing, nothing, task), out=out)
    size = member.preprocessing
    said = {"target": target, "entry": built.entry, "embedding_dim": stored.record.embedding_dim, "preprocessing": size}
    engine = whole_evidence().engine.model_copy(update=said)
    shown = np.random.default_rng(0).integers(0, 255, (3, size.height, size.width, size.channels), dtype=np.uint8)
    logits, embedding = chosen.load(Stored(engine, out), num_threads=1).predict(shown)
    with torch.no_grad():
        expected = module(torch.from_numpy(shown))
    assert embedding.shape == (3, stored.record.embedding_dim)
    for found, wanted in zip((logits, embedding), expected, strict=True):
        assert np.abs(found - wanted.numpy()).max() < 1e-3 * max(1.0, float(wanted.abs().max()))


def test_passes_are_fine_tuned_here_wherever_the_training_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster's GPUs are none of this machine, which is told before the cluster trains."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    far = {"backbone": "small_cnn", "compute": {"launcher": "ray", "processes": 2, "device": "cuda"}}
    with pytest.raises(
        ConfigError, match="^optimisation.passes are fine-tuned on this machine: .*device is cuda, and torch"
    ):
        optimisation.on_this_machine(TrainingConfig.model_validate(far))
    near = {"backbone": "small_cnn", "compute": {"launcher": "torchrun", "processes": 2, "precision": "bf16"}}
    found = optimisation.on_this_machine(TrainingConfig.model_validate(near))
    assert (found.num_processes, found.precision) == (1, "bf16")


def test_what_other_passes_left_is_not_taken_up(world: World, tmp_path: Path) -> None:
    optimised(world, tmp_path / "out", passes(share=0.3))
    assert list((tmp_path / "out").glob("progress-*.json"))
    with pytest.raises(CheckpointMismatch, match="belongs to another config or other data"):
        optimised(world, tmp_path / "out", passes(share=0.4))


def test_a_pass_that_draws_gives_the_same_bits_whatever_was_drawn_before(own: Path, world: World, tmp_path: Path) -> None:
    own.write_text(PLUGIN.replace("prune.l1_unstructured", "prune.random_unstructured"))
    found = []
    for name in ("one", "other"):
        torch.rand(3)
        found.append(optimised(world, tmp_path / name, passes(MINE)).record)
    assert found[0] == found[1]
