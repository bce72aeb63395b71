"""Every member of every family keeps its family's contract. Members are found by listing the folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from watched import START, sample

from components import plugins
from components.checkpoints import assemble
from components.contracts.errors import UnknownName, WeightsUnavailable
from components.contracts.families import Backbone, Evidence
from components.contracts.models import Engine, Preprocessing
from components.contracts.records import Stored
from components.contracts.verdicts import Evaluation
from monitoring.verdicts import Detector, Sample, Shift

SMALL = {
    "efficientnet_lite0": {"image_size": 64},
    "resnet18": {"image_size": 32},
    "small_cnn": {"image_size": 16, "width": 4},
}
GATES: dict[str, dict[str, Any]] = {
    "accuracy": {"floor": 0.5},
    "class_recall": {"floor": 0.5},
    "parity": {},
    "latency": {"max_p99_ms": 1e9},
    "no_regression": {},
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
    module = plugins._module(family, name)
    member = getattr(module, plugins.FAMILIES[family])
    assert member.model_config["frozen"]
    assert member.model_config["extra"] == "forbid"
    assert module.__doc__
    assert member.__doc__
    with pytest.raises(UnknownName, match="no_such_setting"):
        plugins.load(family, name, {"no_such_setting": 1})


@pytest.mark.parametrize("name", plugins.names("backbones"))
def test_a_backbone_trains_and_keeps_its_shapes(name: str, tmp_path: Path) -> None:
    backbone: Backbone = plugins.load("backbones", name, SMALL[name])
    size = backbone.preprocessing
    model = assemble(backbone, plugins.load("tasks", "classification"), 3)
    images = torch.randint(0, 255, (4, size.height, size.width, size.channels), dtype=torch.uint8)
    logits, embedding = model(images)
    assert logits.shape == (4, 3)
    assert embedding.shape == (4, backbone.embedding_dim)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    json.dumps(size.to_json())
    if not backbone.weights_choices:
        with pytest.raises(WeightsUnavailable):
            backbone.pretrained("anything", cache=tmp_path)


@pytest.mark.parametrize("name", plugins.names("gates"))
def test_a_gate_never_passes_without_evidence(name: str) -> None:
    of = engine()
    nothing = Evidence(
        engine=of,
        evaluation=Evaluation(engine="e", engine_digest=of.digest(), test_digest="t", status="evaluated"),
        measurement=None,
        answers=None,
        reference=None,
        champion=None,
        champion_known=False,
    )
    finding = plugins.load("gates", name, GATES[name]).judge(nothing)
    assert finding.status == "inconclusive"
    assert finding.gate == name
    assert finding.message


def engine() -> Engine:
    return Engine(
        name="e",
        target="openvino",
        precision="fp32",
        settings={},
        checkpoint_digest="c",
        files=(),
        entry="m",
        preprocessing=Preprocessing(
            channels=1, height=16, width=16, resize_shortest=16, interpolation="bilinear", mean=(0.5,), std=(0.5,)
        ),
        classes=("a", "b"),
        embedding_dim=4,
        temperature=1.0,
        runtime="r",
        built_for=(),
        facts={},
    )


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


@pytest.mark.parametrize("name", plugins.names("detectors"))
def test_a_detector_is_quiet_or_loud_or_says_that_it_cannot_tell(name: str) -> None:
    from monitoring.evidently_report import measure

    detector: Detector = plugins.load("detectors", name)
    reference = sample(1000, 0)

    def answer(window: Sample) -> Shift:
        methods = detector.columns
        values = measure(reference, window, methods, name=name, at=START).values if methods else {}
        return detector.detect(reference, window, values, alpha=0.0025, seed=1)

    quiet, few = answer(sample(1000, 1)), answer(sample(20, 1))
    moved = sample(1000, 2, shift=2)
    loud = answer(dataclasses.replace(moved, predicted=np.full(1000, 3)))
    assert (quiet.status, loud.status, few.status) == ("pass", "drift", "inconclusive")
    for found in (quiet, loud, few):
        assert found.detector == name
        assert found.value is not None
        assert found.threshold is not None
        assert found.effect is not None
        assert found.effect_unit
        assert found.n > 0
    assert (loud.value or 0) > (loud.threshold or 0)
    assert (few.smallest_shown or 0) > (quiet.smallest_shown or 0)
    assert answer(sample(1000, 1)) == quiet
