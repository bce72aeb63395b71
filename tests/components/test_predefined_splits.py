from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from failpoints import Died, Failpoints
from PIL import Image
from shapes import picture, visionloop, write_pictures

from components import dataversions
from components.companions import TEST_LEDGER
from components.contracts.errors import DataError
from components.images import decode, pixel_digest
from components.splitting import TestLedger
from flows.workspace import data
from flows.workspace.data import add
from flows.workspace.workspace import Workspace


def write_split(folder: Path) -> None:
    """train/ of 10 a class, val/ and test/ of 4, all with file names that begin at 0000; no other test has the pictures."""
    for name, count, start in (("train", 10, 1000), ("val", 4, 1100), ("test", 4, 1200)):
        write_pictures(folder / "drawn", count, start=start)
        for path in sorted((folder / "drawn").rglob("*.png")):
            target = folder / name / path.parent.name / f"{int(path.stem) - start:04d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        shutil.rmtree(folder / "drawn")


def digests(folder: Path) -> set[str]:
    return {pixel_digest(decode(path.read_bytes()))[:32] for path in folder.rglob("*.*")}


def on_test_side(root: Path) -> set[str]:
    return {picture for picture, test in TestLedger.read(root / TEST_LEDGER).members.items() if test}


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    Workspace.create(tmp_path / "ws")
    return tmp_path / "ws"


@pytest.fixture
def split(tmp_path: Path) -> Path:
    write_split(tmp_path / "given")
    return tmp_path / "given"


def test_the_test_pictures_of_a_split_folder_are_the_frozen_test_and_no_file_is_lost(empty: Path, split: Path) -> None:
    (split / "README.md").write_text("about")
    (split / "test" / "disc" / "broken.png").write_bytes((split / "test" / "disc" / "0000.png").read_bytes()[:90])
    shutil.copy(split / "train" / "disc" / "0001.png", split / "val" / "disc" / "0001.png")  # the same bytes: one picture
    done = visionloop("data", "add", str(split), "--keep-splits", "--json", cwd=empty)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["files"], answer["copied"], answer["already_there"], answer["new_test_images"]) == (54, 54, 1, 12)
    assert answer["left_out"] == [{"file": "README.md", "reason": "it lies beside the folders of the splits"}]
    assert (answer["leaked"], answer["stay_test"], answer["stay_rest"]) == ([], [], [])
    (split / "test" / "disc" / "broken.png").unlink()
    assert on_test_side(empty) == digests(split / "test")
    ours = {path.read_bytes() for path in (empty / "data").rglob("*.png")}
    assert ours >= {path.read_bytes() for path in split.rglob("*.png")}
    assert dataversions.verify(empty).num_files == 54


def test_a_picture_of_train_that_is_also_in_test_is_test_and_named(empty: Path, split: Path) -> None:
    Image.fromarray(picture("disc", 1203)).save(split / "train" / "disc" / "again.bmp")
    Image.fromarray(picture("cross", 1200)).save(split / "val" / "cross" / "again.bmp")
    done = visionloop("data", "add", str(split), "--keep-splits", cwd=empty)
    assert (
        "2 images of train/ or val/ show the same pictures as test/ does; they are test, and nothing trains on them: "
        "train/disc/again.bmp, val/cross/again.bmp" in " ".join(done.stdout.split())
    )
    assert on_test_side(empty) == digests(split / "test")


def test_pictures_that_were_frozen_before_stay_where_they_are_and_are_named(workspace: Path, tmp_path: Path) -> None:
    before = TestLedger.read(workspace / TEST_LEDGER).members
    lying = {pixel_digest(decode(path.read_bytes()))[:32]: path for path in sorted((workspace / "data").rglob("*.png"))}
    rest, test = (next(path for key, path in lying.items() if before[key] is side) for side in (False, True))
    write_split(tmp_path / "given")
    shutil.copy(rest, tmp_path / "given" / "test" / rest.parent.name / "was-rest.png")
    shutil.copy(test, tmp_path / "given" / "train" / test.parent.name / "was-test.png")
    # On both sides now, and frozen outside test before: the file of train/ is where it was, so it leaks nothing.
    shutil.copy(rest, tmp_path / "given" / "train" / rest.parent.name / "was-rest.png")
    added = add(Workspace.find(workspace), tmp_path / "given", test_share=None, keep_splits=True)
    assert added.sides == data.Sides(
        stay_test=(f"train/{test.parent.name}/was-test.png",), stay_rest=(f"test/{rest.parent.name}/was-rest.png",)
    )
    after = TestLedger.read(workspace / TEST_LEDGER).members
    assert {key: after[key] for key in before} == dict(before)


