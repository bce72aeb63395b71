"""What becomes of processes that train together: what they tell, how they end, and that none is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from components.contracts.errors import DataDiffers, WorkerLost
from components.contracts.progress import MetricSink, NullSink, Progress, silent
from components.launching import launch

WORKER = """
import json, os, sys, time
from components.contracts.errors import DataDiffers
from components.launching import Line
asked = json.load(open(sys.argv[1]))
line = Line(asked["socket"])
open(asked["pids"], "a").write(f"{os.getpid()}\\n")
"""
WAITING = "time.sleep(600)"
"""A worker that nothing but its own end can stop."""


@pytest.fixture
def pids(tmp_path: Path) -> Path:
    return tmp_path / "pids"


def started(
    pids: Path, *workers: str, sink: MetricSink | None = None, progress: Progress = silent, **asked: Any
) -> dict[str, Any]:
    """What a launcher of these workers answers, each in a session of its own as torchrun has it."""
    launcher = (
        "import subprocess, sys\n"
        f"running = [subprocess.Popen([sys.executable, '-c', code, sys.argv[1]], start_new_session=True)"
        f" for code in {[WORKER + worker for worker in workers]!r}]\n"
        "sys.exit(max(one.wait() for one in running))"
    )
    request = {"pids": str(pids), **asked}
    return launch(
        lambda path: [sys.executable, "-c", launcher, str(path)], request, sink=sink or NullSink(), progress=progress
    )


def gone(pids: Path, within_s: float = 10) -> bool:
    """Whether the workers have ended, or do so in a moment."""
    until = time.monotonic() + within_s
    alive = [int(line) for line in pids.read_text().split()]
    assert alive
    while alive and time.monotonic() < until:
        alive = [pid for pid in alive if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
        time.sleep(0.05)
    return not alive


@pytest.mark.parametrize("folder", ["short", "long" * 30])
def test_the_first_process_answers_and_is_heard_while_it_works(
    pids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    temporary = tmp_path / folder
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    rows: list[tuple[int, dict[str, float]]] = []
    steps: list[tuple[int, int, str]] = []

    class Sink:
        def log(self, epoch: int, metrics: Mapping[str, float]) -> None:
            rows.append((epoch, dict(metrics)))

    def progress(done: int, total: int, note: str = "") -> None:
        steps.append((done, total, note))

    first = "for n in range(500): line.progress(n, 500)\nline.log(1, {'loss': 0.5})\nline.progress(500, 500, 'ü')\n"
    first += "line.answer({'asked': asked['what']}); line.through()"
    found = started(pids, first, "time.sleep(0.5); line.through()", sink=Sink(), progress=progress, what=["x", None])
    assert found == {"asked": ["x", None]}
    assert rows == [(1, {"loss": 0.5})]
    assert steps == [*((n, 500, "") for n in range(500)), (500, 500, "ü")]
    assert list(temporary.iterdir()) == []


def test_an_error_of_ours_is_the_same_error_here_and_nobody_goes_on(pids: Path) -> None:
    failing = "e = DataDiffers('it was changed'); e.add_note('see there')\n"
    failing += "line.failed(e, 'trace', lost_another=False); sys.exit(1)"
    # What another one says of it, first, is not the cause.
    other = "line.failed(RuntimeError('closed by peer'), 'trace', lost_another=True); sys.exit(1)"
    with pytest.raises(DataDiffers, match="^it was changed") as refused:
        started(pids, other, "time.sleep(1)\n" + failing)
    assert refused.value.__notes__ == ["see there"]
    assert gone(pids)


def test_a_bug_comes_with_its_traceback(pids: Path) -> None:
    with pytest.raises(RuntimeError, match="a process of the training failed:\nTraceback of there"):
        started(pids, "line.failed(KeyError('x'), 'Traceback of there', lost_another=False); sys.exit(1)")


def test_a_process_that_is_killed_is_named_and_the_others_are_ended(pids: Path) -> None:
    victim = "time.sleep(0.5); os.kill(os.getpid(), 9)"
    with pytest.raises(
        WorkerLost, match=r"was killed before its end \(pid \d+\).*run again to go on from the last checkpoint"
    ):
        # torchrun would end the other one itself; here its launcher ends, since the first one's status is waited for.
        started(pids, victim, "time.sleep(1.5); line.failed(RuntimeError('gloo'), 't', lost_another=True); sys.exit(1)")
    assert gone(pids)


def test_processes_that_never_come_tell_their_last_words(pids: Path) -> None:
    with pytest.raises(WorkerLost, match="ended with status 3 and no answer: no such thing; run again"):
        launch(
            lambda _: [sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"],
            {},
            sink=NullSink(),
            progress=silent,
        )


def test_what_ends_the_run_ends_its_processes(pids: Path) -> None:
    """Also one that has a session of its own, and waits for something else."""

    def progress(done: int, total: int, note: str = "") -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        started(pids, WAITING, "time.sleep(1); line.progress(1, 2); " + WAITING, progress=progress)
    assert gone(pids)


@pytest.mark.parametrize("whom", ["run", "launcher"])
def test_a_run_or_a_launcher_that_is_killed_leaves_no_process_behind(pids: Path, tmp_path: Path, whom: str) -> None:
    code = f"""
import sys
from pathlib import Path
sys.path[:0] = {[str(Path(__file__).parents[2]), str(Path(__file__).parent)]!r}
from test_launching import WAITING, started
from components.contracts.errors import WorkerLost
try:
    started(Path({str(pids)!r}), WAITING, WAITING)
except WorkerLost as error:
    print("lost:", error)
"""
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (pids.exists() and len(pids.read_text().split()) == 2):
        assert time.monotonic() < until
        time.sleep(0.05)
    (launcher,) = psutil.Process(run.pid).children()
    (run if whom == "run" else launcher).send_signal(signal.SIGKILL)
    told = run.communicate(timeout=60)[0]
    assert gone(pids)
    assert ("lost:" in told) == (whom == "launcher")
