"""Which pictures are shown corrupted, whom they are shown to, and what is written of the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from shapes import stored

from components import plugins, robustness
from components.contracts.data import DataVersion, Splits
from components.contracts.errors import EngineUnavailable
from components.contracts.models import Engine
from components.contracts.records import Stored
from components.contracts.verdicts import Evaluation, Robustness
from components.corruptions import BEHAVIOURS, CLEAN, CORRUPTED, VARIANTS
from components.robustness import answer_corrupted, chosen
from components.store import describe
from components.tasks.classification import Task


def shown(
    trained: Path, out: Path, engine: Stored[Engine] | None = None, num_images: int = 30, **changes: Any
) -> Robustness:
    out.mkdir()
    return answer_corrupted(
        engine or stored(trained, "export/openvino-int8", Engine),
        stored(trained, "splitting", Splits),
        trained / "data",
        plugins.load("tasks", "classification"),
        num_images=num_images,
        num_threads=2,
        out=out,
        **changes,
    )


def test_every_picture_is_answered_in_every_variant_and_the_record_counts_the_answers(trained: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    found = shown(trained, tmp_path / "a", progress=lambda done, total: told.append((done, total)))
    assert found == shown(trained, tmp_path / "b")
    table = pd.read_parquet(tmp_path / "a" / "corrupted.parquet")
    splits = stored(trained, "splitting", Splits)
    expected = chosen(splits, Task(), 30)
    for variant in VARIANTS:
        rows = table[table["variant"] == variant]
        assert list(rows["sha256"]) == list(expected["sha256"])
        assert list(rows["label"]) == list(expected["label"])
        assert rows["right"].mean() == pytest.approx(found.right[variant].value)
    assert told[-1] == (30 * len(VARIANTS), 30 * len(VARIANTS))
    assert found.num_images == 30
    assert found.corrupted is not None
    assert found.corrupted.value == pytest.approx(table[table["variant"].isin(CORRUPTED)]["right"].mean())
    assert found.corrupted.n == 30
    answers = {variant: np.stack(list(rows["logits"])).argmax(1) for variant, rows in table.groupby("variant")}
    assert {name: share.value for name, share in found.unchanged.items()} == {
        behaviour: pytest.approx((answers[behaviour] == answers[CLEAN]).mean()) for behaviour in BEHAVIOURS
    }
    # Clean pictures are prepared and answered as evaluation does it.
    evaluated = stored(trained, "evaluation/openvino-int8", Evaluation)
    before = pd.read_parquet(evaluated.folder / "predictions.parquet").set_index("sha256")
    clean = table[table["variant"] == CLEAN]
    wanted = np.stack(list(before.loc[clean["sha256"], "logits"]))
    assert np.allclose(np.stack(list(clean["logits"])), wanted, atol=1e-3)
    # And they are changed on their way.
    assert not np.allclose(np.stack(list(table[table["variant"] == CORRUPTED[1]]["logits"])), wanted, atol=1e-2)


def split_of(tmp_path: Path, rows: list[tuple[str, str, str]]) -> Stored[Splits]:
    """The test split of these paths, labels and digests of pictures, with some images of train."""
    table = pd.DataFrame(rows, columns=["path", "label", "picture"]).assign(split="test")
    table["sha256"] = table["picture"] * 2
    train = table.iloc[:7].assign(split="train", picture="0")
    (folder := tmp_path / str(len(rows))).mkdir()
    pd.concat([train, table]).to_parquet(folder / "splits.parquet")
    record = Splits(
        data=DataVersion(dvc_hash="a", num_files=1, bytes=1, ledger_sha256="b"),
        table=describe(folder / "splits.parquet", within=folder),
        classes=("a", "b", "c"),
        counts={},
        class_counts={},
        num_duplicate_groups=0,
        test_digest="c",
    )
    return Stored(record, folder)


def test_the_pictures_are_chosen_by_stratum_and_digest_and_a_test_set_that_grows_keeps_them(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rows = [(f"{i:04d}.png", "aaaaabbbcc"[i % 10], draw.bytes(16).hex()) for i in range(400)]
    first = chosen(split_of(tmp_path, rows[:300]), Task(), 100)
    assert first["label"].value_counts().to_dict() == {"a": 50, "b": 30, "c": 20}
    assert set(first["split"]) == {"test"}
    # A tenth more pictures: a tenth of the shown ones make room.
    grown = chosen(split_of(tmp_path, rows[:330]), Task(), 100)
    assert len(set(first["picture"]) & set(grown["picture"])) >= 85
    renamed = [(f"{999 - i}.png", label, picture) for i, (_, label, picture) in enumerate(rows[:300])]
    (tmp_path / "other").mkdir()
    again = chosen(split_of(tmp_path / "other", renamed), Task(), 100)
    assert list(again["picture"]) == list(first["picture"])
    assert len(chosen(split_of(tmp_path, rows[:40]), Task(), 100)) == 40


def test_a_champion_of_other_classes_is_shown_the_same_pictures_of_the_shared_ones(trained: Path, tmp_path: Path) -> None:
    engine = stored(trained, "export/openvino-int8", Engine)
    candidate = shown(trained, tmp_path / "a")
    other = Stored(engine.record.model_copy(update={"classes": ("round", "zebra", "cross")}), engine.folder)
    found = shown(trained, tmp_path / "b", other, renamed=(("round", "disc"),))
    ours = pd.read_parquet(tmp_path / "a" / "corrupted.parquet")
    theirs = pd.read_parquet(tmp_path / "b" / "corrupted.parquet")
    assert list(theirs["sha256"]) == list(ours[ours["label"].isin(["cross", "disc"])]["sha256"])
    assert {len(logits) for logits in theirs["logits"]} == {2}
    assert 0 < found.num_images < candidate.num_images
    alone = Stored(engine.record.model_copy(update={"classes": ("x", "y", "cross")}), engine.folder)
    refused = shown(trained, tmp_path / "c", alone)
    assert (refused.status, refused.answers) == ("not comparable", None)
    assert refused.reason.endswith("of the classes that it shares with the data (cross)")


def test_an_engine_that_gives_no_answers_or_none_that_are_numbers_has_no_figures(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd:
        width = 3

        def predict(self, images: Any) -> Any:
            logits = np.zeros((len(images), self.width), np.float32)
            logits[0] = np.nan
            return logits, np.zeros((len(images), 16))

    monkeypatch.setattr(robustness, "load", lambda *_: Odd())
    found = shown(trained, tmp_path / "a", num_images=5)
    assert (found.status, found.corrupted, found.right) == ("evaluated", None, {})
    assert found.reason == f"its logits on {len(VARIANTS)} of {5 * len(VARIANTS)} changed test images are not finite numbers"
    assert len(pd.read_parquet(tmp_path / "a" / "corrupted.parquet")) == 5 * len(VARIANTS)
    monkeypatch.setattr(Odd, "width", 4)
    with pytest.raises(EngineUnavailable, match="does not belong to this label space"):
        shown(trained, tmp_path / "b", num_images=5)

    def refuse(*_: Any) -> Any:
        raise EngineUnavailable("no GPU")

    monkeypatch.setattr(robustness, "load", refuse)
    found = shown(trained, tmp_path / "c")
    assert (found.status, found.reason, found.answers) == ("not executed here", "no GPU", None)
