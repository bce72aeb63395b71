"""The recipe `resnet50-edge`, from pictures to an answer over gRPC: smaller pictures and random weights, the rest as shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import png, server
from shapes import KINDS, make_workspace, picture, visionloop

from components.contracts.models import Checkpoint

FLOORS = (
    "[{gate: accuracy, settings: {floor: 0.6}}, {gate: parity, settings: {min_images: 20, min_agreement: {int8: 0.8}, "
    "min_proven: 0.5}}, {gate: latency, settings: {max_p99_ms: 1000, min_runs: 40}}]"
)
SMALLER = (
    "model=shapes",
    "splitting.calibration_share=0.15",
    "training.weights=random.safetensors",
    "training.backbone_settings.image_size=64",
    "training.phases.0.fit.epochs=6",
    "training.phases.1.fit.epochs=4",
    "training.phases.1.fit.learning_rate=0.0003",
    "optimisation.passes.prune.phases.0.fit.epochs=2",
    "optimisation.passes.prune.phases.0.fit.learning_rate=0.0003",
    "evaluation.latency_runs=40",
    "evaluation.latency_warmup_runs=5",
    f"gating.gates={FLOORS}",
)


def told(*arguments: str, cwd: Path) -> Any:
    done = visionloop(*arguments, "--json", cwd=cwd)
    assert done.returncode in (0, 1), (arguments, done.stdout[-3000:], done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(2400)  # two phases and three fine-tunings of a ResNet-50
def test_the_way_to_the_edge_ends_in_an_answer_over_grpc(tmp_path: Path, prefect_server: str) -> None:
    import torch
    import tritonclient.grpc as triton_grpc
    from safetensors.torch import save_file

    from components import plugins

    root = make_workspace(tmp_path / "workspace", per_class=80)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = plugins.load("backbones", "torchvision", {"architecture": "resnet50"}).build()
    # Random weights whose normalisations know what goes through them: otherwise values grow from block to block.
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    shown = np.stack([picture(kind, seed, side=64) for seed in range(16) for kind in KINDS]).astype(np.float32) / 127.5 - 1
    with torch.no_grad():
        network.train()(torch.from_numpy(shown)[:, None].expand(-1, 3, -1, -1))
    save_file(network.state_dict(), root / "random.safetensors")
    settings = [part for one in SMALLER for part in ("--set", one)]
    summary = told("train", "-r", "resnet50-edge", *settings, cwd=root)
    assert summary["outcome"] == "candidate", [one for one in summary["findings"] if one["status"] != "pass"]

    run = Path(summary["run_folder"])
    checkpoint = Checkpoint.read(json.loads((run / "3-optimisation" / "manifest.json").read_text())["record"])
    assert checkpoint.optimised is not None
    (pruned,) = checkpoint.optimised.passes
    assert pruned.before.parameters == sum(each.numel() for each in network.parameters()) + 2048 * 3 + 3
    assert pruned.after.parameters <= 0.70 * pruned.before.parameters
    assert pruned.after.macs <= 0.80 * pruned.before.macs
    cost = summary["optimisation"]["cost"]
    assert cost["engine_bytes_after"] < 0.72 * cost["engine_bytes_before"]
    engines = summary["engines"]
    assert engines.keys() == {"torch_reference-fp32", "onnxruntime-fp32", "openvino-fp32", "openvino-int8", "tensorrt-int8"}
    assert engines["openvino-int8"]["size_bytes"] < 0.4 * engines["openvino-fp32"]["size_bytes"]
    (built,) = [finding for finding in summary["findings"] if finding["engine"] == "tensorrt-int8"]
    assert built["message"].startswith("built, not executed here"), built

    told("approve", "1", "--as", "Ann", "--reason", "small enough", cwd=root)
    told("promote", "1", cwd=root)
    asked = [(kind, png(kind, 9000 + seed)) for seed in range(10) for kind in KINDS]
    with server(root) as running:
        client = triton_grpc.InferenceServerClient(f"127.0.0.1:{running.grpc_port}")
        given = triton_grpc.InferInput("images", [len(asked)], "BYTES")
        given.set_data_from_numpy(np.array([data for _, data in asked], dtype=np.object_))
        answer = client.infer("shapes", [given]).as_numpy("probabilities")
        client.close()
        assert running.stop() == 0
    right = [KINDS[row.argmax()] == kind for row, (kind, _) in zip(answer, asked, strict=True)]
    assert np.mean(right) > 0.5  # a third by chance