@pytest.mark.parametrize(
    ("place", "nth"),
    [
        ((TestLedger, "write"), 1),
        ((shutil, "copyfile"), 1),
        ((shutil, "copyfile"), 45),  # of a picture of test/
        ((dataversions, "store"), 1),
        ((TestLedger, "write"), 2),
        ((dataversions, "pin"), 1),
    ],
)
def test_a_killed_add_leaves_no_picture_whose_side_a_later_one_would_draw(
    workspace: Path, split: Path, place: tuple[object, str], nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    test, rest = digests(split / "test"), digests(split / "train") | digests(split / "val")
    pinned = (workspace / "data.dvc").read_bytes()
    for when in ("before", "after"):
        with monkeypatch.context() as patched:
            Failpoints([place], nth=nth, when=when)(patched)
            with pytest.raises(Died):
                add(Workspace.find(workspace), split, test_share=None, keep_splits=True)
        assert (workspace / "data.dvc").read_bytes() == pinned or (place[1], when) == ("pin", "after")
        there = digests(workspace / "data")
        frozen = TestLedger.read(workspace / TEST_LEDGER).extended((key, "a") for key in there).members
        assert {key for key in there & (test | rest) if frozen[key] != (key in test)} == set()
    add(Workspace.find(workspace), None, test_share=None)  # whoever pins what lies there draws no side anew
    assert on_test_side(workspace) >= test
    assert not on_test_side(workspace) & rest
    add(Workspace.find(workspace), split, test_share=None, keep_splits=True)
    assert digests(workspace / "data") >= test | rest


def _beside(folder: Path) -> None:
    write_pictures(folder, 2, kinds=("disc",))


def _other_classes(folder: Path) -> None:
    (folder / "test" / "disc").rename(folder / "test" / "Disc")


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder / "test")
    (folder / "test").mkdir()


def _one_empty_class(folder: Path) -> None:
    for path in (folder / "test" / "disc").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("change", "keep", "message"),
    [
        (
            None,
            None,
            "already split .train, val, test hold.*test with --keep-splits, or let visionloop .* with --merge-splits",
        ),
        (lambda folder: shutil.rmtree(folder / "test"), None, r"\(train, val hold class folders\)\. let visionloop choose"),
        (lambda folder: shutil.rmtree(folder / "test"), True, "has no test/"),
        (lambda folder: shutil.rmtree(folder / "train"), True, "has no train/"),
        (_emptied, True, "given/test has no sub-folders"),
        (_one_empty_class, True, "class 'disc' has no images in .*given/test"),
        (_other_classes, True, "classes in train/ that test/ lacks .'disc'"),
        (lambda folder: shutil.rmtree(folder / "train" / "disc"), True, "classes in test/ that train/ lacks .'disc'"),
        (
            lambda folder: write_pictures(folder / "val", 1, kinds=("blob",)),
            True,
            "classes in val/ that train/ lacks .'blob'",
        ),
        (_beside, True, "other folders .disc. beside those of splits .train, val, test"),
        (_beside, None, "other folders .disc. beside those of splits"),
    ],
)
def test_split_folders_of_the_wrong_shape_change_nothing(
    workspace: Path, split: Path, change: Callable[[Path], None] | None, keep: bool | None, message: str
) -> None:
    if change is not None:
        change(split)
    with pytest.raises(DataError, match=message):
        add(Workspace.find(workspace), split, test_share=None, keep_splits=keep)
    dataversions.verify(workspace)


def test_what_is_not_split_is_told_so_and_classes_may_be_called_train_and_test(empty: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "vehicles", 12, kinds=("cross", "disc"))
    for kind, name in (("cross", "train"), ("disc", "test")):
        (tmp_path / "vehicles" / kind).rename(tmp_path / "vehicles" / name)
    with pytest.raises(DataError, match="is not split; expected train/ and test/"):
        add(Workspace.find(empty), tmp_path / "vehicles", test_share=None, keep_splits=True)
    assert add(Workspace.find(empty), tmp_path / "vehicles", test_share=None).class_counts == {"test": 12, "train": 12}
    done = visionloop("data", "add", "--keep-splits", cwd=empty)
    assert (done.returncode, "name it, too" in done.stderr) == (2, True)


def test_a_split_folder_that_is_merged_has_a_test_of_the_usual_share(empty: Path, split: Path) -> None:
    shutil.rmtree(split / "test" / "disc")  # classes may differ: which of them are test is drawn
    added = add(Workspace.find(empty), split, test_share=0.25, keep_splits=False)
    assert added.version.num_files == 50
    assert added.num_new_test in range(11, 15)  # of 18, 18 and 14 of a class
    assert on_test_side(empty) != digests(split / "test")


def test_a_split_folder_of_one_class_says_what_training_will_object_to(empty: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "given" / "train", 12, kinds=("disc",))
    write_pictures(tmp_path / "given" / "test", 12, start=50, kinds=("disc",))
    done = visionloop("data", "add", str(tmp_path / "given"), "--keep-splits", cwd=empty)
    assert "only one class so far: training needs at least two" in done.stdout
