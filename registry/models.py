"""Models in MLflow: a judged candidate becomes a model version, also one that gates are undecided about and a person may
except them; a refused one is kept as evidence on its run.

Order, each step repeatable: artefacts up, read back and hashed, model version, ledger row. A candidate is known by its
digest, so a run that was killed anywhere in between, and run again, ends with one version and one row.
"""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.contracts.data import Dataset, DataVersion, Splits
from components.contracts.errors import RegistryUnavailable, StoreError, TamperedArtefact, VisionloopError, causes, redacted
from components.contracts.evidence import CandidateEvidence, PassesCost
from components.contracts.models import Checkpoint, Engine
from components.contracts.records import FileDigest, Record, RecordT, Stored
from components.contracts.releases import Release
from components.contracts.verdicts import (
    Candidate,
    Evaluation,
    Outcome,
    Rejection,
    Robustness,
    SliceTable,
    Undecided,
    Verdict,
    exceptable,
)
from components.store import describe, seal, sha256_file, unseal
from components.tables import read_frame
from registry import flavour, tracking
from registry.approval import State
from registry.ledger import Entry, Ledger, Principal

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MANIFEST = "candidate.json"
EVIDENCE = "evidence"
CHAMPION = "champion"
"""The MLflow alias that shows which version is champion; the ledger says it."""
_CANDIDATE_TAG = "visionloop.candidate"
_MANIFEST_TAG = "visionloop.manifest_sha256"
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE)
_TO_READ = ("report.html", "model-card.md")
_SEQ_TAG = "visionloop.ledger_seq"
_CHAMPION_TAG = "visionloop.champion_seq"
_TRAINED_IN_TAG = "visionloop.trained_in"
FLOW = Principal(name="flows/train", method="machine")


@dataclass(frozen=True)
class CandidateBundle:
    """What is registered: files by their name in the model version, and what is said about them."""

    model: str
    candidate_digest: str
    training_key: str
    verdict: Verdict
    files: Mapping[str, Path]
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    history: list[dict[str, float]]
    bound: Mapping[str, Any] = field(default_factory=dict)
    """Digests that an approval is bound to: data, split, weights, engines, policy, evidence, release, champion."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """What an approver reads first; kept in the ledger, so it cannot be changed afterwards."""
    requester: Principal | None = None
    """The person who asked for the run; none for a machine."""
    inputs: Sequence[tracking.DataInput] = ()
    """The splits that it was trained, chosen and judged on."""


@dataclass(frozen=True)
class CurrentChampion:
    """Today's champion: its version and its engine, verified."""

    version: str
    engine: Stored[Engine]
    data: DataVersion
    """What it was trained, chosen and judged on."""
    test_labels: Mapping[str, str]
    """The label of each test picture then; none where its evidence holds no table of them."""


