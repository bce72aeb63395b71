"""An open-loop load generator: requests leave when they are due, whatever the answers do.

Arrivals are Poisson with a fixed seed. Latency counts from the moment a request was due, so a server that stalls cannot
hide it (no coordinated omission). Connections are kept alive and opened as needed; a request that finds none free below the
cap is not sent, which the result says. Server and generator share the processors, so it costs as little as Python can: one
thread, plain sockets and epoll, which counts in whole milliseconds: each latency is up to one too long. How late requests
left, and what the generator took of the processors, is in the result.
"""

from __future__ import annotations

import base64
import errno
import json
import select
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_AT_ONCE = 64
"""Requests that are sent before answers are read again, when the generator is late."""
_PATIENCE_S = 15.0
"""How long after the end the last answers are waited for."""


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
    late_ms: list[float] = field(default_factory=list)
    """How long after it was due each request left."""
    sent_in_time: int = 0
    """Requests that left before the load ended."""
    asked_at: list[float] = field(default_factory=list)
    failed_at: list[float] = field(default_factory=list)
    """When every request, and every one that was not answered with 200, was due: of `time.monotonic`, the same for all
    processes."""
    processor_s: float = 0.0
    """What the generator took of the processors between the start and the end of the load."""

    def told(self) -> dict[str, Any]:
        """The figures of a report."""
        good = sum(at <= self.seconds for at in self.finished_at)  # not what was still queued when the load ended
        return {
            "offered_per_s": round(self.rate, 1),
            "delivered_per_s": round(self.sent_in_time / self.seconds, 1),
            "late_ms": percentiles(self.late_ms),
            "seconds": self.seconds,
            "sent": self.sent,
            "goodput_per_s": round(good / self.seconds, 1),
            "statuses": {str(code): count for code, count in sorted(self.statuses.items())},
            "accepted_ms": percentiles(self.accepted_ms),
            "refused_ms": percentiles(self.refused_ms),
            "no_connection": self.no_connection,
            "broken": self.broken,
            "versions": dict(self.versions),
            "generator_cpu_s": round(self.processor_s, 2),
        }


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p90 and p99; empty without values."""
    if not values:
        return {}
    found = np.percentile(values, [50, 90, 99])
    return {name: round(float(value), 2) for name, value in zip(("p50", "p90", "p99"), found, strict=True)}


class _Connection:
    """One socket, one request at a time."""

    __slots__ = ("buffer", "busy", "chunked", "close_after", "due", "socket", "status", "unsent", "wanted")

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        problem = self.socket.connect_ex(address)
        if problem not in (0, errno.EINPROGRESS):
            self.socket.close()
            raise OSError(problem, "not connected")
        self.due = 0.0
        self.unsent = memoryview(b"")
        self.buffer = b""
        self.wanted = -1
        """Bytes of the whole answer; negative until its head is there."""
        self.status = 0
        self.busy = self.close_after = self.chunked = False

    def ask(self, due: float, request: bytes) -> None:
        self.due, self.busy, self.buffer, self.wanted = due, True, b"", -1
        self.unsent = memoryview(request)

    def flush(self) -> bool:
        """Send what can be sent now; whether there is no more to send."""
        try:
            while self.unsent:
                self.unsent = self.unsent[self.socket.send(self.unsent) :]
        except BlockingIOError:
            return False
        except OSError:
            # Nobody takes the rest; the answer to the beginning may be there, and `take` knows.
            self.unsent, self.close_after = memoryview(b""), True
        return True

    def take(self) -> bool:
        """Read what there is; whether the answer is whole. Raises OSError where there will be none, ValueError where it is
        not one answer to one request."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return False
        if not data or not self.busy:
            raise ConnectionResetError
        self.buffer = self.buffer + data if self.buffer else data
        if self.wanted < 0:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return False
            head = self.buffer[: end + 2].lower()
            self.status = int(head[9:12])
            self.close_after |= b"connection: close" in head
            start = head.find(b"\r\ncontent-length:")
            self.chunked = start < 0 and b"transfer-encoding: chunked" in head
            if start >= 0:
                self.wanted = end + 4 + int(head[start + 17 :].split(b"\r\n", 1)[0])
            elif self.chunked:
                self.wanted = 0
            else:
                raise ValueError("an answer without a length")
        if self.chunked:
            return self.buffer.endswith(b"\r\n0\r\n\r\n")
        if len(self.buffer) > self.wanted:
            raise ValueError("more than one answer")
        return len(self.buffer) == self.wanted


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
        self._address, self._requests, self._cap, self._key = (host, port), requests, max_connections, version_key
        self._connections: dict[int, _Connection] = {}
        self._free: list[_Connection] = []
        self._waiting = 0
        self._start = 0.0
        self._rng = np.random.default_rng(seed)
        self._epoll = select.epoll()
        self.result = Result(rate, seconds)

    def run(self) -> Result:
        """Offer the load; returns when the last answer is there, at most 15 s after the end."""
        result = self.result
        gaps = self._rng.exponential(1 / result.rate, size=int(result.rate * result.seconds * 1.2) + 20)
        offsets = np.cumsum(gaps)
        offsets = offsets[offsets < result.seconds]
        picks = self._rng.integers(0, len(self._requests), size=len(offsets)).tolist()
        self._start = time.perf_counter() + 0.05
        due = (self._start + offsets).tolist()
        since = time.monotonic() + self._start - time.perf_counter()
        result.asked_at = (since + offsets).tolist()
        over, last = self._start + result.seconds, self._start + result.seconds + _PATIENCE_S
        processor, ended = time.process_time(), False
        index = 0
        while True:
            now = time.perf_counter()
            if now >= over and not ended:
                ended, result.processor_s = True, time.process_time() - processor
            until = min(len(due), index + _AT_ONCE)
            while index < until and due[index] <= now:
                self._send(due[index], self._requests[picks[index]])
                index += 1
            if index == len(due) and ((ended and not self._waiting) or now >= last):
                break
            following = due[index] if index < len(due) else last if ended else over
            self._answers(max(0.0, following - time.perf_counter()))
        result.broken += self._waiting
        for connection in self._connections.values():
            if connection.busy:
                result.failed_at.append(connection.due)
            connection.socket.close()
        self._epoll.close()
        result.failed_at = [since + failed - self._start for failed in result.failed_at]
        return result

    def _send(self, due: float, request: bytes) -> None:
        self.result.sent += 1
        if self._free:
            connection = self._free.pop()
        elif len(self._connections) < self._cap:
            try:
                connection = _Connection(self._address)
            except OSError:
                self.result.broken += 1
                self.result.failed_at.append(due)
                return
            self._connections[connection.socket.fileno()] = connection
            self._epoll.register(connection.socket, select.EPOLLIN)
        else:
            self.result.no_connection += 1
            self.result.failed_at.append(due)
            return
        self._waiting += 1
        connection.ask(due, request)
        if not connection.flush():
            self._epoll.modify(connection.socket, select.EPOLLIN | select.EPOLLOUT)
        now = time.perf_counter()
        self.result.late_ms.append((now - due) * 1e3)
        self.result.sent_in_time += now < self._start + self.result.seconds

    def _answers(self, timeout_s: float) -> None:
        """Wait for what the sockets have to say, at most so long."""
        for descriptor, events in self._epoll.poll(timeout_s, 256):
            connection = self._connections.get(descriptor)
            if connection is None:
                continue
            try:
                # First what it says: who answers early and closes would else be taken for one that broke.
                if events & ~select.EPOLLOUT and connection.take():
                    self._answered(connection)
                elif events & select.EPOLLOUT and connection.flush():
                    self._epoll.modify(connection.socket, select.EPOLLIN)
            except (OSError, ValueError):
                self._broke(connection)

    def _answered(self, connection: _Connection) -> None:
        now = time.perf_counter()
        result = self.result
        elapsed = (now - connection.due) * 1e3
        result.statuses[connection.status] += 1
        self._waiting -= 1
        connection.busy = False
        if connection.status == 200:
            result.accepted_ms.append(elapsed)
            result.finished_at.append(now - self._start)
            if self._key:
                place = connection.buffer.find(self._key)
                if place >= 0:
                    shown = connection.buffer[place + len(self._key) :].split(b'"', 1)[0]
                    result.versions[shown.decode(errors="replace")] += 1
        else:
            result.refused_ms.append(elapsed)
            result.failed_at.append(connection.due)
        if connection.close_after or connection.unsent:
            self._end(connection)
        else:
            self._free.append(connection)

    def _broke(self, connection: _Connection) -> None:
        if connection.busy:
            self._waiting -= 1
            self.result.broken += 1
            self.result.failed_at.append(connection.due)
        else:
            self._free.remove(connection)  # the server ended what was idle
        self._end(connection)

    def _end(self, connection: _Connection) -> None:
        del self._connections[connection.socket.fileno()]
        connection.socket.close()


