"""`visionloop engine bundle` and `engine verify`: what leaves a workspace, and what is said of what came."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import MODEL, as_served, png, smoke_release, unpacked
from shapes import visionloop

from components import bundles, signatures


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a champion, which an older commit made."""
    return unpacked(tmp_path_factory.mktemp("older"))


def answer(*arguments: str, cwd: Path, status: int = 0) -> dict[str, Any]:
    done = visionloop("engine", *arguments, "--json", cwd=cwd)
    assert done.returncode == status, (arguments, done.stdout, done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_the_champions_engine_leaves_and_is_verified_elsewhere(
    older: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    stranger = signatures.own_key(tmp_path / "stranger").with_name("key.pub")
    foreign = answer("verify", str(out), "--key", str(stranger), cwd=tmp_path, status=1)
    assert "it is not signed by the key key.pub" in foreign["problem"]
    assert answer("verify", str(out), "--key", str(out), cwd=tmp_path, status=2)["error"] == "ConfigError"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "openvino", None)
        unable = answer("verify", str(out), cwd=tmp_path, status=2)
    assert unable["error"] == "EngineUnavailable"
    assert "run: python -m pip install openvino" in unable["message"]
    with monkeypatch.context() as patch:
        patch.setattr(bundles.Answered, "problem", "the engine answers its golden vectors wrongly here")
        wrong = answer("verify", str(out), cwd=tmp_path, status=1)
    assert (wrong["verified"], wrong["golden"]["pictures"]) == (False, 16)
    out.write_bytes(out.read_bytes()[:-100])
    broken = answer("verify", str(out), cwd=tmp_path, status=1)
    assert (broken["verified"], broken["golden"]) == (False, None)
    assert "nothing of it was run" in broken["problem"]
    away = answer("verify", str(tmp_path / "away.zip"), cwd=tmp_path, status=2)
    assert away["error"] == "StoreError"


def test_an_engine_of_choice_leaves_signed_by_a_key_of_choice(older: Path, tmp_path: Path) -> None:
    key = signatures.own_key(tmp_path / "mine")
    out = tmp_path / "onnx"
    made = answer("bundle", "1", "--engine", "onnxruntime-fp32", "--signing-key", str(key), "--out", str(out), cwd=older)
    assert (made["engine"], made["public_key"]) == ("onnxruntime-fp32", None)
    assert 'It never answers "unsure"' in (out / "model-card.md").read_text()
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

    for reference in ("torch_reference-fp32", "torch_reference"):
        told = refused("1", "--engine", reference)
        assert told.startswith("torch_reference-fp32 is the yardstick that every engine is compared with: no gate judged it")
    assert refused("1", "--engine", "openvino-fp16").endswith("valid: onnxruntime-fp32, openvino-int8")
    assert "unknown version '7'; valid: 1" in refused("7")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def further(older: Path, tmp_path: Path) -> Path:
    """A copy of the workspace with what `engine build` leaves of two engines: one has the name of an own one of version 1."""
    from components.contracts.models import Engine
    from components.contracts.verdicts import Verdict
    from components.store import Store
    from flows.workspace.desk import desk
    from flows.workspace.judged_engines import further_folder

    root = Path(shutil.copytree(older, tmp_path / "workspace", symlinks=True))
    store = Store(root / ".visionloop" / "store")
    (exported,) = (store.root / "export" / "onnxruntime-fp32").iterdir()
    engine = store.open("export/onnxruntime-fp32", exported.name, Engine)
    gated = [store.open("gating", path.name, Verdict) for path in (store.root / "gating").iterdir()]
    judged = next(one for one in gated if one is not None and one.record.status == "pass")
    assert engine is not None
    verdict = next(one for one in judged.record.engines if one.engine == "onnxruntime-fp32")
    for key, precision in enumerate(("fp32", "fp16")):
        name = f"onnxruntime-{precision}"
        record = engine.record.model_copy(update={"name": name, "precision": precision, "runtime": "onnxruntime 9"})
        later = verdict.model_copy(update={"engine": name, "engine_digest": record.digest()})
        folder = further_folder(desk(root, None), "1", name)
        made: list[tuple[str, Any, str]] = [
            (f"export/{name}", record, f"4-export/{name}"),
            ("gating", judged.record.model_copy(update={"engines": (later,)}), "6-gating"),
        ]
        for kind, value, link in made:
            with store.writing(kind, f"later-{key}") as out:
                for file in record.files if value is record else ():
                    shutil.copyfile(engine.folder / file.name, out / file.name)
            stored = store.publish(kind, f"later-{key}", value, inputs={}, provenance={})
            (folder / link).parent.mkdir(parents=True, exist_ok=True)
            (folder / link).symlink_to(stored.folder)
    return root


def test_an_engine_that_was_built_later_leaves_with_what_its_gates_said(
    further: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.cli.engine import engine_verify
    from flows.workspace.desk import desk
    from flows.workspace.engines import bundle_engine

    where = desk(further, None)
    out = tmp_path / "later"
    made = bundle_engine(where, "1", "onnxruntime-fp16", out).record
    assert (made.engine.name, made.built_later, made.threshold) == ("onnxruntime-fp16", True, None)
    (parity,) = (found for found in made.gates if found.gate == "parity")
    assert parity.status == "pass"
    assert "## The engine of this bundle: onnxruntime-fp16" in (out / "model-card.md").read_text()
    engine_verify(out)
    told = capsys.readouterr().out
    assert "its gates said, after its version was registered:" in told
    assert f"  parity: pass; {parity.message}" in told
    # Of one name there is the version's own, and one that was built later.
    assert not bundle_engine(where, "1", "onnxruntime-fp32", tmp_path / "own").record.built_later
    assert bundle_engine(where, "1", "onnxruntime-fp32", tmp_path / "second", built_later=True).record.built_later


def test_an_engine_that_was_built_later_leaves_only_with_its_proof(
    further: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.contracts.errors import ConfigError
    from components.contracts.verdicts import Finding
    from flows.workspace import engines
    from flows.workspace.desk import desk
    from flows.workspace.judged_engines import further_engine, further_folder

    where = desk(further, None)
    found = further_engine(where, "1", "onnxruntime-fp16")
    assert found is not None
    stored, judged = found

    def refused(why: str, findings: list[Finding], status: Any) -> None:
        verdict = judged.model_copy(update={"findings": tuple(findings), "status": status})
        with monkeypatch.context() as patch:
            patch.setattr(engines, "further_engine", lambda *_: (stored, verdict))
            with pytest.raises(ConfigError, match=why):
                engines.bundle_engine(where, "1", "onnxruntime-fp16", tmp_path / "out")

    parity = next(one for one in judged.findings if one.gate == "parity")
    others = [one for one in judged.findings if one is not parity]
    refused("nothing shows that it answers as that version does", others, "pass")
    away = parity.model_copy(update={"status": "not executed here", "message": "Core ML runs on Apple's systems alone"})
    refused("it is built, not executed here: parity: Core ML", [away], "not executed here")
    few = parity.model_copy(update={"status": "inconclusive", "message": "too few images"})
    refused("it is undecided: parity: too few images", [*others, few], "inconclusive")
    (gating,) = further_folder(where, "1", "onnxruntime-fp16").glob("*-gating")
    gating.unlink()
    with pytest.raises(
        ConfigError, match="was built and not judged.*`visionloop engine build 1 --target onnxruntime -p fp16`"
    ):
        engines.bundle_engine(where, "1", "onnxruntime-fp16", tmp_path / "out")
    with pytest.raises(
        ConfigError, match="unknown engine built later of version 1 'openvino-int8'; valid: onnxruntime-fp16"
    ):
        engines.bundle_engine(where, "1", "openvino-int8", tmp_path / "out", built_later=True)
    assert [path.name for path in tmp_path.iterdir()] == ["workspace"]


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
    shown = visionloop("engine", "bench", str(out), *few, cwd=tmp_path)
    assert "from encoded bytes" in shown.stdout
    assert "[1/1] timing ..." in shown.stderr
    (tmp_path / "no.png").write_bytes(b"GIF89a")
    for name, why in (("no.png", "cannot be decoded: a GIF"), ("away.png", "cannot be read (No such file")):
        refused = answer("bench", str(out), "--picture", str(tmp_path / name), *few, cwd=tmp_path, status=2)
        assert refused["error"] == "ConfigError"
        assert f"{name} {why}" in refused["message"]
    mistyped = answer("bench", "bundel", *few, cwd=older, status=2)
    assert "bundel is not there, and no version either" in mistyped["message"]
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
