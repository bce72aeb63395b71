"""`data check`: what is wrong with the images that lie in data/, without a training and without a change of anything."""

from __future__ import annotations

import csv
import io
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components import attributes, dataversions, issues
from components.companions import TEST_LEDGER
from components.contracts.errors import DataError
from components.contracts.issues import SEVERITIES, Issue, Looked, Severity
from components.contracts.progress import Progress, silent
from components.contracts.wording import for_spreadsheets
from components.embeddings import Encoder
from components.examination import Examined, dataset_files, examine
from components.splitting import TestLedger
from components.store import write_atomically
from components.training import TrainingConfig
from flows.workspace.recipes import load_recipe
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace

FOLDER = "check"
SHEET = "issues.csv"
_COLUMNS = ("severity", "kind", "score", "file", "label", "other_files", "detail", "action", "candidate", "issue")
_MOST_IN_CELL = 32_000
"""Characters: spreadsheets cut what is longer."""


@dataclass(frozen=True)
class Checked:
    """What was found in the images that lie in data/ now."""

    examined: Examined
    table: Path
    """All issues, as Parquet."""
    sheet: Path
    """The same as CSV, for spreadsheets."""
    num_files: int

    @property
    def issues(self) -> tuple[Issue, ...]:
        return self.examined.issues

    @property
    def looked(self) -> tuple[Looked, ...]:
        return self.examined.looked

    @property
    def clean(self) -> bool:
        """Whether nothing is critical or a warning."""
        return all(issue.severity == "note" for issue in self.issues)

    def by_kind(self) -> list[tuple[Severity, str, list[Issue]]]:
        """(severity, kind, issues), the severest first and of those the kind with most."""
        found: dict[tuple[Severity, str], list[Issue]] = {}
        for issue in self.issues:
            found.setdefault((issue.severity, issue.kind), []).append(issue)
        ranks = {severity: rank for rank, severity in enumerate(SEVERITIES)}
        ordered = sorted(found.items(), key=lambda each: (ranks[each[0][0]], -len(each[1]), each[0][1]))
        return [(severity, kind, of) for (severity, kind), of in ordered]


def encoder_of(config: TrainingConfig) -> Encoder | None:
    """What a recipe's training embeds pictures by, where a package brings its weights; findings use the same."""
    return Encoder(config.backbone, config.backbone_settings, config.weights) if config.weights == "packaged" else None


def check_data(
    workspace: Workspace, recipe: str | None = None, overrides: Sequence[str] = (), *, progress: Progress = silent
) -> Checked:
    """Look for all findings, or those that a recipe names, in what lies in data/, pinned or not; writes all issues.

    A picture whose side is not frozen yet counts as no test picture. Raises DataError where there are no images.
    """
    root, data = workspace.root, workspace.data
    config = load_recipe(recipe, overrides, workspace=root) if recipe is not None else None
    settings = read_settings(workspace.state)
    if not data.is_dir():
        raise DataError(f"{data} is not there; name a folder: `visionloop data add FOLDER`, or `visionloop data pull`")
    ledger = root / TEST_LEDGER
    there = dataset_files(data, dataversions.hashes(root))
    examined = examine(
        there,
        config.validation.findings if config is not None else None,
        members=TestLedger.read(ledger).members if ledger.exists() else None,
        sources=attributes.sources(root),
        cache=workspace.cache,
        encoder=encoder_of(config.training) if config is not None else None,
        accepted=settings.accepted,
        num_threads=settings.num_threads,
        progress=progress,
    )
    folder = workspace.state / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        issues.write(examined.issues, written)
        written.replace(folder / issues.FILE)
    finally:
        written.unlink(missing_ok=True)
    write_atomically(folder / SHEET, _for_spreadsheets(examined))
    return Checked(examined, folder / issues.FILE, folder / SHEET, len(there.files) + len(there.strays))


def _for_spreadsheets(examined: Examined) -> bytes:
    """A row an issue, as CSV with a byte order mark, by which spreadsheets know that it is UTF-8."""
    tables = (examined.known.table, examined.known.refused)
    labels = {path: label for table in tables for path, label in zip(table["path"], table["label"], strict=True)}
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\r\n")
    writer.writeheader()
    for issue in examined.issues:
        file, *others = issue.files or ("",)
        values = {
            **{name: str(getattr(issue, name, "")) for name in _COLUMNS},
            "score": f"{issue.score:.4f}",
            "file": file,
            "label": labels.get(file, ""),
            "other_files": _in_one_cell(others),
            "issue": issue.id,
        }
        writer.writerow({name: for_spreadsheets(value) for name, value in values.items()})
    return out.getvalue().encode("utf-8-sig")


def _in_one_cell(files: Sequence[str]) -> str:
    """As many files as a cell holds, and how many more there are."""
    told: list[str] = []
    length = 0
    for file in files:
        length += len(file) + len(" | ")
        if length > _MOST_IN_CELL:
            return " | ".join([*told, f"and {len(files) - len(told)} more"])
        told.append(file)
    return " | ".join(told)
