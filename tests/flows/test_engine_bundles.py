"""`visionloop engine bundle` and `engine verify`: what leaves a workspace, and what is said of what came."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import MODEL, as_served, png, smoke_release, unpacked
from shapes import visionloop


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a champion, which an older commit made."""
    return unpacked(tmp_path_factory.mktemp("older"))


def answer(*arguments: str, cwd: Path, status: int = 0) -> dict[str, Any]:
    done = visionloop("engine", *arguments, "--json", cwd=cwd)
    assert done.returncode == status, (arguments, done.stdout, done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_the_champions_engine_leaves_and_is_verified_elsewhere(older: Path, tmp_path: Path) -> None:
    out = tmp_path / "champion.zip"
    made = answer("bundle", "--out", str(out), cwd=older)
    assert (made["version"], made["standing"], made["engine"], made["golden"]) == ("1", "champion", "openvino-int8", 16)
    assert made["bytes"] == out.stat().st_size
    public = tmp_path / "theirs.pub"
    public.write_bytes(Path(made["public_key"]).read_bytes())
    found = answer("verify", str(out), "--key", str(public), cwd=tmp_path)
    assert (found["verified"], found["origin_proven"], found["signer"]) == (True, True, made["signer"])
    assert found["golden"]["logit_difference"] <= found["golden"]["tolerance"]
    # The key that came with it shows nothing of where it came from, and that is said.
    told = visionloop("engine", "verify", str(out), cwd=tmp_path)
    assert (told.returncode, "Who made it is NOT shown" in told.stdout) == (0, True)
    out.write_bytes(out.read_bytes()[:-100])
    broken = answer("verify", str(out), cwd=tmp_path, status=1)
    assert (broken["verified"], broken["golden"]) == (False, None)
    assert "nothing of it was run" in broken["problem"]
    away = answer("verify", str(tmp_path / "away.zip"), cwd=tmp_path, status=2)
    assert away["error"] == "StoreError"


def test_an_engine_of_choice_leaves_signed_by_a_key_of_choice(older: Path, tmp_path: Path) -> None:
    from components import signatures

    key = signatures.own_key(tmp_path / "mine")
    out = tmp_path / "onnx"
    made = answer("bundle", "1", "--engine", "onnxruntime-fp32", "--signing-key", str(key), "--out", str(out), cwd=older)
    assert (made["engine"], made["public_key"]) == ("onnxruntime-fp32", None)
    assert answer("verify", str(out), "--key", str(key.with_name("key.pub")), cwd=tmp_path)["origin_proven"]
    licences = (out / "LICENCES.md").read_text()
    assert "| engine/ | trained from scratch (backbone small_cnn) |" in licences
    assert "not in the bundle (requirements.txt) | MIT License |" in licences
    assert (out / "model-card.md").read_text().startswith(f"# {MODEL}")
    np.save(out / "golden" / "logits.npy", np.zeros((16, 3), dtype=np.float32))
    assert "logits.npy was changed" in answer("verify", str(out), cwd=tmp_path, status=1)["problem"]


def test_what_may_not_leave_is_told(older: Path, tmp_path: Path) -> None:
    def refused(*arguments: str, status: int = 2) -> str:
        return str(answer("bundle", *arguments, "--out", str(tmp_path / "out"), cwd=older, status=status)["message"])

    # The yardstick is judged by no gate, and is no engine that leaves.
    assert refused("1", "--engine", "torch_reference-fp32").endswith("valid: onnxruntime-fp32, openvino-int8")
    assert "unknown version '7'; valid: 1" in refused("7")
    assert list(tmp_path.iterdir()) == []


def test_engines_that_did_not_pass_and_versions_that_were_rejected_do_not_leave(
    older: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.contracts.errors import ConfigError, DecisionRefused
    from components.contracts.verdicts import Verdict
    from flows.workspace import engines
    from flows.workspace.desk import desk

    read, state_of = Verdict.read.__func__, engines._state  # type: ignore[attr-defined]

    def failed(cls: type[Verdict], data: Any) -> Verdict:
        verdict: Verdict = read(cls, data)
        judged = tuple(found.model_copy(update={"status": "fail"}) for found in verdict.engines)
        return verdict.model_copy(update={"engines": judged})

    with monkeypatch.context() as patch:
        patch.setattr(Verdict, "read", classmethod(failed))
        with pytest.raises(ConfigError, match="engine openvino-int8 of version 1 did not pass its gates"):
            engines.bundle_engine(desk(older, None), None, None, tmp_path / "out")

    def rejected(*arguments: Any) -> Any:
        state = state_of(*arguments)
        return type(state)(**{**vars(state), "status": "rejected"})

    monkeypatch.setattr(engines, "_state", rejected)
    with pytest.raises(DecisionRefused, match="version 1 was rejected by .*; its engines do not leave"):
        engines.bundle_engine(desk(older, None), None, None, tmp_path / "out")


def test_the_engine_of_a_version_and_of_a_bundle_is_timed(older: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle.zip"
    answer("bundle", "--out", str(out), cwd=older)
    (tmp_path / "disc.png").write_bytes(png("disc", 3))
    few = ("--runs", "20", "--threads", "1", "--streams", "2")
    of_version = answer("bench", "1", "--engine", "onnxruntime-fp32", *few, cwd=older)
    of_bundle = answer("bench", str(out), "--picture", str(tmp_path / "disc.png"), *few, cwd=tmp_path)
    assert [(found["engine"], found["formats"]) for found in (of_version, of_bundle)] == [
        ("onnxruntime-fp32", {"PNG": 16}),
        ("openvino-int8", {"PNG": 1}),
    ]
    for found in (of_version, of_bundle):
        assert (found["threads"], found["streams"], len(found["processors"])) == (1, 2, 1)
        assert {"numpy", "pillow", "visionloop", found["engine"].split("-")[0]} == set(found["libraries"])
        assert found["single_stream_ms"]["picture"]["p99"]["n"] == 100
        assert found["offline_pictures_per_s"]["engine"]["value"] > 0
    shown = visionloop("engine", "bench", str(out), *few, cwd=tmp_path).stdout
    assert "from encoded bytes" in shown
    out.write_bytes(out.read_bytes()[:-50])
    assert answer("bench", str(out), *few, cwd=tmp_path, status=2)["error"] == "TamperedArtefact"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["openvino-int8", "onnxruntime-fp32"])
def test_the_program_answers_as_the_server_in_a_bare_environment(older: Path, tmp_path: Path, engine: str) -> None:
    """Only what requirements.txt lists is installed: the runtime, NumPy and Pillow, with what these need themselves."""
    out = tmp_path / "bundle"
    answer("bundle", "--engine", engine, "--out", str(out), cwd=older)
    bare = tmp_path / "bare"
    venv.EnvBuilder(with_pip=True).create(bare)
    python = str(bare / "bin" / "python")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path)

    pictures = [png(kind, seed) for kind in ("disc", "cross", "stripes") for seed in range(5)]
    paths = [tmp_path / f"{index}.png" for index in range(len(pictures))]
    for path, data in zip(paths, pictures, strict=True):
        path.write_bytes(data)
    before = run(str(out / "predict.py"), str(paths[0]))
    assert (before.returncode, "python -m pip install -r" in before.stderr) == (2, True)
    installed = run("-m", "pip", "install", "--quiet", "--no-input", "-r", str(out / "requirements.txt"))
    assert installed.returncode == 0, installed.stderr
    for absent in ("pydantic", "torch", "components"):
        assert run("-c", f"import {absent}").returncode == 1, absent
    done = run(str(out / "predict.py"), "--json", "--check", *map(str, paths))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["golden"]["right"]
    release = smoke_release(older)
    served = as_served(release, pictures)
    assert [one["label"] for one in found["answers"]] == [label for label, _ in served]
    if engine == "openvino-int8":
        threshold = release.record.decision.threshold
        assert [one["confidence"] for one in found["answers"]] == pytest.approx([share for _, share in served], abs=1e-3)
        assert [one["unsure"] for one in found["answers"]] == [share < threshold for _, share in served]
