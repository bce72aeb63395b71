"""The table of a candidate's engines, for report and console: what each answered, how fast, how large, at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from components.contracts.models import Engine
from components.contracts.verdicts import Estimate, Evaluation, Measurement


def cell(estimate: Estimate | None) -> tuple[str, str]:
    """A value and its interval; of what never happened, that."""
    if estimate is None:
        return "never predicted", ""
    return f"{estimate.value:.4f}", f"{estimate.low:.4f} to {estimate.high:.4f}"


def metric_names(evaluations: Sequence[Evaluation], headline: str) -> list[str]:
    """Names of what was measured of the engines."""
    return next((list(evaluation.metrics) for evaluation in evaluations if evaluation.metrics), [headline])


def engine_row(
    engine: Engine, evaluation: Evaluation, measured: Measurement, names: Sequence[str], costs: dict[str, float]
) -> dict[str, Any]:
    """One engine in words and numbers; `costs` as `flows.training.results.costs_json` gives them."""
    latency = (measured.latency_p50_ms, measured.latency_p90_ms, measured.latency_p99_ms)
    return {
        "name": engine.name,
        "runtime": engine.runtime,
        "built_for": ", ".join(engine.built_for),
        "executed": bool(evaluation.metrics),
        "reason": evaluation.reason,
        "cells": [cell(evaluation.metrics.get(name)) for name in names],
        "latency": " / ".join("-" if value is None else f"{value:.2f}" for value in latency),
        "size": _size(measured.size_bytes),
        "memory": "" if measured.memory_mb is None else f"{measured.memory_mb:.0f} MB in memory",
        "cost": [
            f"{value:.2g} a million" if name == "price_of_a_million" else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            for name, value in costs.items()
        ],
    }


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.1f} kB"
