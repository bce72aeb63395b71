"""Slices of the test images, their figures and the gate that judges them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from components import plugins
from components.contracts.families import Answers, Evidence, Slices
from components.contracts.models import Engine
from components.contracts.verdicts import Evaluation, Finding
from components.intervals import paired_interval, wilson
from components.slices import TABLE, holm, make_slices, p_under, p_worse, slice_figures

TASK = plugins.load("tasks", "classification", {})


def facts(n: int, **columns: Any) -> pd.DataFrame:
    labels = ["cat" if row % 2 else "dog" for row in range(n)]
    return pd.DataFrame({"sha256": [f"{row:064x}" for row in range(n)], "label": labels, **columns})


def made(table: pd.DataFrame, out: Path, embedding: Any = None) -> tuple[Any, pd.DataFrame]:
    named = {"engine": "reference", "engine_digest": "e", "test_digest": "t"}
    record = make_slices(table, embedding, TASK, out=out, **named)
    return record, pd.read_parquet(out / TABLE)


def test_slices_are_what_a_person_would_call_them(tmp_path: Path) -> None:
    n = 200
    rng = np.random.default_rng(0)
    blobs = np.concatenate([rng.normal(3 * np.eye(8)[0], 0.1, (120, 8)), rng.normal(3 * np.eye(8)[1], 0.1, (80, 8))])
    record, table = made(
        facts(
            n,
            brightness=np.arange(n) / n,
            sharpness=np.full(n, 0.5),
            short_side=np.array([640] * 140 + [100] * 60),
            captured_at=["" if row < 100 else f"2026-01-{1 + row % 28:02d}T00:00:00Z" for row in range(n)],
            source=["north" if row < 150 else "south" for row in range(n)],
            group=[f"part {row // 2}" for row in range(n)],
            label_source=["person"] * n,
            weather=["rain" if row % 4 == 0 else "sun" for row in range(n)],
            size=["small" if row < 40 else "large" for row in range(n)],
        ),
        tmp_path,
        blobs,
    )
    assert record.num_images == n
    assert record.kinds == ("class", "brightness", "size", "time", "source", "group", "weather", "column size", "cluster")
    assert record.notes == (
        "sharpness: it is the same of most test images",
        "label_source: it is the same of all that say it",
    )
    counts = {kind: table[kind].value_counts().to_dict() for kind in record.kinds}
    assert counts["class"] == {"cat": 100, "dog": 100}
    assert counts["brightness"] == {
        "between the quarters": 100,
        "darkest quarter (at most 0.249)": 50,
        "brightest quarter (at least 0.746)": 50,
    }
    # More than a quarter are of the largest size, so that there is no largest quarter.
    assert counts["size"] == {"the rest": 140, "smallest quarter (at most 100 pixels)": 60}
    assert (table["time"][:100] == "").all()
    assert table["time"][100:].str.startswith(("earliest quarter (until 2026-01-0", "latest", "between")).all()
    assert counts["source"] == {"north": 150, "south": 50}
    assert counts["weather"] == {"sun": 150, "rain": 50}
    assert counts["column size"] == {"large": 160, "small": 40}
    assert counts["group"]["other"] == n - 2 * 19
    of_blob = [set(table["cluster"][:120]), set(table["cluster"][120:])]
    assert not of_blob[0] & of_blob[1]
    assert all(name.startswith("cluster ") and name.endswith((" cat", " dog")) for name in table["cluster"])


def test_what_is_not_known_makes_no_slices_and_is_said(tmp_path: Path) -> None:
    record, table = made(facts(40, brightness=[math.nan] * 40), tmp_path, np.full((40, 4), np.nan))
    assert record.kinds == ("class",)
    assert [note.split(":")[0] for note in record.notes] == [
        *("brightness", "sharpness", "size", "time", "source", "group", "label_source", "cluster")
    ]
    assert "it takes 100 test images with embeddings, there are 40" in record.notes[-1]
    assert list(table.columns) == ["sha256", "class"]


def test_p_values_are_the_intervals_turned_round() -> None:
    right, champion = np.zeros(200, dtype=bool), np.zeros(200, dtype=bool)
    right[:150], champion[:170] = True, True
    for margin in (0.0, 0.03):
        p = p_worse(right, champion, margin=margin)
        z = next(z for z in np.linspace(0, 12, 120_001) if paired_interval(150, 0, 20, 30, z=float(z))[1] >= -margin)
        assert p == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)), rel=1e-2)
    assert p_worse(champion, right, margin=0.0) == 1.0
    assert (p_under(150, 200, 0.8) <= 0.025) == (wilson(150, 200).high <= 0.8)
    assert (p_under(140, 200, 0.8) <= 0.025, wilson(140, 200).high < 0.8) == (True, True)
    assert p_under(180, 200, 0.8) == 1.0


def test_holm_is_that_of_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_among_slices_that_are_alike_none_is_shown_to_be_worse() -> None:
    """Of 400 sets of 20 slices at most 2.5 % name one; without the correction it would be a third of them."""
    rng = np.random.default_rng(5)
    ids = tuple(f"{row}" for row in range(1000))
    shown = uncorrected = 0
    for _ in range(400):
        slices = Slices(ids, {"source": [f"{value}" for value in rng.integers(0, 20, 1000)]})
        figures = slice_figures(rng.random(1000) < 0.9, None, ids, slices)
        assert len(figures) == 20
        shown += min(figure.p_below_rest for figure in figures) <= 0.025
        uncorrected += min(figure.to_rest.high for figure in figures if figure.to_rest) < 0
    assert shown <= 17  # the 97.5 % point of a binomial of 400 and 0.025
    assert uncorrected > 80


N = 600
IDS = tuple(f"{row}" for row in range(N))
CAMERAS = ["north" if row < 500 else "south" for row in range(N)]


def answers(wrong: range, more: range = range(0)) -> Answers:
    logits = np.tile(np.array([[0.0, 1.0]], np.float32), (N, 1))
    logits[[*wrong, *more]] = [1.0, 0.0]
    return Answers(IDS, ("dog",) * N, logits, ("cat", "dog"), TASK)


def judged(mine: Answers | None, champion: Answers | None, *, slices: Slices | None = None, **settings: Any) -> Finding:
    evidence = Evidence(
        engine=Engine.model_construct(classes=("cat", "dog")),
        evaluation=Evaluation.model_construct(),
        measurement=None,
        answers=mine,
        reference=None,
        champion=champion,
        champion_known=settings.pop("champion_known", True),
        champion_missing=settings.pop("champion_missing", ""),
        slices=slices or Slices(IDS, {"source": CAMERAS}, ("time: it is not known of any test image",)),
    )
    found: Finding = plugins.load("gates", "slices", settings).judge(evidence)
    return found


def test_a_camera_that_got_worse_fails_though_the_mean_rose() -> None:
    """30 of 100 wrong answers of the south instead of none; of the north 5 instead of 50."""
    mine, champion = answers(range(5), range(500, 530)), answers(range(50))
    assert mine.right.mean() > champion.right.mean()
    found = judged(mine, champion)
    assert (found.status, found.n, found.threshold) == ("fail", 100, -0.05)
    assert found.value == pytest.approx(-0.3)
    assert "source 'south': 0.7000 [0.6042, 0.7811] (n=100), the champion's 1.0000: difference -0.3000" in found.message
    assert "shown among 2 slices (p " in found.message
    assert judged(mine, champion, margin=0.25).status == "pass"


def test_what_could_be_hidden_is_said_where_nothing_is_shown() -> None:
    found = judged(answers(range(500, 503)), answers(range(500, 501)))
    assert found.status == "pass"
    assert found.value == pytest.approx(-0.02)
    assert "none of 2 slices is shown to be worse; least sure is source 'south'" in found.message
    assert "; at most 0.0" in found.message


def test_a_floor_for_every_slice_is_decided_three_ways() -> None:
    def with_floor(wrong: int) -> Finding:
        return judged(answers(range(500, 500 + wrong)), None, floor=0.85)

    assert with_floor(2).status == "pass"
    assert with_floor(30).status == "fail"
    undecided = with_floor(12)
    assert undecided.status == "inconclusive"
    assert "source 'south': 0.8800" in undecided.message
    assert "too few test images in it to decide: there are 100, about " in undecided.message


@pytest.mark.parametrize(
    ("given", "status", "told"),
    [
        ({"champion": None}, "not applicable", "no champion to compare with, and no floor is set"),
        ({"champion_missing": "its engine cannot be executed here: x"}, "inconclusive", "cannot be executed here: x"),
        ({"champion_known": False}, "inconclusive", "it is not known whether there is a champion to compare with"),
        (
            {"kinds": ("time",)},
            "inconclusive",
            "no slices by 'time' (time: it is not known of any test image); there are: source",
        ),
        ({"slices": Slices(IDS[:-1], {"source": CAMERAS[:-1]})}, "inconclusive", "the slices are of other test images"),
        ({"min_images": 601}, "inconclusive", "none of the slices of 600 test images has the 601"),
        ({"mine": None}, "inconclusive", "no answers of this engine"),
        (
            {"champion": Answers(IDS[::-1], ("dog",) * N, answers(range(1)).logits, ("cat", "dog"), TASK)},
            "inconclusive",
            "other test images",
        ),
        (
            {"mine": Answers(IDS, ("dog",) * N, np.full((N, 2), np.nan, np.float32), ("cat", "dog"), TASK)},
            "inconclusive",
            "not finite",
        ),
    ],
)
def test_what_cannot_be_compared_is_never_a_pass(given: dict[str, Any], status: str, told: str) -> None:
    values = {"mine": answers(range(3)), "champion": answers(range(3)), **given}
    found = judged(**values)
    assert found.status == status
    assert told in found.message


def test_without_slices_nothing_is_decided() -> None:
    evidence = Evidence(
        engine=Engine.model_construct(classes=("cat", "dog")),
        evaluation=Evaluation.model_construct(),
        measurement=None,
        answers=answers(range(3)),
        reference=None,
        champion=answers(range(3)),
        champion_known=True,
    )
    found = plugins.load("gates", "slices", {}).judge(evidence)
    assert (found.status, found.message) == ("inconclusive", "no slices were made of the test images")
