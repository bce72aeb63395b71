from __future__ import annotations

from pathlib import Path

import pytest

from components.contracts import ConfigError, UnknownName
from flows.config import SHIPPED, load_recipe, recipe_files

SHIPPED_NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {"digits", "transfer"} <= set(SHIPPED_NAMES)


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_a_shipped_recipe_is_complete_and_named_after_its_file(name: str) -> None:
    config = load_recipe(name)
    assert config.name == name
    assert config.description
    assert config.export.serving in {target.name for target in config.export.targets}


def test_overrides_are_validated_like_the_file() -> None:
    config = load_recipe("digits", ["training.fit.epochs=5", "gating.gates=[{gate: parity}]"])
    assert config.training.fit.epochs == 5
    assert [gate.gate for gate in config.gating.gates] == ["parity"]
    assert config.digest() != load_recipe("digits").digest()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.fit.epoch=5", r"training\.fit\.epoch.*valid: .*epochs"),
        ("trainig.fit.epochs=5", r"unknown key in .* 'trainig'; valid: .*training"),
        ("training.fit.epochs=0", "greater than or equal to 1"),
        ("training.fit.epochs='5'", "valid integer"),
        ("training.fit.learning_rate=.nan", "nan|NaN|finite"),
        ("training.backbone=resnet", "unknown backbone 'resnet'; valid: "),
        ("training.fit.epochs", "not of the form section.key=value"),
        ("name.deeper=1", "is a value, not a section"),
        ("export.serving=torch_reference-fp32", "never served"),
        ("export.serving=openvino-int9", "not built; valid: .*openvino-int8"),
        ("export.targets=[{target: onnx}]", "serving names|unknown target"),
        (
            "export.targets=[{target: onnxruntime, precision: int8}, {target: openvino, precision: int8}]",
            "has no precision 'int8'",
        ),
        ("export.targets=[{target: litert}, {target: openvino, precision: int8}]", "unknown target 'litert'; valid: "),
        ("gating.gates=[{gate: acuracy}]", "unknown gate 'acuracy'; valid: accuracy"),
        ("gating.gates=[]", "at least 1"),
        ("splitting.valid_share=0.9", "less than 0.5"),
        ("model='../x'", "not a plain name"),
        ("source=imagenet", "unknown source 'imagenet'; valid: digits"),
    ],
)
def test_a_typo_dies_before_any_work_and_names_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("digits", [override])


def test_an_unknown_recipe_lists_the_valid_ones() -> None:
    with pytest.raises(UnknownName, match="unknown recipe 'digit'; valid: digits, transfer"):
        load_recipe("digit")


def test_broken_files_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    with pytest.raises(ConfigError, match="cannot read recipe"):
        load_recipe(str(path))
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(str(path))
    path.write_text("3")
    with pytest.raises(ConfigError, match="not a mapping"):
        load_recipe(str(path))
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(str(path))


def test_a_workspace_recipe_wins_over_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "digits.yaml").write_text(
        (SHIPPED / "digits.yaml").read_text().replace("model: digits", "model: mine")
    )
    assert load_recipe("digits", workspace=tmp_path).model == "mine"
    assert recipe_files(tmp_path)["transfer"].parent == SHIPPED
