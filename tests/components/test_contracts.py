from __future__ import annotations

import datetime
import math

import pytest
from pydantic import ValidationError

from components.contracts.errors import SchemaTooNew, StoreError, UnknownName
from components.contracts.models import Preprocessing
from components.contracts.records import FileDigest, Record
from components.contracts.verdicts import EngineVerdict, Estimate, Finding, Verdict, compare, compare_interval, exceptable
from components.contracts.wording import counted, shown_utc, utc_of
from components.gating import combined


def estimate(low: float, value: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high, n=10, method="test")


def test_a_record_survives_json_and_keeps_its_digest() -> None:
    record = Preprocessing(
        channels=1, height=28, width=28, resize_shortest=28, interpolation="bilinear", mean=(0.5,), std=(0.5,)
    )
    assert Preprocessing.read(record.to_json()) == record
    assert Preprocessing.read(record.to_json()).digest() == record.digest()


def test_preprocessing_from_before_colours_is_as_stored_and_keeps_its_digest() -> None:
    values = {"channels": 1, "height": 8, "width": 8, "resize_shortest": 8, "interpolation": "bilinear"}
    older = Preprocessing.read({"schema_version": 1, **values, "mean": [0.0], "std": [1.0]})
    assert older.colour == "as stored"
    # Of the record that commit 8385ffc made of these values.
    assert older.digest() == "f6922d08cedb755f438ead829428d27e638e898d64cee7d8d4ee6afb3ebe16e4"
    newer = Preprocessing(channels=1, height=8, width=8, resize_shortest=8, interpolation="bilinear", mean=(0,), std=(1,))
    assert newer.colour == "srgb"
    assert newer.digest() != older.digest()
    assert Preprocessing.read(newer.to_json()) == newer


def test_unknown_keys_and_changes_are_refused() -> None:
    with pytest.raises(ValidationError):
        FileDigest.model_validate({"name": "a", "sha256": "b", "bytes": 1, "surprise": 1})
    record = FileDigest(name="a", sha256="b", bytes=1)
    with pytest.raises(ValidationError):
        record.name = "c"


def test_an_older_record_is_upgraded_and_a_newer_one_refused() -> None:
    class Thing(Record):
        UPGRADES = {1: lambda values: {"full_name": values["name"]}}
        schema_version: int = 2
        full_name: str

    assert Thing.read({"schema_version": 1, "name": "x"}) == Thing(full_name="x")
    with pytest.raises(SchemaTooNew, match="schema version 3.*reads up to 2"):
        Thing.read({"schema_version": 3, "full_name": "x"})
    with pytest.raises(StoreError, match="without a schema_version"):
        Thing.read({"full_name": "x"})


def test_a_record_refuses_nan() -> None:
    with pytest.raises(ValidationError):
        estimate(0.0, math.nan, 1.0)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at_least", [True, False])
def test_a_missing_or_non_finite_value_never_passes(value: float | None, at_least: bool) -> None:
    assert compare(value, 0.5, at_least=at_least) == "inconclusive"
    assert compare(0.5, math.nan, at_least=at_least) == "inconclusive"


def test_compare_both_ways() -> None:
    assert compare(0.5, 0.5, at_least=True) == "pass"
    assert compare(0.49, 0.5, at_least=True) == "fail"
    assert compare(0.5, 0.5, at_least=False) == "pass"
    assert compare(0.51, 0.5, at_least=False) == "fail"


def test_an_interval_is_judged_as_a_whole() -> None:
    assert compare_interval(estimate(0.9, 0.95, 0.99), 0.9) == "pass"
    assert compare_interval(estimate(0.8, 0.95, 0.99), 0.9) == "inconclusive"
    assert compare_interval(estimate(0.7, 0.8, 0.89), 0.9) == "fail"
    assert compare_interval(None, 0.9) == "inconclusive"
    assert compare_interval(estimate(0.9, 0.95, 0.99), math.nan) == "inconclusive"


