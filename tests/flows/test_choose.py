"""A choice through the command line, on small real pictures that a training has seen before."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from searched import recipe_of
from shapes import stored, visionloop

from components import environments
from components.contracts.errors import ConfigError
from components.contracts.models import Checkpoint
from components.store import Store, read_manifest
from flows.choosing.expansion import expanded

CHOICE = """
choice:
  passes: [[], [{pass: prune, settings: {share: 0.4}}]]
  targets: [{target: onnxruntime}, {target: openvino, precision: int8}, {target: coreml}]
  objective: smallest
  within: 0.3
"""
_GATES = (
    "gating.gates=[{gate: accuracy, settings: {floor: 0.5}}, {gate: class_recall, settings: {floor: 0.1, min_images: 3}}, "
    "{gate: parity, settings: {min_images: 20, min_proven: 0.5, min_agreement: {int8: 0.8}}}]"
)


def run(root: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    done = visionloop("choose", "-r", "smoke", "-s", _GATES, "--json", *arguments, cwd=root)
    assert done.stdout.strip(), done.stderr
    return done.returncode, json.loads(done.stdout.strip().splitlines()[-1]), done.stderr


def artefacts(root: Path) -> dict[Path, float]:
    folders = (root / ".visionloop" / "store").glob("[!.]*/**/manifest.json")
    return {path: path.stat().st_mtime for path in folders}


@pytest.fixture(scope="module", autouse=True)
def _no_core_ml() -> Iterator[None]:
    """Whether a machine has the environments of converters is not what these tests are about."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(environments, "absent", lambda name: f"it needs the environment {name}")
        yield


@pytest.fixture(scope="module")
def chosen(trained: Path, tmp_path_factory: pytest.TempPathFactory, _no_core_ml: None) -> tuple[Path, dict[str, Any]]:
    """A workspace in which a choice died in the middle and went on; its test images held no picture all the time."""
    from components.evaluation import evaluate
    from components.samples import rows
    from flows.training import steps

    root = Path(shutil.copytree(trained, tmp_path_factory.mktemp("chosen") / "workspace", symlinks=True))
    recipe = root / "recipes" / "smoke.yaml"
    recipe.write_text(recipe.read_text() + CHOICE)
    splitting, spoiled = steps.splitting, dict[Path, bytes]()

    def spoil(of: Any, dataset: Any) -> Any:
        found = splitting(of, dataset)
        for path in (of.workspace.data / name for name in rows(found, "test")["path"]):
            spoiled.setdefault(path, path.read_bytes())
            path.write_bytes(b"not a picture")
        return found

    def die(engine: Any, *others: Any, **named: Any) -> Any:
        if engine.record.name == "openvino-int8" and len(list((root / ".visionloop/store/optimisation").glob("*"))):
            raise RuntimeError("died in the middle")
        return evaluate(engine, *others, **named)

    def restore() -> None:
        for path, content in spoiled.items():
            path.write_bytes(content)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(steps, "splitting", spoil)
        patched.setattr("flows.choosing.finding_out.evaluate", die)
        status, _, _ = run(root)
        assert status == 2
        patched.setattr("flows.choosing.finding_out.evaluate", evaluate)
        restore()  # the pinned bytes are looked at when a command begins
        status, summary, said = run(root)
    restore()
    assert len(spoiled) > 40
    assert status == 0, (summary, said)
    summary["said"] = said
    return root, summary


