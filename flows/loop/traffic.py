"""What servers answered of late, by hour and class, which is cheap: segments of the log say how much they hold of what."""

from __future__ import annotations

import datetime
import functools
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from components.contracts.errors import RegistryUnavailable, StoreError
from components.journals import SUFFIX, read_rows
from components.objects import open_objects
from components.predictionlog import (
    COUNTED_COLUMNS,
    UNREADABLE,
    Count,
    Segment,
    counts_of,
    hour_of,
    open_segment,
    read_segment,
    stamps_of,
)
from flows.loop.loop import Loop
from flows.workspace.renaming import names_of_today

_SHOWN_CLASSES = 10
_MOST_BYTES = 64 << 20
"""Of segments without counts that are read for one answer; the others are counted by the next ones."""
_REMEMBERED = 8192
_AT_ONCE = 8


@dataclass(frozen=True)
class Traffic:
    """What was answered of a model in the last day, by whole hours."""

    since: datetime.datetime
    until: datetime.datetime
    num_predictions: int
    num_unsure: int
    by_class: tuple[tuple[str, int], ...]
    """The ten classes that were answered most, by their names of today."""
    num_other_classes: int
    """Predictions of other classes than these."""
    by_hour: tuple[tuple[datetime.datetime, int], ...]
    """Every hour from `since` on with its predictions."""
    num_lost: int
    """Predictions of any model that the log says it lost."""
    problems: tuple[str, ...]
    """Parts of the log that cannot be read."""
    is_whole: bool
    """False where `since` is later than a day ago, as older segments of the log carry no counts; the next look reaches back
    farther."""

    @property
    def share_unsure(self) -> float | None:
        """None while nothing was answered."""
        return self.num_unsure / self.num_predictions if self.num_predictions else None


def traffic_of(loop: Loop, now: datetime.datetime, *, hours: int = 24) -> Traffic:
    """The traffic of the last `hours` and the one that is under way; raises RegistryUnavailable when the log is away."""
    wanted = now.astimezone(datetime.UTC).replace(minute=0, second=0, microsecond=0) - datetime.timedelta(hours=hours)
    journals = loop.workspace.state / "serving" / "journal"
    found = _counter(loop.settings.predictions_url, journals).count(wanted, now)
    mine = [count for count in found.counts if count.model == loop.model]
    name_of = names_of_today(loop.workspace)
    classes, by_hour = Counter[str](), Counter[str]()
    for count in mine:
        classes[name_of(count.predicted)] += count.number
        by_hour[count.hour] += count.number
    shown = sorted(classes.items(), key=lambda pair: (-pair[1], pair[0]))[:_SHOWN_CLASSES]
    total = classes.total()
    each_hour = [found.since + datetime.timedelta(hours=number) for number in range(hours + 1)]
    return Traffic(
        since=found.since,
        until=now,
        num_predictions=total,
        num_unsure=sum(count.number for count in mine if count.unsure),
        by_class=tuple(shown),
        num_other_classes=total - sum(number for _, number in shown),
        by_hour=tuple((hour, by_hour[hour_of(hour)]) for hour in each_hour if hour <= now),
        num_lost=found.num_lost,
        problems=found.problems,
        is_whole=found.since == wanted,
    )


@dataclass(frozen=True)
class _Counted:
    counts: tuple[Count, ...]
    since: datetime.datetime
    """Everything from here on is counted."""
    num_lost: int
    problems: tuple[str, ...]


@functools.lru_cache(maxsize=8)
def _counter(log_url: str, journals: Path) -> _Counter:
    return _Counter(log_url, journals)


