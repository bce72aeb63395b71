"""A zip or tar archive of class folders, of predefined splits of them, or of files with a manifest at its top.

Archives come from anywhere, so nothing is believed that an archive says of itself: names are checked before a file is made,
sizes while bytes come out, and an archive with one wrong entry is refused as a whole. Only regular files are ever written.
A single folder around everything else is left out, as most archives have one.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import re
import shutil
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field

from components.contracts.errors import DataError, SourceUnavailable, VisionloopError, in_short
from components.contracts.progress import Progress, silent
from components.data_folder import shown
from components.foreign_files import MANIFESTS, MOST_PROBLEMS, Names, Quotas, leave_out, receiving, refused, settle, visible
from components.formats import format_of
from components.samples import SPLIT_OF
from components.store import explained

_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_CHUNK = 1 << 18
_FREE_BYTES = 256 << 20
"""So much may come out of any archive: a few drawings or masks can be packed to a thousandth."""
_MAX_DIRECTORY = 512 << 20
"""Bytes of a zip's table of contents, which is read at once; that of two million entries has about 300 MB."""
_MAX_EXTENDED_HEADER = 1 << 20
"""Bytes of what a tar says of a member beside its header."""
_MAX_XZ_MEMORY = 512 << 20
_BLOCK = 512
_MAX_END = 22 + 20 + 56 + 0xFFFF
"""Bytes of the records at a zip's end, with the longest comment."""
_CENTRAL = b"PK\x01\x02"
"""Begins every record of a zip's table of contents."""
_SPECIAL = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}
_TAR_SPECIAL = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a file with holes",
}


class Source(Quotas):
    """Images out of .zip, .tar, .tar.gz, .tar.bz2, .tar.xz or .tar.zst."""

    path: Path
    """The archive."""
    max_ratio: int = Field(default=250, ge=2)
    """How many times its own size it may unpack to; pictures hardly shrink, bombs a thousandfold."""

    @classmethod
    def takes(cls, given: str) -> bool:
        """Whether a file has the name of an archive."""
        return "://" not in given and given.casefold().endswith(_SUFFIXES)

    def fetch(self, *, out: Path, progress: Progress = silent) -> None:
        """Unpack into `out`; raises SourceUnavailable, and DataError that lists the entries that cannot be taken."""
        shutil.rmtree(receiving(out))  # of an earlier call that was killed
        folder = receiving(out)
        self.unpack(folder, progress=progress)
        beside: list[str] = []
        while inner := _folder_around(folder):
            around = folder.with_name("around")
            folder.rename(around)
            (around / inner).rename(folder)
            beside += (f"{path.name}/" if path.is_dir() else path.name for path in sorted(around.iterdir()))
            shutil.rmtree(around)
        settle(out, shown(self.path), keep=False)
        leave_out(out, ((name, "it lies beside the folder that holds everything else") for name in beside))

    def unpack(self, folder: Path, *, progress: Progress = silent) -> None:
        """Every file of it into an empty folder, as it lies in the archive; raises what `fetch` raises."""
        told = shown(self.path)
        if not self.path.is_file():
            raise SourceUnavailable(f"{told} is not there, or is no file; expected a zip or tar archive")
        budget = _Budget(self, told)
        try:
            file = _Archive(io.FileIO(self.path), budget)
        except OSError as error:
            raise SourceUnavailable(f"cannot read {told}: {error.strerror}; mend it and run the command again") from error

        def watched() -> Iterator[_Entry]:
            for entry in _entries(file, budget):
                progress(file.tell(), budget.size)
                yield entry

        with file, explained("unpack into", folder):
            self._unpack(watched(), folder, told)

    def _unpack(self, entries: Iterator[_Entry], folder: Path, told: str) -> None:
        names, made = Names(), {folder}
        problems: list[str] = []
        try:
            for count, entry in enumerate(entries, 1):
                name = entry.name
                while name.startswith("./"):
                    name = name[2:]
                if entry.is_folder and name in ("", "."):
                    continue
                wrong = entry.wrong or names.problem(name, is_folder=entry.is_folder)
                self.check_count(max(count, len(names)), told)
                if wrong:
                    problems.append(f"{shown(Path(entry.name))}: {wrong}")
                if len(problems) == MOST_PROBLEMS:
                    break
                if problems:
                    continue  # only to tell what else is wrong
                target = folder / name
                place = target if entry.is_folder else target.parent
                if place not in made:
                    place.mkdir(parents=True, exist_ok=True)
                    made.add(place)
                if not entry.is_folder:
                    self._write(entry, target, told)
        except DataError:
            if not problems:
                raise
        if problems:
            raise refused(told, problems, "Pack it again without them, from regular files with names of their own")

    def _write(self, entry: _Entry, target: Path, told: str) -> None:
        size = 0
        with target.open("xb") as file:
            for chunk in entry.chunks:
                size += len(chunk)
                self.check_file(size, shown(Path(entry.name)), told)
                file.write(chunk)


