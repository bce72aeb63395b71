"""Engines of untrained and packaged networks, exported as the flow exports them, for the benchmarks of engines."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from components import plugins
from components.checkpoints import assemble, save_weights
from components.contracts.families import Backbone, ExportRequest, Predictor
from components.contracts.models import Checkpoint, Engine, Precision, Preprocessing
from components.contracts.records import FileDigest, Stored
from components.data_folder import listing
from components.graphs import to_onnx
from components.images import batches

THREADS = 2
CLASSES = ("a", "b")
Images = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Network:
    """An architecture, with weights that are packaged or drawn at random: what they hold does not change the time."""

    name: str
    backbone: str
    settings: dict[str, Any] = field(default_factory=dict)
    weights: str = ""


NETWORKS = (
    Network("efficientnet_lite0", "efficientnet_lite0", weights="packaged"),
    Network("resnet18", "torchvision", {"architecture": "resnet18"}),
    Network("resnet50", "torchvision", {"architecture": "resnet50"}),
    Network("mobilenet_v3_large", "torchvision", {"architecture": "mobilenet_v3_large"}),
    Network("vit_tiny", "timm", {"architecture": "vit_tiny_patch16_224"}),
)


class Assembled:
    """A network with a head for two classes, its checkpoint and its graph."""

    def __init__(self, network: Network, scratch: Path) -> None:
        torch.manual_seed(0)
        self.backbone: Backbone = plugins.load("backbones", network.backbone, network.settings)
        self.model = assemble(self.backbone, plugins.load("tasks", "classification"), len(CLASSES))
        if network.weights:
            self.model.backbone.load_state_dict(self.backbone.pretrained(network.weights, cache=scratch))
        self.model.eval()
        self.folder = scratch / network.name
        self.folder.mkdir()
        self.checkpoint = Stored(self._record(network), self.folder)
        self.graph = self.folder / "model.onnx"
        to_onnx(self.model, self.preprocessing, self.graph)

    @property
    def preprocessing(self) -> Preprocessing:
        return self.backbone.preprocessing

    def images(self, data: Path | None, number: int = 40) -> Images:
        """Prepared pictures, of `data` where there is some, else noise."""
        size = self.preprocessing
        if data is None:
            return np.random.default_rng(0).integers(0, 255, (number, size.height, size.width, 3), dtype=np.uint8)
        paths = [path for files in listing(data).classes.values() for path in files[:number]][:number]
        return np.concatenate(list(batches(paths, size, batch_size=20)))

    def engine(self, target: str, precision: Precision, images: Images) -> Stored[Engine]:
        """The engine as the flow exports it, calibrated with these images."""
        out = self.folder / f"{target}-{precision}"
        out.mkdir()

        def calibration() -> Iterator[Images]:
            yield images

        def valid() -> Iterator[tuple[Images, npt.NDArray[np.int64]]]:
            yield images, np.zeros(len(images), np.int64)

        # Untrained heads, at times on noise, have no answers that layers could return to float for.
        uncontrolled = {"max_tries": 0, "min_int8_share": 0} if precision == "int8" else {}
        task = plugins.load("tasks", "classification")
        built = plugins.load("targets", target, uncontrolled).export(
            ExportRequest(self.checkpoint, self.graph, precision, calibration, valid, task), out=out
        )
        record = self.checkpoint.record
        return Stored(
            Engine(
                name=out.name,
                target=target,
                precision=precision,
                settings={},
                checkpoint_digest="bench",
                files=(),
                entry=built.entry,
                preprocessing=record.preprocessing,
                classes=record.classes,
                embedding_dim=record.embedding_dim,
                temperature=1.0,
                runtime=built.runtime,
                built_for=(),
                facts={},
            ),
            out,
        )

    def _record(self, network: Network) -> Checkpoint:
        return Checkpoint(
            splits_digest="bench",
            task="classification",
            task_settings={},
            backbone=network.backbone,
            backbone_settings=network.settings,
            preprocessing=self.preprocessing,
            classes=CLASSES,
            embedding_dim=self.backbone.embedding_dim,
            weights=save_weights(self.model.state_dict(), out=self.folder),
            history=FileDigest(name="none", sha256="", bytes=0),
            temperature=1.0,
            best_epoch=0,
            epochs=0,
            valid_metrics={},
        )


def loaded(engine: Stored[Engine]) -> Predictor:
    found: Predictor = plugins.load("targets", engine.record.target).load(engine, num_threads=THREADS)
    return found


def median_ms(call: Callable[[int], object], *, calls: int, warm_up: int) -> float:
    """Median milliseconds of calls, which are given their numbers, after some that do not count."""
    elapsed = []
    for number in range(-warm_up, calls):
        start = time.perf_counter()
        call(number)
        if number >= 0:
            elapsed.append((time.perf_counter() - start) * 1e3)
    return statistics.median(elapsed)
