"""What `data add` does about near-duplicates before the side of a picture is frozen."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter, ImageOps
from shapes import commit, visionloop

from components import dataversions, git, transfers
from components.clusters import Clusters
from components.companions import TEST_LEDGER
from components.contracts.data import Splits
from components.contracts.errors import DataError
from components.contracts.issues import Issue, issue_id
from components.images import decode, pixel_digest
from components.splitting import TestLedger
from components.store import describe, sha256_file
from flows.review import apply
from flows.reviewing.cards import Card, CardFile
from flows.reviewing.deciding import Decision
from flows.workspace import data
from flows.workspace.adding import notes_on
from flows.workspace.near_duplicates import PoisonsTest, told_of
from flows.workspace.workspace import Workspace


def photograph(seed: int) -> Image.Image:
    """Smooth coloured noise: no two alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return coarse.resize((96, 96), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))


def again(image: Image.Image, kind: str) -> Image.Image:
    if kind == "resized":
        return image.resize((80, 80), Image.Resampling.LANCZOS)
    if kind == "cropped":
        return image.crop((5, 5, 91, 91))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=70)
    return Image.open(out).convert("RGB")


def key(image: Image.Image | Path) -> str:
    out = io.BytesIO()
    if isinstance(image, Image.Image):
        image.save(out, "PNG")
    return pixel_digest(decode(out.getvalue() if isinstance(image, Image.Image) else image.read_bytes()))[:32]


def write(folder: Path, **classes: list[Image.Image]) -> Path:
    for label, images in classes.items():
        (folder / label).mkdir(parents=True)
        for number, image in enumerate(images):
            image.save(folder / label / f"{number:03d}.png")
    return folder


