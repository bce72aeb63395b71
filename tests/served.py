"""A server of one's own: published variants of the smoke release, and `visionloop serve` in a process."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file
from shapes import free_port, picture

from components.contracts.records import Stored
from components.contracts.releases import Release, Route, Routes
from components.releases import ReleaseStore
from components.store import Store, describe
from flows.workspace.workspace import Workspace

MODEL = "shapes"


def smoke_release(trained: Path) -> Stored[Release]:
    """The release that the smoke recipe packaged."""
    (folder,) = (trained / ".visionloop" / "store" / "packaging").iterdir()
    found = Store(trained / ".visionloop" / "store").open("packaging", folder.name, Release)
    assert found is not None
    return found


def as_served(release: Stored[Release], pictures: list[bytes]) -> list[tuple[str, float]]:
    """Label and confidence of encoded pictures by what answers in the server's engine process, without a server."""
    from components.formats import Accepted
    from serving.engines.frames import Facts, Form
    from serving.engines.worker import Loaded, Order

    loaded = Loaded(Order(release.folder, None, lanes=1, max_batch=8, accepted=Accepted()))
    found, _, _ = loaded.answer([(Form.ENCODED, data) for data in pictures])
    answers = []
    for facts in found:
        assert isinstance(facts, Facts)
        best = int(facts.probabilities.argmax())
        answers.append((release.record.engine.classes[best], float(facts.probabilities[best])))
    return answers


def unpacked(folder: Path) -> Path:
    """A workspace with a champion, which the oldest of the older commits made, in an empty folder."""
    archive, *_ = sorted((Path(__file__).parent / "older").glob("*.tar.xz"))
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="tar")
    return folder / "workspace"


def variant(release: Stored[Release], folder: Path, **changes: Any) -> Stored[Release]:
    """The release with another decision rule or other fields, in a folder of its own: another digest, the same engine."""
    record = release.record
    if "threshold" in changes:
        rule = record.decision.model_copy(update={"threshold": changes.pop("threshold")})
        record = record.model_copy(update={"decision": rule})
    record = record.model_copy(update=changes)
    shutil.copytree(release.folder, folder)
    (folder / "manifest.json").unlink()
    if "golden_tolerance" in changes:
        # It is for vectors that another processor wrote, so they do not say that this one did.
        golden = folder / record.golden.name
        save_file(load_file(golden), golden)
        record = record.model_copy(update={"golden": describe(golden, within=folder)})
    return Stored(record, folder)


def publish(store: ReleaseStore, release: Stored[Release], generation: int, version: str) -> str:
    """Publish and route a release, as a promotion does."""
    digest = store.publish(release)
    route(store, digest, generation, version)
    return digest


def route(store: ReleaseStore, digest: str, generation: int, version: str) -> None:
    routes = (Route(release=digest, version=version, role="champion", weight=1.0),)
    moved = store.move(Routes(model=MODEL, generation=generation, routes=routes))
    assert moved.generation == generation


def staged(folder: Path, release: Stored[Release]) -> Path:
    """A workspace below `folder` with the release routed as generation 1, version 1."""
    workspace = Workspace.create(folder / "served").root
    publish(ReleaseStore(str(workspace / ".visionloop" / "releases")), release, 1, "1")
    return workspace


def png(kind: str, seed: int, **options: Any) -> bytes:
    """A picture of the smoke data set, encoded."""
    return encoded(Image.fromarray(picture(kind, seed)), "PNG", **options)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def jpeg(kind: str = "disc", seed: int = 5000) -> bytes:
    return encoded(Image.fromarray(picture(kind, seed)), "JPEG", quality=95)


