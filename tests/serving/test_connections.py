"""Connections under a clock that the tests turn: what is refused at the headers, and who is hung up on when."""

import asyncio
import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from serving.app import HttpGate
from serving.connections import BoundedHttp
from serving.metrics import Metrics

REQUEST_TIMEOUT_S, KEEP_ALIVE_S = 15.0, 60.0
PICTURE = b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc"


class Loop:
    """As much of an event loop as a protocol needs, with a clock that stands still."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self.num_timers = itertools.count()

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[..., None], *args: Any) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self)  # type: ignore[arg-type]
        heapq.heappush(self.timers, (when, next(self.num_timers), handle))
        return handle

    def call_later(self, delay: float, callback: Callable[..., None], *args: Any) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *args)

    def get_debug(self) -> bool:
        return False

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None: ...

    def pass_s(self, seconds: float) -> None:
        """Let so much time go by, and everything happen that is due in it."""
        end = self.now + seconds
        while self.timers and self.timers[0][0] <= end:
            when, _, handle = heapq.heappop(self.timers)
            self.now = max(self.now, when)
            if not handle.cancelled():
                handle._run()
        self.now = end


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop, self.written, self.closed_at = loop, b"", math.inf

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed_at < math.inf

    def close(self) -> None:
        self.closed_at = min(self.closed_at, self.loop.now)

    abort = close


class _Deployment:
    full = True

    def expected_wait_s(self) -> float:
        return 2.4


class _Routed:
    model = "photographs"
    deployment = _Deployment()


class _Inference:
    def __init__(self) -> None:
        self.routed, self.metrics = {"photographs": _Routed()}, Metrics()


class Client:
    """One connection to a server that is full."""

    def __init__(self, *, connections: int = 0, most: int | None = None) -> None:
        config = uvicorn.Config(
            _nobody,
            ws="none",
            lifespan="off",
            log_config=None,
            timeout_keep_alive=round(KEEP_ALIVE_S),
            limit_concurrency=most,
        )
        config.load()
        self.inference, self.loop = _Inference(), Loop()
        gate = HttpGate(self.inference, max_body=100, request_timeout_s=REQUEST_TIMEOUT_S)  # type: ignore[arg-type]
        state = ServerState()
        state.connections |= {object() for _ in range(connections)}  # type: ignore[misc]
        self.protocol: Any = type("Http", (BoundedHttp,), {"gate": gate})(config, state, {}, self.loop)
        self.transport = Transport(self.loop)
        self.protocol.connection_made(self.transport)
        self.since = self.loop.now

    def ask(self, data: bytes) -> bytes:
        before = len(self.transport.written)
        self.protocol.data_received(data)
        return self.transport.written[before:]

    @property
    def hung_up_after_s(self) -> float:
        return self.transport.closed_at - self.since


async def _nobody(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("a request that is refused reaches no application")


@pytest.mark.parametrize("path", [b"/predict", b"/predict?top=3", b"/v2/models/photographs/infer"])
def test_what_a_full_server_refuses_is_told_when_to_come_back_and_counted(path: bytes) -> None:
    client = Client()
    for _ in range(3):
        answer = client.ask(PICTURE.replace(b"/predict", path))
        head, body = answer.split(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 2" in head
        assert body == b'{"error":"the server is full; try again later"}'
        assert f"content-length: {len(body)}".encode() in head
    assert not client.transport.is_closing()
    text = client.inference.metrics.text().decode()
    assert 'visionloop_shed_total{model="photographs",protocol="http"} 3.0' in text
    assert 'visionloop_requests_total{code="503",model="photographs",protocol="http"} 3.0' in text


def test_who_keeps_asking_is_not_hung_up_on_and_who_stops_is() -> None:
    client = Client()
    for _ in range(100):
        assert client.ask(PICTURE)
        client.loop.pass_s(KEEP_ALIVE_S - 1)
    assert not client.transport.is_closing()
    client.loop.pass_s(1)
    assert client.hung_up_after_s == pytest.approx(100 * (KEEP_ALIVE_S - 1) + 1)


def test_a_sooner_time_ends_before_a_later_one_that_was_set_first() -> None:
    client = Client()
    client.ask(PICTURE)
    client.loop.pass_s(30)
    client.ask(PICTURE[:-1])  # 15 s for the rest of it, 60 s had been given for the next request
    client.loop.pass_s(100)
    assert client.hung_up_after_s == pytest.approx(30 + REQUEST_TIMEOUT_S)


@pytest.mark.parametrize("start", [b"POST", b"POST /predict HTTP/1.1\r\nhost: a\r\n", b"GET /v2 HTTP/1.1\r\nx: y"])
def test_a_request_that_does_not_come_is_answered_408(start: bytes) -> None:
    client = Client()
    client.loop.pass_s(REQUEST_TIMEOUT_S - 1)
    client.ask(start)
    client.loop.pass_s(REQUEST_TIMEOUT_S - 1)
    assert not client.transport.is_closing()
    client.loop.pass_s(1)
    assert client.transport.is_closing()
    assert client.transport.written.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("asked", [b"", b"\r\n", PICTURE])
def test_a_connection_without_a_request_is_closed_without_an_answer_to_one(asked: bytes) -> None:
    """An answer that nobody asked for would be taken for that of the next request."""
    client = Client()
    client.ask(asked)
    answered = client.transport.written
    client.loop.pass_s(KEEP_ALIVE_S)
    assert client.transport.is_closing()
    assert client.transport.written == answered


def test_a_connection_too_many_is_told_when_to_come_back() -> None:
    client = Client(connections=9, most=10)
    answer = client.ask(b"GET /v2/health/live HTTP/1.1\r\nhost: a\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: 1\r\n" in answer
    assert b"\r\nconnection: close\r\n" in answer
    assert client.transport.is_closing()


def test_a_lost_connection_leaves_no_timer() -> None:
    client = Client()
    client.ask(PICTURE)
    client.protocol.connection_lost(None)
    assert all(handle.cancelled() for _, _, handle in client.loop.timers)
