"""The prediction log of a workspace: exported, verified, and an image's bytes erased from what was kept beside it."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.loop.captures import captures_of
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace

if TYPE_CHECKING:
    from serving.log.audit import LogAudit


@dataclass(frozen=True)
class PredictionsExported:
    """What an export wrote, and what is not in it."""

    rows: int
    lost: int
    """Predictions that were answered while the journal could not be written."""
    unsealed_journals: int
    """Journals that a server still writes."""


@dataclass(frozen=True)
class LogVerified:
    """What a look at the log and at the kept images found."""

    log: LogAudit
    captures: tuple[str, ...]
    """What is wrong with a kept image, one sentence each."""
    erased: int
    head: str
    """Hash of the last record of an erasure."""

    @property
    def is_whole(self) -> bool:
        """Whether every segment and kept image is as it was written, and no prediction lost or there twice."""
        return not (self.log.broken or self.log.duplicates or self.log.lost_rows or self.captures)


@dataclass(frozen=True)
class Erased:
    """An erasure that is on record."""

    record: dict[str, Any]
    """As it is kept: at, by, reason, found, hash and more."""
    training_copies: tuple[str, ...]
    """Files of data/ that are the same image; they stay."""


def export_predictions(
    workspace: Workspace,
    out: Path,
    *,
    model: str | None = None,
    since: datetime.datetime | None = None,
    until: datetime.datetime | None = None,
) -> PredictionsExported:
    """Write sealed predictions to one .parquet, .csv or .jsonl file; raises ConfigError for another name."""
    from serving.log import audit, sealing

    url, journals = read_settings(workspace.state).predictions_url, workspace.state / "serving" / "journal"
    # What a stopped server left is sealed first, so that an export right after it is whole.
    sealing.seal_all(journals, url)
    exported = audit.export(url, out, journals=journals, model=model, since=since, until=until)
    return PredictionsExported(exported.rows, exported.lost, audit.unsealed(journals))


def verify_predictions(workspace: Workspace) -> LogVerified:
    """Check every segment of the log and every kept image."""
    from serving.log import audit

    log = audit.verify(read_settings(workspace.state).predictions_url, workspace.state / "serving" / "journal")
    kept = captures_of(workspace)
    captures = tuple(kept.verify())
    erased, head = kept.kept.erasures()
    return LogVerified(log, captures, erased, head)


def erase_image(workspace: Workspace, image_sha256: str, *, by: str, reason: str) -> Erased:
    """Remove a kept image for good, and put on record who wanted it; raises ConfigError for what is no sha256."""
    record = captures_of(workspace).erase(image_sha256, by=by, reason=reason)
    if not workspace.data.is_dir():
        return Erased(record, ())  # a machine that only serves trains on nothing
    from flows.loop.labels import training_copies

    return Erased(record, tuple(training_copies(workspace, image_sha256)))


def erased_images(workspace: Workspace) -> frozenset[str]:
    """Digests of the images that were erased: no page shows one, wherever a copy of it lies."""
    return frozenset(captures_of(workspace).erased())
