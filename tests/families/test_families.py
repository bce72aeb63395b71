"""Every member of every family keeps its family's contract. Members are found by listing the folder."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shapes import write_pictures

from components import plugins
from components.conformance import class_breaches
from components.contract_checks import PROBES, known_data, whole_evidence
from components.contracts.errors import EngineUnavailable, SourceUnavailable, UnknownName
from components.contracts.models import Engine
from components.contracts.records import Stored
from monitoring.detector_checks import detector_breaches

SMALL: dict[str, dict[str, Any]] = {
    **{f"efficientnet_lite{number}": {"image_size": 64} for number in range(3)},
    "resnet18": {"image_size": 32},
    "timm": {"architecture": "resnet10t", "image_size": 32},
    "small_cnn": {"image_size": 16, "width": 4},
}
GATES: dict[str, dict[str, Any]] = {
    "accuracy": {"floor": 0.5},
    "class_recall": {"floor": 0.5},
    "parity": {},
    "latency": {"max_p99_ms": 1e9},
    "no_regression": {},
    "slices": {"floor": 0.5},
    "robustness": {"floor": 0.5, "min_stability": {"flip": 0.5}},
}
TORCHVISION: dict[str, dict[str, Any]] = {
    "sources": {"dataset": "MNIST", "folder": "no/such/folder", "download": False},
    "backbones": {"architecture": "resnet18", "image_size": 32},
}
ROOT = Path(plugins.__file__).parent


@pytest.mark.parametrize("family", sorted(plugins.FAMILIES))
def test_a_family_is_its_folder(family: str) -> None:
    found = plugins.names(family)
    assert found
    assert found == sorted(
        path.stem for path in (plugins.home(family) / family).glob("*.py") if not path.stem.startswith("_")
    )


@pytest.mark.parametrize(("family", "name"), [(f, n) for f in sorted(plugins.FAMILIES) for n in plugins.names(f)])
def test_a_member_is_one_frozen_class_with_documented_settings(family: str, name: str) -> None:
    assert not list(class_breaches(*plugins.member_class(family, name)))
    with pytest.raises(UnknownName, match="no_such_setting"):
        plugins.load(family, name, {"no_such_setting": 1})


def listed_pictures(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Settings of the sources that are given a file: one that names pictures of two classes."""
    write_pictures(tmp_path, 2, kinds=("cross", "disc"))
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    (tmp_path / "all.csv").write_text("path,label,group\n" + "".join(f"{file},{file.parent},a\n" for file in files))
    tasks = [
        {
            "data": {"image": f"/data/local-files/?d={file}"},
            "annotations": [
                {"result": [{"type": "choices", "from_name": "kind", "value": {"choices": [file.parent.name]}}]}
            ],
        }
        for file in files
    ]
    (tmp_path / "all.json").write_text(json.dumps(tasks))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as packed:
        for file in files:
            packed.write(tmp_path / file, file)
            (tmp_path / "films" / file.parent / "clip").mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / file, tmp_path / "films" / file.parent / "clip")
    return {
        "manifest": {"path": tmp_path / "all.csv"},
        "label_studio": {"path": tmp_path / "all.json"},
        "archive": {"path": tmp_path / "all.zip"},
        "video": {"path": tmp_path / "films"},
        "s3": {"address": "s3://nowhere/set"},
    }


@pytest.mark.parametrize(("family", "name"), [(f, n) for f in sorted(plugins.FAMILIES) for n in plugins.names(f)])
def test_a_shipped_member_keeps_its_contract(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    probe = detector_breaches if family == "detectors" else PROBES[family]
    settings = TORCHVISION[family] if name == "torchvision" else SMALL.get(name) or GATES.get(name)
    if family == "sources":
        settings = settings or listed_pictures(tmp_path).get(name)
    member = plugins.load(family, name, settings)
    try:
        assert not list(probe(member, name))
    except EngineUnavailable:
        assert name in ("tensorrt", "litert", "coreml")  # a GPU, an environment of its own, one of Apple's systems
    except SourceUnavailable:
        assert name in ("torchvision", "s3")  # their files are of the network; their own tests make some


@pytest.mark.parametrize("name", plugins.names("gates"))
def test_a_gate_passes_an_engine_that_is_right_and_fast(name: str) -> None:
    """Else that it passes no broken evidence would say nothing."""
    assert plugins.load("gates", name, GATES[name]).judge(whole_evidence()).status == "pass"


@pytest.mark.parametrize("name", plugins.names("findings"))
def test_a_finding_finds_something_where_there_is_something(name: str) -> None:
    """Else that it keeps its contract would say nothing."""
    assert plugins.load("findings", name).look(known_data())


def engine_files(trained: Path) -> dict[str, Stored[Engine]]:
    found = {}
    for manifest in (trained / ".visionloop" / "store" / "export").glob("*/*/manifest.json"):
        record = json.loads(manifest.read_text())["record"]
        if "target" in record:
            found[record["name"]] = Stored(Engine.read(record), manifest.parent)
    return found


def test_every_engine_answers_like_the_reference_for_any_batch(trained: Path) -> None:
    engines = engine_files(trained)
    assert set(engines) == {"torch_reference-fp32", "onnxruntime-fp32", "openvino-int8"}
    images = np.random.default_rng(0).integers(0, 255, (7, 16, 16, 1), dtype=np.uint8)
    answers = {}
    for name, stored in engines.items():
        predictor = plugins.load("targets", stored.record.target).load(stored, num_threads=1)
        whole = predictor.predict(images)
        assert whole[0].shape == (7, 3)
        assert whole[1].shape == (7, stored.record.embedding_dim)
        assert whole[0].dtype == whole[1].dtype == np.float32
        single = np.concatenate([predictor.predict(images[i : i + 1])[0] for i in range(7)])
        assert np.abs(single - whole[0]).max() < (1e-4 if stored.record.precision == "fp32" else 0.2)
        answers[name] = whole[0]
    assert np.abs(answers["onnxruntime-fp32"] - answers["torch_reference-fp32"]).max() < 1e-3
    int8 = engines["openvino-int8"].record
    assert int(int8.facts["int8_constants"]) > 0


def test_an_int8_engine_is_smaller_and_keeps_a_temperature_of_its_own(trained: Path) -> None:
    engines = engine_files(trained)
    int8, fp32 = engines["openvino-int8"].record, engines["torch_reference-fp32"].record
    weights = {
        n: next(f.bytes for f in e.files if f.name.endswith((".bin", ".safetensors")))
        for n, e in (("8", int8), ("32", fp32))
    }
    assert weights["8"] < 0.5 * weights["32"]
    assert int8.temperature != fp32.temperature
