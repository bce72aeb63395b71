"""`data check`: what is wrong with the images that lie in data/, without a training and without a change of anything."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from components import attributes, dataversions, examination, issues, plugins
from components.companions import COMPANIONS, TEST_LEDGER
from components.contracts.errors import DataError, StoreError
from components.contracts.issues import SEVERITIES, Issue, Looked, Severity
from components.contracts.progress import Progress, silent
from components.contracts.records import Record, canonical_json, sha256_text
from components.contracts.wording import for_spreadsheets
from components.embeddings import Encoder, absence
from components.examination import Examined, dataset_files, examine
from components.splitting import TestLedger
from components.store import sha256_file, write_atomically
from components.training import TrainingConfig
from flows.workspace.recipes import RunConfig, load_recipe
from flows.workspace.settings import Settings, read_settings
from flows.workspace.workspace import Workspace, lock_digest

FOLDER = "check"
SHEET = "issues.csv"
_KEPT = "checked.json"
_COLUMNS = ("severity", "kind", "score", "file", "label", "other_files", "detail", "action", "candidate", "issue")
_MOST_IN_CELL = 32_000
"""Characters: spreadsheets cut what is longer."""


@dataclass(frozen=True)
class Checked:
    """What was found in the images that lie in data/ now."""

    issues: tuple[Issue, ...]
    looked: tuple[Looked, ...]
    notes: tuple[str, ...]
    num_files: int
    table: Path
    """All issues, as Parquet."""
    sheet: Path
    """The same as CSV, for spreadsheets."""
    examined: Examined | None
    """All that was known of the files; None where the answer is that of an earlier look."""

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
    """What a recipe's training embeds pictures by, where a package brings its weights; findings use the same.

    Of a network that is cut it is the whole, which tells pictures apart better.
    """
    settings = {name: value for name, value in config.backbone_settings.items() if name != "num_layers"}
    return Encoder(config.backbone, settings, config.weights) if config.weights == "packaged" else None


class _Kept(Record):
    """What an earlier look came to, of which the issues are in the table."""

    key: str
    """Of all that the answer depends on."""
    looked: tuple[Looked, ...]
    notes: tuple[str, ...]
    num_files: int
    table_sha256: str
    sheet_sha256: str


def check_data(
    workspace: Workspace,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    *,
    kept: bool = False,
    progress: Progress = silent,
) -> Checked:
    """Look for all findings, or those that a recipe names, in what lies in data/, pinned or not; writes all issues.

    With `kept` the answer is that of the look before where files and all else that counts are as they were. A picture whose
    side is not frozen yet counts as no test picture. Raises DataError where there are no images.
    """
    root, data = workspace.root, workspace.data
    config = load_recipe(recipe, overrides, workspace=root) if recipe is not None else None
    settings = read_settings(workspace.state)
    if not data.is_dir():
        raise DataError(f"{data} is not there; name a folder: `visionloop data add FOLDER`, or `visionloop data pull`")
    folder = workspace.state / FOLDER
    hashes = dataversions.hashes(root)
    key = _key(workspace, config, settings, hashes)
    if kept and (before := _answer_of_before(folder, key)) is not None:
        return before
    ledger = root / TEST_LEDGER
    there = dataset_files(data, hashes)
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
    folder.mkdir(parents=True, exist_ok=True)
    table, sheet = folder / issues.FILE, folder / SHEET
    written = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        issues.write(examined.issues, written)
        written.replace(table)
    finally:
        written.unlink(missing_ok=True)
    write_atomically(sheet, _for_spreadsheets(examined))
    num_files = len(there.files) + len(there.strays)
    told = _Kept(
        key=key,
        looked=examined.looked,
        notes=examined.notes,
        num_files=num_files,
        table_sha256=sha256_file(table),
        sheet_sha256=sha256_file(sheet),
    )
    write_atomically(folder / _KEPT, canonical_json(told.to_json()).encode())
    return Checked(examined.issues, examined.looked, examined.notes, num_files, table, sheet, examined)


def _key(workspace: Workspace, config: RunConfig | None, settings: Settings, hashes: Mapping[str, str]) -> str:
    """Names all that the answer depends on: files, sides, sources, what is looked for and by what, code and libraries."""
    encoder = (encoder_of(config.training) if config is not None else None) or Encoder()
    findings = issues.chosen(config.validation.findings if config is not None else None)
    beside = [workspace.root / name for name in (TEST_LEDGER, *(each.file for each in COMPANIONS))]
    return sha256_text(
        canonical_json(
            [
                dict(hashes),
                {path.name: sha256_file(path) for path in beside if path.is_file()},
                [each.to_json() for each in findings],
                [plugins.member_digest("findings", each.finding) for each in findings],
                encoder.key,
                absence(encoder),
                dataclasses.asdict(settings.accepted),
                plugins.source_digest(Path(examination.__file__)),
                plugins.source_digest(Path(__file__)),
                lock_digest(),
            ]
        )
    )


def _answer_of_before(folder: Path, key: str) -> Checked | None:
    """What an earlier look with this key came to; None where there is none, or where its files are not what it wrote."""
    table, sheet = folder / issues.FILE, folder / SHEET
    try:
        kept = _Kept.read(json.loads((folder / _KEPT).read_text()))
        if kept.key != key or (sha256_file(table), sha256_file(sheet)) != (kept.table_sha256, kept.sheet_sha256):
            return None
        return Checked(tuple(issues.read(table)), kept.looked, kept.notes, kept.num_files, table, sheet, None)
    except (OSError, ValueError, StoreError):
        return None


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
