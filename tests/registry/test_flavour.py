"""What MLflow's own tools make of a registered version: its schema, its example, its answers, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from bundles import evidence
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from safetensors.numpy import load_file
from served import png, unpacked
from stores import fresh_database, s3_bucket

import components
from components import plugins
from components.contracts.releases import Release
from components.contracts.verdicts import Candidate
from components.store import seal, unseal
from registry import tracking
from registry.ledger import Ledger
from registry.models import MANIFEST, Registry, bound_in

MODEL = "shapes"


def model_of(version: Any) -> str:
    """The id of the logged model of a version: MLflow tells it in the source alone."""
    return str(version.source).removeprefix("models:/")


@dataclass(frozen=True)
class Registered:
    """A model whose version 1 is champion."""

    uri: str
    folder: Path
    """The files of version 1 as MLflow keeps them; copy them, never change them."""


def version_in(older: Path) -> Path:
    """The files of the one version of an older workspace."""
    (found,) = (older / ".visionloop" / "mlflow-artifacts").glob(f"*/models/*/artifacts/{MANIFEST}")
    return found.parent


def register(folder: Path, place: Path, uri: str, *, artifacts: Path | None) -> str:
    """Register the files that a training of an older commit made, without what MLflow's tools need, as a training does now."""
    manifest = unseal((folder / MANIFEST).read_bytes())
    assert manifest is not None
    files = {file["name"]: folder / file["name"] for file in manifest["files"]}
    assert "MLmodel" not in files
    given = dataclasses.replace(evidence(place, MODEL), files=files, bound=bound_in(folder))
    registry = Registry(uri, Ledger(f"sqlite:///{place / 'ledger.db'}"), artifacts=artifacts)
    outcome = registry.register(given)
    assert isinstance(outcome, Candidate)
    registry.point_alias(MODEL, registry.ledger.entries()[-1])
    version = MlflowClient(uri).get_model_version_by_alias(MODEL, "champion")
    return str(MlflowClient(uri).get_logged_model(model_of(version)).artifact_location)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(tmp_path_factory.mktemp("older"))


@pytest.fixture(scope="module")
def champion(older: Path, tmp_path_factory: pytest.TempPathFactory) -> Registered:
    place = tmp_path_factory.mktemp("registered")
    uri = f"sqlite:///{place / 'mlflow.db'}"
    folder = tracking.folder_of(register(version_in(older), place, uri, artifacts=place / "artifacts"))
    assert folder is not None
    return Registered(uri, folder)


@pytest.fixture
def registered(champion: Registered) -> Path:
    return champion.folder


@pytest.fixture
def uri(champion: Registered) -> str:
    tracking.client(champion.uri)
    return champion.uri


def pictures_and_answers(folder: Path) -> tuple[list[bytes], Any]:
    """The golden pictures of a version, encoded, and the probabilities that every server answers."""
    golden = load_file(folder / "release" / "golden.safetensors")
    count = len(golden["pixels"])
    return [golden[f"encoded.{index:03d}"].tobytes() for index in range(count)], golden["probabilities"]


def test_mlflow_answers_as_the_server_does_with_the_source_that_was_registered(uri: str, registered: Path) -> None:
    before = dict(sys.modules)
    model = mlflow.pyfunc.load_model(f"models:/{MODEL}@champion")
    # The visionloop of this process is what it was; what answers is the source of the version.
    assert sys.modules["components"] is components
    assert {name: sys.modules.get(name) for name in before if name.split(".")[0] == "components"} == {
        name: module for name, module in before.items() if name.split(".")[0] == "components"
    }
    loaded: Any = model.unwrap_python_model()
    assert str(registered / "code") in loaded._loaded.predict.__func__.__code__.co_filename
    given, expected = pictures_and_answers(registered)
    release = Release.read(json.loads((registered / "evidence" / "release.json").read_text()))
    answers = model.predict(pd.DataFrame({"image": given}))
    assert np.stack(list(answers["probabilities"])) == pytest.approx(expected, abs=1e-4)
    assert model.metadata.metadata["classes"] == list(release.engine.classes)
    for row, probabilities in zip(answers.itertuples(), expected, strict=True):
        likeliest = release.engine.classes[int(np.argmax(probabilities))]
        assert row.confidence == pytest.approx(probabilities.max(), abs=1e-4)
        assert row.unsure == (row.confidence < release.decision.threshold)
        assert row.label == ("unsure" if row.unsure else likeliest)
    with pytest.raises(MlflowException, match="picture 1 of 2: .*expected the bytes of an encoded picture"):
        model.predict(pd.DataFrame({"image": [given[0], b"no picture"]}))
    for text in ("cat.jpg", None):
        with pytest.raises(
            MlflowException, match="picture 0 of 1 is (str|NoneType); expected the bytes of an encoded picture"
        ):
            loaded.predict(None, pd.DataFrame({"image": [text]}))
    with pytest.raises(MlflowException, match="Failed to enforce schema"):
        model.predict(pd.DataFrame({"picture": given}))


