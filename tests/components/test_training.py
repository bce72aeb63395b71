from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from small_splits import NETWORK, write_small_splits

from components import plugins
from components.contracts.data import Splits
from components.contracts.errors import (
    CheckpointMismatch,
    ConfigError,
    TrainingDiverged,
    UnknownName,
    WeightsUnavailable,
)
from components.contracts.models import Checkpoint
from components.contracts.progress import MetricSink
from components.contracts.records import Stored
from components.hooks import LEFTOVERS
from components.phases import Augmentation, Phase
from components.training import TrainingConfig, check, expect_same_network, initial, train
from flows.workspace.recipes import load_recipe

ROOT = Path()


def config(**changes: object) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {"backbone": "efficientnet_lite0", "weights": "packaged", "mode": "frozen"} | changes
    )


def test_wrong_sections_are_refused_before_any_work(tmp_path: Path) -> None:
    check(config(), ROOT)
    check(config(backbone="small_cnn", weights="random", mode="scratch"), ROOT)
    with pytest.raises(
        UnknownName,
        match=r"unknown backbone 'resnet'; valid: efficientnet_lite0, efficientnet_lite1, efficientnet_lite2, lenet5, resnet18, small_cnn, timm, torchvision",
    ):
        check(config(backbone="resnet"), ROOT)
    with pytest.raises(UnknownName, match="unknown setting of backbone.*'size'; valid: crop_share, image_size"):
        check(config(backbone_settings={"size": 3}), ROOT)
    with pytest.raises(ConfigError, match="image_size"):
        check(config(backbone_settings={"image_size": 100_000}), ROOT)
    with pytest.raises(UnknownName, match="unknown training.weights.*'imagenet'; valid: .*packaged"):
        check(config(weights="imagenet"), ROOT)
    with pytest.raises(ConfigError, match="does not exist"):
        check(config(weights=str(tmp_path / "none.safetensors")), ROOT)
    with pytest.raises(ConfigError, match="learns nothing"):
        check(config(weights="random"), ROOT)
    with pytest.raises(ConfigError, match="^training.augmentation has no effect with mode: frozen"):
        check(config(augmentation=Augmentation(horizontal_flip=True)), ROOT)
    everything = {"trains": "all"}
    with pytest.raises(ConfigError, match=r"^training.phases.0: training the head on random weights learns nothing"):
        check(phased({"trains": "head"}, everything, weights="random"), ROOT)
    with pytest.raises(
        ConfigError,
        match=r"^training.phases.1.augmentation has no effect with one view of each picture, with the head training",
    ):
        check(phased(everything, {"trains": "head", "augmentation": MOVED}, weights="random"), ROOT)
    for key, value in (("mode", "frozen"), ("fit", FIT), ("augmentation", MOVED)):
        with pytest.raises(ValidationError, match=f"{key} beside phases: .*; move it into a phase.* or remove phases"):
            phased(everything, **{key: value})
    with pytest.raises(ValidationError, match="at least 1 item"):
        phased()


@pytest.mark.parametrize("name", ["scratch", "phases"])
def test_a_section_as_json_is_what_was_said_and_reads_back(name: str) -> None:
    section = SCRATCH if name == "scratch" else phased({"trains": "head"}, {"trains": "all"})
    said = section.to_json()
    assert TrainingConfig.model_validate_json(json.dumps(said), strict=True) == section
    assert {"mode", "augmentation", "fit", "phases"} & said.keys() == (
        {"mode", "augmentation", "fit"} if name == "scratch" else {"phases"}
    )


