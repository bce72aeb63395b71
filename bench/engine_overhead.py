"""What our predictor adds to the bare engine, and a JPEG's way to its label.

OpenVINO's own `benchmark_app` times the same engine with the same threads, synchronously and one request at a time, in
turns with our predictor; both tell their median. Then a JPEG of 500 kB goes from its bytes to logits as the server takes it:
decoded, turned, resized, cropped and answered, beside the answer alone, and beside decoding alone, which is the limit.
"""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench._engines import NETWORKS, THREADS, Assembled, Network, loaded, median_ms
from components.images import decode, prepare

ROUNDS, CALLS, WARM_UP, SECONDS = 5, 100, 20, 6
SHORT = {"ROUNDS": 1, "CALLS": 3, "WARM_UP": 1, "SECONDS": 1, "MEASURED": NETWORKS[:1]}
MEASURED: tuple[Network, ...] = NETWORKS[:3]
_JPEG_BYTES = 500_000


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Median milliseconds of one image; `data` gives real calibration images, else noise is used."""
    photograph = _photograph(data)
    found = {}
    for network in MEASURED:
        print(f"{network.name} ...", file=sys.stderr)
        found[network.name] = _of(Assembled(network, scratch), data, photograph)
    first = found[MEASURED[0].name]
    return {
        "ours": first["predictor"],
        "peers": {"benchmark_app": first["benchmark_app"]},
        "ratio": first["over_benchmark_app"],
        "networks": found,
        "jpeg_bytes": len(photograph),
        "n": ROUNDS * CALLS,
        "unit": f"milliseconds per image, batch 1, {THREADS} threads; ratio: ours over benchmark_app, {MEASURED[0].name}",
    }


def _of(network: Assembled, data: Path | None, photograph: bytes) -> dict[str, Any]:
    images = network.images(data)
    engine = network.engine("openvino", "int8", images)
    predictor, size = loaded(engine), network.preprocessing
    prepared = prepare(decode(photograph), size)[None]
    ways = {
        "predictor": lambda number: predictor.predict(images[number % len(images)][None]),
        "jpeg_to_label": lambda _: predictor.predict(prepare(decode(photograph), size)[None]),
        "bare_engine": lambda _: predictor.predict(prepared),
        "jpeg_to_pixels": lambda _: prepare(decode(photograph), size),
        "jpeg_decoded": lambda _: np.asarray(Image.open(io.BytesIO(photograph))),
    }
    rounds: dict[str, list[float]] = {name: [] for name in [*ways, "benchmark_app"]}
    for _ in range(ROUNDS):
        rounds["benchmark_app"].append(_benchmark_app(engine.folder / engine.record.entry, network.folder / "statistics"))
        for name, call in ways.items():
            rounds[name].append(median_ms(call, calls=CALLS, warm_up=WARM_UP))
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    return {
        **{name: round(value, 3) for name, value in medians.items()},
        "over_benchmark_app": round(medians["predictor"] / medians["benchmark_app"], 3),
        "jpeg_over_bare_engine": round(medians["jpeg_to_label"] / medians["bare_engine"], 2),
        "jpeg_over_decoder_and_engine": round(
            medians["jpeg_to_label"] / (medians["jpeg_decoded"] + medians["bare_engine"]), 2
        ),
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in rounds.items()},
    }


def _benchmark_app(model: Path, statistics_folder: Path) -> float:
    """Median milliseconds that OpenVINO's own tool finds for a model."""
    statistics_folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from openvino.tools.benchmark.main import main; main()"),
            *("-m", str(model), "-d", "CPU", "-hint", "none", "-nstreams", "1", "-api", "sync", "-nireq", "1"),
            *("-nthreads", str(THREADS), "-infer_precision", "f32", "-data_shape", _shape(model), "-t", str(SECONDS)),
            *("-report_type", "no_counters", "-report_folder", str(statistics_folder), "-json_stats"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    reports = list(statistics_folder.glob("*.json"))
    if done.returncode or not reports:
        raise RuntimeError(f"benchmark_app ended with status {done.returncode}: {done.stdout[-800:]}{done.stderr[-800:]}")
    results = json.loads(reports[0].read_text())["execution_results"]
    return float(results["latency (ms)"])


def _shape(model: Path) -> str:
    import openvino

    _, height, width, channels = openvino.Core().read_model(model).input("images").partial_shape
    return f"[1,{height},{width},{channels}]"


def _photograph(data: Path | None) -> bytes:
    """A JPEG of about 500 kB: a photograph of `data` enlarged, else noise that was smoothed."""
    if data is not None:
        path = next(path for path in sorted(data.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg"))
        picture = Image.open(path).convert("RGB")
    else:
        noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
    picture = picture.resize((1600, 1200), Image.Resampling.BICUBIC)
    # Grain, as a sensor has it: without some, no quality makes so large a file of an enlarged picture.
    grain = np.random.default_rng(1).normal(0, 6, (1200, 1600, 3))
    picture = Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))
    best = b""
    for quality in range(30, 100, 3):
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=quality)
        best = out.getvalue()
        if len(best) >= _JPEG_BYTES:
            break
    return best
