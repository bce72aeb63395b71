"""Validation: images under `data/` -> Dataset. Every image is looked at, and Great Expectations judges the facts.

Undecodable files and contradictory labels are quarantined with a reason and counted; nothing is dropped in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from components.contracts.data import Dataset, DataVersion
from components.contracts.errors import DataError, DataRejected
from components.contracts.progress import Progress, silent
from components.contracts.records import Record
from components.contracts.wording import counted
from components.dataversions import listing
from components.facts import File, facts
from components.formats import PINNED, Accepted
from components.samples import class_twins
from components.store import describe

if TYPE_CHECKING:
    import pandas as pd


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


_SAMPLES = ["path", "label", "sha256", "picture", "bytes", "mode", "width", "height", "short_side"]
_SAMPLES += ["brightness", "contrast", "sharpness"]
_QUARANTINE = ["path", "label", "reason"]


def validate(
    data: Path,
    version: DataVersion,
    config: ValidationConfig,
    *,
    out: Path,
    accepted: Accepted = PINNED,
    hashes: Mapping[str, str] | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
) -> Dataset:
    """Look at every file under `data/<class>/`, judge the sample table, write samples, quarantine and HTML data docs.

    A file whose md5 `hashes` tells by its path, and whose facts `cache` has, is not opened.
    Pictures that serving would refuse by `accepted` are used and reported, as are colour profiles that are of no use.
    Raises DataRejected with every critical expectation that failed; the data docs say the same in pictures.
    """
    import pandas as pd

    there = listing(data)
    by_class, strays = there.classes, there.strays
    known = hashes or {}
    files = [
        File(path, name := path.relative_to(data).as_posix(), label, known.get(name, ""))
        for label, paths in by_class.items()
        for path in paths
    ]
    if not files:
        raise DataError(f"{data} holds no images; add some with `visionloop data add FOLDER` (one sub-folder per class)")
    found = facts(files, cache=cache, accepted=accepted, progress=progress)
    outside = [(path.relative_to(data).as_posix(), "", "not directly in a class folder, or hidden") for path in strays]
    table = found[found["reason"] == ""]
    refused = pd.concat(
        [found.loc[found["reason"] != "", _QUARANTINE], pd.DataFrame(outside, columns=_QUARANTINE, dtype=object)]
    )
    contradictory = table.groupby("picture")["label"].transform("nunique") > 1
    contradiction = table.loc[contradictory, ["path", "label"]].assign(reason="same picture under several classes")
    table, refused = table[~contradictory], pd.concat([refused, contradiction])
    table = table.sort_values("path", ignore_index=True)
    remarks = _remarks(table)
    table = table[_SAMPLES]
    refused = refused.sort_values("path", ignore_index=True)
    num_input = len(files) + len(strays)
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
    class_counts = {label: counts.get(label, 0) for label in sorted(by_class)}
    warnings = _judge(table, class_counts, config, docs=out / "data_docs")
    return Dataset(
        data=version,
        samples=describe(out / "samples.parquet", within=out),
        quarantine=describe(out / "quarantine.parquet", within=out),
        classes=tuple(sorted(by_class)),
        class_counts=class_counts,
        num_input=num_input,
        num_kept=len(table),
        num_quarantined=len(refused),
        warnings=(*warnings, *class_twins(class_counts), *remarks),
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


def _judge(table: pd.DataFrame, class_counts: dict[str, int], config: ValidationConfig, *, docs: Path) -> list[str]:
    """Run both expectation suites, build the data docs, raise on critical failures, return the warnings."""
    import great_expectations as gx
    import great_expectations.expectations as gxe
    import pandas as pd
    from great_expectations.checkpoint import UpdateDataDocsAction

    classes = pd.DataFrame({"class": list(class_counts), "images": list(class_counts.values())})
    classes["imbalance"] = classes["images"].max() / classes["images"].clip(lower=1)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    context.add_data_docs_site(
        site_name="local",
        site_config={
            "class_name": "SiteBuilder",
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs).replace("$", r"\$")},
        },
    )
    suites = {
        "classes": (
            classes,
            [
                (
                    gxe.ExpectTableRowCountToBeBetween(min_value=2, severity="critical"),
                    "expected at least 2 classes (sub-folders of data/)",
                ),
                (
                    gxe.ExpectColumnValuesToBeBetween(
                        column="images", min_value=config.min_images_per_class, severity="critical"
                    ),
                    f"expected at least {config.min_images_per_class} usable images in every class "
                    f"(validation.min_images_per_class)",
                ),
                (
                    gxe.ExpectColumnValuesToBeBetween(
                        column="imbalance", max_value=config.max_imbalance, severity="warning"
                    ),
                    f"the largest class has more than {config.max_imbalance:g} times the images of these",
                ),
            ],
        ),
        "images": (
            table,
            [
                (gxe.ExpectColumnValuesToNotBeNull(column="label", severity="critical"), "expected a class for every image"),
                (gxe.ExpectColumnValuesToBeUnique(column="path", severity="critical"), "expected every path once"),
                (
                    gxe.ExpectColumnValuesToBeBetween(
                        column="short_side", min_value=config.min_side_pixels, severity="critical"
                    ),
                    f"expected at least {config.min_side_pixels} pixels on the short side (validation.min_side_pixels)",
                ),
                (gxe.ExpectColumnValuesToBeUnique(column="picture", severity="warning"), "the same picture several times"),
                (
                    gxe.ExpectColumnValuesToBeBetween(
                        column="brightness",
                        min_value=config.min_brightness,
                        max_value=config.max_brightness,
                        severity="warning",
                    ),
                    "almost black or almost white",
                ),
                (
                    gxe.ExpectColumnValuesToBeBetween(column="contrast", min_value=0.01, severity="warning"),
                    "a flat picture with almost no contrast",
                ),
            ],
        ),
    }
    checkpoints = []
    for name, (frame, expectations) in suites.items():
        batch = context.data_sources.add_pandas(name).add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        suite = context.suites.add(gx.ExpectationSuite(name=name))
        for expectation, message in expectations:
            expectation.notes = message
            suite.add_expectation(expectation)
        definition = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
        checkpoint = context.checkpoints.add(
            gx.Checkpoint(
                name=name,
                validation_definitions=[definition],
                actions=[UpdateDataDocsAction(name="docs", site_names=["local"])],
                result_format={"result_format": "SUMMARY"},
            )
        )
        checkpoints.append((name, checkpoint, frame))
    critical: list[str] = []
    warnings: list[str] = []
    for name, checkpoint, frame in checkpoints:
        outcome = checkpoint.run(batch_parameters={"dataframe": frame})
        for validation in outcome.run_results.values():
            for result in validation.results:
                if result.success:
                    continue
                spec = result.expectation_config
                assert spec is not None
                column = str(spec.kwargs.get("column", ""))
                text = _explain(str(spec.notes), result.result or {}, frame, column, name)
                (critical if str(getattr(spec.severity, "value", spec.severity)) == "critical" else warnings).append(text)
    if critical:
        raise DataRejected(f"the data set was refused: {'; '.join(critical)}. Data docs: {docs / 'index.html'}")
    return warnings


def _explain(message: str, result: dict[str, Any], frame: pd.DataFrame, column: str, suite: str) -> str:
    if column and result.get("partial_unexpected_index_list"):
        key = "class" if suite == "classes" else "path"
        rows = frame.loc[result["partial_unexpected_index_list"]]
        shown = ", ".join(f"{row[key]} ({column} {_short(row[column])})" for _, row in rows.head(3).iterrows())
        return f"{message}; {result.get('unexpected_count', len(rows))} found: {shown}"
    return f"{message}; found {result.get('observed_value', 'other')}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:12]
