"""Export: Checkpoint x target -> Engine. Every exporter runs in a process of its own.

A converter that crashes, leaks or loads a clashing native library then costs one engine and an error message, not the
run. All targets build from one ONNX graph, whose input is the uint8 image and whose outputs are logits and embedding.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationInfo, field_validator, model_validator

from components import collector, plugins
from components.calibration import calibration_rows, valid_rows
from components.choosing import AUTO, Limits
from components.contracts.data import Splits
from components.contracts.errors import ConfigError, EngineUnavailable, ExportError, UnknownName, VisionloopError, causes
from components.contracts.families import Built, ExportRequest, Target, Task
from components.contracts.models import Checkpoint, Engine, Precision
from components.contracts.records import FileDigest, Record, Stored
from components.contracts.wording import counted
from components.images import batches
from components.lifetime import end_with
from components.memory import peak_bytes
from components.store import describe, explained

REFERENCE = "torch_reference-fp32"
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
GRAPH = "model.onnx"
_TIME_LIMIT_S = 3600
_BATCH = 32
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class TargetConfig(Record):
    """One engine to build."""

    target: str
    precision: Precision = "fp32"
    required: bool = True
    """A required engine that fails its gates rejects the candidate. Default: true, and false where `serving` is `auto`."""
    settings: dict[str, Any] = {}
    time_limit_s: int = Field(default=_TIME_LIMIT_S, ge=1)
    """How long its exporter may take; one that takes longer is ended."""

    @field_validator("precision", mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if given not in PRECISIONS:
            raise ValueError(str(UnknownName("precision", given, PRECISIONS)))
        return given

    @property
    def name(self) -> str:
        return f"{self.target}-{self.precision}"


class ExportConfig(Record):
    """Which engines are built and which one is served; the torch reference is always built as the yardstick."""

    serving: str
    """Name of the engine that goes into production, such as `openvino-int8`, or `auto`: the best one within `limits`."""
    targets: tuple[TargetConfig, ...]
    limits: Limits = Limits()
    """What the chosen engine may cost at most; a named one is judged by the gates alone."""
    hourly_price: float | None = Field(default=None, gt=0)
    """Of the machine that serves, in any currency, to tell what a million answers cost; decides nothing."""

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: tuple[TargetConfig, ...], info: ValidationInfo) -> tuple[TargetConfig, ...]:
        names = [target.name for target in targets]
        if len(set(names)) != len(names):
            raise ValueError(f"the same engine twice: {', '.join(sorted(names))}")
        if info.data.get("serving") != AUTO:
            return targets
        # One that fails its gates is then one less to choose from, unless the recipe says that it is required.
        return tuple(
            target if "required" in target.model_fields_set else target.model_copy(update={"required": False})
            for target in targets
        )

    @model_validator(mode="after")
    def _servable(self) -> ExportConfig:
        if self.serving == REFERENCE:
            raise ValueError("the torch reference is the yardstick, it is never served; choose another engine")
        valid = [target.name for target in self.targets if target.name != REFERENCE]
        if self.serving == AUTO and not valid:
            raise ValueError("serving is `auto` and there is no engine to choose from; name one under targets")
        if self.serving not in (AUTO, *valid):
            names = ", ".join([AUTO, *valid]) if valid else "(none)"
            raise ValueError(f"serving names {self.serving!r}, which is not built; valid: {names}")
        return self

    @property
    def all_targets(self) -> tuple[TargetConfig, ...]:
        """The reference first, then the configured ones."""
        others = tuple(target for target in self.targets if target.name != REFERENCE)
        return (TargetConfig(target="torch_reference", required=False), *others)


def check(config: ExportConfig) -> None:
    """Raise ConfigError for an unknown target, precision or setting, before any work is done."""
    for chosen in config.all_targets:
        target = plugins.load("targets", chosen.target, chosen.settings)
        if chosen.precision not in target.precisions:
            raise ConfigError(
                f"target {chosen.target!r} has no precision {chosen.precision!r}; valid: {', '.join(target.precisions)}"
            )


def absent(config: ExportConfig) -> dict[str, str]:
    """Engines that this machine cannot build, with the reason; raises ConfigError when the serving engine is one."""
    reasons = {
        target.name: plugins.load("targets", target.target, target.settings).absent() for target in config.all_targets
    }
    found = {name: reason for name, reason in reasons.items() if reason}
    if config.serving == AUTO and all(target.name in found for target in config.all_targets if target.name != REFERENCE):
        raise ConfigError(
            f"none of the engines that could serve can be built here: {'; '.join(map(': '.join, found.items()))}. "
            f"Name another one under export.targets"
        )
    if config.serving in found:
        raise ConfigError(f"export.serving is {config.serving}: {found[config.serving]}; serve another engine")
    return found


class Graph(Record):
    """The interchange graph of one checkpoint."""

    checkpoint_digest: str
    file: FileDigest


def export_graph(checkpoint: Stored[Checkpoint], *, out: Path, plugin_folder: Path | None = None) -> Graph:
    """Write the ONNX graph that targets build from; raises ExportError."""
    _in_subprocess(
        {
            "do": "graph",
            "checkpoint": _reference(checkpoint),
            "out": str(out),
            "plugins": str(plugin_folder) if plugin_folder else None,
        },
        time_limit_s=_TIME_LIMIT_S,
    )
    return Graph(checkpoint_digest=checkpoint.record.digest(), file=describe(out / GRAPH, within=out))


def export(
    checkpoint: Stored[Checkpoint],
    graph: Stored[Graph],
    splits: Stored[Splits],
    data: Path,
    config: TargetConfig,
    *,
    out: Path,
    plugin_folder: Path | None = None,
) -> Engine:
    """Build one engine; int8 ranges come from the calibration split alone. Raises ExportError with the builder's words."""
    built = _in_subprocess(
        {
            "do": "engine",
            "checkpoint": _reference(checkpoint),
            "graph": str(graph.folder / graph.record.file.name),
            "splits": _reference(splits),
            "data": str(data),
            "config": config.to_json(),
            "out": str(out),
            "plugins": str(plugin_folder) if plugin_folder else None,
        },
        time_limit_s=config.time_limit_s,
    )
    return _engine(checkpoint.record, config, built, out)


