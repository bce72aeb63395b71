"""What int8 costs with and without quantisation-aware fine-tuning, of a network with depthwise layers.

MobileNetV3-Small of half the width is trained from scratch. Its int8 engine loses next to nothing, as those of all networks
here do (infra/decisions/0022); so the channels of its bottlenecks are then scaled by up to SPREAD, and the layers after them
by the inverse, as in networks that were trained without such care (Nagel et al. 2019): in float nothing changes. Both go
through the stage optimisation with the pass `quantisation_aware` alone, as a recipe does it. All networks become OpenVINO
engines with every layer in int8, on the same calibration pictures, without the accuracy control that would return layers to
float, and answer the same test pictures. DATA is a folder of class folders, a quarter of which is test, or of train/ and
test/ with class folders in them; without it the pictures are noise of two kinds, and accuracy means nothing.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench._trainings import NUM_THREADS, Part, as_splits, parts_of
from bench.serving import say
from components.checkpoints import restore, save_weights
from components.contracts.data import Splits
from components.contracts.models import Checkpoint
from components.contracts.records import Stored
from components.contracts.verdicts import Estimate
from components.graphs import to_onnx
from components.images import batches
from components.intervals import paired_difference, wilson
from components.optimisation import OptimisationConfig, optimise
from components.targets.openvino import _Quantiser
from components.training import TrainingConfig, train

ARCHITECTURE, SIDE = "mobilenetv3_small_050", 64
TRAINED, TESTED, CALIBRATED = 1000, 500, 30
"""Pictures of a class at most; of those that train, one in ten is valid."""
EPOCHS, RATE = 12, 4e-3
SPREAD = 300.0
TUNED_EPOCHS, TUNED_RATE = 2, 3e-4
SHORT = {"TRAINED": 20, "TESTED": 8, "CALIBRATED": 5, "EPOCHS": 1, "TUNED_EPOCHS": 1}
_FLOOR = 0.5
"""Of the drop, what the pass has to win back."""
_RESAMPLES = 2000


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Which share of int8's drop on test is won back."""
    torch.set_num_threads(NUM_THREADS)
    tested = {"test": TESTED, "calibration": CALIBRATED}
    parts, classes = parts_of(data, scratch, trained=TRAINED, tested=tested, kept=lambda num: num // 4)
    sizes = {name: len(part.labels) for name, part in parts.items()}
    say(f"{sizes} pictures of {len(classes)} classes")
    splits, folder = as_splits(parts, classes, scratch / "splits")
    training = _training()
    trained = _trained(training, splits, folder, scratch)
    networks = {"as trained": trained, "imbalanced": _imbalanced(trained, scratch)}
    tuned = {name: _tuned(name, network, training, splits, folder, scratch) for name, network in networks.items()}
    networks["imbalanced, quantisation-aware"] = tuned["imbalanced"]
    shown = {name: _images(parts[name], trained) for name in ("calibration", "test")}
    right = _right(networks, shown, np.array(parts["test"].labels), scratch)
    exact, before, after = (right[name] for name in ("imbalanced, fp32", "imbalanced, int8", f"{list(networks)[-1]}, int8"))
    lost, won = paired_difference(exact, before), paired_difference(after, before)
    recovered = won.value / lost.value if lost.value > 0 else 0.0
    return {
        "ours": round(recovered, 3),
        "peers": {"without the pass": 0.0},
        "ratio": round(recovered, 3),
        "n": len(exact),
        "unit": "of int8's drop on test won back, imbalanced network, OpenVINO with every layer in int8",
        "interval": [round(value, 3) for value in _recovered(exact, before, after)],
        "drop_as_trained": _told(paired_difference(right["as trained, fp32"], right["as trained, int8"])),
        "drop_imbalanced": _told(lost),
        "drop_quantisation_aware": _told(paired_difference(exact, after)),
        "accuracy": {name: _told(wilson(int(each.sum()), len(each))) for name, each in right.items()},
        "said_on_valid": {name: _said(each) for name, each in tuned.items()},
        "within_floor": recovered >= _FLOOR,
        "pictures": sizes,
        "data": str(data) if data else "synthetic",
    }


def _told(found: Estimate) -> list[float]:
    return [round(value, 4) for value in (found.value, found.low, found.high)]


def _said(tuned: Stored[Checkpoint]) -> list[str]:
    assert tuned.record.optimised is not None
    return list(tuned.record.optimised.passes[0].notes)


def _training() -> TrainingConfig:
    fit = {"epochs": EPOCHS, "batch_size": 64, "learning_rate": RATE, "weight_decay": 0.02, "schedule": "one_cycle"}
    return TrainingConfig.model_validate(
        {
            "backbone": "timm",
            "backbone_settings": {"architecture": ARCHITECTURE, "image_size": SIDE},
            "phases": [{"trains": "all", "augmentations": [_FLIP], "fit": fit | {"patience": EPOCHS}}],
        }
    )


_FLIP = {"augmentation": "flip", "settings": {"probability": 0.5}}


def _trained(training: TrainingConfig, splits: Stored[Splits], data: Path, scratch: Path) -> Stored[Checkpoint]:
    out, start = scratch / "trained", time.perf_counter()
    out.mkdir()
    record = train(splits, data, training, out=out, cache=scratch / "cache", root=scratch, num_threads=NUM_THREADS)
    say(f"  trained in {time.perf_counter() - start:.0f} s: {record.valid_metrics}")
    return Stored(record, out)


def _imbalanced(trained: Stored[Checkpoint], scratch: Path) -> Stored[Checkpoint]:
    """The same network in float, with channels of its bottlenecks that are up to SPREAD times as large as others."""
    out, model = scratch / "imbalanced", restore(trained)
    out.mkdir()
    generator = torch.Generator().manual_seed(0)
    scale: torch.Tensor | None = None
    stages: Any = model.backbone.blocks
    with torch.no_grad():
        for block in (block for stage in stages for block in stage):
            if scale is not None:  # what comes from a bottleneck is not given to a depthwise layer
                first = block.conv_pw if hasattr(block, "conv_pwl") else block.conv
                first.weight.div_(scale[None, :, None, None])
            last = block.bn3 if hasattr(block, "bn3") else getattr(block, "bn2", None)
            if last is None:
                break  # the last one ends in an activation
            if scale is None or not block.has_skip:  # both sides of a sum are scaled alike
                scale = SPREAD ** -torch.rand(last.num_features, generator=generator)
            last.weight.mul_(scale)
            last.bias.mul_(scale)
    (out / trained.record.history.name).write_bytes((trained.folder / trained.record.history.name).read_bytes())
    weights = save_weights(model.state_dict(), out=out)
    return Stored(trained.record.model_copy(update={"weights": weights}), out)


def _tuned(
    name: str, network: Stored[Checkpoint], training: TrainingConfig, splits: Stored[Splits], data: Path, scratch: Path
) -> Stored[Checkpoint]:
    out, start = scratch / f"{name}, tuned", time.perf_counter()
    out.mkdir()
    fit = {"epochs": TUNED_EPOCHS, "patience": TUNED_EPOCHS, "batch_size": 64, "learning_rate": TUNED_RATE}
    phase = {
        "trains": "all",
        "batch_norm": "frozen",
        "augmentations": [_FLIP],
        "fit": fit | {"weight_decay": 0.02, "warmup_epochs": 0.3},
    }
    config = OptimisationConfig.model_validate({"passes": [{"pass": "quantisation_aware", "phases": [phase]}]})
    cache = scratch / "cache"
    record = optimise(network, splits, data, config, training, out=out, cache=cache, num_threads=NUM_THREADS)
    found = Stored(record, out)
    say(f"  {name}: {time.perf_counter() - start:.0f} s; {'; '.join(_said(found))}")
    return found


def _right(
    networks: dict[str, Stored[Checkpoint]], shown: dict[str, npt.NDArray[np.uint8]], labels: npt.NDArray[Any], scratch: Path
) -> dict[str, npt.NDArray[np.bool_]]:
    """Which test pictures the engines answer rightly: a line for each network and precision."""
    import openvino

    found: dict[str, npt.NDArray[np.bool_]] = {}
    for name, network in networks.items():
        path = scratch / f"{name}.onnx"
        to_onnx(restore(network), network.record.preprocessing, path)
        quantiser = _Quantiser(openvino.Core().read_model(path), shown["calibration"])
        for precision, model in (("fp32", quantiser.in_float()), ("int8", quantiser.quantised(()))):
            logits = np.concatenate(list(quantiser.logits(model, shown["test"])))
            found[f"{name}, {precision}"] = logits.argmax(axis=1) == labels
            say(f"  {name}, {precision}: {found[f'{name}, {precision}'].mean():.4f}")
    return found


def _images(part: Part, network: Stored[Checkpoint]) -> npt.NDArray[np.uint8]:
    return np.concatenate(list(batches(part.paths, network.record.preprocessing, batch_size=64)))


def _recovered(
    exact: npt.NDArray[np.bool_], before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]
) -> tuple[float, float]:
    """Interval (95 %) of the share won back, of test pictures drawn anew; a draw without a drop tells nothing."""
    draws = np.random.default_rng(0).integers(len(exact), size=(_RESAMPLES, len(exact)))
    float_, int8, aware = (right[draws].mean(axis=1) for right in (exact, before, after))
    lost = float_ > int8
    if not lost.any():
        return 0.0, 0.0
    low, high = np.quantile((aware - int8)[lost] / (float_ - int8)[lost], (0.025, 0.975))
    return float(low), float(high)
