"""An open-loop load generator: requests leave when they are due, whatever the answers do.

Arrivals are Poisson with a fixed seed. Latency counts from the moment a request was due, so a server that stalls cannot
hide it (no coordinated omission). Connections are kept alive and opened as needed; a request that finds none free below the
cap is not sent, which the result says. Raw sockets on uvloop: about 0.06 ms a request.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Result:
    """What came of one load; times in milliseconds."""

    rate: float
    seconds: float
    sent: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    accepted_ms: list[float] = field(default_factory=list)
    refused_ms: list[float] = field(default_factory=list)
    versions: Counter[str] = field(default_factory=Counter)
    no_connection: int = 0
    broken: int = 0
    finished_at: list[float] = field(default_factory=list)
    """When each accepted answer came, in seconds from the start."""

    def told(self) -> dict[str, Any]:
        """The figures of a report."""

        def percentiles(values: list[float]) -> dict[str, float]:
            if not values:
                return {}
            found = np.percentile(values, [50, 90, 99])
            return {name: round(float(value), 2) for name, value in zip(("p50", "p90", "p99"), found, strict=True)}

        good = sum(at <= self.seconds for at in self.finished_at)  # not what was still queued when the load ended
        return {
            "offered_per_s": round(self.rate, 1),
            "seconds": self.seconds,
            "sent": self.sent,
            "goodput_per_s": round(good / self.seconds, 1),
            "statuses": {str(code): count for code, count in sorted(self.statuses.items())},
            "accepted_ms": percentiles(self.accepted_ms),
            "refused_ms": percentiles(self.refused_ms),
            "no_connection": self.no_connection,
            "broken": self.broken,
            "versions": dict(self.versions),
        }


class _Connection(asyncio.Protocol):
    def __init__(self, load: Load) -> None:
        self.load = load
        self.transport: Any = None
        self.due = 0.0
        self.buffer = b""
        self.wanted = -1
        self.status = 0
        self.busy = False
        self.close_after = False
        self.chunked = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def ask(self, due: float, request: bytes) -> None:
        self.due, self.busy, self.buffer, self.wanted = due, True, b"", -1
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.wanted < 0:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self.buffer[:end].lower()
            self.status = int(head[9:12])
            start = head.find(b"content-length:")
            self.chunked = start < 0 and b"transfer-encoding: chunked" in head
            if self.chunked:
                self.wanted = 0
            elif start < 0:
                self.load.connection_broke(self)
                self.transport.abort()
                return
            else:
                self.wanted = end + 4 + int(head[start + 15 :].split(b"\r\n", 1)[0])
            self.close_after = b"connection: close" in head
        if len(self.buffer) >= self.wanted and (not self.chunked or self.buffer.endswith(b"\r\n0\r\n\r\n")):
            self.busy = False
            self.load.answered(self)

    def connection_lost(self, _: Exception | None) -> None:
        if self.busy:
            self.load.connection_broke(self)
        self.load.free_discard(self)


class Load:
    """One load against one address."""

    def __init__(
        self,
        host: str,
        port: int,
        requests: list[bytes],
        *,
        rate: float,
        seconds: float,
        max_connections: int = 512,
        seed: int = 7,
        version_key: bytes = b"",
    ) -> None:
        self._address, self._requests, self._cap = (host, port), requests, max_connections
        self._free: list[_Connection] = []
        self._opened = 0
        self._opening: list[tuple[float, bytes]] = []
        self._key = version_key
        self.result = Result(rate, seconds)
        self._rng = np.random.default_rng(seed)
        self._waiting = 0
        self._start = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> Result:
        """Offer the load; returns when the last answer is there, at most 15 s after the end."""
        loop = asyncio.get_running_loop()
        result = self.result
        gaps = self._rng.exponential(1 / result.rate, size=int(result.rate * result.seconds * 1.2) + 20)
        due = np.cumsum(gaps)
        due = due[due < result.seconds]
        picks = self._rng.integers(0, len(self._requests), size=len(due))
        self._start = loop.time() + 0.05
        for offset, pick in zip(due, picks, strict=True):
            at = self._start + float(offset)
            delay = at - loop.time()
            if delay > 0.0005:
                await asyncio.sleep(delay)
            elif result.sent % 64 == 0:
                await asyncio.sleep(0)
            self._send(at, self._requests[int(pick)])
        end = loop.time() + 15
        while self._waiting and loop.time() < end:
            await asyncio.sleep(0.01)
        result.broken += self._waiting
        for connection in self._free:
            connection.transport.abort()
        return result

    def _send(self, due: float, request: bytes) -> None:
        self.result.sent += 1
        self._waiting += 1
        if self._free:
            self._free.pop().ask(due, request)
        elif self._opened < self._cap:
            self._opened += 1
            task = asyncio.get_running_loop().create_task(self._open(due, request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._waiting -= 1
            self.result.no_connection += 1

    async def _open(self, due: float, request: bytes) -> None:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(lambda: _Connection(self), *self._address)
        except OSError:
            self._opened -= 1
            self._waiting -= 1
            self.result.broken += 1
            return
        connection.ask(due, request)

    def answered(self, connection: _Connection) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._waiting -= 1
        elapsed = (now - connection.due) * 1e3
        self.result.statuses[connection.status] += 1
        if connection.status == 200:
            self.result.accepted_ms.append(elapsed)
            self.result.finished_at.append(now - self._start)
            if self._key:
                place = connection.buffer.find(self._key)
                if place >= 0:
                    shown = connection.buffer[place + len(self._key) :].split(b'"', 1)[0]
                    self.result.versions[shown.decode()] += 1
        else:
            self.result.refused_ms.append(elapsed)
        if connection.close_after or connection.transport.is_closing():
            connection.transport.close()
        else:
            self._free.append(connection)

    def connection_broke(self, connection: _Connection) -> None:
        if connection.busy:
            connection.busy = False
            self._waiting -= 1
            self.result.broken += 1

    def free_discard(self, connection: _Connection) -> None:
        self._opened -= 1
        if connection in self._free:
            self._free.remove(connection)


def picture_request(path: str, data: bytes, *, kind: str = "image/jpeg", headers: str = "") -> bytes:
    """A POST of one picture."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\ncontent-length: {len(data)}\r\n{headers}\r\n"
    return head.encode() + data


def offer(order: dict[str, Any]) -> dict[str, Any]:
    """Run one load in this process; `order` is what `Load` takes, with pictures as file names."""
    from pathlib import Path

    import uvloop

    from bench.serving import request_body

    requests = []
    for name in order["pictures"]:
        kind, body = request_body(order.get("form", "raw"), Path(name).read_bytes())
        requests.append(picture_request(order["path"], body, kind=kind))
    load = Load(
        order.get("host", "127.0.0.1"),
        order["port"],
        requests,
        rate=order["rate"],
        seconds=order["seconds"],
        max_connections=order.get("max_connections", 512),
        seed=order.get("seed", 7),
        version_key=order.get("version_key", "").encode(),
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        cpu = time.process_time()
        result = runner.run(load.run())
    return {**result.told(), "generator_cpu_s": round(time.process_time() - cpu, 2)}


if __name__ == "__main__":
    print(json.dumps(offer(json.loads(sys.stdin.read()))))
