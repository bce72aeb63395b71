"""Converters in environments of their own: what is asked, what goes wrong, and what proves a file that nothing here executes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shapes import KINDS, picture, visionloop

from components import environments, export, plugins
from components.contract_checks import whole_evidence
from components.contracts.errors import ConfigError, EngineUnavailable, ExportError
from components.contracts.families import Answers, ExportRequest
from components.contracts.models import Checkpoint, Engine
from components.contracts.records import Stored
from components.converters import answering, coreml
from components.converters.weights import compare, expected, in_place
from components.export import ExportConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment `strange` whose lock was just installed; its interpreter is what a test writes into `bin/python`."""
    monkeypatch.setattr(environments, "_ROOT", tmp_path)
    folder = tmp_path / ".venv-strange"
    (folder / "bin").mkdir(parents=True)
    (tmp_path / "infra" / "locks").mkdir(parents=True)
    for path in (tmp_path / "infra" / "locks" / "strange.txt", folder / ".lock"):
        path.write_text("torch==2\n")
    interpret(folder, "exit 0")
    return folder


def interpret(folder: Path, script: str) -> None:
    (folder / "bin" / "python").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / "python").chmod(0o755)


def test_an_environment_that_is_missing_or_old_is_told_with_the_command_that_makes_it(environment: Path) -> None:
    assert environments.absent("strange") == ""
    environments.lock("strange").write_text("torch==3\n")
    assert "holds other versions than strange.txt names; `make environment NAME=strange`" in environments.absent("strange")
    (environment / ".lock").unlink()  # as where the installation was ended before its end
    assert "which is not here; `make environment NAME=strange`" in environments.absent("strange")
    with pytest.raises(ExportError, match="not built here"):
        environments.convert("strange", coreml, {})
    environments.lock("strange").unlink()
    assert "run from a clone of visionloop, not from its wheel" in environments.absent("strange")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo Loading; exit 3", "ended with status 3: without a word"),
        ("echo RuntimeError: no such kernel >&2; exit 1", "ended with status 1: RuntimeError: no such kernel"),
        ("kill -ABRT $$", "was killed by signal 6"),
        ("""echo '{"error": "no lowering of aten.lgamma"}'""", "could not convert this network: no lowering of aten.lgamma"),
    ],
)
def test_a_converter_that_fails_is_an_error_with_its_words(environment: Path, script: str, words: str) -> None:
    interpret(environment, script)
    with pytest.raises(ExportError, match=f"the converter of strange {words}"):
        environments.convert("strange", coreml, {})


def test_a_converter_is_asked_in_json_and_may_print_what_it_likes(environment: Path) -> None:
    program = (
        "import sys; from components.converters.answering import answer; "
        "answer(lambda request: print('3 % done') or {'seen': request['shape'], 'isolated': sys.flags.ignore_environment})"
    )
    interpret(environment, f'cd {ROOT} && exec {sys.executable} "$1" "$2" -c "{program}"')
    assert environments.convert("strange", coreml, {"shape": [1, 2]}) == {"seen": [1, 2], "isolated": 1}


def test_a_converter_names_the_operator_that_it_lacks() -> None:
    raised = "Unsupported ir element type: complex<f32>\n\nWhile executing %view : [num_users=1] = call_function[target="
    assert answering.told(RuntimeError(f"{raised}torch.ops.aten.view_as_real.default](args = (%fft,))")) == (
        "Unsupported ir element type: complex<f32>, at the operator aten.view_as_real.default"
    )
    named = "Lowering not found: aten.lgamma.default"
    assert answering.told(RuntimeError(f"{named}\nWhile executing %l : [target=torch.ops.aten.lgamma.default]")) == named
    assert answering.told(RuntimeError()) == "RuntimeError"


