"""Requests a second of `visionloop serve` against the engine's own ceiling and against other servers, JPEG to label.

One run, one machine, one engine file, the same number of engine threads. The load is open (Poisson, bench/load.py). For
every server in every setting: the highest rate at which 99 % of what it accepts comes within the bound and at most 0.5 % is
refused, found by bisection. Then ours and the strongest peers, each in its best setting, again and in turns of a few
seconds, because what a machine can do drifts. The peers' environment is made on first use
from bench/peers/requirements.lock. DATA is a folder of photographs, one sub-folder per class; without it the embedded digits
are used: tiny, they measure HTTP more than pictures.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from PIL import Image

from bench.load import percentiles
from bench.peers.answering import Answering
from bench.peers.environment import python_of
from components.contracts.records import Stored
from components.contracts.releases import Route, Routes
from components.releases import ReleaseStore
from flows.up.processes import give_way

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-bench"
BOUND_MS = 150.0
_SECONDS = 4.0
_PICTURES = 300
_ROUNDS = 8
_TURNS, _PROBES = 5, 6
_DURATION = 1.0
"""What every stretch of load lasts, as a share of its usual seconds."""
_MOST_SETTINGS, _PEERS_OF_THEIR_OWN = 10, True
_WARM, _ANEW = 35, 10
"""Pairs of changes to a release that is warm, and triples with one that is loaded anew."""
_ANY_RATE = False
"""Whether every load of which something is answered counts: a fraction of a second tells no rate."""
_SETTINGS: tuple[str, ...] = ()
TINY = (
    "training.fit.epochs=2",
    "export.targets=[{target: openvino, precision: int8}]",
    "evaluation.latency_runs=20",
    "gating.gates=[{gate: accuracy, settings: {floor: 0.1}}]",
)
"""Settings of a training that takes seconds, and whose model goes through."""
SHORT = {
    "_SETTINGS": TINY,
    "_ANY_RATE": True,
    "_PICTURES": 20,
    "_ROUNDS": 1,
    "_TURNS": 1,
    "_PROBES": 1,
    "_DURATION": 0.1,
    "_MOST_SETTINGS": 1,
    "_PEERS_OF_THEIR_OWN": False,
    "_WARM": 1,
    "_ANEW": 1,
}
_BY_HAND = "FastAPI + the engine"
"""No server that a user would choose between, so its ratio stands alone: the engine, and nothing of what a server is for."""
_STRONGEST = 2
"""Peers that meet ours again, in turns."""
_PORT, _PEER_PORT = 18400, 18410
_AFTER_S = 5.0
"""How long after a release serves its change is felt."""


@dataclass(frozen=True)
class Server:
    """How a server is started and asked."""

    name: str
    setting: str
    command: list[str]
    path: str = "/predict"
    form: str = "raw"
    ours: bool = False


class Layout(NamedTuple):
    """How threads share the engine, without any server."""

    lanes: int
    """Threads, each of which decodes a batch and infers it."""
    streams: int
    batch: int

    def __str__(self) -> str:
        return f"{self.lanes} lanes x {self.streams} streams, batch {self.batch}"


_LAYOUTS = (Layout(2, 2, 1), Layout(2, 2, 4), Layout(2, 2, 8), Layout(1, 1, 1), Layout(1, 1, 8))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def visionloop(*arguments: str, cwd: Path) -> dict[str, Any]:
    """A command of ours; its JSON answer."""
    done = subprocess.run([sys.executable, "-m", "flows", *arguments, "--json"], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"visionloop {' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    if "was not told" in done.stderr:
        raise SystemExit(
            f"visionloop {' '.join(arguments)} did not tell what it had to, so its time says little:\n{done.stderr}"
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def prepared(data: Path | None, scratch: Path, *settings: str) -> tuple[Path, str]:
    """A workspace with a promoted champion, trained with these settings; its model's name."""
    workspace = pinned(data, scratch)
    say("training the engine that every server runs")
    promoted(data, workspace, *settings)
    return workspace, "photographs" if data is not None else "digits"


