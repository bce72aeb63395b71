from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow.artifacts
import mlflow.data
import pytest
from bundles import HISTORY, evidence
from mlflow import MlflowClient

from components.contracts.errors import RegistryUnavailable, StoreError, TamperedArtefact
from components.contracts.verdicts import Candidate, Rejection, Robustness
from components.store import sha256_file
from registry import models, tracking
from registry.ledger import Ledger
from registry.models import Registry, bound_in, verify_bundle
from registry.tracking import LiveMetrics


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    # One MLflow database for the module: creating its tables takes longer than every test here.
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def registry(uri: str, tmp_path: Path) -> Registry:
    return Registry(uri, Ledger(f"sqlite:///{tmp_path / 'ledger.db'}"), artifacts=tmp_path / "artifacts")


def versions(uri: str, model: str) -> list[Any]:
    return list(MlflowClient(uri).search_model_versions(f"name='{model}'"))


def runs_of(uri: str, model: str) -> list[Any]:
    experiment = MlflowClient(uri).get_experiment_by_name(model)
    assert experiment is not None
    return list(MlflowClient(uri).search_runs([experiment.experiment_id]))


def test_a_candidate_becomes_one_version_and_one_ledger_row(registry: Registry, uri: str, tmp_path: Path) -> None:
    given = evidence(tmp_path, "one")
    first = registry.register(given)
    assert isinstance(first, Candidate)
    assert registry.register(given) == first
    assert registry.recorded("one", given.candidate_digest) == first
    (version,) = versions(uri, "one")
    assert version.tags["visionloop.data"] == "v"
    (entry,) = registry.ledger.entries()
    assert (entry.kind, entry.actor.method, entry.body["version"]) == ("requested", "machine", first.version)
    run = MlflowClient(uri).get_run(first.mlflow_run_id)
    assert run.data.params["training.fit.epochs"] == "3"
    assert len(MlflowClient(uri).get_metric_history(first.mlflow_run_id, "training.valid_loss")) == 3


def test_what_is_registered_is_what_was_given(registry: Registry, uri: str, tmp_path: Path) -> None:
    candidate = registry.register(evidence(tmp_path, "bytes"))
    assert isinstance(candidate, Candidate)
    (version,) = versions(uri, "bytes")
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/bytes/{candidate.version}", tracking_uri=uri))
    assert (folder / "checkpoint" / "weights.safetensors").read_bytes() == b"weights of d1"
    manifest = verify_bundle(folder, version.tags["visionloop.manifest_sha256"])
    assert manifest["bound"]["weights"] == sha256_file(folder / "checkpoint" / "weights.safetensors")
    weights = folder / "checkpoint" / "weights.safetensors"
    weights.write_bytes(b"weights of d2")
    with pytest.raises(TamperedArtefact, match="nothing was loaded"):
        verify_bundle(folder, version.tags["visionloop.manifest_sha256"])
    with pytest.raises(TamperedArtefact, match="not the manifest that was registered"):
        verify_bundle(folder, "0" * 64)


def test_what_the_champion_answered_on_corrupted_images_is_bound_where_it_was_when_it_was_registered(
    registry: Registry, tmp_path: Path
) -> None:
    given = evidence(tmp_path, "corrupted")
    folder = given.files["evidence/verdict.json"].parents[1]
    answered = Robustness(engine="e", engine_digest="0" * 64, test_digest="t" * 64, status="not comparable")
    text = json.dumps(answered.to_json())
    (folder / "evidence" / "champion.robustness.json").write_text(text)  # as versions from before have it
    assert bound_in(folder) == given.bound
    place = folder / "evidence" / "champion_corrupted.json"
    place.write_text(text)
    bound = {**given.bound, "champion_corrupted": answered.digest()}
    assert bound_in(folder) == bound
    place.write_text(json.dumps(answered.model_copy(update={"reason": "another"}).to_json()))
    changed = dataclasses.replace(given, files={**given.files, "evidence/champion_corrupted.json": place}, bound=bound)
    with pytest.raises(TamperedArtefact, match=r"not what was judged \(champion_corrupted\)"):
        registry.register(changed)


