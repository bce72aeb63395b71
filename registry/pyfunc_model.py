"""A registered version as MLflow's own tools load it: encoded pictures in, answers out. Copied beside it as `model.py`.

`mlflow.pyfunc.load_model` runs that copy, which runs the source in `code/` beside it: what the release was judged with
answers, whatever visionloop is installed, or none. Nothing is unpickled. Before any of that source runs, every file is
compared with the candidate's manifest, whose sha256 the ledger holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

if TYPE_CHECKING:
    from components.answering import Decision

_MANIFEST = "candidate.json"
_CODE = "code"
_OURS = ("components", "monitoring")
_BATCH = 32


class PictureModel(PythonModel):
    """Answers by the release beside this file."""

    def load_context(self, context: Any) -> None:
        """Verify every file and the golden vectors; raises MlflowException, or the release's own EngineUnavailable."""
        folder = Path(__file__).resolve().parent
        manifest = _verified(folder)
        with _carried(folder / _CODE):
            from components import images, plugins
            from components.answering import LoadedRelease, decided
            from components.contracts.errors import UndecodableImage
            from components.contracts.releases import Release

            release = Release.read(json.loads((folder / "evidence" / "release.json").read_text()))
            if release.digest() != manifest["bound"]["release"]:
                raise MlflowException(f"{folder} holds another release than its manifest names; nothing was loaded from it")
            own = folder / _CODE / "plugins"
            plugins.use_workspace(own if own.is_dir() else None)
            self._loaded = LoadedRelease(
                release,
                engine=folder / "engines" / release.engine.name,
                golden=folder / "release" / release.golden.name,
                num_threads=min(8, os.cpu_count() or 1),
            )
            self._images, self._decided, self._undecodable = images, decided, UndecodableImage
            # What a plug-in's answers are compared with is looked up once, and only here is it this source's.
            self._answer([(folder / "example.png").read_bytes()])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row a picture: label, confidence, unsure and probabilities. Raises MlflowException for what is no picture."""
        given = list(model_input["image"])
        for index, data in enumerate(given):
            if not isinstance(data, (bytes, bytearray, memoryview)):
                raise MlflowException.invalid_parameter_value(
                    f"picture {index} of {len(given)} is {type(data).__name__}; expected the bytes of an encoded picture "
                    f"(base64 in JSON). None of them was answered"
                )
        answered = self._answer([bytes(data) for data in given])
        return pd.DataFrame(
            {
                "label": [decision.label for decision, _ in answered],
                "confidence": [float(decision.confidence) for decision, _ in answered],
                "unsure": [bool(decision.unsure) for decision, _ in answered],
                "probabilities": [probabilities for _, probabilities in answered],
            }
        )

    def _answer(self, pictures: list[bytes]) -> list[tuple[Decision, list[float]]]:
        size = self._loaded.release.engine.preprocessing
        found: list[tuple[Decision, list[float]]] = []

        def prepared() -> Iterator[Any]:
            for index, data in enumerate(pictures):
                try:
                    yield self._images.prepare(self._images.decode(data), size)
                except self._undecodable as error:
                    raise MlflowException.invalid_parameter_value(
                        f"picture {index} of {len(pictures)}: {error}; expected the bytes of an encoded picture (base64 in "
                        f"JSON). None of them was answered"
                    ) from error

        for batch in self._images.stacked(prepared(), _BATCH):
            probabilities, _ = self._loaded.predict(batch)
            if not np.isfinite(probabilities).all():
                raise MlflowException(
                    "the engine gave an answer that is no finite number; none of the pictures was answered"
                )
            decisions = self._decided(self._loaded.release, self._loaded.task, probabilities)
            found += zip(decisions, probabilities.astype(float).tolist(), strict=True)
        return found


def _verified(folder: Path) -> dict[str, Any]:
    """The candidate's manifest, once every file that it lists is there as it was registered, and `code/` holds no other."""
    body: dict[str, Any] = json.loads((folder / _MANIFEST).read_bytes())
    seal = body.pop("manifest_sha256", "")
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    problems = [] if hashlib.sha256(text.encode()).hexdigest() == seal else [f"{_MANIFEST} was changed"]
    for entry in body["files"]:
        file = folder / entry["name"]
        if not file.is_file():
            problems.append(f"{entry['name']} is not there")
        elif hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]:
            problems.append(f"{entry['name']} was changed")
    listed = {entry["name"] for entry in body["files"]}
    present = {path.relative_to(folder).as_posix() for path in (folder / _CODE).rglob("*") if not path.is_dir()}
    problems += [f"{name} was added" for name in sorted(present - listed)]
    if problems:
        raise MlflowException(
            f"{folder} is not as it was registered: {'; '.join(problems[:5])}. Nothing was loaded from it; bring the "
            f"registered files back from a backup, or train anew"
        )
    return body


@contextlib.contextmanager
def _carried(code: Path) -> Iterator[None]:
    """Import what lies in `code`, beside and not in place of a visionloop that this process has imported or will."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in _OURS]

    aside = {name: sys.modules.pop(name) for name in ours()}
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(code))
    try:
        yield
    finally:
        sys.path.remove(str(code))
        sys.dont_write_bytecode = writes_bytecode
        for name in ours():
            del sys.modules[name]
        sys.modules.update(aside)


set_model(PictureModel())
