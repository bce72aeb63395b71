from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from small_network import SmallNetwork, small_network

from components import plugins
from components.contracts.errors import ExportError
from components.contracts.families import ExportRequest
from components.targets import openvino
from components.targets._quantisation import Executed, Quantised, control


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
        ({"b": 4, "c": 9, "f": 5, "g": 20}, {"max_tries": 1}, "cg", 9.0),
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


def test_an_openvino_engine_whose_layer_int8_harms_answers_rightly(harmed: SmallNetwork, tmp_path: Path) -> None:
    answers = {}
    for name, settings in (("plain", {"max_tries": 0}), ("controlled", {})):
        target, out = plugins.load("targets", "openvino", settings), tmp_path / name
        out.mkdir()
        built = target.export(harmed.request("int8"), out=out)
        engine = harmed.engine("openvino", "int8", built.entry, out)
        logits, _ = target.load(engine, num_threads=1).predict(harmed.images)
        answers[name] = float(harmed.task.right(logits, harmed.targets).mean()), built.facts
    assert answers["plain"][0] < 0.9
    assert answers["controlled"][0] > 0.98
    facts = answers["controlled"][1]
    assert (facts["float_layers"], facts["int8_layers"]) == (1, 5)
    assert facts["valid_drop"] <= 1.0 < answers["plain"][1]["valid_drop"]
    assert 0.5 < facts["int8_share"] < answers["plain"][1]["int8_share"] <= 1
    assert facts["calibration_images"] + facts["valid_images"] == len(harmed.images)


def test_a_model_that_a_runtime_executes_in_float_is_not_int8(harmed: SmallNetwork, tmp_path: Path) -> None:
    import openvino as runtime

    compute = openvino.executed(runtime.Core().read_model(harmed.graph))
    # Four convolutions and two linear layers of the module, in the multiplications of one picture.
    assert sorted(each.multiplications for each in compute) == sorted(
        [16 * 16 * 8 * 25, 8 * 8 * 8 * 16 * 9, 8 * 8 * 16 * 16 * 9, 4 * 4 * 16 * 32 * 9, 512 * 16, 16 * 3]
    )
    assert not any(each.in_int8 for each in compute)
    quantiser = Scripted(20, {})
    quantiser.compute = lambda model: compute  # type: ignore[method-assign]
    named = r"Scripted executes 0% .* at least 50% .* by name only. In float stayed node_Conv_70 \(42%\), node_Conv_67 \("
    with pytest.raises(ExportError, match=named):
        control(quantiser, quantiser.request(), Quantised(), runtime="Scripted")
