from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from shapes import stored

from components import export
from components.contracts.data import Splits
from components.contracts.errors import ConfigError, ExportError
from components.contracts.models import Checkpoint, Engine
from components.contracts.records import Stored
from components.export import ExportConfig, Graph, TargetConfig


def build(trained: Path, out: Path, **config: Any) -> Engine:
    out.mkdir()
    return export.export(
        stored(trained, "training", Checkpoint),
        stored(trained, "export/graph", Graph),
        stored(trained, "splitting", Splits),
        trained / "data",
        TargetConfig.model_validate(config),
        out=out,
    )


def test_tensorrt_is_built_ahead_of_time_and_says_what_for(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX exists for Linux on x86-64 only")
    import torch

    from components import plugins
    from components.contracts.errors import EngineUnavailable

    engine = build(trained, tmp_path / "out", target="tensorrt")
    assert engine.size_bytes > 10_000
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: the flow executes the engine instead")
    assert engine.built_for == ("SM86", "SM89", "SM120")
    with pytest.raises(EngineUnavailable, match="built, not executed here"):
        plugins.load("targets", "tensorrt").load(Stored(engine, tmp_path / "out"), num_threads=1)


def test_an_unknown_gpu_generation_lists_the_valid_ones(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX exists for Linux on x86-64 only")
    with pytest.raises(ExportError, match="unknown compute capability 'SM1'; valid: .*SM86"):
        build(trained, tmp_path / "out", target="tensorrt", settings={"compute_capabilities": ["SM1"]})


def test_what_tensorrt_refuses_to_build_is_told_in_its_own_words(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX exists for Linux on x86-64 only")
    with pytest.raises(ExportError, match=r"built no engine: .*Turing \(SM75\): FP32 GEMM is not supported"):
        build(trained, tmp_path / "out", target="tensorrt", settings={"compute_capabilities": ["SM75"]})


def test_int8_without_enough_calibration_images_is_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas as pd

    splits = stored(trained, "splitting", Splits)
    table = pd.read_parquet(splits.folder / "splits.parquet")
    folder = tmp_path / "few"
    folder.mkdir()
    table.loc[table[table["split"] == "calibration"].index[3:], "split"] = "train"
    table.to_parquet(folder / "splits.parquet")
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="3 calibration images; int8 needs at least 10: raise splitting.calibration_share"):
        export.export(
            stored(trained, "training", Checkpoint),
            stored(trained, "export/graph", Graph),
            Stored(splits.record, folder),
            trained / "data",
            TargetConfig(target="openvino", precision="int8"),
            out=tmp_path / "out",
        )


def test_the_onnx_file_is_self_contained_and_has_a_dynamic_batch(trained: Path) -> None:
    import onnx

    graph = stored(trained, "export/graph", Graph)
    model = onnx.load(graph.folder / "model.onnx", load_external_data=False)
    assert not any(t.external_data for t in model.graph.initializer)
    # What its pictures have to be stands in the graph, and in what is built of it.
    fingerprint = stored(trained, "training", Checkpoint).record.preprocessing.digest()
    assert {p.key: p.value for p in model.metadata_props} == {"visionloop.preprocessing": fingerprint}
    (int8,) = (trained / ".visionloop" / "store" / "export" / "openvino-int8").rglob("model.xml")
    assert fingerprint in int8.read_text()
    (given,) = model.graph.input
    assert given.name == "images"
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert given.type.tensor_type.shape.dim[0].dim_param
    assert [output.name for output in model.graph.output] == ["logits", "embedding"]


def test_the_calibration_split_shares_no_picture_with_any_score(trained: Path) -> None:
    import pandas as pd

    splits = stored(trained, "splitting", Splits)
    table = pd.read_parquet(splits.folder / "splits.parquet")
    by_split = {name: set(group["picture"]) for name, group in table.groupby("split")}
    for one in by_split:
        for other in by_split:
            assert one == other or not by_split[one] & by_split[other]


def test_sections_that_cannot_work_are_refused() -> None:
    def config(**values: Any) -> ExportConfig:
        return ExportConfig.model_validate_json(json.dumps(values))

    with pytest.raises(ValueError, match="same engine twice"):
        config(targets=[{"target": "openvino"}, {"target": "openvino"}], serving="openvino-fp32")
    with pytest.raises(ValueError, match="never served"):
        config(targets=[{"target": "torch_reference"}], serving="torch_reference-fp32")
    with pytest.raises(ConfigError, match="has no precision 'fp16'; valid: fp32, int8"):
        export.check(config(targets=[{"target": "openvino", "precision": "fp16"}], serving="openvino-fp16"))
    for target, valid in (("litert", "fp32"), ("coreml", "fp32, fp16")):
        phone = {"target": target, "precision": "int8", "required": False}
        with pytest.raises(ConfigError, match=f"target '{target}' has no precision 'int8'; valid: {valid}$"):
            export.check(config(targets=[phone, {"target": "openvino"}], serving="openvino-fp32"))
    reference, *_ = config(targets=[{"target": "openvino"}], serving="openvino-fp32").all_targets
    assert reference.name == "torch_reference-fp32"


def test_an_engine_that_no_library_here_can_build_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Mac, where TensorRT does not exist."""
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name.startswith("tensorrt") else real(name, *a)
    )
    config = ExportConfig.model_validate_json(
        json.dumps({"targets": [{"target": "tensorrt"}, {"target": "openvino"}], "serving": "openvino-fp32"})
    )
    assert "not built here: no TensorRT library is installed; run: python -m pip" in export.absent(config)["tensorrt-fp32"]
    serving = config.model_copy(update={"serving": "tensorrt-fp32"})
    with pytest.raises(ConfigError, match="serve another engine"):
        export.absent(serving)


@pytest.mark.parametrize(
    ("target", "module", "package"),
    [
        ("onnxruntime", "onnxruntime", "onnxruntime"),
        ("openvino", "openvino", "openvino"),
        ("litert", "ai_edge_litert.interpreter", "ai-edge-litert"),
        ("tensorrt", "tensorrt_rtx", "tensorrt-rtx-cu13"),
    ],
)
def test_a_runtime_that_is_missing_is_told_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str, module: str, package: str
) -> None:
    from components import plugins
    from components.contract_checks import whole_evidence
    from components.contracts.errors import EngineUnavailable
    from components.targets import tensorrt

    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(tensorrt, "_has_gpu", lambda: True)
    engine = whole_evidence().engine.model_copy(update={"runtime": f"{module} 1"})
    with pytest.raises(EngineUnavailable, match=rf"is not installed \(.*\); run: python -m pip install {package}\b"):
        plugins.load("targets", target).load(Stored(engine, tmp_path), num_threads=1)
