"""Slices of the test images, such as the darkest quarter or one camera, and where a model is worse than elsewhere.

A slice is a group that a person can name and look at: a class, a source, a band of brightness, sharpness, size or time, or
a cluster of the embedding. Slices overlap, and among many of them one is always the worst: what is said to be worse is so
after Holm's correction (1979) for all slices that were looked at, one-sided at 2.5 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from components.contracts.families import Slices, Task
from components.contracts.verdicts import SliceFigure, SliceTable
from components.contracts.wording import utc_of
from components.intervals import Right, difference, paired_counts, paired_difference, paired_interval, wilson
from components.store import describe

if TYPE_CHECKING:
    import pandas as pd

TABLE = "slices.parquet"
SHOWN_AT = 0.025
"""A corrected p-value up to this one shows that a slice is worse; one-sided, as the ends of the 95 % intervals are."""
MIN_IMAGES = 20
"""A slice of fewer images says nothing of itself."""
_MOST_VALUES = 20
"""Of a column: the rarer ones are one slice, `other`."""
_MOST_CLUSTERS = 8
_IMAGES_A_CLUSTER = 50
_QUARTER_AT_MOST = 0.4
"""A band in which more lie, as of values that are mostly equal, is no quarter."""
_SEED = 0


class _Bands(NamedTuple):
    """How the quarters of a number are called."""

    column: str
    lowest: str
    highest: str
    told: Callable[[float], str]


def _number(value: float) -> str:
    return f"{value:.3g}"


def _pixels(value: float) -> str:
    return f"{value:.0f} pixels"


def _day(value: float) -> str:
    import datetime

    return datetime.datetime.fromtimestamp(value, datetime.UTC).strftime("%Y-%m-%d %H:%M")


_BANDS = {
    "brightness": _Bands("brightness", "darkest quarter", "brightest quarter", _number),
    "sharpness": _Bands("sharpness", "least sharp quarter", "sharpest quarter", _number),
    "size": _Bands("short_side", "smallest quarter", "largest quarter", _pixels),
    "time": _Bands("captured_at", "earliest quarter", "latest quarter", _day),
}
_COLUMNS = ("source", "group", "label_source")


def make_slices(
    facts: pd.DataFrame,
    embedding: npt.NDArray[Any] | None,
    task: Task,
    *,
    engine: str,
    engine_digest: str,
    test_digest: str,
    out: Path,
) -> SliceTable:
    """Write slices.parquet: `sha256` and a column a kind, with the name of the slice that the image is in, or nothing.

    `facts` has a row a test image: sha256, label, brightness, sharpness, short_side, and of the manifest's columns
    (`captured_at`, source, group, label_source) those that are known, empty where an image's is not; every other column
    is one of the project's own, whose values are slices as well. `embedding` (n, d) is that of the engine; None, or one
    that is not finite, makes no clusters.
    """
    import pandas as pd

    found = {"class": np.array([task.stratum(label) for label in facts["label"]], dtype=object)}
    notes: list[str] = []
    for kind, bands in _BANDS.items():
        values = _numbers(facts, bands.column)
        if np.isnan(values).all():
            notes.append(f"{kind}: it is not known of any test image")
        elif (names := _banded(values, bands)) is None:
            notes.append(f"{kind}: it is the same of most test images")
        else:
            found[kind] = names
    not_values = {"sha256", "label", *_COLUMNS, *(bands.column for bands in _BANDS.values())}
    for column in (*_COLUMNS, *(name for name in facts.columns if name not in not_values)):
        names = _valued(facts, column)
        kind = f"column {column}" if column in ("class", "cluster", *_BANDS) else column
        if (num := len(set(names) - {""})) < 2:
            notes.append(f"{kind}: it is {'not known of any test image' if num == 0 else 'the same of all that say it'}")
        else:
            found[kind] = names
    clusters = _clusters(embedding, list(found["class"]))
    if clusters is None:
        notes.append(f"cluster: it takes {2 * _IMAGES_A_CLUSTER} test images with embeddings, there are {len(facts)}")
    else:
        found["cluster"] = clusters
    pd.DataFrame({"sha256": facts["sha256"], **found}).to_parquet(out / TABLE, index=False)
    return SliceTable(
        engine=engine,
        engine_digest=engine_digest,
        test_digest=test_digest,
        num_images=len(facts),
        kinds=tuple(found),
        notes=tuple(notes),
        table=describe(out / TABLE, within=out),
    )


def _numbers(facts: pd.DataFrame, column: str) -> npt.NDArray[np.float64]:
    if column not in facts:
        return np.full(len(facts), np.nan)
    if column == "captured_at":
        return np.array([utc_of(when).timestamp() if when else np.nan for when in facts[column]], dtype=np.float64)
    return facts[column].to_numpy(dtype=np.float64, na_value=np.nan)


def _banded(values: npt.NDArray[np.float64], bands: _Bands) -> npt.NDArray[Any] | None:
    """The lowest and the highest quarter and what lies between them; None where no quarter is one."""
    low, high = (float(value) for value in np.nanquantile(values, [0.25, 0.75]))
    known = ~np.isnan(values)
    most = _QUARTER_AT_MOST * known.sum()
    lowest, highest = known & (values <= low), known & (values >= high)
    chosen = [
        (mask, name)
        for mask, name in (
            (lowest, f"{bands.lowest} ({'until' if bands.column == 'captured_at' else 'at most'} {bands.told(low)})"),
            (highest, f"{bands.highest} ({'from' if bands.column == 'captured_at' else 'at least'} {bands.told(high)})"),
        )
        if mask.sum() <= most
    ]
    if not chosen:
        return None
    names = np.where(known, "between the quarters" if len(chosen) == 2 else "the rest", "").astype(object)
    for mask, name in chosen:
        names[mask] = name
    return names


def _valued(facts: pd.DataFrame, column: str) -> npt.NDArray[Any]:
    """The values of a column, the rarest of many as one."""
    if column not in facts:
        return np.full(len(facts), "", dtype=object)
    values = facts[column].fillna("").to_numpy(dtype=object)
    names, counts = np.unique(values[values != ""].astype(str), return_counts=True)
    if len(names) <= _MOST_VALUES:
        return values
    kept = set(names[np.argsort(-counts, kind="stable")[: _MOST_VALUES - 1]])
    return np.array([value if value in kept or not value else "other" for value in values], dtype=object)


def _clusters(embedding: npt.NDArray[Any] | None, strata: Sequence[str]) -> npt.NDArray[Any] | None:
    """k-means over the directions of the embeddings, each cluster with the class that most of it is of."""
    number = min(_MOST_CLUSTERS, len(strata) // _IMAGES_A_CLUSTER)
    if embedding is None or number < 2 or not np.isfinite(embedding).all():
        return None
    from sklearn.cluster import KMeans

    vectors = embedding.astype(np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    if len(np.unique(vectors.round(6), axis=0)) < number:
        return None
    places = KMeans(number, n_init=4, random_state=_SEED).fit(vectors).labels_
    names = np.empty(len(strata), dtype=object)
    # The largest is the first, so that a number means something.
    for rank, place in enumerate(np.argsort(-np.bincount(places, minlength=number), kind="stable"), 1):
        inside = places == place
        classes, counts = np.unique(np.array(strata, dtype=str)[inside], return_counts=True)
        most = counts.argmax()
        names[inside] = f"cluster {rank}, {counts[most] / inside.sum():.0%} {classes[most]}"
    return names


def slice_figures(
    right: Right, champion: Right | None, ids: Sequence[str], slices: Slices, *, min_images: int = MIN_IMAGES
) -> list[SliceFigure]:
    """Every slice of enough images: its accuracy, the difference to the rest and, paired, to the champion; the worst first.

    `right` and `champion` are of the images `ids`, all of which `slices` knows. The p-values, of being worse than the rest
    and than the champion, are corrected by Holm over all slices and both questions.
    """
    found: list[SliceFigure] = []
    p_rest: list[float] = []
    p_champion: list[float] = []
    for kind, names in slices.of(ids).items():
        for name in sorted(set(names) - {""}):
            inside: Right = names == name
            n = int(inside.sum())
            if n < min_images:
                continue
            accuracy = wilson(int(right[inside].sum()), n)
            num_rest = len(right) - n
            rest = wilson(int(right[~inside].sum()), num_rest) if num_rest else None
            theirs = wilson(int(champion[inside].sum()), n) if champion is not None else None
            paired = paired_difference(right[inside], champion[inside]) if champion is not None else None
            found.append(
                SliceFigure(
                    kind=kind,
                    name=name,
                    n=n,
                    accuracy=accuracy,
                    to_rest=difference(accuracy, rest) if rest else None,
                    champion=theirs,
                    to_champion=paired,
                )
            )
            p_rest.append(_p_below_rest(right, inside) if rest else 1.0)
            p_champion.append(p_worse(right[inside], champion[inside], margin=0.0) if champion is not None else 1.0)
    corrected = holm([*p_rest, *(p_champion if champion is not None else [])])
    told = [
        figure.model_copy(
            update={
                "p_below_rest": corrected[place],
                "p_below_champion": corrected[len(found) + place] if champion is not None else None,
            }
        )
        for place, figure in enumerate(found)
    ]
    return sorted(
        told,
        key=lambda one: (
            min(one.p_below_rest, 1.0 if one.p_below_champion is None else one.p_below_champion),
            one.accuracy.value,
            one.kind,
            one.name,
        ),
    )


def _p_below_rest(right: Right, inside: Right) -> float:
    """Fisher's exact test of a share that is smaller inside than outside, one-sided."""
    from scipy.stats import hypergeom

    hits, n = int(right[inside].sum()), int(inside.sum())
    return float(hypergeom.cdf(hits, len(right), int(right.sum()), n))


def p_worse(right: Right, champion: Right, *, margin: float) -> float:
    """Of being worse than the champion by more than `margin` on the same images: where the paired interval ends there."""
    counts = paired_counts(right, champion)
    return _p_of_upper(lambda z: paired_interval(*counts, z=z)[1], float(right.mean() - champion.mean()), -margin)


def p_under(hits: int, n: int, floor: float) -> float:
    """Of a share that lies under `floor`: where Wilson's interval ends there."""
    return _p_of_upper(lambda z: wilson(hits, n, z=z).high, hits / n, floor)


def _p_of_upper(upper: Callable[[float], float], value: float, limit: float) -> float:
    """1 - Phi(z) for the z with which the upper end of an interval lies on the limit; 1 where the value is not below it."""
    if value >= limit:
        return 1.0
    low, high = 0.0, 12.0
    if upper(high) < limit:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if upper(middle) < limit else (low, middle)
    return 0.5 * math.erfc(low / math.sqrt(2))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): each p-value as large as it has to be for all of them together."""
    found = [0.0] * len(p)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda one: p[one])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        found[place] = largest
    return found
