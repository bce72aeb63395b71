"""What is known of files: every content is decoded once, and what is kept may be lost, damaged or of other decoders."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from shapes import write_pictures

from components import facts as module
from components.facts import COLUMNS, File, facts
from components.images import decode


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "data", 4)
    (tmp_path / "data" / "disc" / "cut.png").write_bytes((tmp_path / "data" / "disc" / "0001.png").read_bytes()[:60])
    return tmp_path / "data"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the contents that are decoded from now on."""
    seen: list[int] = []

    def counting(content: bytes) -> object:
        seen.append(len(content))
        return decode(content)

    monkeypatch.setattr(module, "decode", counting)
    return seen


def files_of(data: Path, *, hashed: bool = True) -> list[File]:
    return [
        File(
            path,
            path.relative_to(data).as_posix(),
            path.parent.name,
            hashlib.md5(path.read_bytes()).hexdigest() if hashed else "",
        )
        for path in sorted(data.rglob("*.png"))
    ]


def test_a_content_is_decoded_once_under_whatever_name_and_then_not_read(
    data: Path, tmp_path: Path, decoded: list[int]
) -> None:
    (data / "cross" / "copy.png").write_bytes((data / "disc" / "0001.png").read_bytes())
    files = files_of(data)
    first = facts(files, cache=tmp_path / "cache")
    assert tuple(first.columns) == COLUMNS
    assert (len(files), len(decoded)) == (14, 13)
    again = facts(files_of(data, hashed=False), cache=tmp_path / "cache")
    assert len(decoded) == 13
    for path in data.rglob("*.png"):
        path.rename(path.with_name("other-" + path.name))
    unread = facts(files, cache=tmp_path / "cache")
    pd.testing.assert_frame_equal(again, first)
    pd.testing.assert_frame_equal(unread, first)
    new = data / "disc" / "new.png"
    Image.new("RGB", (9, 5), (0, 0, 255)).save(new)
    more = facts([*files, File(new, "disc/new.png", "disc")], cache=tmp_path / "cache")
    assert len(decoded) == 14
    pd.testing.assert_frame_equal(more.iloc[:14], first)
    assert (more["width"].iloc[14], more["height"].iloc[14], more["short_side"].iloc[14], more["mode"].iloc[14]) == (
        9,
        5,
        5,
        "RGB",
    )


def test_what_is_kept_may_be_damaged_lost_refused_or_of_another_version(
    data: Path, tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PART", 3)
    monkeypatch.setattr(module, "_MANY_PARTS", 2)
    files, cache = files_of(data), tmp_path / "cache"
    first = facts(files, cache=cache)
    parts = sorted(cache.rglob("*.parquet"))
    assert len(parts) == 5
    # Still a table that can be read, and says something else.
    pd.read_parquet(parts[0]).assign(brightness=0.5).to_parquet(parts[0], index=False)
    parts[1].unlink()
    decoded.clear()
    pd.testing.assert_frame_equal(facts(files, cache=cache), first)
    assert 0 < len(decoded) <= 6
    decoded.clear()
    pd.testing.assert_frame_equal(facts(files, cache=cache), first)
    assert decoded == []
    assert len(list(cache.rglob("*.parquet"))) <= 3  # many parts became one
    monkeypatch.setattr(module, "VERSION", 99)
    facts(files, cache=cache)
    assert len(decoded) == 13

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_atomically", full)
    pd.testing.assert_frame_equal(facts(files, cache=tmp_path / "another"), first)


def test_what_cannot_be_used_says_why_and_what_cannot_be_read_is_asked_again(data: Path, tmp_path: Path) -> None:
    gone = data / "disc" / "gone.png"
    found = facts([*files_of(data), File(gone, "disc/gone.png", "disc")], cache=tmp_path / "cache")
    reasons = found[found["reason"] != ""].set_index("path")
    assert reasons["reason"].to_dict() == {
        "disc/cut.png": "damaged or truncated, or of a rare kind that cannot be decoded",
        "disc/gone.png": "cannot be read (No such file or directory)",
    }
    assert (reasons["sha256"] == "").to_dict() == {"disc/cut.png": False, "disc/gone.png": True}
    Image.new("L", (8, 8)).save(gone)
    assert facts([File(gone, "disc/gone.png", "disc")], cache=tmp_path / "cache")["reason"].tolist() == [""]


def test_luminance_is_what_it_is_defined_as_in_bands_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BAND_PIXELS", 40 * 7)
    pixels = np.random.default_rng(0).integers(0, 256, (33, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (row,) = facts([File(tmp_path / "a.png", "a.png", "a")]).to_dict("records")
    grey = pixels / 255.0
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    assert (row["brightness"], row["contrast"], row["sharpness"]) == pytest.approx(
        (grey.mean(), grey.std(), laplacian.var())
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_lies_around_a_picture_is_told(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    exif = Image.Exif()
    exif[0x010E] = "x" * 5000
    Image.effect_noise((40, 30), 50).convert("RGB").save(path, kind, exif=exif)
    whole = path.read_bytes()

    def around(behind: bytes) -> tuple[int, int, str]:
        path.write_bytes(whole + behind)
        (row,) = facts([File(path, "a", "a")]).to_dict("records")
        assert row["reason"] == ""
        assert 5000 < row["metadata"] < 5400
        return row["metadata"], row["behind"], row["behind_is"]

    assert around(b"")[1:] == (0, "")
    assert around(b"\0" * 512)[1:] == (0, "")
    assert around(b"anything")[1:] == (8, "")
    assert around(b"PK\x03\x04" + b"x" * 96)[1:] == (100, "a ZIP archive")
    assert around(b"\x7fELF" + b"x" * 96)[1:] == (100, "a program")
    assert around(b"<?php system('x');")[2] == "a script in a web page"
    assert around(whole)[2].endswith("picture")
