"""Training the last two blocks of a network: cached maps of what lies below against the textbook loop.

Both sides start from prepared pictures and pretrained weights, train the same two blocks and head with the same optimiser
on every picture or its mirror, and are scored on the same held-out quarter. Ours pays for exporting the part below, for
its pass over every picture and its mirror, and for the fit. The textbook loop runs the frozen part under no_grad on every
batch (torchvision's transfer-learning tutorial) at the fastest of the settings tried. Its epochs cost the same, so a few
steps are timed and multiplied; that the accuracies agree is checked by the same fit on maps that torch itself computed.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.frozen_training import images_of
from components import plugins
from components.checkpoints import ImageModel, assemble, blocks
from components.contracts.families import Backbone
from components.features import AS_IT_IS, Frozen, View, maps
from components.fitting import Examples, FittingConfig, InMemory, fit
from components.hooks import Checkpointing
from components.images import batches, decode, pixel_digest

EPOCHS = 15
NUM_IMAGES = 1398
LAST = 2
_TIMED_STEPS = 5
_RATE = 5e-4
SHORT = {"EPOCHS": 1, "NUM_IMAGES": 64, "_TIMED_STEPS": 1}
_BACKBONE = "efficientnet_lite0"


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Seconds of both sides. Without `data`, synthetic photographs: the time is the same, the accuracy means nothing."""
    torch.set_num_threads(2)
    paths, labels = images_of(data, scratch, NUM_IMAGES)
    backbone: Backbone = plugins.load("backbones", _BACKBONE)
    state = backbone.pretrained("packaged", cache=scratch)
    held_out = np.arange(len(labels)) % 4 == 0
    pictures = [pixel_digest(decode(path.read_bytes()))[:32] for path in paths]

    def chosen(rows: Any) -> tuple[list[str], list[Path]]:
        return [pictures[row] for row in np.flatnonzero(rows)], [paths[row] for row in np.flatnonzero(rows)]

    frozen = Frozen(_BACKBONE, backbone, state, LAST)
    views = [AS_IT_IS, View("mirrored", lambda images, _: np.ascontiguousarray(images[:, :, ::-1]))]
    start = time.perf_counter()
    train = maps(*chosen(~held_out), frozen, views, cache=scratch / "cache", num_threads=2)
    ours = time.perf_counter() - start
    valid = maps(*chosen(held_out), frozen, views[:1], cache=scratch / "cache", num_threads=2)
    model = _model(backbone, state, labels)
    start = time.perf_counter()
    accuracy = _fit(_upper(model, backbone), (train, valid), labels, held_out, scratch / "ours")
    ours += time.perf_counter() - start
    pixels = np.concatenate(list(batches(paths, backbone.preprocessing, batch_size=64)))
    settings = _textbook(pixels[~held_out], labels[~held_out], backbone, state)
    best = min(settings, key=lambda name: settings[name])
    textbook = _textbook_accuracy(pixels, labels, held_out, backbone, state, scratch)
    return {
        "ours": round(ours, 1),
        "peers": {f"textbook loop, {name}": round(seconds, 1) for name, seconds in settings.items()},
        "ratio": round(settings[best] / ours, 2),
        "n": int((~held_out).sum()),
        "unit": f"seconds for {EPOCHS} epochs of the last {LAST} blocks",
        "best_peer": best,
        "accuracy": {"ours": accuracy, "textbook": textbook, "n": int(held_out.sum())},
        "data": str(data) if data else "synthetic",
    }


def _model(backbone: Backbone, state: dict[str, torch.Tensor], labels: Any) -> ImageModel:
    torch.manual_seed(0)
    model = assemble(backbone, plugins.load("tasks", "classification"), int(labels.max()) + 1)
    model.backbone.load_state_dict(state)
    return model


def _upper(model: ImageModel, backbone: Backbone) -> nn.Module:
    return nn.Sequential(*blocks(_BACKBONE, backbone, model.backbone)[-LAST:], model.head)


