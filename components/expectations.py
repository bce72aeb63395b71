"""Expectations: Great Expectations judges the sample table and the classes, by a suite that a recipe can extend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from components.contracts.errors import ConfigError, DataRejected, UnknownName, in_short
from components.contracts.issues import Severity
from components.contracts.records import Record

if TYPE_CHECKING:
    import pandas as pd

SUITE_VERSION = 1
"""Of the shipped expectations. One that is added, or means something else, is a version of its own beside this one."""
_SEVERITIES = {"critical": "critical", "warning": "warning", "note": "info"}


_POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src 'self' file: data:; font-src 'self' "
    "file:; style-src 'self' file: 'unsafe-inline' https://unpkg.com https://maxcdn.bootstrapcdn.com "
    'https://cdnjs.cloudflare.com https://cdn.jsdelivr.net">'
)
"""Great Expectations writes names of files and classes into its pages as they are: none of them is run there, nor what it
would load itself, which only sorts and hides rows."""


class ExpectationConfig(Record):
    """An expectation of a recipe's own, beside the shipped ones."""

    expectation: str
    """A class of Great Expectations, such as ExpectColumnValuesToBeBetween."""
    column: str = ""
    """Of the table; empty for an expectation of the table as a whole."""
    settings: dict[str, Any] = {}
    severity: Severity = "warning"
    """`critical` refuses the data set, `warning` is told, `note` stands in the data docs."""
    table: Literal["images", "classes"] = "images"
    """What is judged: a row an image, or a row a class."""

    def load(self) -> Any:
        """The expectation; raises ConfigError for an unknown one and for settings that it does not take."""
        import great_expectations.expectations as gxe

        names = sorted(name for name in dir(gxe) if name.startswith("Expect") and name not in ("Expectation", "Expect"))
        if self.expectation not in names:
            raise UnknownName("expectation", self.expectation, names)
        columns = COLUMNS[self.table]
        if self.column and self.column not in columns:
            raise UnknownName(f"column of {self.table} in expectation {self.expectation}:", self.column, list(columns))
        of_column = {"column": self.column} if self.column else {}
        try:
            return getattr(gxe, self.expectation)(**of_column, **self.settings, severity=_SEVERITIES[self.severity])
        except Exception as error:  # whatever the library makes of settings
            raise ConfigError(f"expectation {self.expectation}: {in_short(error)}; correct column and settings") from error


COLUMNS: Mapping[str, tuple[str, ...]] = {
    "images": (
        *("path", "label", "sha256", "picture", "bytes", "mode", "width", "height"),
        *("short_side", "brightness", "contrast", "sharpness"),
    ),
    "classes": ("class", "images", "imbalance"),
}


class Limits(Protocol):
    """What the shipped expectations are set by."""

    @property
    def min_images_per_class(self) -> int: ...

    @property
    def min_side_pixels(self) -> int: ...

    @property
    def min_brightness(self) -> float: ...

    @property
    def max_brightness(self) -> float: ...

    @property
    def max_imbalance(self) -> float: ...


def judge(
    table: pd.DataFrame,
    class_counts: Mapping[str, int],
    limits: Limits,
    more: Sequence[ExpectationConfig] = (),
    *,
    docs: Path,
) -> list[str]:
    """Run both suites on the sample table and the classes, build the data docs, and return the warnings.

    Raises DataRejected with every critical expectation that failed; what fails as a note is in the data docs alone.
    """
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
                        column="images", min_value=limits.min_images_per_class, severity="critical"
                    ),
                    f"expected at least {limits.min_images_per_class} usable images in every class "
                    f"(validation.min_images_per_class)",
                ),
                (
                    gxe.ExpectColumnValuesToBeBetween(
                        column="imbalance", max_value=limits.max_imbalance, severity="warning"
                    ),
                    f"the largest class has more than {limits.max_imbalance:g} times the images of these",
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
                        column="short_side", min_value=limits.min_side_pixels, severity="critical"
                    ),
                    f"expected at least {limits.min_side_pixels} pixels on the short side (validation.min_side_pixels)",
                ),
                (gxe.ExpectColumnValuesToBeUnique(column="picture", severity="warning"), "the same picture several times"),
                (
                    gxe.ExpectColumnValuesToBeBetween(
                        column="brightness",
                        min_value=limits.min_brightness,
                        max_value=limits.max_brightness,
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
    for each in more:
        asked = f"{each.expectation} of the recipe" + (f" for {each.column}" if each.column else "")
        suites[each.table][1].append((each.load(), asked))
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
    told: dict[str, list[str]] = {"critical": [], "warning": []}
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
                severity = str(getattr(spec.severity, "value", spec.severity))
                if severity in told:
                    told[severity].append(text)
    for page in docs.rglob("*.html"):
        page.write_text(page.read_text(encoding="utf-8").replace("<head>", f"<head>{_POLICY}", 1), encoding="utf-8")
    if told["critical"]:
        raise DataRejected(f"the data set was refused: {'; '.join(told['critical'])}. Data docs: {docs / 'index.html'}")
    return told["warning"]


def _explain(message: str, result: dict[str, Any], frame: pd.DataFrame, column: str, suite: str) -> str:
    if column and result.get("partial_unexpected_index_list"):
        key = "class" if suite == "classes" else "path"
        rows = frame.loc[result["partial_unexpected_index_list"]]
        shown = ", ".join(f"{row[key]} ({column} {_short(row[column])})" for _, row in rows.head(3).iterrows())
        return f"{message}; {result.get('unexpected_count', len(rows))} found: {shown}"
    return f"{message}; found {result.get('observed_value', 'other')}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:12]
