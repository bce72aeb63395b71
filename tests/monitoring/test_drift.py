"""Detectors and their verdict: loud on shifts, quiet without, and never a pass where nothing could be shown."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from watched import END, START, TASK, changed, release, rows, sample

from components.contracts.errors import ConfigError, MonitoringError, UnknownName
from components.contracts.records import Stored
from components.contracts.releases import Release
from components.predictionlog import Stretch
from monitoring import calibration
from monitoring.detectors.confidence import Detector as Confidence
from monitoring.detectors.embeddings import Detector as Embeddings
from monitoring.detectors.image_statistics import Detector as ImageStatistics
from monitoring.detectors.predicted_classes import Detector as PredictedClasses
from monitoring.drift import DetectorConfig, DriftPolicy, as_json, check, judge
from monitoring.evidently_report import measure
from monitoring.reference import load_reference
from monitoring.verdicts import DriftVerdict, Sample
from monitoring.window import open_window


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Stored[Release]:
    return release(tmp_path_factory.mktemp("release"))


def verdict(
    mine: Stored[Release],
    given: Sample,
    *,
    policy: DriftPolicy = DriftPolicy(),
    lost: int = 0,
    problems: tuple[str, ...] = (),
    **changes: Any,
) -> DriftVerdict:
    table = rows(given, "r1", **changes)
    log = Stretch((table,), lost, problems)
    window = open_window(log, mine.record, TASK, "r1", "1", since=START, until=END, most=policy.most_images)
    found, _ = judge(load_reference(mine, TASK), window, policy, reference_sha256=mine.record.reference.sha256)
    return found


def test_the_same_is_a_pass(mine: Stored[Release]) -> None:
    found = verdict(mine, sample(1000, 1))
    assert (found.status, found.diagnosis, found.detectors) == ("pass", "none", ())
    assert {shift.status for shift in found.shifts} == {"pass"}
    for shift in found.shifts:
        assert shift.smallest_shown is not None
        assert shift.material_effect is not None
        assert shift.smallest_shown <= shift.material_effect
        assert shift.p_value is not None
        assert 0 < shift.p_value <= 1


def test_a_shift_is_drift_and_says_which(mine: Stored[Release]) -> None:
    found = verdict(mine, sample(1000, 1, shift=1.0))
    assert (found.status, found.diagnosis) == ("drift", "appearance")
    assert set(found.detectors) == {"image_statistics", "confidence", "embeddings"}
    assert any("brightness by" in reason for reason in found.reasons)
    by_name = {shift.detector: shift for shift in found.shifts}
    assert by_name["image_statistics"].effect == pytest.approx(1.0, abs=0.15)
    effect = by_name["embeddings"].effect
    assert effect is not None
    assert effect > 0.9
    assert as_json(found)["detectors"] == list(found.detectors)


def test_a_verdict_is_the_same_every_time_and_reads_back(mine: Stored[Release]) -> None:
    one, two = (verdict(mine, sample(400, 1, shift=0.5)) for _ in range(2))
    assert one.digest() == two.digest()
    assert DriftVerdict.read(one.to_json()) == one


def test_few_images_that_show_nothing_are_inconclusive(mine: Stored[Release]) -> None:
    found = verdict(mine, sample(60, 1))
    assert found.status == "inconclusive"
    assert any("too few images in the window to decide: there are 60, about" in reason for reason in found.reasons)
    assert (
        verdict(mine, sample(49, 1)).reasons[0] == "too few images with usable answers to decide: there are 49, 50 would do"
    )


def test_few_images_that_show_a_lot_are_drift(mine: Stored[Release]) -> None:
    assert verdict(mine, sample(60, 1, shift=3.0)).status == "drift"


def test_no_rows_are_no_data_and_never_no_drift(mine: Stored[Release]) -> None:
    found = verdict(mine, sample(0, 1))
    assert found.status == "no data"
    assert "no prediction of version 1" in found.reasons[0]
    others = verdict(mine, sample(30, 1), release=["r0"] * 30)
    assert others.status == "no data"
    assert "30 predictions of other releases" in others.reasons[0]


@pytest.mark.parametrize(
    ("hole", "words"),
    [
        ({"lost": 400}, "the log lost 400 predictions"),
        ({"problems": ("segment x was changed",)}, "could not be read: segment x was changed"),
    ],
)
def test_a_quiet_window_with_holes_is_no_pass(mine: Stored[Release], hole: dict[str, Any], words: str) -> None:
    found = verdict(mine, sample(1000, 1), **hole)
    assert found.status == "inconclusive"
    assert any(words in reason for reason in found.reasons)
    assert verdict(mine, sample(1000, 1, shift=1.0), **hole).status == "drift"


def test_many_malformed_rows_are_no_pass(mine: Stored[Release]) -> None:
    given = sample(1000, 1)
    spoiled = [
        np.full(16, np.nan, np.float16) if i % 10 == 0 else row for i, row in enumerate(given.embeddings.astype(np.float16))
    ]
    found = verdict(mine, given, embedding=spoiled)
    assert found.status == "inconclusive"
    assert any("100 of 1000 predictions have no finite answers" in reason for reason in found.reasons)


def test_one_class_is_drift(mine: Stored[Release]) -> None:
    given = changed(sample(500, 1), predicted=np.full(500, "3"))
    found = verdict(mine, given)
    assert (found.status, found.diagnosis, found.detectors) == ("drift", "class mix", ("predicted_classes",))
    assert any("'3' went from" in reason for reason in found.reasons)


def test_black_frames_are_broken_input(mine: Stored[Release]) -> None:
    given = sample(300, 1, shift=1.0)
    black = dataclasses.replace(given, statistics=np.zeros_like(given.statistics))
    found = verdict(mine, black)
    assert (found.status, found.diagnosis) == ("drift", "broken input")
    assert any("show next to nothing" in reason for reason in found.reasons)


def test_a_camera_that_is_stuck_is_broken_input(mine: Stored[Release]) -> None:
    found = verdict(mine, sample(300, 1), image_sha256=["a" * 64] * 300)
    assert (found.status, found.diagnosis, found.detectors) == ("drift", "broken input", ("repetition",))
    assert "300 predictions about 1 image only" in found.reasons[0]
    # A few pictures that are asked again and again among enough others are nothing.
    shas = ["a" * 64] * 200 + [f"{i:064x}" for i in range(400)]
    assert verdict(mine, sample(600, 1), image_sha256=shas).status == "pass"


def test_content_alone_is_told_from_looks(mine: Stored[Release]) -> None:
    given, moved = sample(1000, 1), sample(1000, 2, shift=1.0)
    found = verdict(mine, dataclasses.replace(given, embeddings=moved.embeddings))
    assert (found.diagnosis, found.detectors) == ("content", ("embeddings",))
    found = verdict(mine, changed(given, confidence=moved.columns["confidence"]))
    assert (found.diagnosis, found.detectors) == ("confidence", ("confidence",))


def test_a_small_reference_promises_nothing(tmp_path: Path) -> None:
    small = release(tmp_path / "small", sample(200, 0))
    found = verdict(small, sample(1000, 1))
    assert found.status == "inconclusive"
    assert "too few images in the release's reference to decide: there are 200, 300 would do" in found.reasons[0]
    assert verdict(small, sample(1000, 1), policy=DriftPolicy(min_reference=100)).status in ("pass", "inconclusive")


def test_a_reference_without_any_variation_is_compared_all_the_same(tmp_path: Path) -> None:
    given = sample(1000, 0)
    flat = dataclasses.replace(given, statistics=np.full_like(given.statistics, 0.5))
    mine = release(tmp_path / "flat", flat)
    same = verdict(mine, dataclasses.replace(sample(1000, 1), statistics=np.full_like(given.statistics, 0.5)))
    assert same.status == "pass"
    assert "image_statistics" in verdict(mine, sample(1000, 1)).detectors


def test_a_shift_too_small_to_matter_is_a_pass(mine: Stored[Release]) -> None:
    """At many rows every difference is significant; only a material one is drift."""
    given, moved = sample(20_000, 1), sample(20_000, 1, shift=0.15)
    found = verdict(mine, dataclasses.replace(given, statistics=moved.statistics))
    by_name = {shift.detector: shift for shift in found.shifts}
    shift = by_name["image_statistics"]
    assert shift.p_value is not None
    assert shift.p_value < 0.01
    assert found.status == "pass"


def test_a_column_that_never_varied_alarms_when_it_does(mine: Stored[Release]) -> None:
    colour = sample(500, 1)
    statistics = colour.statistics.copy()
    statistics[:, 3] = 0.2
    found = verdict(mine, dataclasses.replace(colour, statistics=statistics))
    assert "saturation never varied in the reference and does now" in " ".join(found.reasons)


def test_embeddings_of_another_length_are_not_compared() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        Embeddings().detect(sample(100, 0), sample(100, 1, dim=8), {}, alpha=0.01, seed=1)


def test_a_policy_that_names_what_is_not_there_is_refused() -> None:
    with pytest.raises(UnknownName, match="valid: confidence, embeddings"):
        check(DriftPolicy(detectors=(DetectorConfig(detector="sharpness"),)))
    with pytest.raises(UnknownName, match="materiel"):
        check(DriftPolicy(detectors=(DetectorConfig(detector="confidence", settings={"materiel": 1}),)))
    with pytest.raises(ConfigError, match="finer than the 4000 draws of 'image_statistics' can tell"):
        check(DriftPolicy(alpha=0.0005))
    with pytest.raises(ConfigError, match="finer than the 200 draws of 'embeddings'"):
        check(DriftPolicy(detectors=(DetectorConfig(detector="embeddings", settings={"permutations": 200}),), alpha=0.004))
    check(DriftPolicy())
    twice = DetectorConfig(detector="confidence")
    with pytest.raises(ConfigError, match="named twice"):
        check(DriftPolicy(detectors=(twice, twice)))


def test_evidently_computes_what_the_thresholds_are_made_for(mine: Stored[Release]) -> None:
    """Thresholds come from our own resampling of Evidently's statistics: both have to be the same number."""
    from scipy.stats import wasserstein_distance

    ours, theirs = load_reference(mine, TASK), sample(700, 5, shift=0.3)
    methods = {**ImageStatistics().columns, "predicted": "jensenshannon", "confidence": "wasserstein"}
    found = measure(ours, theirs, methods, name="x", at=START).values
    expected = wasserstein_distance(ours.statistics[:, 0], theirs.statistics[:, 0]) / ours.statistics[:, 0].std()
    assert found["brightness"] == pytest.approx(expected, rel=1e-9)
    shares = [np.bincount(s.columns["predicted"].astype(int), minlength=10)[None] / len(s) for s in (ours, theirs)]
    assert found["predicted"] == pytest.approx(calibration.jensen_shannon(*shares)[0], rel=1e-9)


