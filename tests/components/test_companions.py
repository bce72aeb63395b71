from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest

from components import dataversions
from components.companions import ATTRIBUTES, CLUSTERS, REVIEWS, Companion
from components.contracts.data import DataVersion
from components.contracts.errors import DataDiffers, DataError, SchemaTooNew
from flows.workspace.backup import backup
from flows.workspace.workspace import Workspace

SAID = Companion(REVIEWS.name, ("issue", "decision", "who"))
"""Reviews of fewer columns: what is pinned are bytes."""


def test_a_companion_is_pinned_with_the_version_and_nothing_else_changes_it(workspace: Path, tmp_path: Path) -> None:
    before = dataversions.pinned(workspace)
    SAID.write(workspace, SAID.frame({"b": ("keep", 'Ann, "A"'), "a": ("", "Zoë, NA")}))
    with pytest.raises(DataDiffers, match="data.reviews.csv is there, and data.dvc names none"):
        dataversions.pinned(workspace)
    after = dataversions.pin(workspace)
    assert (after.dvc_hash, after.ledger_sha256) == (before.dvc_hash, before.ledger_sha256)
    assert after != before
    assert SAID.read(workspace).to_dict("list") == {
        "issue": ["a", "b"],
        "decision": ["", "keep"],
        "who": ["Zoë, NA", 'Ann, "A"'],
    }
    file = workspace / "data.reviews.csv"
    rules = subprocess.run(["git", "check-attr", "text", "--", file.name], cwd=workspace, capture_output=True, text=True)
    assert rules.stdout.strip() == "data.reviews.csv: text: unset"
    backup(Workspace.find(workspace), tmp_path / "b.tar", with_artefacts=False, force=False)
    with tarfile.open(tmp_path / "b.tar") as archive:
        assert "files/data.reviews.csv" in archive.getnames()

    content = file.read_bytes()
    for changed in (content.replace(b"keep", b"drop"), None):
        file.write_bytes(changed) if changed else file.unlink()
        with pytest.raises(
            DataDiffers, match="data.reviews.csv is not the one that data.dvc names.*git checkout -- data.dvc"
        ):
            dataversions.verify(workspace)
    subprocess.run(["git", "checkout", "--", file.name], cwd=workspace, check=True)
    assert dataversions.verify(workspace) == after

    SAID.write(workspace, SAID.frame())
    assert dataversions.pin(workspace) == before
    listed = subprocess.run(["git", "ls-files"], cwd=workspace, capture_output=True, text=True, check=True)
    assert file.name not in listed.stdout


def test_a_version_without_companions_is_written_as_it_was_before_there_were_any() -> None:
    plain = DataVersion(dvc_hash="h.dir", num_files=3, bytes=4, ledger_sha256="l")
    # Of the record that commit f7edb38 made of these values.
    assert plain.digest() == "f5fd1b028d02e6e768d9bdb984eca7252055c72d87a93ab692bac9f31420a5d1"
    assert DataVersion.read(plain.to_json()) == DataVersion.model_validate(plain.to_json()) == plain
    more = plain.model_copy(update={"companions_sha256": "c"})
    assert (more.to_json()["schema_version"], DataVersion.read(more.to_json())) == (2, more)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "begins with ''"),
        ("cluster,picture\na,b\n", "begins with 'cluster,picture', expected 'picture,cluster'"),
        ("picture,cluster\na\n", "no table.*Expected 2 columns, got 1"),
        ("picture,cluster\na,b,c\n", "no table.*Expected 2 columns, got 3"),
        ('picture,cluster\n"a,b\n', "no table"),
        ("picture,cluster\na,b\na,c\n", "several rows of 'a'"),
        ("picture,cluster\na,b\n\n", "a row without a key"),
    ],
)
def test_what_is_no_companion_is_refused(content: str, problem: str) -> None:
    with pytest.raises(DataError, match=f"^here .*{problem}.*git checkout -- data.clusters.csv"):
        CLUSTERS.parse(content.encode(), place="here")


def test_columns_of_the_future_and_values_of_several_lines_are_refused() -> None:
    with pytest.raises(SchemaTooNew, match="upgrade visionloop"):
        CLUSTERS.parse(b"picture,cluster,certainty\na,b,c\n", place="here")
    with pytest.raises(DataError, match=r"group 'a\\nb' of s holds a line break"):
        ATTRIBUTES.text(ATTRIBUTES.frame({"s": ("a\nb", "", "", "", "")}))