class Registry:
    """The model registry behind one MLflow tracking URI and one ledger."""

    def __init__(self, tracking_uri: str, ledger: Ledger, *, artifacts: Path | None) -> None:
        self.tracking_uri = tracking_uri
        self.ledger = ledger
        self._artifacts = artifacts

    def _client(self) -> MlflowClient:
        return tracking.client(self.tracking_uri, self._artifacts)

    def recorded(self, model: str, candidate_digest: str) -> Outcome | None:
        """What the ledger says about this very candidate; needs no MLflow."""
        entry = self.ledger.find(_key(model, candidate_digest))
        return None if entry is None else _outcome(entry)

    def register(self, evidence: CandidateBundle) -> Outcome:
        """Record the candidate, the undecided version or the rejection, once.

        Raises RegistryUnavailable; running again goes on.
        """
        known = self.recorded(evidence.model, evidence.candidate_digest)
        if known is not None:
            return known
        undecided = exceptable(evidence.verdict)
        versioned = evidence.verdict.status == "pass" or bool(undecided)
        with _reachable(self.tracking_uri):
            mlflow = self._client()
            experiment = tracking.experiment_id(mlflow, evidence.model, self._artifacts)
            run_id = _run_of_candidate(mlflow, experiment, evidence)
            tracking.log_history(mlflow, run_id, evidence.history)
            _describe_run(mlflow, run_id, evidence)
            tracking.log_inputs(mlflow, run_id, evidence.inputs)
            body: dict[str, Any] = {
                "status": evidence.verdict.status,
                "reasons": list(evidence.verdict.reasons),
                "mlflow_run_id": run_id,
                "bound": dict(evidence.bound),
                "summary": dict(evidence.summary),
            }
            if versioned:
                version = self._version(mlflow, evidence, experiment, run_id)
                self._expect_new(evidence, str(version.version))
                body |= {"undecided": list(undecided)} if undecided else {}
                body |= {"version": str(version.version), "manifest_sha256": version.tags[_MANIFEST_TAG]}
            else:
                with tempfile.TemporaryDirectory(prefix="visionloop-register-") as scratch:
                    body["manifest_sha256"] = _bundle(evidence, Path(scratch))
                    mlflow.log_artifacts(run_id, scratch, "rejection")
            mlflow.set_terminated(run_id, "FINISHED")
        entry = self.ledger.append(
            "requested" if versioned else "rejected",
            model=evidence.model,
            subject=evidence.candidate_digest,
            actor=evidence.requester or FLOW,
            body=body,
            key=_key(evidence.model, evidence.candidate_digest),
        )
        if versioned:
            with _reachable(self.tracking_uri):
                # What the ledger has reached, for the day when it is cut short.
                mlflow.set_model_version_tag(evidence.model, entry.body["version"], _SEQ_TAG, str(entry.seq))
        return _outcome(entry)

    def _version(self, mlflow: MlflowClient, evidence: CandidateBundle, experiment: str, run_id: str) -> ModelVersion:
        from mlflow.exceptions import MlflowException

        try:
            mlflow.create_registered_model(evidence.model, tags={"visionloop": "1"})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for version in _versions(mlflow, evidence.model):
            if version.tags.get(_CANDIDATE_TAG) == evidence.candidate_digest:
                # An earlier run died before it told the ledger; its version, with its own manifest, is the one.
                return version
        with tempfile.TemporaryDirectory(prefix="visionloop-register-") as scratch:
            bundle = Path(scratch)
            started = mlflow.get_run(run_id).info.start_time
            manifest_sha256 = _bundle(evidence, bundle, flavour_of=(run_id, started))
            if (found := bound_in(bundle)) != dict(evidence.bound):
                differs = ", ".join(sorted(name for name in found if found[name] != evidence.bound.get(name)))
                raise TamperedArtefact(f"the files of this candidate are not what was judged ({differs}); run again")
            model_id = _logged_model(mlflow, evidence, experiment, run_id, bundle, manifest_sha256)
        _show_at_run(mlflow, run_id, model_id, evidence)
        made = mlflow.create_model_version(
            evidence.model,
            source=f"models:/{model_id}",
            run_id=run_id,
            model_id=model_id,
            tags={
                **evidence.tags,
                _CANDIDATE_TAG: evidence.candidate_digest,
                _MANIFEST_TAG: manifest_sha256,
                "visionloop.verdict": evidence.verdict.status,
            },
            description=_description(
                evidence.verdict.status, evidence.verdict.serving_engine, _waiting(exceptable(evidence.verdict))
            ),
        )
        # By this tag, which MLflow's own `register_model` writes, the model's page shows that it is registered.
        known_as = json.dumps([{"name": evidence.model, "version": str(made.version)}])
        mlflow.set_logged_model_tags(model_id, {"mlflow.modelVersions": known_as})
        return made

    def _expect_new(self, evidence: CandidateBundle, version: str) -> None:
        """Raise RegistryUnavailable when MLflow gave a number that the ledger has for another candidate: it forgot some."""
        for row in self.ledger.entries(evidence.model):
            same_number = row.kind == "requested" and row.body["version"] == version
            if same_number and row.subject != evidence.candidate_digest:
                raise RegistryUnavailable(
                    f"MLflow calls this candidate version {version} of {evidence.model!r}, but the ledger's row {row.seq} "
                    f"requested another one under that number: MLflow's model was deleted, or an older backup was restored. "
                    f"Restore a backup made after row {row.seq} (`visionloop restore`), or give the model another name"
                )

    def champion(self, model: str) -> Entry | None:
        """The ledger's champion row; None proves that there never was one.

        Raises RegistryUnavailable when MLflow knows of ledger rows that this ledger does not have: a lost, new or wrong
        ledger proves nothing.
        """
        entries = self.ledger.entries(model)
        if not entries:
            self._expect_no_history(model)
        return self.ledger.champion(model)

    def _expect_no_history(self, model: str) -> None:
        with _reachable(self.tracking_uri):
            versions = _versions(self._client(), model)
        told = [version.version for version in versions if _SEQ_TAG in version.tags]
        if told:
            raise RegistryUnavailable(
                f"the ledger has no row of model {model!r}, but MLflow's version {told[0]} was entered into one. A lost "
                f"ledger proves nothing about a champion: set VISIONLOOP_LEDGER_URL to the right one, or restore a "
                f"backup (`visionloop restore`)"
            )

    def expect_whole_ledger(self, model: str) -> None:
        """Raise RegistryUnavailable when MLflow's versions carry row numbers that the ledger does not reach: it was cut."""
        rows = self.ledger.entries()
        with _reachable(self.tracking_uri):
            versions = _versions(self._client(), model)
        told = [int(v.tags[tag]) for v in versions for tag in (_SEQ_TAG, _CHAMPION_TAG) if v.tags.get(tag, "").isdigit()]
        if told and max(told) > len(rows):
            raise RegistryUnavailable(
                f"the ledger ends at row {len(rows)}, but MLflow knows of row {max(told)} of {model!r}: it "
                f"was cut, or it is another one. Set VISIONLOOP_LEDGER_URL to the right one, or restore a backup "
                f"(`visionloop restore`)"
            )

    def fetch_engine(self, model: str, entry: Entry, *, out: Path) -> Stored[Engine]:
        """The serving engine of the version that a ledger row names, verified against the ledger's digest, in `out`."""
        return self.fetch_champion(model, entry, out=out).engine

    def fetch_champion(self, model: str, entry: Entry, *, out: Path) -> CurrentChampion:
        """The version that a ledger row names, verified against the ledger's digest, its engine in `out`."""
        with self._registered(model, entry.body["version"]) as (local, manifest):
            name = manifest["serving_engine"]
            record = Engine.read(json.loads((local / "evidence" / f"{name}.engine.json").read_text()))
            dataset = Dataset.read(json.loads((local / "evidence" / "dataset.json").read_text()))
            engine = _copied(Stored(record, local / "engines" / name), record.files, out / name)
            return CurrentChampion(str(entry.body["version"]), engine, dataset.data, _test_labels(local / "evidence"))

    def fetch_checkpoint(self, model: str, version: str, *, out: Path) -> tuple[Stored[Checkpoint], DataVersion]:
        """The weights of a version, verified against the ledger's digest, in `out`, and the data they were trained on."""
        with self._registered(model, version) as (local, _):
            evidence, files = local / "evidence", local / "checkpoint"
            record = Checkpoint.read(json.loads((evidence / "checkpoint.json").read_text()))
            dataset = Dataset.read(json.loads((evidence / "dataset.json").read_text()))
            return _copied(Stored(record, files), (record.weights,), out), dataset.data

    @contextmanager
    def _registered(self, model: str, version: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """A version's bundle by the ledger's digest, not by a tag of MLflow's: who can edit the files can edit tags."""
        rows = [e for e in self.ledger.entries(model) if e.kind == "requested" and e.body["version"] == version]
        if not rows:
            raise TamperedArtefact(f"version {version} of {model} was promoted but never requested")
        with self.bundle(model, version, rows[-1].body["manifest_sha256"]) as found:
            yield found

    @contextmanager
    def bundle(self, model: str, version: str, manifest_sha256: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """A verified copy of a version's files, and their manifest, for as long as the context lasts."""
        # MLflow copies in threads, which may still write when a failure is on its way out.
        with tempfile.TemporaryDirectory(prefix="visionloop-bundle-", ignore_cleanup_errors=True) as scratch:
            location = self._location(model, version)
            with _reachable(self.tracking_uri):
                local = self._download(f"models:/{model}/{version}", Path(scratch))
            yield local, verify_bundle(local, manifest_sha256, kept_in=location)

    def fetch_evidence(self, model: str, version: str, manifest_sha256: str, *, out: Path) -> None:
        """The manifest of a version and its evidence in the folder `out`, verified; without weights and engines.

        Raises StoreError for what is not there, and TamperedArtefact for bytes that changed.
        """
        with tempfile.TemporaryDirectory(prefix="visionloop-evidence-", ignore_cleanup_errors=True) as scratch:
            location = self._location(model, version)
            with _reachable(self.tracking_uri):
                for name in (MANIFEST, EVIDENCE):
                    self._download(f"models:/{model}/{version}/{name}", Path(scratch))
            local = Path(scratch)
            verify_bundle(local, manifest_sha256, kept_in=location, within=f"{EVIDENCE}/")
            shutil.copytree(local / EVIDENCE, out / EVIDENCE)
            shutil.copyfile(local / MANIFEST, out / MANIFEST)

    def _location(self, model: str, version: str) -> str:
        """Where MLflow keeps the files of a version; raises StoreError where that is a folder that is not there."""
        with _reachable(self.tracking_uri):
            location = str(self._client().get_model_version_download_uri(model, version))
        folder = tracking.folder_of(location)
        if folder is not None and not folder.is_dir():
            # Asked for what is not there, MLflow would make the folder.
            raise StoreError(_away(folder, f"the files of version {version} of {model}"))
        return str(folder or location)

    def _download(self, uri: str, out: Path) -> Path:
        import mlflow.artifacts

        return Path(
            mlflow.artifacts.download_artifacts(
                uri, dst_path=str(out), tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri
            )
        )

    def alias(self, model: str) -> str | None:
        """The version that MLflow's alias `champion` names, None when it names none."""
        from mlflow.exceptions import MlflowException

        with _reachable(self.tracking_uri):
            mlflow = self._client()
            try:
                return str(mlflow.get_model_version_by_alias(model, CHAMPION).version)
            except MlflowException as error:
                # A missing alias is INVALID_PARAMETER_VALUE here, a missing model RESOURCE_DOES_NOT_EXIST.
                if error.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
                    return None
                raise

    def descriptions(self, model: str) -> dict[str, str]:
        """What MLflow says of each version."""
        with _reachable(self.tracking_uri):
            return {str(v.version): str(v.description or "") for v in _versions(self._client(), model)}

    def describe(self, model: str, version: str, text: str) -> None:
        """Let MLflow say this of a version."""
        with _reachable(self.tracking_uri):
            self._client().update_model_version(model, version, description=text)

    def point_alias(self, model: str, entry: Entry) -> None:
        """Let MLflow's alias `champion` say what the ledger's row says."""
        with _reachable(self.tracking_uri):
            mlflow = self._client()
            mlflow.set_registered_model_alias(model, CHAMPION, entry.body["version"])
            mlflow.set_model_version_tag(model, entry.body["version"], _CHAMPION_TAG, str(entry.seq))


def _test_labels(evidence: Path) -> dict[str, str]:
    table = evidence / "splits.parquet"
    if not table.is_file():
        return {}
    frame = read_frame(table, ["picture", "label", "split"])
    frame = frame[frame["split"] == "test"]
    return dict(zip(frame["picture"], frame["label"], strict=True))


def _copied(stored: Stored[RecordT], files: Sequence[FileDigest], out: Path) -> Stored[RecordT]:
    """The files of a record in a folder of their own, in place of what it held."""
    if out.exists():
        shutil.rmtree(out)
    shutil.copytree(stored.folder, out)
    for file in files:
        if sha256_file(out / file.name) != file.sha256:
            raise TamperedArtefact(f"{out / file.name} differs from what was registered; it was not loaded")
    return Stored(stored.record, out)


CHAMPION_CORRUPTED = "champion_corrupted"
"""What the champion answered on corrupted images, in what is bound and among the evidence.

Versions from before it was bound keep it as champion.robustness.json, which is read by nobody: what they are bound to stays.
"""
_FURTHER: Mapping[str, type[Record]] = {
    "slices": SliceTable,
    "shown": CandidateEvidence,
    CHAMPION_CORRUPTED: Robustness,
}
"""Evidence that not every version has: older ones do not."""


def bound_in(folder: Path) -> dict[str, Any]:
    """What a candidate's files are, digest by digest, read from a verified bundle.

    The counterpart of `CandidateBundle.bound`.
    """
    evidence = folder / "evidence"

    def read(name: str, record: type[RecordT]) -> RecordT:
        return record.read(json.loads((evidence / f"{name}.json").read_text()))

    verdict = read("verdict", Verdict)
    engines = {path.name.removesuffix(".engine.json"): path for path in sorted(evidence.glob("*.engine.json"))}
    records = {name: Engine.read(json.loads(path.read_text())) for name, path in engines.items()}
    for name, record in records.items():
        for file in record.files:
            if sha256_file(folder / "engines" / name / file.name) != file.sha256:
                raise TamperedArtefact(f"{file.name} of engine {name} is not the file that was judged")
    champion = evidence / "champion.evaluation.json"
    there = {name: record for name, record in _FURTHER.items() if (evidence / f"{name}.json").is_file()}
    corrupted = {
        name: read(f"{name}.robustness", Robustness).digest()
        for name in records
        if (evidence / f"{name}.robustness.json").is_file()
    }
    # Of what passes cost: its milliseconds are another minute's on another day.
    unoptimised = read("passes_cost", PassesCost).before_digest if (evidence / "passes_cost.json").is_file() else ""
    return {
        **({"corrupted": corrupted} if corrupted else {}),
        **({"unoptimised": unoptimised} if unoptimised else {}),
        **{name: read(name, record).digest() for name, record in there.items()},
        "data": read("dataset", Dataset).data.digest(),
        "split": read("splits", Splits).test_digest,
        "weights": sha256_file(folder / "checkpoint" / "weights.safetensors"),
        "engines": {name: record.digest() for name, record in records.items()},
        "serving": verdict.serving_engine,
        "policy": verdict.policy_digest,
        "evidence": {
            name: read(f"{name}.evaluation", Evaluation).digest()
            for name in records
            if (evidence / f"{name}.evaluation.json").exists()
        },
        "verdict": verdict.status,
        "release": read("release", Release).digest() if (evidence / "release.json").exists() else "none",
        "champion": Evaluation.read(json.loads(champion.read_text())).engine_digest if champion.exists() else "none",
    }


def release_in(folder: Path, *, out: Path) -> Stored[Release]:
    """The release of a verified bundle, laid out as it is published."""
    record = Release.read(json.loads((folder / "evidence" / "release.json").read_text()))
    sources = {f"engine/{file.name}": f"engines/{record.engine.name}/{file.name}" for file in record.engine.files}
    for file in record.files:
        copy = out / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / sources.get(file.name, f"release/{file.name}"), copy)
    return Stored(record, out)


def verify_bundle(folder: Path, manifest_sha256: str, *, kept_in: str = "", within: str = "") -> dict[str, Any]:
    """The candidate's manifest once every file of the bundle, downloaded from `kept_in`, matches it.

    With `within`, only the files whose names begin so are there to be looked at.

    Raises StoreError for what is not there, and TamperedArtefact for bytes that changed.
    """
    kept_in = kept_in or str(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(_away(kept_in, MANIFEST))
    body = unseal(path.read_bytes())
    if body is None or sha256_file(path) != manifest_sha256:
        raise TamperedArtefact(
            f"{MANIFEST} in {kept_in} is not the manifest that was registered (sha256 {manifest_sha256[:12]}): it was "
            f"changed afterwards. Nothing was loaded from it; bring the registered files back from a backup "
            f"(`visionloop restore`), or train anew"
        )
    for entry in body["files"]:
        if not entry["name"].startswith(within):
            continue
        file = folder / entry["name"]
        if not file.is_file():
            raise StoreError(_away(kept_in, entry["name"]))
        if sha256_file(file) != entry["sha256"]:
            raise TamperedArtefact(
                f"{entry['name']} in {kept_in} differs from what was registered: it was changed afterwards; nothing was "
                f"loaded from it"
            )
    return body


def _away(place: Path | str, what: str) -> str:
    return (
        f"{what}: not in {place}, where MLflow keeps it. It is away, which is not to say that it was changed. Bring it back "
        f"(a disk that is not mounted, a folder left behind by a move, or a backup made with --with-artefacts), and run the "
        f"same command again"
    )


def _versions(mlflow: MlflowClient, model: str) -> list[ModelVersion]:
    return list(mlflow.search_model_versions(f"name='{model}'"))


def described(states: Sequence[State], entries: Sequence[Entry]) -> dict[str, str]:
    """What MLflow says of each version, by its number: a projection of the ledger's rows; time alone changes none of it."""
    moves = [entry for entry in entries if entry.kind in ("promoted", "rolled_back")]
    last_move = {entry.body["version"]: number for number, entry in enumerate(moves)}
    # The gates that were ever excepted: an exception that has run out changes no description.
    excepted: dict[int, set[str]] = {}
    for entry in entries:
        if entry.kind == "excepted":
            excepted.setdefault(entry.body["requested_seq"], set()).update(entry.body["gates"])
    found = {}
    for state in states:
        body, decision, served = state.requested.body, state.decision, last_move.get(state.version)
        if served is not None and served == len(moves) - 1:
            standing = f"Champion since {moves[served].at[:16]} UTC"
        elif served is not None:
            standing = f"Former champion, until {moves[served + 1].at[:16]} UTC"
        elif decision is not None and decision.kind == "rejected":
            standing = f"Rejected by {decision.actor.name}"
        elif decision is not None:
            standing = f"Approved by {decision.actor.name} until {decision.body['expires_at'][:16]} UTC, not promoted"
        else:
            known = excepted.get(state.requested.seq, set())
            standing = _waiting(tuple(gate for gate in state.undecided if gate not in known))
        found[state.version] = _description(body["status"], body.get("bound", {}).get("serving", "unknown"), standing)
    return found


def _waiting(undecided: Sequence[str]) -> str:
    return f"Undecided: waits for an exception for {', '.join(undecided)}" if undecided else "Waits for approval"


def _description(verdict: str, engine: str, standing: str) -> str:
    return f"Verdict: {verdict}. Serving engine: {engine}. {standing}; see report.html and model-card.md."


def _run_of_candidate(mlflow: MlflowClient, experiment: str, evidence: CandidateBundle) -> str:
    """The training's run for its first candidate; a run of its own for each further one, which names the training's.

    It stands beside that one: below it, a version would seem to be part of what may have been rejected.
    """
    training = tracking.run_of_training(mlflow, experiment, evidence.training_key, evidence.tags)
    owner = mlflow.get_run(training).data.tags.get(_CANDIDATE_TAG)
    if owner is None:
        mlflow.set_tag(training, _CANDIDATE_TAG, evidence.candidate_digest)
    if owner in (None, evidence.candidate_digest):
        return training
    found = mlflow.search_runs([experiment], f"tags.`{_CANDIDATE_TAG}` = '{evidence.candidate_digest}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    tags = {**evidence.tags, _CANDIDATE_TAG: evidence.candidate_digest, _TRAINED_IN_TAG: training}
    return str(mlflow.create_run(experiment, run_name=evidence.tags.get("visionloop.run"), tags=tags).info.run_id)


def _logged_model(
    mlflow: MlflowClient, evidence: CandidateBundle, experiment: str, run_id: str, bundle: Path, manifest_sha256: str
) -> str:
    """Upload the bundle as a logged model and prove it by reading it back; an earlier, complete upload is reused."""
    import mlflow.artifacts as artifacts

    for model in mlflow.search_logged_models(
        [experiment], filter_string=f"tags.`{_CANDIDATE_TAG}` = '{evidence.candidate_digest}'"
    ):
        if str(model.status).endswith("READY") and model.tags.get(_MANIFEST_TAG) == manifest_sha256:
            return str(model.model_id)
    created = mlflow.create_logged_model(
        experiment,
        name=evidence.model,
        source_run_id=run_id,
        tags={**evidence.tags, _CANDIDATE_TAG: evidence.candidate_digest, _MANIFEST_TAG: manifest_sha256},
        params=dict(evidence.params),
        model_type="image-classifier",
    )
    mlflow.log_model_artifacts(created.model_id, str(bundle))
    from mlflow.entities import LoggedModelStatus

    with tempfile.TemporaryDirectory(prefix="visionloop-readback-") as scratch:
        local = Path(
            artifacts.download_artifacts(created.artifact_location, dst_path=scratch, tracking_uri=mlflow.tracking_uri)
        )
        location = str(created.artifact_location)
        verify_bundle(local, manifest_sha256, kept_in=str(tracking.folder_of(location) or location))
    mlflow.finalize_logged_model(created.model_id, LoggedModelStatus.READY)
    return str(created.model_id)


def _show_at_run(mlflow: MlflowClient, run_id: str, model_id: str, evidence: CandidateBundle) -> None:
    """Let the run that a version's page links to show the model among its outputs, and what a person reads of it."""
    from mlflow.entities import LoggedModelOutput

    outputs = mlflow.get_run(run_id).outputs
    if model_id not in [one.model_id for one in (outputs.model_outputs if outputs else ())]:
        mlflow.log_outputs(run_id, models=[LoggedModelOutput(model_id, step=0)])
    with tempfile.TemporaryDirectory(prefix="visionloop-register-") as scratch:
        # By their names in the version: where a file lies on this machine, it may be called otherwise.
        for name in _TO_READ:
            if name in evidence.files:
                shutil.copyfile(evidence.files[name], Path(scratch) / name)
        mlflow.log_artifacts(run_id, scratch)


def _bundle(evidence: CandidateBundle, folder: Path, *, flavour_of: tuple[str, int] | None = None) -> str:
    """Lay a candidate's files out, seal their manifest and return its sha256.

    With `flavour_of`, the id of its run and when that began, they become a model that MLflow's tools load.
    """
    for name, source in evidence.files.items():
        destination = folder / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, destination)
    if flavour_of is not None:
        run_id, started = flavour_of
        flavour.add(folder, candidate=evidence.candidate_digest, run_id=run_id, created_ms=started)
    files = [describe(path, within=folder).to_json() for path in sorted(folder.rglob("*")) if path.is_file()]
    body = {
        "candidate": evidence.candidate_digest,
        "model": evidence.model,
        "serving_engine": evidence.verdict.serving_engine,
        "bound": dict(evidence.bound),
        "files": files,
    }
    (folder / MANIFEST).write_bytes(seal(body))
    return sha256_file(folder / MANIFEST)


def _describe_run(mlflow: MlflowClient, run_id: str, evidence: CandidateBundle) -> None:
    from mlflow.entities import Metric, Param, RunTag

    known = set(mlflow.get_run(run_id).data.params)
    mlflow.log_batch(
        run_id,
        metrics=[Metric(name, value, 0, 0) for name, value in evidence.metrics.items()],
        params=[Param(name, value[:500]) for name, value in evidence.params.items() if name not in known],
        tags=[
            RunTag(name, value)
            for name, value in {
                **evidence.tags,
                "visionloop.verdict": evidence.verdict.status,
                "visionloop.reasons": "; ".join(evidence.verdict.reasons)[:4000],
            }.items()
        ],
    )


def _key(model: str, candidate_digest: str) -> str:
    return f"registration:{model}:{candidate_digest}"


def _outcome(entry: Entry) -> Outcome:
    common: dict[str, Any] = {
        "model": entry.model,
        "candidate_digest": entry.subject,
        "mlflow_run_id": entry.body["mlflow_run_id"],
        "ledger_seq": entry.seq,
    }
    if entry.kind == "requested":
        version, gates = str(entry.body["version"]), tuple(entry.body.get("undecided", ()))
        if gates:
            return Undecided(version=version, gates=gates, reasons=tuple(entry.body["reasons"]), **common)
        return Candidate(version=version, **common)
    return Rejection(status=entry.body["status"], reasons=tuple(entry.body["reasons"]), **common)


def _of_this_machine(error: BaseException) -> OSError | None:
    """The full disk or missing permission that a client's error came from: MLflow is there, and the remedy is here."""
    return next((link for link in causes(error) if isinstance(link, OSError) and link.errno in _LOCAL), None)


@contextmanager
def _reachable(tracking_uri: str) -> Iterator[None]:
    """Turn whatever MLflow and its transports raise into one error that says what to do."""
    try:
        yield
    except VisionloopError:
        raise
    except Exception as error:
        local = _of_this_machine(error)
        if local is not None:
            raise local from error
        # MlflowException, requests and SQLAlchemy errors, botocore's: they share no base class.
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RegistryUnavailable(
            redacted(f"MLflow at {tracking_uri} did not do what was asked: {first}")
            + ". Every stage before it is kept; bring MLflow back and run the same command again, it goes on from there"
        ) from error
