"""What pruning costs and buys: a network before and after losing 30 % and 50 % of its parameters.

EfficientNet-Lite0 is trained as the recipe for pictures of this size says (`transfer`, or `cifar10` where most are smaller
than 128 pixels), then pruned and fine-tuned by the stage optimisation as a recipe does it. All of them answer the same test
pictures as fp32 OpenVINO engines, compared picture by picture with the network as it was trained, and are timed in turns,
one picture at a time: so is the first share as an int8 engine, and the network as it was trained in eager torch. DATA is a
folder of class folders, a quarter of which is test, or of train/ and test/ with class folders in them; without it the
pictures are noise of two kinds, and accuracy means nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from bench._trainings import NUM_THREADS, Part, config_of, head_and_blocks, parts_of, recipe_for
from bench.serving import say
from components import plugins
from components.checkpoints import restore
from components.compute import ComputeConfig
from components.contracts.data import DataVersion, Splits
from components.contracts.families import ExportRequest
from components.contracts.models import Checkpoint
from components.contracts.records import Stored
from components.graphs import to_onnx
from components.images import batches
from components.intervals import paired_difference, wilson
from components.optimisation import OptimisationConfig, optimise
from components.store import describe
from components.targets.openvino import compiled, stream
from components.training import TrainingConfig, train

SHARES = (0.3, 0.5)
TRAINED, TESTED = 500, 500
"""Pictures of a class at most; of those that train, one in ten chooses the epochs."""
EPOCHS = 60
"""Of a phase of the training, at most."""
STEPS, TUNED_EPOCHS, TUNED_RATE = 3, 3, 3e-4
"""The share is taken in so many steps, each fine-tuned for so many epochs."""
CALIBRATED = 300
"""Train pictures that the int8 engine is calibrated with."""
ROUNDS, RUNS = 10, 30
"""Rounds in which the engines take turns, and timed pictures of each."""
SHORT = {
    "TRAINED": 20,
    "TESTED": 8,
    "EPOCHS": 1,
    "STEPS": 1,
    "TUNED_EPOCHS": 1,
    "CALIBRATED": 10,
    "ROUNDS": 2,
    "RUNS": 3,
    "SHARES": (0.3,),
}
_FLOORS = {0.3: (0.01, 1.15), 0.5: (0.02, 1.4)}
"""The most that accuracy may fall, and the least that it has to be as fast."""
_EAGER, _INT8, _INT8_FLOOR = "as trained, eager torch", "pruned, int8", 6.0


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """How many times as fast the network of the first share is; every share with its drop in accuracy."""
    torch.set_num_threads(NUM_THREADS)
    parts, classes = parts_of(data, scratch, trained=TRAINED, tested={"test": TESTED}, kept=lambda num: num // 4)
    recipe = recipe_for(parts["train"].paths)
    sizes = {name: len(part.labels) for name, part in parts.items()}
    say(f"{sizes} pictures of {len(classes)} classes, recipe {recipe}")
    training = config_of(recipe, head_and_blocks(recipe), seed=0, epochs=EPOCHS)
    training = training.model_copy(update={"compute": ComputeConfig(channels_last=True)})
    splits = _splits(parts, classes, scratch)
    networks = {"as trained": _trained(training, splits, scratch)}
    for share in SHARES:
        networks[_name(share)] = _pruned(networks["as trained"], share, training, splits, scratch)
    test = parts["test"]
    engines = {name: _engine(network, scratch / f"{name}.onnx") for name, network in networks.items()}
    pruned = networks[_name(SHARES[0])]
    networks[_INT8], engines[_INT8] = pruned, _int8(pruned, parts, scratch)
    images = np.concatenate(list(batches(test.paths[:RUNS], networks["as trained"].record.preprocessing, batch_size=32)))
    right = {name: _right(engine, networks[name], test) for name, engine in engines.items()}
    calls = {name: _asking(engine) for name, engine in engines.items()}
    rounds = _rounds(calls | {_EAGER: _eager(networks["as trained"])}, images)
    told = {_name(share): _told(share, networks, right, rounds) for share in SHARES}
    for name, figures in told.items():
        say(f"{name}: {figures}")
    first = told[_name(SHARES[0])]
    whole = wilson(int(right["as trained"].sum()), len(test.labels))
    return {
        "ours": first["speedup"],
        "peers": {"as trained": 1.0},
        "ratio": first["speedup"],
        "n": len(test.labels),
        "unit": "times as fast as the network as it was trained, fp32 OpenVINO, one picture at a time",
        "accuracy_as_trained": [round(value, 4) for value in (whole.value, whole.low, whole.high)],
        "shares": told,
        "int8": _of_int8(right, rounds),
        "pictures": sizes,
        "recipe": recipe,
        "data": str(data) if data else "synthetic",
    }


def _name(share: float) -> str:
    return f"{share:.0%} pruned"


def _splits(parts: Mapping[str, Part], classes: tuple[str, ...], scratch: Path) -> Stored[Splits]:
    """Train and valid as a run has them; what is tested is not among them."""
    table = pd.concat(
        pd.DataFrame(
            {
                "path": [str(path.resolve()) for path in parts[name].paths],
                "label": [classes[number] for number in parts[name].labels],
                "picture": parts[name].pictures,
                "split": name,
            }
        )
        for name in ("train", "valid")
    )
    table.to_parquet(scratch / "splits.parquet", index=False)
    record = Splits(
        data=DataVersion(dvc_hash="bench", num_files=len(table), bytes=1, ledger_sha256="bench"),
        table=describe(scratch / "splits.parquet", within=scratch),
        classes=classes,
        counts={"train": len(parts["train"].labels), "valid": len(parts["valid"].labels)},
        class_counts={},
        num_duplicate_groups=0,
        test_digest="bench",
    )
    return Stored(record, scratch)


def _trained(training: TrainingConfig, splits: Stored[Splits], scratch: Path) -> Stored[Checkpoint]:
    out, start = scratch / "trained", time.perf_counter()
    out.mkdir()
    record = train(splits, Path("/"), training, out=out, cache=scratch / "cache", root=scratch, num_threads=NUM_THREADS)
    say(f"  trained in {time.perf_counter() - start:.0f} s: {record.valid_metrics}")
    return Stored(record, out)


def _pruned(
    trained: Stored[Checkpoint], share: float, training: TrainingConfig, splits: Stored[Splits], scratch: Path
) -> Stored[Checkpoint]:
    out, start = scratch / _name(share), time.perf_counter()
    out.mkdir()
    fit = {"epochs": TUNED_EPOCHS, "patience": TUNED_EPOCHS, "batch_size": 32, "learning_rate": TUNED_RATE}
    flip = {"augmentation": "flip", "settings": {"probability": 0.5}}
    phase = {"trains": "all", "augmentations": [flip], "fit": fit | {"weight_decay": 0.05, "warmup_epochs": 0.3}}
    chosen = {"pass": "prune", "settings": {"share": share, "steps": STEPS}, "phases": [phase]}
    config = OptimisationConfig.model_validate({"passes": [chosen]})
    record = optimise(
        trained, splits, Path("/"), config, training, out=out, cache=scratch / "cache", num_threads=NUM_THREADS
    )
    say(f"  {_name(share)} and fine-tuned in {time.perf_counter() - start:.0f} s: {record.valid_metrics}")
    return Stored(record, out)


def _engine(network: Stored[Checkpoint], path: Path) -> Any:
    to_onnx(restore(network), network.record.preprocessing, path)
    return compiled(path, hint="LATENCY", num_threads=NUM_THREADS)


def _int8(network: Stored[Checkpoint], parts: Mapping[str, Part], scratch: Path) -> Any:
    """The engine of `{target: openvino, precision: int8}`: layers that cost answers to valid stay float."""
    train, valid, preprocessing = parts["train"], parts["valid"], network.record.preprocessing
    spread = np.linspace(0, len(train.paths) - 1, min(CALIBRATED, len(train.paths))).astype(int)
    request = ExportRequest(
        network,
        scratch / f"{_name(SHARES[0])}.onnx",
        "int8",
        lambda: batches([train.paths[row] for row in spread], preprocessing, batch_size=16),
        lambda: zip(
            batches(valid.paths, preprocessing, batch_size=16),
            np.split(np.array(valid.labels), range(16, len(valid.labels), 16)),
            strict=True,
        ),
        plugins.load("tasks", "classification"),
    )
    out = scratch / "int8"
    out.mkdir()
    built = plugins.load("targets", "openvino", {}).export(request, out=out)
    say(f"  int8: {built.facts}")
    return compiled(out / built.entry, hint="LATENCY", num_threads=NUM_THREADS)


def _asking(engine: Any) -> Callable[[npt.NDArray[np.uint8]], object]:
    request = engine.create_infer_request()
    return lambda image: request.infer([image])


def _eager(network: Stored[Checkpoint]) -> Callable[[npt.NDArray[np.uint8]], object]:
    model = restore(network).eval()

    def ask(image: npt.NDArray[np.uint8]) -> object:
        with torch.inference_mode():
            return model(torch.from_numpy(image))

    return ask


def _right(engine: Any, network: Stored[Checkpoint], test: Part) -> npt.NDArray[np.bool_]:
    images = batches(test.paths, network.record.preprocessing, batch_size=16)
    logits = np.concatenate(list(stream(engine, iter(images), "logits")))
    found: npt.NDArray[np.bool_] = logits.argmax(axis=1) == np.array(test.labels)
    return found


def _rounds(
    calls: Mapping[str, Callable[[npt.NDArray[np.uint8]], object]], images: npt.NDArray[np.uint8]
) -> dict[str, list[float]]:
    """The median milliseconds of one picture, a number a round; in a round all of them follow each other."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 1):
        for name, call in calls.items():
            elapsed = []
            for run_ in range(RUNS):
                image = images[run_ % len(images)][None]
                start = time.perf_counter()
                call(image)
                elapsed.append(time.perf_counter() - start)
            if turn:  # the first is a warm-up
                found[name].append(statistics.median(elapsed) * 1e3)
    return found