def _folder_around(folder: Path) -> str | None:
    """The name of the only folder, beside which there may be a licence, unless it is a class, or one side of a split."""
    seen = visible(folder)
    folders = [path for path in seen if path.is_dir()]
    if len(folders) != 1 or folders[0].name.casefold() in SPLIT_OF or any(path.name in MANIFESTS for path in seen):
        return None
    inside = visible(folders[0])
    return folders[0].name if any(path.is_dir() or path.name in MANIFESTS for path in inside) else None


@dataclass(frozen=True)
class _Entry:
    """What an archive calls one of its files or folders."""

    name: str
    is_folder: bool = False
    wrong: str = ""
    """Why it is nothing that can be taken, whatever its name."""
    chunks: Iterator[bytes] = field(default_factory=lambda: iter(()))
    """The bytes of a file, to be read before the next entry is asked for."""


class _Budget:
    """Counts what comes out of an archive, and ends it where that is too much."""

    def __init__(self, quotas: Source, told: str) -> None:
        self.quotas, self.told, self.size = quotas, told, quotas.path.stat().st_size
        self._spent = 0

    def spend(self, num_bytes: int) -> None:
        """Count bytes that came out; raises DataError."""
        self._spent += num_bytes
        self.quotas.check_total(self._spent, self.told)
        if self._spent > max(_FREE_BYTES, self.quotas.max_ratio * self.size):
            raise DataError(
                f"{self.told} unpacks to more than {self.quotas.max_ratio} times its size, as a decompression bomb does; "
                f"nothing of it was imported. Raise max_ratio if you know what is in it"
            )


def _entries(file: _Archive, budget: _Budget) -> Iterator[_Entry]:
    """What is in an archive of any kind, which is told by its first bytes and not by its name."""
    head = file.read(_BLOCK)
    file.seek(0)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _of_zip(file, budget)
    for magic, unpacking in _COMPRESSIONS.items():
        if head.startswith(magic):
            return _of_tar(_Stream(unpacking(file), budget))
    if len(head) == _BLOCK and (not any(head) or _header(head) is not None):
        return _of_tar(_Stream(file, budget))
    looks = (format_of(head) or "no archive") if head else "empty"
    raise DataError(f"{budget.told} is {looks}; expected a zip, or a tar that is plain or packed by gzip, bzip2, xz or zstd")


@contextlib.contextmanager
def _damage_told(told: str) -> Iterator[None]:
    """Whatever reading an archive raises becomes DataError: on hostile bytes it is almost anything."""
    try:
        yield
    except VisionloopError:
        raise
    except MemoryError:
        raise DataError(f"{told} would need more memory to be unpacked than there is; nothing of it was imported") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{told} has names that are no UTF-8; nothing of it was imported. Pack it again") from error
    except Exception as error:
        raise _damaged(told, in_short(error)) from error


def _damaged(told: str, what: str) -> DataError:
    return DataError(f"{told} is damaged or cut short ({what}); nothing of it was imported. Get it again")


