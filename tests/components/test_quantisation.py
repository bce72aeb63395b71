from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from small_network import SmallNetwork, record_of, small_network

from components import plugins
from components.checkpoints import assemble
from components.contracts.errors import EngineUnavailable, ExportError
from components.contracts.families import ExportRequest
from components.contracts.models import Engine, Precision
from components.contracts.records import Stored
from components.graphs import to_onnx
from components.targets import openvino
from components.targets._qdq import QdqQuantiser
from components.targets._quantisation import Executed, Quantised, control

MULTIPLICATIONS = sorted([16 * 16 * 8 * 25, 8 * 8 * 8 * 16 * 9, 8 * 8 * 16 * 16 * 9, 4 * 4 * 16 * 32 * 9, 512 * 16, 16 * 3])
"""Four convolutions and two linear layers of the module, in the multiplications of one picture."""


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory) -> SmallNetwork:
    return small_network(tmp_path_factory.mktemp("harmed"))


class Scripted:
    """A quantiser whose models are the layers in int8; each of some harms so many answers, one after the other."""

    def __init__(self, num_images: int, harm: dict[str, int], layers: str = "abcdefgh") -> None:
        self.num_images, self.harm, self.names = num_images, harm, list(layers)
        self.asked: list[tuple[str, ...]] = []

    def request(self) -> ExportRequest:
        images = np.arange(self.num_images, dtype=np.uint8).reshape(-1, 1, 1, 1)
        task = plugins.load("tasks", "classification")
        targets = np.zeros(self.num_images, np.int64)
        return ExportRequest(None, Path(), "int8", lambda: iter([images]), lambda: iter([(images, targets)]), task)  # type: ignore[arg-type]

    def in_float(self) -> frozenset[str]:
        return frozenset()

    def quantised(self, kept: Sequence[str]) -> frozenset[str]:
        self.asked.append(tuple(sorted(kept)))
        return frozenset(self.names) - set(kept)

    def layers(self, model: frozenset[str]) -> list[str]:
        return sorted(model)

    def without(self, model: frozenset[str], layer: str) -> frozenset[str]:
        return model - {layer}

    def logits(self, model: frozenset[str], images: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.float32]]:
        start = 0
        wrong: set[int] = set()
        for layer, number in sorted(self.harm.items()):
            wrong |= set(range(start, start + number)) if layer in model else set()
            start += number
        for image in images.reshape(-1):
            yield np.array([[0.0, 1.0] if int(image) in wrong else [1.0, 0.0]], np.float32)

    def compute(self, model: frozenset[str]) -> list[Executed]:
        """The last layer multiplies more often than the others together."""
        return [Executed(name, 8 if name == "h" else 1, name in model) for name in self.names]


@pytest.mark.parametrize(
    ("harm", "settings", "kept", "drop"),
    [
        ({}, {}, "", 0.0),
        ({"c": 1}, {}, "", 1.0),  # one point of a hundred is the limit
        ({"c": 3}, {}, "c", 0.0),
        ({"b": 1, "c": 9, "f": 5}, {}, "cf", 1.0),
        ({"b": 1, "c": 9, "f": 5}, {"max_drop": 0.0, "max_disagreement": 0.0}, "bcf", 0.0),
        ({"b": 1, "c": 9, "f": 5}, {"max_drop": 0.2, "max_disagreement": 0.06}, "c", 6.0),
        # No more than a quarter of the layers, or one try, may not be enough: the nearest of what was tried is taken.
        ({"b": 4, "c": 9, "f": 5}, {"max_float_share": 0.25}, "cf", 4.0),
        ({"b": 4, "c": 9, "f": 5, "g": 20}, {"max_tries": 1}, "g", 18.0),
        ({"c": 9}, {"max_tries": 0}, "", 9.0),
        # With the largest layer in float the engine would be int8 by name only.
        ({"b": 4, "c": 9, "h": 10}, {"max_drop": 0.1}, "", 23.0),
        ({"b": 4, "c": 9, "h": 7}, {"max_drop": 0.1}, "c", 11.0),
    ],
)
def test_the_fewest_of_the_worst_layers_return_to_float(
    harm: dict[str, int], settings: dict[str, Any], kept: str, drop: float
) -> None:
    quantiser, limits = Scripted(100, harm), Quantised.model_validate(settings)
    found = control(quantiser, quantiser.request(), limits, runtime="Scripted")
    assert found.model == frozenset("abcdefgh") - set(kept)
    assert (found.facts["float_layers"], found.facts["int8_layers"]) == (len(kept), 8 - len(kept))
    assert sorted(str(found.facts["float_layer_names"]).split(", ")) == (sorted(kept) or [""])
    assert (found.facts["valid_drop"], found.facts["valid_images"]) == (drop, 100)
    assert len(quantiser.asked) <= 1 + limits.max_tries


