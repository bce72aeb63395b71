"""What a person names becomes data, by whichever source it is for; nothing is half-imported."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from failpoints import Died, Failpoints
from shapes import visionloop, write_pictures

from components import attributes, dataversions, git, transfers
from components.companions import ATTRIBUTES, TEST_LEDGER
from components.images import decode, pixel_digest
from components.splitting import TestLedger
from components.store import sha256_file
from flows.workspace import sources
from flows.workspace.workspace import Workspace

OWN = '''
"""Shapes that lie in a folder, with what is known of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Source(BaseModel):
    """Copies class folders; a file `known.json` beside them says what is known of their files."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    resumes: ClassVar[bool] = True

    path: Path

    @classmethod
    def takes(cls, given: str) -> bool:
        return given.endswith(".shapes")

    def fetch(self, *, out: Path) -> None:
        known = json.loads((self.path.parent / "known.json").read_text())
        with (out / "attributes.jsonl").open("w") as said:
            for path in sorted(self.path.rglob("*.png")):
                target = out / path.relative_to(self.path)
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, target)
                if path.name in known:
                    said.write(json.dumps({"file": str(target.relative_to(out)), **known[path.name]}) + "\\n")
'''


@pytest.fixture
def own(workspace: Path) -> Path:
    """A workspace of 60 pictures a class with a source of its own, and beside it pictures that only that one takes."""
    (workspace / "plugins" / "sources").mkdir(parents=True)
    (workspace / "plugins" / "sources" / "shapes.py").write_text(OWN)
    write_pictures(workspace.parent / "more.shapes", 6, start=700)
    (workspace.parent / "more.shapes").rename(workspace.parent / "folder")
    (workspace.parent / "known.json").write_text(
        json.dumps({"0700.png": {"group": "a", "captured_at": "2026-03-01T14:00+01:00"}})
    )
    return workspace


def add(own: Path, *arguments: str) -> dict[str, Any]:
    done = visionloop("data", "add", str(own.parent / "folder"), "--source", "shapes", "--json", *arguments, cwd=own)
    answer: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == 0, answer
    return answer


def known(own: Path) -> dict[str, attributes.Attributes]:
    return attributes.read(own)


def test_a_source_adds_to_data_that_is_there_and_what_it_knows_goes_with_the_version(own: Path) -> None:
    before = dataversions.pinned(own).num_files
    answer = add(own)
    assert (answer["files"], answer["copied"], answer["left_out"], answer["with_attributes"]) == (before + 18, 18, [], 3)
    assert {one.group for one in known(own).values()} == {"a"}
    assert {one.captured_at for one in known(own).values()} == {"2026-03-01T13:00:00Z"}
    assert known(own).keys() == {sha256_file(path) for path in (own.parent / "folder").rglob("0700.png")}
    assert ATTRIBUTES.file in git.run(own, "diff", "--cached", "--name-only")
    assert not list((own / ".visionloop" / "tmp").glob("source-*"))
    assert answer["new_classes"] == []
    (own.parent / "folder" / "disc").rename(own.parent / "folder" / "Disk")
    again = add(own, "--near-duplicates", "ignore")  # the same pictures under another label
    assert (again["already_there"], again["copied"], again["new_classes"]) == (12, 6, ["Disk"])
    assert "new beside the classes that were there: 'Disk' (6)" in again["notes"]


def test_what_is_said_again_replaces_what_was_known_whatever_the_file_is_called_now(own: Path) -> None:
    folder, said = own.parent / "folder", own.parent / "known.json"
    first = {"0700.png": {"group": "a"}, "0701.png": {"label_source": "model", "confidence": 0.5}}
    said.write_text(json.dumps(first))
    add(own)
    (folder / "disc" / "0700.png").rename(folder / "disc" / "again.png")
    said.write_text(json.dumps({"again.png": {"group": "b"}, "0701.png": {"source": "line 2", "label_source": "person"}}))
    assert add(own)["changed_attributes"] == ["disc/again.png: group was 'a', and is 'b' now"]
    of = known(own)
    assert of[sha256_file(folder / "disc" / "again.png")] == attributes.Attributes(group="b")
    assert of[sha256_file(folder / "cross" / "0700.png")] == attributes.Attributes(group="a")
    assert of[sha256_file(folder / "disc" / "0701.png")] == attributes.Attributes(source="line 2", label_source="person")


def test_what_a_model_labelled_is_never_test(own: Path) -> None:
    folder = own.parent / "folder"
    lying = TestLedger.read(own / TEST_LEDGER).members
    in_test = next(
        path for path in sorted((own / "data").rglob("*.png")) if lying[pixel_digest(decode(path.read_bytes()))[:32]]
    )
    shutil.copy(in_test, folder / "disc" / "of_test.png")
    said = {path.name: {"label_source": "model", "confidence": 0.9} for path in folder.rglob("*.png")}
    (own.parent / "known.json").write_text(json.dumps(said))
    answer = add(own)
    assert answer["new_test_images"] == 0
    assert answer["left_out"] == [
        {"file": "disc/of_test.png", "reason": "labelled by a model, and its picture is frozen as test"}
    ]
    assert answer["copied"] == 18
    shutil.copytree(folder, own.parent / "split" / "train")
    shutil.copytree(folder, own.parent / "split" / "test")
    done = visionloop("data", "add", str(own.parent / "split"), "--source", "shapes", "--keep-splits", cwd=own)
    assert "19 files of test/ have label_source=model" in done.stderr


@pytest.mark.parametrize(
    ("place", "nth", "when"),
    [
        ((sources, "read_said"), 1, "before"),
        ((attributes, "write"), 1, "before"),
        ((attributes, "write"), 1, "after"),
        ((transfers, "linked"), 7, "after"),
        ((dataversions, "pin"), 1, "before"),
    ],
)
def test_a_killed_add_goes_on_with_what_was_brought(
    own: Path, place: tuple[object, str], nth: int, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = (own / "data.dvc").read_bytes()
    with monkeypatch.context() as patched:
        Failpoints([place], nth=nth, when=when)(patched)  # type: ignore[arg-type]
        with pytest.raises(Died):
            add(own)
    assert (own / "data.dvc").read_bytes() == pinned
    (left,) = (own / ".visionloop" / "tmp").glob("source-shapes-*")
    brought = {path: path.stat().st_ino for path in left.rglob("*.png")}
    assert len(brought) == 18
    seen: list[dict[Path, int]] = []
    real = attributes.read_said

    def looking(path: Path) -> dict[str, attributes.Attributes]:
        seen.append({file: file.stat().st_ino for file in left.rglob("*.png")})
        return real(path)

    monkeypatch.setattr(sources, "read_said", looking)
    answer = add(own)
    assert seen == [brought]
    assert (answer["files"], len(known(own))) == (dataversions.pinned(own).num_files, 3)
    assert not list((own / ".visionloop" / "tmp").glob("*"))


def test_what_is_for_no_source_or_for_several_is_refused_and_nothing_is_guessed(own: Path) -> None:
    twin = OWN.replace("Shapes that lie", "Twins")
    refused = {
        "x.tiff": "x.tiff is not there: no folder, file or source is called so",
        "digit": "did you mean digits?",
        "plugins/sources/twins.py": "is not a folder, and no source takes such a file",
        "x.shapes": "can be for several sources (shapes, twins)",
        "digits": "is a folder here and the name of a source; write ./digits or --source digits",
    }
    (own / "plugins" / "sources" / "twins.py").write_text(twin)
    (own / "digits").mkdir()
    for given, why in refused.items():
        done = visionloop("data", "add", given, cwd=own)
        assert (done.returncode, why in done.stderr) == (2, True), done.stderr
    done = visionloop("data", "add", str(own.parent / "folder"), "--source-setting", "path=x", cwd=own)
    assert "is a folder, which has no settings" in done.stderr
    (own / "plugins" / "sources" / "twins.py").write_text(twin.replace("return given", "return 1 / 0 or given"))
    assert "twins.py:24: ZeroDivisionError" in visionloop("data", "add", "x.tiff", cwd=own).stderr


def test_a_transfer_that_nobody_goes_on_with_is_cleaned_away(own: Path) -> None:
    stale = own / ".visionloop" / "tmp" / "source-shapes-0123"
    fresh = own / ".visionloop" / "tmp" / "source-shapes-4567"
    half = stale.with_name("0123456789abcdef")  # a picture that was being copied
    for folder in (stale, fresh):
        (folder / "out").mkdir(parents=True)
    half.touch()
    for left in (stale, half):
        os.utime(left, (0, 0))
    with sources.staged(Workspace.find(own), "shapes", {"path": str(own.parent / "folder")}):
        pass
    assert (stale.exists(), half.exists(), fresh.exists()) == (False, False, True)
