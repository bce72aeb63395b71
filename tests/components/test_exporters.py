"""What an exporter's process can do wrong, and models that no exporter should be given."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from shapes import KINDS
from small_network import SmallNetwork, small_network

from components import export, plugins
from components.checkpoints import save_weights
from components.contracts.data import DataVersion, Splits
from components.contracts.errors import ExportError, StoreError
from components.contracts.models import Engine
from components.contracts.records import Stored
from components.export import Graph, TargetConfig
from components.graphs import to_onnx
from components.store import Store, describe


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> SmallNetwork:
    return small_network(tmp_path_factory.mktemp("network"), harmed=False)


def target_that(does: str, folder: Path) -> Path:
    """A folder of plug-ins with a target `odd`, whose export runs this line of code."""
    (folder / "targets").mkdir(parents=True)
    (folder / "targets" / "odd.py").write_text(
        '"""A target that misbehaves."""\nimport errno, os, pathlib, time\nfrom pydantic import BaseModel\n'
        "from components.contracts.families import Built\n"
        "class Target(BaseModel):\n    precisions: tuple[str, ...] = ('fp32',)\n"
        "    def built_by(self): return ''\n    def absent(self): return ''\n"
        "    def load(self, engine, *, num_threads, num_streams=1): ...\n"
        f"    def export(self, request, *, out):\n        {does}\n        return Built(entry='e', runtime='none')\n"
    )
    return folder


def splits_of(network: SmallNetwork, folder: Path, rows: list[tuple[str, str, str]]) -> Stored[Splits]:
    """Splits in `folder` whose rows are path, label and split."""
    named = [(path, label, f"{n:064d}", f"{n:032d}", split) for n, (path, label, split) in enumerate(rows)]
    table = pd.DataFrame(named, columns=["path", "label", "sha256", "picture", "split"])
    table.to_parquet(folder / "splits.parquet")
    record = Splits(
        data=DataVersion(dvc_hash="a", num_files=len(rows), bytes=1, ledger_sha256="b"),
        table=describe(folder / "splits.parquet", within=folder),
        classes=network.checkpoint.record.classes,
        counts={},
        class_counts={},
        num_duplicate_groups=0,
        test_digest="c",
    )
    return Stored(record, folder)


def build(
    network: SmallNetwork,
    out: Path,
    plugin_folder: Path,
    *,
    rows: list[tuple[str, str, str]] | None = None,
    time_limit_s: int = 600,
) -> Engine:
    """An engine of the target `odd`; its pictures lie beside the folder of plug-ins."""
    graph = Graph(checkpoint_digest="c", file=describe(network.graph, within=network.graph.parent))
    return export.export(
        network.checkpoint,
        Stored(graph, network.graph.parent),
        splits_of(network, plugin_folder.parent, rows or []),
        plugin_folder.parent,
        TargetConfig(target="odd", time_limit_s=time_limit_s),
        out=out,
        plugin_folder=plugin_folder,
    )


def ended(pid: int) -> None:
    """Wait for the end of a process that is nobody's child here."""
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.05)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_the_name_of_their_tensor(
    network: SmallNetwork, tmp_path: Path, value: float
) -> None:
    weights = load_file(network.checkpoint.folder / "weights.safetensors")
    weights["backbone.7.weight"][3, 1, 0, 2] = value
    record = network.checkpoint.record.model_copy(update={"weights": save_weights(weights, out=tmp_path)})
    (tmp_path / "out").mkdir()
    with pytest.raises(
        ExportError, match=r"weights\.safetensors has NaN or infinite numbers in backbone\.7\.weight; .*train again"
    ):
        export.export_graph(Stored(record, tmp_path), out=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_operator_that_onnx_lacks_is_named(network: SmallNetwork, tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            embedding = torch.special.bessel_j0(images[..., 0].float()).mean(dim=1)
            return embedding, embedding

    with pytest.raises(ExportError, match=r"could not export this model to ONNX: .*prims\.bessel_j0"):
        to_onnx(Odd().eval(), network.checkpoint.record.preprocessing, tmp_path / "model.onnx")


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_an_operator_that_a_runtime_lacks_is_named(network: SmallNetwork, tmp_path: Path, target: str) -> None:
    import onnx

    if target == "tensorrt":
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX exists for Linux on x86-64 only")
    model = onnx.load(network.graph)
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type, relu.domain = "Frobnicate", "my.own"
    model.opset_import.append(onnx.helper.make_opsetid("my.own", 1))
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(ExportError, match="Frobnicate"):
        plugins.load("targets", target).export(network.request("fp32", tmp_path / "odd.onnx"), out=tmp_path)


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("print('half'); os.abort()", "the exporter was killed by signal 6"),  # as native code dies
        ("os.write(2, b'no such kernel'); os._exit(3)", "the exporter ended with status 3: .*no such kernel"),
        ("raise KeyError('no such kernel')", r"target 'odd' raised in export: .*odd\.py:\d+: KeyError: 'no such kernel'"),
    ],
)
def test_an_exporter_that_crashes_is_an_error_with_its_words(
    network: SmallNetwork, tmp_path: Path, does: str, words: str
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match=words):
        build(network, tmp_path / "out", target_that(does, tmp_path / "plugins"))