def test_few_layers_are_found_in_few_tries() -> None:
    quantiser = Scripted(100, {"c": 5, "f": 4, "h": 3}, layers="abcdefghijklmnopqrstuvwxyz")
    control(quantiser, quantiser.request(), Quantised(min_int8_share=0), runtime="Scripted")
    assert [len(kept) for kept in quantiser.asked] == [0, 1, 2, 4, 3]


def test_answers_that_are_lost_and_won_alike_are_no_drop_but_are_told(harmed: SmallNetwork) -> None:
    """Accuracy alone would not see that an engine answers otherwise, and the gate of parity would refuse it."""
    quantiser = Scripted(100, {"c": 4})
    request = quantiser.request()
    (batch,) = request.valid()
    batch[1][:2] = 1  # two of the four that int8 turns become right
    found = control(quantiser, request, Quantised(max_disagreement=0.05), runtime="Scripted")
    assert (found.facts["valid_drop"], found.facts["valid_disagreement"], found.facts["float_layers"]) == (0.0, 4.0, 0)
    assert control(quantiser, request, Quantised(), runtime="Scripted").facts["float_layers"] == 1


def test_one_answer_of_few_says_nothing() -> None:
    quantiser = Scripted(20, {"c": 1})
    found = control(quantiser, quantiser.request(), Quantised(max_drop=0.06), runtime="Scripted")
    assert found.facts["float_layers"] == 0


def refuse_other_pictures(target: Any, engine: Stored[Engine]) -> None:
    """Whatever its precision, the file says how its pictures are prepared."""
    wider = engine.record.preprocessing.model_copy(update={"resize_shortest": 99})
    other = Stored(engine.record.model_copy(update={"preprocessing": wider}), engine.folder)
    with pytest.raises(EngineUnavailable, match="built for pictures that are prepared otherwise"):
        target.load(other, num_threads=1)


@pytest.mark.parametrize(
    ("target", "settings", "right", "float_layers", "share", "files"),
    [
        ("openvino", {}, 0.98, 1, (0.5, 0.7), {"model.bin", "model.xml"}),
        # A layer in float wants its input in float, so that the layer before it is computed in float, too.
        ("onnxruntime", {"min_int8_share": 0.3}, 0.95, 1, (0.3, 0.5), {"model.onnx"}),
    ],
)
def test_an_engine_whose_layer_int8_harms_answers_rightly(
    harmed: SmallNetwork,
    tmp_path: Path,
    target: str,
    settings: dict[str, Any],
    right: float,
    float_layers: int,
    share: tuple[float, float],
    files: set[str],
) -> None:
    found: dict[str, tuple[float, Mapping[str, Any]]] = {}
    for name, chosen in (("plain", {"max_tries": 0}), ("controlled", settings)):
        member, out = plugins.load("targets", target, chosen), tmp_path / name
        out.mkdir()
        built = member.export(harmed.request("int8"), out=out)
        assert {path.name for path in out.iterdir()} == files
        engine = harmed.engine(target, "int8", built.entry, out)
        logits, embeddings = member.load(engine, num_threads=1).predict(harmed.images)
        found[name] = float(harmed.task.right(logits, harmed.targets).mean()), built.facts
    refuse_other_pictures(member, engine)
    (plain, of_plain), (controlled, facts) = found["plain"], found["controlled"]
    assert plain < 0.9 < right < controlled
    assert (facts["float_layers"], facts["int8_layers"]) == (float_layers, 6 - float_layers)
    assert "node_Conv_70" in facts["float_layer_names"].split(", ")
    assert facts["valid_drop"] <= 1.0 < of_plain["valid_drop"]
    assert share[0] < facts["int8_share"] < share[1] < 0.95 < of_plain["int8_share"] <= 1
    assert facts["calibration_images"] + facts["valid_images"] == len(harmed.images)
    assert facts.get("provider", "CPUExecutionProvider") == "CPUExecutionProvider"
    # Answers are no steps of 8 bits.
    assert len(np.unique(logits)) > 256
    with torch.inference_mode():
        expected = harmed.module(torch.from_numpy(harmed.images))[1].numpy()
    assert np.corrcoef(embeddings.ravel(), expected.ravel())[0, 1] > 0.99


def test_depthwise_layers_are_executed_in_int8_by_openvino(tmp_path: Path) -> None:
    backbone: Any = plugins.load("backbones", "efficientnet_lite0", {"image_size": 64, "num_layers": 3})
    task = plugins.load("tasks", "classification")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = assemble(backbone, task, 3).eval()
    record = record_of(module, "efficientnet_lite0", {"image_size": 64, "num_layers": 3}, backbone, tmp_path)
    to_onnx(module, record.preprocessing, tmp_path / "model.onnx")
    images, out = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8), tmp_path / "engine"
    network = SmallNetwork(Stored(record, tmp_path), module, tmp_path / "model.onnx", images, np.zeros(20, np.int64), task)
    out.mkdir()
    member = plugins.load("targets", "openvino", {"max_tries": 0})
    assert member.export(network.request("int8"), out=out).facts["int8_share"] == 1


