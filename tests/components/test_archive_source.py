"""Archives of others become class folders whole, or nothing of them is imported and what is wrong is listed."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import struct
import tarfile
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from failpoints import Died, Failpoints
from shapes import visionloop, write_pictures

from components import foreign_files
from components.contract_checks import source_breaches
from components.contracts.errors import DataError, SourceUnavailable
from components.sources import archive
from components.sources.archive import Source

TARS = {".tar": "w", ".tar.gz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz", ".tar.zst": "w"}


def pack(path: Path, files: dict[str, bytes], *, folders: tuple[str, ...] = ()) -> Path:
    """An archive of the kind that its name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            for name in folders:
                out.mkdir(name)
            for name, content in files.items():
                out.writestr(name, content)
        return path
    kind = next(suffix for suffix in reversed(TARS) if path.name.endswith(suffix))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=TARS[kind]) as tar:  # type: ignore[call-overload]
        for name in folders:
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    if kind == ".tar.zst":
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(packed.getvalue())
        path.write_bytes(sink.getvalue())
    else:
        path.write_bytes(packed.getvalue())
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, bytes]:
    """Small pictures of two classes, by their names in an archive."""
    write_pictures(tmp_path / "pictures", 4, kinds=("cross", "disc"))
    root = tmp_path / "pictures"
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.png"))}


