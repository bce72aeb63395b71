"""What makes a registered version a model of MLflow's: MLmodel, signature, input example, and the source that answers.

The flavour is python_function as models from code: no pickle, and what runs is listed in the candidate's manifest. Written
by hand and not by `mlflow.pyfunc.save_model`, which loads the model to look for requirements, copies a uv project out of the
working directory and names a new time and id at every try (infra/decisions/0020).
"""

from __future__ import annotations

import base64
import datetime
import io
import json
import platform
import shutil
from importlib import metadata
from pathlib import Path

import yaml

from components import plugins
from components.answering import unsure_label
from components.contracts.records import sha256_text
from components.contracts.releases import Release

CODE = "code"
MODEL = "model.py"
EXAMPLE = "example.png"
_ROOT = Path(__file__).resolve().parent.parent
_ANSWERS = _ROOT / "components" / "answering.py"
_CONTRACTS = _ROOT / "monitoring" / "verdicts.py"
"""What the answers of plug-ins are compared with, found by name."""
_REQUIRED = ("mlflow", "numpy", "pillow", "pydantic", "safetensors")


def add(folder: Path, *, candidate: str, run_id: str, created_ms: int) -> None:
    """Make a candidate's folder, which holds its release, a model that MLflow's tools load.

    The same candidate of the same run gives the same bytes. `created_ms` is when that run began, since 1970.
    """
    from mlflow.models import Model
    from mlflow.pyfunc import add_to_model

    release = Release.read(json.loads((folder / "evidence" / "release.json").read_text()))
    _copy_source(release, folder / CODE)
    shutil.copyfile(_ROOT / "registry" / "pyfunc_model.py", folder / MODEL)
    model = Model(
        run_id=run_id,
        utc_time_created=str(datetime.datetime.fromtimestamp(created_ms / 1e3, datetime.UTC).replace(tzinfo=None)),
        model_uuid=sha256_text(candidate)[:32],
        signature=_signature(),
        saved_input_example_info=_write_example(release, folder),
        metadata={
            "classes": list(release.engine.classes),
            "task": release.task,
            "unsure_label": unsure_label(release.engine.classes),
            "threshold": release.decision.threshold,
            **({"class_thresholds": release.decision.class_thresholds} if release.decision.critical else {}),
            "engine": release.engine.name,
            "release": release.digest(),
        },
    )
    add_to_model(  # type: ignore[no-untyped-call]
        model,
        loader_module="mlflow.pyfunc.model",
        model_code_path=MODEL,
        conda_env="conda.yaml",
        python_env="python_env.yaml",
        streamable=False,
    )
    _write_environment(release, folder)
    model.save(str(folder / "MLmodel"))


def _signature() -> object:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "label"),
                ColSpec(DataType.double, "confidence"),
                ColSpec(DataType.boolean, "unsure"),
                ColSpec(Array(DataType.double), "probabilities"),
            ]
        ),
    )


def _copy_source(release: Release, code: Path) -> None:
    """The source that answers, with all of ours that it imports; a workspace's own plug-ins in a folder `plugins`."""
    members = [(family, name) for family, name in (("targets", release.engine.target), ("tasks", release.task))]
    found = {family: plugins.member_file(family, name) for family, name in members}
    own = {family: path for family, path in found.items() if not path.is_relative_to(_ROOT)}
    for path in plugins.sources(_ANSWERS, *found.values(), *([_CONTRACTS] if own else [])) - set(own.values()):
        name = path.relative_to(_ROOT)
        packages = [parent / "__init__.py" for parent in name.parents[:-1]]
        for each in (name, *packages):
            (code / each).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_ROOT / each, code / each)
    for family, path in own.items():
        (code / "plugins" / family).mkdir(parents=True)
        shutil.copyfile(path, code / "plugins" / family / path.name)


def _write_example(release: Release, folder: Path) -> dict[str, str]:
    """One of the golden pictures as the engine sees it: small whatever was photographed, and without what files tell."""
    from PIL import Image
    from safetensors.numpy import load

    pixels = load((folder / "release" / release.golden.name).read_bytes())["pixels"][0]
    encoded = io.BytesIO()
    Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).save(encoded, "PNG")
    (folder / EXAMPLE).write_bytes(encoded.getvalue())
    rows = {"columns": ["image"], "data": [[base64.b64encode(encoded.getvalue()).decode()]]}
    (folder / "input_example.json").write_text(json.dumps(rows))
    (folder / "serving_input_example.json").write_text(json.dumps({"dataframe_split": rows}))
    return {
        "artifact_path": "input_example.json",
        "serving_input_path": "serving_input_example.json",
        "type": "dataframe",
        "pandas_orient": "split",
    }


def _write_environment(release: Release, folder: Path) -> None:
    """The versions that answered here; what a workspace's own plug-in imports beside them is not known."""
    runtime = release.engine.runtime.split()[0]
    installed = {name.lower().replace("_", "-") for name in _REQUIRED} | {runtime}
    pinned = []
    for name in sorted(installed, key=lambda name: (name != "mlflow", name)):
        try:
            pinned.append(f"{name}=={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue  # a runtime that is no package of its name, such as one that came with a driver
    python = platform.python_version()
    build = ["pip", "setuptools", "wheel"]
    pip = {"python": python, "build_dependencies": build, "dependencies": ["-r requirements.txt"]}
    conda = {"name": "mlflow-env", "channels": ["conda-forge"], "dependencies": [f"python={python}", "pip", {"pip": pinned}]}
    (folder / "requirements.txt").write_text("\n".join(pinned) + "\n")
    (folder / "python_env.yaml").write_text(yaml.safe_dump(pip, sort_keys=False))
    (folder / "conda.yaml").write_text(yaml.safe_dump(conda, sort_keys=False))
