"""A window holds each row once, whole, of one release; what it leaves out it counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from watched import END, START, TASK, release, rows, sample

from components.contracts.records import Stored
from components.contracts.releases import Release
from components.predictionlog import Stretch
from monitoring.window import Window, open_window


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Stored[Release]:
    return release(tmp_path_factory.mktemp("release"))


def opened(mine: Stored[Release], *tables: pa.Table, most: int = 20_000, lost: int = 0) -> Window:
    return open_window(Stretch(tables, lost, ()), mine.record, TASK, "r1", "1", since=START, until=END, most=most)


def test_rows_come_back_as_they_were_served(mine: Stored[Release]) -> None:
    given = sample(100, 1)
    window = opened(mine, rows(given, "r1"))
    assert (window.facts.rows, window.facts.judged, window.facts.distinct_images) == (100, 100, 100)
    np.testing.assert_allclose(window.sample.embeddings, given.embeddings.astype(np.float16), rtol=1e-3)
    np.testing.assert_array_equal(window.sample.columns["predicted"], given.columns["predicted"])
    np.testing.assert_array_equal(window.sample.columns["confidence"], given.columns["confidence"].astype(np.float32))
    np.testing.assert_allclose(window.sample.statistics, given.statistics, atol=1e-6)
    assert list(window.frame["prediction_id"]) == sorted(window.frame["prediction_id"])


def test_repeated_and_reordered_rows_change_nothing(mine: Stored[Release]) -> None:
    table = rows(sample(200, 1), "r1")
    once = opened(mine, table)
    shuffled = table.take(np.random.default_rng(0).permutation(200))
    again = opened(mine, shuffled, table.slice(50, 30))
    assert again.facts.model_copy(update={"duplicates": 0}) == once.facts
    assert again.facts.duplicates == 30
    np.testing.assert_array_equal(again.sample.embeddings, once.sample.embeddings)


def test_another_row_is_another_content(mine: Stored[Release]) -> None:
    one, two = rows(sample(10, 1), "r1"), rows(sample(11, 1), "r1")
    assert opened(mine, one).facts.content != opened(mine, two).facts.content


def test_an_empty_window_is_empty(mine: Stored[Release]) -> None:
    for window in (opened(mine), opened(mine, rows(sample(5, 1), "r1", at=END))):
        assert (window.facts.rows, len(window.sample)) == (0, 0)
        assert window.sample.embeddings.shape == (0, 16)


def test_the_end_is_exclusive_and_the_begin_inclusive(mine: Stored[Release]) -> None:
    inside = rows(sample(1, 1), "r1", at=START)
    outside = rows(sample(1, 2), "r1", at=END, name="q")
    assert list(opened(mine, inside, outside).frame["prediction_id"]) == ["p000000"]


@pytest.mark.parametrize(
    "spoil", ["nan embedding", "null embedding", "long embedding", "nan confidence", "null statistic", "few classes"]
)
def test_what_is_not_whole_is_counted_and_not_compared(mine: Stored[Release], spoil: str) -> None:
    table = rows(sample(60, 1), "r1")
    bad = rows(sample(5, 2), "r1", name="bad")
    embedding = [np.zeros(16, np.float16)] * 5
    spoiled: dict[str, dict[str, Any]] = {
        "nan embedding": {"embedding": [np.full(16, np.nan, np.float16)] * 5},
        "null embedding": {"embedding": [None] * 5},
        "long embedding": {"embedding": [np.zeros(17, np.float16)] * 5},
        "nan confidence": {"confidence": [float("nan")] * 5},
        "null statistic": {"sharpness": [None] * 5},
        "few classes": {"probabilities": [np.ones(3, np.float32)] * 5, "embedding": embedding},
    }
    for name, value in spoiled[spoil].items():
        place = bad.schema.get_field_index(name)
        bad = bad.set_column(place, bad.schema.field(name), pa.array(value, bad.schema.field(name).type))
    window = opened(mine, table, bad)
    assert (window.facts.rows, window.facts.judged, window.facts.malformed) == (65, 60, 5)
    assert np.isfinite(window.sample.embeddings).all()


def test_another_releases_rows_are_counted_and_not_compared(mine: Stored[Release]) -> None:
    window = opened(mine, rows(sample(30, 1), "r1"), rows(sample(20, 2), "r0", name="old"))
    assert (window.facts.rows, window.facts.other_releases) == (30, 20)


def test_a_log_without_a_column_is_read_and_nothing_is_made_up(mine: Stored[Release]) -> None:
    older = rows(sample(30, 1), "r1").drop_columns(["sharpness"])
    window = opened(mine, older)
    assert (window.facts.rows, window.facts.judged, window.facts.malformed) == (30, 0, 30)


def test_an_image_is_compared_once(mine: Stored[Release]) -> None:
    """The same answer many times is no more evidence than once."""
    table = rows(sample(300, 1), "r1", image_sha256=[f"{i % 100:064x}" for i in range(300)])
    facts = opened(mine, table).facts
    assert (facts.rows, facts.judged, facts.distinct_images, facts.duplicates) == (300, 100, 100, 0)


def test_a_large_window_is_sampled_by_images_alone(mine: Stored[Release]) -> None:
    table = rows(sample(500, 1), "r1")
    window = opened(mine, table, most=200)
    assert (window.facts.rows, window.facts.judged) == (500, 200)
    half = opened(mine, table.slice(0, 250), most=200)
    both = set(window.frame["prediction_id"]) & {f"p{i:06d}" for i in range(250)}
    assert both <= set(half.frame["prediction_id"])
    assert opened(mine, table, lost=7).facts.lost == 7
