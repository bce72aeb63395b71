"""Plug-ins of a workspace's own: what is written works as it is, and what breaks its contract is told by file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from shapes import visionloop

from components import plugins
from components.contracts.errors import ConfigError
from flows.workspace.new_recipe import new_recipe
from flows.workspace.own_plugins import check_plugins, new_plugin
from flows.workspace.recipes import SHIPPED


@pytest.fixture
def root(tmp_path: Path) -> Path:
    plugins.use_workspace(tmp_path / "plugins")
    return tmp_path


@pytest.mark.parametrize("family", sorted(plugins.FAMILIES))
def test_what_is_written_keeps_its_contract_as_it_is(root: Path, family: str) -> None:
    made = new_plugin(root, family, "mine")
    assert (root / made.file).read_text() == plugins.template(family).read_text().replace('"template"', '"mine"')
    checked = check_plugins(root)
    assert (checked.checked, checked.findings, checked.not_executed_here) == ((f"{family}/mine",), (), ())


@pytest.mark.parametrize(
    ("family", "name", "why"),
    [
        (
            "gate",
            "mine",
            "unknown plug-in family 'gate'; valid: augmentations, backbones, detectors, findings, gates, ",
        ),
        ("gates", "my-gate", "'my-gate' is no name of a Python module; use a-z, 0-9 and '_', a letter first"),
        ("gates", "_mine", "no name of a Python module"),
        ("gates", "class", "no name of a Python module"),
        ("gates", "../mine", "no name of a Python module"),
        ("gates", "accuracy", "'accuracy' is the name of a shipped gate; choose another"),
        ("detectors", "embeddings", "is the name of a shipped detector"),
        ("gates", "there", "there.py is there already and is left as it is"),
    ],
)
def test_nothing_is_overwritten_or_shadowed(root: Path, family: str, name: str, why: str) -> None:
    there = root / "plugins" / "gates" / "there.py"
    there.parent.mkdir(parents=True)
    there.write_text("mine")
    with pytest.raises(ConfigError, match=re.escape(why)):
        new_plugin(root, family, name)
    assert [path.read_text() for path in root.rglob("*.py")] == ["mine"]


_STATUS = "status = compare_interval(estimate, self.floor)"


@pytest.mark.parametrize(
    ("family", "old", "new", "line", "why"),
    [
        ("gates", _STATUS, "status = 'pass'", "    def judge", "answers 'pass' where there is no evidence at all"),
        ("gates", _STATUS, "status = 'pass' if estimate else 'inconclusive'", "    def judge", "passes on a single test image"),
        ("gates", _STATUS, "status = 'pass' if evidence.measurement else 'inconclusive'", "    def judge", "passes with a measurement of another engine"),
        ("gates", _STATUS, "status = 'pass' if evidence.answers else 'inconclusive'", "    def judge", "passes with answers that are not finite"),
        ("gates", "        estimate =", "        evidence.answers.logits[:] = 0\n        estimate =", "        evidence.answers", "raised in judge"),
        ("gates", '"template"', '"other"', "    def judge", "answers as gate 'other'; expected 'mine'"),
        ("gates", '"""Pass, fail or inconclusive, and why."""', "return None", "    def judge", "judge answered nothing (None), expected verdicts.Finding"),
        ("gates", "default=0.9, gt", "gt", "class Gate", "floor has no default and no recipe of the workspace sets it"),
        ("gates", 'frozen=True, extra="forbid"', 'extra="ignore"', "class Gate", "its settings can be changed or misspelt"),
        ("gates", "class Gate", "1 / 0\n\n\nclass Gate", "1 / 0", "ZeroDivisionError"),
        ("gates", "class Gate(BaseModel):", "class Gate(BaseModel", "class Gate(BaseModel", "SyntaxError"),
        ("gates", "class Gate(BaseModel)", "class Gate", "class Gate", "Gate is a plain class; make it a pydantic model"),
        ("gates", "def judge(self, evidence", "def judge(self", "class Gate", "does not take what it is given"),
        ("detectors", 'status, message = "drift", told', 'status, message = "pass", told', "    def detect", "answers 'pass' on 1,000 images of which everything has moved"),
        ("detectors", "smallest > self.material", "False", "    def detect", "answers 'pass' on 20 images of the same data; expected 'inconclusive'"),
        ("detectors", "value > threshold and value >= least", "value >= 0", "    def detect", "answers 'drift' on 1,000 images of the same data"),
        ("detectors", "default_rng(seed)", "default_rng()", "    def detect", "gives two answers about the same window and seed"),
        ("sources", '("circle", "square")', '("circle",)', "    def fetch", "wrote 1 classes; at least 2"),
        ("sources", "(32, 32), 20)", "(32, 32), __import__('os').urandom(1)[0])", "    def fetch", "wrote other files or bytes the second time"),
        ("sources", "folder = out / name", "folder = out", "    def fetch", "expected every picture as CLASS/FILE"),
        ("sources", 'image.save(folder / f"{index:04d}.bmp", format="BMP")', '(folder / f"{index}.bmp").write_text("no")', "    def fetch", "which cannot be read as a picture"),
        ("backbones", "nn.Flatten(),", "nn.Flatten(), nn.Linear(self.embedding_dim, 7),", "    def build", "gives features of shape (4, 7) for 4 images; expected (4, 32)"),
        ("backbones", "nn.Flatten(),", "nn.Flatten(), nn.Threshold(1e9, 0.5),", "    def build", "has no parameter that a step of training changes"),
        ("backbones", "raise WeightsUnavailable", "return {}  # ", "    def pretrained", "gives weights though weights_choices names none"),
        ("backbones", "return [module[:4], module[4:]]", "return 3", "    def blocks", "blocks answered 3 (int), expected list"),
        ("backbones", "return [module[:4], module[4:]]", "return [module]", "    def blocks", "gives one block; expected two or more"),
        ("backbones", "return [module[:4], module[4:]]", "return [module[:4], self.build()[4:]]", "    def blocks", "has 4.weight in block 2, which is no tensor of the module"),
        ("backbones", "return [module[:4], module[4:]]", "return [module[:5], module[4:]]", "    def blocks", "has 4.weight in blocks 1 and 2; expected it in one"),
        ("backbones", "return [module[:4], module[4:]]", "return [module[:4], module[5:]]", "    def blocks", "leave out 4.weight; expected every tensor of the module"),
        ("backbones", "return [module[:4], module[4:]]", "return [module[4:], module[:4]]", "    def blocks", "do not take what the one before gives (RuntimeError"),
        ("backbones", "return [module[:4], module[4:]]", "return [module[:3], module[4:]]", "    def blocks", "answer something else than the module"),
        ("backbones", "return [module[:4], module[4:]]", "return [module[9]]", "        return [module[9]]", "IndexError: index 9 is out of range"),
        ("tasks", "self.focus * each).mean()", "self.focus * each)", "    def loss", "expected one finite number"),
        ("tasks", "self.focus * each).mean()", "self.focus * each * 0).mean()", "    def loss", "a head has to learn by it"),
        ("tasks", "    def loss", "    @property\n    def headline(self) -> str:\n        return 'ece'\n\n    def loss", "class Task", "ece is"),
        ("tasks", "    def loss", "    def agree(self, logits, others):\n        return logits.argmax(axis=1) > 9\n\n    def loss", "    def agree", "does not answer like itself"),
        ("losses", "functional.cross_entropy(logits, targets, label_smoothing=self.smoothing)", "functional.cross_entropy(logits, targets, reduction='sum')", "    def loss", "answers another value for the same examples twice over"),
        ("losses", "functional.cross_entropy(logits, targets, label_smoothing=self.smoothing)", "-functional.cross_entropy(logits, targets)", "    def loss", "does not become smaller when the logit of the right class grows"),
        ("losses", "return functional", "return (1.0 / counts).mean() * functional", "    def loss", "with a class of no images"),
        ("losses", "functional.cross_entropy(logits, targets, label_smoothing=self.smoothing)", "functional.cross_entropy(logits, targets if targets.ndim == 1 else targets.argmax(1))", "    def loss", "does not depend on the shares"),
        ("losses", "functional.cross_entropy(logits, targets, label_smoothing=self.smoothing)", "functional.cross_entropy(logits, targets, reduction='none')", "    def loss", "expected one finite number"),
        ("losses", "functional.cross_entropy(logits, targets, label_smoothing=self.smoothing)", "functional.cross_entropy(logits, targets).sqrt()", "    def loss", "has no finite gradient of answers that are certain and right"),
        ("losses", "return True", "return 1", "    @property", "takes_shares answered 1 (int), expected bool"),
        ("augmentations", "mirrored, images)", "mirrored, images).float()", "    def change", "gives torch.float32 of shape (64, 20, 24, 3)"),
        ("augmentations", "generator=generator) <", "generator=torch.Generator().manual_seed(torch.seed())) <", "    def change", "draws from torch's global generator"),
        ("augmentations", "torch.rand(len(images), generator=generator)", "torch.from_numpy(__import__('numpy').random.random(len(images)))", "    def change", "gives two results for one seed"),
        ("augmentations", "torch.rand(len(images), generator=generator)", "torch.linspace(0, 1, len(images))", "    def change", "gives the same for another seed"),
        ("augmentations", "return torch.where(chosen[:, None, None, None], mirrored, images)", "return images + torch.randint(1, 250, (1,), dtype=torch.uint8, generator=generator)", "    def change", "changes every picture alike"),
        ("augmentations", "chosen = ", "images.random_(0, 255, generator=generator)\n        chosen = ", "    def change", "writes into the pictures that it is given"),
        ("augmentations", "def mixes(self) -> bool:\n        return False", "def mixes(self) -> bool:\n        return True", "    def mix", "gives pictures torch.uint8 of shape"),
        ("passes", 'amount=self.share)', 'amount=0)', "    def begin", "leaves the network as it was"),
        ("passes", "        for layer in network.modules():\n            if isinstance(layer, nn.Conv2d):\n                prune.remove", "        for layer in ():\n            if isinstance(layer, nn.Conv2d):\n                prune.remove", "    def end", "leaves backbone.0.weight; expected the network's own tensors"),
        ("passes", "prune.l1_unstructured(layer,", "prune.random_unstructured(layer,", "    def begin", "gives two networks for the same one"),
        ("passes", "prune.remove(layer,", "layer.padding_mode = 'circular'\n                prune.remove(layer,", "    def end", "answers otherwise when it is rebuilt"),
        ("passes", "prune.remove(layer,", "network.backbone[9] = nn.Tanh()\n                prune.remove(layer,", "    def end", "answers otherwise when it is rebuilt"),
        ("passes", "return 1", "return 0", "    @property", "is 0; expected 1 to 1000"),
        ("passes", "return 1", "return 1.0", "    @property", "steps answered 1.0 (float), expected int"),
        ("passes", "        for layer in network.modules():\n            if isinstance(layer, nn.Conv2d):\n                prune.l1", "        network.requires_grad_(False)\n        for layer in network.modules():\n            if isinstance(layer, nn.Conv2d):\n                prune.l1", "    def begin", "leaves nothing that can be fine-tuned"),
        ("findings", "return frozenset()", "return frozenset({'pixels'})", "    @property", "names 'pixels'; expected some of embeddings"),
        ("findings", '                [row["path"]],', "                ['a'],", "            known.issue(", "KeyError: 'a'"),
        ("findings", "        shape = ", "        known.table.loc[0, 'label'] = 'b'\n        shape = ", "    def look", "writes into the data that it is given"),
        ("findings", "            for row in found", "            for _ in [setattr(type(known), 'asked', getattr(known, 'asked', 0) + 1)] if known.asked % 2\n            for row in found", "    def look", "gives two answers for the same data"),
        ("findings", 'score=row["shape"]', "score=0.9", "    def look", "whose score 0.9 lies above its threshold 0.2"),
        ("findings", '"template"', '"other"', "    def look", "of kind 'other'; expected 'mine'"),
        ("findings", '                [row["path"]],', "                [found['path'].iloc[0], sorted(known.table['path'])[7]],", "    def look", "finds something else in the same files under other names"),
        ("findings", "{row['width']}x{row['height']} pixels", " ", "    def look", "without a detail that says what it is"),
        ("findings", "return [", "return ([] if len(known.table) else [known.issue(NAME, [], severity='note', score=0, threshold=0, detail='x', action='y')]) + [", "    def look", "finds something in data of no files"),
        ("targets", "return logits, embedding", "return logits * 2, embedding", "    def load", "its logits are up to"),
        ("targets", "return logits, embedding", "return logits - logits.mean(axis=0), embedding", "    def load", "answers a picture otherwise alone"),
        ("targets", "Built(entry=_ENTRY", 'Built(entry="other"', "    def export", "names the entry 'other', which it did not write"),
    ],
)  # fmt: skip
def test_what_breaks_its_contract_is_told_by_file_and_line(
    root: Path, family: str, old: str, new: str, line: str, why: str
) -> None:
    path = root / new_plugin(root, family, "mine").file
    text = path.read_text()
    old = old.replace("template", "mine")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    findings = check_plugins(root, family, "mine").findings
    found = [finding for finding in findings if why in finding.message]
    assert found, findings
    told = path.read_text().splitlines()[found[0].line - 1]
    assert told.startswith(line), told
    assert found[0].file == f"plugins/{family}/mine.py"


def test_settings_without_a_default_come_from_the_recipe_that_uses_them(root: Path) -> None:
    path = root / new_plugin(root, "gates", "mine").file
    path.write_text(path.read_text().replace("default=0.9, gt", "gt"))
    new_recipe(root, "pumps", "digits")
    recipe = root / "recipes" / "pumps.yaml"
    recipe.write_text(recipe.read_text().replace("gate: parity", "gate: mine, settings: {floor: 0.8}"))
    assert check_plugins(root).findings == ()


def test_settings_of_losses_and_augmentations_come_from_the_phases_that_use_them(root: Path) -> None:
    loss = root / new_plugin(root, "losses", "mine").file
    loss.write_text(loss.read_text().replace("default=0.0, ge=0, lt=1", "ge=0, lt=1"))
    change = root / new_plugin(root, "augmentations", "mine").file
    change.write_text(change.read_text().replace("default=0.5, ", ""))
    needing = [finding.message.split(" has no default")[0] for finding in check_plugins(root).findings]
    assert needing == ["smoothing", "probability"]
    (root / "recipes").mkdir()
    phases = """
  phases:
    - trains: all
      loss: {loss: mine, settings: {smoothing: 0.1}}
      augmentations: [{augmentation: flip}, {augmentation: mine, settings: {probability: 0.3}}]
