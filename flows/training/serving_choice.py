"""The engine that serves: judged, packaged, and asked in a server before anything is registered.

Where the recipe leaves the choice open, an engine that does not serve is one less to choose from, as one that fails a gate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from components.choosing import AUTO
from components.contracts.data import Splits
from components.contracts.models import Engine
from components.contracts.records import Stored
from components.contracts.releases import Release
from components.contracts.verdicts import Finding, Verdict, exceptable
from flows.training import steps
from flows.training.run import Run
from flows.training.serving_check import with_finding

Judge = Callable[[Mapping[str, Finding]], Stored[Verdict]]
"""The gates' verdict, given the engines that did not serve and what came of asking them."""


def served(
    run: Run, judge: Judge, engines: Sequence[Stored[Engine]], splits: Stored[Splits]
) -> tuple[Stored[Verdict], Stored[Release] | None]:
    """The verdict with what a server answered as one more finding, and the release; None where the gates refuse all."""
    unserved: dict[str, Finding] = {}
    while True:
        verdict = judge(unserved)
        if verdict.record.status != "pass" and not exceptable(verdict.record):
            return verdict, None
        release = steps.packaging(run, engines, splits, verdict.record)
        finding = steps.serving_check(run, release)
        if finding.status == "pass" or run.config.export.serving != AUTO:
            return Stored(with_finding(verdict.record, finding), verdict.folder), release
        # It fails by this finding from now on, so that no engine is asked twice.
        unserved[verdict.record.serving_engine] = finding
        run.console.line(f"    {verdict.record.serving_engine} does not serve, so it is not chosen: {finding.message}")
