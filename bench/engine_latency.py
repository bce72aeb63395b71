"""One image at a time through five networks: OpenVINO int8 and fp32, ONNX Runtime, eager torch, torch.compile, in turns.

Every engine is exported as the flow exports it. Rounds go through all engines of a network in turn, so a drift of the
machine's speed meets all of them; medians of the rounds' medians are reported, with their spread. EfficientNet-Lite0 has its
packaged weights, the others are drawn at random: what they hold does not change the time. The ratio is eager torch over
OpenVINO int8.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench._engines import NETWORKS, THREADS, Assembled, Images, loaded, median_ms
from components.contracts.models import Precision

ROUNDS, CALLS, WARM_UP = 9, 30, 10
SHORT = {"ROUNDS": 1, "CALLS": 3, "WARM_UP": 1, "NETWORKS": (NETWORKS[0], NETWORKS[-1]), "COMPILER": "eager"}
ENGINES: tuple[tuple[str, Precision], ...] = (
    ("openvino", "int8"),
    ("openvino", "fp32"),
    ("onnxruntime", "fp32"),
    ("torch_reference", "fp32"),
)
OURS, EAGER = "openvino-int8", "torch_reference-fp32"
COMPILER = "inductor"
"""torch.compile's backend; `eager` traces the module and compiles nothing, which takes no minute."""


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Median milliseconds by network and engine; `data` gives real calibration images, else noise is used."""
    torch.set_num_threads(THREADS)
    found = {}
    for network in NETWORKS:
        print(f"{network.name} ...", file=sys.stderr)
        found[network.name] = _of(Assembled(network, scratch), data)
        print(f"  {found[network.name]['ms']}", file=sys.stderr)
    first = found[NETWORKS[0].name]
    return {
        "ours": first["ms"][OURS],
        "peers": {name: value for name, value in first["ms"].items() if name != OURS},
        "ratio": first["ratios"][EAGER],
        "networks": found,
        "n": ROUNDS * CALLS,
        "unit": f"milliseconds per image, batch 1, {THREADS} threads; ratio for {NETWORKS[0].name}",
    }


def _of(network: Assembled, data: Path | None) -> dict[str, Any]:
    images = network.images(data)
    calls: dict[str, Callable[[int], object]] = {}
    for target, precision in ENGINES:
        predictor = loaded(network.engine(target, precision, images))
        calls[f"{target}-{precision}"] = lambda number, predictor=predictor: predictor.predict(_one(images, number))  # type: ignore[misc]
    calls["torch.compile"] = _compiled(network, images)
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            rounds[name].append(median_ms(call, calls=CALLS, warm_up=WARM_UP))
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    return {
        "ms": {name: round(value, 3) for name, value in medians.items()},
        "ratios": {name: round(value / medians[OURS], 2) for name, value in medians.items()},
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in rounds.items()},
    }


def _one(images: Images, number: int) -> Images:
    found: Images = images[number % len(images)][None]
    return found


def _compiled(network: Assembled, images: Images) -> Callable[[int], object]:
    """The module through torch.compile, scaling of uint8 included, as the other engines have it."""

    # Not in inference mode, in which dynamo cannot trace timm's ViT.
    @torch.no_grad()
    def call(pixels: torch.Tensor) -> Any:
        return network.model(pixels)

    compiled = torch.compile(call, backend=COMPILER)
    return lambda number: compiled(torch.from_numpy(_one(images, number)))
