"""What a person looks at: which answers change beside the champion, and what answers rest on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from shapes import stored
from torch import nn

from components import plugins
from components.checkpoints import ImageModel
from components.contracts.data import Splits
from components.contracts.errors import TamperedArtefact
from components.contracts.evidence import CandidateEvidence
from components.contracts.models import Checkpoint, Engine, Preprocessing
from components.contracts.records import Stored
from components.contracts.verdicts import Evaluation, SliceTable
from components.evaluation import PREDICTIONS
from components.evidence import FLIPS, Compared, EvidenceConfig, collect
from components.saliency import last_maps, overlaid, saliency
from components.store import describe, sha256_file

TASK = plugins.load("tasks", "classification")


def answering(
    evaluation: Stored[Evaluation], classes: Sequence[str], out: Path, wrong: Sequence[int], **changed: Any
) -> Stored[Evaluation]:
    """The evaluation of an engine that answers all images right but those of these rows, the first of them surest."""
    out.mkdir()
    table = pd.read_parquet(evaluation.folder / PREDICTIONS)
    places = {name: place for place, name in enumerate(classes)}
    truth = np.array([places[label] for label in table["label"]])
    given = truth.copy()
    given[list(wrong)] = (truth[list(wrong)] + 1) % len(classes)
    sure = np.full(len(table), 4.0)
    sure[list(wrong)] = np.linspace(8, 5, len(wrong))
    logits = np.zeros((len(table), len(classes)), np.float32)
    logits[np.arange(len(table)), given] = sure
    confidence = TASK.probabilities(logits, 1.0).max(axis=1).astype(np.float32)
    table = table.assign(
        logits=list(logits), predicted=[classes[place] for place in given], confidence=confidence, right=given == truth
    )
    table.to_parquet(out / PREDICTIONS, index=False)
    update = {"predictions": describe(out / PREDICTIONS, within=out), **changed}
    return Stored(evaluation.record.model_copy(update=update), out)


@pytest.fixture(scope="module")
def parts(trained: Path) -> dict[str, Any]:
    return {
        "engine": stored(trained, "export/openvino-int8", Engine),
        "evaluation": stored(trained, "evaluation/openvino-int8", Evaluation),
        "slices": stored(trained, "evaluation/slices", SliceTable),
        "splits": stored(trained, "splitting", Splits),
        "checkpoint": stored(trained, "training", Checkpoint),
        "data": trained / "data",
        "task": TASK,
        "config": EvidenceConfig(),
        "num_threads": 1,
    }


def collected(parts: dict[str, Any], tmp_path: Path, champion: Compared | None, **changed: Any) -> CandidateEvidence:
    out = tmp_path / "evidence"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return collect(**{**parts, **changed}, champion=champion, out=out)


def test_what_changes_beside_the_champion_is_shown_with_its_neighbours_and_what_it_rests_on(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    classes = parts["engine"].record.classes
    mine = answering(parts["evaluation"], classes, tmp_path / "mine", [0, 1, 2])
    theirs = answering(parts["evaluation"], classes, tmp_path / "theirs", [2, 3, 4, 5], engine_digest="champion's")
    compared = Compared(theirs, classes)
    found = collected(parts, tmp_path, compared, evaluation=mine)
    out = tmp_path / "evidence"
    n = found.num_images
    assert (found.engine, found.champion_digest) == ("openvino-int8", "champion's")
    assert found.flips is not None
    assert (found.flips.both, found.flips.won, found.flips.lost, found.flips.neither) == (n - 6, 3, 2, 1)
    assert found.flips.difference.value == pytest.approx(1 / n)
    table = pd.read_parquet(mine.folder / PREDICTIONS)
    shown = {why: [one.sha256 for one in found.pictures if one.why == why] for why in ("lost", "won", "surest errors")}
    assert shown["lost"] == list(table["sha256"][[0, 1]])
    assert set(shown["won"]) == set(table["sha256"][[3, 4, 5]])
    # What was lost is an error too and is shown once, so one is left that both got wrong.
    assert shown["surest errors"] == list(table["sha256"][[2]])
    first = found.pictures[0]
    assert (first.label, first.champion_predicted) == (table["label"][0], table["label"][0])
    assert first.predicted == classes[(classes.index(first.label) + 1) % len(classes)]
    train = pd.read_parquet(parts["splits"].folder / parts["splits"].record.table.name).set_index("path")
    for one in found.pictures:
        assert len(one.neighbours) == 3
        assert set(train.loc[[near.path for near in one.neighbours], "split"]) == {"train"}
        assert sorted((near.similarity for near in one.neighbours), reverse=True) == [n.similarity for n in one.neighbours]
        assert one.neighbours[0].label == train.loc[one.neighbours[0].path, "label"]
        with Image.open(out / one.saliency) as drawn:
            assert min(drawn.size) >= 96
    # A picture's neighbours look like it, whatever was answered: the embedding is the engine's, not the altered answer's.
    assert np.mean([one.neighbours[0].label == one.label for one in found.pictures]) > 0.8
    assert found.saliency_by == "Grad-CAM of the torch network, for openvino-int8 gives no gradients"
    assert {file.name: file.sha256 for file in found.files} == {
        path.relative_to(out).as_posix(): sha256_file(path) for path in out.rglob("*") if path.is_file()
    }
    assert pd.read_parquet(out / FLIPS)["flip"].value_counts().to_dict() == {"": n - 5, "won": 3, "lost": 2}
    assert "brightness" in {one.kind for one in found.slices}
    assert all(one.to_champion is not None for one in found.slices)
    assert collected(parts, tmp_path, compared, evaluation=mine) == found


def test_without_a_champion_the_rest_is_shown(parts: dict[str, Any], tmp_path: Path) -> None:
    found = collected(parts, tmp_path, None)
    assert (found.flips, found.champion_digest) == (None, "none")
    assert {one.why for one in found.pictures} <= {"surest errors", "least sure"}
    least_sure = [one.confidence for one in found.pictures if one.why == "least sure"]
    assert least_sure == sorted(least_sure)
    assert all(one.to_champion is None and one.p_below_champion is None for one in found.slices)


def test_less_is_shown_where_the_recipe_says_so(parts: dict[str, Any], tmp_path: Path) -> None:
    few = collected(parts, tmp_path, None, config=EvidenceConfig(pictures=2, training_pictures=5))
    assert len(few.pictures) == 2 + min(2, sum(one.why == "surest errors" for one in few.pictures))
    assert all(len(one.neighbours) == 3 for one in few.pictures)
    assert any("are looked for among 5 of " in note for note in few.notes)
    none = collected(parts, tmp_path, None, config=EvidenceConfig(pictures=0, training_pictures=0))
    assert (none.pictures, none.saliency_by) == ((), "")
    assert none.slices == few.slices


def test_what_cannot_be_had_is_left_out_and_said(parts: dict[str, Any], tmp_path: Path) -> None:
    classes = parts["engine"].record.classes
    mine = answering(parts["evaluation"], classes, tmp_path / "mine", [0])
    data = Path(shutil.copytree(parts["data"], tmp_path / "data"))
    erased = pd.read_parquet(mine.folder / PREDICTIONS)["path"][0]
    (data / erased).unlink()
    found = collected(parts, tmp_path, None, evaluation=mine, data=data)
    assert (found.pictures[0].thumbnail, found.pictures[0].saliency) == ("", "")
    assert any("1 picture cannot be shown: not there any more" in note and erased in note for note in found.notes)

    other = answering(parts["evaluation"], classes, tmp_path / "other", [0])
    table = pd.read_parquet(other.folder / PREDICTIONS).iloc[1:]
    table.to_parquet(other.folder / PREDICTIONS, index=False)
    record = other.record.model_copy(update={"predictions": describe(other.folder / PREDICTIONS, within=other.folder)})
    found = collected(parts, tmp_path, Compared(Stored(record, other.folder), classes), evaluation=mine)
    assert found.flips is None
    assert (
        "the champion was asked about other test images or labels than this engine, so nothing is said of what changes"
        in found.notes
    )

    gone = Evaluation.model_validate(
        {**record.model_dump(), "status": "not executed here", "reason": "no GPU", "predictions": None}
    )
    found = collected(parts, tmp_path, Compared(Stored(gone, other.folder), classes), evaluation=mine, slices=None)
    assert {"the champion's answers are not there: no GPU", "no slices were made of the test images"} <= set(found.notes)

    failed = mine.record.model_copy(update={"reason": "its logits on 1 of 90 test images are not finite numbers"})
    found = collected(parts, tmp_path, None, evaluation=Stored(failed, mine.folder))
    assert (found.pictures, found.files, found.num_images) == ((), (), 0)
    assert "there is nothing to show of its answers: its logits on 1 of 90" in found.notes[0]

    (mine.folder / PREDICTIONS).write_bytes(b"other answers")
    with pytest.raises(TamperedArtefact, match="was changed after it was evaluated"):
        collected(parts, tmp_path, None, evaluation=mine)


PLAIN = Preprocessing(channels=1, height=16, width=16, resize_shortest=16, interpolation="bilinear", mean=(0.0,), std=(1.0,))


def picture_of_a_corner() -> Any:
    images = np.zeros((2, 16, 16, 1), np.uint8)
    images[0, :8, :8], images[1, 8:, 8:] = 255, 255
    return images


def test_grad_cam_is_where_the_evidence_lies() -> None:
    convolution = nn.Conv2d(1, 4, 1, bias=False)
    nn.init.ones_(convolution.weight)
    backbone = nn.Sequential(nn.AvgPool2d(4), convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Linear(4, 2)
    nn.init.constant_(head.weight[0], 1.0)
    nn.init.constant_(head.weight[1], -1.0)
    model = ImageModel(backbone, head, PLAIN)
    images = picture_of_a_corner()
    assert last_maps(model, images[:1]) is convolution
    maps, method = saliency(model, images)
    assert (method, maps.shape, float(maps.max())) == ("Grad-CAM", (2, 16, 16), 1.0)
    assert maps[0, :6, :6].min() > 0.9 > 0.1 > maps[0, 10:, 10:].max()
    assert maps[1, 10:, 10:].min() > 0.9 > 0.1 > maps[1, :6, :6].max()
    drawn = overlaid(images[0], maps[0])
    assert drawn.shape == (16, 16, 3)
    assert (drawn[0, 0] != drawn[15, 15]).any()


def test_a_network_without_maps_is_explained_by_integrated_gradients() -> None:
    linear = nn.Linear(256, 3)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        linear.weight[:, :128] = 0.0  # the upper half of the picture says nothing
    model = ImageModel(nn.Sequential(nn.Flatten(), linear), nn.Linear(3, 2), PLAIN)
    assert isinstance(model.head, nn.Linear)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[1.0] * 3, [-1.0] * 3]))
    images = np.full((1, 16, 16, 1), 200, np.uint8)
    assert last_maps(model, images) is None
    maps, method = saliency(model, images)
    assert method == "integrated gradients"
    assert (float(maps[0, :8].max()), float(maps[0, 8:].min())) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("name", "has_maps"), [("resnet18", True), ("vit_tiny_patch16_224", False), ("mobilenetv3_small_100", True)]
)
def test_maps_are_those_of_the_end_of_the_network(name: str, has_maps: bool) -> None:
    import timm

    network = (
        timm.create_model(name, num_classes=0, img_size=64) if "vit" in name else timm.create_model(name, num_classes=0)
    )
    plain = PLAIN.model_copy(update={"channels": 3, "mean": (0.0,) * 3, "std": (1.0,) * 3})
    width = network.eval()(torch.zeros(1, 3, 64, 64)).shape[1]
    model = ImageModel(network, nn.Linear(width, 2), plain)
    layer = last_maps(model, np.zeros((1, 64, 64, 3), np.uint8))
    assert (layer is not None) == has_maps
