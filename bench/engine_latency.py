"""One image at a time through EfficientNet-Lite0: OpenVINO int8 and fp32, ONNX Runtime, eager torch, interleaved.

Every engine is exported as the flow exports it. Rounds go through all engines in turn, so a drift of the machine's speed
meets all of them; medians of the rounds' medians are reported, with their spread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from components import plugins
from components.checkpoints import assemble, save_weights
from components.contracts.families import Backbone, ExportRequest
from components.contracts.models import Checkpoint, Engine
from components.contracts.records import FileDigest, Stored
from components.data_folder import listing
from components.graphs import to_onnx
from components.images import batches

ROUNDS, CALLS, WARM_UP = 9, 30, 10
SHORT = {"ROUNDS": 1, "CALLS": 3, "WARM_UP": 1}
ENGINES = (("openvino", "int8"), ("openvino", "fp32"), ("onnxruntime", "fp32"), ("torch_reference", "fp32"))


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Median milliseconds per engine; `data` gives real calibration images, else noise is used."""
    torch.set_num_threads(2)
    backbone: Backbone = plugins.load("backbones", "efficientnet_lite0")
    images = _images(data, backbone)
    model = assemble(backbone, plugins.load("tasks", "classification"), 2)
    model.backbone.load_state_dict(backbone.pretrained("packaged", cache=scratch))
    model.eval()
    checkpoint = _checkpoint(model, backbone, scratch / "checkpoint")
    to_onnx(model, backbone.preprocessing, scratch / "model.onnx")
    predictors = {f"{t}-{p}": _built(t, p, checkpoint, scratch, images) for t, p in ENGINES}
    rounds: dict[str, list[float]] = {name: [] for name in predictors}
    for _ in range(ROUNDS):
        for name, predictor in predictors.items():
            rounds[name].append(_median_ms(predictor, images))
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    ours = medians["openvino-int8"]
    return {
        "ours": round(ours, 3),
        "peers": {name: round(value, 3) for name, value in medians.items() if name != "openvino-int8"},
        "ratio": round(medians["torch_reference-fp32"] / ours, 2),
        "ratios": {name: round(value / ours, 2) for name, value in medians.items()},
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in rounds.items()},
        "n": ROUNDS * CALLS,
        "unit": "milliseconds per image, batch 1, 2 threads",
    }


def _images(data: Path | None, backbone: Backbone) -> npt.NDArray[np.uint8]:
    size = backbone.preprocessing
    if data is None:
        return np.random.default_rng(0).integers(0, 255, (40, size.height, size.width, 3), dtype=np.uint8)
    paths = [path for files in listing(data).classes.values() for path in files[:20]][:40]
    return np.concatenate(list(batches(paths, size, batch_size=20)))


def _checkpoint(model: Any, backbone: Backbone, folder: Path) -> Stored[Checkpoint]:
    folder.mkdir()
    record = Checkpoint(
        splits_digest="bench",
        task="classification",
        task_settings={},
        backbone="efficientnet_lite0",
        backbone_settings={},
        preprocessing=backbone.preprocessing,
        classes=("a", "b"),
        embedding_dim=backbone.embedding_dim,
        weights=save_weights(model.state_dict(), out=folder),
        history=FileDigest(name="none", sha256="", bytes=0),
        temperature=1.0,
        best_epoch=0,
        epochs=0,
        valid_metrics={},
    )
    return Stored(record, folder)


def _built(target: str, precision: Any, checkpoint: Stored[Checkpoint], scratch: Path, images: Any) -> Any:
    out = scratch / f"{target}-{precision}"
    out.mkdir()

    def calibration() -> Iterator[npt.NDArray[np.uint8]]:
        yield images

    member = plugins.load("targets", target)
    built = member.export(ExportRequest(checkpoint, scratch / "model.onnx", precision, calibration), out=out)
    record = Engine(
        name=out.name,
        target=target,
        precision=precision,
        settings={},
        checkpoint_digest="bench",
        files=(),
        entry=built.entry,
        preprocessing=checkpoint.record.preprocessing,
        classes=checkpoint.record.classes,
        embedding_dim=checkpoint.record.embedding_dim,
        temperature=1.0,
        runtime=built.runtime,
        built_for=(),
        facts={},
    )
    return member.load(Stored(record, out), num_threads=2)


def _median_ms(predictor: Any, images: npt.NDArray[np.uint8]) -> float:
    elapsed = []
    for call in range(-WARM_UP, CALLS):
        image = images[call % len(images)][None]
        start = time.perf_counter()
        predictor.predict(image)
        if call >= 0:
            elapsed.append((time.perf_counter() - start) * 1e3)
    return statistics.median(elapsed)