def test_without_valid_images_nobody_can_say_what_int8_costs() -> None:
    quantiser = Scripted(20, {})
    request = dataclasses.replace(quantiser.request(), valid=lambda: iter([]))
    with pytest.raises(ExportError, match=r"the valid split is empty.*raise splitting\.valid_share"):
        control(quantiser, request, Quantised(), runtime="Scripted")


def test_a_float_model_is_executed_in_float_by_openvino(harmed: SmallNetwork) -> None:
    import openvino as runtime

    compute = openvino.executed(runtime.Core().read_model(harmed.graph))
    assert sorted(each.multiplications for each in compute) == MULTIPLICATIONS
    assert not any(each.in_int8 for each in compute)


@pytest.mark.parametrize(
    ("target", "runtime"),
    [("openvino", "OpenVINO"), ("onnxruntime", "ONNX Runtime"), ("tensorrt", "TensorRT's graph")],
)
def test_an_engine_that_is_int8_by_name_only_is_refused(
    harmed: SmallNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, runtime: str
) -> None:
    """What quantises gives the float graph back, as tools do without a word; what the runtime makes of it tells."""
    if target == "tensorrt":
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX exists for Linux on x86-64 only")
    for quantiser in (openvino._Quantiser, QdqQuantiser):
        monkeypatch.setattr(quantiser, "quantised", lambda self, _: self.in_float())
    named = rf"{runtime} executes 0% .* at least 50% .* by name only. In float stayed node_Conv_70 \(42%\), node_Conv_67 \("
    with pytest.raises(ExportError, match=named):
        plugins.load("targets", target).export(harmed.request("int8"), out=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("for_tensorrt", [False, True])
def test_a_graph_of_pairs_whose_layers_all_return_to_float_is_the_float_one(
    harmed: SmallNetwork, tmp_path: Path, for_tensorrt: bool
) -> None:
    """Also where the range of a pair has taken the place of an activation."""
    quantiser = QdqQuantiser(harmed.graph, harmed.images, for_tensorrt=for_tensorrt, scratch=tmp_path)
    layers = quantiser.layers(quantiser.quantised([]))
    assert len(layers) == 6
    found = [
        next(quantiser.logits(model, harmed.images[:32]))
        for model in (quantiser.quantised(layers), quantiser.in_float(), quantiser.quantised([]))
    ]
    # What is left are the pairs around the pooling before the first normalisation.
    assert np.abs(found[0] - found[1]).max() < 0.25 < 2 < np.abs(found[2] - found[1]).max()
    compute = quantiser.compute(quantiser.quantised(layers))
    assert not any(each.in_int8 for each in compute)
    assert sorted(each.multiplications for each in compute) == MULTIPLICATIONS


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_tensorrt_is_built_of_a_graph_in_lower_precision(harmed: SmallNetwork, tmp_path: Path, precision: Precision) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX exists for Linux on x86-64 only")
    target, sizes = plugins.load("targets", "tensorrt", {"compute_capabilities": ["SM89"]}), {}
    wanted: tuple[Precision, ...] = ("fp32", precision)
    for each in wanted:
        (tmp_path / each).mkdir()
        built = target.export(harmed.request(each), out=tmp_path / each)
        sizes[each] = (tmp_path / each / built.entry).stat().st_size
    assert built.built_for
    if precision == "int8":
        assert built.facts["float_layer_names"] == "node_Conv_70"
        assert 0.5 < built.facts["int8_share_of_graph"] < 0.6
        assert "int8_share" not in built.facts  # what it executes is seen on a GPU alone


def test_half_precision_answers_the_same_from_a_smaller_file(harmed: SmallNetwork, tmp_path: Path) -> None:
    target = plugins.load("targets", "onnxruntime")
    built = target.export(harmed.request("fp16"), out=tmp_path)
    assert (tmp_path / built.entry).stat().st_size < 0.7 * harmed.graph.stat().st_size
    engine = harmed.engine("onnxruntime", "fp16", built.entry, tmp_path)
    logits, embeddings = target.load(engine, num_threads=1).predict(harmed.images)
    refuse_other_pictures(target, engine)
    with torch.inference_mode():
        expected = harmed.module(torch.from_numpy(harmed.images))
    assert 0 < np.abs(logits - expected[0].numpy()).max() < 0.1
    assert logits.dtype == embeddings.dtype == np.float32


def test_a_gpu_is_used_by_onnxruntime_for_what_it_can_execute(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as runtime

    from components.targets import onnxruntime

    monkeypatch.setattr(runtime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "gpu_driver", lambda: "")
    assert onnxruntime._providers("fp32") == ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "gpu_driver", lambda: "570.1")
    assert onnxruntime._providers("int8") == ["CPUExecutionProvider"]
    assert onnxruntime._providers("fp32") == [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