def written(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def fetched(path: Path, out: Path, **settings: int) -> dict[str, bytes]:
    out.mkdir(exist_ok=True)
    Source(path=path, **settings).fetch(out=out)
    return written(out)


def refused(path: Path, out: Path, **settings: int) -> str:
    """All that the error says; nothing was imported."""
    out.mkdir(exist_ok=True)
    with pytest.raises(DataError) as caught:
        Source(path=path, **settings).fetch(out=out)
    assert [place.name for place in out.iterdir() if not place.name.startswith(".")] == []
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


@pytest.mark.parametrize("suffix", [".zip", *TARS])
def test_an_archive_of_any_kind_becomes_class_folders_without_the_folder_around_them(
    suffix: str, tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    assert Source.takes(f"Photos{suffix.upper()}")
    around = {f"./May/my photos/{name}": content for name, content in pictures.items()}
    beside = {"__MACOSX/May/._0000.png": b"x", "LICENSE": b"x", "May/.DS_Store": b"x", "May/my photos/README.txt": b"x"}
    long = {f"May/my photos/disc/{'ä' * 90}.png": b"named longer than a header has room for"}
    path = pack(tmp_path / f"photos{suffix}", around | beside | long, folders=("./", "May/", "__MACOSX/"))
    found = fetched(path, tmp_path / "out")
    left = {row["file"]: row["reason"] for row in map(json.loads, found.pop("left_out.jsonl").splitlines())}
    assert left.pop("README.txt") == "it lies beside the class folders"
    assert left == dict.fromkeys(
        ("LICENSE", "__MACOSX/", ".DS_Store"), "it lies beside the folder that holds everything else"
    )
    assert found.pop(f"disc/{'ä' * 90}.png") == b"named longer than a header has room for"
    assert found == pictures
    assert not list(source_breaches(Source(path=pack(tmp_path / f"plain{suffix}", pictures)), "archive"))
    one_class = {name: content for name, content in pictures.items() if name.startswith("disc/")}
    assert fetched(pack(tmp_path / f"class{suffix}", one_class), tmp_path / "class") == one_class
    split = {f"test/{name}": content for name, content in pictures.items()}
    assert fetched(pack(tmp_path / f"split{suffix}", split), tmp_path / "split") == split


COMPOSED, DECOMPOSED = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
NAMES = {
    "../evil.png": "leads out of its folder",
    "cat/../../evil.png": "leads out of its folder",
    "/evil.png": "its path is absolute",
    "C:\\evil.png": "its path is absolute",
    "cat\\1.png": "holds a backslash",
    "cat//1.png": "is empty or '.'",
    "cat/a\nb.png": "a line break",
    f"cat/{'x' * 300}.png": "more than 1024 bytes, or a part of it more than 255",
    f"{'a/' * 40}1.png": "more than 32 folders deep",
    ".received/1.png": "a name of visionloop's own",
    "CAT/2.png": "differs from cat only in upper and lower case",
    "cat/1.PNG": "differs from cat/1.png only in upper and lower case",
    f"{DECOMPOSED}/1.png": "differs from café only in upper and lower case or in how its letters are composed",
    "cat": "there is a folder of that name, too",
    "cat/1.png/2.png": "a file has the name of its folder",
}
GOOD = {"cat/1.png": b"1", f"{COMPOSED}/1.png": b"1"}


def hostile_zip(path: Path) -> dict[str, str]:
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w") as out:  # of the name that is there twice
        for name in (*GOOD, *NAMES, "cat/1.png"):
            out.writestr(zipfile.ZipInfo(name), b"x")
        for kind, name in ((stat.S_IFLNK, "link.png"), (stat.S_IFCHR, "device.png"), (stat.S_IFIFO, "pipe.png")):
            info = zipfile.ZipInfo(name)
            info.external_attr = (kind | 0o777) << 16
            out.writestr(info, b"/etc/passwd")
        out.writestr("bzip2.png", b"x", compress_type=zipfile.ZIP_BZIP2)
        out.writestr("secret.png", b"x")
        out.writestr("byte-ae.png", b"x")
    packed = path.read_bytes().replace(b"byte-ae.png", b"byte-\xe9.png!")
    place = packed.rindex(b"PK\x01\x02", 0, packed.rindex(b"secret.png"))
    flags = struct.unpack_from("<H", packed, place + 8)[0] | 1
    path.write_bytes(packed[: place + 8] + struct.pack("<H", flags) + packed[place + 10 :])
    return {
        "cat/1.png": "it is there twice",
        "link.png": "a symbolic link, no regular file",
        "device.png": "a device, no regular file",
        "pipe.png": "a pipe, no regular file",
        "bzip2.png": "packed by method 12; expected deflate",
        "secret.png": "encrypted",
        "byte-\\xe9.png!": "bytes that are no UTF-8",
    }


def hostile_tar(path: Path) -> dict[str, str]:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as out:
        for name in (*GOOD, *NAMES, "cat/1.png", "byte-\udce9.png"):
            member = tarfile.TarInfo(name)
            member.size = 1
            out.addfile(member, io.BytesIO(b"x"))
        for kind, name in (
            (tarfile.SYMTYPE, "link.png"),
            (tarfile.LNKTYPE, "hard.png"),
            (tarfile.CHRTYPE, "device.png"),
            (tarfile.FIFOTYPE, "pipe.png"),
            (tarfile.GNUTYPE_SPARSE, "holes.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "cat/1.png"
            out.addfile(member)
    return {
        "cat/1.png": "it is there twice",
        "byte-\\xe9.png": "bytes that are no UTF-8",
        "link.png": "a symbolic link, no regular file",
        "hard.png": "a hard link, no regular file",
        "device.png": "a device, no regular file",
        "pipe.png": "a pipe, no regular file",
        "holes.png": "a file with holes, no regular file",
    }


@pytest.mark.parametrize("make", [hostile_zip, hostile_tar])
def test_every_entry_that_cannot_be_taken_is_told_and_nothing_is_written(
    make: Callable[[Path], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MOST_PROBLEMS", 100)
    monkeypatch.setattr(foreign_files, "MOST_PROBLEMS", 100)
    path = tmp_path / "hostile"
    expected = NAMES | make(path)
    before = sorted(tmp_path.rglob("*"))
    told = refused(path, tmp_path / "out")
    for name, why in expected.items():
        shown = name.replace("\n", "\\x0a").replace("//", "/")
        assert any(
            line.partition("First: ")[2].startswith(shown) or line.startswith(shown)
            for line in told.splitlines()
            if why in line
        ), (name, why)
    assert f"has {len(expected)} files that cannot be taken" in told
    assert "evil" not in "".join(str(place) for place in tmp_path.rglob("*"))
    assert before == [place for place in sorted(tmp_path.rglob("*")) if not place.is_relative_to(tmp_path / "out")]
    assert not [place for place in (tmp_path / "out").rglob("*") if place.is_symlink()]


@pytest.mark.parametrize("suffix", [".zip", *TARS])
def test_what_unpacks_to_too_much_is_stopped_while_it_comes_out(
    suffix: str, tmp_path: Path, pictures: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack(tmp_path / f"set{suffix}", pictures)
    assert "more than 9 files and folders" in refused(path, tmp_path / "out", max_files=9)
    large = pack(tmp_path / f"large{suffix}", {**pictures, "disc/zeros.png": bytes(3 << 20)})
    assert "disc/zeros.png has more than 2 MB" in refused(large, tmp_path / "out", max_file_mb=2)
    monkeypatch.setattr(archive, "_FREE_BYTES", 1 << 20)
    if suffix != ".tar":
        assert "as a decompression bomb does" in refused(large, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(foreign_files, "GB", 1 << 20)
    assert "more than 2 GB" in refused(large, tmp_path / "out", max_gb=2)
    assert fetched(path, tmp_path / "out") == pictures


def test_what_a_zip_says_of_itself_is_not_believed(
    tmp_path: Path, pictures: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack(tmp_path / "set.zip", {"a/zeros.png": bytes(5000), "b/1.png": b"x"})
    packed = path.read_bytes()
    place = packed.index(b"PK\x01\x02")
    for size, crc in ((100, zlib.crc32(bytes(5000))), (6000, zlib.crc32(bytes(5000))), (5000, 1)):
        path.write_bytes(
            packed[: place + 16]
            + struct.pack("<I", crc)
            + packed[place + 20 : place + 24]
            + struct.pack("<I", size)
            + packed[place + 28 :]
        )
        assert "damaged or cut short" in refused(path, tmp_path / "out")
    # Every file that is packed has to be listed: one record that swallows the others loses them.
    commented = (
        packed[: place + 32] + struct.pack("<H", packed.index(b"PK\x05\x06") - place - 46 - 11) + packed[place + 34 :]
    )
    path.write_bytes(commented)
    assert "it lists 1 entries and says that they are 2" in refused(path, tmp_path / "out")
    end = packed.index(b"PK\x05\x06")
    record = packed[place : packed.index(b"PK\x01\x02", place + 4)]
    many = packed[:place] + record * 10_000
    path.write_bytes(
        many + packed[end : end + 8] + struct.pack("<HHII", 10_000, 10_000, 10_000 * len(record), place) + b"\0\0"
    )
    whole, many = path.read_bytes(), many + record * (0x10001 - 10_000)
    ends = packed[end : end + 8] + struct.pack("<HHII", 1, 1, len(record) * 0x10001, place) + b"\0\0"
    path.write_bytes(many + ends)  # as macOS counts 65,537 entries
    assert "a/zeros.png: it is there twice" in refused(path, tmp_path / "out")
    path.write_bytes(whole)
    monkeypatch.setattr(zipfile, "ZipInfo", None)  # a record is made of none of them
    assert "more than 9000 files and folders" in refused(path, tmp_path / "out", max_files=9000)


def test_a_tar_header_of_any_size_is_not_read_into_memory(tmp_path: Path) -> None:
    for kind, size in ((tarfile.XHDTYPE, 8 << 30), (tarfile.GNUTYPE_LONGNAME, 2 << 20), (tarfile.REGTYPE, -1)):
        member = tarfile.TarInfo("cat/1.png")
        member.type, member.size = kind, size
        (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 16))
        why = f"a header of {size} bytes" if size > 0 else "no header where one has to be"
        assert f"damaged or cut short ({why})" in refused(tmp_path / "a.tar", tmp_path / "out")
    for records in (b"30 path=../evil.png\n", b"x", b"18 size=123456789\n", b"7 size=\n"):
        member = tarfile.TarInfo("x")
        member.type, member.size = tarfile.XHDTYPE, len(records)
        body = member.tobuf(tarfile.GNU_FORMAT) + records.ljust(512, b"\0") + tarfile.TarInfo("cat/1.png").tobuf()
        (tmp_path / "a.tar").write_bytes(body + bytes(1024))
        assert "damaged or cut short" in refused(tmp_path / "a.tar", tmp_path / "out")
    renamed = b"20 path=../evil.png\n"
    member.size = len(renamed)
    body = member.tobuf(tarfile.GNU_FORMAT) + renamed.ljust(512, b"\0") + tarfile.TarInfo("cat/1.png").tobuf()
    (tmp_path / "a.tar").write_bytes(body + bytes(1024))
    assert "leads out of its folder" in refused(tmp_path / "a.tar", tmp_path / "out")


@pytest.mark.parametrize("suffix", [".zip", *TARS])
def test_a_damaged_archive_gives_all_of_its_files_or_none(suffix: str, tmp_path: Path, pictures: dict[str, bytes]) -> None:
    path = pack(tmp_path / f"set{suffix}", pictures)
    packed, out = path.read_bytes(), tmp_path / "out"
    out.mkdir()
    step = len(packed.rstrip(b"\0")) // 25
    refusals = 0
    for place in range(step, 25 * step, step):
        flipped = packed[:place] + bytes([packed[place] ^ 0x55]) + packed[place + 1 :]
        for content in (packed[:place], flipped):
            path.write_bytes(content)
            try:
                Source(path=path).fetch(out=out)
            except DataError:
                refusals += 1
                assert [name for name in written(out) if not name.startswith(".")] == []
            else:
                # Of these two there need be no checksum but that of a tar's headers.
                assert written(out) == pictures or suffix in (".tar", ".tar.zst")
                assert content == flipped
                for name in list(written(out)):
                    (out / name).unlink()
    assert refusals >= 24
    if suffix == ".tar.gz":
        path.write_bytes(packed[:-8] + bytes(4) + packed[-4:])  # the checksum, behind the end of the tar
        assert "damaged or cut short" in refused(path, out)
    if suffix == ".tar":
        path.write_bytes(packed + pack(tmp_path / "more.tar", {"disc/more.png": b"x"}).read_bytes())
        assert "goes on behind its end, as several archives in one file do" in refused(path, tmp_path / "twice")
    path.write_bytes(packed)
    assert fetched(path, out) == pictures


@pytest.mark.parametrize(("place", "nth"), [((Source, "_write"), 5), ((os, "replace"), 1), ((os, "replace"), 2)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_extraction_that_was_killed_starts_again_cleanly(
    place: tuple[object, str],
    nth: int,
    when: str,
    tmp_path: Path,
    pictures: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = pack(tmp_path / "set.tar.gz", {f"top/{name}": content for name, content in pictures.items()})
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patched:
        Failpoints([place], nth=nth, when=when)(patched)  # type: ignore[arg-type]
        with pytest.raises(Died):
            Source(path=path).fetch(out=tmp_path / "out")
    assert fetched(path, tmp_path / "out") == pictures


def test_what_is_no_archive_is_told_for_what_it_is(tmp_path: Path) -> None:
    for content, told in (
        (b"", "is empty"),
        (b"Rar!\x1a\x07" + bytes(600), "a compressed file"),
        (b"no" * 500, "no archive"),
    ):
        (tmp_path / "a.zip").write_bytes(content)
        assert re.search(f"a.zip is {told}|a.zip is empty", refused(tmp_path / "a.zip", tmp_path / "out"))
    assert "has no folders; expected one per class" in refused(pack(tmp_path / "a.zip", {"1.png": b"x"}), tmp_path / "out")
    with pytest.raises(SourceUnavailable, match="is not there"):
        Source(path=tmp_path / "none.zip").fetch(out=tmp_path / "out")


def test_an_archive_with_a_manifest_is_read_by_it(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    files = {f"top/all/{name.replace('/', '-')}": content for name, content in pictures.items()}
    rows = [f"all/{name.replace('/', '-')},{name.split('/')[0]},part 1" for name in pictures]
    listed = "\n".join(["path,label,group", *rows]).encode()
    path = pack(tmp_path / "set.zip", {**files, "top/manifest.csv": listed, "top/all/unnamed.png": b"x"})
    found = fetched(path, tmp_path / "out")
    assert found.pop("left_out.jsonl") == b'{"file": "all/unnamed.png", "reason": "manifest.csv does not name it"}\n'
    assert found.pop("attributes.jsonl").count(b'"group": "part 1"') == len(pictures)
    assert sorted(found.values()) == sorted(pictures.values())
    assert {name.split("/")[0] for name in found} == {"cross", "disc"}
    assert not [place for place in (tmp_path / "out").rglob("*") if place.is_symlink()]
    wrong = pack(tmp_path / "wrong.zip", {**files, "top/manifest.csv": listed.replace(b"all/cross-0001", b"../cross-0001")})
    told = refused(wrong, tmp_path / "wrong")
    assert f"{wrong}: manifest.csv has 1 problem; nothing of it was imported\nline 3" in told
    assert ".received" not in told
    both = pack(tmp_path / "both.zip", {"manifest.csv": listed, "manifest.jsonl": b"", "a/1.png": b""})
    assert "manifest.csv and manifest.jsonl at its top" in refused(both, tmp_path / "both")


def test_data_add_takes_an_archive_or_leaves_the_version_as_it_was(workspace: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "more", 5, start=900)
    files = {
        path.relative_to(tmp_path / "more").as_posix(): path.read_bytes() for path in (tmp_path / "more").rglob("*.png")
    }
    pinned = (workspace / "data.dvc").read_bytes()
    done = visionloop("data", "add", str(pack(tmp_path / "bad.zip", {**files, "../../evil.png": b"x"})), cwd=workspace)
    assert done.returncode == 2
    assert "1 file that cannot be taken; nothing of it was imported" in done.stderr
    assert (workspace / "data.dvc").read_bytes() == pinned
    done = visionloop("data", "add", str(pack(tmp_path / "good.tar.xz", {**files, "LICENSE": b"x"})), cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert "15" in done.stdout
    assert "LICENSE" in done.stdout + done.stderr
    assert not list((workspace / ".visionloop" / "tmp").glob("source-*"))
