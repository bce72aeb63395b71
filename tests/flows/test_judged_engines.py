"""Which engines of which versions passed, why others did not, and one more engine of a version that is registered."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from served import MODEL, unpacked
from shapes import visionloop

from flows.workspace.desk import Desk
from flows.workspace.judged_engines import judged_engines
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace
from registry.ledger import Ledger
from registry.models import FLOW


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a champion, which an older commit made."""
    return unpacked(tmp_path_factory.mktemp("older"))


def answer(*arguments: str, cwd: Path, status: int = 0) -> Any:
    done = visionloop("engine", *arguments, "--json", cwd=cwd)
    assert done.returncode == status, (arguments, done.stdout, done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_every_engine_is_listed_with_what_its_gates_said(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")

    def row(kind: Any, status: str, told: list[tuple[str, str, str]], **more: Any) -> None:
        engines = sorted({engine for engine, _, _ in told} - {"tensorrt-fp32"})
        ledger.append(
            kind,
            model=MODEL,
            subject=more["run"],
            actor=FLOW,
            body={
                "status": status,
                "bound": {"engines": dict.fromkeys(engines, "0" * 64), "serving": "openvino-int8"},
                "summary": {
                    "run": more["run"],
                    "findings": [{"engine": e, "gate": "accuracy", "status": s, "message": m} for e, s, m in told],
                    # An engine that no gate was asked about proves nothing.
                    "policy": {"engines": {"onnxruntime-fp32": {"required": True}}},
                },
                **({"version": "1"} if kind == "requested" else {"reasons": ["too low"]}),
            },
            key=more["run"],
        )

    row("rejected", "fail", [("openvino-int8", "fail", "accuracy 0.5, floor 0.9")], run="first")
    row(
        "requested",
        "pass",
        [
            ("openvino-int8", "pass", "good"),
            ("litert-int8", "not executed here", "no runtime for it"),
            ("tensorrt-fp32", "not executed here", "no TensorRT on this platform"),
            ("coreml-fp16", "pass", "good"),
            ("coreml-fp16", "inconclusive", "too few test images"),
        ],
        run="second",
    )
    workspace = Workspace(tmp_path)
    desk = Desk(workspace, read_settings(workspace.state), ledger, MODEL)
    found = judged_engines(desk)
    assert {(one.version, one.run, one.version_status) for one in found} == {("1", "second", "waiting")}
    assert {one.engine: (one.status, one.why, one.serves) for one in found} == {
        "onnxruntime-fp32": ("inconclusive", (), False),
        "openvino-int8": ("passed", (), True),
        "litert-int8": ("built, not executed here", ("accuracy: no runtime for it",), False),
        "tensorrt-fp32": ("not built here", ("accuracy: no TensorRT on this platform",), False),
        "coreml-fp16": ("inconclusive", ("accuracy: too few test images",), False),
    }
    refused = [one for one in judged_engines(desk, every=True) if one.version is None]
    assert {(one.engine, one.target, one.precision, one.status) for one in refused} == {
        ("openvino-int8", "openvino", "int8", "failed"),
        ("onnxruntime-fp32", "onnxruntime", "fp32", "inconclusive"),
    }


def test_one_more_engine_of_a_version_is_judged_as_its_own_and_changes_no_version(older: Path, tmp_path: Path) -> None:
    before = visionloop("history", "--json", cwd=older).stdout
    made = answer("build", "--target", "openvino", "--precision", "fp32", cwd=older)
    assert (made["version"], made["engine"], made["status"], made["was_there"]) == ("1", "openvino-fp32", "passed", False)
    assert {one["gate"] for one in made["findings"]} == {"accuracy", "class_recall", "parity", "latency", "no_regression"}
    again = answer("build", "1", "--target", "openvino", cwd=older)
    assert (again["was_there"], again["folder"], again["status"]) == (True, made["folder"], "passed")
    listed = {one["engine"]: one for one in answer("list", cwd=older)["engines"]}
    assert {name: (one["built_later"], one["serves"]) for name, one in listed.items()} == {
        "openvino-int8": (False, True),
        "onnxruntime-fp32": (False, False),
        "openvino-fp32": (True, False),
    }
    assert visionloop("history", "--json", cwd=older).stdout == before
    assert visionloop("runs", "--json", cwd=older).stdout.count('"openvino-fp32"') == 0
    bundled = answer("bundle", "1", "--engine", "openvino-fp32", "--out", str(tmp_path / "openvino.zip"), cwd=older)
    assert (bundled["engine"], bundled["built_later"]) == ("openvino-fp32", True)
    # What it was made of stays as long as it is listed.
    assert visionloop("store", "gc", "--keep-runs", "1", cwd=older).returncode == 0
    assert answer("build", "1", "--target", "openvino", cwd=older)["was_there"]


def test_what_cannot_be_built_is_told_before_any_work(older: Path, tmp_path: Path) -> None:
    def refused(*arguments: str, kind: str, cwd: Path = older) -> str:
        told = answer("build", *arguments, cwd=cwd, status=2)
        assert told["error"] == kind
        return str(told["message"])

    assert "unknown version '7'; valid: 1" in refused("7", "--target", "openvino", kind="UnknownName")
    assert "valid: " in refused("--target", "openvin", kind="UnknownName")
    assert "max_calibration_images" in refused("-t", "openvino", "--setting", "images=3", kind="UnknownName")
    assert "form key=value" in refused("--target", "openvino", "--setting", "images", kind="ConfigError")
    assert "is the yardstick" in refused("--target", "torch_reference", kind="ConfigError")
    told = refused("--target", "openvino", "--precision", "int4", kind="UnknownName")
    assert told == "unknown precision 'int4'; valid: fp16, fp32, int8"
    copy = Path(shutil.copytree(older, tmp_path / "copy", symlinks=True))
    pictures = sorted((copy / "data").rglob("*.png"))
    for picture in pictures:
        os.rename(picture, picture.with_suffix(".gone"))
    told = refused("--target", "openvino", kind="DataDiffers", cwd=copy)
    assert "are not in data/ as they were" in told
    assert "visionloop data pull" in told