@dataclass
class Reply:
    """A response."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Server:
    """A running server; `told` is what it wrote to stderr so far."""

    process: subprocess.Popen[str]
    port: int
    grpc_port: int
    workspace: Path
    store: ReleaseStore
    told: list[str]

    @property
    def state(self) -> Path:
        return self.workspace / ".visionloop" / "serving"

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, timeout: float = 30
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body=body, headers=headers or {})
            response = connection.getresponse()
            return Reply(response.status, response.read(), {k.lower(): v for k, v in response.getheaders()})

    def predict(self, data: bytes, kind: str = "image/png", **headers: str) -> Reply:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("POST", "/predict", data, {"content-type": kind, **named})

    def figure(self, name: str) -> float:
        """A metric's value, summed over its labels."""
        text = self.ask("GET", "/metrics").body.decode()
        rows = [line for line in text.splitlines() if line.split("{")[0].split(" ")[0] == f"visionloop_{name}"]
        return sum(float(line.rsplit(" ", 1)[1]) for line in rows)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", "/status").json
        return found

    @property
    def version(self) -> str | None:
        found: str | None = self.status()["models"][MODEL]["version"]
        return found

    def engine_processes(self) -> list[int]:
        """Processes of engines, from the kernel's list of children."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        children = [int(pid) for pid in path.read_text().split()]
        return [pid for pid in children if b"serving.engines.process" in _command(pid)]

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "\n".join(self.told[-20:])
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)


def health(running: Server, method: str, service: str = "", token: str = "", timeout: float = 30) -> Any:
    """What gRPC's standard health service says: a status by name (Check), all of them (List), or an iterator (Watch)."""
    import grpc

    from serving.protocols import health_pb2 as pb

    name = pb.HealthCheckResponse.ServingStatus.Name
    channel = grpc.insecure_channel(f"127.0.0.1:{running.grpc_port}")
    request, response = (
        (pb.HealthListRequest(), pb.HealthListResponse)
        if method == "List"
        else (pb.HealthCheckRequest(service=service), pb.HealthCheckResponse)
    )
    make = channel.unary_stream if method == "Watch" else channel.unary_unary
    call = make(f"/grpc.health.v1.Health/{method}", type(request).SerializeToString, response.FromString)
    found = call(request, timeout=timeout, metadata=[("authorization", f"Bearer {token}")] if token else [])
    if method == "Watch":
        return (name(one.status) for one in found)
    return {key: name(one.status) for key, one in found.statuses.items()} if method == "List" else name(found.status)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextlib.contextmanager
def server(
    workspace: Path,
    *options: str,
    ready: bool = True,
    env: dict[str, str] | None = None,
    stop: bool = True,
    python: str = sys.executable,
) -> Iterator[Server]:
    """`visionloop serve` on free ports, by this environment or another's `python`; stopped at the end, if it still runs."""
    port, grpc_port = free_port(), free_port()
    arguments = ["serve", "--model", MODEL, "--port", str(port), "--grpc-port", str(grpc_port), "--refresh-s", "0.1"]
    process = subprocess.Popen(
        [python, "-m", "flows", *arguments, *options],
        cwd=workspace,
        env={**os.environ, **(env or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    told: list[str] = []

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            told.append(line.rstrip())

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    found = Server(process, port, grpc_port, workspace, ReleaseStore(str(workspace / ".visionloop" / "releases")), told)
    try:
        if ready:
            found.wait_for(lambda: any(line.startswith("ready:") for line in told) or process.poll() is not None, 60)
            assert process.poll() is None, "\n".join(told)
        yield found
    finally:
        if stop:
            if process.poll() is None:
                process.kill()
            process.wait(30)
            listener.join(5)
            if process.stderr is not None and not listener.is_alive():
                process.stderr.close()


def exif_rotated(kind: str, seed: int) -> bytes:
    """A picture stored on its side, with the EXIF tag that says so."""
    image = Image.fromarray(picture(kind, seed)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", quality=95, exif=exif)


def header_bomb(form: str, side: int = 65_000) -> bytes:
    """A small file whose header claims side x side pixels."""
    import struct
    import zlib

    if form == "PNG":
        head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)

        def chunk(name: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        rows = zlib.compress(b"\0" * 100_000)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    if form == "JPEG":
        good = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
        place = good.find(b"\xff\xc0") + 5
        good[place : place + 4] = struct.pack(">HH", side, side)
        return bytes(good)
    if form == "BMP":
        good = bytearray(encoded(Image.new("RGB", (8, 8)), "BMP"))
        good[18:26] = struct.pack("<ii", side, side)
        return bytes(good)
    if form == "TIFF":
        good = bytearray(encoded(Image.new("RGB", (8, 8)), "TIFF", compression="tiff_lzw"))
        for tag in (256, 257):
            place = good.find(struct.pack("<HHI", tag, 3, 1))
            good[place + 8 : place + 12] = struct.pack("<I", side)
        return bytes(good)
    good = bytearray(encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
    place = good.find(b"VP8L") + 9
    packed = (16383 - 1) | ((16383 - 1) << 14)
    good[place : place + 4] = struct.pack("<I", packed | (good[place + 3] & 0xF0) << 24)
    return bytes(good)


def mutated(data: bytes, seed: int) -> bytes:
    """The file with a few bytes changed, cut off, or doubled; the same for the same seed."""
    rng = np.random.default_rng(seed)
    found = bytearray(data)
    for _ in range(int(rng.integers(1, 12))):
        found[int(rng.integers(0, len(found)))] = int(rng.integers(0, 256))
    kind = seed // 4 % 4  # so that each of four originals meets each of them
    if kind == 1:
        return bytes(found[: int(rng.integers(1, len(found)))])
    if kind == 2:
        place = int(rng.integers(0, len(found)))
        return bytes(found[:place] + found[max(0, place - 40) :])
    return bytes(found)