def test_an_unknown_name_lists_the_valid_ones() -> None:
    assert str(UnknownName("gate", "acuracy", ["parity", "accuracy"])) == "unknown gate 'acuracy'; valid: accuracy, parity"


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2026-03-01T14:00", "2026-03-01 14:00:00 UTC"),
        ("2026-03-01T14:00+02:00", "2026-03-01 12:00:00 UTC"),
        ("2026-03-01 00:30:00+05:30", "2026-02-28 19:00:00 UTC"),
        (" 2026-03-01T14:00:00.5Z ", "2026-03-01 14:00:00 UTC"),
        ("20260301T140000-0330", "2026-03-01 17:30:00 UTC"),
        ("2026-03-01", "2026-03-01 00:00:00 UTC"),
    ],
)
def test_a_moment_with_any_offset_is_told_in_utc(text: str, utc: str) -> None:
    assert shown_utc(text) == utc
    assert utc_of(text).utcoffset() == datetime.timedelta(0)


def test_one_is_no_plural() -> None:
    told = [counted(n, noun) for n in (0, 1, 2) for noun in ("version", "class", "new test image")]
    assert told[:3] == ["0 versions", "0 classes", "0 new test images"]
    assert told[3:6] == ["1 version", "1 class", "1 new test image"]
    assert told[6:] == ["2 versions", "2 classes", "2 new test images"]


@pytest.mark.parametrize(
    "text",
    ["", "noon", "1772373600", "20260301", "2026-13-01", "2026-02-30", "2026-03-01T14:00 CET", "2026-03-01T14:00 Europe/Berlin",
     "0001-01-01T00:00+14:00", "9999-12-31T23:59-12:00", "1969-12-31"],
)  # fmt: skip
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a moment"):
        utc_of(text)


def undecided(*findings: Finding, status: str = "inconclusive", required: bool = False, **other: Finding) -> Verdict:
    """A verdict whose serving engine has these findings; `other` is a finding of an engine beside it."""
    engines = [("a", True, True, findings)]
    engines += [("b", False, required, (PASSED, finding)) for finding in other.values()]
    judged = tuple(
        EngineVerdict.model_validate(
            {
                "engine": name,
                "engine_digest": name,
                "required": needed,
                "serving": serving,
                "status": combined(found),
                "findings": found,
            }
        )
        for name, serving, needed, found in engines
    )
    told = {"status": status, "serving_engine": "a", "engines": judged, "reasons": ("few",), "policy_digest": "p"}
    return Verdict.model_validate(told)


def found(gate: str, status: str = "inconclusive", n: int | None = 40) -> Finding:
    return Finding.model_validate({"gate": gate, "status": status, "message": "so", "n": n})


PASSED = found("accuracy", "pass")


def test_only_what_measured_something_and_did_not_decide_can_be_excepted() -> None:
    few, slow = found("no_regression"), found("latency")
    assert exceptable(undecided(PASSED, few)) == ("no_regression",)
    assert exceptable(undecided(PASSED, slow, few, found("x", "not applicable"))) == ("latency", "no_regression")
    # Another engine's gates count where that has to pass, and only then.
    assert exceptable(undecided(PASSED, few, beside=slow, required=True)) == ("latency", "no_regression")
    assert exceptable(undecided(PASSED, few, beside=found("parity", "fail"))) == ("no_regression",)


@pytest.mark.parametrize(
    "verdict",
    [
        undecided(PASSED, found("no_regression"), status="pass"),
        undecided(PASSED, found("no_regression"), status="fail"),
        undecided(PASSED, found("no_regression"), found("class_recall", "fail")),
        undecided(PASSED, found("no_regression"), found("parity")),
        undecided(PASSED, found("no_regression"), found("evaluation")),
        undecided(PASSED, found("no_regression"), found("serving")),
        undecided(PASSED, found("no_regression"), found("serves")),
        undecided(PASSED, found("no_regression"), found("evaluation", "not executed here")),
        undecided(PASSED, found("no_regression"), found("class_recall", n=None)),  # not finite, or nothing to compare
        undecided(PASSED, found("no_regression"), found("class_recall", n=0)),
        undecided(found("no_regression")),  # no gate passed
        undecided(PASSED, found("no_regression"), beside=found("export", "not executed here"), required=True),
        undecided(PASSED, found("no_regression"), beside=found("accuracy", "fail"), required=True),
    ],
)
def test_nothing_else_can_be_excepted(verdict: Verdict) -> None:
    assert exceptable(verdict) == ()
    assert exceptable(verdict.model_copy(update={"engines": ()})) == ()
