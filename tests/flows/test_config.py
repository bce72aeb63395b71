from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from components import plugins
from components.contracts.errors import ConfigError, UnknownName
from flows.workspace.recipes import SHIPPED, RunConfig, load_recipe, peek, recipe_files, resolved
from flows.workspace.yaml_reading import parse_yaml

SHIPPED_NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {"digits", "resnet50", "transfer"} <= set(SHIPPED_NAMES)


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_a_shipped_recipe_is_complete_and_named_after_its_file(name: str) -> None:
    config = load_recipe(name)
    assert config.name == name
    assert config.description
    assert config.export.serving in {"auto", *(target.name for target in config.export.targets)}
    if config.export.serving == "auto":
        assert not any(target.required for target in config.export.targets)


def test_overrides_are_validated_like_the_file() -> None:
    config = load_recipe("digits", ["training.fit.epochs=5", "gating.gates=[{gate: parity}]"])
    assert config.training.fit.epochs == 5
    assert [gate.gate for gate in config.gating.gates] == ["parity"]
    assert config.digest() != load_recipe("digits").digest()


def test_an_override_finds_the_entry_of_a_list_by_its_name() -> None:
    config = load_recipe(
        "digits",
        [
            "gating.gates.accuracy.floor=0.8",
            "gating.gates.latency.engines=[openvino-int8]",
            "gating.gates.parity.settings.min_images=50",
            "gating.gates.parity.min_agreement.int8=0.9",
            "export.targets.openvino-int8.required=false",
            "export.targets.onnxruntime.precision=fp32",
        ],
    )
    gates = {gate.gate: gate for gate in config.gating.gates}
    assert gates["accuracy"].settings == {"floor": 0.8}
    assert (gates["latency"].engines, gates["latency"].settings) == (("openvino-int8",), {"max_p99_ms": 50})
    assert gates["parity"].settings == {"min_images": 50, "min_agreement": {"int8": 0.9}}
    assert gates["class_recall"].settings == {"floor": 0.80}
    required = {target.name: target.required for target in config.export.targets}
    assert (required["openvino-int8"], required["openvino-fp32"]) == (False, True)


def test_an_override_of_one_gate_leaves_another_that_shares_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    text = (SHIPPED / "digits.yaml").read_text()
    shared = text.replace("accuracy, settings: {floor: 0.96}", "accuracy, settings: &floor {floor: 0.96}")
    path.write_text(shared.replace("class_recall, settings: {floor: 0.80}", "class_recall, settings: *floor"))
    gates = {gate.gate: gate.settings for gate in load_recipe(str(path), ["gating.gates.accuracy.floor=0.5"]).gating.gates}
    assert (gates["accuracy"], gates["class_recall"]) == ({"floor": 0.5}, {"floor": 0.96})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gating.gates.acuracy.floor=1", "unknown entry of 'gates' .* 'acuracy'; valid: accuracy, class_recall, latency"),
        ("gating.gates.accuracy.flor=0.5", "unknown setting of gate 'accuracy' 'flor'; valid: floor"),
        (
            "gating.gates.accuracy=0.5",
            "'accuracy' is an entry of 'gates'; name a key of it, such as gating.gates.accuracy.KEY",
        ),
        ("gating.gates.accuracy.floor.deep=1", "'floor' is a value, not a section"),
        ("gating.gates.3.floor=1", "'gates' is a list, .*give it whole, .*; or name one of them: accuracy, class_recall"),
        (
            "export.targets.openvino.required=false",
            "2 entries of 'targets' are 'openvino'; name one of openvino-fp32, openvino-int8$",
        ),
    ],
)
def test_an_override_of_no_one_entry_is_refused_with_the_names(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("digits", [override])


def test_two_gates_of_one_name_are_not_told_apart() -> None:
    twice = "gating.gates=[{gate: accuracy, settings: {floor: 0.9}}, {gate: accuracy, settings: {floor: 0.5}, engines: [openvino-int8]}]"
    with pytest.raises(ConfigError, match=r"2 entries of 'gates' are 'accuracy'; give the list whole: gates=\[...\]"):
        load_recipe("digits", [twice, "gating.gates.accuracy.floor=0.1"])
    with pytest.raises(ConfigError, match="'gates' is a list, whose items cannot be set one by one"):
        load_recipe("digits", ["gating.gates=[3]", "gating.gates.accuracy.floor=0.1"])
    with pytest.raises(UnknownName, match="unknown key in .* 'gatings'; valid: .*gating"):
        load_recipe("digits", ["gatings=[{gate: accuracy}]", "gatings.accuracy.floor=0.1"])


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
            "export.targets=[{target: torch_reference, precision: int8}, {target: openvino, precision: int8}]",
            "has no precision 'int8'",
        ),
        (
            "export.targets.openvino-int8.precision=int4",
            r"export.targets.\d.precision: unknown precision 'int4'; valid: fp16, fp32, int8$",
        ),
        ("export.targets=[{target: tflite}, {target: openvino, precision: int8}]", "unknown target 'tflite'; valid: "),
        ("gating.gates=[{gate: acuracy}]", "unknown gate 'acuracy'; valid: accuracy"),
        ("gating.gates=[]", "at least 1"),
        ("splitting.valid_share=0.9", "less than 0.5"),
        ("model='../x'", "not a plain name"),
        ("source=imagenet", "unknown source 'imagenet'; valid: archive, digits, "),
        ("training.backbone_settings.width=-1", r"digits.yaml --set training.backbone_settings.width=-1: .*greater than"),
        ("gating.gates.0.settings.floor=0.5", r"'gates' is a list, .*give it whole"),
        ("training..fit=1", "not of the form section.key=value"),
        ("model='../x'", r"model: '../x' is not a plain name; use a-z, 0-9, '.', '_' and '-', at most 63$"),
        ("training.fit=[1]", "training.fit: Input should be an object, not a list"),
    ],
)
def test_a_typo_dies_before_any_work_and_names_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("digits", [override])


