"""Peak memory of a whole `visionloop train`, and how it grows with the pictures: all of them against a tenth.

A recipe of two phases at 224 pixels: two epochs of a head on EfficientNet-Lite0, one of its last two blocks, one engine.
Every process of the run is counted, pages that several share once (the proportional set size, which Linux tells). Both sides
have a workspace of their own in which nothing is cached. Memory is not time: what else runs on the machine changes little.
DATA is a folder of class folders, or of train/ and test/ with class folders in them; without it the pictures are noise.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from bench.serving import say, visionloop

NUM_IMAGES = 60_000
"""At most; a folder may hold fewer."""
PARTS = 10
"""The smaller side has one picture in so many."""
SHORT = {"NUM_IMAGES": 160, "PARTS": 2}
_EVERY_S = 1.0
_SIDE = 64
_STAGE = re.compile(r"^\[\d+/\d+\] ([a-z]+) .*\.\.\.$")
"""The line by which a run tells that a stage begins."""
_RECIPE = """\
name: memory
model: memory
description: A head, then the last two blocks of EfficientNet-Lite0, one engine.
splitting: {valid_share: 0.12, calibration_share: 0.05}
training:
  backbone: efficientnet_lite0
  backbone_settings: {image_size: 224, crop_share: 1.0}
  weights: packaged
  phases:
    - trains: head
      fit: {epochs: 2, batch_size: 64, learning_rate: 0.003, weight_decay: 0.05}
    - trains: {last: 2}
      fit: {epochs: 1, batch_size: 64, learning_rate: 0.0005, weight_decay: 0.05}
export: {serving: onnxruntime-fp32, targets: [{target: onnxruntime}]}
gating: {gates: [{gate: accuracy, settings: {floor: 0.1}}]}
"""


@dataclass
class _Peaks:
    """The most that the processes of a run took, in bytes."""

    of_stages: dict[str, int] = field(default_factory=dict)
    """Of all processes together, by stage."""
    largest_process: int = 0
    """Resident pages of one process, shared ones among them."""
    seconds: float = 0.0

    @property
    def stage(self) -> str:
        return max(self.of_stages, key=lambda name: self.of_stages[name])

    @property
    def gib(self) -> float:
        return self.of_stages[self.stage] / 2**30


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Peak memory in GiB; the ratio is that of all pictures to that of a tenth: 1 where memory does not grow."""
    if data is None:
        data = _noise(scratch / "noise")
    data = data.resolve()
    pictures = _pictures(data)
    most = min(NUM_IMAGES, len(pictures))
    found = {}
    for number in (most // PARTS, most):
        chosen = [pictures[place] for place in np.linspace(0, len(pictures) - 1, number).astype(int)]
        say(f"{number} pictures")
        found[number] = _measured(chosen, data, scratch / f"{number}")
        say(f"  {number} pictures: {_told(found[number])}")
        shutil.rmtree(scratch / f"{number}")
    fewer, all_of_them = found.values()
    return {
        "ours": round(all_of_them.gib, 2),
        "peers": {f"{most // PARTS} pictures": round(fewer.gib, 2)},
        "ratio": round(all_of_them.gib / fewer.gib, 2),
        "n": most,
        "unit": "GiB at the peak, all processes of one training, shared pages counted once; the ratio is the growth",
        "details": {str(number): _told(peaks) for number, peaks in found.items()},
        "data": str(data),
    }


def _noise(folder: Path) -> Path:
    """JPEGs of two classes, no two of them alike."""
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        label = number % 2
        noise = (rng.integers(0, 255, (8, 8, 3), dtype=np.uint8) // (1 + label)).astype(np.uint8)
        path = folder / f"kind-{label}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).resize((_SIDE, _SIDE)).save(path)
    return folder


def _pictures(data: Path) -> list[tuple[Path, str, str]]:
    """Path, label and split of every picture, those of a class side by side; the split is empty where none is said."""
    sides = {"train": data / "train", "test": data / "test"}
    if not all(side.is_dir() for side in sides.values()):
        sides = {"": data}
    found = [
        (path, path.parent.name, split)
        for split, side in sides.items()
        for path in sorted(side.glob("*/*"))
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
    ]
    if not found:
        raise SystemExit(f"{data} has no pictures; expected class folders, or train/ and test/ with class folders in them")
    return found


def _measured(pictures: list[tuple[Path, str, str]], data: Path, workspace: Path) -> _Peaks:
    visionloop("init", str(workspace), cwd=workspace.parent)
    manifest = workspace / "pictures.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        writer.writerows(pictures)
    splits = ["--keep-splits"] if any(split for _, _, split in pictures) else []
    # Copies are in most folders that are no benchmark's own, and adding them as they are would be refused.
    options = ["--source-setting", f"root={data}", "--near-duplicates", "exclude", *splits]
    visionloop("data", "add", str(manifest), *options, cwd=workspace)
    identity = ["-c", "user.name=bench", "-c", "user.email=bench@bench.invalid", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, "commit", "--quiet", "-m", "bench"], cwd=workspace, check=True)
    recipe = workspace / "recipes" / "memory.yaml"
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(_RECIPE)
    return _trained(workspace)


def _trained(workspace: Path) -> _Peaks:
    """One training, its processes looked at every second. A rejected model is an answer too."""
    peaks, lines, stage, start = _Peaks(), deque[str](maxlen=40), "start", time.perf_counter()
    command = [sys.executable, "-m", "flows", "train", "-r", "memory"]
    process = subprocess.Popen(command, cwd=workspace, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def listen() -> None:
        nonlocal stage
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if (began := _STAGE.match(line.strip())) and began[1] != stage:
                stage = began[1]
                say(f"  {time.perf_counter() - start:.0f} s: {stage} begins")

    listener = threading.Thread(target=listen)
    listener.start()
    while process.poll() is None:
        sizes = list(_sizes(process.pid))
        peaks.of_stages[stage] = max(peaks.of_stages.get(stage, 0), sum(shared for shared, _ in sizes))
        peaks.largest_process = max(peaks.largest_process, *(resident for _, resident in sizes), 0)
        time.sleep(_EVERY_S)
    listener.join()
    peaks.seconds = time.perf_counter() - start
    # A run whose data were refused ends with 1 as well, and has trained nothing.
    if process.returncode not in (0, 1) or "evaluation" not in peaks.of_stages:
        raise SystemExit(f"the training ended with {process.returncode} at {stage}:\n{''.join(lines)}")
    return peaks


def _sizes(pid: int) -> Iterator[tuple[int, int]]:
    """Proportional and resident set size of the process and of all that it started; who ends meanwhile is left out."""
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return
    for process in processes:
        try:
            found = process.memory_full_info()
        except psutil.Error:
            continue
        yield found.pss, found.rss


def _told(peaks: _Peaks) -> dict[str, Any]:
    return {
        "peak_gib": round(peaks.gib, 2),
        "stage_at_peak": peaks.stage,
        "peak_gib_of_stages": {name: round(size / 2**30, 2) for name, size in peaks.of_stages.items()},
        "largest_process_gib": round(peaks.largest_process / 2**30, 2),
        "seconds": round(peaks.seconds),
    }