def _of_int8(right: Mapping[str, npt.NDArray[np.bool_]], rounds: Mapping[str, list[float]]) -> dict[str, Any]:
    """The first share in int8 against eager torch with the network as it was trained."""
    drop = paired_difference(right["as trained"], right[_INT8])
    faster = [was / now for was, now in zip(rounds[_EAGER], rounds[_INT8], strict=True)]
    return {
        "accuracy": round(float(right[_INT8].mean()), 4),
        "drop": [round(value, 4) for value in (drop.value, drop.low, drop.high)],
        "ms": [round(statistics.median(rounds[name]), 2) for name in (_EAGER, _INT8)],
        "speedup": round(statistics.median(faster), 2),
        "speedup_of_rounds": [round(min(faster), 2), round(max(faster), 2)],
        "within_floor": statistics.median(faster) >= _INT8_FLOOR,
    }


def _told(
    share: float,
    networks: Mapping[str, Stored[Checkpoint]],
    right: Mapping[str, npt.NDArray[np.bool_]],
    rounds: Mapping[str, list[float]],
) -> dict[str, Any]:
    name = _name(share)
    optimised = networks[name].record.optimised
    assert optimised is not None
    before, after = optimised.passes[0].before, optimised.passes[0].after
    drop = paired_difference(right["as trained"], right[name])
    faster = [was / now for was, now in zip(rounds["as trained"], rounds[name], strict=True)]
    most, least = _FLOORS[share]
    speedup = statistics.median(faster)
    return {
        "parameters": round(after.parameters / before.parameters, 4),
        "macs": round(after.macs / before.macs, 4),
        "accuracy": round(float(right[name].mean()), 4),
        "drop": [round(value, 4) for value in (drop.value, drop.low, drop.high)],
        "ms": [round(statistics.median(rounds[each]), 2) for each in ("as trained", name)],
        "speedup": round(speedup, 3),
        "speedup_of_rounds": [round(min(faster), 3), round(max(faster), 3)],
        "within_floors": {"drop": drop.value <= most, "speedup": speedup >= least},
    }