"""
    digits = (SHIPPED / "digits.yaml").read_text()
    begin, end = digits.index("  mode: scratch"), digits.index("export:")
    (root / "recipes" / "mine.yaml").write_text(digits[:begin].rstrip() + phases + digits[end:])
    assert check_plugins(root).findings == ()


def test_the_commands_write_check_and_say_no(tmp_path: Path) -> None:
    assert visionloop("init", cwd=tmp_path).returncode == 0
    empty = visionloop("plugin", "check", cwd=tmp_path)
    assert (empty.returncode, empty.stdout.split(".")[0]) == (0, "No plug-ins of the workspace's own to check")
    made = visionloop("plugin", "new", "gates", "mine", "--json", cwd=tmp_path)
    assert json.loads(made.stdout)["file"] == "plugins/gates/mine.py"
    assert visionloop("plugin", "check", cwd=tmp_path).stdout == "1 plug-in checked, 0 findings\n"
    path = tmp_path / "plugins" / "gates" / "mine.py"
    path.write_text(path.read_text() + "\n1 / 0\n")
    refused = visionloop("plugin", "check", "gates", "mine", cwd=tmp_path)
    line = len(path.read_text().splitlines())
    assert refused.returncode == 1
    assert refused.stdout.startswith(f"plugins/gates/mine.py:{line}: gates/mine: ")
    unknown = visionloop("plugin", "check", "gates", "yours", cwd=tmp_path)
    assert (unknown.returncode, "valid: mine" in unknown.stderr) == (2, True)