def test_a_converter_ends_with_the_exporter_that_asked_it(tmp_path: Path) -> None:
    """Else one that hangs would hang for ever, and write into a folder that is the next run's."""
    waiting = (
        f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(600)"
    )
    converter = f"from components.converters.answering import answer\ndef convert(request):\n    {waiting}\nanswer(convert)"
    asked = "input=json.dumps({'parent': os.getpid()}), text=True"
    asking = f"import json, os, subprocess, sys\nsubprocess.run([sys.executable, '-c', {converter!r}], {asked})"
    exporter = subprocess.Popen([sys.executable, "-c", asking], cwd=ROOT)
    try:
        pid = int(eventually(lambda: (tmp_path / "pid").read_text() if (tmp_path / "pid").is_file() else ""))
        assert Path(f"/proc/{pid}").exists() or sys.platform != "linux"
    finally:
        exporter.kill()
        exporter.wait()
    try:
        eventually(lambda: "" if runs(pid) else "ended")
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        raise


@pytest.mark.parametrize("module", ["components.export", "components.converters.coreml"])
def test_what_was_asked_by_a_run_that_is_gone_by_now_is_not_begun(module: str) -> None:
    """It was killed while the process that it asked was being imported."""
    done = subprocess.run(
        [sys.executable, "-m", module], input='{"parent": 1, "kind": "none"}', capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Traceback" not in done.stderr


def eventually(look: Any) -> str:
    deadline = time.monotonic() + 60
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.05)
    return str(found)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_engine_whose_environment_is_not_here_is_not_built_and_not_served(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.targets.litert._ENVIRONMENT", "strange")
    (environment / ".lock").unlink()
    targets = [{"target": "litert", "required": False}, {"target": "openvino"}]
    config = ExportConfig.model_validate_json(json.dumps({"targets": targets, "serving": "openvino-fp32"}))
    assert "make environment NAME=strange" in export.absent(config)["litert-fp32"]
    with pytest.raises(ConfigError, match="export.serving is litert-fp32: not built here"):
        export.absent(config.model_copy(update={"serving": "litert-fp32"}))


def test_an_edit_of_a_converter_or_its_lock_makes_its_engines_anew(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("litert", "coreml"):
        file, converter = ROOT / "components" / "targets" / f"{name}.py", ROOT / "components" / "converters" / f"{name}.py"
        assert converter in plugins._imports(file)
        monkeypatch.setattr(f"components.targets.{name}._ENVIRONMENT", "strange")
        before = plugins.load("targets", name).built_by()
        environments.lock("strange").write_text(f"{name}\n")
        assert plugins.load("targets", name).built_by() != before


@pytest.fixture(scope="module")
def network() -> tuple[Any, dict[str, Any]]:
    """The program of a small network that normalises after some convolutions and not after others, and its weights."""
    import torch

    torch.manual_seed(0)
    module = plugins.load("backbones", "small_cnn", {"image_size": 16, "width": 4, "embedding_dim": 8}).build().eval()
    for tensor in module.state_dict().values():
        if tensor.dtype.is_floating_point:
            tensor.uniform_(0.5, 2)
    program = torch.export.export(module, (torch.zeros(1, 1, 16, 16),)).run_decompositions({})
    return program, {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}


def placed(program: Any, arrays: dict[str, Any], weights: dict[str, Any]) -> list[tuple[str, Any]]:
    """Arrays at the operations that take them: a convolution's at the first, what normalises it at the second."""
    at = {}
    for one in expected(program, weights, ""):
        for name in one.names:
            is_convolution = len(one.operations) == 1 or name.split(".")[0] in ("0", "4", "7", "11")
            at[name] = one.operations[0 if is_convolution else 1]
            if is_convolution:
                # Folding makes one where there was none.
                at.setdefault(f"{name.split('.')[0]}.bias", one.operations[-1])
    return [(at[name], array) for name, array in arrays.items() if name in at]


def folded(weights: dict[str, Any]) -> dict[str, Any]:
    """The arrays that a converter keeps which folds each normalisation into the convolution before it, in fp32 as it does."""
    held = dict(weights)
    for convolution, normalisation in ((4, 5), (7, 8), (11, 12)):
        gamma, beta, mean, variance = (
            held.pop(f"{normalisation}.{part}") for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / np.sqrt(variance + np.float32(1e-5))
        held[f"{convolution}.weight"] = held[f"{convolution}.weight"] * scale[:, None, None, None]
        held[f"{convolution}.bias"] = beta - mean * scale
    return held


def test_weights_are_found_as_they_are_and_folded(network: tuple[Any, dict[str, Any]]) -> None:
    program, weights = network
    wanted = expected(program, weights, "")
    assert sorted(name for one in wanted for name in one.names) == sorted(
        name for name in weights if not name.endswith("num_batches_tracked")
    )
    whole = placed(program, weights, weights)
    assert compare(wanted, whole, np.float32) == 0
    assert in_place(wanted, whole) == sum(len(one.names) for one in wanted)
    assert 0 < compare(wanted, placed(program, folded(weights), weights), np.float32) < 1e-6
    # What a file names otherwise is looked for everywhere, and is told.
    unnamed = [("", array) for _, array in whole]
    assert (compare(wanted, unnamed, np.float32), in_place(wanted, unnamed)) == (0, 0)
    halved = {name: array.astype(np.float16) for name, array in weights.items()}
    assert compare(wanted, placed(program, halved, weights), np.float16) == 0
    # A value of a millionth keeps two digits in fp16, and not every converter rounds to the same ones.
    tiny = {**weights, "16.bias": weights["16.bias"] * np.float32(1e-6)}
    near = np.nextafter(tiny["16.bias"].astype(np.float16), np.float16(1))
    found = placed(program, {**halved, "16.bias": near}, weights)
    assert 0 < compare(expected(program, tiny, ""), found, np.float16) < 1e-3
    with pytest.raises(ValueError, match="is not the checkpoint's"):
        compare(wanted, placed(program, halved, weights), np.float32)


def test_two_layers_of_one_shape_that_were_exchanged_or_are_one_are_refused(network: tuple[Any, dict[str, Any]]) -> None:
    program, weights = network
    wanted = expected(program, weights, "")
    for arrays in (weights, folded(weights)):
        first, second = ("5.bias", "8.bias") if "5.bias" in arrays else ("4.bias", "7.bias")
        assert arrays[first].shape == arrays[second].shape
        exchanged = {**arrays, first: arrays[second], second: arrays[first]}
        with pytest.raises(ValueError, match="5.bias.* is not the checkpoint's"):
            compare(wanted, placed(program, exchanged, weights), np.float32)
    # A layer that is missing is not there because another one of the same values is.
    twins = {**weights, "8.bias": weights["5.bias"]}
    (operation,) = {at for at, array in placed(program, twins, twins) if array is twins["8.weight"]}
    missing = [
        (at, array) for at, array in placed(program, twins, twins) if at != operation or array is not weights["5.bias"]
    ]
    assert len(missing) == len(placed(program, twins, twins)) - 1
    with pytest.raises(ValueError, match="8.bias"):
        compare(expected(program, twins, ""), missing, np.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda held: held["0.weight"].__imul__(1 + 1e-3 * (held["0.weight"] == held["0.weight"].max())),
            "0.weight .* of their",
        ),
        (lambda held: held["5.weight"].fill(np.nan), "5.weight"),
        (lambda held: held.popitem(), "17.bias|18.bias|16.bias"),
        (lambda held: held["0.weight"].__imul__(held["0.weight"].max() / held["0.weight"]), "0.weight"),
        (lambda held: held.update({"4.weight": held["4.weight"][::-1]}), "4.weight"),
    ],
    ids=["one value is another", "not a number", "a tensor is missing", "all values are one", "filters are permuted"],
)
def test_weights_that_are_not_the_checkpoints_are_refused_by_name(
    network: tuple[Any, dict[str, Any]], change: Any, words: str
) -> None:
    program, weights = network
    held = {name: array.copy() for name, array in weights.items()}
    change(held)
    with pytest.raises(ValueError, match=words):
        compare(expected(program, weights, ""), placed(program, held, weights), np.float32)


def test_a_program_of_other_weights_is_refused(network: tuple[Any, dict[str, Any]]) -> None:
    program, weights = network
    with pytest.raises(ValueError, match=r"uses 0\.weight, which the checkpoint does not hold"):
        expected(program, {name: array for name, array in weights.items() if name != "0.weight"}, "")


def test_a_package_that_says_something_else_of_itself_is_refused() -> None:
    request = {"shape": [1, 3, 8, 8], "classes": ["a", "b"], "embedding_dim": 5, "preprocessing": {"mean": [0.5]}}
    said = coreml.wanted(request)
    coreml.differs(said, coreml.wanted(request))
    for name, other in (
        ("classes", ["b", "a"]),
        ("input images", ("GRAYSCALE", 8, 8)),
        ("output logits", ("FLOAT32", 1, 3)),
    ):
        with pytest.raises(ValueError, match=f"its {name} is "):
            coreml.differs({**said, name: other}, coreml.wanted(request))
    with pytest.raises(ValueError, match="its output more is .*, expected no such thing"):
        coreml.differs({**said, "output more": ("FLOAT32", 1, 2)}, coreml.wanted(request))


def make(name: str) -> None:
    """The environment, by the command that its absence names."""
    if environments.absent(name):
        done = subprocess.run(["make", "environment", f"NAME={name}"], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode and "Failed to fetch" in done.stderr:
            pytest.skip(f"an index of packages is not reachable: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr
    assert environments.absent(name) == ""


def checkpoint(
    folder: Path, backbone: str, settings: dict[str, Any], *, is_pruned: bool = False
) -> tuple[Stored[Checkpoint], Any]:
    """A network whose normalisations do something, with all of its channels or not, and its checkpoint in `folder`."""
    import torch
    from small_network import pruned, record_of

    from components.checkpoints import assemble

    member = plugins.load("backbones", backbone, settings)
    torch.manual_seed(0)
    module = assemble(member, plugins.load("tasks", "classification"), len(KINDS)).eval()
    for name, tensor in module.state_dict().items():
        if tensor.ndim == 1 and tensor.dtype.is_floating_point:
            tensor.uniform_(0.5, 1.5) if name.endswith(("var", "weight")) else tensor.normal_(0, 0.1)
    record = (pruned if is_pruned else record_of)(module, backbone, settings, member, folder)
    return Stored(record, folder), module


def request_of(stored: Stored[Checkpoint], precision: Any = "fp32") -> ExportRequest:
    nothing: Any = None
    return ExportRequest(stored, Path("no graph"), precision, nothing, nothing, nothing)


NETWORKS = [
    ("lenet5", {}, False),
    ("resnet18", {"image_size": 32}, False),
    ("timm", {"architecture": "convnext_atto", "image_size": 32}, False),
    ("small_cnn", {"image_size": 16}, True),
    ("resnet18", {"image_size": 32}, True),
    ("efficientnet_lite0", {"image_size": 64}, True),
    ("timm", {"architecture": "vit_tiny_patch16_224", "image_size": 32}, True),
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("backbone", "settings", "is_pruned"), NETWORKS)
def test_a_tflite_file_passes_the_gate_of_parity(
    backbone: str, settings: dict[str, Any], is_pruned: bool, tmp_path: Path
) -> None:
    import torch

    make("litert")
    stored, module = checkpoint(tmp_path, backbone, settings, is_pruned=is_pruned)
    target, out = plugins.load("targets", "litert"), tmp_path / "engine"
    out.mkdir()
    built = target.export(request_of(stored), out=out)
    assert [path.name for path in out.iterdir()] == [built.entry]
    evidence = whole_evidence()
    engine = evidence.engine.model_copy(update={"entry": built.entry, "precision": "fp32", "classes": KINDS})
    labels = tuple(kind for kind in KINDS for _ in range(50))
    side = stored.record.preprocessing.height
    grey = np.stack([picture(kind, seed, side=side) for seed, kind in enumerate(labels)])[..., None]
    pictures = np.repeat(grey, stored.record.preprocessing.channels, axis=3)
    found, embedding = target.load(Stored(engine, out), num_threads=2).predict(pictures)
    with torch.inference_mode():
        wanted, of_network = (part.numpy() for part in module(torch.from_numpy(pictures)))
    assert np.abs(embedding - of_network).max() < 1e-3 * np.abs(of_network).max()
    names = tuple(str(number) for number in range(len(labels)))
    answers, reference = (
        Answers(names, labels, logits, KINDS, plugins.load("tasks", "classification")) for logits in (found, wanted)
    )
    judged = plugins.load("gates", "parity").judge(
        dataclasses.replace(evidence, engine=engine, answers=answers, reference=reference)
    )
    assert judged.status == "pass", judged.message
    assert judged.n == len(labels)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("backbone", "settings", "is_pruned"), NETWORKS)
def test_a_core_ml_package_holds_the_checkpoint(
    backbone: str, settings: dict[str, Any], is_pruned: bool, tmp_path: Path
) -> None:
    make("coreml")
    stored, module = checkpoint(tmp_path, backbone, settings, is_pruned=is_pruned)
    tensors = [name for name in module.state_dict() if not name.endswith("num_batches_tracked")]
    target = plugins.load("targets", "coreml")
    for precision in ("fp32", "fp16"):
        out = tmp_path / precision
        out.mkdir()
        built = target.export(request_of(stored, precision), out=out)
        assert built.facts["weights_compared"] == len(tensors)
        # In fp16 coremltools gives the first of several linear layers another name.
        assert 0 < float(built.facts["weights_in_place"]) <= len(tensors)
        assert float(built.facts["weights_max_difference"]) < (1e-6 if precision == "fp32" else 1e-3)
        # Nothing else: the package's own manifest names these, and what crossed to the converter is gone.
        assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
            "model.mlpackage/Data/com.apple.CoreML/model.mlmodel",
            "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
            "model.mlpackage/Manifest.json",
        ]
        engine = whole_evidence().engine.model_copy(update={"entry": built.entry})
        with pytest.raises(EngineUnavailable, match="built, not executed here"):
            target.load(Stored(engine, out), num_threads=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tensor", ["backbone.3.weight", "mean"])
def test_a_package_of_another_network_than_the_checkpoint_is_no_engine(
    tensor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a converter mixes weights up, or scales otherwise."""
    import torch

    from components import checkpoints

    make("coreml")
    stored, module = checkpoint(tmp_path, "lenet5", {})
    with torch.no_grad():
        dict([*module.named_parameters(), *module.named_buffers()])[tensor].view(-1)[0] *= 1.01
    monkeypatch.setattr(checkpoints, "restore", lambda _: module)
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match=f"what it holds for {tensor}.* is not the checkpoint's"):
        plugins.load("targets", "coreml").export(request_of(stored), out=tmp_path / "out")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", ["litert", "coreml"])
def test_an_operator_that_a_converter_lacks_is_named(target: str, tmp_path: Path) -> None:
    make(target)
    (tmp_path / "plugins" / "backbones").mkdir(parents=True)
    source = (ROOT / "components" / "backbones" / "lenet5.py").read_text()
    special = "class Special(nn.Module):\n            def forward(self, x):\n                return x.lgamma()\n"
    source = source.replace(
        "from torch import nn\n\n        return", f"from torch import nn\n\n        {special}\n        return", 1
    )
    source = source.replace("nn.Linear(120, 84), nn.ReLU()", "nn.Linear(120, 84), Special()")
    (tmp_path / "plugins" / "backbones" / "special.py").write_text(source)
    plugins.use_workspace(tmp_path / "plugins")
    stored, _ = checkpoint(tmp_path, "special", {})
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match=f"the converter of {target} could not convert this network: .*lgamma"):
        plugins.load("targets", target).export(request_of(stored), out=tmp_path / "out")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_engines_for_phones_are_built_judged_and_recorded(trained: Path, tmp_path: Path, prefect_server: str) -> None:
    for name in ("litert", "coreml"):
        make(name)
    root = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    targets = (
        "export.targets=[{target: openvino, precision: int8}, {target: litert}, {target: coreml, required: false}, "
        "{target: coreml, precision: fp16, required: false}]"
    )
    done = visionloop("train", "-r", "smoke", "--set", targets, "--json", cwd=root)
    assert done.returncode == 0, done.stderr + done.stdout
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    status = {finding["engine"]: finding["engine_status"] for finding in summary["findings"]}
    assert status["litert-fp32"] == status["openvino-int8"] == "pass"
    assert status["coreml-fp32"] == status["coreml-fp16"] == "not executed here"
    (found,) = (finding for finding in summary["findings"] if finding["engine"] == "coreml-fp16")
    assert "built, not executed here: Core ML runs on Apple's systems alone" in found["message"]
    records = [
        Engine.read(json.loads(path.read_text())["record"])
        for path in (root / ".visionloop" / "store" / "export").glob("coreml-*/*/manifest.json")
    ]
    assert {record.name for record in records} == {"coreml-fp32", "coreml-fp16"}
    assert all(int(record.facts["weights_compared"]) == 24 for record in records)
