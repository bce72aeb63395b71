from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

import pandas as pd
import pytest
from PIL import Image
from shapes import picture, write_pictures

from components import issues, plugins
from components.contracts.data import Dataset, DataVersion
from components.contracts.errors import ConfigError, DataError, DataRejected
from components.contracts.records import canonical_json, sha256_text
from components.expectations import ExpectationConfig
from components.formats import PINNED, Accepted
from components.validation import ValidationConfig, check, validate


def run(data: Path, config: ValidationConfig | None = None, accepted: Accepted = PINNED) -> Dataset:
    out = data.parent / "out"
    out.mkdir(exist_ok=True)
    num_files = sum(path.is_file() for path in data.rglob("*"))
    version = DataVersion(dvc_hash="h", num_files=num_files, bytes=1, ledger_sha256="l")
    return validate(data, version, config or ValidationConfig(), out=out, accepted=accepted)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "data", 20)
    return tmp_path / "data"


def test_good_images_are_kept_with_their_facts_and_data_docs(data: Path) -> None:
    dataset = run(data)
    assert (dataset.num_input, dataset.num_kept, dataset.num_quarantined) == (60, 60, 0)
    assert dataset.classes == ("cross", "disc", "stripes")
    table = pd.read_parquet(data.parent / "out" / "samples.parquet")
    assert {"sha256", "picture", "brightness", "contrast", "sharpness", "mode", "width"} <= set(table.columns)
    assert table["sharpness"].min() > 0
    pages = list((data.parent / "out" / "data_docs").rglob("*.html"))
    assert "index.html" in {page.name for page in pages}
    for page in pages:  # whose makers do not escape the names of files and classes
        policy = page.read_text().partition("<head>")[2].partition(">")[0]
        assert policy.startswith('<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; ')
        assert "script" not in policy


def test_what_serving_refuses_and_profiles_without_use_are_counted_and_used(data: Path) -> None:
    grey = Image.open(data / "disc" / "0001.png").convert("L")
    grey.save(data / "disc" / "0001.png", icc_profile=b"no profile")
    grey.rotate(90).save(data / "disc" / "0001.bmp")
    dataset = run(data, accepted=Accepted(formats=("PNG",)))
    assert (dataset.num_kept, dataset.num_quarantined) == (61, 0)
    (refused,) = (warning for warning in dataset.warnings if "serving refuses" in warning)
    assert refused.startswith("1 pictures")
    assert "disc/0001.bmp: a BMP picture, which is not an accepted format (PNG)" in refused
    (ignored,) = (warning for warning in dataset.warnings if "colour profile" in warning)
    assert "disc/0001.png: its colour profile is broken" in ignored


