"""Labelling picture by picture, as a page does it: what to label, by which names, the pictures, and the labels given."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
import re
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from components.contracts.errors import DataError, StoreError, UndecodableImage
from components.contracts.records import canonical_json, sha256_text
from components.contracts.wording import separator_of
from flows.loop.captures import kept_of, read_capture
from flows.loop.labels import (
    KnownPredictions,
    LabelsTaken,
    classes_of_today,
    known_predictions,
    take_labels,
)
from flows.loop.loop import Loop
from flows.loop.windows import TO_LABEL, recorded, rows_of
from flows.pages.thumbnails import encoded
from monitoring.labels import checked
from registry.approval import person

_DIGEST = re.compile(r"[0-9a-f]{64}")
_LISTS = 200
"""Windows that alarmed whose lists are looked at. Where every window does, that is two days, and nobody labels more."""
_BATCH = 16
_LATEST = 20
"""Windows that are looked through for pictures that no list asks for, before the log is."""
_SPREAD = 60
"""Rows of a window that its pictures are picked from, evenly."""
_DECODING = threading.BoundedSemaphore(2)
"""A picture may have 268 million pixels: as many are decoded at once as this, however many are asked for."""


@dataclass(frozen=True)
class ToLabel:
    """A picture whose label is asked for."""

    window: str
    """The window that drifted and asks for it."""
    prediction_id: str
    image_sha256: str
    predicted: str
    confidence: float
    novelty: float
    """How far it is from the nearest image of the reference sample."""
    kept: bool = False
    """Whether its bytes are still there to be shown."""


@dataclass(frozen=True)
class WindowPicture:
    """A kept picture of a window, and what was said of it."""

    image_sha256: str
    predicted: str
    confidence: float
    label: str
    """By a person since; empty without."""

    @property
    def caption(self) -> str:
        """What a page says under it."""
        told = f"taken for {self.predicted} ({self.confidence:.2f})"
        return f"{told}, labelled {self.label}" if self.label else told


@dataclass(frozen=True)
class Asked:
    """How much is asked for."""

    num_pictures: int
    unread_lists: tuple[str, ...]
    """Windows whose list somebody saved as something that cannot be read any more, the newest first."""


def to_label(loop: Loop, *, limit: int = 200) -> list[ToLabel]:
    """The pictures whose labels the windows that drifted ask for, the newest window first, each once; none that has one.

    In a window they are in the order of its list: the most useful first. A list that cannot be read asks for nothing, which
    `count_asked` tells.
    """
    found = list(itertools.islice(_asked(loop, []), limit))
    kept = kept_of(loop, [row.image_sha256 for row in found])
    return [replace(row, kept=row.image_sha256 in kept) for row in found]


def count_asked(loop: Loop) -> Asked:
    """How many pictures `to_label` would give without a limit."""
    unread: list[str] = []
    return Asked(sum(1 for _ in _asked(loop, unread)), tuple(unread))


def _asked(loop: Loop, unread: list[str]) -> Iterator[ToLabel]:
    """What lists ask for, with `kept` left out; windows whose lists cannot be read are put into `unread`."""
    known = set(loop.labels.latest(loop.model))
    for window, rows in _lists(loop):
        if rows is None:
            unread.append(window)
        for row in rows or ():
            if row.image_sha256 not in known:
                known.add(row.image_sha256)
                yield row


def _lists(loop: Loop) -> Iterator[tuple[str, tuple[ToLabel, ...] | None]]:
    """The latest windows that alarmed with the pictures that they ask for; None for a list that cannot be read."""
    alarmed = sorted({alarm.window for alarm in loop.outbox.alarms(loop.model, last=_LISTS)}, reverse=True)
    for start in range(0, len(alarmed), _BATCH):
        windows = alarmed[start : start + _BATCH]
        for window, data in zip(windows, loop.window_store.read_all(windows, TO_LABEL), strict=True):
            # One that was judged again since may have passed.
            verdict = recorded(loop, window) if data is not None else None
            if data is not None and verdict is not None and verdict.status == "drift":
                yield window, _list(window, data)


@functools.lru_cache(maxsize=256)
def _list(window: str, data: bytes) -> tuple[ToLabel, ...] | None:
    """A list as it was written, or as a spreadsheet that somebody filled it in with saved it."""
    try:
        text = data.decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text), delimiter=separator_of(text.partition("\n")[0]), strict=True))
        found = tuple(
            ToLabel(
                window=window,
                prediction_id=row["prediction_id"],
                image_sha256=row["image_sha256"],
                predicted=row["predicted"],
                confidence=float(row["confidence"]),
                novelty=float(row["novelty"]),
            )
            for row in rows
        )
    except (UnicodeDecodeError, csv.Error, KeyError, ValueError, TypeError):
        return None
    return found if all(_DIGEST.fullmatch(row.image_sha256) for row in found) else None


def choices(loop: Loop) -> tuple[str, ...]:
    """The names that a picture may be labelled with, without a new class; raises DataError where there is no champion."""
    return classes_of_today(loop)


def give_labels(
    loop: Loop, rows: Sequence[tuple[str, str]], *, by: str, new_classes: bool = False, request: str = ""
) -> LabelsTaken:
    """Take labels of pictures, by the sha256 of the image or the id of a prediction: all of them, or none.

    They go the way of a file of labels. A label that counts already is not written again, and another one counts from now
    on. A `request` names what was sent: sent again it says nothing new, not even after somebody's correction. Raises
    ConfigError for a name that names nobody, DataError for what is no label of a picture that the log knows.
    """
    named = checked(
        [
            {"image_sha256" if _DIGEST.fullmatch(name.lower()) else "prediction_id": name, "label": label}
            for name, label in rows
        ],
        by=person(by).name,
    )
    if not any(row["label"] for row in named):
        raise DataError("no label was given")
    source = sha256_text(canonical_json(["a page", request or uuid.uuid4().hex]))[:16]
    return take_labels(loop, named, _known_of(loop, named), source=source, new_classes=new_classes)


def _known_of(loop: Loop, rows: Sequence[Mapping[str, str]]) -> KnownPredictions:
    """What is known of the predictions and images that some rows name, from the evidence of windows where that has them all.

    The whole log is gone through for the others alone: it may be a hundred times as large.
    """
    named = {name for row in rows if row["label"] for name in (row["image_sha256"], row["prediction_id"]) if name}
    listing = (
        window
        for window, asked_for in _lists(loop)
        if any(row.image_sha256 in named or row.prediction_id in named for row in asked_for or ())
    )
    found: dict[str, str] = {}
    for window in itertools.chain(listing, loop.window_store.names(_LATEST)[:_LATEST]):
        with contextlib.suppress(StoreError):
            judged = rows_of(loop, window, "prediction_id", "image_sha256")
            if judged is not None:
                found |= dict(zip(judged["prediction_id"], judged["image_sha256"], strict=True))
        if named <= found.keys() | found.values():
            return KnownPredictions(found, set(found.values()))
    return known_predictions(loop)


def picture(loop: Loop, sha256: str, *, side: int | None = None) -> bytes:
    """A kept image as PNG or JPEG (`flows.pages.thumbnails.media_type` says which), upright, no longer than `side`.

    Raises ConfigError for what is no sha256, DataError for an image that was erased, is not kept, is damaged or does not
    decode any more.
    """
    data = read_capture(loop, sha256)
    try:
        with _DECODING:
            return encoded(data, side)
    except UndecodableImage as error:
        raise DataError(f"image {sha256[:16]} is kept and cannot be decoded any more: {error}") from error


def pictures_of(loop: Loop, window: str, limit: int = 12) -> list[WindowPicture]:
    """Some of the kept pictures of a window, evenly over its predictions.

    Raises UnknownName for what names no window, StoreError for rows that cannot be read.
    """
    rows = rows_of(loop, window, "image_sha256", "predicted", "confidence")
    if rows is None:
        return []
    rows = rows.drop_duplicates("image_sha256")
    rows = rows.iloc[:: max(1, len(rows) // _SPREAD)]
    kept, said = kept_of(loop, list(rows["image_sha256"])), loop.labels.latest(loop.model)
    rows = rows[rows["image_sha256"].isin(kept)].head(limit)
    return [
        WindowPicture(sha256, str(predicted), float(confidence), said[sha256].label if sha256 in said else "")
        for sha256, predicted, confidence in zip(*(rows[name].to_list() for name in rows.columns), strict=True)
    ]