def test_a_column_that_the_task_does_not_tell_is_named() -> None:
    with pytest.raises(MonitoringError, match="looks at 'height', which is not there; there are brightness"):
        measure(sample(50, 1), sample(50, 2), {"height": "wasserstein"}, name="x", at=START)


def test_resampling_gives_the_distances_of_real_draws() -> None:
    """The shortcut over counts against scipy on drawn values."""
    from scipy.stats import wasserstein_distance

    reference = np.random.default_rng(3).normal(size=(300, 2))
    null = calibration.null_wasserstein(reference, 150, seed=1, rounds=400)
    rng = np.random.default_rng(5)
    direct = []
    for _ in range(400):
        ours, theirs = reference[rng.integers(0, 300, 300)], reference[rng.integers(0, 300, 150)]
        direct.append([wasserstein_distance(ours[:, i], theirs[:, i]) / ours[:, i].std() for i in (0, 1)])
    np.testing.assert_allclose(np.quantile(null, [0.5, 0.9], axis=0), np.quantile(direct, [0.5, 0.9], axis=0), rtol=0.12)


@pytest.mark.parametrize("size", [100, 5000])
def test_every_draw_has_the_window_s_size(size: int) -> None:
    drawn = calibration.resampled(np.random.default_rng(0), 50, size, 20)
    assert drawn.shape == (20, 50)
    assert set(drawn.sum(axis=1)) == {size}


