"""One step of training the last blocks of a network: channels last and reused memory against neither.

All sides take the same maps of a batch through the same two blocks and head of EfficientNet-Lite0, forward, backward and
one step of AdamW; the sides take turns, round by round, and the median of each is told with its spread. What
infra/decisions/0017-the-data-stream-of-training.md chose is the first side.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from components import memory, plugins
from components.checkpoints import assemble, blocks
from components.contracts.families import Backbone

LAST = 2
BATCH = 64
ROUNDS = 9
_STEPS = 3
SHORT = {"BATCH": 8, "ROUNDS": 1, "_STEPS": 1}
_BACKBONE = "efficientnet_lite0"


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Milliseconds a picture; random maps, for what they hold does not change the time."""
    torch.set_num_threads(2)
    backbone: Backbone = plugins.load("backbones", _BACKBONE)
    torch.manual_seed(0)
    model = assemble(backbone, plugins.load("tasks", "classification"), 10)
    model.backbone.load_state_dict(backbone.pretrained("packaged", cache=scratch))
    parts = blocks(_BACKBONE, backbone, model.backbone)
    height, width = backbone.preprocessing.height, backbone.preprocessing.width
    with torch.no_grad():
        maps = nn.Sequential(*parts[:-LAST]).eval()(torch.randn(BATCH, 3, height, width)).half()
    upper = nn.Sequential(*parts[-LAST:], model.head).train()
    norms = [module for module in upper.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.eval().requires_grad_(False)
    targets = torch.arange(BATCH) % 10
    sides: dict[str, Callable[[], float]] = {
        f"{layout}, memory {kept}": lambda layout=layout, kept=kept: _seconds(upper, maps, targets, layout, kept)  # type: ignore[misc]
        for layout in ("channels last", "contiguous")
        for kept in ("reused", "given back")
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(1 + ROUNDS):
        for name, seconds in sides.items():
            elapsed = seconds()
            if round_:  # the first one warms up
                found[name].append(1000 * elapsed / BATCH)
    ours = "channels last, memory reused"
    medians = {name: statistics.median(values) for name, values in found.items()}
    slowest = max(medians, key=lambda name: medians[name])
    return {
        "ours": round(medians[ours], 2),
        "peers": {name: round(value, 2) for name, value in medians.items() if name != ours},
        "ratio": round(medians[slowest] / medians[ours], 2),
        "n": ROUNDS,
        "unit": f"ms a picture, batch {BATCH}, last {LAST} blocks of {_BACKBONE}",
        "spread": {name: [round(min(values), 2), round(max(values), 2)] for name, values in found.items()},
    }


def _seconds(upper: nn.Module, maps: torch.Tensor, targets: torch.Tensor, layout: str, kept: str) -> float:
    optimizer = torch.optim.AdamW([weight for weight in upper.parameters() if weight.requires_grad], lr=1e-4)
    form = torch.channels_last if layout == "channels last" else torch.contiguous_format
    elapsed = []
    with memory.reused() if kept == "reused" else contextlib.nullcontext():
        for _ in range(1 + _STEPS):
            start = time.perf_counter()
            inputs = maps.to(torch.float32, memory_format=form)
            optimizer.zero_grad()
            nn.functional.cross_entropy(upper(inputs), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            elapsed.append(time.perf_counter() - start)
    return statistics.median(elapsed[1:])
