from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components import segments
from components.segments import Kept, Segments, cache_folders, limit


def names(start: int, stop: int) -> list[str]:
    return [f"{i:032x}" for i in range(start, stop)]


def rows(start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop, dtype=np.float16)[:, None, None] * np.ones((1, 2, 3), np.float16)


def opened(folder: Path, **settings: Any) -> Segments:
    return Segments(folder, np.float16, (2, 3), **settings)


def run(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    prelude = "import os, signal, sys\nimport numpy as np\nfrom components.segments import Segments\n"
    return subprocess.Popen([sys.executable, "-c", prelude + code, *map(str, arguments)], cwd=Path(__file__).parents[2])


def test_rows_come_back_whoever_opens_the_folder(tmp_path: Path) -> None:
    ours = opened(tmp_path / "cache")
    ours.append(names(0, 5), rows(0, 5))
    ours.append(names(5, 7), rows(5, 7))
    wanted = [names(0, 7)[i] for i in (6, 0, 4, 4)]
    for found in (ours, opened(tmp_path / "cache")):
        assert found.known == set(names(0, 7))
        assert np.array_equal(found.rows(wanted), rows(0, 7)[[6, 0, 4, 4]])
        with pytest.raises(KeyError):
            found.rows(names(7, 8))


@pytest.mark.parametrize("damage", ["one byte", "cut short", "another shape"])
def test_a_damaged_segment_is_removed_and_the_others_stay(tmp_path: Path, damage: str) -> None:
    ours = opened(tmp_path)
    ours.append(names(0, 5), rows(0, 5))
    (whole,) = tmp_path.iterdir()
    ours.append(names(5, 7), rows(5, 7))
    (path,) = set(tmp_path.iterdir()) - {whole}
    data = bytearray(path.read_bytes())
    if damage == "another shape":
        path.unlink()
        Segments(tmp_path / "other", np.uint8, (6,)).append(names(5, 7), np.zeros((2, 6), np.uint8))
        (other,) = (tmp_path / "other").iterdir()
        other.rename(tmp_path / other.name)
        (tmp_path / "other").rmdir()
    else:
        data[-3] ^= 1
        path.write_bytes(data[:-1] if damage == "cut short" else data)
    again = opened(tmp_path)
    assert again.known == set(names(0, 5))
    assert list(tmp_path.iterdir()) == [whole]
    assert np.array_equal(again.rows(names(0, 5)), rows(0, 5))


def test_a_kill_in_the_middle_of_an_append_costs_that_segment_alone(tmp_path: Path) -> None:
    killed = run(
        "from pathlib import Path\n"
        "cache = Segments(Path(sys.argv[1]), np.float16, (2, 3))\n"
        "cache.append([f'{i:032x}' for i in range(3)], np.zeros((3, 2, 3)))\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache.append([f'{i:032x}' for i in range(3, 6)], np.zeros((3, 2, 3)))\n",
        tmp_path,
    )
    assert killed.wait() == -signal.SIGKILL
    (left,) = tmp_path.glob(".*.tmp")
    # It could be another process's that is still being written; an old one is nobody's.
    assert opened(tmp_path).known == set(names(0, 3))
    assert left.exists()
    os.utime(left, (0, 0))
    ours = opened(tmp_path)
    assert not left.exists()
    ours.append(names(3, 6), rows(3, 6))
    assert opened(tmp_path).known == set(names(0, 6))


def test_two_processes_add_to_one_folder_while_a_third_reads(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "cache, start = Segments(Path(sys.argv[1]), np.float16, (2, 3)), int(sys.argv[2])\n"
        "for i in range(start, start + 40, 2):\n"
        "    cache.append([f'{j:032x}' for j in (i, i + 1)], np.full((2, 2, 3), i // 2))\n"
    )
    # Half of the pictures are of both.
    writers = [run(code, tmp_path, start) for start in (0, 20)]
    while any(writer.poll() is None for writer in writers):
        found = opened(tmp_path)
        known = sorted(found.known)
        assert [int(name, 16) // 2 for name in known] == found.rows(known)[:, 0, 0].tolist()
    assert [writer.wait() for writer in writers] == [0, 0]
    assert opened(tmp_path).known == set(names(0, 60))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_what_a_full_disk_does_not_take_is_computed_when_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    told: list[str] = []
    ours = opened(tmp_path, say=told.append)
    ours.append(names(0, 4), rows(0, 4))

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(segments, "write_atomically", refuse)
    ours.append(names(4, 6), rows(4, 6))
    ours.append(names(6, 8), rows(6, 8))
    assert ours.full
    assert len(told) == 1
    assert "no space left for the cache" in told[0]
    computed: list[Sequence[int]] = []

    def compute(positions: Sequence[int], view: int) -> np.ndarray:
        computed.append(positions)
        return rows(0, 8)[list(positions)]

    inputs = Kept(names(0, 8), [ours], compute)
    assert np.array_equal(inputs.take(torch.tensor([5, 1, 7, 0]), None).numpy(), rows(0, 8)[[5, 1, 7, 0]])
    assert computed == [[5, 7]]


def test_another_failing_of_the_disk_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(segments, "write_atomically", refuse)
    with pytest.raises(OSError, match="broken"):
        opened(tmp_path).append(names(0, 1), rows(0, 1))


def test_a_view_a_row_is_drawn_from_the_generator_and_none_is_the_first(tmp_path: Path) -> None:
    views = [opened(tmp_path / str(view)) for view in range(3)]
    for view, each in enumerate(views):
        each.append(names(0, 50), rows(0, 50) + 100 * view)
    inputs = Kept(names(0, 50), views, lambda *_: pytest.fail("all of it is kept"))
    chosen = torch.arange(49, -1, -1)
    first = inputs.take(chosen, None)[:, 0, 0]
    assert first.tolist() == list(range(49, -1, -1))
    drawn = [inputs.take(chosen, torch.Generator().manual_seed(seed))[:, 0, 0] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert all(torch.equal(each % 100, first) for each in drawn)
    assert {float(view) for view in (drawn[0] // 100)} == {0, 1, 2}


_BOUNDED = """
import psutil
from pathlib import Path
from components import segments

def held():
    return psutil.Process().memory_info().rss >> 20

rows, side = 40, 1 << 20
for chunk in range(5):
    # In processes of their own, so that what writing takes does not count.
    if os.fork() == 0:
        cache = Segments(Path(sys.argv[1]), np.uint8, (side,))
        cache.append([f"{i:032x}" for i in range(chunk * rows, (chunk + 1) * rows)], np.full((rows, side), chunk, np.uint8))
        os._exit(0)
    assert os.wait()[1] == 0
cache = Segments(Path(sys.argv[1]), np.uint8, (side,))
assert cache.chunk == 32
before = most = held()
for name in sorted(cache.known):
    assert cache.rows([name])[0, -1] == int(name, 16) // rows
    most = max(most, held())
sys.exit(0 if most - before < 100 else f"{most - before} MiB were taken")
"""


def test_memory_does_not_grow_with_what_is_kept(tmp_path: Path) -> None:
    assert run(_BOUNDED, tmp_path).wait() == 0, "of 200 MiB that were read, less than 100 may stay"


@pytest.fixture
def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of three folders that were used one after the other, and a downloaded file, each of about 6 kB."""
    monkeypatch.setattr(segments, "_limits", {})
    monkeypatch.setattr(segments, "_used", set())
    for age, name in enumerate(["maps/part/view-2", "features/part/as-it-is", "maps/part/view-1"]):
        opened(tmp_path / name).append(names(0, 200), rows(0, 200))
        os.utime(tmp_path / name, (age, age))
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "weights.pth").write_bytes(bytes(6_000))
    return tmp_path


def test_the_least_recently_used_caches_give_way_and_never_what_the_run_uses(limited: Path) -> None:
    (size,) = {each.bytes for each in cache_folders(limited)}
    limit(limited, 3 * size)
    oldest = opened(limited / "maps/part/view-2")
    told: list[str] = []
    ours = opened(limited / "pictures/contract", say=told.append)
    ours.append(names(0, 200), rows(0, 200))
    assert [each.folder.relative_to(limited).as_posix() for each in cache_folders(limited)] == [
        "maps/part/view-1",
        "maps/part/view-2",
        "pictures/contract",
    ]
    ours.append(names(200, 400), rows(200, 400))
    assert told == []
    # What is left is in use: it stays, and the run goes on without keeping more.
    ours.append(names(400, 600), rows(400, 600))
    assert ours.full
    assert "VISIONLOOP_CACHE_GB" in told[0]
    assert ours.known == set(names(0, 400))
    assert np.array_equal(oldest.rows(names(0, 200)), rows(0, 200))
    assert opened(limited / "maps/part/view-2").known == set(names(0, 200))
    assert not (limited / "features").exists() or not list((limited / "features").rglob("*.safetensors"))
    assert (limited / "downloads" / "weights.pth").exists()


def test_a_later_run_of_the_same_process_uses_nothing_yet(limited: Path) -> None:
    opened(limited / "maps/part/view-2")
    limit(limited, 1)
    opened(limited / "pictures/contract").append(names(0, 1), rows(0, 1))
    assert len(cache_folders(limited)) == 3
    limit(limited, 10_000)
    opened(limited / "pictures/contract").append(names(0, 1), rows(0, 1))
    assert [each.folder.name for each in cache_folders(limited)] == ["view-2", "contract"]