def test_a_recipe_of_phases_is_set_phase_by_phase() -> None:
    phases = "training={backbone: small_cnn, phases: [{trains: all, fit: {epochs: 9}}, {trains: head}]}"
    sets = [phases, "training.phases.0.fit.epochs=3", "training.phases.1.fit.epochs=2"]
    assert [phase.fit.epochs for phase in load_recipe("digits", sets).training.phases] == [3, 2]
    for override, message in (
        ("training.phases.2.fit.epochs=3", "unknown entry of 'phases' .* '2'; valid: 0, 1"),
        (
            "training.phases.1.epochs=3",
            r"'training\.phases\.1\.epochs'; valid: augmentation, augmentations, batch_norm, fit, head, loss, sampling, trains, views",
        ),
        ("training.phases.1=3", "name a key of it, such as training.phases.1.KEY"),
        ("training.fit.epochs=3", "training: fit beside phases: .*move it into a phase, such as training.phases.0.fit"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_recipe("digits", [phases, override])


def test_an_unknown_recipe_lists_the_valid_ones() -> None:
    with pytest.raises(UnknownName, match=f"unknown recipe 'digit'; valid: {', '.join(SHIPPED_NAMES)}"):
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
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="it is not a file"):
        load_recipe(str(tmp_path / "folder.yaml"))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is empty"),
        (b"- a", "it holds a list"),
        (b"name: caf\xe9", "not UTF-8 text: byte 0xe9 in line 1; save it as UTF-8"),
        (b"a: 1\nb:\n\t- 1", r"line 3.*spaces, not with tabs"),
        (b"a: 1\nb: 2\na: 3", "line 3.*'a' is there twice"),
        (b"a: 1\n---\na: 2", "another document"),
        (b"a: !!python/object/apply:os.system ['true']", "not valid YAML.*the tag"),
        (b"a: 1\nb: !!binary aGk=", "line 2.*the tag !!binary is not read; write the value plainly"),
        (b"a: 1\n? [b]\n: 2", "line 2.*a key has to be plain text"),
        (b"a: &a [*a]", "within what it names"),
        (
            b"a: [&a [x, x, x, x, x, x, x, x, x]]\n"
            + b"\n".join(b"%c: &%c [%s]" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(9)),
            "more than 100,000 values",
        ),
        (b"a: " + b"[" * 3000, "nested too deeply"),
        (b"#" * (1 << 20) + b"\na: 1", "larger than 1 MiB"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_and_listed(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "recipes").mkdir()
    path = tmp_path / "recipes" / "mine.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=why):
        load_recipe("mine", workspace=tmp_path)
    load_recipe("digits", workspace=tmp_path)
    with pytest.raises(ConfigError, match=why):
        peek(path)


def test_yaml_of_windows_editors_is_read(tmp_path: Path) -> None:
    path, text = tmp_path / "r.yaml", (SHIPPED / "digits.yaml").read_text()
    for data in (text.encode("utf-8-sig"), text.replace("\n", "\r\n").encode(), text.encode("utf-16")):
        path.write_bytes(data)
        assert load_recipe(str(path)) == load_recipe("digits")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E5", 100_000), (".5e3", 500.0), ("-2.5e-1", -0.25), ("5.", 5.0), ("1_000", 1000), ("0x1f", 31), ("1e300", 1e300),
        ("0", 0), ("0123", "0123"), ("12:30", "12:30"), ("2026-01-01", "2026-01-01"), ("no", "no"), ("on", "on"),
        ("true", True), ("~", None), ("", None), ("'1e-3'", "1e-3"), ("{no: 1, 1: 2}", {"no": 1, "1": 2}), ("1.2.3", "1.2.3"),
        ("{a: &x {p: 1, q: 1}, b: {<<: *x, q: 2}}", {"a": {"p": 1, "q": 1}, "b": {"p": 1, "q": 2}}),
    ],
)  # fmt: skip
def test_a_plain_value_is_what_it_looks_like(text: str, value: object) -> None:
    assert repr(parse_yaml(text, "here")) == repr(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.fit.epochs=0123", 'valid integer, not "0123"'),
        ("training.fit.epochs=ten", 'valid integer, not "ten"'),
        ("description=1e-3", "valid string, not 0.001; quote it, such as '0.001'"),
        ("description=true", "quote it, such as 'true'"),
        ("export.targets=[{target: onnxruntime, required: no}]", 'not "no"; write true or false'),
        ("training.fit.learning_rate=1e400", "finite"),
        ("training.fit.epochs={a: 1, a: 2}", "there twice"),
    ],
)
def test_a_value_of_another_kind_says_what_it_was_read_as(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("digits", [override])
    assert load_recipe("digits", ["training.fit.learning_rate=1e-3"]).training.fit.learning_rate == 0.001


def test_a_workspace_recipe_wins_over_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "digits.yaml").write_text(
        (SHIPPED / "digits.yaml").read_text().replace("model: digits", "model: mine")
    )
    assert load_recipe("digits", workspace=tmp_path).model == "mine"
    assert recipe_files(tmp_path)["transfer"].parent == SHIPPED