def _fit(part: nn.Module, inputs: Any, labels: Any, held_out: Any, out: Path) -> float:
    task = plugins.load("tasks", "classification", {"label_smoothing": 0.05})
    targets = [torch.from_numpy(labels[rows]) for rows in (~held_out, held_out)]
    config = FittingConfig(epochs=EPOCHS, patience=EPOCHS, batch_size=64, learning_rate=_RATE)
    out.mkdir(parents=True)
    train, valid = (Examples(found, target) for found, target in zip(inputs, targets, strict=True))
    checkpointing = Checkpointing(out, "bench")
    result = fit(part, _logits, task, train, valid, config, checkpointing=checkpointing, frozen=_norms(part))
    return round(max(row["valid_accuracy"] for row in result.history), 4)


def _norms(part: nn.Module) -> list[nn.Module]:
    """Batch normalisation stays as it came: both sides are better and faster for it."""
    return [module for module in part.modules() if isinstance(module, nn.BatchNorm2d)]


def _logits(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """As a training computes them."""
    logits: torch.Tensor = module(inputs.to(torch.float32, memory_format=torch.channels_last))
    return logits


def _textbook(pixels: Any, labels: Any, backbone: Backbone, state: dict[str, torch.Tensor]) -> dict[str, float]:
    found: dict[str, float] = {}
    for channels_last in (False, True):
        for batch_size in (32, 64):
            model = _model(backbone, state, labels)
            if channels_last:
                model = model.to(memory_format=torch.channels_last)
            seconds = _seconds_per_step(model, backbone, pixels, labels, batch_size)
            name = f"{'channels last' if channels_last else 'contiguous'}, batch {batch_size}"
            found[name] = seconds * EPOCHS * len(labels) / batch_size
    return found


def _seconds_per_step(model: ImageModel, backbone: Backbone, pixels: Any, labels: Any, batch_size: int) -> float:
    task = plugins.load("tasks", "classification", {"label_smoothing": 0.05})
    below = nn.Sequential(*blocks(_BACKBONE, backbone, model.backbone)[:-LAST]).eval()
    upper = _upper(model, backbone).train()
    for norm in _norms(upper):
        norm.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW([weight for weight in upper.parameters() if weight.requires_grad], lr=_RATE)
    elapsed = []
    for step in range(2 + _TIMED_STEPS):
        rows = np.arange(step * batch_size, (step + 1) * batch_size) % len(labels)
        images, targets = torch.from_numpy(pixels[rows]), torch.from_numpy(labels[rows])
        start = time.perf_counter()
        with torch.no_grad():
            planes = images.float().permute(0, 3, 1, 2)
            mirrored = torch.rand(len(planes)) < 0.5
            planes = torch.where(mirrored[:, None, None, None], planes.flip(3), planes)
            found = below((planes - model.mean) / model.std)
        optimizer.zero_grad()
        task.loss(upper(found), targets).backward()
        optimizer.step()
        if step >= 2:
            elapsed.append(time.perf_counter() - start)
    return statistics.median(elapsed)


def _textbook_accuracy(
    pixels: Any, labels: Any, held_out: Any, backbone: Backbone, state: dict[str, torch.Tensor], scratch: Path
) -> float:
    """The frozen part does not change between epochs; computing its maps once gives the textbook loop's very accuracy."""
    model = _model(backbone, state, labels)
    below = nn.Sequential(*blocks(_BACKBONE, backbone, model.backbone)[:-LAST]).eval()

    def computed(rows: Any, mirrored: bool) -> torch.Tensor:
        found = []
        with torch.no_grad():
            for start in range(0, int(rows.sum()), 32):
                planes = torch.from_numpy(pixels[rows][start : start + 32]).float().permute(0, 3, 1, 2)
                planes = planes.flip(3) if mirrored else planes
                found.append(below((planes - model.mean) / model.std))
        return torch.cat(found)

    train = _TwoViews(computed(~held_out, False), computed(~held_out, True))
    valid = InMemory(computed(held_out, False))
    return _fit(_upper(model, backbone), (train, valid), labels, held_out, scratch / "textbook")


class _TwoViews:
    """Maps of each picture and of its mirror, float32 in memory."""

    def __init__(self, plain: torch.Tensor, mirrored: torch.Tensor) -> None:
        self._views = torch.stack([plain, mirrored], dim=1)

    def __len__(self) -> int:
        return len(self._views)

    def take(self, rows: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """One view a row, drawn from the generator; the first without one."""
        if generator is None:
            return self._views[rows, 0]
        return self._views[rows, torch.randint(2, (len(rows),), generator=generator)]
