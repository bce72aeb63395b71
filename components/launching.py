"""Processes that train together: started, heard and ended by the process whose training it is.

Each worker holds a connection to a socket in a folder of this account's own. By it the first one tells progress, metrics and
what came of it; and when it breaks because this process is gone, however it ended, the worker ends itself: nobody writes on
in a folder that the next run takes up. What is asked and answered is JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from components.contracts import errors
from components.contracts.errors import VisionloopError, WorkerLost
from components.contracts.progress import MetricSink, Progress

_ROOT = Path(__file__).resolve().parent.parent
_GRACE_S = 10
"""What processes that are told to end may take."""
_POLL_S = 0.2
_LONGEST = 103
"""Bytes that the path of a socket may have on every system; TMPDIR may be longer."""


@dataclass
class _Worker:
    """What is known of one of the processes by its connection."""

    pid: int = 0
    done: bool = False
    """Whether it said that it is through."""
    unread: bytes = b""


@dataclass
class _Heard:
    """What the workers told."""

    sink: MetricSink
    progress: Progress
    answer: dict[str, Any] | None = None
    errors: list[tuple[_Worker, dict[str, Any]]] = field(default_factory=list)
    lost: list[_Worker] = field(default_factory=list)
    """Processes whose connection ended without a word, the first to end first."""

    def take(self, worker: _Worker, line: bytes) -> None:
        told: dict[str, Any] = json.loads(line)
        kind = told.pop("kind")
        if kind == "hello":
            worker.pid = told["pid"]
        elif kind == "progress":
            self.progress(told["done"], told["total"], told["note"])
        elif kind == "metrics":
            self.sink.log(told["epoch"], told["metrics"])
        elif kind == "answer":
            self.answer = told["answer"]
        elif kind == "error":
            self.errors.append((worker, told))
        worker.done |= kind in ("error", "through")


def launch(
    command: Callable[[Path], Sequence[str]],
    request: Mapping[str, Any],
    *,
    sink: MetricSink,
    progress: Progress,
) -> dict[str, Any]:
    """Start what `command` makes of the file of the request, and return what the first process answers.

    Raises what the processes raise, and WorkerLost where one ends without a word. Nothing of them is left when this returns.
    """
    place = tempfile.gettempdir()
    if len(os.fsencode(f"{place}/visionloop-12345678/s")) > _LONGEST:
        place = "/tmp"  # noqa: S108 (in a folder of a random name that is this account's alone)
    with (
        tempfile.TemporaryDirectory(prefix="visionloop-", dir=place) as scratch,
        socket.socket(socket.AF_UNIX) as listening,
    ):
        folder = Path(scratch)
        address = folder / "s"
        listening.bind(str(address))
        listening.listen(128)
        asked = folder / "request.json"
        asked.write_text(json.dumps({**request, "socket": str(address)}))
        log = folder / "log"
        with log.open("wb") as written:
            process = subprocess.Popen(
                list(command(asked)),
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=subprocess.STDOUT,
                cwd=_ROOT,
                # Ctrl-C is the run's to answer.
                process_group=0,
            )
        heard = _Heard(sink, progress)
        try:
            _hear(process, listening, heard)
        finally:
            # Their connections are closed by now, so the workers end themselves.
            _end(process)
        return _outcome(heard, process.returncode, log)


def _hear(process: subprocess.Popen[bytes], listening: socket.socket, heard: _Heard) -> None:
    """Listen to the workers until the process that started them has ended and all was read."""
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        selector.register(listening, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None
            ready = selector.select(0 if ended else _POLL_S)
            for key, _ in ready:
                if key.data is None:
                    connection = stack.enter_context(listening.accept()[0])
                    selector.register(connection, selectors.EVENT_READ, _Worker())
                elif isinstance(key.fileobj, socket.socket):
                    _read(key.fileobj, key.data, heard, selector)
            if ended and not ready:
                return


def _read(connection: socket.socket, worker: _Worker, heard: _Heard, selector: selectors.BaseSelector) -> None:
    try:
        data = connection.recv(1 << 16)
    except ConnectionError:
        data = b""
    if not data:
        selector.unregister(connection)
        if not worker.done:
            heard.lost.append(worker)
        return
    *lines, worker.unread = (worker.unread + data).split(b"\n")
    for line in lines:
        heard.take(worker, line)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what was started, with all that it started in its group."""
    for number, patience in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def _outcome(heard: _Heard, status: int, log: Path) -> dict[str, Any]:
    # What others say of a process that is gone explains nothing.
    causes = [told for _, told in heard.errors if not told["lost_another"]]
    if causes:
        raise _error(causes[0])
    if heard.lost:
        lost = heard.lost[0]
        raise WorkerLost(
            f"a process of the training was killed before its end (pid {lost.pid}), perhaps for want of memory, "
            f"and the others were ended; run again to go on from the last checkpoint"
        )
    if heard.answer is not None and status == 0:
        return heard.answer
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise WorkerLost(
        f"the processes of the training ended with status {status} and no answer: {(said or ['without a word'])[-1][:300]}; "
        f"run again to go on from the last checkpoint"
    )


def _error(told: dict[str, Any]) -> Exception:
    """What a worker raised, as far as it is one of ours; raises RuntimeError with its traceback for our bugs."""
    kind = getattr(errors, told["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, VisionloopError)):
        return RuntimeError(f"a process of the training failed:\n{told['traceback']}")
    error = kind.__new__(kind)
    error.args = (told["message"],)
    for note in told["notes"]:
        error.add_note(note)
    return error


class Telling(Protocol):
    """What a process that trains with others says to the one whose training it is."""

    def say(self, kind: str, **told: Any) -> None:
        """Send it, or end this process where nobody hears it any more."""
        ...

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.say("progress", done=done, total=total, note=note)

    def log(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.say("metrics", epoch=epoch, metrics=dict(metrics))

    def answer(self, answer: dict[str, Any]) -> None:
        self.say("answer", answer=answer)

    def through(self) -> None:
        self.say("through")

    def failed(self, error: Exception, traceback: str, *, lost_another: bool) -> None:
        """`lost_another`: only because another process is gone."""
        told = {"class": type(error).__name__, "message": str(error), "notes": list(getattr(error, "__notes__", ()))}
        self.say("error", **told, traceback=traceback, lost_another=lost_another)


class Line(Telling):
    """A connection to the process whose training it is; when that is gone, this one is, too."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._lock = threading.Lock()
        try:
            self._socket.connect(address)
        except OSError:
            os._exit(1)
        self.say("hello", pid=os.getpid())
        threading.Thread(target=self._watch, daemon=True).start()

    def say(self, kind: str, **told: Any) -> None:
        try:
            with self._lock:
                self._socket.sendall(json.dumps({"kind": kind, **told}).encode() + b"\n")
        except OSError:
            os._exit(1)

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            while self._socket.recv(1):
                pass
        os._exit(1)


def torchrun(processes: int, worker: str, request: Path) -> list[str]:
    """The command that starts processes of a module on this machine; they meet on its loopback alone."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    return [
        "env",
        f"GLOO_SOCKET_IFNAME={loopback}",
        f"NCCL_SOCKET_IFNAME={loopback}",
        "OMP_NUM_THREADS=1",  # each process sets its own share later
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={processes}",
        "--max-restarts=0",
        "--shutdown-timeout=3",
        "-m",
        worker,
        str(request),
    ]
