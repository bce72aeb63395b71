"""Latency budget: the p99 of single images on the machine that measured it, with all of its 95 % interval."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Evidence
from components.contracts.verdicts import Finding, Measurement, compare_budget, too_few
from components.contracts.wording import counted


class Gate(BaseModel):
    """Inconclusive when the interval straddles the budget, and without enough runs of this very engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_p99_ms: float = Field(gt=0)
    min_runs: int = Field(default=100, ge=1)

    def judge(self, evidence: Evidence) -> Finding:
        measured = evidence.measurement
        if measured is None or measured.status != "measured":
            why = f": {measured.reason}" if measured is not None and measured.reason else ""
            return self._inconclusive(f"its latency was not measured{why}")
        if measured.engine_digest != evidence.engine.digest():
            return self._inconclusive("the measurement is of another engine")
        if measured.num_runs < self.min_runs:
            few = too_few("timed runs", measured.num_runs, self.min_runs, exactly=True)
            return self._inconclusive(few, n=measured.num_runs)
        p99 = measured.latency_p99
        if p99 is None:
            return self._inconclusive("its p99 latency was measured without an interval; `--measure-again` measures one")
        status = compare_budget(p99, self.max_p99_ms)
        undecided = (
            "; these runs do not decide: a quieter machine (`--measure-again`), or more of them in a "
            "training (evaluation.latency_runs), narrow the interval"
        )
        return Finding(
            gate="latency",
            status=status,
            message=f"p99 latency {p99.value:.3g} ms [{p99.low:.3g}, {p99.high:.3g}]{_rounds(measured)} of "
            f"{counted(measured.num_runs, 'run')} on {measured.machine}, budget {self.max_p99_ms:g} ms"
            + undecided
            * (status == "inconclusive"),
            value=p99.value,
            threshold=self.max_p99_ms,
            n=measured.num_runs,
        )

    def _inconclusive(self, message: str, *, n: int | None = None) -> Finding:
        return Finding(gate="latency", status="inconclusive", message=message, threshold=self.max_p99_ms, n=n)


def _rounds(measured: Measurement) -> str:
    if not measured.rounds_p99_ms:
        return ""
    noisy = "; the machine was busy with something else, `--measure-again` measures anew" if measured.noisy else ""
    return f" (in {counted(len(measured.rounds_p99_ms), 'round')}{noisy})"