def test_variants_share_the_stages_of_a_training_and_what_died_goes_on(chosen: tuple[Path, dict[str, Any]]) -> None:
    root, summary = chosen
    found = {(one["passes"], one["engine"]): one for one in summary["variants"]}
    assert len(found) == 6
    assert {key for key, one in found.items() if one["status"] == "not executed here"} == {
        ("no pass", "coreml-fp32"),
        ("prune share=0.4", "coreml-fp32"),
    }
    assert "it needs the environment coreml" in found["no pass", "coreml-fp32"]["told"]
    # All but the times and two tables of answers was there, of the training and of the choice that died.
    computed = re.findall(r"^\[\d/9\] (.*): [\d.]+ s$", summary["said"], re.MULTILINE)
    assert computed == ["evaluation openvino-int8-valid", "evaluation times"]
    # What is compared are the valid images: the training said the same of its network.
    plain = found["no pass", "onnxruntime-fp32"]
    assert plain["headline"]["n"] == summary["num_valid"] == 18
    unpruned = [one for one in (root / ".visionloop" / "store" / "training").iterdir() if (one / "manifest.json").exists()]
    assert len(unpruned) == 1
    assert plain["headline"]["value"] == pytest.approx(stored(root, "training", Checkpoint).record.valid_metrics["accuracy"])
    for one in found.values():
        if one["status"] == "measured":
            assert one["core_hours"] == pytest.approx(1e6 / one["images_a_second"]["value"] / 3600 * summary["num_threads"])
            assert min(one["rounds_p50_ms"]) <= one["p50_ms"] <= max(one["rounds_p50_ms"])
            assert len(one["rounds_p50_ms"]) == 5
    able = [one for one in found.values() if one["status"] == "measured" and not one["missed"]]
    best = max(one["headline"]["value"] for one in able)
    near = [one for one in able if best - one["headline"]["value"] <= 0.3]
    assert summary["chosen"] == min(near, key=lambda one: one["size_bytes"])["name"]
    assert summary["chosen"].startswith("small_cnn / prune share=0.4 / ")
    assert (root / ".visionloop" / "choices" / "smoke" / "2-small_cnn-prune-share=0.4" / "3-optimisation").exists()


def test_the_chosen_recipe_finds_everything_and_is_judged_by_the_same_gates(chosen: tuple[Path, dict[str, Any]]) -> None:
    root, summary = chosen
    written = yaml.safe_load((root / "recipes" / "smoke-chosen.yaml").read_text())
    own = yaml.safe_load((root / "recipes" / "smoke.yaml").read_text())
    assert "choice" not in written
    assert written["chosen"]["choice_digest"] == summary["digest"]
    assert written["optimisation"] == {"passes": [{"pass": "prune", "settings": {"share": 0.4}}]}
    engine = next(one["engine"] for one in summary["variants"] if one["name"] == summary["chosen"])
    assert [f"{one['target']}-{one.get('precision', 'fp32')}" for one in written["export"]["targets"]] == [engine]
    assert written["export"]["serving"] == engine
    assert written["training"] == own["training"]
    assert [gate["gate"] for gate in written["gating"]["gates"]] == ["accuracy", "class_recall", "parity"]
    done = visionloop("train", "-r", "smoke-chosen", "--json", cwd=root)
    trained = json.loads(done.stdout.strip().splitlines()[-1])
    assert trained["outcome"] == "candidate", (trained, done.stderr)
    seconds = trained["seconds"]
    there = ["training", "optimisation", "export graph", "export torch_reference-fp32", f"export {engine}"]
    assert [stage for stage in there if not seconds[stage]["cached"]] == []
    assert trained["engines"][engine]["metrics"]["accuracy"]["n"] == trained["data"]["splits"]["test"]
    shown = visionloop("show", trained["version"], cwd=root).stdout
    assert f"It is variant {summary['chosen']} of recipe smoke, choice {summary['digest'][:16]}." in shown
    cards = [path.read_text() for path in (root / ".visionloop" / "mlflow-artifacts").rglob("model-card.md")]
    assert [card for card in cards if f"digest of the choice {summary['digest'][:16]}" in card]
    config = json.loads((Path(trained["run_folder"]) / "config.json").read_text())
    assert config["run"]["choice_digest"] == summary["digest"]


def test_the_page_needs_no_network_and_shows_what_was_found(chosen: tuple[Path, dict[str, Any]]) -> None:
    summary = chosen[1]
    text = Path(summary["page"]).read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    assert text.count("<svg") == 2
    assert f'<span class="badge pass">chosen</span> {summary["chosen"]}' in text
    assert "visionloop train --recipe smoke-chosen" in text
    for one in summary["variants"]:
        assert text.count(one["told"].replace("'", "&#39;")) >= 1
    assert text.count('<tr class="figures') == 4


def test_without_a_variant_within_the_limits_nothing_is_written(chosen: tuple[Path, dict[str, Any]]) -> None:
    root, _ = chosen
    path = root / "recipes" / "none.yaml"
    strict = ["-s", "export.serving=auto", "-s", "export.limits.p99_ms=0.0001", "--write", "none"]
    done = visionloop("choose", "-r", "smoke", "-s", _GATES, *strict, cwd=root)
    assert done.returncode == 1, done.stderr
    assert not path.exists()
    assert re.search(
        r"^chosen  none: no variant is within the recipe's limits; the nearest is .*: p99 latency", done.stdout, re.MULTILINE
    )
    assert done.stdout.count("at most 0.0001") == 5
    # Each is compared with its own network in torch, as where a training chooses what serves.
    assert "drop not measured" not in done.stdout
    path.write_text("name: mine\n")
    status, answer, _ = run(root, "--write", "none")
    assert (status, "is not what the choice of recipe 'smoke' wrote" in answer["message"]) == (2, True)
    assert path.read_text() == "name: mine\n"