class _Archive(io.BufferedReader):
    """An archive's bytes. A zip's table of contents is refused before it is read, or taken apart, where it is too long."""

    def __init__(self, file: io.FileIO, budget: _Budget) -> None:
        super().__init__(file)
        self._budget = budget

    def read(self, size: int | None = -1, /) -> bytes:
        """See BufferedReader; raises DataError."""
        if size is not None and size > _MAX_DIRECTORY:
            raise _damaged(self._budget.told, f"a table of contents of {size} bytes")
        data = super().read(size)
        if len(data) > _CHUNK:
            self._budget.quotas.check_count(data.count(_CENTRAL), self._budget.told)
        return data


def _of_zip(file: _Archive, budget: _Budget) -> Iterator[_Entry]:
    with _damage_told(budget.told):
        archive = zipfile.ZipFile(file)
        expected = _num_entries(file, budget.size)
    # Of the programs that know no zip64, macOS's among them, the number goes round at 65,536.
    if len(archive.infolist()) % 0x10000 != expected % 0x10000:
        raise _damaged(budget.told, f"it lists {len(archive.infolist())} entries and says that they are {expected}")
    for info in archive.infolist():
        raw, name = info.orig_filename, info.orig_filename
        if not info.flag_bits & 0x800 and not raw.isascii():
            # Not marked as UTF-8, which zipfile then takes for a code page of 1981; many programs write UTF-8 all the same.
            name = raw.encode("cp437").decode("utf-8", "surrogateescape")
        is_folder = name.endswith("/")
        yield _Entry(
            name[:-1] if is_folder else name, is_folder, _wrong_in_zip(info, is_folder), _of_member(archive, info, budget)
        )


def _num_entries(file: _Archive, size: int) -> int:
    """How many entries a zip says that it has, which the standard library does not compare with those that it lists.

    Source: APPNOTE.TXT of PKWARE, "End of central directory record" and "Zip64 end of central directory record".
    """
    file.seek(max(0, size - _MAX_END))
    end = file.read(_MAX_END)
    place, place_64 = end.rindex(b"PK\x05\x06"), end.rfind(b"PK\x06\x06")
    count: int = struct.unpack_from("<H", end, place + 10)[0]
    if count == 0xFFFF and place_64 >= 0:
        count = struct.unpack_from("<Q", end, place_64 + 32)[0]
    return count


def _wrong_in_zip(info: zipfile.ZipInfo, is_folder: bool) -> str:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return f"{_SPECIAL.get(kind, 'a special file')}, no regular file"
    if is_folder != (kind == stat.S_IFDIR) and kind:
        return "its name and its type do not agree on whether it is a folder"
    if info.flag_bits & 0x2041:
        return "encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"packed by method {info.compress_type}; expected deflate, or not packed at all"
    return ""


def _of_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, budget: _Budget) -> Iterator[bytes]:
    size = 0
    with _damage_told(budget.told):
        member = archive.open(info)
    while True:
        with _damage_told(budget.told):
            chunk = member.read(_CHUNK)  # which compares the checksum at the end
        if not chunk:
            break
        size += len(chunk)
        budget.spend(len(chunk))
        yield chunk
    if size != info.file_size:
        raise _damaged(budget.told, f"{shown(Path(info.filename))} has {size} bytes, not {info.file_size}")


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Stream:
    """What comes out of a tar's compression."""

    def __init__(self, file: _Readable, budget: _Budget) -> None:
        self._file, self._budget = file, budget

    def read(self, size: int) -> bytes:
        """At most `size` bytes, none at the end; raises DataError."""
        with _damage_told(self._budget.told):
            data = self._file.read(size)
        self._budget.spend(len(data))
        return data

    def pieces(self, size: int) -> Iterator[bytes]:
        """Exactly `size` bytes in pieces; raises DataError where it ends before."""
        while size:
            data = self.read(min(size, _CHUNK))
            if not data:
                raise self.damaged("it ends in the middle")
            size -= len(data)
            yield data

    def exactly(self, size: int) -> bytes:
        """The next bytes; raises DataError where there are less."""
        return b"".join(self.pieces(size))

    def goes_on(self) -> DataError:
        """The error for a tar with something behind its end."""
        return DataError(
            f"{self._budget.told} goes on behind its end, as several archives in one file do; nothing of it was imported. "
            f"Unpack it with `tar --ignore-zeros` and pack it again"
        )

    def damaged(self, what: str) -> DataError:
        """The error for a tar that cannot be read further."""
        return _damaged(self._budget.told, what)