def test_files_that_are_away_are_not_called_changed(registry: Registry, tmp_path: Path) -> None:
    candidate = registry.register(evidence(tmp_path, "away"))
    assert isinstance(candidate, Candidate)
    digest = registry.ledger.entries()[-1].body["manifest_sha256"]
    place = tmp_path / "artifacts" / "away"

    def opened() -> None:
        with registry.bundle("away", candidate.version, digest):
            pass

    (report,) = place.glob("models/*/artifacts/report.html")
    for victim in (report, next(place.rglob("candidate.json")), place):
        victim.rename(tmp_path / "elsewhere")
        with pytest.raises(StoreError, match=f"not in {place}.*away.*[Bb]ring") as told:
            opened()
        assert not isinstance(told.value, TamperedArtefact)
        assert not victim.exists()  # nor made again, empty
        (tmp_path / "elsewhere").rename(victim)
    report.write_text("changed")
    with pytest.raises(TamperedArtefact, match=f"report.html in {place}.*was changed afterwards"):
        opened()


def test_tables_that_cannot_be_written_are_not_read_for_another_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, here = tmp_path / "mlflow.db", tmp_path / "mlflow-artifacts"
    with contextlib.closing(sqlite3.connect(database)) as tables:
        tables.execute("CREATE TABLE experiments (name, artifact_location)")
        rows = [("m", "file:///old%20place/mlflow-artifacts/m"), ("Default", "/old place/mlruns/0"), ("mine", "s3://b/mine")]
        tables.executemany("INSERT INTO experiments VALUES (?, ?)", [*rows, ("else", "file:///old/data/else")])
        tables.commit()

    def locations() -> list[str]:
        with contextlib.closing(sqlite3.connect(database)) as tables:
            return [row[0] for row in tables.execute("SELECT artifact_location FROM experiments")]

    before = locations()
    uri = f"sqlite:///{database}"
    with monkeypatch.context() as patched:

        def refused(*_: Any) -> int:
            raise sqlite3.OperationalError("attempt to write a readonly database")

        patched.setattr(tracking, "_rename", refused)
        with pytest.raises(RegistryUnavailable, match="name /old place.*readonly.*make the file"):
            tracking.settle(uri, here)
    assert locations() == before
    assert tracking.settle(uri, tmp_path / "elsewhere" / "mlflow-artifacts") == ""  # tables of somebody else
    told = tracking.settle(uri, here)
    assert told.startswith("this workspace lay in /old place before")
    assert locations() == [f"{here.as_uri()}/m", f"{tmp_path}/mlruns/0", "s3://b/mine", "file:///old/data/else"]
    assert tracking.settle(uri, here) == ""


_WHERE = {
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("trace_tags", "value"),
}


@pytest.mark.parametrize(
    ("here", "before", "after"),
    [
        ("new/w", "file://{root}/old/w/mlflow-artifacts/{name}", "file://{root}/new/w/mlflow-artifacts/{name}"),
        ("new/w", "{root}/old/w/mlflow-artifacts/{name}", "{root}/new/w/mlflow-artifacts/{name}"),
        # Two places, of which one lies in the other.
        ("new/w", "file://{root}/old/w/{name}/mlflow-artifacts/{name}", "file://{root}/new/w/mlflow-artifacts/{name}"),
        # Into a folder of the place where it was; what names that already stays.
        ("old/w/in", "file://{root}/old/w/in/mlflow-artifacts/{name}", "file://{root}/old/w/in/mlflow-artifacts/{name}"),
        # The same folder by another path.
        ("real", "file://{root}/link/mlflow-artifacts/{name}", "file://{root}/link/mlflow-artifacts/{name}"),
    ],
)
def test_every_location_in_the_tables_names_the_place_where_the_workspace_is(
    tmp_path: Path, here: str, before: str, after: str
) -> None:
    root = tmp_path / here
    (root / "mlflow-artifacts").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    uri = f"sqlite:///{root / 'mlflow.db'}"
    columns: dict[str, list[str]] = {}
    for table, column in sorted(_WHERE):
        columns.setdefault(table, []).append(column)
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as tables:
        for table, of in columns.items():
            tables.execute(f"CREATE TABLE {table} (name, {', '.join(of)})")
            location = before.format(root=tmp_path, name="b")
            tables.execute(f"INSERT INTO {table} VALUES ('b', {', '.join('?' * len(of))})", [location] * len(of))
        if "link" not in before:
            old = f"file://{tmp_path}/old/w/mlflow-artifacts/a"
            tables.execute("INSERT INTO experiments VALUES ('a', ?)", [old])
        tables.commit()
    assert bool(tracking.settle(uri, root / "mlflow-artifacts")) == ("link" not in before)
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as tables:
        for table, column in _WHERE:
            found = tables.execute(f"SELECT {column} FROM {table} WHERE name = 'b'").fetchone()[0]
            assert found == after.format(root=tmp_path, name="b"), (table, column)
        of_a = [row[0] for row in tables.execute("SELECT artifact_location FROM experiments WHERE name = 'a'")]
    assert of_a == ([f"file://{root}/mlflow-artifacts/a"] if "link" not in before else [])


