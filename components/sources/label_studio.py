"""Label Studio's JSON export: pictures with one choice each, made by people.

Taken are the formats of tasks since release 1.0: `data`, `annotations` and `predictions`. An annotation that was skipped is
none; where several people disagree, or nobody answered, the task is left out and told, unless an answer is marked as ground
truth. Who answered and on which day is kept as the files' `source`.
"""

from __future__ import annotations

import contextlib
import json
import re
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from components.attributes import attributes_of
from components.contracts.errors import DataError
from components.contracts.progress import Progress, silent
from components.contracts.wording import utc_of
from components.sources._listed import Listed

_MOST_BYTES = 2**30
_UPLOADED = re.compile(r"(?:/[^?]*)?/data/(upload/.+)")
_LOCAL = re.compile(r"(?:/[^?]*)?/data/local-files/\?d=(.+)")
_ELSEWHERE = re.compile(r"([A-Za-z][\w+.-]*)://")


class Source(BaseModel):
    """The files of a Label Studio project, by its JSON export."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    """The export, a .json file."""
    root: Path | None = None
    """The folder that its files lie in, the export's own where none is given: Label Studio's media folder, which holds
    `upload/`, for uploaded files, and its document root for files of a local storage."""
    image: str = "image"
    """The key of a task's data that names the picture."""
    choice: str = ""
    """The name of the Choices tag; needed where the labelling interface has several."""
    predictions: bool = False
    """Whether tasks without an annotation are taken by their predictions, as label_source=model."""
    classes: tuple[str, ...] = ()
    """The labels that may stand there, any where none is given."""

    @classmethod
    def takes(cls, given: str) -> bool:
        """Whether it is the name of an export."""
        return "://" not in given and given.casefold().endswith(".json")

    def fetch(self, *, out: Path, progress: Progress = silent) -> None:
        """Write links to its files into class folders, and who labelled them; raises DataError with a note a problem."""
        if self.root is not None and not self.root.expanduser().is_dir():
            raise DataError(f"root {self.root} is not a folder; expected the one that the files of {self.path} lie in")
        tasks = self._tasks()
        choice = self.choice or self._only_choice(tasks)
        listed = Listed(self.path, self.root, noun="task", classes=self.classes)
        for number, task in enumerate(tasks):
            place = task["id"] if isinstance(task.get("id"), int) else number + 1
            try:
                self._take(place, task, choice, listed)
            except ValueError as error:
                listed.problem(place, str(error))
            if number % 1000 == 0:
                progress(number, len(tasks))
        listed.write(out, progress)

    def _tasks(self) -> list[dict[str, Any]]:
        wanted = "expected the list of tasks that Label Studio exports as JSON"
        try:
            if self.path.stat().st_size > _MOST_BYTES:
                raise DataError(f"{self.path} has more than {_MOST_BYTES} bytes; export the project in parts")
            tasks = json.loads(self.path.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}; {wanted}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path} is no JSON ({error}); {wanted}") from error
        if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
            raise DataError(f"{self.path} holds no list of objects; {wanted}")
        if not tasks:
            raise DataError(f"{self.path} has no tasks; label some and export them")
        for task in tasks:
            if not isinstance(task.get("data"), dict) or not isinstance(task.get("annotations"), list):
                old = "completions" in task
                kind = "of a Label Studio before 1.0" if old else "no JSON export: its tasks have no data and annotations"
                raise DataError(f"{self.path} is {kind}; export the project as JSON (not JSON-MIN, CSV or COCO)")
        return tasks

    def _only_choice(self, tasks: Sequence[Mapping[str, Any]]) -> str:
        """The one Choices tag that was used; raises DataError where it is none or several."""
        names: Counter[str] = Counter()
        kinds: set[str] = set()
        for task in tasks:
            with contextlib.suppress(ValueError):  # what is no list of answers is told with its task
                answers = _answers(task, "annotations") + (_answers(task, "predictions") if self.predictions else [])
                for part in (part for answer in answers for part in _parts(answer)):
                    kinds.add(str(part.get("type")))
                    names.update([str(part.get("from_name"))] if part.get("type") == "choices" else [])
        if len(names) > 1:
            raise DataError(
                f"{self.path} has several choices a picture ({', '.join(sorted(names))}); say which is the class by the "
                f"setting choice, such as choice={names.most_common(1)[0][0]}"
            )
        if kinds and not names:
            raise DataError(
                f"{self.path} has annotations of another kind ({', '.join(sorted(kinds))}); expected a choice a picture: "
                f"the class of all of it"
            )
        return next(iter(names), "")

    def _take(self, place: int, task: Mapping[str, Any], choice: str, listed: Listed) -> None:
        """Keep a task's file with its label, or leave it out; raises ValueError for what is no task of such a project."""
        image = task["data"].get(self.image)
        if not isinstance(image, str):
            keys = ", ".join(sorted(task["data"])) or "none"
            raise ValueError(f"its data has no text {self.image!r} (keys: {keys}); name the key by the setting image")
        name = _file(image)
        answers = _answers(task, "annotations")
        told = f"task {place} ({name})"
        is_model = not answers and self.predictions and bool(_answers(task, "predictions"))
        if is_model:
            answers = _answers(task, "predictions")
        if not answers:
            predicted = ", it has predictions only" if task.get("predictions") else ""
            listed.leave_out(told, f"nobody labelled it{predicted}")
            return
        answers = [answer for answer in answers if answer.get("ground_truth")] or answers
        labels = [_label(answer, choice) for answer in answers]
        if None in labels:
            listed.leave_out(told, "an answer has no choice, or several")
        elif len(set(labels)) > 1:
            counts = ", ".join(f"{label}: {count}" for label, count in sorted(Counter(map(str, labels)).items()))
            listed.leave_out(told, f"the answers disagree ({counts})")
        else:
            known = {key: task["data"][key] for key in ("group", "captured_at") if task["data"].get(key) is not None}
            by = _by_model(answers) if is_model else _by_people(answers)
            listed.entry(place, name, str(labels[0]), attributes=attributes_of({**known, **by}))