def _header(block: bytes) -> tarfile.TarInfo | None:
    """The header of a member; None where its checksum says that it is none."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return None


def _of_tar(stream: _Stream) -> Iterator[_Entry]:
    """Members in order. Read here, as the standard library keeps headers of any size in memory."""
    extended: dict[str, str] = {}
    while any(block := stream.exactly(_BLOCK)):
        info = _header(block)
        if info is None or info.size < 0:
            raise stream.damaged("no header where one has to be")
        padding = -info.size % _BLOCK
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *_PAX):
            if info.size > _MAX_EXTENDED_HEADER:
                raise stream.damaged(f"a header of {info.size} bytes")
            body = stream.exactly(info.size + padding)[: info.size]
            if info.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = body.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                extended |= _records(body, stream)
            elif info.type == tarfile.XGLTYPE and {"path", "size"} & _records(body, stream).keys():
                raise stream.damaged("one name or size for all its members")
            continue
        name, size = extended.get("path", info.name), info.size
        if "size" in extended:
            if not re.fullmatch(r"[0-9]{1,18}", extended["size"]):
                raise stream.damaged(f"a member of {extended['size']!r} bytes")
            size = int(extended["size"])
        is_file = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
        if info.isdir() or (info.type in _TAR_SPECIAL and info.type != tarfile.GNUTYPE_SPARSE):
            size = 0  # whatever the header says
        wrong = f"{_TAR_SPECIAL.get(info.type, 'a special file')}, no regular file"
        if any(key.startswith("GNU.sparse") for key in extended):
            is_file, wrong = False, "a file with holes, no regular file"
        pieces = stream.pieces(size)
        yield _Entry(
            name.removesuffix("/") if info.isdir() else name, info.isdir(), "" if is_file or info.isdir() else wrong, pieces
        )
        for _ in pieces:
            pass  # what nobody wanted
        stream.exactly(-size % _BLOCK)
        extended = {}
    while rest := stream.read(_CHUNK):  # to its end, where a compressed stream has its checksum
        if rest.strip(b"\0"):
            raise stream.goes_on()


_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_RECORD = re.compile(rb"([0-9]{1,7}) ([^=\n]+)=")


def _records(body: bytes, stream: _Stream) -> dict[str, str]:
    """The records of a pax header, each `LENGTH KEY=VALUE\\n`."""
    found = {}
    place = 0
    while place < len(body):
        record = _RECORD.match(body, place)
        end = place + int(record[1]) if record else 0
        if record is None or not record.end() < end <= len(body) or body[end - 1 : end] != b"\n":
            raise stream.damaged("an extended header that is none")
        value = body[record.end() : end - 1]
        found[record[2].decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        place = end
    return found


class _Xz:
    """Reads xz with a bound on memory, which a stream may choose: the standard library's file knows none."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_XZ_MEMORY)

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, none at the end."""
        while True:
            packed = b""
            if self._decoder.eof:
                packed = self._decoder.unused_data.lstrip(b"\0") or self._file.read(_CHUNK).lstrip(b"\0")
                if not packed:
                    return b""
                self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_XZ_MEMORY)
            elif self._decoder.needs_input:
                packed = self._file.read(_CHUNK)
                if not packed:
                    raise EOFError("it ends in the middle")
            data = self._decoder.decompress(packed, size)
            if data:
                return data


def _zstd(file: io.BufferedReader) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")


_COMPRESSIONS: dict[bytes, Callable[[io.BufferedReader], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": _Xz,
    b"\x28\xb5\x2f\xfd": _zstd,
}
