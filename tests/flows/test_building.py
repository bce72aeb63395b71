"""What a run does without an engine that could not be built."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.contracts.errors import ExportError
from components.contracts.verdicts import Measurement
from components.export import REFERENCE, ExportConfig


class Begun:
    """An export that gives an engine of this name, or fails."""

    def __init__(self, name: str, *, fails: bool) -> None:
        self.name, self.fails = name, fails

    def result(self) -> Any:
        if self.fails:
            raise ExportError(f"Frobnicate is not supported in {self.name}")
        return SimpleNamespace(record=SimpleNamespace(name=self.name), folder=Path())


def run_of(serving: str, *required: str) -> Any:
    targets = [
        {"target": target, **({"required": True} if target in required else {})} for target in ("onnxruntime", "openvino")
    ]
    export = ExportConfig.model_validate({"serving": serving, "targets": targets})
    said: list[str] = []
    console = SimpleNamespace(line=said.append, said=said)
    return SimpleNamespace(config=SimpleNamespace(export=export), targets=export.all_targets, absent={}, console=console)


def outcome(run: Any, *failing: str) -> list[str]:
    from flows.training.steps import built

    building = [Begun(target.name, fails=target.name in failing) for target in run.targets]
    return [engine.record.name for engine in built(run, building)]  # type: ignore[arg-type]


def test_an_engine_that_cannot_be_built_costs_the_run_no_other_one() -> None:
    run = run_of("auto")
    assert outcome(run, "openvino-fp32") == [REFERENCE, "onnxruntime-fp32"]
    assert run.absent == {"openvino-fp32": "could not be built: Frobnicate is not supported in openvino-fp32"}
    (line,) = run.console.said
    assert line.strip().startswith("openvino-fp32: could not be built")


@pytest.mark.parametrize(
    ("run", "failing"),
    [
        (run_of("auto", "openvino"), ["openvino-fp32"]),
        (run_of("openvino-fp32"), ["openvino-fp32"]),
        (run_of("auto"), [REFERENCE]),
        (run_of("auto"), ["openvino-fp32", "onnxruntime-fp32"]),
    ],
    ids=["required", "serving", "reference", "none left"],
)
def test_without_what_it_needs_the_run_ends_with_the_exporters_words(run: Any, failing: list[str]) -> None:
    with pytest.raises(ExportError, match="Frobnicate is not supported in"):
        outcome(run, *failing)


def test_an_engine_whose_memory_cannot_be_measured_meets_no_limit_and_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.training import steps

    def fail(*_: Any, **__: Any) -> float:
        raise ExportError("the exporter was killed by signal 9")

    monkeypatch.setattr(steps, "memory_mb", fail)
    run = run_of("auto")
    limits = SimpleNamespace(memory_mb=100)
    run.config = SimpleNamespace(export=SimpleNamespace(limits=limits), evaluation=SimpleNamespace(num_threads=1))
    run.plugin_folder = None
    measured = Measurement(engine="e", engine_digest="d", status="measured", machine="m")
    engine: Any = SimpleNamespace(record=SimpleNamespace(name="openvino-fp32"))
    assert steps.with_memory(run, engine, measured) == measured
    (said,) = run.console.said
    assert "the memory of openvino-fp32 was not measured" in said