def pinned(data: Path | None, scratch: Path) -> Path:
    """A workspace with the photographs of `data`, else with the embedded digits, pinned and committed."""
    workspace = scratch / "workspace"
    visionloop("init", str(workspace), cwd=scratch)
    source = [str(data.resolve())] if data is not None else ["--source", "digits"]
    visionloop("data", "add", *source, cwd=workspace)
    identity = ["-c", "user.name=bench", "-c", "user.email=bench@bench.invalid", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, "commit", "--quiet", "-m", "bench"], cwd=workspace, check=True)
    return workspace


def promoted(data: Path | None, workspace: Path, *settings: str) -> str:
    """Train with these settings beside the bench's own, approve and promote; the version."""
    if data is not None:
        arguments = ["-r", "transfer", "--set", "export.targets=[{target: openvino, precision: int8}]"]
    else:
        gates = "gating.gates=[{gate: accuracy, settings: {floor: 0.8}}]"
        arguments = ["-r", "digits", "--set", "training.fit.epochs=8", "--set", gates]
    for setting in settings:
        arguments += ["--set", setting]
    version = str(visionloop("train", *arguments, cwd=workspace)["version"])
    visionloop("approve", version, "--as", "bench", "--reason", "benchmark", cwd=workspace)
    visionloop("promote", version, cwd=workspace)
    return version


