"""Clips become frames of a group, sampled by time or by change; what is no whole clip is told."""

from __future__ import annotations

import contextlib
import datetime
import errno
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import tempfile
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from failpoints import Died, Failpoints
from PIL import Image
from shapes import visionloop

from components import attributes, foreign_files
from components.contract_checks import source_breaches
from components.contracts.errors import ConfigError, DataError, SourceUnavailable, StoreError
from components.foreign_files import RECEIVED
from components.images import decode
from components.sources import video
from components.sources.video import Source
from components.store import sha256_file
from flows.workspace import sources
from flows.workspace.workspace import Workspace

FPS, SECONDS = 10, 4


def shade(second: int, start: int) -> npt.NDArray[np.uint8]:
    """The frame of all of a second, BGR."""
    frame = np.full((24, 32, 3), start, dtype=np.uint8)
    frame[:, : 7 * (second + 1)] = (10 * second, 200, 40)
    return frame


def clip(path: Path, start: int = 0, *, codec: str = "FFV1", frames: int = FPS * SECONDS) -> Path:
    """Four seconds, each with a picture of its own that stands still."""
    path.parent.mkdir(parents=True, exist_ok=True)
    out = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*codec), float(FPS), (32, 24))  # type: ignore[attr-defined]
    assert out.isOpened()
    for number in range(frames):
        out.write(shade(number // FPS, start))
    out.release()
    return path


def fetched(path: Path, out: Path, **settings: Any) -> dict[str, attributes.Attributes]:
    """What is known of the frames that were written."""
    out.mkdir(exist_ok=True)
    Source(path=path, **settings).fetch(out=out)
    said = attributes.read_said(out / attributes.FILE)
    shutil.rmtree(out / RECEIVED)
    assert said.keys() == {file.relative_to(out).as_posix() for file in out.rglob("*.*") if not file.name.endswith(".jsonl")}
    return said


def left_out(out: Path) -> dict[str, str]:
    rows = map(json.loads, (out / attributes.LEFT_OUT).read_text().splitlines())
    return {row["file"]: row["reason"] for row in rows}


def refused(path: Path, out: Path, **settings: Any) -> str:
    out.mkdir(exist_ok=True)
    with pytest.raises(DataError) as caught:
        Source(path=path, **settings).fetch(out=out)
    assert [place for place in out.iterdir() if not place.name.startswith(".")] == []
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


def test_class_folders_of_clips_become_class_folders_of_frames_without_loss(tmp_path: Path) -> None:
    films = tmp_path / "films"
    for start, name in enumerate(("cat/one.mkv", "cat/two.mkv", "dog/one.avi")):
        clip(films / name, start * 50)
    (films / "cat" / "one.srt").write_text("subtitles")
    said = fetched(films, tmp_path / "out")
    assert len(said) == 3 * SECONDS
    assert left_out(tmp_path / "out") == {"cat/one.srt": "neither a video nor a picture, by its name"}
    group = f"one-{sha256_file(films / 'cat' / 'one.mkv')[:12]}"
    frames = [f"cat/{group}-{number:07d}.png" for number in range(0, FPS * SECONDS, FPS)]
    assert sorted(name for name, known in said.items() if known.group == group) == frames
    for second, name in enumerate(frames):
        pixels = np.asarray(decode((tmp_path / "out" / name).read_bytes()).stored)
        assert np.array_equal(pixels[:, :, ::-1], shade(second, 0))
    assert len({known.group for known in said.values()}) == 3
    assert not list(source_breaches(Source(path=films), "video"))


def test_frames_are_taken_by_time_or_by_change(tmp_path: Path) -> None:
    path = clip(tmp_path / "heron" / "film.avi")
    assert not Source(path=path).label
    assert {name.split("/")[0] for name in fetched(path, tmp_path / "a")} == {"heron"}
    assert len(fetched(path, tmp_path / "b", every_seconds=0.5, label="bird")) == 8
    assert {place.name for place in (tmp_path / "b").iterdir()} == {"bird", "attributes.jsonl"}
    changed = fetched(path, tmp_path / "c", every_seconds=0, min_change=0.05)
    assert [name[-11:-4] for name in sorted(changed)] == ["0000000", "0000010", "0000020", "0000030"]
    assert len(fetched(path, tmp_path / "d", every_seconds=0)) == FPS * SECONDS
    assert "gives more than 39 frames" in refused(path, tmp_path / "e", every_seconds=0, max_frames=39)


def test_a_folder_of_frames_is_a_clip_whose_pictures_are_copied_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "films" / "train" / "cat" / "walk"
    folder.mkdir(parents=True)
    for number in range(12):  # 2 comes before 10
        Image.fromarray(shade(number // 4, 0)).save(folder / f"frame{number}.png")
    said = fetched(tmp_path / "films", tmp_path / "a")
    (group,) = {known.group for known in said.values()}
    assert sorted(said) == [f"train/cat/{group}-{number:07d}.png" for number in range(12)]
    assert (tmp_path / "a" / sorted(said)[10]).read_bytes() == (folder / "frame10.png").read_bytes()
    changed = fetched(tmp_path / "films", tmp_path / "b", min_change=0.05)
    assert [name[-11:-4] for name in sorted(changed)] == ["0000000", "0000004", "0000008"]
    assert len(fetched(folder, tmp_path / "c", every_seconds=1, frames_per_second=4)) == 3
    with pytest.raises(ConfigError, match="says nothing of time; name frames_per_second"):
        fetched(folder, tmp_path / "d", every_seconds=1)
    (tmp_path / "films" / "deep" / "er" / "and").mkdir(parents=True)
    folder.rename(tmp_path / "films" / "deep" / "er" / "and" / "deeper")
    assert "deeper: it lies deeper than in a class folder" in refused(tmp_path / "films", tmp_path / "e")


def test_when_a_clip_was_recorded_is_known_of_each_frame(tmp_path: Path) -> None:
    path = clip(tmp_path / "cat" / "film.mp4", codec="mp4v")
    assert {known.captured_at for known in fetched(path, tmp_path / "a").values()} == {""}
    packed = path.read_bytes()
    place = packed.index(b"mvhd") + 8
    began = datetime.datetime(2026, 3, 1, 14, 0, tzinfo=datetime.UTC)
    since = int((began - datetime.datetime(1904, 1, 1, tzinfo=datetime.UTC)).total_seconds())
    path.write_bytes(packed[:place] + struct.pack(">I", since) + packed[place + 4 :])
    said = fetched(path, tmp_path / "b")
    assert [said[name].captured_at for name in sorted(said)] == [f"2026-03-01T14:00:0{second}Z" for second in range(SECONDS)]


def cut(path: Path) -> None:
    whole = clip(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def playlist(path: Path) -> None:
    """What FFmpeg reads elsewhere, of the name of a film."""
    other = clip(path.with_name("other.mkv")).rename(path.with_name("other.film"))
    path.write_text(f"ffconcat version 1.0\nfile {other.name}\n")


@pytest.mark.parametrize(
    ("make", "settings", "why"),
    [
        (lambda path: path.write_bytes(b""), {}, "it is empty"),
        (lambda path: path.write_bytes(bytes(range(256)) * 40), {}, "it cannot be opened: damaged, cut short, or no video"),
        (playlist, {}, "it cannot be opened"),
        (cut, {}, "damaged or cut short: it ends after"),
        (lambda path: clip(path, frames=0), {}, "it"),
        (clip, {"max_seconds": 1, "max_memory_mb": 512, "every_seconds": 0}, "it could not be read in 1 s"),
    ],
    ids=["empty", "noise", "playlist", "cut", "no frames", "slow"],
)
def test_what_is_no_whole_clip_is_left_out_and_told_and_where_none_is_nothing_is_imported(
    make: Callable[[Path], object], settings: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "films" / "cat").mkdir(parents=True)
    make(tmp_path / "films" / "cat" / "film.mkv")
    if settings:
        slow = tmp_path / "slow.py"
        slow.write_text("import time; time.sleep(60)")
        monkeypatch.setattr(video, "_PROGRAM", slow)
    told = refused(tmp_path / "films", tmp_path / "out", **settings)
    assert f"cat/film.mkv: {why}" in told
    assert "1 file that cannot be taken; nothing of it was imported" in told
    if settings:
        return
    if make is cut:
        assert len(fetched(tmp_path / "films", tmp_path / "cut", take_cut=True)) == 2
    clip(tmp_path / "films" / "dog" / "film.mkv", 99)
    assert {name.split("/")[0] for name in fetched(tmp_path / "films", tmp_path / "out")} == {"dog"}
    assert left_out(tmp_path / "out")["cat/film.mkv"].startswith(why)


def test_a_decoder_that_goes_wrong_is_told_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clip(tmp_path / "cat" / "film.mkv")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of no concern to a decoder")
    program = tmp_path / "program.py"
    monkeypatch.setattr(video, "_PROGRAM", program)
    for does, told in (
        ("import os; assert 'AWS_SECRET_ACCESS_KEY' in os.environ", "AssertionError"),
        ("import os; os.kill(os.getpid(), 11)", "status -11"),
        ("import sys; open(sys.argv[2], 'w').write('[]')", "could not be read"),
        ("import sys; open(sys.argv[2], 'w').write('{\"frames\": [[7, 0.0]]}')", "frames are missing"),
    ):
        program.write_text(f"import sys; open({str(tmp_path / 'asked')!r}, 'a').write(sys.argv[2] + chr(10)); {does}")
        assert told in refused(path, tmp_path / "out")
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(set(asked)) == len(asked) == 4  # what one that was left behind still writes is of no clip after it
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "TemporaryFile", unittest.mock.Mock(side_effect=full))
        with pytest.raises(StoreError, match="no space left to write frames into"):
            fetched(path, tmp_path / "out")
    real = Path(video.__file__).with_name("_frames.py").read_text()
    program.write_text(
        real.replace(
            "    import cv2\n",
            "    import resource\n    print([resource.getrlimit(each)[0] for each in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_CORE)])\n    raise SystemExit(1)\n    import cv2\n",
        )
    )
    assert f"[{600 << 20}, 50, 0]" in refused(path, tmp_path / "out", max_memory_mb=600, max_seconds=50)


def test_clips_that_are_sampled_are_not_sampled_again_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cat/one.mkv", "cat/two.mkv", "dog/three.mkv"):
        clip(tmp_path / "films" / name, len(name))
    clip(tmp_path / "films" / "dog" / "three.mkv", 99)
    clip(tmp_path / "films" / "cat" / "two.mkv", 150)
    expected = fetched(tmp_path / "films", tmp_path / "whole")
    workspace = Workspace.create(tmp_path / "ws")
    seen: list[int] = []
    places = ((subprocess, "run"), 3, 2), ((foreign_files, "linked"), 2 * SECONDS + 1, 1), ((sources, "read_said"), 1, 0)
    for stop, nth, sampled in (*places, (None, 0, 0)):
        again = Failpoints([(subprocess, "run")], nth=99, when="before")
        with monkeypatch.context() as patched, contextlib.suppress(Died):
            again(patched)
            if stop is not None:
                Failpoints([stop], nth=nth, when="before")(patched)
            with sources.staged(workspace, "video", {"path": str(tmp_path / "films")}) as made:
                assert made.attributes == expected
                seen.append(1)
        assert again.calls == sampled
    assert seen == [1]


def test_a_clip_that_is_there_twice_is_taken_once_and_without_opencv_it_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clip(tmp_path / "films" / "cat" / "film.mkv")
    (tmp_path / "films" / "dog").mkdir()
    (tmp_path / "films" / "dog" / "film.mkv").write_bytes(path.read_bytes())
    told = refused(tmp_path / "films", tmp_path / "out")
    assert "dog/film.mkv: the same clip as cat/film.mkv, which is of another class" in told
    (tmp_path / "films" / "dog" / "film.mkv").rename(path.with_name("twin.mkv"))
    assert len(fetched(tmp_path / "films", tmp_path / "once")) == SECONDS
    assert left_out(tmp_path / "once") == {"cat/twin.mkv": "the same clip as cat/film.mkv"}
    (tmp_path / "none").mkdir()
    assert "holds no video files and no folders of frames" in refused(tmp_path / "none", tmp_path / "out")
    with pytest.raises(SourceUnavailable, match="is not there"):
        Source(path=tmp_path / "gone.mp4").fetch(out=tmp_path / "out")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cv2" else real(name))
    with pytest.raises(SourceUnavailable, match="pip install opencv-python-headless.*extra `video`"):
        Source(path=path).fetch(out=tmp_path / "fresh")


def test_data_add_keeps_clips_as_groups(workspace: Path, tmp_path: Path) -> None:
    clip(tmp_path / "films" / "disc" / "one.mkv")
    clip(tmp_path / "films" / "cross" / "two.mkv", 99)
    done = visionloop("data", "add", str(tmp_path / "films"), "--source", "video", "--json", cwd=workspace)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["copied"], answer["with_attributes"]) == (8, 8)
    known = attributes.read(workspace)
    assert sorted({row.group.split("-")[0] for row in known.values()}) == ["one", "two"]