def test_either_suffix_makes_a_recipe_but_not_both_for_one_name(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    text = (SHIPPED / "digits.yaml").read_text()
    (tmp_path / "recipes" / "short.yml").write_text(text)
    assert load_recipe("short", workspace=tmp_path) == load_recipe("digits")
    (tmp_path / "recipes" / "short.yaml").write_text(text)
    with pytest.raises(ConfigError, match="short.yaml and short.yml are both recipe 'short'; remove or rename one"):
        load_recipe("short", workspace=tmp_path)
    load_recipe("digits", workspace=tmp_path)


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_a_recipe_is_shown_as_it_is_used_and_can_be_used_as_it_is_shown(name: str, tmp_path: Path) -> None:
    shown = resolved(load_recipe(name))
    gates = {gate["gate"]: gate["settings"] for gate in shown["gating"]["gates"]}
    assert gates["parity"]["min_agreement"] == {"fp16": 0.995, "int8": 0.98}
    assert gates["no_regression"] == {"margin": 0.02, "max_negative_flips": 0.05}
    assert shown["training"]["task_settings"].keys() == {"label_smoothing", "head_dropout"}
    for phase in shown["training"].get("phases", []):
        for chosen in phase["augmentations"]:
            assert (
                chosen["settings"] == plugins.load("augmentations", chosen["augmentation"], chosen["settings"]).model_dump()
            )
            assert chosen["settings"]
        assert phase["loss"] is None or {"smoothing"} <= phase["loss"]["settings"].keys()
    path = tmp_path / "shown.yaml"
    path.write_text(yaml.safe_dump(shown))
    assert resolved(load_recipe(str(path))) == shown


def test_a_phase_that_names_a_loss_is_set_by_its_number_and_its_augmentations_by_their_names() -> None:
    loss, augmentations = "{loss: class_weighted}", "[{augmentation: mixup}, {augmentation: rotation}]"
    sets = [
        f"training={{backbone: small_cnn, phases: [{{trains: all, loss: {loss}, augmentation: {{}}, augmentations: {augmentations}}}]}}",
        "training.phases.0.loss.settings.smoothing=0.2",
        "training.phases.0.augmentations.rotation.settings.degrees=5",
        "training.phases.0.augmentations.mixup.settings.alpha=0.4",
    ]
    found = load_recipe("digits", sets).training.phases[0]
    assert found.loss is not None
    assert found.loss.settings == {"smoothing": 0.2}
    assert [chosen.settings for chosen in found.augmentations] == [{"alpha": 0.4}, {"degrees": 5}]


def test_without_valid_or_calibration_pictures_only_what_needs_none_is_a_recipe() -> None:
    few = load_recipe("fewshot")
    assert few.splitting.none == ("valid", "calibration")
    assert [phase.head for phase in few.training.all_phases] == ["auto"]
    with pytest.raises(
        ConfigError, match=r"calibration_share is 0, and openvino-int8 chooses its ranges on calibration pict"
    ):
        load_recipe("digits", ["splitting.calibration_share=0"])
    with pytest.raises(
        ConfigError, match=r"training.phases.0: the epoch of a fit is chosen on valid images, and there are non"
    ):
        load_recipe("transfer", ["splitting.valid_share=0"])
    both = "training.phases=[{trains: head, head: auto}, {trains: {last: 1}}]"
    with pytest.raises(ConfigError, match=r"training.phases.1: the epoch of a fit"):
        load_recipe("fewshot", [both])


PASSES = "optimisation={passes: [{pass: prune, settings: {steps: 2}}]}"


def test_a_recipe_without_passes_is_what_it_always_was() -> None:
    config = load_recipe("digits")
    assert "optimisation" not in config.to_json()
    assert RunConfig.read(config.to_json()) == config
    assert "optimisation" in RunConfig.model_json_schema()["properties"]


def test_a_pass_is_set_by_its_name_shown_with_its_defaults_and_checked_on_the_network(tmp_path: Path) -> None:
    config = load_recipe("digits", [PASSES, "optimisation.passes.prune.share=0.4"])
    assert RunConfig.read(config.to_json()) == config
    (said,) = resolved(config)["optimisation"]["passes"]
    assert (said["pass"], said["settings"]["share"], said["settings"]["importance"]) == ("prune", 0.4, "taylor")
    assert [phase["trains"] for phase in said["phases"]] == ["all"]
    assert said["phases"][0]["augmentation"]["rotate_degrees"] == 10
    path = tmp_path / "shown.yaml"
    path.write_text(yaml.safe_dump(resolved(config)))
    assert resolved(load_recipe(str(path))) == resolved(config)
    for override, why in (
        (
            "optimisation.passes.prune.share=0.99",
            r"optimisation.passes.0.settings: share: 0.99 of the parameters cannot be taken",
        ),
        ("optimisation.passes.prune.shares=0.9", "unknown setting of pass 'prune' 'shares'"),
        ("optimisation.passes.shrink.share=0.9", "unknown entry of 'passes' in --set .*'shrink'; valid: prune"),
        ("optimisation={passes: [{name: prune}]}", "optimisation.passes.0.(pass: Field required|name)"),
        ("splitting.valid_share=0", "the epoch.* chosen on valid images, and there are none"),
        ("optimisation={compare: false}", "compare has no effect without passes"),
    ):
        with pytest.raises(ConfigError, match=why):
            load_recipe("digits", [PASSES, override])


def test_a_pass_for_int8_is_of_no_use_to_a_recipe_without_such_an_engine() -> None:
    aware = "optimisation={passes: [{pass: quantisation_aware}]}"
    assert (
        load_recipe("digits", [aware, "export.serving=openvino-int8"]).optimisation.passes[0].pass_ == "quantisation_aware"
    )
    float_alone = ["export.targets=[{target: openvino}, {target: onnxruntime}]", "export.serving=openvino-fp32"]
    why = r"optimisation.passes.0: the pass 'quantisation_aware' has no effect without an engine in int8; name one under"
    with pytest.raises(ConfigError, match=why):
        load_recipe("digits", [aware, *float_alone])
    assert load_recipe("digits", [PASSES, *float_alone]).optimisation.passes
