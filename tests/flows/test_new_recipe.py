"""A recipe made from another one: valid at once, nothing overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shapes import visionloop

from components.contracts.errors import ConfigError
from flows.workspace.new_recipe import new_recipe
from flows.workspace.recipes import SHIPPED, load_recipe


@pytest.mark.parametrize("name", ["pumps", "1e3", "007", "true"])
def test_a_new_recipe_is_the_other_one_under_its_own_name(tmp_path: Path, name: str) -> None:
    new_recipe(tmp_path, name, "digits")
    old = (SHIPPED / "digits.yaml").read_text().splitlines()
    new = (tmp_path / "recipes" / f"{name}.yaml").read_text().splitlines()
    assert [line.split(":")[0] for line in old] == [line.split(":")[0] for line in new]
    assert sum(a != b for a, b in zip(old, new, strict=True)) == 2
    made = load_recipe(name, workspace=tmp_path)
    assert (made.name, made.model) == (name, name)
    assert made.training == load_recipe("digits").training


@pytest.mark.parametrize("style", ["flow", "quoted", "windows"])
def test_a_recipe_in_another_style_is_copied_too(tmp_path: Path, style: str) -> None:
    text = (SHIPPED / "digits.yaml").read_text()
    if style == "flow":
        text = json.dumps(load_recipe("digits").to_json())
    elif style == "quoted":
        text = text.replace("name: digits\n", "\"name\":   'digits'   # kept\n")
    else:
        text = text.replace("\n", "\r\n")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_bytes(text.encode("utf-16" if style == "windows" else "utf-8"))
    new_recipe(tmp_path, "pumps", "mine")
    new_recipe(tmp_path, "valves", "pumps")
    made = (tmp_path / "recipes" / "valves.yaml").read_bytes().decode()
    assert ("# kept" in made, "\r\n" in made) == (style == "quoted", style == "windows")
    assert load_recipe("valves", workspace=tmp_path).model == "valves"
    assert load_recipe("valves", workspace=tmp_path).gating == load_recipe("digits").gating


@pytest.mark.parametrize(
    ("name", "source", "why"),
    [
        ("Pumps", "digits", "'Pumps' is not a plain name; use a-z"),
        ("../pumps", "digits", "not a plain name"),
        ("pumps.yaml", "digits", "ends like a file; give the recipe's name alone: 'pumps'"),
        ("pumps", "digit", "unknown recipe 'digit'; valid: aliased, broken, cifar10, digits, "),
        ("short", "digits", "short.yml is there already and is left as it is"),
        ("broken", "digits", "broken.yaml is there already"),
        ("pumps", "broken", "broken.yaml is not valid YAML"),
        ("pumps", "mistaken", "unknown gate 'luck'"),
        ("pumps", "aliased", "aliased.yaml cannot be copied: write its name and model plainly"),
    ],
)
def test_nothing_is_written_or_overwritten_where_it_cannot_be_made(tmp_path: Path, name: str, source: str, why: str) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    text = (SHIPPED / "digits.yaml").read_text()
    (folder / "short.yml").write_text(text)
    (folder / "broken.yaml").write_text("a: [")
    (folder / "mistaken.yaml").write_text(text.replace("gate: parity", "gate: luck"))
    aliased = text.replace("name: digits", "name: &n digits").replace("description: A", "description: *n #")
    (folder / "aliased.yaml").write_text(aliased)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=why):
        new_recipe(tmp_path, name, source)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_command_writes_a_recipe_that_can_be_shown(tmp_path: Path) -> None:
    assert visionloop("init", cwd=tmp_path).returncode == 0
    done = visionloop("recipe", "new", "pumps", "--from", "transfer", "--json", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert (answer["recipe"], answer["file"]) == ("pumps", "recipes/pumps.yaml")
    assert json.loads(visionloop("recipe", "show", "pumps", "--json", cwd=tmp_path).stdout)["model"] == "pumps"
    again = visionloop("recipe", "new", "pumps", "--from", "transfer", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