def test_the_same_command_again_computes_nothing_and_times_are_taken_anew_when_asked(
    chosen: tuple[Path, dict[str, Any]],
) -> None:
    root, summary = chosen
    before, written = artefacts(root), (root / "recipes" / "smoke-chosen.yaml").read_bytes()
    status, again, _ = run(root)
    assert (status, again["digest"]) == (0, summary["digest"])
    assert artefacts(root) == before
    assert (root / "recipes" / "smoke-chosen.yaml").read_bytes() == written
    collected = visionloop("store", "gc", "--dry-run", "--json", cwd=root).stdout.strip().splitlines()[-1]
    unreached = {Path(each["folder"]) for each in json.loads(collected)["removed"]}
    assert not unreached & {path.parent for path in before}
    _, anew, _ = run(root, "--measure-again", "-s", "export.hourly_price=0.5")
    (changed,) = {path for path, time in artefacts(root).items() if before.get(path) != time}
    assert changed.parent.parent.name == "times"
    one = anew["variants"][0]
    assert one["cost"] == pytest.approx(one["core_hours"] / anew["num_threads"] * 0.5)
    assert anew["digest"] != summary["digest"]
    assert anew["digest"] in (root / "recipes" / "smoke-chosen.yaml").read_text()


def start_and_kill_at_something_new(root: Path, api: str, seen: set[tuple[str, str]], pause: float) -> bool:
    """Start the choice and kill -9 its process group a moment after it announces a stage that is not in `seen`, which grows
    by it; False where it came to its end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flows", "choose", "-r", "smoke", "-s", _GATES],
        cwd=root,
        env={**os.environ, "PREFECT_API_URL": api},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    network, told = "", []
    try:
        for line in process.stderr:
            told.append(line)
            if line.startswith("network "):
                network = line
            announced = re.match(r"\[\d/9\] (.*) \.\.\.$", line)
            if announced and (network, announced[1]) not in seen:
                seen.add((network, announced[1]))
                time.sleep(pause)
                return True
        assert process.wait() == 0, told
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stderr.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # some twenty starts of the command
def test_a_choice_killed_at_every_stage_ends_like_one_that_was_not(
    workspace: Path, tmp_path: Path, prefect_server: str
) -> None:
    recipe = workspace / "recipes" / "smoke.yaml"
    recipe.write_text(recipe.read_text() + CHOICE.replace(", {target: coreml}", ""))
    whole = Path(shutil.copytree(workspace, tmp_path / "whole", symlinks=True))
    rng, seen = random.Random(20261130), set[tuple[str, str]]()
    while start_and_kill_at_something_new(workspace, prefect_server, seen, pause=rng.uniform(0, 0.5)):
        for folder in Store(workspace / ".visionloop" / "store").artefacts():
            read_manifest(folder)
    # Both networks through their stages as far as the valid images, and the times of all engines.
    assert {"training", "optimisation", "evaluation openvino-int8-valid", "evaluation times"} <= {name for _, name in seen}
    assert len({network for network, _ in seen}) == 2
    (_, killed, _), (_, once, _) = run(workspace), run(whole)
    untimed = ("name", "status", "reason", "engine_digest", "headline", "worst_class", "difference", "size_bytes")
    assert [[one.get(key) for key in untimed] for one in killed["variants"]] == [
        [one.get(key) for key in untimed] for one in once["variants"]
    ]
    assert killed["chosen"] == once["chosen"]
    assert kinds(workspace) == kinds(whole)
    assert list((workspace / ".visionloop" / "store" / ".partial").iterdir()) == []


def kinds(root: Path) -> Counter[str]:
    """How many artefacts of each kind a workspace's store holds."""
    store = root / ".visionloop" / "store"
    return Counter(path.parent.parent.relative_to(store).as_posix() for path in artefacts(root))