class _Counter:
    """Counts a log again and again; a sealed segment is looked at once. Threads may share it."""

    def __init__(self, log_url: str, journals: Path) -> None:
        self._objects, self._journals = open_objects(log_url), journals
        self._known: OrderedDict[tuple[str, str], Segment] = OrderedDict()
        self._lock = threading.Lock()

    def count(self, since: datetime.datetime, until: datetime.datetime) -> _Counted:
        """What the log holds from the full hour `since` to the hour of `until`, as far back as little has to be read."""
        # Journals first, as in `read_stretch`: one that is sealed meanwhile is there twice and counts once, by its name.
        counts, gaps, problems = self._of_journals()
        stamps = stamps_of(self._objects, since, until)
        names = [name for name in stamps if name.endswith(".json") and Path(name).stem not in counts]
        segments, unread = self._segments(names, stamps)
        problems += unread
        left = _MOST_BYTES
        # The newest first: what is not counted this time is what is farthest away.
        for name, segment in sorted(segments.items(), key=lambda pair: pair[1].last, reverse=True):
            gaps[segment.journal] = segment.gaps
            if segment.counts is None and _ends_after(segment, since):
                left -= int(stamps.get(segment.name, "0").split()[0])
                if left < 0:
                    since = max(since, _next_hour(segment.last))
                    continue
                try:
                    counted = counts_of(read_segment(self._objects, segment, COUNTED_COLUMNS))
                except RegistryUnavailable:
                    raise
                except StoreError as error:
                    problems.append(str(error))
                    continue
                segment = replace(segment, counts=counted)
                self._remember(name, stamps[name], segment)
            counts[segment.journal] = segment.counts or ()
        first, last = hour_of(since), hour_of(until)
        inside = tuple(count for each in counts.values() for count in each if first <= count.hour <= last)
        lost = 0
        for journal, told in gaps.items():
            dated = [gap for gap in told if gap["until"]]
            lost += sum(
                int(gap["gap"]) for gap in dated if gap["until"] >= since.timestamp() and gap["since"] < until.timestamp()
            )
            problems += [f"{journal}: {gap['reason']}, what was there is lost" for gap in told if not gap["until"]]
        return _Counted(inside, since, lost, tuple(problems))

    def _of_journals(self) -> tuple[dict[str, tuple[Count, ...]], dict[str, Sequence[Mapping[str, Any]]], list[str]]:
        """Counts and losses by journal, and problems, of the journals of this machine."""
        counts: dict[str, tuple[Count, ...]] = {}
        gaps: dict[str, Sequence[Mapping[str, Any]]] = {}
        problems: list[str] = []
        for path in sorted(self._journals.glob(f"*{SUFFIX}")) if self._journals.is_dir() else []:
            try:
                facts = [facts for facts, _ in read_rows(path)]
                found = Counter(_alike(row) for row in facts if "gap" not in row and row["ingest_at"] is not None)
            except FileNotFoundError:
                continue  # sealed a moment ago
            except UNREADABLE as error:
                problems.append(f"{path.name} cannot be read as a journal ({error})")
                continue
            counts[path.stem] = tuple(Count(*alike, number) for alike, number in found.items())
            gaps[path.stem] = [row for row in facts if "gap" in row]
        return counts, gaps, problems

    def _segments(self, names: list[str], stamps: Mapping[str, str]) -> tuple[dict[str, Segment], list[str]]:
        """What manifests say, by name; those that were read before are not read again."""
        with self._lock:
            found = {name: self._known[name, stamps[name]] for name in names if (name, stamps[name]) in self._known}
        problems = []

        def opened(name: str) -> tuple[str, Segment | str]:
            try:
                return name, open_segment(self._objects, name)
            except RegistryUnavailable:
                raise
            except (StoreError, KeyError, TypeError, ValueError) as error:
                return name, str(error)

        missing = [name for name in names if name not in found]
        with ThreadPoolExecutor(_AT_ONCE) as pool:  # over a network most of the time is waiting
            for name, segment in pool.map(opened, missing):
                if isinstance(segment, str):
                    problems.append(segment)
                else:
                    found[name] = segment
                    self._remember(name, stamps[name], segment)
        return found, problems

    def _remember(self, name: str, stamp: str, segment: Segment) -> None:
        with self._lock:
            self._known[name, stamp] = segment
            self._known.move_to_end((name, stamp))
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)


def _alike(row: Mapping[str, Any]) -> tuple[str, str, str, str, bool]:
    """What predictions of a journal are counted by, as `counts_of` does for those of a segment."""
    at = datetime.datetime.fromtimestamp(row["ingest_at"], datetime.UTC)
    return str(row["model"]), str(row["version"]), hour_of(at), str(row["predicted"]), bool(row["unsure"])


def _ends_after(segment: Segment, since: datetime.datetime) -> bool:
    return bool(segment.last) and datetime.datetime.fromisoformat(segment.last) >= since


def _next_hour(moment: str) -> datetime.datetime:
    at = datetime.datetime.fromisoformat(moment).astimezone(datetime.UTC)
    return at.replace(minute=0, second=0, microsecond=0) + datetime.timedelta(hours=1)
