"""The engine's own process: decodes pictures, runs the engine, answers batches. serving/engines/process.py starts it.

Untrusted bytes meet decoders here and nowhere else in the server, so whatever they do to a native library costs a restart of
this process. It works in lanes: each takes a batch through decoding and inference on one thread and one stream of the engine
(measured in infra/decisions/0009). It ends when the server's end of the socket closes, also when the server is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from components import plugins
from components.answering import LoadedRelease
from components.contracts.errors import TamperedArtefact, UndecodableImage, VisionloopError
from components.contracts.releases import Release
from components.formats import Accepted
from components.images import appearance, decode, prepare
from components.releases import ENGINE, GOLDEN
from components.store import read_manifest
from serving.engines.frames import Facts, Form, Kind, Outcome, Refusal, Splitter, decode_batch, encode_answer, frame

_MOST_REASONS = 20
"""An engine that fails in ever other words does not fill the log."""


@dataclass(frozen=True)
class Order:
    """What the process is started for."""

    folder: Path
    plugins: Path | None
    lanes: int
    max_batch: int
    accepted: Accepted


class Loaded:
    """A release that verified, was warmed up and answered its golden vectors."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._logging, self._logged = threading.Lock(), set[str]()
        plugins.use_workspace(order.plugins)
        # Every byte again, by the process that parses them.
        manifest = read_manifest(order.folder)
        self.release = Release.read(manifest["record"])
        self._loaded = LoadedRelease(
            self.release,
            engine=order.folder / ENGINE,
            golden=order.folder / GOLDEN,
            num_threads=order.lanes,
            num_streams=order.lanes,
        )
        self.picture_ms = self._loaded.decode_ms / order.lanes + self._warm_up()
        """What a picture costs while every lane is at work: the server's expectation until it has seen more.

        In time of the processor: the server may have let this process stand still meanwhile. What an accelerator takes is
        learnt from answers alone.
        """

    def _warm_up(self) -> float:
        """Run every lane at once; the milliseconds of inference that a picture of a whole batch took of them all."""
        size = self.release.engine.preprocessing
        lanes, most = self.order.lanes, self.order.max_batch
        blank = np.zeros((most, size.height, size.width, size.channels), dtype=np.uint8)
        with ThreadPoolExecutor(lanes) as pool:
            # A failure of any of them is a release that is not ready.
            list(pool.map(lambda _: [self._loaded.predict(blank[:n]) for n in (1, most, 1)], range(lanes)))
            start = time.process_time()
            list(pool.map(lambda _: self._loaded.predict(blank), range(lanes)))
        return (time.process_time() - start) * 1e3 / (lanes * most) / lanes

    def _pixels(self, form: Form, data: bytes) -> tuple[npt.NDArray[np.uint8], int, int, bool]:
        """The engine's input, width and height as they were sent, and whether a colour profile was ignored."""
        size = self.release.engine.preprocessing
        if form is Form.PIXELS:
            shape = (size.height, size.width, size.channels)
            return np.frombuffer(data, dtype=np.uint8).reshape(shape), size.width, size.height, False
        picture = decode(data, self.order.accepted)
        return prepare(picture, size), picture.width, picture.height, bool(picture.conversion.problem)

    def _log(self, error: Exception) -> None:
        """Tell the operator, once for each reason: a client can do nothing about an engine or a plug-in."""
        problem = str(error) if isinstance(error, VisionloopError) else f"{type(error).__name__}: {error}"
        with self._logging:
            if problem in self._logged or len(self._logged) >= _MOST_REASONS:
                return
            self._logged.add(problem)
        print(
            json.dumps({"level": "error", "event": "the engine failed", "problem": problem[:2000]}),
            file=sys.stderr,
            flush=True,
        )

    def answer(self, pictures: list[tuple[Form, bytes]]) -> tuple[list[Facts | Refusal], float, float]:
        """Facts or a refusal for each picture, and the milliseconds of decoding and of inference."""
        results: list[Facts | Refusal | None] = [None] * len(pictures)
        pixels, places = [], []
        start = time.perf_counter()
        for index, (form, data) in enumerate(pictures):
            try:
                pixels.append((*self._pixels(form, data), data))
                places.append(index)
            except UndecodableImage as error:
                results[index] = Refusal(Outcome.UNDECODABLE, str(error))
            except Exception:
                # Whatever a decoder raises on hostile bytes is that picture's fault, not its neighbours'.
                results[index] = Refusal(Outcome.UNDECODABLE, "damaged")
        decoded = time.perf_counter()
        if pixels:
            try:
                probabilities, embedding = self._loaded.predict(np.stack([p[0] for p in pixels]))
            except Exception as error:
                self._log(error)
                refusal = Refusal(Outcome.FAILED, "the engine failed; the server's log says why")
                return [refusal if r is None else r for r in results], (decoded - start) * 1e3, 0.0
            halves = embedding.astype("<f2")
            for row, (index, (image, width, height, ignored, data)) in enumerate(zip(places, pixels, strict=True)):
                if not np.isfinite(probabilities[row]).all():
                    results[index] = Refusal(Outcome.FAILED, "the engine gave no finite answer")
                    continue
                digest = hashlib.sha256(data).hexdigest()
                results[index] = Facts(
                    digest, width, height, len(data), appearance(image), probabilities[row], halves[row].tobytes(), ignored
                )
        inferred = time.perf_counter()
        return [r for r in results if r is not None], (decoded - start) * 1e3, (inferred - decoded) * 1e3


class _Channel:
    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._splitter = Splitter()
        self._ready: list[tuple[Kind, bytes]] = []
        self._lock = threading.Lock()

    def send(self, data: bytes) -> None:
        with self._lock:
            self._socket.sendall(data)

    def receive(self) -> tuple[Kind, bytes] | None:
        while not self._ready:
            data = self._socket.recv(1 << 18)
            if not data:
                return None
            self._ready += self._splitter.feed(data)
        return self._ready.pop(0)


def serve(connection: socket.socket) -> None:
    """Load what the first frame orders, then answer until the other side is gone."""
    channel = _Channel(connection)
    first = channel.receive()
    if first is None:
        return
    order = json.loads(first[1])
    try:
        loaded = Loaded(
            Order(
                folder=Path(order["folder"]),
                plugins=Path(order["plugins"]) if order["plugins"] else None,
                lanes=order["lanes"],
                max_batch=order["max_batch"],
                accepted=Accepted(tuple(order["formats"]), order["max_pixels"], order["max_bytes"]),
            )
        )
    except Exception as error:
        # Told to the server, which keeps what it serves; TamperedArtefact and the like say what to do.
        known = isinstance(error, VisionloopError)
        problem = {"error": type(error).__name__, "message": str(error) if known else f"{type(error).__name__}: {error}"}
        channel.send(frame(Kind.FAILED, json.dumps(problem | {"tampered": isinstance(error, TamperedArtefact)}).encode()))
        return
    channel.send(frame(Kind.READY, json.dumps({"pid": os.getpid(), "picture_ms": loaded.picture_ms}).encode()))
    work: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def lane() -> None:
        while True:
            batch_id, pictures = decode_batch(work.get())
            results, decode_ms, infer_ms = loaded.answer(pictures)
            try:
                channel.send(encode_answer(batch_id, results, decode_ms=decode_ms, infer_ms=infer_ms))
            except OSError:
                os._exit(0)

    for _ in range(order["lanes"]):
        threading.Thread(target=lane, daemon=True).start()
    while (received := channel.receive()) is not None:
        work.put(received[1])
    # The server is gone; lanes may be in native code.
    os._exit(0)