def test_a_threshold_needs_enough_draws() -> None:
    assert calibration.exceeded(np.arange(99.0), 0.05) == 94.0
    assert calibration.exceeded(np.arange(10.0), 0.05) == float("inf")
    assert calibration.p_value(np.arange(99.0), 98.0) == pytest.approx(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("size", [250, 1000])
def test_a_shift_of_the_size_that_is_said_to_show_does(size: int) -> None:
    """In about 80 % of the windows or more, in the direction that shows least; the verdict, not the threshold alone."""

    def confidence(given: Sample, by: float, ours: Sample) -> Sample:
        return changed(given, confidence=given.columns["confidence"] + by * ours.columns["confidence"].std())

    def classes(given: Sample, by: float, ours: Sample) -> Sample:
        largest, second = np.argsort(-np.bincount(ours.columns["predicted"].astype(int), minlength=10))[:2]
        moved = given.columns["predicted"].astype(int)
        source = np.flatnonzero(moved == largest)
        rest = np.flatnonzero(~np.isin(moved, (largest, second)))
        order = np.concatenate([source, rest])[: round(by * len(moved))]
        moved[order] = second
        return changed(given, predicted=moved.astype(str))

    def embeddings(given: Sample, by: float, _: Sample) -> Sample:
        # A shift of the mean by which the best rule has this area under its curve.
        from scipy.stats import norm

        shift = np.sqrt(2) * norm.ppf(by) / np.sqrt(given.embeddings.shape[1])
        return dataclasses.replace(given, embeddings=(given.embeddings + shift).astype(np.float32))

    changes: list[tuple[Any, Any]] = [
        (Confidence(), confidence),
        (PredictedClasses(), classes),
        (Embeddings(permutations=600), embeddings),
    ]
    for detector, change in changes:
        draws = 20 if detector.columns == {} else 40
        shown = 0
        for seed in range(draws):
            # Another reference each time: that, too, is a draw.
            ours, plain = sample(1000, 5000 + seed), sample(size, 100 + seed)
            smallest = _answer(detector, ours, plain).smallest_shown
            assert smallest is not None
            shown += _answer(detector, ours, change(plain, smallest, ours)).status == "drift"
        assert shown >= 0.65 * draws, (detector, shown, draws)


def _answer(detector: Any, ours: Sample, window: Sample) -> Any:
    values = measure(ours, window, detector.columns, name="x", at=START).values if detector.columns else {}
    return detector.detect(ours, window, values, alpha=0.0025, seed=1)


def test_what_matters_is_not_what_alarms() -> None:
    """A shift of just what matters would fall below itself every other time: half of the way to it is enough to alarm."""
    assert calibration.trivial(0.35) == pytest.approx(0.175)
    assert calibration.trivial(0.65, 0.5) == pytest.approx(0.575)
    ours, moved = sample(1000, 0), sample(4000, 1)
    shifted = changed(moved, confidence=moved.columns["confidence"] - 0.3 * ours.columns["confidence"].std())
    assert _answer(Confidence(), ours, shifted).status == "drift"
    hardly = changed(moved, confidence=moved.columns["confidence"] - 0.1 * ours.columns["confidence"].std())
    assert _answer(Confidence(), ours, hardly).status == "pass"


def test_the_effect_of_embeddings_is_that_of_the_shift() -> None:
    from scipy.stats import norm

    for wanted in (0.6, 0.7, 0.9):
        shift = np.sqrt(2) * norm.ppf(wanted) / 4  # sixteen dimensions
        window = sample(1000, 5)
        window = dataclasses.replace(window, embeddings=(window.embeddings + shift).astype(np.float32))
        found = Embeddings().detect(sample(1000, 0), window, {}, alpha=0.0025, seed=1).effect
        assert found == pytest.approx(wanted, abs=0.05)


def test_thresholds_hold_their_share_of_alpha() -> None:
    """Without what matters: beyond a threshold of 5 % in about 5 % of the windows."""
    beyond = 0
    for seed in range(120):
        ours, window = (s.columns["confidence"] for s in (sample(400, 2 * seed), sample(300, 2 * seed + 1)))
        null = calibration.null_wasserstein(ours[:, None], 300, seed=seed, rounds=400)[:, 0]
        from scipy.stats import wasserstein_distance

        distance = wasserstein_distance(ours, window) / ours.std()
        beyond += distance > calibration.exceeded(null, 0.05)
    assert beyond <= 13  # of 120; more has a chance below 1 %


@pytest.mark.slow
def test_windows_without_drift_seldom_alarm(mine: Stored[Release]) -> None:
    """A smoke test of the calibration; `make bench NAME=watch` counts over 500 windows."""
    statuses = [verdict(mine, sample(200, 1000 + seed)).status for seed in range(12)]
    assert "drift" not in statuses


def test_the_page_and_the_history_are_written_once(mine: Stored[Release], tmp_path: Path) -> None:
    measured = measure(load_reference(mine, TASK), sample(300, 1, shift=1), ImageStatistics().columns, name="x", at=START)
    measured.save_page(tmp_path / "page.html")
    assert "brightness" in (tmp_path / "page.html").read_text()
    for _ in range(2):
        measured.keep(tmp_path / "evidently", "digits", "window-1", ["drift"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from evidently.ui.workspace import Workspace
    opened = Workspace(str(tmp_path / "evidently"))
    (project,) = opened.list_projects()
    assert project.name == "digits"
    assert len(opened.list_runs(project.id)) == 1