def memory_mb(engine: Stored[Engine], *, num_threads: int, plugin_folder: Path | None = None) -> float:
    """What loading an engine and answering one image adds to a process of its own, in 10^6 bytes; raises ExportError."""
    # What a process that dies leaves behind does not belong into the engine's own folder, which is sealed.
    with tempfile.TemporaryDirectory(prefix="visionloop-memory-") as scratch:
        request = {
            "do": "memory",
            "engine": _reference(engine),
            "num_threads": num_threads,
            "out": scratch,
            "plugins": str(plugin_folder) if plugin_folder else None,
        }
        return float(_in_subprocess(request, time_limit_s=_TIME_LIMIT_S)["memory_mb"])


def _memory_of(request: dict[str, Any]) -> dict[str, Any]:
    engine = Stored(Engine.read(request["engine"]["record"]), Path(request["engine"]["folder"]))
    target = plugins.load("targets", engine.record.target, engine.record.settings)
    size = engine.record.preprocessing
    image = np.zeros((1, size.height, size.width, size.channels), dtype=np.uint8)
    before = peak_bytes()
    target.load(engine, num_threads=request["num_threads"]).predict(image)
    return {"memory_mb": (peak_bytes() - before) / 1e6}


def _reference(stored: Stored[Any]) -> dict[str, Any]:
    return {"record": stored.record.to_json(), "folder": str(stored.folder)}


