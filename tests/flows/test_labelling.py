"""What a page that labels pictures stands on, on a workspace with a window that drifted."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shutil
from pathlib import Path

import pytest
from looped import MODEL, loop_of
from PIL import Image
from served import png, unpacked
from shapes import KINDS

from components.contracts.errors import ConfigError, DataError, UnknownName
from flows.loop import labels as labels_module
from flows.loop.labelling import choices, count_asked, give_labels, picture, pictures_of, to_label
from flows.loop.labels import import_labels
from flows.loop.loop import Loop
from flows.loop.predictions import erase_image
from flows.loop.report import render
from flows.loop.windows import ROWS, TO_LABEL, recorded, rows_of
from flows.pages.thumbnails import media_type
from flows.workspace.renaming import rename_class


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(tmp_path_factory.mktemp("older"))


@pytest.fixture
def loop(made: Path, tmp_path: Path) -> Loop:
    """A loop with a window that passed, a later one that drifted and asks for labels, and what servers kept of it."""
    return loop_of(Path(shutil.copytree(made, tmp_path / "workspace", symlinks=True)))


def drifted(loop: Loop) -> str:
    """The window that drifted, the first of them where there are several."""
    *_, found = [
        name for name in loop.window_store.names() if (verdict := recorded(loop, name)) and verdict.status == "drift"
    ]
    return found


def folder(loop: Loop) -> Path:
    """Where the windows lie."""
    return Path(loop.window_store.url)


def another(loop: Loop) -> Path:
    """A later window that drifted alike, with its alarm."""
    window, verdict = "2026-11-28T0000Z-0123456789", recorded(loop, drifted(loop))
    assert verdict is not None
    loop.outbox.raise_alarm(verdict, window)
    return Path(shutil.copytree(folder(loop) / drifted(loop), folder(loop) / window))


def counted(loop: Loop) -> dict[str, str]:
    """The label that counts, by image."""
    return {sha256: label.label for sha256, label in loop.labels.latest(MODEL).items()}


def images_of(loop: Loop, window: str) -> set[str]:
    """The images that a window was judged by."""
    rows = rows_of(loop, window, "image_sha256")
    assert rows is not None
    return set(rows["image_sha256"])


def keep(loop: Loop, data: bytes) -> str:
    """Let a server have kept these bytes; returns their sha256."""
    sha256 = hashlib.sha256(data).hexdigest()
    path = loop.workspace.state / "serving" / "captures" / sha256[:2] / sha256
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return sha256


def test_what_the_windows_that_drifted_ask_for_comes_newest_first_and_goes_once_it_is_labelled(loop: Loop) -> None:
    first = to_label(loop)
    assert (len(first), {row.window for row in first}, all(row.kept for row in first)) == (50, {drifted(loop)}, True)
    # A later window asks for one picture of the earlier one, and for one more.
    later = another(loop)
    lines = (later / TO_LABEL).read_text().splitlines()
    other = pictures_of(loop, drifted(loop), 100)
    extra, third = [shown for shown in other if shown.image_sha256 not in {row.image_sha256 for row in first}][:2]
    lines = [lines[0], lines[3], lines[4].replace(first[3].image_sha256, extra.image_sha256)]
    (later / TO_LABEL).write_text("\n".join(lines))
    # A window that was judged again, and passes, asks for nothing.
    passed = next(name for name in loop.window_store.names() if name not in (later.name, drifted(loop)))
    (folder(loop) / passed / TO_LABEL).write_text(
        "\n".join([lines[0], lines[2].replace(extra.image_sha256, third.image_sha256)])
    )
    found = to_label(loop)
    assert [row.window for row in found] == [later.name] * 2 + [drifted(loop)] * 49
    assert [row.image_sha256 for row in found[:2]] == [first[2].image_sha256, extra.image_sha256]
    assert len({row.image_sha256 for row in found}) == 51
    give_labels(loop, [(found[0].image_sha256, "disc")], by="ann")
    erase_image(loop.workspace, found[1].image_sha256, by="ann", reason="asked for")
    left = to_label(loop, limit=3)
    assert [row.image_sha256 for row in left] == [row.image_sha256 for row in found[1:4]]
    assert [row.kept for row in left] == [False, True, True]


def test_a_list_that_a_spreadsheet_saved_is_read_and_one_that_is_none_hides_no_other(loop: Loop) -> None:
    before = to_label(loop)
    path = folder(loop) / drifted(loop) / TO_LABEL
    path.write_bytes(path.read_text().replace(",", ";").encode("utf-8-sig"))
    assert to_label(loop) == before
    later = another(loop)
    for text in (b"\xff\xfe\x00", b"a,b\n1,2\n", path.read_bytes().replace(before[0].image_sha256.encode(), b"../../x")):
        (later / TO_LABEL).write_bytes(text)
        assert to_label(loop) == before
        assert (count_asked(loop).num_pictures, count_asked(loop).unread_lists) == (len(before), (later.name,))


def test_a_label_is_counted_once_and_a_correction_counts(loop: Loop) -> None:
    one, two, three = to_label(loop, limit=3)
    done = give_labels(loop, [(one.image_sha256, "disc"), (two.prediction_id, "cross")], by="Ann", request="form 1")
    assert (done.imported.new, done.labelled_images) == (2, 2)
    again = give_labels(loop, [(one.prediction_id, "disc"), (two.image_sha256.upper(), "cross")], by="Ann", request="form 2")
    assert (again.imported.new, again.imported.known, again.labelled_images) == (0, 2, 2)
    for label in ("stripes", "disc", "stripes"):
        corrected = give_labels(loop, [(one.image_sha256, label)], by="Ann")
        assert (corrected.imported.new, corrected.imported.changed) == (1, 1)
        assert counted(loop) == {one.image_sha256: label, two.image_sha256: "cross"}
    # The browser sends the first form once more: that is no word against the corrections.
    replayed = give_labels(loop, [(one.image_sha256, "disc"), (two.prediction_id, "cross")], by="Ann", request="form 1")
    assert (replayed.imported.new, counted(loop)[one.image_sha256]) == (0, "stripes")
    assert loop.labels.latest(MODEL)[two.image_sha256].by == "Ann"
    assert three.image_sha256 not in counted(loop)


def test_labels_of_a_page_are_refused_whole_and_as_those_of_a_file_are(loop: Loop, tmp_path: Path) -> None:
    row = to_label(loop, limit=1)[0]
    right = (row.image_sha256, "disc")
    for wrong, why in [
        ((row.prediction_id, "moon"), "the model has no class 'moon'"),
        (("nobody", "disc"), "the log knows neither prediction nor image of 1 row .nobody."),
        (("ab" * 32, "disc"), "the log knows neither prediction nor image of 1 row"),
        ((row.prediction_id, "../disc"), "label 2: '../disc' cannot be the name of a class"),
        (("", "disc"), "label 2 names no prediction_id"),
    ]:
        with pytest.raises(DataError, match=why) as refused:
            give_labels(loop, [right, wrong], by="Ann")
        named = "image_sha256" if len(wrong[0]) == 64 else "prediction_id"
        file = tmp_path / "labels.csv"
        file.write_text(f"image_sha256,prediction_id,label\n{right[0]},,disc\n")
        with file.open("a") as out:
            out.write(f"{wrong[0]},,{wrong[1]}\n" if named == "image_sha256" else f",{wrong[0]},{wrong[1]}\n")
        with pytest.raises(DataError) as of_file:
            import_labels(loop, file, by="Ann")
        assert str(of_file.value).replace(f"{file} row", "label") == str(refused.value)
    with pytest.raises(DataError, match="no label was given"):
        give_labels(loop, [(row.image_sha256, "")], by="Ann")
    for name in (" ", "a/b"):
        with pytest.raises(ConfigError):
            give_labels(loop, [right], by=name)
    assert counted(loop) == {}
    assert give_labels(loop, [(row.image_sha256, "moon")], by="Ann", new_classes=True).imported.new == 1


def test_the_whole_log_is_gone_through_for_no_picture_that_a_window_knows(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = to_label(loop, limit=1)[0]
    (other,) = [shown for shown in pictures_of(loop, drifted(loop), 100) if shown.image_sha256 != asked.image_sha256][:1]
    whole = labels_module.known_predictions(loop)
    unjudged = min(whole.images - images_of(loop, drifted(loop)))
    looked: list[int] = []

    def gone_through(_: Loop) -> labels_module.KnownPredictions:
        looked.append(1)
        return whole

    monkeypatch.setattr("flows.loop.labelling.known_predictions", gone_through)
    give_labels(loop, [(asked.prediction_id, "disc"), (other.image_sha256, "disc")], by="ann")
    assert looked == []
    for path in folder(loop).glob(f"*/{ROWS}"):
        path.unlink()
    give_labels(loop, [(unjudged, "disc")], by="ann")
    assert looked == [1]


def test_a_class_of_today_may_be_given_whatever_the_champion_calls_it(loop: Loop, tmp_path: Path) -> None:
    assert choices(loop) == KINDS
    rename_class(loop.workspace, "disc", "circle")
    (loop.workspace.data / "moon").mkdir()  # a class that came into the data since
    (loop.workspace.data / ".hidden").mkdir()
    assert choices(loop) == ("circle", "cross", "moon", "stripes")
    rows = to_label(loop, limit=3)
    given = list(zip((row.image_sha256 for row in rows), ("circle", "disc", "moon"), strict=True))
    assert give_labels(loop, given, by="ann").imported.new == 3


def test_a_picture_is_shown_upright_and_small_without_what_its_file_tells_besides(loop: Loop) -> None:
    image = Image.new("RGB", (400, 100), "red")
    image.paste("blue", (0, 0, 200, 100))  # the left half
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "taken at home"  # stored with its left side up
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif, comment=b"taken at home")
    sha256 = keep(loop, file.getvalue())
    for side, size in ((None, (100, 400)), (200, (50, 200)), (90, (23, 90))):
        data = picture(loop, sha256, side=side)
        shown = Image.open(io.BytesIO(data))
        assert (shown.size, shown.getexif().get(0x0112, 1), b"home" in data) == (size, 1, False)
        assert Image.MIME[shown.format or ""] == media_type(data)
        blue = shown.convert("RGB").getchannel("B")
        assert blue.getpixel((10, 5)) > 200 > blue.getpixel((10, blue.height - 5))  # type: ignore[operator]
    tiny = keep(loop, png("disc", 3))
    assert Image.open(io.BytesIO(picture(loop, tiny))).tobytes() == Image.open(io.BytesIO(png("disc", 3))).tobytes()


def test_why_a_picture_cannot_be_shown_is_said(loop: Loop) -> None:
    gone, erased, damaged = (row.image_sha256 for row in to_label(loop, limit=3))
    captures = loop.workspace.state / "serving" / "captures"
    (captures / gone[:2] / gone).unlink()
    (captures / damaged[:2] / damaged).write_bytes((captures / erased[:2] / erased).read_bytes())
    erase_image(loop.workspace, erased, by="ann", reason="asked for")
    none = keep(loop, b"no picture at all")
    told = []
    for sha256, why in [
        (gone, f"image {gone[:16]} is not kept"),
        (erased, f"image {erased[:16]} was erased at 20.* UTC; it is never kept again"),
        (damaged, f"image {damaged[:16]} is kept with other bytes"),
        (none, f"image {none[:16]} is kept and cannot be decoded any more: .+"),
    ]:
        with pytest.raises(DataError, match=why) as refused:
            picture(loop, sha256)
        told.append(str(refused.value))
    assert len(set(told)) == 4
    for name in ("../../../../etc/passwd", "ab", "AB" * 32):
        with pytest.raises(ConfigError, match="is not the sha256 of an image"):
            picture(loop, name)


def test_the_report_shows_the_pictures_that_a_page_shows(loop: Loop) -> None:
    window = drifted(loop)
    before = pictures_of(loop, window)
    give_labels(loop, [(before[0].image_sha256, "stripes")], by="ann")
    captures = loop.workspace.state / "serving" / "captures"
    (captures / before[1].image_sha256[:2] / before[1].image_sha256).write_bytes(b"damaged")
    shown = pictures_of(loop, window)
    assert (len(shown), len({one.image_sha256 for one in shown}), shown[0].label) == (12, 12, "stripes")
    assert {one.image_sha256 for one in shown} <= images_of(loop, window)
    html = render(loop, loop.workspace.state, story={}, pages={})
    captions = re.findall("<figcaption>(.+?)</figcaption>", html)
    assert [caption.partition(";")[0] for caption in captions] == [one.caption for one in shown]
    assert captions[0].endswith("labelled stripes")
    for one in (shown[0], shown[2]):
        assert base64.b64encode(picture(loop, one.image_sha256, side=96)).decode() in html
    assert f"image {shown[1].image_sha256[:16]} is kept with other bytes" in html
    for name in ("../windows", f"{window}/..", "2026-11-27T1534Z-zzzzzzzzzz"):
        with pytest.raises(UnknownName, match="unknown window"):
            loop.window_store.read(name, ROWS)
