"""What a phase trains, on which views of a picture, with which loss; and the phases that are refused."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from components import plugins
from components.checkpoints import blocks
from components.contracts.errors import ConfigError, UnknownName
from components.phases import LastBlocks, Phase, check

TASK = plugins.load("tasks", "classification")
FLIP = {"augmentation": "flip", "settings": {"probability": 0.5}}
MIXUP = {"augmentation": "mixup"}


def phase(**said: Any) -> Phase:
    return Phase.model_validate_json(json.dumps({"trains": {"last": 2}} | said), strict=True)


def test_what_trains_is_said_in_words() -> None:
    assert phase().trains == LastBlocks(last=2)
    assert [phase(trains=trains).part for trains in ("head", "all", {"last": 1}, {"last": 3})] == [
        "the head",
        "everything",
        "the last block",
        "the last 3 blocks",
    ]


@pytest.mark.parametrize(
    "trains", [{"last": 0}, {"last": 1001}, {"last": True}, {"last": 2, "first": 1}, {}, "nothing", ["head"], 2]
)
def test_a_phase_that_trains_nothing_is_refused(trains: object) -> None:
    with pytest.raises(ValidationError, match="trains nothing; expected head, all, or {last: N} with N of 1 or more blocks"):
        phase(trains=trains)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (
            {"augmentations": [FLIP]},
            r"^training.phases.0.augmentation has no effect with one view of each picture, with the last 2 blocks training.* set views to 2 or more",
        ),
        ({"trains": "head", "batch_norm": "trains"}, "^training.phases.0.batch_norm has no effect with trains: head"),
        ({"views": 4}, "^training.phases.0.views: 4 views of each picture would be the same; name augmentations"),
        ({"views": 4, "augmentations": [MIXUP]}, "4 views of each picture would be the same"),
        ({"trains": "all", "views": 2, "augmentations": [FLIP]}, "views has no effect with trains: all"),
        (
            {"loss": {"loss": "focal"}, "augmentations": [MIXUP]},
            "mixup makes targets that are shares .* 'focal' takes class",
        ),
        (
            {"trains": "head", "augmentations": [{"augmentation": "cutmix"}]},
            "cutmix cuts pieces out of .* there are only features",
        ),
    ],
)
def test_phases_that_cannot_work_are_refused(said: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check(phase(**said), "training.phases.0", TASK)


def test_unknown_members_list_the_valid_ones() -> None:
    with pytest.raises(UnknownName, match="unknown losse? 'hinge'; valid: .*focal"):
        check(phase(loss={"loss": "hinge"}), "training.phases.0", TASK)
    with pytest.raises(UnknownName, match="unknown augmentation 'flop'; valid: .*flip"):
        check(phase(augmentations=[{"augmentation": "flop"}]), "training.phases.0", TASK)


def test_a_task_of_several_labels_takes_no_loss_by_name() -> None:
    class Several:
        """Says nothing of one class an image."""

    with pytest.raises(ConfigError, match="need a task with one class an image"):
        check(phase(sampling="balanced"), "training.phases.0", Several())  # type: ignore[arg-type]
    check(phase(), "training.phases.0", Several())  # type: ignore[arg-type]


def test_a_view_is_the_same_whatever_lies_beside_it() -> None:
    images = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), dtype=np.uint8)
    names = [f"{number:032x}" for number in range(6)]
    drawn = [view.change for view in phase(views=3, augmentations=[FLIP]).cached_views()]
    assert np.array_equal(drawn[0](images, names), images)
    views = [change(images, names) for change in drawn[1:]]
    for number, whole in enumerate(views, 1):
        alone = np.concatenate([drawn[number](images[[row]], [names[row]]) for row in (3, 0)])
        assert np.array_equal(whole[[3, 0]], alone)
        mirrored = [not np.array_equal(image, found) for image, found in zip(images, whole, strict=True)]
        assert 0 < sum(mirrored) < 6
        assert all(
            np.array_equal(found, image[:, ::-1] if is_mirrored else image)
            for image, found, is_mirrored in zip(images, whole, mirrored, strict=True)
        )
    assert not np.array_equal(views[0], views[1])


def test_views_share_a_name_when_they_are_drawn_alike() -> None:
    def named(**said: Any) -> list[str]:
        return [view.name for view in phase(**said).cached_views()]

    one = named(views=3, augmentations=[FLIP])
    assert len(set(one)) == 3
    assert named(views=5, augmentations=[MIXUP, FLIP], fit={"epochs": 3})[:3] == one
    always = named(views=2, augmentations=[{"augmentation": "flip", "settings": {"probability": 0.9}}])
    assert always[0] == one[0]
    assert always[1] not in one
    assert named(augmentations=[MIXUP]) == one[:1]
    moved = named(views=2, augmentation={"rotate_degrees": 5}, augmentations=[FLIP])
    assert moved[1] not in one


def test_a_backbone_that_does_not_know_its_blocks_says_what_trains_instead() -> None:
    module = torch.nn.Identity()
    for backbone in (object(), SimpleNamespace(blocks=lambda module: [])):
        with pytest.raises(
            ConfigError, match="the blocks of backbone 'own' are not known.*choose trains: head or trains: all"
        ):
            blocks("own", backbone, module)  # type: ignore[arg-type]
