"""Engines on the command line: what was judged, one more, one that leaves, and whether one that came is as it should be."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.contracts.wording import counted
from flows.cli.answers import HERE, AsJson, Commands, InWorkspace, OfModel, finish, opened_desk

if TYPE_CHECKING:
    from components.contracts.verdicts import Estimate
    from components.speed import Latency
    from flows.workspace.engines import Measured, Verified
    from flows.workspace.judged_engines import JudgedEngine

engine_app = Commands(help="Engines of registered versions: what was judged, further ones, and bundles for other machines.")


@engine_app.command("list")
def engine_list(
    every: Annotated[bool, typer.Option("--all", help="Also of trainings that the gates refused.")] = False,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Every version's engines: passed, failed, undecided, or built and not executed here; and why not."""
    from flows.workspace.judged_engines import judged_engines

    found = opened_desk(workspace, model)
    engines = judged_engines(found, every=every)
    finish(
        {"model": found.model, "engines": [dataclasses.asdict(engine) for engine in engines]},
        json_,
        lambda: "\n".join(_listed(engines)) or f"{found.model} has no version yet; --all shows what the gates refused.",
    )


def _listed(engines: Sequence[JudgedEngine]) -> list[str]:
    lines: list[str] = []
    for engine in engines:
        of = f"version {engine.version}" if engine.version else f"run {engine.run}"
        heading = f"{of} ({engine.version_status})"
        if heading not in lines:
            lines.append(heading)
        serves = "serves" if engine.version_status == "champion" else "the one to serve"
        notes = [note for note, holds in ((serves, engine.serves), ("built later", engine.built_later)) if holds]
        status = "undecided" if engine.status == "inconclusive" else engine.status
        lines.append(f"  {engine.engine:24} {', '.join([status, *notes])}")
        lines += [f"      {why}" for why in engine.why]
    return lines