def _answers(task: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """Annotations or predictions that are some; raises ValueError for a list of something else."""
    found = task.get(key) or []
    if not isinstance(found, list):
        raise ValueError(f"its {key} are no list")
    # Predictions are numbers alone in an export that was asked not to hold them.
    whole = [one for one in found if isinstance(one, dict)]
    if len(whole) < len(found) and key == "annotations":
        raise ValueError("its annotations are no objects; export the project as JSON with its annotations")
    return [one for one in whole if not one.get("was_cancelled")]


def _parts(answer: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    result = answer.get("result")
    yield from (part for part in (result if isinstance(result, list) else ()) if isinstance(part, dict))


def _label(answer: Mapping[str, Any], choice: str) -> str | None:
    """The one choice of an answer; None where there is none, or more."""
    values = [
        part.get("value") for part in _parts(answer) if part.get("type") == "choices" and part.get("from_name") == choice
    ]
    lists = [value.get("choices") if isinstance(value, dict) else None for value in values]
    chosen = [label for labels in lists if isinstance(labels, list) for label in labels]
    return chosen[0] if len(chosen) == 1 and isinstance(chosen[0], str) else None


def _by_people(answers: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    who = sorted({str(by.get("id") if isinstance(by := answer.get("completed_by"), dict) else by) for answer in answers})
    days = []
    for answer in answers:
        if isinstance(when := answer.get("updated_at") or answer.get("created_at"), str):
            days.append(f"{utc_of(when):%Y-%m-%d}")
    day = f", {max(days)}" if days else ""
    return {"label_source": "person", "source": f"Label Studio, annotator {' and '.join(who)}{day}"[:255]}


def _by_model(answers: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    model = str(answers[-1].get("model_version") or "unknown")
    score = answers[-1].get("score")
    share = score if isinstance(score, (int, float)) and 0 <= score <= 1 else None
    return {"label_source": "model", "confidence": share, "source": f"Label Studio, model {model}"[:255]}


def _file(image: str) -> str:
    """The file that a task's picture is, relative to the root; raises ValueError for one that is elsewhere."""
    for pattern in (_UPLOADED, _LOCAL):
        if found := pattern.fullmatch(image):
            return urllib.parse.unquote(found[1]).lstrip("/")
    if found := _ELSEWHERE.match(image):
        raise ValueError(
            f"its picture is at {image[:120]!r}; nothing is fetched from {found[1]}:// addresses. Bring the files here, "
            f"name them in a manifest (path,label), and add that"
        )
    return image
