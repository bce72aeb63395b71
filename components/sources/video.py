"""Frames of video files, or of folders of frames, sampled by time or by change; a clip is a group, which no split divides.

A video file is opened by OpenCV in a process of its own (components/sources/_frames.py), which is given no environment and
bounded in memory, time and sizes. Frames are kept as PNG: a second lossy compression would blur what a model is to learn
from and leave traces of its own. A folder that holds pictures is a clip, too; its pictures are copied as they are.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from components.attributes import Attributes, write_said
from components.contracts.errors import ConfigError, DataError, SourceUnavailable, UndecodableImage
from components.contracts.progress import Progress, silent
from components.contracts.wording import is_text
from components.data_folder import shown
from components.foreign_files import bring, leave_out, receiving, refused, visible
from components.formats import PINNED
from components.images import decode
from components.samples import SPLIT_OF, class_name_problem
from components.store import explained, sha256_file

_VIDEOS = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv",
)  # fmt: skip
_PICTURES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf"
"""By FFmpeg's names. Playlists are none of them: they would make it open other files, and addresses of the network."""
_ENVIRONMENT = {
    "OPENCV_FFMPEG_CAPTURE_OPTIONS": f"protocol_whitelist;file|format_whitelist;{_CONTAINERS}",
    "OPENBLAS_NUM_THREADS": "1",
}
_MAX_FILE_MB = 256
"""Of a frame, and of what the process answers and says."""
_MAX_BOXES = 4096
_PROGRAM = Path(__file__).with_name("_frames.py")
_QUICKTIME = datetime.datetime(1904, 1, 1, tzinfo=datetime.UTC)


