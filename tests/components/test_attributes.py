from __future__ import annotations

import json
from pathlib import Path

import pytest

from components import attributes
from components.attributes import Attributes, Changed, attributes_of, learned
from components.companions import ATTRIBUTES, FURTHER
from components.contracts.errors import ConfigError, DataError

A, B = "a" * 64, "b" * 64


def test_what_was_known_is_read_back_and_only_rows_that_say_something_are_kept(tmp_path: Path) -> None:
    assert attributes.read(tmp_path) == {}
    awkward = Attributes('part "7", left', "2026-03-01T13:00:00.250000Z", "Werk Süd;2", "model", "0.25")
    attributes.write(tmp_path, {B: awkward, A: Attributes(group="x"), "c" * 64: Attributes()})
    assert attributes.read(tmp_path) == {A: Attributes(group="x"), B: awkward}
    assert (
        (tmp_path / ATTRIBUTES.file)
        .read_text()
        .startswith(f"sha256,group,captured_at,source,label_source,confidence\n{A},x,,,,\n")
    )


def test_columns_of_a_projects_own_are_kept_beside_and_change_one_by_one(tmp_path: Path) -> None:
    rain = attributes_of({"group": "x"}, further={"weather": "rain", "light": "dim", "site": ""})
    snow = attributes_of({}, further={"weather": "Schnee; naß", "site": 7})
    attributes.write(tmp_path, {A: rain, B: snow})
    assert attributes.read(tmp_path) == {A: rain, B: snow}
    assert (rain.columns, snow.columns) == ({"weather": "rain", "light": "dim"}, {"weather": "Schnee; naß", "site": "7"})
    assert (tmp_path / ATTRIBUTES.file).read_text().splitlines()[1:] == [f"{A},x,,,,"]
    after, changed = learned({A: rain}, [(A, snow)])
    assert after[A].columns == {"weather": "Schnee; naß", "light": "dim", "site": "7"}
    assert (after[A].group, changed) == ("x", [Changed(A, "weather", "rain", "Schnee; naß", False)])
    said = [("a/1.png", rain), ("a/2.png", snow)]
    attributes.write_said(tmp_path, said)
    assert attributes.read_said(tmp_path / attributes.FILE) == dict(said)
    attributes.write(tmp_path, {A: Attributes(group="x")})
    assert not (tmp_path / FURTHER.file).exists()
    for text in ("[]", '{"weather": 1}', '{"weather":"a" }', "{}", "rain"):
        FURTHER.write(tmp_path, FURTHER.frame({A: (text,)}))
        with pytest.raises(DataError, match=r"(?s)data.columns.csv.*git checkout"):
            attributes.read(tmp_path)
    for names in (["group"], ["path"], ["a\nb"], [" "], ["a", "a"], [f"{number}" for number in range(21)]):
        with pytest.raises(ConfigError, match="columns has"):
            attributes.expect_further(names)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("sha256,group", "sha,group"),
        lambda text: text + f"{A},y,,,,\n",  # twice
        lambda text: text.replace(f"{B},", "b,"),
        lambda text: text.replace("model", "robot"),
        lambda text: text.replace("0.25", "1.5"),
        lambda text: text.replace(",x,,,,", ",,,,,"),
        lambda text: text.replace(",x,,,,", ',"x,,,,'),
        lambda text: text.replace("x", "\udcff"),
    ],
)
def test_a_table_that_was_damaged_is_refused(tmp_path: Path, damage: object) -> None:
    path = tmp_path / ATTRIBUTES.file
    attributes.write(tmp_path, {A: Attributes(group="x"), B: Attributes(label_source="model", confidence="0.25")})
    path.write_bytes(damage(path.read_text()).encode(errors="surrogateescape"))  # type: ignore[operator]
    with pytest.raises(DataError, match=r"(?s)data.attributes.csv.*git checkout"):
        attributes.read(tmp_path)


def test_a_models_label_replaces_no_persons_and_a_persons_takes_the_models_confidence_away() -> None:
    known = {A: Attributes(group="x", label_source="person"), B: Attributes(label_source="model", confidence="0.5")}
    said = [(A, Attributes(group="y", label_source="model", confidence="0.9")), (B, Attributes(label_source="person"))]
    after, changed = learned(known, said)
    assert after == {A: Attributes(group="y", label_source="person"), B: Attributes(label_source="person")}
    assert changed == [
        Changed(A, "label_source", "person", "model", True),
        Changed(A, "group", "x", "y", False),
    ]
    assert learned(after, said) == (after, changed[:1])


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"colour": "red"}, "unknown column 'colour'; valid: group, captured_at"),
        ({"captured_at": "01.03.2026"}, "captured_at '01.03.2026' is not a moment; expected ISO 8601"),
        ({"captured_at": "1772370000"}, "not a moment"),
        ({"captured_at": "0001-01-01T00:00+23:00"}, "not a moment after 1970"),
        ({"label_source": "crowd"}, "label_source is 'crowd'; expected person, model"),
        ({"confidence": "nan"}, "confidence is 'nan'; expected a number from 0 to 1"),
        ({"confidence": 1.01}, "from 0 to 1"),
        ({"group": "a\nb"}, "group is 'a.nb'; expected one line"),
        ({"source": "x" * 256}, "at most 255 characters"),
        ({"group": ["a"]}, "expected text"),
        ({"group": True}, "expected text"),
    ],
)
def test_what_cannot_be_meant_is_told_by_column(values: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        attributes_of(values)


def test_what_a_source_wrote_beside_its_pictures_is_told_by_line(tmp_path: Path) -> None:
    said = [("a/1.png", Attributes(group="g")), ("a/2.png", Attributes()), ("b/1.png", Attributes(confidence="1.0"))]
    attributes.write_said(tmp_path, said)
    assert attributes.read_said(tmp_path / attributes.FILE) == {file: one for file, one in said if any(one)}
    for line in ("[]", "{}", '{"file": 1}', '{"file": "a/1.png"}', json.dumps({"file": "x", "class": "y"}), "\xff"):
        with (tmp_path / attributes.FILE).open("w", encoding="latin-1") as file:
            file.write('{"file": "a/1.png", "group": "g"}\n' + line + "\n")
        with pytest.raises(DataError, match="attributes.jsonl, line 2: "):
            attributes.read_said(tmp_path / attributes.FILE)
