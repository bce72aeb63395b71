"""What the digest of a member covers."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shapes import visionloop

from components import plugins
from components.checkpoints import blocks
from components.contracts.errors import PluginFailed

REPOSITORY = Path(__file__).resolve().parents[2]


def test_imports_of_compiled_code_are_those_of_its_text() -> None:
    found = 0
    for package in ("components", "flows", "monitoring", "registry", "serving"):
        for path in (REPOSITORY / package).rglob("*.py"):
            text, expected = path.read_bytes(), set[str]()
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                    expected |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                elif isinstance(node, ast.Import):
                    expected |= {alias.name for alias in node.names}
            assert plugins.imported(compile(text, str(path), "exec", dont_inherit=True, optimize=0)) == expected, path
            found += len(expected)
    assert found > 500


_HEAD = "from pydantic import BaseModel, ConfigDict\nfrom components.contracts import Evidence, Finding\n"
_GATE = _HEAD + "class Gate(BaseModel):\n    floor: float = 0.5\n"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A workspace's folder of plug-ins."""
    (tmp_path / "plugins" / "gates").mkdir(parents=True)
    plugins.use_workspace(tmp_path / "plugins")
    return tmp_path / "plugins"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("class Gate:\n    def judge(self, evidence): ...", "Gate is a plain class; make it a pydantic model"),
        ("def Gate(): ...", "Gate is a function, no class"),
        ("Gait = 1", "defines no class Gate"),
        (_GATE, "Gate has no method judge; its family needs `def judge"),
        (_GATE + "    judge: int = 3", "Gate has no method judge"),
        (_GATE + "    def judge(self): ...", r"Gate.judge does not take what it is given \(too many"),
        (_GATE + "    def judge(self, evidence, also): ...", "missing a required argument: 'also'"),
        ("import no_such_library", r"mine.py:1: ModuleNotFoundError: No module named 'no_such_library'; correct it there"),
        ("x = 1\nraise RuntimeError('no')", r"could not be loaded: \S+mine.py:2: RuntimeError: no"),
        ("import sys\nsys.exit(3)", r"mine.py:2: SystemExit: 3"),
        ("def f(:", r"mine.py:1: SyntaxError"),
        ("\0", "mine.py: "),
    ],
)
def test_a_plug_in_that_cannot_be_used_is_refused_when_it_is_loaded(own: Path, text: str, why: str) -> None:
    (own / "gates" / "mine.py").write_text(text)
    with pytest.raises(PluginFailed, match=why):
        plugins.load("gates", "mine")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return True", r"gate 'mine': judge answered True \(bool\), expected verdicts.Finding; correct it in \S+mine.py"),
        ("return None", r"answered nothing \(None\)"),
        ("return 1 / 0", r"raised in judge: \S+mine.py:6: ZeroDivisionError"),
        ("return Finding(gate='mine', status='pass', message='', value=float('nan'))", r"mine.py:6: ValidationError"),
        ("return Finding(gate='mine', status='great', message='')", r"mine.py:6: ValidationError"),
    ],
)
def test_what_a_plug_in_answers_is_looked_at_where_it_comes_in(own: Path, body: str, why: str) -> None:
    (own / "gates" / "mine.py").write_text(_GATE + f"    def judge(self, evidence):\n        {body}")
    with pytest.raises(PluginFailed, match=why):
        plugins.load("gates", "mine").judge(None)


def test_a_plug_in_that_keeps_its_contract_is_used_as_it_is(own: Path) -> None:
    (own / "gates" / "mine.py").write_text(
        _GATE + "    def judge(self, evidence): return Finding(gate='mine', status='pass', message='')"
    )
    gate = plugins.load("gates", "mine", {"floor": 0.75})
    assert (gate.judge(None).status, gate.floor, gate.model_dump()) == ("pass", 0.75, {"floor": 0.75})


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return 3", r"backbone 'mine': blocks answered 3 \(int\), expected list; correct it in \S+mine.py"),
        ("return [module[9]]", r"backbone 'mine' raised in blocks: \S+mine.py:10: TypeError"),
    ],
)
def test_the_blocks_that_a_backbone_may_give_are_looked_at_too(own: Path, body: str, why: str) -> None:
    text = f"""class Backbone(BaseModel):
    preprocessing: int = 0
    embedding_dim: int = 0
    weights_choices: tuple = ()
    def build(self): ...
    def pretrained(self, weights, *, cache): ...
    def blocks(self, module):
        {body}
"""
    (own / "backbones").mkdir(exist_ok=True)
    (own / "backbones" / "mine.py").write_text(_HEAD + text)
    with pytest.raises(PluginFailed, match=why):
        blocks("mine", plugins.load("backbones", "mine"), 1)  # type: ignore[arg-type]


def test_the_other_families_are_looked_at_too(own: Path) -> None:
    (own / "targets").mkdir()
    (own / "targets" / "odd.py").write_text(
        _HEAD
        + """class Target(BaseModel):
    precisions: tuple = ("fp32",)
    answer: int = 0
    def built_by(self): return None
    def absent(self): return ""
    def export(self, request, *, out): return {"entry": "x"}
    def load(self, engine, *, num_threads, num_streams=1): return self
    def predict(self, images):
        return [None, images, (images,), (images, images)][self.answer]
"""
    )
    target = plugins.load("targets", "odd")
    assert (target.precisions, target.absent()) == (("fp32",), "")
    for ask, why in ((target.built_by, "expected str"), (lambda: target.export(None, out=own), "expected Built")):
        with pytest.raises(PluginFailed, match=why):
            ask()
    rows = np.zeros((2, 3), np.float32)
    for answer in range(3):
        loaded: Any = plugins.load("targets", "odd", {"answer": answer}).load(None, num_threads=1)
        with pytest.raises(PluginFailed, match="expected two arrays of 2 rows"):
            loaded.predict(rows)
    good: Any = plugins.load("targets", "odd", {"answer": 3}).load(None, num_threads=1)
    assert good.predict(rows)[0] is rows
    (own / "tasks").mkdir()
    (own / "tasks" / "odd.py").write_text(
        _HEAD
        + """from components.tasks import classification
class Task(classification.Task):
    def fit_temperature(self, logits, labels): return float("nan")
    def metrics(self, logits, labels, temperature): return {"accuracy": 0.5}
"""
    )
    task = plugins.load("tasks", "odd")
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: task.fit_temperature(rows, rows), "fit_temperature answered nan"),
        (lambda: task.metrics(rows, rows, 1.0), "metrics answered .* expected dict"),
    ]
    for asked, why in wrong:
        with pytest.raises(PluginFailed, match=why):
            asked()
    assert task.confusion(np.eye(2)[[1]], np.array([0]), 2) == ((0, 1), (0, 0))


def test_a_plug_in_that_prints_or_fails_leaves_one_json_object(workspace: Path) -> None:
    (workspace / "plugins" / "gates").mkdir(parents=True)
    mine = workspace / "plugins" / "gates" / "mine.py"
    mine.write_text("print('loading', end='')\n" + _GATE + "    def judge(self, evidence): ...\n")
    chosen = ("recipe", "show", "smoke", "--set", "gating.gates=[{gate: mine}]", "--json")
    done = visionloop(*chosen, cwd=workspace)
    assert json.loads(done.stdout)["gating"]["gates"][0]["gate"] == "mine"
    mine.write_text("1 / 0")
    done = visionloop(*chosen, cwd=workspace)
    assert (done.returncode, json.loads(done.stdout)["error"]) == (2, "PluginFailed")
    assert f"{mine}:1" in done.stdout
