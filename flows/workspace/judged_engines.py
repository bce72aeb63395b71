"""Which engine of which version passed its gates, which did not and why: by the ledger, and by what was built later."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from components.contracts.errors import ConfigError, StoreError, UnknownName
from components.contracts.models import Engine
from components.contracts.records import Stored, first_problem
from components.contracts.verdicts import EngineVerdict, Finding, Verdict
from components.export import PRECISIONS, TargetConfig
from components.gating import combined
from components.store import MANIFEST, read_manifest, unseal
from flows.workspace.desk import Desk
from flows.workspace.yaml_reading import parse_settings
from registry import approval
from registry.ledger import Entry
from registry.policies import by_gates

FURTHER = "engines"
"""Folder of the workspace's state: a folder for each model, version and engine that was built after its registration."""
_GATING, _EXPORT = "gating", "export"

Standing = Literal["passed", "failed", "inconclusive", "built, not executed here", "not built here"]


@dataclass(frozen=True)
class JudgedEngine:
    """One engine of one version, or of one training that the gates refused."""

    engine: str
    target: str
    precision: str
    version: str | None
    """None where the gates refused what it belongs to."""
    run: str
    version_status: str
    """What became of the version: waiting, approved, expired, rejected, champion or retired; or refused by the gates."""
    status: Standing
    why: tuple[str, ...]
    """What a gate said that did not pass."""
    serves: bool
    """Whether it is the engine that serves, where the version is champion."""
    built_later: bool
    """Whether `engine build` made it: nobody's approval is about it."""


def judged_engines(desk: Desk, *, every: bool = False) -> list[JudgedEngine]:
    """The engines of every version, the newest first; with `every` also those of trainings that the gates refused."""
    entries = desk.ledger.entries(desk.model)
    states = {state.requested.seq: state for state in approval.states(entries, desk.ledger.now())}
    found: list[JudgedEngine] = []
    for entry in reversed(entries):
        if state := states.get(entry.seq):
            found += _of_row(entry, state.version, state.status)
            found += _further(desk, entry, state.version, state.status)
        elif every and by_gates(entry):
            found += _of_row(entry, None, "refused by the gates")
    return found


def champion_of(desk: Desk) -> str:
    """The champion's version; raises ConfigError where there is none."""
    entry = approval.champion(desk.ledger.entries(desk.model))
    if entry is None:
        raise ConfigError(f"{desk.model} has no champion yet; name a version, as `visionloop candidates` lists them")
    return str(entry.body["version"])


def wanted_engine(target: str, precision: str, settings: Sequence[str]) -> TargetConfig:
    """An engine that is asked for in words; raises ConfigError."""
    chosen = parse_settings(settings, "--setting")
    if precision not in PRECISIONS:
        raise UnknownName("precision", precision, PRECISIONS)
    try:
        return TargetConfig.model_validate({"target": target, "precision": precision, "settings": chosen})
    except ValidationError as error:
        raise ConfigError(first_problem(error)) from error


def further_folder(desk: Desk, version: str, engine: str) -> Path:
    """Where what is made of an engine that is built later is linked."""
    return desk.workspace.state / FURTHER / desk.model / version / engine


def further_engine(desk: Desk, version: str, engine: str) -> tuple[Stored[Engine], EngineVerdict] | None:
    """An engine that was built later, every byte of it verified, and what the gates said; None where there is none.

    Raises TamperedArtefact, and ConfigError where it was built and is not judged yet.
    """
    folder = further_folder(desk, version, engine)
    place = next(folder.glob(f"*-{_EXPORT}/{engine}"), None)
    if place is None or not place.is_dir():
        return None
    record = Engine.read(read_manifest(place)["record"])
    for judged in folder.glob(f"*-{_GATING}"):
        verdict = Verdict.read(read_manifest(judged)["record"]).engines[0]
        if verdict.engine_digest == record.digest():
            return Stored(record, place.resolve()), verdict
    raise ConfigError(
        f"engine {engine} of version {version} was built and not judged, perhaps because that was stopped; run "
        f"{build_command(version, record.target, record.precision)} again"
    )


def further_names(desk: Desk, version: str) -> list[str]:
    """The engines of a version that were built later."""
    return sorted(path.name for path in (desk.workspace.state / FURTHER / desk.model / version).glob("*"))


def build_command(version: str, target: str, precision: str) -> str:
    """What builds and judges an engine of a version."""
    return f"`visionloop engine build {version} --target {target} -p {precision}`"


def standing(verdict: EngineVerdict) -> Standing:
    """A verdict in words."""
    if verdict.status == "not executed here":
        return "built, not executed here" if verdict.engine_digest else "not built here"
    words: dict[str, Standing] = {"pass": "passed", "fail": "failed", "inconclusive": "inconclusive"}
    return words[verdict.status]


def unmet(verdict: EngineVerdict) -> tuple[str, ...]:
    """What each gate said that did not pass, without the words of the standing beside which it is shown."""
    said = f"{standing(verdict)}: "
    return tuple(
        f"{f.gate}: {f.message.removeprefix(said)}" for f in verdict.findings if f.status not in ("pass", "not applicable")
    )


def _of_row(entry: Entry, version: str | None, status: str) -> Iterator[JudgedEngine]:
    """From the summary that a row holds; older rows say which engines were judged by what was found about them alone."""
    summary: Mapping[str, Any] = entry.body.get("summary") or {}
    told: dict[str, list[Finding]] = {name: [] for name in (summary.get("policy") or {}).get("engines", {})}
    for row in summary.get("findings", []):
        finding = Finding(gate=row["gate"], status=row["status"], message=row["message"])
        told.setdefault(row["engine"], []).append(finding)
    bound = entry.body.get("bound", {})
    for engine, findings in told.items():
        verdict = EngineVerdict(
            engine=engine,
            engine_digest=bound.get("engines", {}).get(engine, ""),
            required=False,
            serving=engine == bound.get("serving"),
            status=combined(findings),
            findings=tuple(findings),
        )
        yield _judged(verdict, version, str(summary.get("run", "")), status, built_later=False)


def _further(desk: Desk, entry: Entry, version: str, status: str) -> Iterator[JudgedEngine]:
    run = str((entry.body.get("summary") or {}).get("run", ""))
    for folder in sorted((desk.workspace.state / FURTHER / desk.model / version).glob("*")):
        for path in folder.glob(f"*-{_GATING}/{MANIFEST}"):
            if verdict := _verdict(path):
                yield _judged(verdict, version, run, status, built_later=True)


def _verdict(path: Path) -> EngineVerdict | None:
    """None of what does not verify: `store verify` says what is wrong, and building again makes it anew."""
    try:
        body = unseal(path.read_bytes())
        return Verdict.read(body["record"]).engines[0] if body is not None else None
    except (OSError, json.JSONDecodeError, StoreError, KeyError, IndexError):
        return None


def _judged(verdict: EngineVerdict, version: str | None, run: str, status: str, *, built_later: bool) -> JudgedEngine:
    target, _, precision = verdict.engine.rpartition("-")
    return JudgedEngine(
        engine=verdict.engine,
        target=target,
        precision=precision,
        version=version,
        run=run,
        version_status=status,
        status=standing(verdict),
        why=unmet(verdict),
        serves=verdict.serving and version is not None and not built_later,
        built_later=built_later,
    )
