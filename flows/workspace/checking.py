"""`data check`: what is wrong with the images that lie in data/, without a training and without a change of anything."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components import attributes, dataversions, issues
from components.companions import TEST_LEDGER
from components.contracts.errors import DataError
from components.contracts.issues import SEVERITIES, Issue, Looked, Severity
from components.contracts.progress import Progress, silent
from components.embeddings import Encoder
from components.examination import Examined, dataset_files, examine
from components.splitting import TestLedger
from components.training import TrainingConfig
from flows.workspace.recipes import load_recipe
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace

FOLDER = "check"


@dataclass(frozen=True)
class Checked:
    """What was found in the images that lie in data/ now."""

    examined: Examined
    table: Path
    """All issues, as Parquet."""
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
    """Look for all findings, or those that a recipe names, in what lies in data/, pinned or not; writes their table.

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
    return Checked(examined, folder / issues.FILE, len(there.files) + len(there.strays))
