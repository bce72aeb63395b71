"""Validation: images under `data/` -> Dataset. Great Expectations judges the facts, and findings look for what is wrong.

Undecodable files and contradictory labels are quarantined with a reason and counted; nothing is dropped in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from components import issues
from components.contracts.data import Dataset, DataVersion
from components.contracts.errors import DataError, DataRejected
from components.contracts.issues import SEVERITIES, Issue
from components.contracts.progress import Progress, silent
from components.contracts.records import Record
from components.contracts.wording import counted
from components.examination import dataset_files, examine
from components.expectations import COLUMNS, SUITE_VERSION, ExpectationConfig, judge
from components.formats import PINNED, Accepted
from components.issues import FindingConfig
from components.issues import check as check_findings
from components.samples import class_twins
from components.store import describe

if TYPE_CHECKING:
    import pandas as pd

    from components.embeddings import Encoder


UNLEARNED = "the recipe trains on no weights that a package brings; visionloop data check looks for it"


class ValidationConfig(Record):
    """What a data set must be to be trained on."""

    max_quarantined_share: float = Field(default=0.02, ge=0, lt=1)
    """Above this share of unusable files the run stops: something is wrong with the source."""
    min_images_per_class: int = Field(default=10, ge=4)
    min_side_pixels: int = Field(default=8, ge=1)
    min_brightness: float = Field(default=0.01, ge=0, le=1)
    """Images whose mean luminance lies outside [min, max] are reported as a warning."""
    max_brightness: float = Field(default=0.99, ge=0, le=1)
    max_imbalance: float = Field(default=20.0, ge=1)
    """Largest class over smallest, reported as a warning."""
    suite_version: int = Field(default=SUITE_VERSION, ge=1, le=SUITE_VERSION)
    """Of the shipped expectations, so that a recipe means the same when later ones expect more."""
    expectations: tuple[ExpectationConfig, ...] = ()
    """Beside the shipped ones."""
    findings: tuple[FindingConfig, ...] | None = None
    """What is looked for, a severity `critical` refusing the data set; all that there are by default."""


def check(config: ValidationConfig) -> None:
    """Raise ConfigError for unknown findings, expectations and settings, before any work is done."""
    check_findings(config.findings)
    for each in config.expectations:
        each.load()


_SAMPLES = list(COLUMNS["images"])
_QUARANTINE = ["path", "label", "reason"]


def validate(
    data: Path,
    version: DataVersion,
    config: ValidationConfig,
    *,
    out: Path,
    accepted: Accepted = PINNED,
    hashes: Mapping[str, str] | None = None,
    members: Mapping[str, bool] | None = None,
    sources: Mapping[str, str] | None = None,
    encoder: Encoder | None = None,
    cache: Path | None = None,
    num_threads: int = 2,
    progress: Progress = silent,
) -> Dataset:
    """Look at every file under `data/<class>/`, judge the sample table, write samples, quarantine and HTML data docs.

    A file whose md5 `hashes` tells by its path, and whose facts `cache` has, is not opened. `members` are the pictures of
    the test ledger, by which copies of test pictures outside of it are found. `sources` are what is known of files' origins,
    by their sha256. `encoder` is that of a training which embeds
    the same pictures; without one, what needs embeddings is not looked for. All issues are written, too.
    Pictures that serving would refuse by `accepted` are used and reported, as are colour profiles that are of no use.
    Raises DataRejected with every critical expectation that failed, of which the data docs say the same in pictures, and
    with the critical issues.
    """
    import pandas as pd

    there = dataset_files(data, hashes or {})
    if not there.files:
        raise DataError(f"{data} holds no images; add some with `visionloop data add FOLDER` (one sub-folder per class)")
    found = examine(
        there,
        config.findings,
        members=members,
        sources=sources,
        encoder=encoder,
        unlearned="" if encoder is not None else UNLEARNED,
        cache=cache,
        accepted=accepted,
        num_threads=num_threads,
        progress=progress,
    )
    issues.write(found.issues, out / issues.FILE)
    table, refused = found.known.table, found.known.refused[_QUARANTINE]
    contradictory = table.groupby("picture")["label"].transform("nunique") > 1
    contradiction = table.loc[contradictory, ["path", "label"]].assign(reason="same picture under several classes")
    table, refused = table[~contradictory], pd.concat([refused, contradiction])
    table = table.sort_values("path", ignore_index=True)
    remarks = _remarks(table)
    table = table[_SAMPLES]
    refused = refused.sort_values("path", ignore_index=True)
    num_input = len(there.files) + len(there.strays)
    assert len(table) + len(refused) == num_input, "validation lost an image"
    if num_input != version.num_files:
        raise DataError(
            f"{data} holds {counted(num_input, 'file')}, its version pins {version.num_files}; run `visionloop data status`"
        )
    table.to_parquet(out / "samples.parquet", index=False)
    refused.to_parquet(out / "quarantine.parquet", index=False)
    share = len(refused) / num_input
    if share > config.max_quarantined_share:
        shown = "; ".join(f"{row.path}: {row.reason}" for row in refused.head(5).itertuples())
        raise DataRejected(
            f"not usable: {len(refused)} of {counted(num_input, 'file')} ({share:.1%}, accepted "
            f"{config.max_quarantined_share:.1%}): {shown}. Fix or remove them and `visionloop data add`, or raise "
            f"validation.max_quarantined_share"
        )
    counts = Counter(table["label"])
    class_counts = {label: counts.get(label, 0) for label in there.classes}
    warnings = judge(table, class_counts, config, config.expectations, docs=out / "data_docs")
    _refuse_critical(found.issues)
    return Dataset(
        data=version,
        samples=describe(out / "samples.parquet", within=out),
        quarantine=describe(out / "quarantine.parquet", within=out),
        classes=there.classes,
        class_counts=class_counts,
        num_input=num_input,
        num_kept=len(table),
        num_quarantined=len(refused),
        warnings=(*warnings, *class_twins(class_counts), *remarks, *found.notes, *_told(found.issues)),
        issues=describe(out / issues.FILE, within=out),
        findings=found.looked,
        severities={name: count for name in SEVERITIES if (count := sum(each.severity == name for each in found.issues))},
    )


def _remarks(table: pd.DataFrame) -> list[str]:
    """What is no fault of the data, and may surprise."""
    told = []
    for column, text in (
        ("not_served", "pictures are of a kind that serving refuses (VISIONLOOP_FORMATS, _MAX_PIXELS, _MAX_IMAGE_MB)"),
        ("profile", "pictures have a colour profile that is of no use; their colours are taken as they are stored"),
    ):
        found = table[table[column] != ""]
        if len(found):
            shown = "; ".join(f"{row['path']}: {row[column]}" for _, row in found.head(3).iterrows())
            told.append(f"{len(found)} {text}: {shown}")
    return told


def _refuse_critical(found: Sequence[Issue]) -> None:
    """Raise DataRejected where the recipe calls something critical that was found."""
    critical = [issue for issue in found if issue.severity == "critical"]
    if critical:
        shown = "; ".join(f"{issue.kind}: {', '.join(issue.files[:3])}: {issue.detail}" for issue in critical[:3])
        raise DataRejected(
            f"the data set was refused: {counted(len(critical), 'critical issue')} found ({shown}). See all of them with "
            f"`visionloop data check`, mend the data and `visionloop data add`, or lower the severity under "
            f"validation.findings"
        )


def _told(found: Sequence[Issue]) -> list[str]:
    """One sentence for each kind of issue that is a warning."""
    kinds: dict[str, list[Issue]] = {}
    for issue in found:
        if issue.severity == "warning":
            kinds.setdefault(issue.kind, []).append(issue)
    return [
        f"{kind}: {counted(len(of), 'issue')} ({'; '.join(issue.told for issue in of[:2])}{'; ...' if len(of) > 2 else ''})"
        for kind, of in kinds.items()
    ]
