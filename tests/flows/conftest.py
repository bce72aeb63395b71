"""What the tests of the flows share: one champion, promoted once, and copies of its workspace."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from looped import promoted
from shapes import SMOKE, make_workspace, visionloop, write_pictures

PHASED = """training:
  backbone: small_cnn
  backbone_settings: {image_size: 16, width: 8, embedding_dim: 16}
  phases:
    - {trains: all, fit: {epochs: 2, batch_size: 16, learning_rate: 0.01}}
    - trains: {last: 1}
      views: 2
      augmentations: [{augmentation: flip}]
      fit: {epochs: 4, batch_size: 16, learning_rate: 0.01}
  compute: {precision: bf16, accumulate: 2, channels_last: true}
export:
  serving: onnxruntime-fp32
  targets: [{target: onnxruntime}]
evaluation: {latency_runs: 40, latency_warmup_runs: 5}
gating: {gates: [{gate: accuracy, settings: {floor: 0.6}}]}
"""


@pytest.fixture(scope="session")
def champions(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a champion; copy it, never use it."""
    return promoted(trained, tmp_path_factory.mktemp("champions") / "workspace")


@pytest.fixture
def root(champions: Path, tmp_path: Path) -> Path:
    """A workspace with a champion, of one's own."""
    return Path(shutil.copytree(champions, tmp_path / "workspace", symlinks=True))


@pytest.fixture(scope="session")
def phased(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Path:
    """A workspace with many more discs than others, in which the two phases of the recipe `phased` ran; copy it."""
    folder = tmp_path_factory.mktemp("phased")
    root = make_workspace(folder / "workspace")
    write_pictures(folder / "discs", 160, start=60, kinds=("disc",))
    assert visionloop("data", "add", str(folder / "discs"), cwd=root).returncode == 0
    recipe = SMOKE.partition("training:")[0].replace("name: smoke", "name: phased") + PHASED
    (root / "recipes" / "phased.yaml").write_text(recipe)
    done = visionloop("train", "-r", "phased", "--json", cwd=root)
    assert done.returncode == 0, done.stderr + done.stdout
    (root / "summary.json").write_text(done.stdout.strip().splitlines()[-1])
    return root