def added(root: Path, *arguments: str, status: int = 0) -> dict[str, Any]:
    done = visionloop("data", "add", *arguments, "--json", cwd=root)
    assert done.returncode == status, (done.stdout, done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def ledger(root: Path) -> dict[str, bool]:
    return dict(TestLedger.read(root / TEST_LEDGER).members)


def take(root: Path, folder: Path | None = None, **options: Any) -> data.Added:
    """`data add` in this process."""
    return data.add(Workspace.find(root), folder, test_share=None, **options)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A workspace of 30 pictures of a class; `first` is what was added to it."""
    Workspace.create(tmp_path / "ws")
    cats, dogs = ([photograph(start + seed) for seed in range(30)] for start in (0, 100))
    take(tmp_path / "ws", write(tmp_path / "first", cat=cats, dog=dogs))
    commit(tmp_path / "ws")
    return tmp_path / "ws"


def frozen(root: Path, label: str) -> list[Path]:
    """The test pictures of a class, where they lie."""
    members = ledger(root)
    return [path for path in sorted((root / "data" / label).glob("*.png")) if members[key(path)]]


def test_copies_of_a_test_picture_are_refused_until_a_person_says_what_to_do(photographs: Path, tmp_path: Path) -> None:
    before = ledger(photographs)
    tested = next(path for path in sorted((tmp_path / "first").rglob("*.png")) if before[key(path)])
    trained = next(path for path in sorted((tmp_path / "first" / "dog").glob("*.png")) if not before[key(path)])
    label, image = tested.parent.name, Image.open(tested)
    more = write(tmp_path / "more", **{label: [again(image, "resized"), again(image, "jpeg"), photograph(500)]})
    (more / "dog").mkdir(exist_ok=True)
    again(Image.open(trained), "cropped").save(more / "dog" / "twin.png")
    state = {path: path.read_bytes() for path in photographs.glob("data.*")}
    refused = added(photographs, str(more), status=1)
    assert [(each["kind"], each["file"], each["twin"]) for each in refused["conflicts"]] == [
        ("copy of a test picture", f"{label}/{number:03d}.png", f"data/{label}/{tested.name}") for number in (0, 1)
    ]
    assert "--near-duplicates exclude" in refused["refused"]
    # Nothing is half-added.
    assert {path: path.read_bytes() for path in photographs.glob("data.*")} == state
    assert dataversions.verify(photographs).num_files == 60

    answer = added(photographs, str(more), "--near-duplicates", "exclude")
    assert any("2 new files would poison the frozen test set and are kept out of every split" in n for n in answer["notes"])
    after = ledger(photographs)
    assert {picture: after[picture] for picture in before} == before
    twins = [key(more / label / f"{number:03d}.png") for number in (0, 1)]
    clusters = Clusters.read(photographs)
    assert {after[twin] for twin in (*twins, key(more / "dog" / "twin.png"))} == {False}
    assert len({clusters.near[picture] for picture in (*twins, key(tested))}) == 1
    assert clusters.near[key(trained)] == clusters.near[key(more / "dog" / "twin.png")]
    # What was decided is not asked again.
    assert added(photographs)["copied"] == 0
    assert added(photographs, str(more))["already_there"] == 4
    assert dataversions.verify(photographs).num_files == 64


def test_a_copy_of_a_twin_is_no_question_while_the_test_picture_is_away(photographs: Path, tmp_path: Path) -> None:
    one = frozen(photographs, "cat")[0]
    image, name = Image.open(one).copy(), key(one)
    take(photographs, write(tmp_path / "more", cat=[again(image, "resized")]), near_duplicates="exclude")
    one.unlink()
    take(photographs)
    third = again(image, "cropped")
    take(photographs, write(tmp_path / "third", cat=[third]))
    assert Clusters.read(photographs).near[key(third)] == Clusters.read(photographs).near[name]
    assert not ledger(photographs)[key(third)]


def test_pictures_too_small_to_be_told_from_copies_are_pictures_of_their_own(tmp_path: Path) -> None:
    Workspace.create(tmp_path / "ws")
    small = [photograph(seed).resize((31, 40), Image.Resampling.LANCZOS) for seed in range(8)]
    done = take(tmp_path / "ws", write(tmp_path / "given", cat=[*small[:4], again(small[0], "jpeg")], dog=small[4:]))
    assert done.looked is not None
    assert Clusters.read(tmp_path / "ws").near == {}
    told = "9 pictures under 32 pixels: only copies of equal pixels are looked for among such small ones"
    assert list(told_of(done.looked)) == [told]


def test_who_takes_copies_for_pictures_of_their_own_is_believed_for_ever(photographs: Path, tmp_path: Path) -> None:
    one = frozen(photographs, "cat")[0]
    original = Image.open(one).copy()
    write(tmp_path / "more", cat=[again(original, "resized")])
    added(photographs, str(tmp_path / "more"), "--near-duplicates", "ignore")
    take(photographs)
    assert key(tmp_path / "more" / "cat" / "000.png") in ledger(photographs)
    # Also when the picture was away and comes back; what it is a copy of now is asked about as ever.
    one.unlink()
    take(photographs)
    original.save(one)
    take(photographs)
    assert Clusters.read(photographs).near == {}
    with pytest.raises(PoisonsTest, match="1 new file would poison"):
        take(photographs, write(tmp_path / "third", cat=[again(original, "cropped")]))


def test_one_picture_under_two_labels_is_refused_and_never_test(photographs: Path, tmp_path: Path) -> None:
    one, other, equal = photograph(700), photograph(701), photograph(702)
    write(tmp_path / "more", cat=[one, other, equal], dog=[again(one, "cropped"), equal])
    refused = added(photographs, str(tmp_path / "more"), status=1)
    assert {each["kind"] for each in refused["conflicts"]} == {"other label"}
    assert {each["file"] for each in refused["conflicts"]} == {"cat/000.png", "dog/000.png", "cat/002.png", "dog/001.png"}
    added(photographs, str(tmp_path / "more"), "--near-duplicates", "exclude")
    after = ledger(photographs)
    assert not any(after[key(image)] for image in (one, again(one, "cropped"), equal))
    equals = [photograph(720 + seed) for seed in range(10)]  # of as many, two would be drawn
    added(photographs, str(write(tmp_path / "equals", cat=equals, dog=equals)), "--near-duplicates", "exclude")
    assert not any(ledger(photographs)[key(image)] for image in equals)


def test_copies_across_given_splits_are_refused_and_then_leave_the_test_as_it_was_given(tmp_path: Path) -> None:
    root = tmp_path / "ws"
    Workspace.create(root)
    cats, dogs = ([photograph(start + seed) for seed in range(12)] for start in (0, 100))
    write(tmp_path / "given" / "train", cat=[*cats[:9], again(cats[9], "jpeg")], dog=dogs[:9])
    write(tmp_path / "given" / "test", cat=cats[9:], dog=dogs[9:])
    refused = added(root, str(tmp_path / "given"), "--keep-splits", status=1)
    assert [(each["kind"], each["file"], each["twin"]) for each in refused["conflicts"]] == [
        ("copy across splits", "train/cat/009.png", "test/cat/000.png")
    ]
    assert not (root / "data").exists()
    added(root, str(tmp_path / "given"), "--keep-splits", "--near-duplicates", "exclude")
    in_test = {picture for picture, test in ledger(root).items() if test}
    assert in_test == {key(image) for image in (*cats[9:], *dogs[9:])}


def test_copies_that_came_while_their_test_pictures_were_away_never_train(photographs: Path, tmp_path: Path) -> None:
    away = frozen(photographs, "cat")
    originals = {path: path.read_bytes() for path in away}
    names = [key(path) for path in away]
    for path in away:
        path.unlink()
    take(photographs)
    twins = [again(Image.open(io.BytesIO(content)), "cropped") for content in originals.values()]
    more = write(tmp_path / "more", cat=twins)
    for path in sorted((more / "cat").iterdir()):
        path.rename(path.with_stem(f"twin-{path.stem}"))
    take(photographs, more)
    before = ledger(photographs)
    outside = {name: key(twin) for name, twin in zip(names, twins, strict=True) if not before[key(twin)]}
    assert outside, "nobody knew of them, so some of them train"
    for path, content in originals.items():
        path.write_bytes(content)
    with pytest.raises(PoisonsTest, match="is a frozen test picture and shows what .* shows, which is none") as caught:
        take(photographs)
    assert {one.kind for one in caught.value.conflicts} == {"test picture with a copy"}
    assert len(caught.value.conflicts) == len(outside)
    take(photographs, near_duplicates="exclude")
    near = Clusters.read(photographs).near
    assert all(near[twin] == near[original] for original, twin in outside.items())
    assert {picture: ledger(photographs)[picture] for picture in before} == before


def test_mirror_images_are_copies_once_they_have_one_label(photographs: Path, tmp_path: Path) -> None:
    """By a person's hand, and by a review."""
    by_hand, by_review = (ImageOps.mirror(Image.open(path)) for path in frozen(photographs, "cat")[:2])
    take(photographs, write(tmp_path / "more", dog=[by_hand, by_review]))
    after = ledger(photographs)
    assert Clusters.read(photographs).near == {}, "an arrow to the left is no arrow to the right"
    take(photographs)
    places = {key(path): path for path in (photographs / "data" / "dog").iterdir()}
    workspace, one = Workspace.find(photographs), places[key(by_review)]
    name = one.relative_to(photographs / "data").as_posix()
    sha256 = sha256_file(one)
    issue = Issue(
        kind="label_error",
        severity="warning",
        files=(name,),
        score=0.1,
        threshold=0.5,
        detail="it looks like a cat",
        action="look at it",
        id=issue_id("label_error", [(sha256, "dog")]),
    )
    card = Card(issue=issue, files=(CardFile(path=name, label="dog", sha256=sha256, test=after[key(by_review)]),))
    apply(workspace, [Decision("line 2", card, "relabel:cat")], who="ann", why="why", test_pictures=True)
    assert set(Clusters.read(photographs).near) == {key(by_review), key(ImageOps.mirror(by_review))}
    moved = places[key(by_hand)]
    moved.rename(photographs / "data" / "cat" / "moved.png")
    if not after[key(by_hand)]:
        with pytest.raises(PoisonsTest, match="moved.png .cat. shows what .* a frozen test picture"):
            take(photographs)
    take(photographs, near_duplicates="exclude")
    assert len(Clusters.read(photographs).near) == 4


@pytest.mark.parametrize("back", [("checkout", "--quiet", "HEAD~1", "--", "data.*"), ("revert", "--no-edit", "HEAD")])
def test_no_row_of_a_ledger_that_git_holds_is_forgotten(photographs: Path, tmp_path: Path, back: tuple[str, ...]) -> None:
    take(photographs, write(tmp_path / "second", cat=[photograph(200 + seed) for seed in range(40)]))
    second = ledger(photographs)
    commit(photographs)
    # Back to the first version, and on from there with other pictures.
    git.run(photographs, "-c", "user.name=t", "-c", "user.email=t@t.invalid", *back)
    transfers.pull(photographs)
    assert len(ledger(photographs)) == 60
    take(photographs, write(tmp_path / "third", cat=[photograph(200 + seed) for seed in range(20, 50)]))
    third = ledger(photographs)
    assert {picture: third[picture] for picture in second} == second
    assert len(third) == 110
    text = (photographs / TEST_LEDGER).read_text()
    (photographs / TEST_LEDGER).write_text(text.replace(",test", ",rest", 1))
    with pytest.raises(DataError, match="has 1 picture on another side than git's index has them .* Restore it with"):
        take(photographs)


def test_a_version_that_is_taken_back_leaves_the_sides_by_which_models_were_judged(
    photographs: Path, tmp_path: Path
) -> None:
    first = ledger(photographs)
    second = write(tmp_path / "second", cat=[photograph(200 + seed) for seed in range(12)])
    take(photographs, second)
    commit(photographs)
    # As a run split them, on the sides that no second draw would give them; folds are no frozen test.
    drawn = {picture: side for picture, side in ledger(photographs).items() if picture not in first}
    split = {picture: not side for picture, side in drawn.items()}
    publish_splits(photographs, "splitting", split | first)
    publish_splits(photographs, "splitting/fold-1-of-2", {"f" * 32: True})
    git.run(photographs, "reset", "--quiet", "--hard", "HEAD~1")
    transfers.pull(photographs)
    assert ledger(photographs) == first
    added = take(photographs, second)
    assert ledger(photographs) == first | split
    assert added.num_new_test == 0
    told = "the test ledger lacked 12 pictures that runs of this workspace trained or judged models on; each stays on"
    assert [note for note in notes_on(added) if note.startswith(told)]
    assert take(photographs, second).num_only_split == 0
    # Also where the first version is taken back.
    for path in (photographs / "data.dvc", photographs / TEST_LEDGER, *photographs.glob("data.*.csv")):
        path.unlink(missing_ok=True)
    take(photographs, second)
    assert ledger(photographs) == first | split


def publish_splits(root: Path, kind: str, sides: dict[str, bool]) -> None:
    """What a run keeps of how it split pictures."""
    store, key = Workspace.find(root).store, "0" * 64
    table = pd.DataFrame({"picture": list(sides), "split": ["test" if side else "train" for side in sides.values()]})
    with store.writing(kind, key) as out:
        table.to_parquet(out / "splits.parquet", index=False)
        record = Splits(
            data=dataversions.pinned(root),
            table=describe(out / "splits.parquet", within=out),
            classes=("cat", "dog"),
            counts={},
            class_counts={},
            num_duplicate_groups=0,
            test_digest="",
        )
    store.publish(kind, key, record, inputs={}, provenance={})


def test_a_large_cluster_is_asked_about(tmp_path: Path) -> None:
    root = tmp_path / "ws"
    Workspace.create(root)
    one = photograph(1)
    copies = [one.resize((side, side), Image.Resampling.LANCZOS) for side in range(84, 96)]
    write(tmp_path / "given", cat=[photograph(start) for start in range(50, 70)], dog=[*copies, photograph(2)])
    refused = added(root, str(tmp_path / "given"), status=1)
    assert "12 pictures of 33 (36%) are one cluster of near-duplicates" in refused["refused"]
    assert not (root / "data").exists()
    added(root, str(tmp_path / "given"), "--max-cluster-share", "0.4")
    assert len({ledger(root)[key(image)] for image in copies}) == 1
    # It is asked about again once it has grown, and not before; a picture of it that is away is none of them.
    take(root, write(tmp_path / "more", cat=[photograph(3)]))
    (root / "data" / "dog" / "000.png").unlink()
    with pytest.raises(PoisonsTest, match="12 pictures of 34 .35%. are one cluster"):
        take(root, write(tmp_path / "again", dog=[one.resize((97, 97), Image.Resampling.LANCZOS)]))