def test_augmentation_is_a_function_of_its_generator_and_moves_pixels() -> None:
    images = torch.randint(0, 255, (5, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settings = {"rotate_degrees": 20, "translate": 0.1, "scale": 0.2, "shear": 0.1, "horizontal_flip": True}
    augment = plugins.load("augmentations", "affine", settings).change
    first = augment(images, torch.Generator().manual_seed(1))
    assert first.shape == images.shape
    assert first.dtype == torch.uint8
    assert torch.equal(first, augment(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, augment(images, torch.Generator().manual_seed(2)))
    assert not torch.equal(first, images)
    assert Phase(trains="all", augmentation=Augmentation()).changer() is None


def test_a_flip_mirrors_and_nothing_else() -> None:
    images = torch.randint(0, 255, (64, 8, 8, 1), dtype=torch.uint8)
    flip = Phase(trains="all", augmentation=Augmentation(horizontal_flip=True)).changer()
    assert flip is not None
    flipped = flip(images, torch.Generator().manual_seed(0))
    same = (flipped == images).flatten(1).all(dim=1)
    mirrored = (flipped == images.flip(2)).flatten(1).all(dim=1)
    assert bool((same | mirrored).all())
    assert 10 < int(mirrored.sum()) < 54


PLACE = Path(__file__).parent
FIT = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "checkpoint_every_s": 0}
MOVED = {"rotate_degrees": 10, "translate": 0.1, "horizontal_flip": True}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Stored[Splits]]:
    root = tmp_path_factory.mktemp("world")
    return root, write_small_splits(root)


def trained(world: tuple[Path, Stored[Splits]], out: Path, config: TrainingConfig, sink: MetricSink | None = None) -> Path:
    root, splits = world
    out.mkdir(exist_ok=True)
    train(splits, root / "data", config, out=out, cache=root / "cache", root=root, num_threads=1, sink=sink)
    return out


def small(**changes: object) -> TrainingConfig:
    values = {"backbone": "small_cnn", "backbone_settings": NETWORK, "weights": "start.safetensors"} | changes
    return TrainingConfig.model_validate_json(json.dumps(values), strict=True)


SCRATCH = small(weights="random", mode="scratch", augmentation=MOVED, fit=FIT, task_settings={"label_smoothing": 0.1})
FROZEN = small(mode="frozen", fit=FIT)


def phased(*phases: object, **changes: object) -> TrainingConfig:
    return small(phases=phases, **changes)


@pytest.mark.parametrize(("name", "config"), [("scratch", SCRATCH), ("frozen", FROZEN)])
def test_a_training_ends_where_it_always_did(
    world: tuple[Path, Stored[Splits]], tmp_path: Path, name: str, config: TrainingConfig
) -> None:
    """To 1e-3, which another processor's rounding stays below and another draw, rate or order does not."""
    out = trained(world, tmp_path / "out", config)
    weights = load_file(out / "weights.safetensors")
    found = {
        "config": config.digest(),
        "history": json.loads((out / "history.json").read_text()),
        # One number a tensor that every element moves.
        "weights": {
            key: float((value.double().flatten() * torch.arange(1, value.numel() + 1).cos()).sum())
            for key, value in weights.items()
        },
    }
    golden = json.loads((PLACE / "training.golden.json").read_text())[name]
    assert found["config"] == golden["config"]
    assert [list(row) for row in found["history"]] == [list(row) for row in golden["history"]]
    for row, expected in zip(found["history"], golden["history"], strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert found["weights"] == pytest.approx(golden["weights"], rel=1e-3, abs=1e-3)


class Sink:
    """Keeps what it is told; kills the training at one epoch."""

    def __init__(self, kill_at: int = 0) -> None:
        self.kill_at, self.rows = kill_at, list[dict[str, float]]()

    def log(self, epoch: int, metrics: Mapping[str, float]) -> None:
        if epoch == self.kill_at:
            raise KeyboardInterrupt
        self.rows.append(dict(metrics))


def test_one_phase_is_the_training_that_the_older_keys_say(world: tuple[Path, Stored[Splits]], tmp_path: Path) -> None:
    for name, older, phase in (
        ("head", FROZEN, {"trains": "head", "fit": FIT}),
        ("all", SCRATCH, {"trains": "all", "fit": FIT, "augmentation": MOVED}),
    ):
        shared = older.to_json()
        newer = phased(phase, weights=older.weights, task_settings=shared["task_settings"])
        outs = [trained(world, tmp_path / f"{name}{place}", config) for place, config in enumerate((older, newer))]
        for file in ("weights.safetensors", "history.json"):
            assert (outs[0] / file).read_bytes() == (outs[1] / file).read_bytes(), (name, file)


def test_phases_go_on_from_each_other_and_a_killed_one_is_taken_up_where_it_was(
    world: tuple[Path, Stored[Splits]], tmp_path: Path
) -> None:
    still = {**FIT, "learning_rate": 1e-5}
    section = phased({"trains": "head", "fit": FIT}, {"trains": "all", "augmentation": MOVED, "fit": still})
    sink = Sink()
    whole = trained(world, tmp_path / "whole", section, sink)
    history = json.loads((whole / "history.json").read_text())
    assert [(row["epoch"], row["phase"]) for row in history] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    learned = [{key: row.pop(key) for key in ("train_accuracy", "train_images") if key in row} for row in history]
    assert sink.rows == history
    assert sum(map(bool, learned)) == 2
    assert all(row["train_images"] == 24 and 0 <= row["train_accuracy"] <= 1 for row in learned if row)
    head = load_file(trained(world, tmp_path / "head", FROZEN) / "weights.safetensors")["head.1.weight"]
    weights = load_file(whole / "weights.safetensors")
    assert torch.allclose(weights["head.1.weight"], head, atol=1e-3)
    assert not torch.equal(weights["head.1.weight"], head)
    for epochs in ((1,), (3,), (2, 4)):
        out = tmp_path / str(epochs)
        for kill_at in epochs:
            with pytest.raises(KeyboardInterrupt):
                trained(world, out, section, Sink(kill_at))
        rest = Sink()
        trained(world, out, section, rest)
        # Whoever takes a training up hears of the epochs before, too: it need not be who heard them then.
        assert rest.rows == sink.rows
        for file in ("weights.safetensors", "history.json"):
            assert (out / file).read_bytes() == (whole / file).read_bytes(), epochs
    assert {path.name for path in whole.iterdir() if not any(path.match(pattern) for pattern in LEFTOVERS)} == {
        "weights.safetensors",
        "history.json",
    }


FLIP = {"augmentation": "flip"}


def test_the_last_blocks_train_on_cached_views_and_what_is_below_stays(
    world: tuple[Path, Stored[Splits]], tmp_path: Path
) -> None:
    """And a killed training of every kind of draw ends in the same bits."""
    last = {
        "trains": {"last": 2},
        "views": 3,
        "augmentations": [FLIP, {"augmentation": "mixup"}],
        "sampling": "balanced",
        "fit": FIT,
    }
    whole = trained(world, tmp_path / "whole", phased(last))
    before, after = load_file(world[0] / "start.safetensors"), load_file(whole / "weights.safetensors")
    moved = {key for key, value in before.items() if not torch.equal(value, after[f"backbone.{key}"])}
    # The third block begins at 7: what is below is as it was, and so are the batch norms at 8 and 12.
    assert {int(key.split(".")[0]) for key in moved} == {7, 11, 16}
    moving = load_file(trained(world, tmp_path / "moving", phased({**last, "batch_norm": "trains"})) / "weights.safetensors")
    moved = {key for key, value in before.items() if not torch.equal(value, moving[f"backbone.{key}"])}
    assert {int(key.split(".")[0]) for key in moved} == {7, 8, 11, 12, 16}
    everything = {
        "trains": "all",
        "augmentations": [{"augmentation": "rotation"}, {"augmentation": "cutmix"}],
        "loss": {"loss": "class_weighted", "settings": {"smoothing": 0.1}},
        "fit": FIT,
    }
    section = phased(last, everything)
    whole = trained(world, tmp_path / "both", section)
    for epochs in ((1,), (2, 3)):
        out = tmp_path / str(epochs)
        for kill_at in epochs:
            with pytest.raises(KeyboardInterrupt):
                trained(world, out, section, Sink(kill_at))
        trained(world, out, section)
        for file in ("weights.safetensors", "history.json"):
            assert (out / file).read_bytes() == (whole / file).read_bytes(), epochs
    for last_blocks, problem in ((4, "has 4 blocks; name fewer than that, or all"), (9, "has 4 blocks")):
        with pytest.raises(ConfigError, match=f"^training.phases.1.trains: the backbone 'small_cnn' {problem}"):
            check(phased(everything, last | {"trains": {"last": last_blocks}}), world[0])


CUTMIX = {"trains": {"last": 2}, "augmentations": [{"augmentation": "cutmix"}], "fit": FIT}


@pytest.mark.parametrize(
    ("backbone", "settings", "last", "shape"),
    [
        ("timm", {"architecture": "vit_tiny_patch16_224", "image_size": 32}, 2, "(5, 192)"),
        ("timm", {"architecture": "swin_tiny_patch4_window7_224"}, 2, "(28, 28, 192)"),
        ("lenet5", {}, 1, "(120,)"),
        ("lenet5", {}, 2, ""),
        ("torchvision", {"architecture": "convnext_tiny", "image_size": 32}, 2, ""),
    ],
)
def test_cutmix_is_refused_before_any_work_where_there_are_no_maps_to_cut(
    world: tuple[Path, Stored[Splits]], backbone: str, settings: dict[str, Any], last: int, shape: str
) -> None:
    section = phased(CUTMIX | {"trains": {"last": last}}, backbone=backbone, backbone_settings=settings)
    if not shape:
        check(section, world[0])
        return
    part = "the last block" if last == 1 else "the last 2 blocks"
    with pytest.raises(ConfigError) as refused:
        check(section, world[0])
    assert str(refused.value) == (
        f"training.phases.0: cutmix cuts pieces out of maps (channels, height, width), and what lies below {part} of the "
        f"backbone {backbone!r} is of shape {shape}; use mixup in its place, or trains: all, where it is given pictures"
    )
    check(phased(CUTMIX | {"trains": "all"}, backbone=backbone, backbone_settings=settings), world[0])


@pytest.mark.slow
def test_the_recipe_resnet50_trains_through_both_phases(world: tuple[Path, Stored[Splits]], tmp_path: Path) -> None:
    backbone = plugins.load("backbones", "torchvision", {"architecture": "resnet50"})
    with torch.random.fork_rng():
        save_file(backbone.build().state_dict(), tmp_path / "random.safetensors")
    sets = ["training.backbone_settings.image_size=32", "training.phases.0.fit.epochs=2", "training.phases.1.fit.epochs=1"]
    section = load_recipe("resnet50", [f"training.weights={tmp_path / 'random.safetensors'}", *sets]).training
    out = trained(world, tmp_path / "out", section)
    assert [row["phase"] for row in json.loads((out / "history.json").read_text())] == [1, 1, 2]
    before, after = load_file(tmp_path / "random.safetensors"), load_file(out / "weights.safetensors")
    moved = {key.split(".")[0] for key, value in before.items() if not torch.equal(value, after[f"backbone.{key}"])}
    assert moved == {"layer3", "layer4"}


def test_the_recipe_resnet50_says_which_file_it_lacks(
    world: tuple[Path, Stored[Splits]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    root, splits = world
    place = tmp_path / "downloads" / "resnet50-11ad3fa6.pth"
    told = (
        f"cannot download https://download.pytorch.org/models/resnet50-11ad3fa6.pth (no network). Without network, put the "
        f"file at {place} (its sha256 begins with 11ad3fa6), or set training.weights to a local .safetensors file"
    )
    for there in (None, b"another file"):
        if there:
            place.write_bytes(there)
            found = hashlib.sha256(there).hexdigest()[:8]
            told = told.replace("11ad3fa6), or", f"11ad3fa6, that of the file there with {found}), or")
        with pytest.raises(WeightsUnavailable) as refused:
            train(splits, root / "data", load_recipe("resnet50").training, out=tmp_path, cache=tmp_path, root=root)
        assert str(refused.value) == told


def test_a_checkpoint_of_ours_is_weights_to_start_from(world: tuple[Path, Stored[Splits]], tmp_path: Path) -> None:
    before = trained(world, tmp_path / "before", SCRATCH) / "weights.safetensors"
    still = {**FIT, "learning_rate": 1e-12, "warmup_epochs": 0}
    after = trained(world, tmp_path / "after", phased({"trains": "head", "fit": still}, weights=str(before)))
    old, new = load_file(before), load_file(after / "weights.safetensors")
    assert all(torch.equal(value, new[name]) for name, value in old.items() if name.startswith("backbone."))
    assert not torch.equal(old["head.1.weight"], new["head.1.weight"])


def test_a_warm_start_goes_on_from_the_whole_network_of_a_champion_of_the_same_classes(
    world: tuple[Path, Stored[Splits]], tmp_path: Path
) -> None:
    root, splits = world
    (tmp_path / "first").mkdir()
    first = train(splits, root / "data", SCRATCH, out=tmp_path / "first", cache=root / "cache", root=root)
    champion = Stored(first, tmp_path / "first")
    still = {**FIT, "learning_rate": 1e-12, "warmup_epochs": 0}
    warm = phased({"trains": {"last": 1}, "fit": still}, weights="champion")
    check(warm, root)

    def from_champion(record: Splits, out: Path, champion: Stored[Checkpoint] | None) -> dict[str, torch.Tensor]:
        out.mkdir(exist_ok=True)
        train(Stored(record, root), root / "data", warm, out=out, cache=root / "cache", root=root, champion=champion)
        weights: dict[str, torch.Tensor] = load_file(out / "weights.safetensors")
        return weights

    old, new = load_file(tmp_path / "first" / "weights.safetensors"), from_champion(splits.record, tmp_path / "a", champion)
    assert old.keys() == new.keys()
    assert all(torch.allclose(value, new[name], atol=1e-9) for name, value in old.items())
    # A run that was killed goes on only from the weights that it began from.
    other = Stored(
        first.model_copy(update={"weights": first.weights.model_copy(update={"sha256": "0" * 64})}), champion.folder
    )
    with pytest.raises(CheckpointMismatch, match="belongs to another config or other data"):
        from_champion(splits.record, tmp_path / "a", other)
    grown = splits.record.model_copy(update={"classes": ("cross", "ring", "stripes")})
    with pytest.raises(
        ConfigError, match="other classes than the data have .new: ring; gone: disc.; train from other weights"
    ):
        from_champion(grown, tmp_path / "b", champion)
    # Classes that got other names: its answers are about the same things, in another order.
    called = splits.record.model_copy(update={"classes": ("a", "cross", "disc")})
    renames = (("disc", "a"), ("stripes", "disc"))
    model, digest = initial(warm, called.classes, cache=root, root=root, champion=champion, renamed=renames)
    for name in ("head.1.weight", "head.1.bias"):
        assert torch.equal(model.state_dict()[name], old[name][[1, 0, 2]])
    assert digest == f"{first.weights.sha256} of cross, a, disc"
    with pytest.raises(ConfigError, match=r"new: a; gone: stripes"):
        initial(warm, called.classes, cache=root, root=root, champion=champion)
    with pytest.raises(ConfigError, match="no champion was given"):
        from_champion(splits.record, tmp_path / "c", None)
    wider = small(backbone_settings={**NETWORK, "width": 16}, weights="champion", fit=FIT)
    with pytest.raises(
        CheckpointMismatch, match=r"do not fit the network of this recipe: its backbone.0.weight has the shape"
    ):
        train(splits, root / "data", wider, out=tmp_path / "c", cache=root / "cache", root=root, champion=champion)
    sized = small(backbone_settings={**NETWORK, "image_size": 24}, weights="champion", fit=FIT)
    with pytest.raises(
        ConfigError, match=r"training.backbone: a warm start .* version 3, has the backbone 'small_cnn' with"
    ):
        expect_same_network(sized, first, "version 3")
    written_out = plugins.load("backbones", "small_cnn", NETWORK).model_dump()
    expect_same_network(warm, first.model_copy(update={"backbone_settings": written_out}), "version 3")


def test_weights_of_before_batch_norm_counted_its_batches_are_taken(
    world: tuple[Path, Stored[Splits]], tmp_path: Path
) -> None:
    state = load_file(world[0] / "start.safetensors")
    assert any(name.endswith("num_batches_tracked") for name in state)
    older = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    save_file(older, tmp_path / "older.safetensors")
    both = [
        small(mode="frozen", fit=FIT, weights=str(path))
        for path in (world[0] / "start.safetensors", tmp_path / "older.safetensors")
    ]
    ends = [load_file(trained(world, tmp_path / str(place), one) / "weights.safetensors") for place, one in enumerate(both)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_maps_are_fitted_with_channels_last_and_pictures_as_they_lie() -> None:
    from components.training import _logits, _logits_of_maps

    seen: list[torch.Tensor] = []
    part = torch.nn.Identity()
    part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for maps in (torch.rand(4, 6, 5, 5).half(), torch.rand(4, 6, 5, 5), torch.rand(4, 7, 6)):
        _logits_of_maps(part, maps)
    _logits(part, torch.rand(4, 5, 5, 3))
    assert [one.dtype for one in seen] == [torch.float32] * 4
    assert [one.is_contiguous(memory_format=torch.channels_last) for one in seen[:2]] == [True, True]
    assert seen[2].is_contiguous()
    assert seen[3].is_contiguous()


def test_batch_norm_of_random_weights_is_nothing_to_keep() -> None:
    with pytest.raises(ConfigError, match="training.phases.0.batch_norm: statistics of random weights are none to keep"):
        check(phased({"trains": "all", "batch_norm": "frozen", "fit": FIT}, weights="random"), ROOT)


def test_a_phase_that_diverges_is_named(world: tuple[Path, Stored[Splits]], tmp_path: Path) -> None:
    wild = {"trains": "all", "fit": {**FIT, "learning_rate": 1e30, "warmup_epochs": 0}}
    with pytest.raises(TrainingDiverged, match="ower training.phases.1.fit.learning_rate"):
        trained(world, tmp_path / "out", phased({"trains": "head", "fit": FIT}, wild))


def test_weights_that_are_not_there_say_what_to_do(tmp_path: Path) -> None:
    from components.weights import download, from_pickle, from_safetensors

    with pytest.raises(WeightsUnavailable, match="cannot download.*Without network, put the file at"):
        download("http://127.0.0.1:9/weights-00000000.pth", sha256="00000000", cache=tmp_path, timeout_s=2)
    (tmp_path / "x.pth").write_bytes(b"data")
    with pytest.raises(WeightsUnavailable, match="expected ffff.*not opened"):
        from_pickle(tmp_path / "x.pth", sha256="ffff", cache=tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"data")
    with pytest.raises(WeightsUnavailable, match="not a readable safetensors file"):
        from_safetensors(tmp_path / "x.safetensors")


def test_a_hostile_pickle_is_never_executed(tmp_path: Path) -> None:
    import os
    import pickle

    from components.weights import from_pickle

    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {canary}",))

    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(WeightsUnavailable, match="not a plain state dict"):
        from_pickle(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), cache=tmp_path)
    assert not canary.exists()