def test_mlflow_shows_schema_example_and_the_run_with_what_was_registered(uri: str) -> None:
    client = MlflowClient(uri)
    version = client.get_model_version_by_alias(MODEL, "champion")
    info = mlflow.models.get_model_info(f"models:/{MODEL}@champion")
    assert info.signature is not None
    assert {column["name"]: column["type"] for column in info.signature.inputs.to_dict()} == {"image": "binary"}
    assert [column["name"] for column in info.signature.outputs.to_dict()] == [
        "label",
        "confidence",
        "unsure",
        "probabilities",
    ]
    run = client.get_run(str(version.run_id))
    assert run.outputs is not None
    assert [output.model_id for output in run.outputs.model_outputs] == [model_of(version)]
    known_as = client.get_logged_model(model_of(version)).tags["mlflow.modelVersions"]
    assert json.loads(known_as) == [{"name": MODEL, "version": str(version.version)}]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"report.html", "model-card.md"}
    for path in ("MLmodel", "report.html", "checkpoint/weights.safetensors"):
        assert Path(
            mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/{MODEL}/{path}", tracking_uri=uri)
        ).is_file()


def test_mlflow_s_scoring_server_answers_the_example_in_json(uri: str, registered: Path) -> None:
    from fastapi.testclient import TestClient
    from mlflow.pyfunc.scoring_server import init

    model = mlflow.pyfunc.load_model(f"models:/{MODEL}@champion")
    example = model.input_example
    assert len(example) == 1
    with TestClient(init(model)) as client:
        posted = (registered / "serving_input_example.json").read_text()
        answered = client.post("/invocations", content=posted, headers={"content-type": "application/json"})
        refused = client.post(
            "/invocations", json={"dataframe_split": {"columns": ["image"], "data": [["bm8gcGljdHVyZQ=="]]}}
        )
    (row,) = answered.json()["predictions"]
    assert row["probabilities"] == pytest.approx(model.predict(example)["probabilities"][0], abs=1e-6)
    assert (refused.status_code, refused.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")


def answered_elsewhere(folder: Path, place: Path) -> dict[str, Any]:
    """The answer to a disc, in a process that cannot import ours, and imports another `components` afterwards."""
    (place / "components").mkdir()
    (place / "components" / "__init__.py").write_text("MINE = 1\n")
    (place / "one.png").write_bytes(png("disc", 1))
    program = f"""
import sys
root = {str(Path(components.__file__).parents[1])!r}
sys.path = [path for path in sys.path if path not in ("", root)] + [{str(place)!r}]
import mlflow, pandas
model = mlflow.pyfunc.load_model({str(folder)!r}, suppress_warnings=True)
print(model.predict(pandas.DataFrame({{"image": [open("one.png", "rb").read()]}})).to_json(orient="records"))
import components
assert components.MINE == 1 and "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])
    return dict(row)


def test_it_answers_where_no_visionloop_is(registered: Path, tmp_path: Path) -> None:
    assert answered_elsewhere(registered, tmp_path)["label"] in ("disc", "unsure")


def test_a_task_of_a_workspace_comes_with_it(older: Path, champion: Registered, tmp_path: Path) -> None:
    """The shipped task under another name, as a plug-in whose answers are checked when it is asked."""
    own = tmp_path / "plugins" / "tasks" / "mine.py"
    own.parent.mkdir(parents=True)
    shutil.copyfile(Path(components.__file__).parent / "tasks" / "classification.py", own)
    plugins.use_workspace(tmp_path / "plugins")
    folder = Path(shutil.copytree(version_in(older), tmp_path / "version"))
    release = folder / "evidence" / "release.json"
    release.write_text(json.dumps(json.loads(release.read_text()) | {"task": "mine"}))
    location = register(folder, tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}", artifacts=tmp_path / "artifacts")
    registered = tracking.folder_of(location)
    assert registered is not None
    assert (registered / "code" / "plugins" / "tasks" / "mine.py").read_bytes() == own.read_bytes()
    shutil.rmtree(tmp_path / "plugins")
    (tmp_path / "elsewhere").mkdir()
    theirs = answered_elsewhere(champion.folder, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    assert answered_elsewhere(registered, tmp_path / "elsewhere") == theirs


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("code/components/__init__.py", "was changed"),
        ("code/numpy.py", "was added"),
        ("code/components/__pycache__/images.cpython-311.pyc", "was added"),
        ("engines/openvino-int8/model.bin", "was changed"),
        ("release/golden.safetensors", "was changed"),
        ("evidence/release.json", "was changed"),
    ],
)
def test_what_is_not_as_it_was_registered_is_refused_before_any_of_it_runs(
    registered: Path, tmp_path: Path, name: str, told: str
) -> None:
    copy = Path(shutil.copytree(registered, tmp_path / "copy"))
    planted = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n".encode()
    place = copy / name
    place.parent.mkdir(exist_ok=True)
    place.write_bytes((planted if name.endswith(".py") else b"\0") + (place.read_bytes() if place.exists() else b""))
    with pytest.raises(MlflowException, match=f"{name} {told}.*Nothing was loaded"):
        mlflow.pyfunc.load_model(str(copy), suppress_warnings=True)
    assert not (tmp_path / "ran").exists()


def test_a_manifest_that_names_another_release_is_refused(registered: Path, tmp_path: Path) -> None:
    """Its digests are right: what was bound is another engine, threshold or golden answer."""
    copy = Path(shutil.copytree(registered, tmp_path / "copy"))
    body = unseal((copy / MANIFEST).read_bytes())
    assert body is not None
    (copy / MANIFEST).write_bytes(seal(body | {"bound": body["bound"] | {"release": "0" * 64}}))
    with pytest.raises(MlflowException, match="holds another release than its manifest names; nothing was loaded"):
        mlflow.pyfunc.load_model(str(copy), suppress_warnings=True)


def test_nothing_of_it_is_pickled_and_all_of_it_is_in_the_manifest(registered: Path) -> None:
    flavour = Model.load(str(registered)).flavors["python_function"]
    assert flavour["model_code_path"] == "model.py"
    assert "python_model" not in flavour
    manifest = unseal((registered / MANIFEST).read_bytes())
    assert manifest is not None
    listed = {file["name"] for file in manifest["files"]}
    assert {"MLmodel", "model.py", "requirements.txt", "code/components/images.py", "code/components/__init__.py"} <= listed
    assert not [name for name in listed if name.endswith((".pkl", ".pickle", ".pt", ".pth"))]
    required = (registered / "requirements.txt").read_text().splitlines()
    assert {line.split("==")[0] for line in required} >= {"mlflow", "openvino", "pillow", "numpy"}
    assert "visionloop" not in " ".join(required)  # no index has it, and whoever gave one that name would be trusted


@pytest.mark.slow
def test_it_is_the_same_on_postgresql_and_s3(older: Path, postgres: str, tmp_path: Path) -> None:
    """Registered by a client of PostgreSQL whose artefacts lie in S3, and loaded from there."""
    uri = fresh_database(postgres)
    with s3_bucket("registry") as bucket:
        MlflowClient(uri).create_experiment(MODEL, artifact_location=f"{bucket}/mlflow")
        assert register(version_in(older), tmp_path, uri, artifacts=None).startswith(f"{bucket}/mlflow/")
        model = mlflow.pyfunc.load_model(f"models:/{MODEL}@champion")
        given, expected = pictures_and_answers(version_in(older))
        answers = model.predict(pd.DataFrame({"image": given}))
    assert np.stack(list(answers["probabilities"])) == pytest.approx(expected, abs=1e-4)