def picture_request(path: str, data: bytes, *, kind: str = "image/jpeg", headers: str = "") -> bytes:
    """A POST of one picture."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\ncontent-length: {len(data)}\r\n{headers}\r\n"
    return head.encode() + data


def request_body(form: str, data: bytes) -> tuple[str, bytes]:
    """Content type and body of a picture for a server."""
    if form == "base64":
        return "application/json", b'{"image": "' + base64.b64encode(data) + b'"}'
    if form == "mlflow":
        return "application/json", b'{"dataframe_records": [{"image": "' + base64.b64encode(data) + b'"}]}'
    if form.startswith("bentoml"):
        field = "images" if form == "bentoml-list" else "image"
        head = f'--b\r\ncontent-disposition: form-data; name="{field}"; filename="a.jpg"\r\ncontent-type: image/jpeg\r\n\r\n'
        return "multipart/form-data; boundary=b", head.encode() + data + b"\r\n--b--\r\n"
    return "image/jpeg", data


def offer(order: dict[str, Any]) -> dict[str, Any]:
    """Run one load in this process; `order` is what `Load` takes, with pictures as file names.

    With `samples` the report has every latency, so that loads can be pooled, and when requests were due and failed.
    """
    requests = []
    for name in order["pictures"]:
        kind, body = request_body(order.get("form", "raw"), Path(name).read_bytes())
        requests.append(picture_request(order["path"], body, kind=kind))
    result = Load(
        order.get("host", "127.0.0.1"),
        order["port"],
        requests,
        rate=order["rate"],
        seconds=order["seconds"],
        max_connections=order.get("max_connections", 512),
        seed=order.get("seed", 7),
        version_key=order.get("version_key", "").encode(),
    ).run()
    found = result.told()
    if order.get("samples"):
        found["samples"] = {name: getattr(result, name) for name in ("accepted_ms", "refused_ms", "asked_at", "failed_at")}
    return found


if __name__ == "__main__":
    print(json.dumps(offer(json.loads(sys.stdin.read()))))
