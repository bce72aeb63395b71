"""Latency budget: the p99 of single images on the machine that measured it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Evidence
from components.contracts.verdicts import Finding, Measurement, compare, too_few
from components.contracts.wording import counted


class Gate(BaseModel):
    """Inconclusive without a measurement of this very engine, or with too few runs to speak of a p99."""

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
            return self._inconclusive(too_few("timed runs", measured.num_runs, self.min_runs, exactly=True))
        status = compare(measured.latency_p99_ms, self.max_p99_ms, at_least=False)
        if status == "inconclusive":
            return self._inconclusive("its p99 latency was not measured")
        return Finding(
            gate="latency",
            status=status,
            message=f"p99 latency {measured.latency_p99_ms:.3g} ms{_spread(measured)} of "
            f"{counted(measured.num_runs, 'run')} on {measured.machine}, budget {self.max_p99_ms:g} ms",
            value=measured.latency_p99_ms,
            threshold=self.max_p99_ms,
            n=measured.num_runs,
        )

    def _inconclusive(self, message: str) -> Finding:
        return Finding(gate="latency", status="inconclusive", message=message, threshold=self.max_p99_ms)


def _spread(measured: Measurement) -> str:
    if not measured.rounds_p99_ms:
        return ""
    low, high = min(measured.rounds_p99_ms), max(measured.rounds_p99_ms)
    noisy = "; the machine was busy with something else, `train --measure-again` measures anew" if measured.noisy else ""
    return f" ({low:.3g} to {high:.3g} in {counted(len(measured.rounds_p99_ms), 'round')}{noisy})"
