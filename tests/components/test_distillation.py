"""A student learns what its teacher answers: the loss, the views, the classes, and which pictures the teacher sees."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from shapes import KINDS, picture
from small_splits import NETWORK, write_small_splits

from components import plugins
from components.checkpoints import restore
from components.contracts.data import Splits
from components.contracts.errors import CheckpointMismatch, ConfigError, TamperedArtefact
from components.contracts.models import Checkpoint
from components.contracts.progress import MetricSink, silent
from components.contracts.records import Stored
from components.distillation import Teacher, Teaching, expect_teaches, stored_checkpoint
from components.features import AS_IT_IS
from components.fitting import Examples
from components.images import batches
from components.optimisation import OptimisationConfig, optimise
from components.segments import names_in
from components.store import Store, describe
from components.training import TrainingConfig, begins_from_a_model, check, train

FIT = {"epochs": 12, "batch_size": 8, "learning_rate": 0.02, "warmup_epochs": 0, "patience": 12, "checkpoint_every_s": 0}
TAUGHT = {"checkpoint": "teacher"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Stored[Splits]]:
    root = tmp_path_factory.mktemp("world")
    return root, write_small_splits(root)


@pytest.fixture(scope="module")
def teacher(world: tuple[Path, Stored[Splits]]) -> Stored[Checkpoint]:
    """A network of another kind than its students, on larger pictures."""
    fit = {**FIT, "epochs": 25, "learning_rate": 0.01}
    settings = {"image_size": 24, "width": 8, "embedding_dim": 16}
    out = world[0] / "teacher"
    out.mkdir()
    found = Stored(_trained(world, out, config(weights="random", backbone_settings=settings, fit=fit)), out)
    assert found.record.valid_metrics["accuracy"] == 1
    return found


def config(**changes: object) -> TrainingConfig:
    values = {"backbone": "small_cnn", "backbone_settings": NETWORK, "weights": "start.safetensors", "fit": FIT}
    return TrainingConfig.model_validate_json(json.dumps(values | changes), strict=True)


def phased(*phases: Mapping[str, object], **changes: object) -> TrainingConfig:
    values = {"backbone": "small_cnn", "backbone_settings": NETWORK, "weights": "start.safetensors", "phases": phases}
    return TrainingConfig.model_validate_json(json.dumps(values | changes), strict=True)


def _trained(world: tuple[Path, Stored[Splits]], out: Path, config: TrainingConfig, **given: Any) -> Checkpoint:
    root, splits = world
    out.mkdir(exist_ok=True)
    return train(splits, root / "data", config, out=out, cache=root / "cache", root=root, num_threads=1, **given)


def test_the_loss_is_the_divergence_of_softened_answers_and_the_phases_own() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0]])
    answers = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]])
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    seen: list[torch.Tensor] = []

    def own(_: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(targets)
        return torch.tensor(10.0)

    def of(share: float, *, mixed: bool = False) -> float:
        return float(_teaching(share=share, temperature=3.0).loss(own, mixed=mixed)(logits, torch.cat([labels, answers], 1)))

    softened = np.exp(logits.numpy() / 3) / np.exp(logits.numpy() / 3).sum(axis=1, keepdims=True)
    divergence = float((answers.numpy() * np.log(answers.numpy() / softened)).sum(axis=1).mean())
    assert of(1.0) == pytest.approx(9 * divergence, rel=1e-5)
    assert seen == []
    assert of(0.6) == pytest.approx(0.6 * 9 * divergence + 4, rel=1e-5)
    # Losses by name take class numbers where nothing is mixed, and shares where something is.
    assert torch.equal(seen.pop(), torch.tensor([0, 2]))
    of(0.6, mixed=True)
    assert torch.equal(seen.pop(), labels)


def test_teacher_and_student_see_the_same_view_which_no_teacher_changes() -> None:
    class Views:
        """Rows say which view was drawn."""

        def __len__(self) -> int:
            return 40

        def take(self, rows: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
            assert generator is not None
            return torch.randint(3, (len(rows),), generator=generator)[:, None].float()

    class Asked(Teaching):
        def answers(self, features: torch.Tensor) -> torch.Tensor:
            return features.expand(-1, 3)

    taught = _teaching(Asked)
    plain = Examples(Views(), torch.arange(40) % 3)
    from components.distillation import TaughtExamples

    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    rows = torch.arange(0, 40, 2)
    inputs, targets = TaughtExamples(plain, Views(), taught).take(rows, generators[0])
    alone, _ = plain.take(rows, generators[1])
    assert len(set(inputs.flatten().tolist())) == 3
    assert torch.equal(targets[:, 3:], inputs.expand(-1, 3))
    assert torch.equal(targets[:, :3].argmax(dim=1), rows % 3)
    assert torch.equal(inputs, alone)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def _teaching(kind: type[Teaching] = Teaching, **settings: float) -> Teaching:
    backbone = plugins.load("backbones", "small_cnn", NETWORK)
    chosen = Teacher.model_validate({**TAUGHT, **settings})
    return kind(chosen, "small_cnn", backbone, {}, torch.nn.Identity(), (0, 1, 2), 8)


@pytest.mark.parametrize(
    "phases",
    [
        [{"trains": "all", "augmentations": [{"augmentation": "flip"}], "fit": FIT}],
        [{"trains": {"last": 2}, "views": 3, "augmentations": [{"augmentation": "flip"}], "fit": FIT}],
        [{"trains": {"last": 2}, "augmentations": [{"augmentation": "mixup"}], "sampling": "balanced", "fit": FIT}],
    ],
    ids=["everything", "views", "mixed and balanced"],
)
def test_a_student_learns_from_its_teacher_what_labels_do_not_say(
    world: tuple[Path, Stored[Splits]], teacher: Stored[Checkpoint], tmp_path: Path, phases: list[dict[str, object]]
) -> None:
    """Every train picture has a wrong label, and the teacher knows better."""
    splits = _relabelled(world, tmp_path / "splits")
    student = {**TAUGHT, "share": 1.0}
    found = _trained((world[0], splits), tmp_path / "taught", phased(*phases, teacher=student), teacher=teacher)
    assert _right(Stored(found, tmp_path / "taught")) > 0.9
    _trained((world[0], splits), tmp_path / "alone", phased(*phases))
    last = json.loads((tmp_path / "alone" / "history.json").read_text())[-1]
    assert last["valid_accuracy"] < 0.5, "labels alone teach it what is wrong"


def _relabelled(world: tuple[Path, Stored[Splits]], folder: Path) -> Stored[Splits]:
    """The splits with each train picture under the class after its own."""
    folder.mkdir()
    table = pd.read_parquet(world[0] / "splits.parquet")
    wrong = {kind: KINDS[(place + 1) % 3] for place, kind in enumerate(KINDS)}
    chosen = table["split"] == "train"
    table.loc[chosen, "label"] = table.loc[chosen, "label"].map(wrong)
    table.to_parquet(folder / "splits.parquet")
    record = world[1].record.model_copy(update={"table": describe(folder / "splits.parquet", within=folder)})
    return Stored(record, folder)


def _right(checkpoint: Stored[Checkpoint]) -> float:
    """Share of new pictures that are answered right."""
    pictures = np.stack([picture(KINDS[i % 3], 500 + i) for i in range(90)])[..., None]
    with torch.inference_mode():
        answers = restore(checkpoint)(torch.from_numpy(pictures))[0].argmax(dim=1)
    return float((answers == torch.arange(90) % 3).float().mean())


def test_the_teacher_sees_train_pictures_alone_and_nobody_reads_test(
    world: tuple[Path, Stored[Splits]], teacher: Stored[Checkpoint], tmp_path: Path
) -> None:
    root, splits = world
    table = pd.read_parquet(root / "splits.parquet")
    (root / "data" / "cross" / "broken.png").write_bytes(b"no picture")
    hidden = pd.DataFrame([("cross/broken.png", "cross", "f" * 32, name) for name in ("calibration", "test")])
    hidden.columns = table.columns
    (tmp_path / "splits").mkdir()
    pd.concat([table, hidden]).to_parquet(tmp_path / "splits" / "splits.parquet")
    record = splits.record.model_copy(
        update={"table": describe(tmp_path / "splits" / "splits.parquet", within=tmp_path / "splits")}
    )
    phases = {"trains": {"last": 1}, "views": 2, "augmentations": [{"augmentation": "flip"}], "fit": {**FIT, "epochs": 1}}
    cache = tmp_path / "cache"
    (tmp_path / "out").mkdir()
    student = phased(phases, teacher=TAUGHT)
    hidden_splits = Stored(record, tmp_path / "splits")
    train(
        hidden_splits, root / "data", student, out=tmp_path / "out", cache=cache, root=root, teacher=teacher, num_threads=1
    )
    views = [*next((cache / "features").iterdir()).iterdir()]
    assert len(views) == 2
    for view in views:
        assert names_in(view) == set(table.loc[table["split"] == "train", "picture"])


def test_what_is_learned_is_what_the_teacher_answers_also_where_a_pass_made_it_smaller(
    world: tuple[Path, Stored[Splits]], teacher: Stored[Checkpoint], tmp_path: Path
) -> None:
    root, splits = world
    step = {"trains": "all", "fit": {**FIT, "epochs": 1}}
    prune = {"pass": "prune", "settings": {"share": 0.4, "round_to": 1}, "phases": [step]}
    passes = OptimisationConfig.model_validate_json(json.dumps({"passes": [prune]}), strict=True)
    settings = dict(teacher.record.backbone_settings)
    training = config(weights="random", backbone_settings=settings)
    (tmp_path / "pruned").mkdir()
    out, cache = tmp_path / "pruned", root / "cache"
    smaller = optimise(teacher, splits, root / "data", passes, training, out=out, cache=cache, num_threads=1)
    assert smaller.embedding_dim < teacher.record.embedding_dim
    table = pd.read_parquet(root / "splits.parquet")
    paths = [root / "data" / path for path in table["path"]]
    inputs = Examples(torch.zeros(len(table), 1), torch.arange(len(table)) % 3)
    generator = torch.Generator().manual_seed(0)
    for one in (teacher, Stored(smaller, tmp_path / "pruned")):
        teaching = Teaching.of(Teacher(checkpoint="there", temperature=3.0), one, (), KINDS, "classification")
        taught = teaching.examples(
            inputs,
            list(table["picture"]),
            paths,
            [AS_IT_IS],
            cache=root / "cache",
            num_threads=1,
            progress=silent,
            say=lambda _: None,
        )
        _, targets = taught.take(torch.arange(len(table)), generator)
        pictures = np.concatenate(list(batches(paths, one.record.preprocessing, batch_size=64)))
        with torch.inference_mode():
            logits = restore(one)(torch.from_numpy(pictures))[0]
        torch.testing.assert_close(targets[:, 3:], torch.softmax(logits / 3, dim=1), atol=1e-4, rtol=1e-3)


def test_classes_are_the_datas_by_the_names_and_in_the_order_of_today(teacher: Stored[Checkpoint]) -> None:
    chosen = Teacher(checkpoint="teacher")
    renames = (("disc", "a"), ("stripes", "disc"))
    plain = Teaching.of(chosen, teacher, (), KINDS, "classification")
    renamed = Teaching.of(chosen, teacher, renames, ("a", "cross", "disc"), "classification")
    features = torch.rand(5, 16, generator=torch.Generator().manual_seed(0)) * 4
    # cross, disc and stripes are cross, a and disc now.
    assert torch.equal(plain.answers(features)[:, [1, 0, 2]], renamed.answers(features))
    logits = plain.head(features) / chosen.temperature
    torch.testing.assert_close(plain.answers(features), torch.softmax(logits, dim=1))
    record = teacher.record
    with pytest.raises(ConfigError, match=r"the champion, answers about other classes .*\(new: a; gone: stripes\); choose"):
        expect_teaches(record, (), ("a", "cross", "disc"), "classification", "the champion")
    with pytest.raises(ConfigError, match=r"was trained for the task 'classification', and the student is for 'pose'"):
        expect_teaches(record, (), KINDS, "pose", "it")
    with pytest.raises(ConfigError, match="new: ring; gone: none"):
        Teaching.of(chosen, teacher, (), (*KINDS, "ring"), "classification")
    gone = Stored(record.model_copy(update={"backbone": "theirs"}), teacher.folder)
    with pytest.raises(ConfigError, match=r"^training.teacher: the teacher, cannot be built: unknown backbone 'theirs'"):
        Teaching.of(chosen, gone, (), KINDS, "classification")


def test_a_killed_run_goes_on_to_the_same_bits_and_only_with_its_teacher(
    world: tuple[Path, Stored[Splits]], teacher: Stored[Checkpoint], tmp_path: Path
) -> None:
    changed = [{"augmentation": "flip"}, {"augmentation": "mixup"}]
    short = {**FIT, "epochs": 4}
    student = phased({"trains": {"last": 1}, "views": 2, "augmentations": changed, "fit": short}, teacher=TAUGHT)

    class Killed(MetricSink):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            if step == 2:
                raise KeyboardInterrupt

    _trained(world, tmp_path / "whole", student, teacher=teacher)
    with pytest.raises(KeyboardInterrupt):
        _trained(world, tmp_path / "killed", student, teacher=teacher, sink=Killed())
    other = Stored(teacher.record.model_copy(update={"temperature": 9.0}), teacher.folder)
    with pytest.raises(CheckpointMismatch, match="belongs to another config or other data"):
        _trained(world, tmp_path / "killed", student, teacher=other)
    _trained(world, tmp_path / "killed", student, teacher=teacher)
    for name in ("weights.safetensors", "history.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    alone = phased({"trains": {"last": 1}, "views": 2, "augmentations": changed, "fit": short})
    _trained(world, tmp_path / "alone", alone)
    ends = [load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "alone")]
    assert not all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_what_no_teacher_can_be_is_refused_before_any_work(
    world: tuple[Path, Stored[Splits]], teacher: Stored[Checkpoint], tmp_path: Path
) -> None:
    for given, told in (({}, "none is given"), ({"champion": "a", "checkpoint": "b"}, "both are given")):
        with pytest.raises(ValidationError, match=f"name one teacher: .*{told}"):
            Teacher.model_validate(given)
    check(config(teacher=TAUGHT), world[0])
    assert "teacher" not in config().to_json()
    assert begins_from_a_model(config(teacher=TAUGHT), world[0])
    assert not begins_from_a_model(config(), world[0])
    with pytest.raises(ConfigError, match="no teacher was given"):
        _trained(world, tmp_path / "out", config(teacher=TAUGHT))

    store = Store(tmp_path / "store")
    for kind, key in (("training", "a"), ("training/fold-1", "b")):
        with store.writing(kind, key) as out:
            (out / "weights.safetensors").write_bytes((teacher.folder / "weights.safetensors").read_bytes())
        store.publish(kind, key, teacher.record, inputs={}, provenance={"data_version": "abc.dir"})
    (tmp_path / "run").symlink_to(store.folder("training", "a"))
    found, version = stored_checkpoint(tmp_path / "run")
    assert (found.record, version) == (teacher.record, "abc.dir")
    assert restore(found)
    with pytest.raises(ConfigError, match="holds a result of 'training/fold-1'; expected that of a training or an optim"):
        stored_checkpoint(store.folder("training/fold-1", "b"))
    with pytest.raises(ConfigError, match="none is no folder; expected one that a training published"):
        stored_checkpoint(tmp_path / "none")
    with pytest.raises(TamperedArtefact, match="training.teacher.checkpoint: .* cannot teach: .*no readable manifest"):
        stored_checkpoint(tmp_path)
    weights = found.folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(TamperedArtefact, match=r"cannot teach: .*weights.safetensors was changed after it was published"):
        stored_checkpoint(tmp_path / "run")


def test_a_network_that_is_cut_has_the_weights_and_blocks_of_the_whole(tmp_path: Path) -> None:
    from components.checkpoints import blocks

    whole = plugins.load("backbones", "efficientnet_lite0", {"image_size": 64})
    state = whole.pretrained("packaged", cache=tmp_path)
    module = whole.build()
    module.load_state_dict(state)
    *below, sixth = blocks("efficientnet_lite0", whole, module)[:6]
    cut = plugins.load("backbones", "efficientnet_lite0", {"image_size": 64, "num_layers": 12})
    student = cut.build()
    student.load_state_dict(cut.pretrained("packaged", cache=tmp_path))
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = student.eval()(pictures)
        assert features.shape == (2, cut.embedding_dim)
        maps = torch.nn.Sequential(*below, next(iter(sixth.children()))).eval()(pictures)
        torch.testing.assert_close(features, maps.mean(dim=(2, 3)))
        torch.testing.assert_close(torch.nn.Sequential(*blocks("efficientnet_lite0", cut, student))(pictures), features)
    sizes = [sum(each.numel() for each in network.parameters()) for network in (student, module)]
    assert sizes[0] < sizes[1] / 3
    with pytest.raises(ConfigError, match="the network has 16 layers; name fewer, or leave num_layers out for all of it"):
        plugins.load("backbones", "efficientnet_lite0", {"num_layers": 16})