_TWO = "targets: [{target: onnxruntime}, {target: openvino}]"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("", "has no section choice, so there is nothing to choose from; say what is compared, such as choice: {passes"),
        ("{targets: [{target: onnxruntime}]}", "1 x 1 x 1 (backbones, passes, targets) is one variant"),
        (f"{{{_TWO}, passes: [{', '.join(f'[{{pass: prune, settings: {{share: 0.{n}}}}}]' for n in range(10, 27))}]}}", "are too many"),
        ("{targets: [{target: onnxruntime}, {target: onnxruntime}]}", "targets names the same twice: onnxruntime-fp32"),
        ("{passes: [[], []]}", "passes names the same twice: entries 0 and another one are the same"),
        ("{targets: [{target: onnxruntime}, {target: torch_reference}]}", "is the yardstick and never served"),
        (f"{{{_TWO}, objective: quickest}}", "choice.objective: Input should be 'fastest'"),
        (f"{{{_TWO}, passes: [[], [{{pass: prun}}]]}}", "choice.passes.1 can be part of no variant: unknown pass 'prun'"),
        (f"{{{_TWO}, backbones: [{{backbone: resnet999}}, {{backbone: small_cnn}}]}}", "choice.backbones.0 can be part of no"),
        ("{targets: [{target: onnxruntime}, {target: openvino, precision: int4}]}", "unknown precision 'int4'; valid"),
        (f"{{{_TWO}, backbones: [{{backbone: small_cnn, values: {{gating.gates: 1}}}}]}}", "gating.gates is no key of training"),
        (f"{{{_TWO}, backbones: [{{backbone: small_cnn, values: {{training.weights: a}}}}]}}", "say backbone, settings and"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_any_work(tmp_path: Path, choice: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expanded(recipe_of(tmp_path, f"choice: {choice}\n" if choice else ""))
    assert message in str(caught.value)


def test_a_combination_that_cannot_be_is_told_and_the_others_stay(tmp_path: Path) -> None:
    passes = "passes: [[], [{pass: prune, settings: {share: 0.99}}]]"
    settings = ("{width: 4, embedding_dim: 8}", "{width: 64, embedding_dim: 64}")
    widths = ", ".join(f"{{backbone: small_cnn, settings: {each}}}" for each in settings)
    found = expanded(recipe_of(tmp_path, f"choice: {{{_TWO}, {passes}, backbones: [{widths}]}}\n"))
    names = [trunk.name for trunk in found.trunks]
    small, large = "small_cnn width=4 embedding_dim=8", "small_cnn width=64 embedding_dim=64"
    assert names == [f"{small} / no pass", f"{large} / no pass", f"{large} / prune share=0.99"]
    assert [(one.name, one.status) for one in found.left_out] == [
        (f"{small} / prune share=0.99 / {engine}-fp32", "impossible") for engine in ("onnxruntime", "openvino")
    ]
    assert "0.99 of the parameters cannot be taken from this network" in found.left_out[0].reason
    assert found.trunks[2].config.training.backbone_settings["width"] == 64
    # A choice says nothing of what a run of the recipe makes.
    plain = recipe_of(tmp_path, "").config
    assert found.recipe.config.to_run == plain
    assert not {"choice", "chosen"} & set(plain.to_json())


def test_gates_of_other_engines_do_not_follow_and_one_has_to_be_left(tmp_path: Path) -> None:
    gates = "gating.gates=[{gate: accuracy, settings: {floor: 0.5}, engines: [openvino-fp32]}]"
    with pytest.raises(
        ConfigError, match=r"choice.targets.0 can be part of no variant: .*no gate of the recipe judges onnx"
    ):
        expanded(
            recipe_of(
                tmp_path,
                f"choice: {{{_TWO}}}\n",
                "export.serving=openvino-fp32",
                "export.targets=[{target: openvino}]",
                gates,
            )
        )
    more = gates.replace("]}]", "]}, {gate: latency, settings: {max_p99_ms: 9}}]")
    own = ("export.serving=openvino-fp32", "export.targets=[{target: openvino}]", more)
    found = expanded(recipe_of(tmp_path, f"choice: {{{_TWO}}}\n", *own))
    (onnx, openvino) = found.trunks[0].targets
    assert "engines" not in str(found.with_engines({}, [onnx])["gating.gates"])
    assert [gate.get("engines") for gate in found.with_engines({}, [openvino]).get("gating.gates", [{}])] == [None]  # type: ignore[union-attr]