def test_an_exporter_is_given_calibration_and_valid_and_never_a_test_picture(network: SmallNetwork, tmp_path: Path) -> None:
    """Test judges the engine: nothing of it may choose ranges or layers, so its pictures need not even be there."""
    does = (
        "import json\n"
        "        calibration = [int(one[0, 0, 0]) for batch in request.calibration() for one in batch]\n"
        "        valid = [(int(one[0, 0, 0]), int(t)) for some, wanted in request.valid() "
        "for one, t in zip(some, wanted, strict=True)]\n"
        "        (out / 'e').write_text(json.dumps([calibration, valid]))"
    )
    rows = [
        (f"{split}{n}.png", KINDS[n % 3], split)
        # More than a batch: each picture has to keep its label.
        for split, number in (("train", 2), ("valid", 40), ("calibration", 12), ("test", 5))
        for n in range(number)
    ]
    for path, _, split in rows:
        if split in ("calibration", "valid"):
            shade = int(path.removeprefix(split).removesuffix(".png")) + (100 if split == "valid" else 0)
            Image.new("L", (16, 16), shade).save(tmp_path / path)
    (tmp_path / "out").mkdir()
    build(network, tmp_path / "out", target_that(does, tmp_path / "plugins"), rows=rows)
    calibration, valid = json.loads((tmp_path / "out" / "e").read_text())
    assert sorted(calibration) == list(range(12))
    assert sorted(valid) == [[100 + n, n % 3] for n in range(40)]


def test_an_exporter_that_hangs_is_ended_with_all_that_it_started(
    network: SmallNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = tmp_path / "python"
    # What it started holds the pipes open that the exporter's end would be seen by.
    hanging.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {tmp_path}/started\nwait\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging))
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match=r"did not finish within 5 s and was ended; .* raise time_limit_s of this target"):
        build(network, tmp_path / "out", tmp_path / "plugins", time_limit_s=5)
    ended(int((tmp_path / "started").read_text()))


def test_an_engine_whose_process_dies_while_its_memory_is_measured_stays_as_it_was_published(
    network: SmallNetwork, tmp_path: Path
) -> None:
    folder = target_that("(out / 'e').write_bytes(b'whole')", tmp_path / "plugins")
    member = folder / "targets" / "odd.py"
    store = Store(tmp_path / "store")
    with store.writing("export", "k") as out:
        engine = build(network, out, folder)
    published = store.publish("export", "k", engine, inputs={}, provenance={})
    member.write_text(member.read_text().replace("num_streams=1): ...", "num_streams=1): os._exit(3)"))
    with pytest.raises(ExportError, match="ended with status 3"):
        export.memory_mb(published, num_threads=1, plugin_folder=folder)
    assert store.open("export", "k", Engine) is not None


def test_a_full_disk_is_told_as_one_whatever_the_library_says(
    network: SmallNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = target_that("raise OSError(errno.ENOSPC, 'No space left on device')", tmp_path / "plugins")
    store = Store(tmp_path / "store")
    with pytest.raises(StoreError, match="no space left to write .* run the same command again"):
        with store.writing("export", "k") as out:
            build(network, out, folder)
    assert store.artefacts() == []
    unclear = RuntimeError("basic_ios::clear: iostream error")  # OpenVINO's word for it
    assert export._full(unclear, tmp_path) == 0
    free = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert export._full(unclear, tmp_path) == errno.ENOSPC


def test_a_build_that_was_killed_ends_at_the_next_run_as_if_it_had_not_been(network: SmallNetwork, tmp_path: Path) -> None:
    whole = tmp_path / "go on"
    does = (
        f"(out / 'e').write_bytes(b'half'); pathlib.Path({str(tmp_path / 'begun')!r}).write_text(str(os.getpid()))\n"
        f"        while not pathlib.Path({str(whole)!r}).exists(): time.sleep(0.01)\n"
        "        (out / 'e').write_bytes(b'whole')"
    )
    folder, store = target_that(does, tmp_path / "plugins"), Store(tmp_path / "store")
    child = os.fork()
    if child == 0:
        try:
            with store.writing("export", "k") as out:
                build(network, out, folder)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 300
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline, "the exporter did not begin"
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    ended(int((tmp_path / "begun").read_text()))
    assert store.artefacts() == []
    whole.touch()
    with store.writing("export", "k") as out:
        engine = build(network, out, folder)
    published = store.publish("export", "k", engine, inputs={}, provenance={})
    assert (published.folder / "e").read_bytes() == b"whole"
    assert [path.name for path in (tmp_path / "store" / ".partial").iterdir()] == []