class Source(BaseModel):
    """Frames of clips. `path` is one clip, a folder of clips, or a folder of class folders of clips."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resumes: ClassVar[bool] = True

    path: Path
    """A video file, or a folder."""
    label: str = ""
    """The class of all frames; empty for the name of the folder that a clip lies in."""
    every_seconds: float | None = Field(default=None, ge=0)
    """Least time between two frames that are taken, 0 for none; 1 where nothing is said. All pictures of a folder of frames
    are taken where nothing is said."""
    min_change: float = Field(default=0.0, ge=0, le=1)
    """Least change of grey since the frame that was taken last, as a mean over the picture; 0.02 leaves out what stands
    still."""
    frames_per_second: float | None = Field(default=None, gt=0)
    """Of folders of frames, which say nothing of time."""
    max_frames: int = Field(default=10_000, ge=1)
    """Of a clip; one that gives more is left out."""
    max_seconds: int = Field(default=3600, ge=1)
    """Time that a video file may take to be read."""
    max_memory_mb: int = Field(default=4096, ge=512)
    """Memory that a video file may take to be read."""
    take_cut: bool = False
    """Whether a video that ends before its time is taken as far as it goes, and not left out."""

    def fetch(self, *, out: Path, progress: Progress = silent) -> None:
        """Write frames as `out/<class>/<clip>-<number>.png`; what is no whole clip is left out.

        Raises SourceUnavailable, and DataError that lists clips where none is whole, or the class of one is not clear.
        """
        told = shown(self.path)
        if not self.path.exists():
            raise SourceUnavailable(f"{told} is not there; expected a video file or a folder")
        work = receiving(out)
        problems: list[str] = []
        others: list[Path] = []
        left_out: list[tuple[str, str]] = []
        clips: dict[str, _Clip] = {}
        for clip in self._clips(problems, others):
            known = clips.setdefault(clip.digest, clip)
            if known.label != clip.label:
                problems.append(f"{clip.name}: the same clip as {known.name}, which is of another class")
            elif known is not clip:
                left_out.append((clip.name, f"the same clip as {known.name}"))
        if problems:
            raise refused(told, problems, "Mend that or move them elsewhere")
        if not clips:
            raise DataError(f"{told} holds no video files and no folders of frames")
        said: list[tuple[str, Attributes]] = []
        for number, clip in enumerate(clips.values()):
            progress(number, len(clips), clip.name)
            found = self._sampled(clip, work)
            if isinstance(found, str):
                left_out.append((clip.name, found))
            else:
                said += _brought(clip, found, work, out)
        if not said:
            raise refused(told, [f"{name}: {why}" for name, why in left_out], "Repair them")
        write_said(out, said)
        names = (shown(path.relative_to(self.path)) for path in others)
        left_out += ((name, "neither a video nor a picture, by its name") for name in names)
        leave_out(out, left_out)

    def _clips(self, problems: list[str], others: list[Path]) -> Iterator[_Clip]:
        """Every clip at or below the path, in order; what cannot be one, and files that are something else."""
        if self.path.is_file():
            yield _Clip.of(self.path, self.path.name, self.label or self.path.absolute().parent.name)
            return
        for place, folders, _ in os.walk(self.path):
            folder = Path(place)
            seen = visible(folder)
            folders[:] = [path.name for path in seen if path.is_dir()]
            files = [path for path in seen if not path.is_dir()]
            found = [path for path in files if path.suffix.casefold() in _VIDEOS]
            others += [path for path in files if path.suffix.casefold() not in (*_VIDEOS, *_PICTURES)]
            if any(path.suffix.casefold() in _PICTURES for path in files):
                found.append(folder)
            for path in found:
                label = self.label or self._label(path)
                if not label:
                    problems.append(f"{shown(path)}: it lies deeper than in a class folder; name its class by `label`")
                elif not is_text(path.name):
                    problems.append(f"{shown(path)}: its name is no UTF-8")
                else:
                    name = path.name if path == self.path else path.relative_to(self.path).as_posix()
                    yield _Clip.of(path, name, label)

    def _label(self, clip: Path) -> str:
        """Where the frames of a clip go: its class, below that of a split where it is in one; empty for none."""
        if clip == self.path:
            return self.path.absolute().parent.name
        parts = clip.relative_to(self.path).parts[:-1]
        if not parts:
            return self.path.absolute().name
        if len(parts) == 1 or (len(parts) == 2 and parts[0].casefold() in SPLIT_OF):
            return "/".join(parts)
        return ""

    def _sampled(self, clip: _Clip, work: Path) -> _Sampled | str:
        """The frames of a clip, in a folder of `work`, or what is wrong with it; an earlier call's are not made anew."""
        if problem := class_name_problem(clip.label.rpartition("/")[2]):
            raise ConfigError(f"{clip.label!r} cannot be the name of a class: {problem}; name one by `label`")
        # Never the same one twice: what a killed call's process still writes is then nobody's folder.
        done, part = work / clip.group, work.with_name(f"part-{uuid.uuid4().hex}")
        if done.is_dir():
            known = _Sampled.model_validate_json((done / "sampled.json").read_text(encoding="utf-8"))
            if all((done / file).is_file() for file in known.files):
                return known
            shutil.rmtree(done)
        for stale in work.parent.glob("part-*"):
            shutil.rmtree(stale, ignore_errors=True)
        part.mkdir()
        with explained("write frames into", work):
            found = self._of_folder(clip, part) if clip.path.is_dir() else self._of_video(clip, part)
            if isinstance(found, _Sampled):
                (part / "sampled.json").write_text(found.model_dump_json(), encoding="utf-8")
                os.replace(part, done)
            else:
                with tempfile.TemporaryFile(dir=part) as file:  # for want of space no clip is damaged
                    file.write(bytes(1 << 20))
        return found

    def _of_folder(self, clip: _Clip, part: Path) -> _Sampled | str:
        if self.every_seconds and self.frames_per_second is None:
            raise ConfigError(
                f"{clip.name}: a folder of frames says nothing of time; name frames_per_second, or leave every_seconds out"
            )
        files: list[str] = []
        seconds: list[float] = []
        before: np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None = None
        for number, path in enumerate(_frames(clip.path)):
            at = number / self.frames_per_second if self.frames_per_second else 0.0
            if seconds and at - seconds[-1] < (self.every_seconds or 0) - 1e-6:
                continue
            small = _small(path) if self.min_change else None
            if small is not None and before is not None and float(np.abs(small - before).mean()) < self.min_change:
                continue
            if len(files) == self.max_frames:
                return f"it gives more than {self.max_frames} frames; take fewer by every_seconds or raise max_frames"
            before = small
            files.append(f"{number:07d}{path.suffix.lower()}")
            seconds.append(at)
            shutil.copyfile(path, part / files[-1])
        return _Sampled(files=files, seconds=seconds)

    def _of_video(self, clip: _Clip, part: Path) -> _Sampled | str:
        if importlib.util.find_spec("cv2") is None:
            raise SourceUnavailable(
                "video files are read by OpenCV, which is not installed; run `pip install opencv-python-headless`, or "
                "install visionloop with its extra `video`"
            )
        if not clip.path.stat().st_size:
            return "it is empty"
        request, answer, log = (part / name for name in ("request.json", "answer.json", "log.txt"))
        asked = {
            "path": str(clip.path.absolute()),
            "out": str(part),
            "every_seconds": 1.0 if self.every_seconds is None else self.every_seconds,
            "min_change": self.min_change,
            "max_frames": self.max_frames,
            "max_pixels": PINNED.max_pixels,
            "max_seconds": self.max_seconds,
            "max_memory_mb": self.max_memory_mb,
            "max_file_mb": _MAX_FILE_MB,
        }
        request.write_text(json.dumps(asked), encoding="utf-8")
        with log.open("wb") as said:
            try:
                done = subprocess.run(
                    [sys.executable, "-I", str(_PROGRAM), str(request), str(answer)],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    check=False,
                    env=_ENVIRONMENT,  # no credentials beside hostile bytes
                    timeout=self.max_seconds,
                    process_group=0,  # Ctrl-C is the command's to answer
                )
            except subprocess.TimeoutExpired:
                return f"it could not be read in {self.max_seconds} s (max_seconds)"
        if done.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [f"status {done.returncode}"]
            return f"it could not be read in {self.max_memory_mb} MB and {self.max_seconds} s, or at all ({lines[-1][:200]})"
        return self._understood(answer, part)

    def _understood(self, answer: Path, part: Path) -> _Sampled | str:
        """What the process answers, believed only as far as the files are there."""
        try:
            told = _Answer.model_validate_json(answer.read_text(encoding="utf-8"), strict=True)
        except (OSError, ValueError) as error:
            return f"it could not be read ({type(error).__name__})"
        if told.wrong:
            return told.wrong
        if not told.frames:
            return "it has no frame that can be read"
        if told.ends_at < 0.95 * told.lasts and not self.take_cut:
            return f"damaged or cut short: it ends after {told.ends_at:.1f} of {told.lasts:.1f} s; take_cut takes it so far"
        files = [f"{number:07d}.png" for number, _ in told.frames]
        if not all((part / file).is_file() and not (part / file).is_symlink() for file in files):
            return "it could not be read: frames are missing"
        return _Sampled(files=files, seconds=[seconds for _, seconds in told.frames])