def pictures(data: Path | None, workspace: Path, scratch: Path) -> list[Path]:
    """JPEG files to send."""
    source = data if data is not None else workspace / "data"
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".bmp", ".png"))
    chosen = files[:: max(1, len(files) // _PICTURES)][:_PICTURES]
    folder = scratch / "pictures"
    folder.mkdir()
    found = []
    for index, path in enumerate(chosen):
        target = folder / f"{index:04d}.jpg"
        if path.suffix.lower() in (".jpg", ".jpeg"):
            shutil.copyfile(path, target)
        else:
            encoded = io.BytesIO()
            Image.open(path).convert("RGB").save(encoded, "JPEG", quality=95)
            target.write_bytes(encoded.getvalue())
        found.append(target)
    return found


class Engine:
    """The engine of a release without any server, JPEG to label."""

    def __init__(self, release: Path, files: Sequence[Path], layout: Layout) -> None:
        self._data = [path.read_bytes() for path in files]
        self._layout = layout
        self._engine = Answering(release, num_threads=2, num_streams=layout.streams)

    def rate(self, seconds: float = 2.5) -> float:
        """Pictures a second now."""
        counts = [0] * self._layout.lanes
        started = time.perf_counter()

        def lane(number: int) -> None:
            place = number * 31
            while time.perf_counter() < started + seconds * _DURATION:
                batch = [self._data[(place + i) % len(self._data)] for i in range(self._layout.batch)]
                self._engine.batch([self._engine.pixels(picture) for picture in batch])
                place += len(batch)
                counts[number] += len(batch)

        threads = [threading.Thread(target=lane, args=(n,)) for n in range(self._layout.lanes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts) / (time.perf_counter() - started)


def ceiling(release: Path, files: Sequence[Path]) -> dict[Layout, float]:
    """Pictures a second without any server, by layout; median of three runs."""
    found = {}
    for layout in _LAYOUTS:
        engine = Engine(release, files, layout)
        rates = [engine.rate() for _ in range(3)]
        found[layout] = statistics.median(rates)
        say(f"  {layout}: {found[layout]:.0f}/s ({min(rates):.0f}-{max(rates):.0f})")
    return found


def goodput_of_ceiling(
    server: Server, port: int, files: Sequence[Path], engine: Engine, process: subprocess.Popen[bytes]
) -> dict[str, Any]:
    """What the server answers when it is offered more than it can, as a share of what the engine alone does before and after
    it, while the server is idle.
    """
    rounds = []
    engine.rate()  # warm
    before = engine.rate()
    for seed in range(_ROUNDS):
        told = offered(server, port, files, rate=before * 1.3, seconds=5, seed=seed)
        settle(process)
        after = engine.rate()
        rounds.append(
            {
                "engine_per_s": round((before + after) / 2, 1),
                "goodput_per_s": told["goodput_per_s"],
                "of_ceiling": round(told["goodput_per_s"] / ((before + after) / 2), 3),
                "saturated": bool(told["refused_ms"]),
                "accepted_ms": told["accepted_ms"],
            }
        )
        before = after
    shares = [told["of_ceiling"] for told in rounds]
    found = {
        "n": len(rounds),
        "median": statistics.median(shares),
        "least": min(shares),
        "most": max(shares),
        "all_saturated": all(told["saturated"] for told in rounds),
        "rounds": rounds,
    }
    say(f"    goodput of the ceiling: {found}")
    return found


def peers_environment() -> str | None:
    """Python of the peers' environment, made on first use; None where it cannot be made."""
    try:
        return str(python_of("requirements.lock", PEERS.name))
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"  the peers could not be installed: {error}")
        return None


def _chosen(found: list[Server]) -> list[Server]:
    """All of them, or ours and those that BENCH_PEERS names, by comma."""
    names = [name.strip().lower() for name in os.environ.get("BENCH_PEERS", "").split(",") if name.strip()]
    return [server for server in found if not names or server.ours or any(name in server.name.lower() for name in names)]


def servers(workspace: Path, model: str, release: Path, python: str | None, port: int) -> list[Server]:
    """Every server in every setting that is tried."""
    ours = [
        sys.executable,
        "-m",
        "flows",
        "serve",
        "-w",
        str(workspace),
        "-m",
        model,
        "--port",
        str(port),
        "--grpc-port",
        "-1",
    ]
    found = [
        Server("visionloop", "defaults", ours, ours=True),
        Server("visionloop", "batches of 8", [*ours, "--max-batch", "8"], ours=True),
    ]
    (reference,) = sorted((workspace / ".visionloop" / "store" / "export").glob("torch_reference-fp32/*"))[-1:]
    own: list[tuple[str, str, Path, str, str, str]] = [
        ("fastapi_torch", sys.executable, reference, "/predict", "raw", "FastAPI + torch"),
        ("fastapi_engine", sys.executable, release, "/predict", "raw", _BY_HAND),
        ("mlflow_app", sys.executable, release, "/invocations", "mlflow", "MLflow models serve"),
    ]
    if python is not None:
        own += [
            ("litserve_app", python, release, "/predict", "base64", "LitServe"),
            ("bentoml_app", python, release, "/predict", "bentoml", "BentoML"),
            ("ray_app", python, release, "/predict", "raw", "Ray Serve"),
        ]
    for module, interpreter, folder, path, form, shown in own:
        for setting in _settings(module)[:_MOST_SETTINGS]:
            command = [interpreter, "-m", f"bench.peers.{module}", str(folder), str(port), setting]
            batched = form == "bentoml" and "batches" in setting
            found.append(Server(shown, setting, command, path, "bentoml-list" if batched else form))
    return found


def _settings(module: str) -> list[str]:
    # The peers' libraries are not in this environment: their settings are read, not imported.
    text = (ROOT / "bench" / "peers" / f"{module}.py").read_text()
    block = text[text.index("SETTINGS = {") :]
    return re.findall(r'^    "([^"]+)": \{', block[: block.index("\n}")], re.MULTILINE)


@contextlib.contextmanager
def started(server: Server, port: int, files: Sequence[Path], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server, once it has answered a picture."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            server.command,
            cwd=ROOT,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            env=_environment(),
        )
    try:
        deadline = time.monotonic() + 90
        while True:
            # A whole second, however short the loads are: in a tenth of it next to nothing is asked.
            told = offered(server, port, files[:5], rate=5, seconds=1 / _DURATION)
            if told["statuses"].get("200", 0) >= 2:
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{server.name} ({server.setting}) did not start:\n{log.read_text()[-1500:]}")
            time.sleep(0.5)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if server.name == "Ray Serve":
            subprocess.run([str(PEERS / "bin" / "ray"), "stop", "--force"], capture_output=True, check=False)
        _free(port)
        time.sleep(1)


def _free(port: int) -> None:
    """End whoever still listens there: some servers put their workers into sessions of their own."""
    for connection in psutil.net_connections("inet"):
        if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN and connection.pid:
            with contextlib.suppress(psutil.Error):
                psutil.Process(connection.pid).kill()


def _environment() -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "BENTOML_DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    own |= {"UVICORN_ACCESS_LOG": "false", "UVICORN_LOG_LEVEL": "error"}
    # MLflow starts `uvicorn` by its name.
    return {**os.environ, **own, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def offered(
    server: Server,
    port: int,
    files: Sequence[Path],
    *,
    rate: float,
    seconds: float,
    seed: int = 7,
    count_by: str = "",
    samples: bool = False,
) -> dict[str, Any]:
    """Offer a load from a process of its own and return what came of it."""
    order = {
        "path": server.path,
        "form": server.form,
        "port": port,
        "pictures": [str(path) for path in files],
        "rate": rate,
        "seconds": seconds * _DURATION,
        "seed": seed,
        "version_key": count_by,
        "samples": samples,
    }
    done = subprocess.run(
        [sys.executable, "-m", "bench.load"], input=json.dumps(order), capture_output=True, text=True, cwd=ROOT, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def within_bound(told: dict[str, Any]) -> bool:
    """All but 0.5 % answered, nothing broken, and 99 % of what is answered within the bound."""
    answered = told["statuses"].get("200", 0)
    if _ANY_RATE:
        return bool(answered)
    return bool(
        answered >= 0.995 * told["sent"]
        and not told["broken"]
        and not told["no_connection"]
        and told["accepted_ms"].get("p99", 1e9) <= BOUND_MS
    )


def highest_rate(server: Server, port: int, files: Sequence[Path], top: float) -> tuple[float, dict[str, Any]]:
    """The highest rate within the bound, by bisection up to `top`; each probe is offered for a few seconds."""
    low, high, best = 0.0, top, dict[str, Any]()
    for step in range(5):
        rate = top * 0.85 if step == 0 else (low + high) / 2
        told = offered(server, port, files, rate=rate, seconds=_SECONDS, seed=step)
        if within_bound(told):
            low, best = rate, told
        else:
            high = rate
            time.sleep(2)
    return low, best


class Search:
    """The highest rate that is within the bound, from a guess: by a fifth until the answer changes, then by halves.

    A rate is too high only when it failed twice: a machine that stalls for a moment would else decide for all that follows.
    """

    def __init__(self, guess: float) -> None:
        self.rate = guess
        """What to try next."""
        self.highest = 0.0
        self._too_high = math.inf
        self._doubted = False

    def learn(self, *, within: bool) -> None:
        """Whether `rate` was within the bound."""
        if not within and not self._doubted:
            self._doubted = True
            return
        self._doubted = False
        if within:
            self.highest = self.rate
        else:
            self._too_high = self.rate
        if not self.highest:
            self.rate = self._too_high * 0.8
        elif self._too_high == math.inf:
            self.rate = self.highest * 1.2
        else:
            self.rate = (self.highest + self._too_high) / 2


def in_turns(ours: Server, peer: Server, guesses: Sequence[float], files: Sequence[Path], scratch: Path) -> dict[str, Any]:
    """The highest rates of ours and of the peer, again and again, and their ratios.

    Both are there and one of them is asked at a time, for a few seconds: what slows the machine for longer slows both.
    """
    with (
        started(ours, _PORT, files, scratch / "ours.log") as mine,
        started(peer, _PEER_PORT, files, scratch / "peer.log") as theirs,
    ):
        sides = ((ours, _PORT, mine), (peer, _PEER_PORT, theirs))
        found: tuple[list[float], list[float]] = ([], [])
        idle_s, seconds = [0.0, 0.0], 0.0
        for turn in range(_TURNS):
            searches = [Search(found[side][-1] if turn and found[side][-1] else guesses[side]) for side in (0, 1)]
            for number in range(_PROBES):
                for side in (0, 1) if (turn + number) % 2 == 0 else (1, 0):
                    server, port, _ = sides[side]
                    other = sides[1 - side][2]
                    settle(mine)
                    before, since = processor_s(other), time.monotonic()
                    told = offered(server, port, files, rate=searches[side].rate, seconds=_SECONDS, seed=100 * turn + number)
                    seconds += time.monotonic() - since
                    idle_s[1 - side] += processor_s(other) - before
                    searches[side].learn(within=within_bound(told))
            for side in (0, 1):
                found[side].append(round(searches[side].highest, 1))
            say(f"    in turns with {peer.name} ({peer.setting}): ours {found[0][-1]}/s, the peer {found[1][-1]}/s")
    ratios = [own / other for own, other in zip(*found, strict=True) if other]
    if not ratios:
        raise RuntimeError(f"{peer.name} answered nothing within the bound")
    return {
        "peer": peer.name,
        "setting": peer.setting,
        "our_setting": ours.setting,
        "rates": {"ours": found[0], "peer": found[1]},
        "processors_taken_by_the_idle_side": {"ours": round(idle_s[0] / seconds, 3), "peer": round(idle_s[1] / seconds, 3)},
        "n": len(ratios),
        "ratio": {
            "median": round(statistics.median(ratios), 2),
            "least": round(min(ratios), 2),
            "most": round(max(ratios), 2),
        },
    }


def settle(process: subprocess.Popen[bytes]) -> None:
    """Wait until the server has sealed what a load left it to seal: that takes a processor once the engine is idle."""
    deadline = time.monotonic() + 20
    time.sleep(0.2)  # a file that was full a moment ago
    while any("serving.log.seal_process" in command for command in _commands(process)) and time.monotonic() < deadline:
        time.sleep(0.1)


def _commands(process: subprocess.Popen[bytes]) -> list[str]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(child.cmdline()))
    return found


def processor_s(process: subprocess.Popen[bytes]) -> float:
    """What a server and those of its children that live have taken of the processors so far: less when one of them ends."""
    found = 0.0
    for one in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = one.cpu_times()
            found += times.user + times.system
    return found


def memory_mb(process: subprocess.Popen[bytes]) -> float:
    """Resident memory of a server and its children, proportional where pages are shared.

    The least of a few seconds: a process that seals the log comes and goes.
    """
    found = []
    for _ in range(6):
        found.append(_memory_now_mb(process))
        time.sleep(1)
    return min(found)


def _memory_now_mb(process: subprocess.Popen[bytes]) -> float:
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int(path.read_text().rsplit(")", 1)[1].split()[3]) == process.pid or _descends(path.parent.name, process.pid):
                text = (path.parent / "smaps_rollup").read_text()
                total += int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]
    return total / 1024


def _descends(pid: str, ancestor: int) -> bool:
    while pid not in ("0", "1"):
        if int(pid) == ancestor:
            return True
        pid = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
    return False


def overload(
    server: Server, port: int, files: Sequence[Path], top: float, process: subprocess.Popen[bytes]
) -> dict[str, Any]:
    """Ten times the peak: what is still answered, how fast the rest is refused, what memory does, and the recovery.

    What a machine can do drifts within seconds, so the peak is measured before and after each of the rounds, by more than
    the ceiling `top` and than the peak before.
    """
    before = memory_mb(process)
    rounds = []
    accepted: list[float] = []
    refused: list[float] = []
    for seed in range(_ROUNDS):
        ask = functools.partial(offered, server, port, files, seconds=8, seed=seed, samples=True)
        before_it = ask(rate=top * 1.3)
        now = before_it["goodput_per_s"]
        if not now:
            raise RuntimeError(f"nothing was answered at the peak: {before_it}")
        twice, tenfold, after_it = ask(rate=now * 2), ask(rate=now * 10), ask(rate=now * 1.3)
        for told in (twice, before_it, tenfold, after_it):
            samples = told.pop("samples")
            if told is tenfold:
                accepted += samples["accepted_ms"]
                refused += samples["refused_ms"]
        peak = (before_it["goodput_per_s"] + after_it["goodput_per_s"]) / 2
        usual_s = (before_it["generator_cpu_s"] + after_it["generator_cpu_s"]) / 2
        more = (tenfold["generator_cpu_s"] - usual_s) / tenfold["seconds"] / len(os.sched_getaffinity(0))
        rounds.append(
            {
                "peak_per_s": peak,
                "10x_of_peak": round(tenfold["goodput_per_s"] / peak, 3),
                "10x_delivered": round(tenfold["delivered_per_s"] / tenfold["offered_per_s"], 3),
                "peak_was_saturated": all(told["refused_ms"] for told in (before_it, after_it)),
                "processors_the_generator_took_more_at_10x": round(more, 3),
                "2x": twice,
                "10x": tenfold,
            }
        )
        say(f"    overload: {rounds[-1]}")
    after = memory_mb(process)
    started_at, recovered = time.monotonic(), None
    while time.monotonic() - started_at < 15:
        if within_bound(offered(server, port, files, rate=peak * 0.5, seconds=1)):
            recovered = time.monotonic() - started_at
            break
    ratios = [told["10x_of_peak"] for told in rounds]
    return {
        "n": _ROUNDS,
        "10x_of_peak": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        "10x_delivered_least": min(told["10x_delivered"] for told in rounds),
        "peaks_saturated": all(told["peak_was_saturated"] for told in rounds),
        "all_10x_of_all_peaks": round(
            sum(told["10x"]["goodput_per_s"] for told in rounds) / sum(told["peak_per_s"] for told in rounds), 3
        ),
        "10x_accepted_ms": percentiles(accepted),
        "10x_refused_ms": percentiles(refused),
        "rounds": rounds,
        "memory_mb_before_and_after": [round(before, 1), round(after, 1)],
        "recovered_within_s": None if recovered is None else round(recovered, 1),
    }


def beside_training(server: Server, port: int, files: Sequence[Path], peak: float) -> dict[str, Any]:
    """60 % of the peak alone, beside a process that computes without pause as the worker of `visionloop up` does, and beside
    one that does not give way."""
    busy = "import torch\ntorch.set_num_threads(2)\na = torch.randn(600, 600)\nwhile True: a = a @ a / a.norm()\n"
    found = {"alone": offered(server, port, files, rate=peak * 0.6, seconds=12)}
    for name in ("gives way", "does not"):
        process = subprocess.Popen([sys.executable, "-c", busy], start_new_session=True)
        try:
            if name == "gives way":
                give_way(process.pid)
            time.sleep(5)  # imports
            found[name] = offered(server, port, files, rate=peak * 0.6, seconds=12)
        finally:
            process.kill()
            process.wait()
    return found


def switching(
    server: Server, port: int, files: Sequence[Path], top: float, workspace: Path, model: str, scratch: Path
) -> dict[str, Any]:
    """A hundred changes of champion at 70 % of the peak: 70 to a release that is warm, 30 to one that is loaded anew.

    What a machine can do drifts within minutes, so the peak is measured anew before every tenth change. The same load with
    no change at all tells what the machine alone does to it: between the tens, and before the first of ten and after the
    last. A request is one of a change from the moment it is ordered until `_AFTER_S` after it serves.
    """
    store = ReleaseStore(str(workspace / ".visionloop" / "releases"))
    routes = store.routes(model)
    assert routes is not None
    first = store.fetch(model, routes.routes[0].release, cache=scratch / "first")
    digests = [routes.routes[0].release]
    for threshold in (0.91, 0.92):
        rule = first.record.decision.model_copy(update={"threshold": threshold})
        digests.append(store.publish(Stored(first.record.model_copy(update={"decision": rule}), first.folder)))

    generation = routes.generation

    def change(index: int) -> float:
        """Route to a release; the seconds until it serves."""
        nonlocal generation
        generation += 1
        route = Route(release=digests[index], version=f"{index + 1}", role="champion", weight=1.0)
        store.move(Routes(model=model, generation=generation, routes=(route,)))
        since = time.monotonic()
        while _generation(port, model) < generation:
            if time.monotonic() - since > 120:
                raise RuntimeError(f"the switch to generation {generation} did not come")
            time.sleep(0.05)
        return time.monotonic() - since

    change(1)  # so that the release before is warm; not counted
    order = [0, 1] * _WARM + [2, 0, 1] * _ANEW
    seconds: list[float] = []
    changing: list[tuple[float, float]] = []
    loads: list[dict[str, Any]] = []
    quiet: list[dict[str, Any]] = []
    offered_per_s = []
    for ten in range(0, len(order), 10):
        rate = 0.7 * float(offered(server, port, files, rate=top * 1.3, seconds=5, seed=ten)["goodput_per_s"])
        offered_per_s.append(round(rate, 1))
        time.sleep(1)
        quiet.append(offered(server, port, files, rate=rate, seconds=10, seed=1000 + ten))
        with _asked(server, port, files, rate, loads, seconds=25 if ten < 2 * _WARM else 45):
            since = time.monotonic()
            seconds += [change(index) for index in order[ten : ten + 10]]
            changing.append((since, time.monotonic() + _AFTER_S))
        failed = _within(changing, loads, "failed_at")
        say(
            f"    {len(seconds)} changes at {rate:.0f}/s: {dict(_statuses(loads))}, {failed} failed while releases changed; "
            f"without changes {dict(_statuses(quiet))}"
        )
    answered: Counter[str] = Counter()
    for told in loads:
        answered.update(told["versions"])
    return {
        "switches": len(seconds),
        "offered_per_s": offered_per_s,
        "requests": sum(told["sent"] for told in loads),
        "statuses": dict(_statuses(loads)),
        "broken": sum(told["broken"] + told["no_connection"] for told in loads),
        "answers_by_release": {f"release {digests.index(name) + 1}": count for name, count in answered.items()},
        "accepted_p99_ms": [told["accepted_ms"].get("p99") for told in loads],
        "while_releases_changed": {
            "requests": _within(changing, loads, "asked_at"),
            "failed": _within(changing, loads, "failed_at"),
        },
        "without_a_switch": {
            "requests": sum(told["sent"] for told in quiet),
            "statuses": dict(_statuses(quiet)),
            "broken": sum(told["broken"] + told["no_connection"] for told in quiet),
            "accepted_p99_ms": [told["accepted_ms"].get("p99") for told in quiet],
        },
        "median_s_until_it_serves": {
            "warm": round(statistics.median(seconds[: 2 * _WARM]), 2),
            "loaded anew": round(statistics.median(seconds[2 * _WARM :]), 2),
        },
    }


@contextlib.contextmanager
def _asked(
    server: Server, port: int, files: Sequence[Path], rate: float, loads: list[dict[str, Any]], *, seconds: float
) -> Iterator[None]:
    """A constant load for as long as the block lasts, in stretches of `seconds`; what came of it is added to `loads`."""
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            seed = len(loads)
            loads.append(
                offered(server, port, files, rate=rate, seconds=seconds, seed=seed, count_by='"release":"', samples=True)
            )

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(keep_asking)
        time.sleep(3)  # the first of it is under way
        try:
            yield
        finally:
            stop.set()
            asking.result()  # a load that broke off is no load: it raises


def _within(periods: Sequence[tuple[float, float]], loads: Sequence[dict[str, Any]], what: str) -> int:
    """How many of the moments `what` of the loads are within one of the periods."""
    return sum(any(since <= at < until for since, until in periods) for told in loads for at in told["samples"][what])


def _statuses(loads: Sequence[dict[str, Any]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for told in loads:
        found.update(told["statuses"])
    return found


def _generation(port: int, model: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=30) as response:
        return int(json.load(response)["models"][model]["generation"] or 0)


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Both sides; the ratio is the least of ours to the strongest peers' rates within the bound.

    It is None when one of them did not come to be measured.
    """
    workspace, model = prepared(data, scratch, *_SETTINGS)
    (release,) = (workspace / ".visionloop" / "releases" / "releases" / model).iterdir()
    files = pictures(data, workspace, scratch)
    say(f"{len(files)} JPEGs, {np.mean([f.stat().st_size for f in files]) / 1e3:.0f} kB on average")
    say("ceiling of the engine, without any server")
    layouts = ceiling(release, files)
    best_layout = max(layouts, key=lambda layout: layouts[layout])
    top = layouts[best_layout]
    python = peers_environment() if _PEERS_OF_THEIR_OWN else None
    rates: dict[tuple[str, str], float] = {}
    details: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for server in _chosen(servers(workspace, model, release, python, _PORT)):
        label = f"{server.name}: {server.setting}"
        try:
            since = time.monotonic()
            with started(server, _PORT, files, scratch / "server.log") as process:
                ready_s = time.monotonic() - since
                rate, told = highest_rate(server, _PORT, files, top)
                rates[server.name, server.setting] = round(rate, 1)
                details[label] = {
                    "rate": round(rate, 1),
                    "p50": told.get("accepted_ms", {}).get("p50"),
                    "p99": told.get("accepted_ms", {}).get("p99"),
                    "ready_s": round(ready_s, 1),
                    "memory_mb": round(memory_mb(process)),
                }
                if server.ours and server.setting == "defaults":
                    share = goodput_of_ceiling(server, _PORT, files, Engine(release, files, best_layout), process)
                    details["goodput_of_ceiling"] = share
                    details["overload"] = overload(server, _PORT, files, top, process)
                    peak = statistics.median(told["peak_per_s"] for told in details["overload"]["rounds"])
                    details["beside_training"] = beside_training(server, _PORT, files, peak)
                    details["switching"] = switching(server, _PORT, files, top, workspace, model, scratch)
            say(f"  {label}: {rate:.0f}/s within p99 {BOUND_MS:g} ms ({details[label]})")
        except (RuntimeError, subprocess.CalledProcessError) as error:
            failures[label] = str(error)[-500:]
            say(f"  {label}: {str(error)[-500:]}")
    meetings: dict[str, dict[str, Any]] = {}
    ours_here = _chosen(servers(workspace, model, release, python, _PORT))
    peers_there = _chosen(servers(workspace, model, release, python, _PEER_PORT))
    pairs = _pairs(ours_here, peers_there, rates)
    for mine, theirs in pairs:
        guesses = [rates[mine.name, mine.setting], rates[theirs.name, theirs.setting]]
        try:
            meetings[theirs.name] = in_turns(mine, theirs, guesses, files, scratch)
        except (RuntimeError, subprocess.CalledProcessError, psutil.Error) as error:
            failures[f"in turns with {theirs.name}"] = str(error)[-500:]
            say(f"  in turns with {theirs.name}: {str(error)[-500:]}")
    by_hand = meetings.pop(_BY_HAND, None)
    # Without one of them the others say nothing about the strongest.
    whole = bool(meetings) and len(meetings) == len([peer for _, peer in pairs if peer.name != _BY_HAND])
    strongest = min(meetings.values(), key=lambda met: met["ratio"]["median"]) if whole else None
    return {
        "ours": statistics.median(strongest["rates"]["ours"]) if strongest else None,
        "peers": {name: statistics.median(met["rates"]["peer"]) for name, met in meetings.items()},
        "ratio": strongest["ratio"]["median"] if strongest else None,
        "ratio_to_hand_written_fastapi_with_the_engine": by_hand["ratio"]["median"] if by_hand else None,
        "unit": f"requests/s at p99 <= {BOUND_MS:g} ms, in turns with the {_STRONGEST} strongest peers; the least ratio",
        "n": strongest["n"] if strongest else 0,
        "in_turns": [*meetings.values(), *([by_hand] if by_hand else [])],
        "pictures": len(files),
        "ceiling_per_s": round(top, 1),
        "ceiling_layouts": {str(layout): round(rate, 1) for layout, rate in layouts.items()},
        "goodput_of_ceiling": details.get("goodput_of_ceiling", {}).get("median"),
        "one_bisection_each": {f"{name}: {setting}": rate for (name, setting), rate in rates.items()},
        "goodput_at_10x_of_peak": details["overload"]["10x_of_peak"]["median"] if "overload" in details else None,
        "details": details,
        "failures": failures,
    }


def _pairs(
    own: Sequence[Server], others: Sequence[Server], rates: dict[tuple[str, str], float]
) -> list[tuple[Server, Server]]:
    """Ours and the strongest peers, then the engine behind a server written by hand; each in its best setting.

    Servers that answered nothing within the bound meet nobody.
    """

    def rate(server: Server) -> float:
        return rates.get((server.name, server.setting), 0.0)

    mine = max((server for server in own if server.ours), key=rate, default=None)
    best: dict[str, Server] = {}
    for server in others:
        if not server.ours and rate(server):
            best[server.name] = max(best.get(server.name, server), server, key=rate)
    by_hand = best.pop(_BY_HAND, None)
    chosen = sorted(best.values(), key=rate, reverse=True)[:_STRONGEST]
    if by_hand is not None:
        chosen.append(by_hand)
    return [(mine, server) for server in chosen] if mine is not None and rate(mine) else []
