"""The load generator is an instrument: what it counts is what happened."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bench.load import Load, picture_request

REQUEST = picture_request("/predict", b"x" * 300_000)
OK = b'HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\n{"v":"seven"}'[:-1]
CHUNKED = b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nb\r\n{"v":"two"}\r\n0\r\n\r\n'
FULL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}"
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
    turns = [(OK, False), (CHUNKED, False), (FULL, False), (CLOSING, True), (OK[:20], True), (b"", True)]
    with answering(lambda index: turns[index % len(turns)]) as port:
        result = Load("127.0.0.1", port, [REQUEST], rate=120, seconds=1, version_key=b'"v":"').run()
    assert 80 < result.sent < 160
    assert sum(result.statuses.values()) + result.broken == result.sent
    rounds, rest = divmod(result.sent, len(turns))
    expected = [rounds + (place < rest) for place in range(len(turns))]
    assert result.statuses == {200: expected[0] + expected[1], 503: expected[2] + expected[3]}
    assert result.broken == expected[4] + expected[5]
    assert result.versions == {"seven": expected[0], "two": expected[1]}
    assert len(result.accepted_ms) == result.statuses[200]
    assert len(result.refused_ms) == result.statuses[503]
    assert result.no_connection == 0


def test_latency_counts_from_when_a_request_was_due_and_load_does_not_wait_for_answers() -> None:
    """A server that stands still for half a second is late for everything that was due meanwhile."""

    until: list[float] = []

    def stalls_once(index: int) -> tuple[bytes, bool]:
        if not until:
            until.append(time.monotonic() + 0.5)
        time.sleep(max(0.0, until[0] - time.monotonic()))
        return OK, False

    with answering(stalls_once) as port:
        result = Load("127.0.0.1", port, [REQUEST], rate=100, seconds=1).run()
    assert result.statuses == {200: result.sent}
    assert result.sent > 70
    late = [value for value in result.accepted_ms if value > 100]
    assert len(late) > 20
    assert max(late) > 350


def test_what_finds_no_connection_is_not_sent_and_said() -> None:
    def is_slow(index: int) -> tuple[bytes, bool]:
        time.sleep(0.3)
        return OK, False

    with answering(is_slow) as port:
        result = Load("127.0.0.1", port, [REQUEST], rate=100, seconds=1, max_connections=3).run()
    assert result.no_connection > 0
    assert result.statuses[200] + result.no_connection == result.sent


def test_nobody_there_is_broken_not_an_error() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        result = Load("127.0.0.1", held.getsockname()[1], [REQUEST], rate=50, seconds=0.5).run()
    assert result.broken == result.sent > 5


def test_the_same_seed_is_the_same_load() -> None:
    with answering(lambda index: (OK, False)) as port:
        sent = {Load("127.0.0.1", port, [REQUEST], rate=200, seconds=0.3, seed=2).run().sent for _ in range(2)}
    assert len(sent) == 1
