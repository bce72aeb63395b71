"""The load generator is an instrument: what it counts is what happened."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from bench.load import Load, picture_request

REQUEST = picture_request("/predict", b"x" * 300_000)
OK = b'HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\n{"v":"seven"}'[:-1]
CHUNKED = b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nb\r\n{"v":"two"}\r\n0\r\n\r\n'
FULL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}"
MALFORMED = b"this is not HTTP\r\n\r\n"
TWICE = FULL + FULL
CLOSING = FULL.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


@contextmanager
def answering(answer: Callable[[int], tuple[bytes, bool]]) -> Iterator[int]:
    """A server on a port; `answer` gives, for the n-th request, what is written and whether the connection is closed then."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    count = iter(range(1_000_000))

    def serve(taken: socket.socket) -> None:
        with taken:
            while True:
                left = len(REQUEST)
                while left:
                    data = taken.recv(min(left, 1 << 16))
                    if not data:
                        return
                    left -= len(data)
                content, close = answer(next(count))
                taken.sendall(content)
                if close:
                    return

    def accept() -> None:
        while True:
            try:
                taken, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(taken,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def test_every_request_is_counted_as_what_it_came_to() -> None:
    turns = [
        (OK, False),
        (CHUNKED, False),
        (FULL, False),
        (CLOSING, True),
        (OK[:20], True),
        (b"", True),
        (MALFORMED, False),
        (TWICE, False),
    ]
    with answering(lambda index: turns[index % len(turns)]) as port:
        since = time.monotonic()
        result = Load("127.0.0.1", port, [REQUEST], rate=120, seconds=1, version_key=b'"v":"').run()
        until = time.monotonic()
    assert 80 < result.sent < 160
    assert sum(result.statuses.values()) + result.broken == result.sent
    rounds, rest = divmod(result.sent, len(turns))
    expected = [rounds + (place < rest) for place in range(len(turns))]
    assert result.statuses == {200: expected[0] + expected[1], 503: expected[2] + expected[3]}
    assert result.broken == sum(expected[4:])
    assert result.versions == {"seven": expected[0], "two": expected[1]}
    assert len(result.accepted_ms) == result.statuses[200]
    assert len(result.refused_ms) == result.statuses[503]
    assert result.no_connection == 0
    assert len(result.asked_at) == result.sent
    assert since < min(result.asked_at) <= max(result.asked_at) < until
    assert len(result.failed_at) == result.sent - result.statuses[200]


def test_latency_counts_from_when_a_request_was_due_whoever_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second of the server, or of the generator itself, is in the latency of everything that was due meanwhile."""
    until: list[float] = []

    def stall_once() -> None:
        if not until:
            until.append(time.monotonic() + 0.5)
        time.sleep(max(0.0, until[0] - time.monotonic()))

    def stalls_once(index: int) -> tuple[bytes, bool]:
        stall_once()
        return OK, False

    for stalls in ("server", "generator"):
        until.clear()
        with (
            answering(stalls_once if stalls == "server" else lambda index: (OK, False)) as port,
            monkeypatch.context() as patch,
        ):
            load = Load("127.0.0.1", port, [REQUEST], rate=100, seconds=1)
            if stalls == "generator":
                wait = load._answers

                def waits(timeout_s: float, wait: Callable[[float], None] = wait) -> None:
                    stall_once()
                    wait(timeout_s)

                patch.setattr(load, "_answers", waits)
            result = load.run()
        assert result.statuses == {200: result.sent}
        assert result.sent > 70
        assert sum(value > 100 for value in result.accepted_ms) > 20
        assert max(result.accepted_ms) > 350
        # That it did not send what it was to send is said.
        assert (sum(value > 100 for value in result.late_ms) > 20) is (stalls == "generator")


def test_what_is_answered_before_it_is_sent_is_answered() -> None:
    """As a refusal at the headers is, whose server closes and does not read the rest."""
    early = picture_request("/predict", b"!" * 8_000_000)
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                taken, _ = listening.accept()
                with taken:
                    taken.recv(1000)
                    taken.sendall(CLOSING)

    threading.Thread(target=accept, daemon=True).start()
    result = Load("127.0.0.1", listening.getsockname()[1], [early], rate=40, seconds=0.5).run()
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    assert result.statuses == {503: result.sent}
    assert result.sent > 8


def test_what_finds_no_connection_is_not_sent_and_said() -> None:
    def is_slow(index: int) -> tuple[bytes, bool]:
        time.sleep(0.3)
        return OK, False

    with answering(is_slow) as port:
        result = Load("127.0.0.1", port, [REQUEST], rate=100, seconds=1, max_connections=3).run()
    assert result.no_connection > 0
    assert result.statuses[200] + result.no_connection == result.sent
    assert len(result.failed_at) == result.no_connection


def test_what_is_never_answered_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.load._PATIENCE_S", 0.3)
    with answering(lambda index: (OK if index % 2 else b"", False)) as port:
        result = Load("127.0.0.1", port, [REQUEST], rate=50, seconds=0.5).run()
    assert result.statuses == {200: result.sent // 2}
    assert result.broken == len(result.failed_at) == result.sent - result.sent // 2 > 5


def test_nobody_there_is_broken_not_an_error() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        result = Load("127.0.0.1", held.getsockname()[1], [REQUEST], rate=50, seconds=0.5).run()
    assert result.broken == result.sent > 5
    assert sorted(result.failed_at) == pytest.approx(result.asked_at)


def test_the_same_seed_is_the_same_load(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [picture_request("/predict", bytes([value]) * 10) for value in range(65, 91)]
    loads = []
    for seed in (2, 2, 3):
        load = Load("127.0.0.1", 9, requests, rate=200, seconds=0.3, seed=seed)
        sent: list[tuple[float, bytes]] = []

        def send(due: float, request: bytes, load: Load = load, sent: list[tuple[float, bytes]] = sent) -> None:
            sent.append((round(due - load._start, 6), request))

        monkeypatch.setattr(load, "_send", send)
        load.run()
        loads.append(sent)
    assert loads[0] == loads[1] != loads[2]
    assert 30 < len(loads[0]) < 100
