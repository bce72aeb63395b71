"""Looking for what is wrong with a data set: which findings a recipe chooses, and what they find."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import plugins
from components.contracts.errors import ConfigError, PluginFailed
from components.contracts.families import Finding, Known
from components.contracts.issues import SEVERITIES, Issue, Looked, Need, Severity
from components.contracts.records import Record
from components.tables import read_frame

if TYPE_CHECKING:
    import pandas as pd

FILE = "issues.parquet"
_COLUMNS = [name for name in Issue.model_fields if name != "schema_version"]


class FindingConfig(Record):
    """One finding, with settings and a severity of the recipe's own."""

    finding: str
    settings: dict[str, Any] = {}
    severity: Severity | None = None
    """Of all its issues; none for the finding's own."""


def chosen(findings: Sequence[FindingConfig] | None) -> tuple[FindingConfig, ...]:
    """What a recipe chooses; None is all that there are, the workspace's own too."""
    if findings is None:
        return tuple(FindingConfig(finding=name) for name in plugins.names("findings"))
    return tuple(findings)


def check(findings: Sequence[FindingConfig] | None) -> None:
    """Raise ConfigError for an unknown finding or setting, before any work is done."""
    for each in findings or ():
        plugins.load("findings", each.finding, each.settings)
    twice = [name for name, count in Counter(each.finding for each in findings or ()).items() if count > 1]
    if twice:
        raise ConfigError(
            f"finding {twice[0]!r} is there several times; expected each once, for its issues are told by its name"
        )


def needed(findings: Sequence[FindingConfig]) -> frozenset[Need]:
    """What these findings need beside the facts."""
    loaded: list[Finding] = [plugins.load("findings", each.finding, each.settings) for each in findings]
    return frozenset(need for finding in loaded for need in finding.needs)


def look(
    known: Known, findings: Sequence[FindingConfig], *, absent: Mapping[str, str] | None = None
) -> tuple[list[Issue], tuple[Looked, ...]]:
    """All issues, the severest and worst first, and for each finding whether it was looked for.

    `absent` says why something that findings may need is not known, such as {"embeddings": "no weights: ..."}.
    """
    there = {
        "pairs": known.pairs is not None,
        "embeddings": known.embeddings is not None,
        "probabilities": known.probabilities is not None,
        "split": "split" in known.table,
    }
    issues: list[Issue] = []
    looked: list[Looked] = []
    for each in findings:
        finding: Finding = plugins.load("findings", each.finding, each.settings)
        missing = [need for need in sorted(finding.needs) if not there[need]]
        if missing:
            told = "; ".join((absent or {}).get(need) or f"no {need} here" for need in missing)
            looked.append(Looked(name=each.finding, ran=False, reason=told))
            continue
        found = finding.look(known)
        strange = next((issue.kind for issue in found if issue.kind != each.finding), None)
        if strange is not None:
            raise PluginFailed(f"finding {each.finding!r} found an issue of kind {strange!r}; expected its own name")
        if each.severity is not None:
            found = [issue.model_copy(update={"severity": each.severity}) for issue in found]
        issues += found
        looked.append(Looked(name=each.finding, ran=True, num_issues=len(found)))
    issues.sort(key=lambda issue: (SEVERITIES.index(issue.severity), issue.kind, issue.score, issue.files, issue.id))
    return issues, tuple(looked)


def to_frame(issues: Sequence[Issue]) -> pd.DataFrame:
    """A row an issue, the columns as an issue's fields; `files` is JSON, so that any tool can read it."""
    import pandas as pd

    rows = [issue.model_dump() | {"files": json.dumps(issue.files, ensure_ascii=False)} for issue in issues]
    return pd.DataFrame(rows, columns=_COLUMNS)


def write(issues: Sequence[Issue], path: Path) -> None:
    """Write them as a table, in their order."""
    to_frame(issues).to_parquet(path, index=False)


def read(path: Path) -> list[Issue]:
    """What `write` wrote."""
    rows = read_frame(path).to_dict("records")
    return [Issue.model_validate({**row, "files": tuple(json.loads(row["files"]))}) for row in rows]
