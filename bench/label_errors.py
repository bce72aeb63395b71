"""Label errors: 5 % of the labels of a folder are changed at random, and the finding `label_error` looks for them.

DATA is a folder of class folders, or of train/ and test/ with class folders in them. Embeddings, out-of-fold probabilities
and the finding are those of `visionloop data check`. The peers are cleanlab's default filter on the same probabilities, and
every picture that the head would label otherwise. A label that was wrong in the folder before counts as found in vain.
Without DATA the pictures are noise of two kinds, and only the time means something.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.frozen_training import images_of
from bench.serving import say
from components import plugins
from components.contracts.families import Known
from components.embeddings import encoder_for, of_pictures
from components.images import decode, in_threads, pixel_digest
from components.intervals import wilson
from components.out_of_fold import probabilities

SHARE = 0.05
SEED = 20261129
MOST_IMAGES = 60_000
SHORT = {"MOST_IMAGES": 200}
Rows = np.ndarray[Any, np.dtype[np.bool_]]


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Recall and precision of the finding, each with its interval and n; `ours` is their harmonic mean."""
    table, root = _table(data, scratch)
    start = time.perf_counter()
    encoder = encoder_for(table)
    found = of_pictures(table, root, encoder, cache=scratch / "cache", progress=_tell)
    embedding_s = time.perf_counter() - start
    truth, classes = table["label"].to_numpy(str), tuple(sorted(set(table["label"])))
    labels, changed = _changed(truth, classes)
    start = time.perf_counter()
    table = table.assign(label=labels, path=[f"{label}/{row}" for row, label in enumerate(labels)])
    likely = probabilities(found, list(labels), classes, list(table["picture"]))
    head_s = time.perf_counter() - start
    start = time.perf_counter()
    known = Known(table, table.iloc[:0], None, found, likely, classes)
    issues = plugins.load("findings", "label_error").look(known)
    finding_s = time.perf_counter() - start
    rows = np.array([int(issue.files[0].split("/")[1]) for issue in issues], dtype=np.int64)
    flagged = np.zeros(len(table), dtype=bool)
    flagged[rows] = True
    restored = np.array([issue.candidate for issue in issues]) == truth[rows]
    ours, peers = _scored(flagged, changed), _peers(likely, labels, classes, changed)
    return {
        "ours": ours["f1"],
        "peers": {name: scored["f1"] for name, scored in peers.items()},
        "ratio": round(ours["f1"] / max(1e-9, *(scored["f1"] for scored in peers.values())), 3),
        "n": len(table),
        "unit": "harmonic mean of recall and precision",
        "recall": ours["recall"],
        "precision": ours["precision"],
        "candidate_is_right": str(wilson(int((restored & changed[rows]).sum()), max(1, int(changed[rows].sum())))),
        "of_peers": peers,
        "head_accuracy": str(wilson(int((np.array(classes)[likely.argmax(axis=1)] == truth).sum()), len(truth))),
        "seconds": {"embedding": round(embedding_s, 1), "head": round(head_s, 1), "finding": round(finding_s, 1)},
        "encoder": f"{encoder.backbone} {dict(encoder.settings)}",
        "data": str(data) if data else "synthetic",
    }


def _table(data: Path | None, scratch: Path) -> tuple[pd.DataFrame, Path]:
    if data is None:
        paths, numbers = images_of(None, scratch, MOST_IMAGES)
        labels, data = [f"kind {number}" for number in numbers], scratch
    else:
        suffixes = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
        paths = sorted(path for path in data.rglob("*") if path.suffix.lower() in suffixes)
        step = max(1, len(paths) // MOST_IMAGES)
        paths = paths[::step][:MOST_IMAGES]
        labels = [path.parent.name for path in paths]

    def looked(path: Path) -> tuple[str, int]:
        picture = decode(path.read_bytes())
        return pixel_digest(picture)[:32], min(picture.width, picture.height)

    facts = list(in_threads(looked, paths))
    return pd.DataFrame(
        {
            "path": [path.relative_to(data).as_posix() for path in paths],
            "label": labels,
            "picture": [picture for picture, _ in facts],
            "sha256": [f"{row:064x}" for row in range(len(paths))],
            "short_side": [side for _, side in facts],
        }
    ), data


def _changed(truth: Any, classes: tuple[str, ...]) -> tuple[Any, Rows]:
    """The labels after SHARE of them became another class, and which did."""
    rng = np.random.default_rng(SEED)
    changed = np.zeros(len(truth), dtype=bool)
    changed[rng.choice(len(truth), max(1, round(SHARE * len(truth))), replace=False)] = True
    number = np.searchsorted(np.array(classes), truth)
    number[changed] = (number[changed] + rng.integers(1, len(classes), changed.sum())) % len(classes)
    return np.array(classes)[number], changed


def _scored(flagged: Rows, changed: Rows) -> dict[str, Any]:
    hits = int((flagged & changed).sum())
    recall, precision = wilson(hits, int(changed.sum())), wilson(hits, max(1, int(flagged.sum())))
    f1 = 2 * hits / (int(changed.sum()) + int(flagged.sum()))
    return {"f1": round(f1, 4), "recall": str(recall), "precision": str(precision)}


def _peers(likely: Any, labels: Any, classes: tuple[str, ...], changed: Rows) -> dict[str, dict[str, Any]]:
    from cleanlab.filter import find_label_issues

    numbers = np.searchsorted(np.array(classes), labels)
    return {
        "cleanlab's default filter": _scored(find_label_issues(numbers, likely.astype(np.float64), n_jobs=1), changed),
        "labelled otherwise": _scored(likely.argmax(axis=1) != numbers, changed),
    }


def _tell(done: int, total: int, note: str = "") -> None:
    if done % 4096 == 0 or done == total:
        say(f"  {done} of {total} pictures embedded {note}")