class _Answer(BaseModel):
    """What the process says of a video."""

    wrong: str = ""
    frames: list[tuple[int, float]] = []
    """Number and seconds."""
    ends_at: float = 0.0
    lasts: float = 0.0
    """Seconds; 0 where the video does not say it."""


class _Sampled(BaseModel):
    """Frames of a clip, in a folder of its own."""

    files: list[str]
    seconds: list[float]
    """Since the clip began, one a file."""


@dataclass(frozen=True)
class _Clip:
    path: Path
    name: str
    """As a person is told of it."""
    label: str
    """Its class, below that of a split where it is in one."""
    digest: str
    """The same for the same bytes, whatever they are called."""

    @property
    def group(self) -> str:
        """The name of what belongs together."""
        return f"{self.path.stem[:60]}-{self.digest[:12]}"

    @classmethod
    def of(cls, path: Path, name: str, label: str) -> _Clip:
        try:
            if path.is_dir():
                parts = (f"{sha256_file(frame)} {frame.name}\n" for frame in _frames(path))
                digest = hashlib.sha256("".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
            else:
                digest = sha256_file(path)
        except OSError as error:
            raise SourceUnavailable(f"cannot read {error.filename}: {error.strerror}; mend it and run again") from error
        return cls(path, shown(Path(name)), label, digest)


def _frames(folder: Path) -> list[Path]:
    """Pictures of a folder in the order of the numbers in their names, whether or not those have leading zeros."""

    def order(path: Path) -> tuple[list[tuple[int, str]], str]:
        parts = re.split(r"([0-9]+)", path.name)
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name

    return sorted((path for path in visible(folder) if path.suffix.casefold() in _PICTURES and path.is_file()), key=order)


def _small(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None:
    """A picture as 32x32 grey in [0, 1]; None where it cannot be decoded, which is told when it is added."""
    try:
        picture = decode(path.read_bytes()).stored
    except UndecodableImage:
        return None
    return np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.BOX), dtype=np.float32) / np.float32(255)


def _brought(clip: _Clip, found: _Sampled, work: Path, out: Path) -> Iterator[tuple[str, Attributes]]:
    """Bring the frames of a clip to their class; what is known of each."""
    began = _recorded_at(clip.path) if clip.path.is_file() else None
    (out / clip.label).mkdir(parents=True, exist_ok=True)
    for file, seconds in zip(found.files, found.seconds, strict=True):
        target = f"{clip.label}/{clip.group}-{file}"
        bring(work / clip.group / file, out / target)
        captured = "" if began is None else (began + datetime.timedelta(seconds=seconds)).isoformat()
        yield target, Attributes(group=clip.group, captured_at=captured)


def _recorded_at(path: Path) -> datetime.datetime | None:
    """When an MP4 or QuickTime file says that its recording began; None for other files, and where it says nothing.

    Source: ISO/IEC 14496-12, "Movie header box".
    """
    with path.open("rb") as file:
        end = path.stat().st_size
        for _ in range(_MAX_BOXES):
            head = file.read(8)
            if len(head) < 8:
                return None
            size, kind = struct.unpack(">I4s", head)
            left = size - 8
            if size == 1:
                left = int.from_bytes(file.read(8), "big") - 16
            if kind == b"moov":
                continue  # and into it
            if kind == b"mvhd":
                body = file.read(12)
                created = int.from_bytes(body[4:12] if body[:1] == b"\1" else body[4:8], "big")
                with contextlib.suppress(OverflowError):
                    found = _QUICKTIME + datetime.timedelta(seconds=created)
                    return found if 1970 < found.year < 2100 else None
                return None
            if left < 0 or file.tell() + left > end:
                return None
            file.seek(left, 1)
    return None