@engine_app.command("build")
def engine_build(
    version: Annotated[str | None, typer.Argument(help="Version of the model; the champion by default.")] = None,
    *,
    target: Annotated[str, typer.Option("--target", "-t", help="What it is built for, such as onnxruntime.")],
    precision: Annotated[str, typer.Option("--precision", "-p", help="fp32, fp16 or int8.")] = "fp32",
    setting: Annotated[list[str] | None, typer.Option("--setting", help="KEY=VALUE of the target. May be repeated.")] = None,
    measure_again: Annotated[
        bool, typer.Option("--measure-again", help="Time it anew, whatever was measured before.")
    ] = False,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Build one more engine of a registered version, and judge it by the gates of its recipe.

    It changes no version and no promotion. Exit status 1 when it did not pass.
    """
    found = opened_desk(workspace, model)
    from flows.training.further_engine import build
    from flows.workspace.judged_engines import champion_of, standing, unmet, wanted_engine

    wanted = wanted_engine(target, precision, setting or [])
    made = build(found, version or champion_of(found), wanted, measure_again=measure_again, quiet=json_)
    status, why = standing(made.verdict), unmet(made.verdict)
    answer = {
        "model": found.model,
        "version": made.version,
        "engine": made.engine.name,
        "status": status,
        "why": list(why),
        "was_there": made.was_there,
        "findings": [finding.to_json() for finding in made.verdict.findings],
        "metrics": {name: estimate.to_json() for name, estimate in made.evaluation.metrics.items()},
        "latency_p99_ms": made.measurement.latency_p99_ms,
        "bytes": made.engine.size_bytes,
        "facts": made.engine.facts,
        "folder": str(made.folder),
    }
    lines = [
        f"Engine {made.engine.name} of {found.model} version {made.version}: "
        f"{'undecided' if status == 'inconclusive' else status}{' (it was built before)' if made.was_there else ''}.",
        *(f"  {each}" for each in why),
        f"{made.engine.size_bytes / 1e6:.1f} MB in {made.folder}. No version and no promotion changed.",
    ]
    finish(answer, json_, lambda: "\n".join(lines))
    if status != "passed":
        raise typer.Exit(1)


@engine_app.command("bundle")
def engine_bundle(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where: a new folder, or a new file that ends in .zip.")],
    version: Annotated[str | None, typer.Argument(help="Version of the model; the champion by default.")] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="Such as onnxruntime-fp32; the one that serves by default.")
    ] = None,
    built_later: Annotated[
        bool,
        typer.Option("--built-later", help="The one that `engine build` made, where the version has one of that name, too."),
    ] = False,
    signing_key: Annotated[
        Path | None, typer.Option("--signing-key", help="A private elliptic key in PEM; the workspace's own by default.")
    ] = None,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Write an engine with labels, preprocessing, golden pictures, licences and a program that runs it, signed.

    Only what passed its gates leaves; what `engine build` made has to have passed `parity` as well.
    Its golden pictures are pictures of your data: look whether they may leave with it.
    """
    from flows.workspace.engines import NEVER_UNSURE, bundle_engine

    found = opened_desk(workspace, model)
    made = bundle_engine(found, version, engine, out, key=signing_key, built_later=built_later)
    record = made.record
    answer = {
        "bundle": str(out),
        "model": record.model,
        "version": record.version,
        "standing": record.standing,
        "engine": record.engine.name,
        "built_later": record.built_later,
        "bytes": made.num_bytes,
        "golden": len(record.golden),
        "signer": made.signer,
        "public_key": str(made.public_key) if made.public_key else None,
    }
    key = shlex.quote(str(made.public_key)) if made.public_key else "PUBLIC_KEY"
    lines = [
        f"{out}: engine {record.engine.name} of {record.model} version {record.version} ({record.standing}"
        f"{'; the engine was built later' if record.built_later else ''}), "
        f"{made.num_bytes / 1e6:.1f} MB, with {counted(len(record.golden), 'golden picture')} of your data.",
        *([NEVER_UNSURE] if record.threshold is None else []),
        f"Signed by the key {made.signer[:16]}." + (f" Give others {made.public_key}." if made.public_key else ""),
        f"Next: visionloop engine verify {shlex.quote(str(out))} --key {key}; or, there: python predict.py PICTURE",
    ]
    finish(answer, json_, lambda: "\n".join(lines))


@engine_app.command("verify")
def engine_verify(
    bundle: Annotated[Path, typer.Argument(help="A folder or a .zip that `visionloop engine bundle` wrote.")],
    key: Annotated[
        Path | None, typer.Option("--key", help="The public key of who made it, from a place that you trust.")
    ] = None,
    json_: AsJson = False,
) -> None:
    """Compare a bundle with its manifest and signature, then run its golden pictures. Exit status 1 when it is not right.

    Without --key nothing shows who made it: only that it is as its maker left it.
    """
    from flows.workspace.engines import verify_engine
    from flows.workspace.settings import num_threads

    found = verify_engine(bundle, key=key, num_threads=num_threads())
    finish(_answer(bundle, found), json_, lambda: "\n".join(_told(bundle, found)))
    if found.problem:
        raise typer.Exit(1)


@engine_app.command("bench")
def engine_bench(
    what: Annotated[
        str | None, typer.Argument(metavar="[VERSION|BUNDLE]", help="A version, or a bundle; the champion by default.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="Such as onnxruntime-fp32; the one that serves by default.")
    ] = None,
    picture: Annotated[
        list[Path] | None, typer.Option("--picture", help="Pictures to take; the engine's golden ones by default.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads of the engine, and processors that it is kept on.")
    ] = None,
    streams: Annotated[
        int | None, typer.Option("--streams", min=1, help="Callers at once in the multi-stream figure; as many as threads.")
    ] = None,
    runs: Annotated[
        int, typer.Option("--runs", min=20, help="Timed answers a figure and round, of which there are 5.")
    ] = 200,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Time an engine on this machine, alone and from a picture's bytes to its answer, with 95 % intervals."""
    from flows.terminal import Console
    from flows.workspace.engines import measure_engine
    from flows.workspace.settings import num_threads

    number = threads or num_threads()
    with Console(1, quiet=json_) as console, console.stage("timing", 1) as (progress, _):
        found = measure_engine(
            what,
            lambda: opened_desk(workspace, model),
            engine=engine,
            pictures=picture or (),
            num_threads=number,
            streams=streams or number,
            runs=runs,
            progress=progress,
        )
    speed = found.speed
    answer = {
        "model": found.model,
        "version": found.version,
        "engine": found.engine.name,
        "single_stream_ms": _latencies(speed.single_stream),
        "multi_stream_ms": _latencies(speed.multi_stream),
        "multi_stream_pictures_per_s": {name: _interval(rate) for name, rate in speed.multi_stream_rate.items()},
        "offline_pictures_per_s": {name: _interval(rate) for name, rate in speed.offline.items()},
        "threads": speed.num_threads,
        "streams": speed.streams,
        "processors": list(speed.processors),
        "load": speed.load,
        "machine": speed.machine,
        "libraries": found.libraries,
        "formats": speed.formats,
        "picture_bytes": speed.picture_bytes,
    }
    finish(answer, json_, lambda: "\n".join(_speed_lines(found)))


def _interval(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}


def _latencies(found: dict[str, Latency]) -> dict[str, dict[str, dict[str, float]]]:
    return {name: {key: _interval(value) for key, value in _named(latency)} for name, latency in found.items()}


def _named(latency: Latency) -> list[tuple[str, Estimate]]:
    return list(zip(("p50", "p90", "p99"), latency.percentiles, strict=True))


def _speed_lines(found: Measured) -> list[str]:
    speed = found.speed
    formats = ", ".join(f"{number} {name}" for name, number in speed.formats.items())
    processors = ", ".join(map(str, speed.processors)) or "of the system's choice"
    lines = [
        f"{found.engine.name} of {found.model} version {found.version} on {speed.machine}",
        f"  {counted(speed.num_threads, 'thread')} on processors {processors}; "
        f"load before: {speed.load:.1f}; {', '.join(f'{name} {number}' for name, number in found.libraries.items())}",
        f"  pictures: {formats}, {speed.picture_bytes / 1e3:.1f} kB each",
    ]
    for title, latencies in (
        ("single stream, ms", speed.single_stream),
        (f"{counted(speed.streams, 'stream')}, ms", speed.multi_stream),
    ):
        for name, latency in latencies.items():
            shown = ", ".join(f"{key} {e.value:.2f} [{e.low:.2f}, {e.high:.2f}]" for key, e in _named(latency))
            lines.append(f"  {title:24} {_FROM[name]:20} {shown}")
    for title, rates in (
        (f"{counted(speed.streams, 'stream')}, pictures/s", speed.multi_stream_rate),
        ("offline, pictures/s", speed.offline),
    ):
        for name, rate in rates.items():
            lines.append(f"  {title:24} {_FROM[name]:20} {rate.value:.0f} [{rate.low:.0f}, {rate.high:.0f}]")
    return lines


_FROM = {"engine": "the engine alone", "picture": "from encoded bytes"}


def _answer(bundle: Path, found: Verified) -> dict[str, Any]:
    record, answered = found.record, found.answered
    return {
        "bundle": str(bundle),
        "verified": not found.problem,
        "problem": found.problem,
        "origin_proven": found.origin_proven,
        "signer": found.signer,
        "model": record.model if record else None,
        "version": record.version if record else None,
        "engine": record.engine.name if record else None,
        "built_by": record.engine.runtime if record else None,
        "built_later": record.built_later if record else None,
        "gates": [finding.to_json() for finding in record.gates] if record else None,
        "files": found.num_files,
        "bytes": found.num_bytes,
        "golden": {
            "pictures": answered.pictures,
            "pixel_difference": answered.pixel_difference,
            "logit_difference": answered.logit_difference if answered.logit_difference < float("inf") else None,
            "tolerance": answered.tolerance,
            "runtime": answered.runtime,
        }
        if answered
        else None,
    }


def _told(bundle: Path, found: Verified) -> list[str]:
    record, answered = found.record, found.answered
    if record is None or answered is None:
        return [found.problem]
    lines = [
        f"{bundle}: engine {record.engine.name} of {record.model} version {record.version}, "
        f"{counted(found.num_files, 'file')}, {found.num_bytes / 1e6:.1f} MB, as they were signed."
    ]
    if found.problem:
        return [*lines, f"NOT as it should be: {found.problem}"]
    lines.append(
        f"{counted(answered.pictures, 'golden picture')} answered as they should be by {answered.runtime}: a logit differs "
        f"by at most {answered.logit_difference:.2g}, accepted are {answered.tolerance:.2g}."
    )
    if record.gates:
        later = ", after its version was registered" if record.built_later else ""
        lines.append(f"Where it was made its gates said{later}:")
        lines += [f"  {finding.gate}: {finding.status}; {finding.message}" for finding in record.gates]
    if found.origin_proven:
        lines.append(f"Signed by the key that you named ({found.signer[:16]}).")
    else:
        lines.append(
            f"Who made it is NOT shown: it is signed by the key {found.signer[:16]}, which came with it. Name the maker's "
            f"public key by --key."
        )
    return lines