def test_undecodable_files_are_quarantined_and_counted(data: Path) -> None:
    (data / "disc" / "text.png").write_bytes(b"not an image")
    whole = (data / "disc" / "0001.png").read_bytes()
    (data / "disc" / "cut.png").write_bytes(whole[: len(whole) // 2])
    dataset = run(data, ValidationConfig(max_quarantined_share=0.1))
    assert dataset.num_input == dataset.num_kept + dataset.num_quarantined == 62
    refused = pd.read_parquet(data.parent / "out" / "quarantine.parquet")
    assert dict(zip(refused["path"], refused["reason"], strict=True)).keys() == {"disc/text.png", "disc/cut.png"}
    assert refused["reason"].str.len().min() > 10


def test_too_many_unusable_files_stop_the_run(data: Path) -> None:
    (data / "disc" / "text.png").write_bytes(b"not an image")
    with pytest.raises(DataRejected, match=r"1 of 61 files.*disc/text\.png.*max_quarantined_share"):
        run(data, ValidationConfig(max_quarantined_share=0.01))


def test_the_same_picture_under_two_classes_is_quarantined(data: Path) -> None:
    same = picture("disc", 1)
    Image.fromarray(same).save(data / "cross" / "copy.bmp")
    dataset = run(data, ValidationConfig(max_quarantined_share=0.1))
    refused = pd.read_parquet(data.parent / "out" / "quarantine.parquet")
    assert set(refused["path"]) == {"cross/copy.bmp", "disc/0001.png"}
    assert dataset.num_kept == 59


def test_an_empty_folder_is_no_part_of_a_version(data: Path) -> None:
    (data / "empty").mkdir()
    assert run(data).classes == ("cross", "disc", "stripes")


def test_what_dvc_ignores_is_not_counted_and_twins_of_a_class_are_told(data: Path) -> None:
    (data.parent / ".dvcignore").write_text("Thumbs.db\n*.txt\n")
    for name in ("Thumbs.db", "notes.txt"):
        (data / "disc" / name).write_text("no image")
    write_pictures(data, 20, start=100, kinds=("Disc",))
    version = DataVersion(dvc_hash="h", num_files=80, bytes=1, ledger_sha256="l")
    (data.parent / "out").mkdir()
    dataset = validate(data, version, ValidationConfig(), out=data.parent / "out")
    assert dataset.num_input == 80
    assert any("'Disc', 'disc'" in warning for warning in dataset.warnings)


def test_a_one_image_class_is_refused(data: Path) -> None:
    (data / "lone").mkdir()
    Image.fromarray(picture("disc", 999)).save(data / "lone" / "a.png")
    with pytest.raises(DataRejected, match=r"lone \(images 1\)"):
        run(data)


def test_one_class_is_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data", 20, kinds=("disc",))
    with pytest.raises(DataRejected, match="at least 2 classes.*found 1"):
        run(tmp_path / "data")


def test_no_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="holds no images.*data add"):
        run(tmp_path / "data")


def test_warnings_do_not_stop_the_run(data: Path) -> None:
    Image.new("L", (16, 16), 0).save(data / "disc" / "black.png")
    for name in ("copy1.png", "copy2.png"):
        Image.fromarray(picture("disc", 1)).save(data / "disc" / name)
    warnings = " | ".join(run(data).warnings)
    assert "almost black or almost white" in warnings
    assert "same picture several times" in warnings
    assert "disc/black.png" in warnings


def test_an_unreadable_folder_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("disc"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match="cannot read.*disc.*Permission denied.*give read permission"):
        run(data)


def test_files_outside_a_class_are_counted_and_quarantined(data: Path) -> None:
    (data / "disc" / "deep").mkdir()
    for stray in ("loose.png", "disc/deep/a.png", "disc/.hidden.png"):
        (data / stray).write_bytes((data / "disc" / "0001.png").read_bytes())
    dataset = run(data, ValidationConfig(max_quarantined_share=0.1))
    assert (dataset.num_input, dataset.num_kept, dataset.num_quarantined) == (63, 60, 3)


def test_a_folder_that_does_not_hold_its_version_is_refused(data: Path) -> None:
    version = DataVersion(dvc_hash="h", num_files=59, bytes=1, ledger_sha256="l")
    with pytest.raises(DataError, match="holds 60 files, its version pins 59"):
        validate(data, version, ValidationConfig(), out=data.parent)


def test_what_was_looked_for_and_found_is_recorded_and_written(data: Path) -> None:
    Image.fromarray(picture("disc", 1)).save(data / "disc" / "copy.bmp")
    (data / "disc" / "text.png").write_bytes(b"not an image")
    dataset = run(data, ValidationConfig(max_quarantined_share=0.1))
    found = {issue.kind: issue for issue in issues.read(data.parent / "out" / issues.FILE)}
    assert found["exact_duplicate"].files == ("disc/copy.bmp", "disc/0001.png")
    assert found["unreadable"].files == ("disc/text.png",)
    looked = {each.name: each for each in dataset.findings}
    assert looked.keys() == set(plugins.names("findings"))
    assert (looked["exact_duplicate"].ran, looked["exact_duplicate"].num_issues) == (True, 1)
    assert (looked["leak"].ran, looked["leak"].reason) == (False, "no split here")
    assert dataset.severities["warning"] >= 2
    told = "61 pictures under 32 pixels: only copies of equal pixels are looked for among such small ones"
    assert told in dataset.warnings
    assert any(told.startswith("exact_duplicate: 1 issue (disc/copy.bmp, disc/0001.png: ") for told in dataset.warnings)


def test_a_critical_issue_refuses_the_data_set_and_is_written(data: Path) -> None:
    Image.fromarray(picture("disc", 1)).save(data / "disc" / "copy.bmp")
    chosen = (issues.FindingConfig(finding="exact_duplicate", severity="critical"),)
    with pytest.raises(
        DataRejected, match=r"1 critical issue found \(exact_duplicate: disc/copy.bmp, .*`visionloop data check`"
    ):
        run(data, ValidationConfig(findings=chosen))
    assert len(issues.read(data.parent / "out" / issues.FILE)) == 1
    assert run(data, ValidationConfig(findings=())).findings == ()


def test_a_recipe_adds_expectations_of_its_own(data: Path) -> None:
    def asked(severity: Literal["critical", "warning", "note"], largest: int) -> ValidationConfig:
        settings = {"max_value": largest}
        more = ExpectationConfig(
            expectation="ExpectColumnValuesToBeBetween", column="width", settings=settings, severity=severity
        )
        return ValidationConfig(expectations=(more,))

    told = "ExpectColumnValuesToBeBetween of the recipe for width; 60 found: cross/0000.png (width 16)"
    assert any(told in warning for warning in run(data, asked("warning", 10)).warnings)
    assert not any("of the recipe" in warning for warning in run(data, asked("note", 10)).warnings)
    assert not any("of the recipe" in warning for warning in run(data, asked("critical", 16)).warnings)
    with pytest.raises(DataRejected, match="refused: ExpectColumnValuesToBeBetween of the recipe for width"):
        run(data, asked("critical", 10))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"findings": [{"finding": "blurry"}]}, "unknown finding 'blurry'; valid: blurred, "),
        ({"findings": [{"finding": "dark", "settings": {"never": 1}}]}, "unknown setting of finding 'dark' 'never'"),
        ({"expectations": [{"expectation": "ExpectNothing"}]}, "unknown expectation 'ExpectNothing'; valid: Expect"),
        ({"expectations": [{"expectation": "ExpectColumnValuesToBeUnique", "column": "wide"}]}, "unknown column of images .* 'wide'; valid: "),
        ({"expectations": [{"expectation": "ExpectColumnValuesToBeUnique", "column": "width", "settings": {"a": 1}}]}, "expectation ExpectColumnValuesToBeUnique: .*correct"),
    ],
)  # fmt: skip
def test_what_does_not_exist_dies_before_any_work(config: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        check(ValidationConfig.model_validate_json(json.dumps(config)))


def test_a_dataset_of_before_findings_is_read_and_keeps_its_digest(data: Path) -> None:
    new = run(data)
    old = {name: value for name, value in new.to_json().items() if name not in ("issues", "findings", "severities")}
    old["schema_version"] = 1
    read = Dataset.read(old)
    assert (read.issues, read.findings, read.severities) == (None, (), {})
    assert read.digest() == sha256_text(canonical_json(old))
    assert Dataset.read(new.to_json()) == new
