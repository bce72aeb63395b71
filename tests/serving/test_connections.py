"""Connections under a clock that the tests turn: what is refused at the headers, and who is hung up on when."""

import asyncio
import heapq
import itertools
import math
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
import pytest
import uvicorn
from uvicorn.server import ServerState

from serving.metrics import Metrics
from serving.protocols.connections import BoundedHttp
from serving.protocols.http import HttpGate

REQUEST_TIMEOUT_S, KEEP_ALIVE_S = 15.0, 60.0
PICTURE = b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc"
STATUS = b"GET /status HTTP/1.1\r\nhost: a\r\n\r\n"
LONG = b"POST /admin/refresh HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nabc"


class _Task:
    """Of an application that has not answered yet."""

    def add_done_callback(self, _: Callable[..., None]) -> None: ...


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

    def create_task(self, coroutine: Coroutine[Any, Any, None]) -> _Task:
        coroutine.close()
        return _Task()

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        raise context["exception"]

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
    """Keeps what is written; one that is stuck never gets rid of it, because its client does not read."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop, self.written, self.stuck, self.closing, self.gone_at = loop, b"", False, False, math.inf

    def write(self, data: Any) -> None:
        assert not self.closing
        self.written += data

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True
        if not self.stuck:
            self.abort()

    def abort(self) -> None:
        self.closing = True
        self.gone_at = min(self.gone_at, self.loop.now)

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class _Deployment:
    full = True

    def expected_wait_s(self) -> float:
        return 2.4


class _Routed:
    model = "photographs"

    def __init__(self) -> None:
        self.deployment = _Deployment()


class _Inference:
    def __init__(self) -> None:
        self.routed, self.metrics = {"photographs": _Routed()}, Metrics()


class Client:
    """One connection to a server, which is full for predictions and has work to do with everything else."""

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
        return self.transport.gone_at - self.since

    @property
    def running(self) -> Any:
        """The request that is being answered, the last that was asked."""
        return self.protocol.cycle

    def answered(self) -> None:
        """The application has answered it."""
        cycle = self.running
        cycle.response_started = cycle.response_complete = True
        self.protocol.on_response_complete()


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


def test_the_time_of_a_request_ends_with_it_and_an_answer_may_take_longer() -> None:
    client = Client()
    client.ask(STATUS)
    client.loop.pass_s(10 * REQUEST_TIMEOUT_S)
    assert not client.transport.is_closing()
    client.answered()
    client.loop.pass_s(KEEP_ALIVE_S - 1)
    assert not client.transport.is_closing()
    client.loop.pass_s(1)
    assert client.transport.gone_at == client.loop.now
    assert client.transport.written == b""


def test_a_body_that_does_not_come_is_answered_408_unless_its_request_is_answered_already() -> None:
    for early in (False, True):
        client = Client()
        client.ask(LONG)
        if early:
            client.answered()  # 401, say, at its headers
        client.loop.pass_s(REQUEST_TIMEOUT_S)
        assert client.hung_up_after_s == pytest.approx(REQUEST_TIMEOUT_S)
        assert client.transport.written.startswith(b"" if early else b"HTTP/1.1 408 ")
        assert bool(client.transport.written) is not early


@pytest.mark.parametrize("more", [b"G", b"GET /v2 HTT", LONG])
def test_the_beginning_of_a_next_request_ends_no_answer_that_is_under_way(more: bytes) -> None:
    client = Client()
    client.ask(STATUS)
    first = client.running
    client.loop.pass_s(5)
    client.ask(more)
    client.loop.pass_s(10 * REQUEST_TIMEOUT_S)
    assert not client.transport.is_closing()
    assert client.transport.written == b""
    # Once it is its turn, the next one has as long as every other.
    first.response_started = first.response_complete = True
    client.protocol.on_response_complete()
    client.loop.pass_s(REQUEST_TIMEOUT_S)
    assert client.transport.written.startswith(b"HTTP/1.1 408 ")
    assert client.transport.is_closing()


@pytest.mark.parametrize(
    ("then", "bound_s"),
    [
        ("while it is answered", REQUEST_TIMEOUT_S),
        ("after it was answered", REQUEST_TIMEOUT_S),
        ("and asks on", REQUEST_TIMEOUT_S),
        ("until the time of an idle connection is over", KEEP_ALIVE_S + 5),
        ("and its last answer is sent", 5),
        ("and the server ends", 5),
    ],
)
def test_who_does_not_read_is_hung_up_on(then: str, bound_s: float) -> None:
    client = Client()
    client.ask(STATUS)
    client.transport.stuck = True
    if then == "while it is answered":
        client.protocol.pause_writing()
    elif then == "after it was answered":
        client.protocol.pause_writing()
        client.answered()
    elif then == "and asks on":
        client.answered()
        client.protocol.pause_writing()
        client.ask(STATUS)
    elif then == "until the time of an idle connection is over":
        client.answered()
    elif then == "and its last answer is sent":
        client.transport.close()
        client.answered()
    else:
        client.answered()
        client.protocol.shutdown()
    client.loop.pass_s(bound_s - 0.5)
    assert client.transport.gone_at == math.inf
    client.loop.pass_s(1)
    assert client.transport.gone_at < math.inf


def test_who_reads_slowly_is_waited_for_and_asks_on() -> None:
    client = Client()
    client.ask(STATUS)
    for _ in range(5):
        client.protocol.pause_writing()
        client.loop.pass_s(REQUEST_TIMEOUT_S - 1)
        client.protocol.resume_writing()
        client.loop.pass_s(10 * REQUEST_TIMEOUT_S)
    assert not client.transport.is_closing()
    client.answered()
    assert client.ask(PICTURE).startswith(b"HTTP/1.1 503 ")
    client.ask(LONG)
    client.loop.pass_s(REQUEST_TIMEOUT_S)
    assert b"HTTP/1.1 408 " in client.transport.written


def test_refusals_that_are_read_in_the_end_leave_an_idle_connection() -> None:
    client = Client()
    client.ask(PICTURE)
    client.protocol.pause_writing()
    client.loop.pass_s(REQUEST_TIMEOUT_S - 1)
    client.protocol.resume_writing()
    client.loop.pass_s(KEEP_ALIVE_S - 1)
    assert not client.transport.is_closing()
    client.loop.pass_s(1)
    assert client.transport.gone_at == client.loop.now


def test_trailers_are_no_headers_and_bounded() -> None:
    client = Client()
    client.ask(STATUS.replace(b"\r\n\r\n", b"\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-a: b\r\nx-b: c\r\n"))
    assert b"x-a" not in dict(client.running.scope["headers"])
    client.ask(b"x-c: %s\r\nx-d: e\r\n" % (b"c" * (40 << 10)))
    assert client.transport.is_closing()
    assert client.transport.written == b""


def test_too_much_of_headers_is_answered_431() -> None:
    for many in (b"x: y\r\n" * 101, b"x: %s\r\n" % (b"y" * (33 << 10)), None):
        client = Client()
        client.ask(b"GET /%s HTTP/1.1\r\n%s\r\n" % (b"a" * (33 << 10) if many is None else b"v2", many or b""))
        assert client.transport.written.startswith(b"HTTP/1.1 431 ")
        assert client.transport.written.count(b"content-length") == 1
        assert client.transport.is_closing()


def test_a_body_too_large_is_told_so_and_its_rest_has_a_moment() -> None:
    client = Client()
    answer = client.ask(LONG.replace(b"content-length: 9", b"content-length: 101"))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"\r\nconnection: close\r\n" in answer
    assert not client.transport.is_closing()
    client.loop.pass_s(5)
    assert client.hung_up_after_s == pytest.approx(5)


def test_a_connection_too_many_is_told_when_to_come_back_and_probes_are_answered() -> None:
    client = Client(connections=10, most=10)
    answer = client.ask(STATUS)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: 1\r\n" in answer
    assert client.ask(STATUS.replace(b"GET", b"HEAD")) == answer[: answer.index(b"\r\n\r\n") + 4]
    text = client.inference.metrics.text().decode()
    assert 'visionloop_shed_total{model="",protocol="http"} 2.0' in text
    for path in (b"/v2/health/live", b"/v2/models/photographs/ready", b"/metrics"):
        asked = client.ask(STATUS.replace(b"/status", path))
        assert asked == (b"" if b"models" not in path else answer)
        if not asked:
            client.answered()
    assert not Client(connections=9, most=10).ask(STATUS)


def test_a_lost_connection_leaves_no_timer() -> None:
    client = Client()
    client.ask(PICTURE)
    client.protocol.connection_lost(None)
    assert all(handle.cancelled() for _, _, handle in client.loop.timers)


UPGRADES = [
    b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n",
    b"upgrade: websocket\r\nconnection: keep-alive, upgrade\r\n",
    b"connection: upgrade\r\nupgrade: TLS/1.0, x\r\n",
]


@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize(
    "framing", [b"content-length: %d\r\n\r\n%s", b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"]
)
def test_an_upgrade_is_ignored_and_the_body_is_the_body(upgrade: bytes, framing: bytes) -> None:
    """Also one that reads like another request, however it arrives, and with requests before and behind it."""
    body = STATUS + upgrade
    asked = b"POST /admin/refresh HTTP/1.1\r\nhost: a\r\n" + upgrade + framing % (len(body), body)
    for piece in (len(asked) * 2, 7, 1):
        client = Client()
        sent = STATUS + asked + PICTURE
        first: list[Any] = []
        for start in range(0, len(sent), piece):
            client.ask(sent[start : start + piece])
            first += [client.running] if client.running is not None and not first else []
        assert client.transport.written == b""
        first[0].response_started = first[0].response_complete = True
        (last, _), (middle, _) = client.protocol.pipeline
        assert (middle.scope["method"], middle.scope["path"], bytes(middle.body)) == ("POST", "/admin/refresh", body)
        assert not middle.more_body
        assert b"upgrade" not in dict(middle.scope["headers"])
        assert (last.scope["path"], bytes(last.body)) == ("/predict", b"abc")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ((b"host: a\r\n", b""), 400),
        ((b"host: a\r\n", b"host: a\r\nHost: a\r\n"), 400),
        ((b"host: a\r\n", b"host: a/b\r\n"), 400),
        ((b"host: a\r\n", b"host: u@a\r\n"), 400),
        ((b"host: a\r\n", b"host: a, b\r\n host: c\r\n"), 400),
        ((b"content-length: 3", b"transfer-encoding: gzip, chunked"), 501),
        ((b"content-length: 3", b"transfer-encoding: gzip\r\ntransfer-encoding: chunked"), 501),
        ((b"content-length: 3", b"transfer-encoding: identity"), 501),
        ((b"content-length: 3", b"transfer-encoding: chunked\r\ntransfer-encoding: chunked"), 400),
        ((b"content-length: 3", b"content-length: 3\r\ntransfer-encoding: chunked"), 400),
        ((b"content-length: 3", b"transfer-encoding: chunked\r\ncontent-length: 3"), 400),
        ((b"content-length: 3", b"content-length: 3\r\ncontent-length: 3"), 400),
        ((b"content-length: 3", b"content-length: 3, 3"), 400),
        ((b"content-length: 3", b"content-length: +3"), 400),
        ((b"content-length: 3", b"content-length : 3"), 400),
        ((b"content-length: 3", b"transfer-encoding: chunked\r\nx: y\0z"), 400),
        ((b"content-length: 3\r\n\r\n", b"content-length: 3\n\n"), 400),
        ((b"content-length: 3", b"content-length: 3\r\n folded: yes"), 400),
        ((b"content-length: 3", b"content-length: 3\r\nexpect: magic"), 417),
        ((b"1.1\r\nhost: a\r\ncontent-length: 3", b"1.0\r\nhost: a\r\ntransfer-encoding: chunked"), 400),
        ((b"HTTP/1.1", b"HTTP/2.0"), 505),
        ((b"HTTP/1.1", b"HTTP/1.7"), 400),
        ((b"POST /predict", b"CONNECT a:80"), 501),
        ((b"POST /predict", b"POST *"), 400),
        ((b"POST /predict", b"POST ftp://a/predict"), 400),
        ((b"POST /predict", b"POST http://u@a/predict"), 400),
        ((b"POST /predict", b"POST /predict#x"), 400),
        ((b"POST /predict", b"POST /pre\xc3\xa9dict"), 400),
        ((b"POST /predict", b"PO ST /predict"), 400),
    ],
)
def test_a_request_whose_meaning_is_not_sure_is_refused_once_and_nothing_is_read_behind_it(
    change: tuple[bytes, bytes], status: int
) -> None:
    asked = PICTURE.replace(*change)
    assert asked != PICTURE
    client = Client()
    answer = client.ask(asked + STATUS + PICTURE)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    assert answer.count(b"content-length") == 1
    head, body = answer.split(b"\r\n\r\n")
    assert b"\r\ncontent-type: application/json" in head
    assert b"\r\nconnection: close" in head
    assert list(orjson.loads(body)) == ["error"]
    assert client.running is None
    client.loop.pass_s(5)
    assert client.transport.gone_at < math.inf
    # Behind one that is being answered it is told so after that one's answer.
    client = Client()
    client.ask(STATUS + asked)
    assert client.transport.written == b""
    first = client.running
    client.ask(STATUS)
    assert client.running is first
    client.answered()
    assert client.transport.written.startswith(b"HTTP/1.1 400 ")
    assert client.transport.written.count(b"content-length") == 1
    assert client.transport.is_closing()


@pytest.mark.parametrize("body", [b"1\r\nabc", b"1 \r\na", b"1;a\nb\r\n", b"0x1\r\na", b"fffffffffffffffff\r\na"])
def test_a_body_that_breaks_its_framing_is_the_end_of_its_request(body: bytes) -> None:
    asked = b"POST /admin/refresh HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n" + body
    client = Client()
    assert client.ask(asked).startswith(b"HTTP/1.1 400 ")
    assert client.running.disconnected
    assert client.transport.is_closing()
    client = Client()
    client.ask(STATUS)
    first = client.running
    client.ask(asked)
    assert (client.transport.written, list(client.protocol.pipeline)) == (b"", [])
    client.loop.pass_s(100)
    assert client.transport.written == b""
    first.response_started = first.response_complete = True
    client.protocol.on_response_complete()
    assert client.transport.written.startswith(b"HTTP/1.1 400 ")
    assert client.transport.is_closing()


def test_other_forms_of_a_target_are_understood() -> None:
    for target, path in ((b"http://b.c:80/status?x", "/status"), (b"HTTP://b.c", "/"), (b"http://[::1]:8?x", "/")):
        client = Client()
        client.ask(STATUS.replace(b"/status", target))
        host = target[7:].partition(b"/")[0].partition(b"?")[0]
        assert (client.running.scope["path"], client.running.scope["headers"]) == (path, [(b"host", host)])
    client = Client()
    client.ask(STATUS.replace(b"GET /status", b"OPTIONS *"))
    assert client.running.scope["path"] == "/"
    client = Client()
    client.ask(b"GET /status HTTP/1.0\r\nexpect: 100-continue\r\n\r\n")
    assert not client.running.waiting_for_100_continue


def test_what_is_behind_the_last_request_of_a_connection_is_not_asked() -> None:
    client = Client()
    answer = client.ask(PICTURE.replace(b"host: a\r\n", b"host: a\r\nconnection: close\r\n") + STATUS + PICTURE)
    assert answer.count(b"content-length") == 1
    assert client.running is None
