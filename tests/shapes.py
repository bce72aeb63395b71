"""Small real inputs: pictures of three shapes, a workspace that holds them, and the command line on it."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from components.contracts.records import Stored
from components.store import Store

SMOKE = """
name: smoke
model: shapes
description: Three shapes, a minute of nothing.
validation: {min_images_per_class: 10}
splitting: {valid_share: 0.15, calibration_share: 0.12}
training:
  backbone: small_cnn
  backbone_settings: {image_size: 16, width: 8, embedding_dim: 16}
  fit: {epochs: 6, batch_size: 16, learning_rate: 0.01, checkpoint_every_s: 0}
export:
  serving: openvino-int8
  targets:
    - {target: onnxruntime}
    - {target: openvino, precision: int8}
evaluation: {latency_runs: 40, latency_warmup_runs: 5}
gating:
  gates:
    - {gate: accuracy, settings: {floor: 0.6}}
    - {gate: class_recall, settings: {floor: 0.3, min_images: 5}}
    - {gate: parity, settings: {min_images: 20, min_agreement: {int8: 0.9}, min_proven: 0.6}}
    - {gate: latency, settings: {max_p99_ms: 1000, min_runs: 40}}
    - {gate: no_regression}
"""


def picture(kind: str, seed: int, *, side: int = 16) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A noisy grey disc, cross or set of stripes: easy to learn, no two alike."""
    rng = np.random.default_rng([seed, len(kind)])
    y, x = np.mgrid[0:side, 0:side]
    centre = side / 2 + rng.uniform(-1.5, 1.5, 2)
    if kind == "disc":
        shape = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < (side * 0.3) ** 2
    elif kind == "cross":
        shape = (abs(x - centre[0]) < 1.6) | (abs(y - centre[1]) < 1.6)
    else:
        shape = (x + int(rng.integers(4))) % 4 < 2
    pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = np.clip(
        shape * 170 + rng.normal(40, 14, (side, side)), 0, 255
    ).astype(np.uint8)
    return pixels


KINDS = ("cross", "disc", "stripes")
LENIENT = (
    "[{gate: accuracy, settings: {floor: 0.6}}, {gate: no_regression, settings: {margin: 0.3, max_negative_flips: 0.3}}]"
)
"""Gates that a model passes beside a champion that is itself: seventy test images decide little."""
FEW = (
    "gating.gates=[{gate: accuracy, settings: {floor: 0.6}}, {gate: class_recall, settings: {floor: 0.3, min_images: 900}}]"
)
"""Gates of which the second cannot decide, for want of test images."""


def write_pictures(folder: Path, per_class: int, *, start: int = 0, kinds: tuple[str, ...] = KINDS) -> None:
    for kind in kinds:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for index in range(start, start + per_class):
            Image.fromarray(picture(kind, index)).save(folder / kind / f"{index:04d}.png")


def visionloop(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in this process: its libraries are loaded once for all tests."""
    from typer.testing import CliRunner

    from flows.cli.app import app

    with contextlib.chdir(cwd):
        result = CliRunner().invoke(app, list(arguments), env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(list(arguments), result.exit_code, result.stdout, result.stderr)


def visionloop_process(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "flows", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=300,
    )


def stored(root: Path, kind: str, record: type[Any]) -> Stored[Any]:
    """What a workspace's store holds of a kind such as `training` or `export/openvino-int8`, the first where there are more."""
    store = Store(root / ".visionloop" / "store")
    found = store.open(kind, next((store.root / kind).iterdir()).name, record)
    assert found is not None
    return found


def free_port() -> int:
    """A port below those that the kernel gives to connections, of which there are many until a server listens on it."""
    while True:
        port = secrets.choice(range(20_000, 32_000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def commit(root: Path) -> None:
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t.invalid", "commit", "--quiet", "-m", "data"], cwd=root, check=True
    )


def make_workspace(root: Path, *, per_class: int = 60) -> Path:
    """A workspace with three classes, a pinned version and the smoke recipe."""
    from flows.workspace.data import add
    from flows.workspace.workspace import Workspace

    workspace = Workspace.create(root)
    write_pictures(root.parent / f"{root.name}-photos", per_class)
    add(workspace, root.parent / f"{root.name}-photos", test_share=0.3)
    (root / "recipes" / "smoke.yaml").write_text(SMOKE)
    subprocess.run(["git", "add", "recipes"], cwd=root, check=True)
    commit(root)
    return root