def _in_subprocess(request: dict[str, Any], *, time_limit_s: int) -> dict[str, Any]:
    exporter = subprocess.Popen(
        [sys.executable, "-m", "components.export"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
        # Ctrl-C is the run's to answer: an exporter that it ended first would look like one that failed.
        process_group=0,
    )
    try:
        answered, told = exporter.communicate(json.dumps({**request, "parent": os.getpid()}), timeout=time_limit_s)
    except BaseException as error:
        # With all that it started: a process of its own would hold its pipes open and go on writing.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(exporter.pid, signal.SIGKILL)
        exporter.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise ExportError(
            f"the exporter did not finish within {time_limit_s} s and was ended; "
            f"where the machine was busy, run again, else raise time_limit_s of this target"
        ) from None
    last = answered.strip().splitlines()[-1:]
    try:
        answer: dict[str, Any] = json.loads(last[0])
    except (IndexError, ValueError):
        with contextlib.suppress(OSError):
            Path(request["out"], "exporter.log").write_text(told)
        if exporter.returncode < 0:
            killed = f"was killed by signal {-exporter.returncode}"
            raise ExportError(
                f"the exporter {killed}" + ", perhaps for want of memory" * (exporter.returncode == -9)
            ) from None
        last_words = (told.strip().splitlines() or ["without a word"])[-1]
        raise ExportError(f"the exporter ended with status {exporter.returncode}: {last_words[:300]}") from None
    if "full" in answer:
        with explained("write", Path(request["out"])):
            raise OSError(answer["full"], os.strerror(answer["full"]))
    if "error" in answer:
        raise ExportError(answer["error"])
    return answer


def _build(request: dict[str, Any]) -> dict[str, Any]:
    if request["plugins"]:
        plugins.use_workspace(Path(request["plugins"]))
    if request["do"] == "memory":
        return _memory_of(request)
    checkpoint = Stored(Checkpoint.read(request["checkpoint"]["record"]), Path(request["checkpoint"]["folder"]))
    record, out = checkpoint.record, Path(request["out"])
    if request["do"] == "graph":
        _write_graph(checkpoint, out / GRAPH)
        return {}
    config = TargetConfig.read(request["config"])
    splits = Stored(Splits.read(request["splits"]["record"]), Path(request["splits"]["folder"]))
    task: Task = plugins.load("tasks", record.task, dict(record.task_settings))

    def pictures(names: Iterable[str]) -> Iterator[npt.NDArray[np.uint8]]:
        return batches([Path(request["data"], name) for name in names], record.preprocessing, batch_size=_BATCH)

    def calibration() -> Iterator[npt.NDArray[np.uint8]]:
        return pictures(calibration_rows(splits, task)["path"])

    def valid() -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]]:
        table = valid_rows(splits, task)
        targets = task.targets(list(table["label"]), record.classes)
        for index, images in enumerate(pictures(table["path"])):
            yield images, targets[index * _BATCH : (index + 1) * _BATCH]

    target = plugins.load("targets", config.target, config.settings)
    built: Built = target.export(
        ExportRequest(checkpoint, Path(request["graph"]), config.precision, calibration, valid, task), out=out
    )
    answer: dict[str, Any] = {
        "entry": built.entry,
        "runtime": built.runtime,
        "built_for": list(built.built_for),
        "facts": dict(built.facts),
        "temperature": record.temperature,
    }
    if config.precision != "fp32":
        answer["temperature"] = _own_temperature(target, _engine(record, config, answer, out), out, valid, task)
    return answer


def _write_graph(checkpoint: Stored[Checkpoint], path: Path) -> None:
    from components.checkpoints import restore
    from components.graphs import to_onnx

    model = restore(checkpoint)
    odd = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if odd:
        raise ExportError(
            f"{checkpoint.record.weights.name} has NaN or infinite numbers in {odd[0]}"
            + (f" and {counted(len(odd) - 1, 'tensor')} more" if len(odd) > 1 else "")
            + "; no engine could answer anything with them: train again, with a lower learning rate"
        )
    to_onnx(model, checkpoint.record.preprocessing, path)


def _engine(record: Checkpoint, config: TargetConfig, built: dict[str, Any], out: Path) -> Engine:
    return Engine(
        name=config.name,
        target=config.target,
        precision=config.precision,
        settings=config.settings,
        checkpoint_digest=record.digest(),
        files=tuple(describe(path, within=out) for path in sorted(out.rglob("*")) if path.is_file()),
        entry=built["entry"],
        preprocessing=record.preprocessing,
        classes=record.classes,
        embedding_dim=record.embedding_dim,
        temperature=built["temperature"],
        runtime=built["runtime"],
        built_for=tuple(built["built_for"]),
        facts=built["facts"],
    )


def _own_temperature(
    target: Target, engine: Engine, out: Path, valid: Callable[[], Iterator[tuple[Any, Any]]], task: Task
) -> float:
    """Temperature of a quantised engine, fitted on its own answers to the valid split.

    Quantisation rescales the logits; with the float model's temperature its probabilities would be wrong even where its
    answers are right. An engine that cannot run here keeps the float model's.
    """
    try:
        predictor = target.load(Stored(engine, out), num_threads=2)
    except EngineUnavailable:
        return engine.temperature
    answers = [(predictor.predict(images)[0], targets) for images, targets in valid()]
    logits, targets = (np.concatenate(parts) for parts in zip(*answers, strict=True))
    return float(task.fit_temperature(logits, targets))


def _full(error: Exception, out: Path) -> int:
    """The errno of a full disk, or 0 for what is no such error.

    Libraries tell it in words of their own, if at all: "basic_ios::clear: iostream error".
    """
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return cause.errno or 0
    return errno.ENOSPC if shutil.disk_usage(out).free < 1 << 16 else 0


if __name__ == "__main__":
    collector.skip_at_exit()
    collector.collect_seldom()
    # Builders and plug-ins print what they like; only the answer goes to who asked.
    with os.fdopen(os.dup(1), "w") as asker:
        os.dup2(2, 1)
        request = json.loads(sys.stdin.read())
        end_with(request["parent"])
        try:
            answer = _build(request)
        except Exception as error:
            if code := _full(error, Path(request["out"])):
                answer = {"full": code}
            elif isinstance(error, VisionloopError):
                answer = {"error": str(error)}
            else:
                raise
        print(json.dumps(answer), file=asker)