def test_a_rejection_is_recorded_with_its_reasons(registry: Registry, uri: str, tmp_path: Path) -> None:
    given = evidence(tmp_path, "bad", status="fail")
    first = registry.register(given)
    assert isinstance(first, Rejection)
    assert first.reasons == ("accuracy too low",)
    assert registry.register(given) == first
    assert versions(uri, "bad") == []
    (entry,) = registry.ledger.entries()
    assert entry.kind == "rejected"
    client = MlflowClient(uri)
    assert client.get_run(first.mlflow_run_id).data.tags["visionloop.reasons"] == "accuracy too low"
    assert {f.path for f in client.list_artifacts(first.mlflow_run_id, "rejection")} >= {"rejection/report.html"}


@pytest.mark.parametrize(
    "victim",
    [
        "_describe_run",
        "log_inputs",
        "_bundle",
        "_logged_model",
        "_show_at_run",
        "verify_bundle",
        "create_registered_model",
        "create_model_version",
        "append",
    ],
)
def test_a_run_that_dies_at_any_step_and_runs_again_registers_once(
    registry: Registry, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    class Died(BaseException):
        pass

    clients = dict.fromkeys(("log_inputs", "create_registered_model", "create_model_version"), MlflowClient)
    owner: Any = {"append": Ledger, **clients}.get(victim, models)
    real = getattr(owner, victim)
    for after in (False, True):
        given = evidence(tmp_path, f"die-{victim.strip('_').replace('_', '-')}-{after}".lower())

        def dying(*args: Any, _after: bool = after, **kwargs: Any) -> Any:
            if _after:
                real(*args, **kwargs)
            raise Died

        with monkeypatch.context() as patched:
            patched.setattr(owner, victim, dying)
            with pytest.raises(Died):
                registry.register(given)
        outcome = registry.register(given)
        assert isinstance(outcome, Candidate)
        (version,) = versions(uri, given.model)
        assert str(version.version) == outcome.version == "1"
        assert len(registry.ledger.entries(given.model)) == 1
        (run,) = runs_of(uri, given.model)
        assert [f"models:/{output.model_id}" for output in run.outputs.model_outputs] == [version.source]
        told = {used.tags[0].value: used.dataset for used in run.inputs.dataset_inputs}
        assert {split: dataset.digest for split, dataset in told.items()} == {"train": "d1-train", "test": "t" * 36}
        assert json.loads(told["test"].profile) == {"num_rows": 4, "class_counts": {"cat": 2, "dog": 2}}
        assert mlflow.data.get_source(told["train"]).to_dict() == {"tags": {"visionloop.data": "d1.dir"}}


def test_mlflow_down_is_said_clearly_and_records_nothing(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    registry = Registry("http://127.0.0.1:9", ledger, artifacts=None)
    with pytest.raises(
        RegistryUnavailable, match="MLflow at http://127.0.0.1:9 did not do what was asked.*run the same command again"
    ):
        registry.register(evidence(tmp_path, "down"))
    assert ledger.entries() == []


def test_live_curves_arrive_and_a_dead_server_only_costs_a_note(uri: str, tmp_path: Path) -> None:
    def sink(address: str, key: str) -> LiveMetrics:
        return LiveMetrics(address, "live", key, artifacts=tmp_path, tags={"visionloop.run": "r"})

    def feed(live: LiveMetrics, rows: list[Mapping[str, float]]) -> None:
        for row in rows:
            live.log(int(row["epoch"]), row)
        live.close()

    live = sink(uri, "k1")
    feed(live, list(HISTORY))
    assert live.problem is None
    client = MlflowClient(uri)
    (run,) = runs_of(uri, "live")
    assert [m.step for m in client.get_metric_history(run.info.run_id, "training.train_loss")] == [1, 2, 3]
    dead = sink("http://127.0.0.1:9", "k2")
    feed(dead, list(HISTORY[:1]))
    assert dead.problem


def test_each_candidate_of_one_training_keeps_its_own_evidence(registry: Registry, uri: str, tmp_path: Path) -> None:
    import dataclasses

    first = dataclasses.replace(evidence(tmp_path, "shared", status="fail", digest="a"), training_key="same")
    one = registry.register(first)
    second = dataclasses.replace(evidence(tmp_path, "shared", status="fail", digest="b"), training_key="same")
    two = registry.register(second)
    passed = registry.register(dataclasses.replace(evidence(tmp_path, "shared", digest="c"), training_key="same"))
    assert one.mlflow_run_id != two.mlflow_run_id
    client = MlflowClient(uri)
    # Beside the run of the training, which a rejection may have: a version below that one would seem rejected itself.
    assert passed.mlflow_run_id not in (one.mlflow_run_id, two.mlflow_run_id)
    for other in (two, passed):
        tags = client.get_run(other.mlflow_run_id).data.tags
        assert ("mlflow.parentRunId" in tags, tags["visionloop.trained_in"]) == (False, one.mlflow_run_id)
    for outcome, entry in zip((one, two), registry.ledger.entries("shared")[:2], strict=True):
        folder = Path(client.download_artifacts(outcome.mlflow_run_id, "rejection"))
        assert verify_bundle(folder, entry.body["manifest_sha256"])["candidate"] == outcome.candidate_digest


def test_a_version_that_an_earlier_run_left_keeps_its_own_manifest(
    registry: Registry, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the ledger was told, and the evidence reads differently the second time (another git commit)."""
    import dataclasses

    class Died(BaseException):
        pass

    def dying(*_: Any, **__: Any) -> None:
        raise Died

    given = evidence(tmp_path, "left")
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "append", dying)
        with pytest.raises(Died):
            registry.register(given)
    other = tmp_path / "other.html"
    other.write_text("another report")
    registry.register(dataclasses.replace(given, files={**given.files, "report.html": other}))
    (version,) = versions(uri, "left")
    (entry,) = registry.ledger.entries("left")
    assert entry.body["manifest_sha256"] == version.tags["visionloop.manifest_sha256"]


def test_a_lost_ledger_is_no_proof_that_there_was_no_champion(registry: Registry, uri: str, tmp_path: Path) -> None:
    assert registry.champion("lost") is None
    registry.register(evidence(tmp_path, "lost"))
    assert registry.champion("lost") is None
    fresh = Registry(uri, Ledger(f"sqlite:///{tmp_path / 'fresh.db'}"), artifacts=tmp_path)
    with pytest.raises(RegistryUnavailable, match="A lost ledger proves nothing.*VISIONLOOP_LEDGER_URL"):
        fresh.champion("lost")


def test_a_number_that_mlflow_gives_again_is_refused(registry: Registry, uri: str, tmp_path: Path) -> None:
    registry.register(evidence(tmp_path, "again", digest="a"))
    MlflowClient(uri).delete_registered_model("again")
    for _ in range(2):
        with pytest.raises(RegistryUnavailable, match="version 1 of 'again', but the ledger's row 1 requested another one"):
            registry.register(evidence(tmp_path, "again", digest="b"))
    assert [entry.subject for entry in registry.ledger.entries("again")] == [
        evidence(tmp_path, "again", digest="a").candidate_digest
    ]


def test_two_that_register_one_candidate_at_once_get_one_row(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = evidence(tmp_path, "twins")
    first = registry.register(given)
    monkeypatch.setattr(registry, "recorded", lambda *_: None)  # the other asked before the first had told the ledger
    assert registry.register(given) == first
    assert len(registry.ledger.entries("twins")) == 1


def test_a_champion_whose_files_and_tags_were_both_changed_is_refused(registry: Registry, uri: str, tmp_path: Path) -> None:
    """Whoever can edit MLflow can edit tags as well; the ledger's digest decides."""
    from components.store import seal, sha256_file, unseal

    registry.register(evidence(tmp_path, "swapped"))
    (entry,) = registry.ledger.entries("swapped")
    promoted = registry.ledger.append(
        "promoted", model="swapped", subject=entry.subject, actor=entry.actor, body={"version": "1"}, key="swapped-promotion"
    )
    stored = Path(mlflow.artifacts.download_artifacts("models:/swapped/1", tracking_uri=uri))
    body = unseal((stored / models.MANIFEST).read_bytes())
    assert body is not None
    (stored / models.MANIFEST).write_bytes(seal({**body, "serving_engine": "weak"}))
    tag = sha256_file(stored / models.MANIFEST)
    MlflowClient(uri).set_model_version_tag("swapped", "1", "visionloop.manifest_sha256", tag)
    with pytest.raises(TamperedArtefact, match="not the manifest that was registered"):
        registry.fetch_engine("swapped", promoted, out=tmp_path / "out")
