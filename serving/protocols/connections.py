"""HTTP connections with bounds: time to send a request, size of headers and body, refusals that cost next to nothing.

One request has one answer, and where it ends is never a guess: what RFC 9112 leaves open between a proxy and a server, or
forbids, is refused, and the connection ends there.

Under overload most of what a server does is refusing. So a request that would be shed is answered as soon as its headers are
there, without a task, an application or its body; that keeps the processors for the requests that were taken.
"""

from __future__ import annotations

import asyncio
import functools
import math
import re
from typing import Any, Protocol

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

_MAX_HEADERS = 100
_MAX_HEADER_BYTES = 32 << 10
_LINGER_S = 5.0
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)", re.IGNORECASE)
NO_HTTP = "this is no HTTP/1.1 request"


class Gate(Protocol):
    """Decides at the headers whether a request is refused without reading on."""

    request_timeout_s: float
    max_body: int

    def refusal(
        self, method: bytes, url: bytes, headers: list[tuple[bytes, bytes]], *, crowded: bool
    ) -> tuple[int, str, float | None] | None:
        """Status, message and retry-after seconds of a refusal, None to go on; `crowded` by too many connections."""
        ...


def plain_response(status: int, message: str, retry_after_s: float | None = None, *, close: bool = False) -> bytes:
    """A whole HTTP response with an error of ours."""
    return _response(status, message, None if retry_after_s is None else max(1, round(retry_after_s)), close)


@functools.lru_cache(maxsize=64)
def _response(status: int, message: str, retry_after_s: int | None, close: bool) -> bytes:
    body = orjson.dumps({"error": message})
    parts = [STATUS_LINE[status], b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)]
    if retry_after_s is not None:
        parts.append(b"retry-after: %d\r\n" % retry_after_s)
    if close:
        parts.append(b"connection: close\r\n")
    return b"".join((*parts, b"\r\n", body))


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol with a gate at the headers, and one clock that runs whenever the client is the one to act."""

    gate: Gate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # uvicorn would refuse everybody, probes too, and not say when to come back.
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None
        self._skipping = False
        self._failed = False
        """Whether what was sent is no HTTP: then the answers that are due are given, and nothing is read any more."""
        self._close_after = False
        self._skipped = 0
        self._header_bytes = 0
        self._begun = False
        """Whether a part of a request is there, and not all of it."""
        self._at_body = False
        """Whether the headers of the last request are all there: then `cycle` is its, else that of the one before."""
        self._due = math.inf
        """When the client must have acted; infinite while it is not the one to act."""
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = math.inf

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._start_clock(self.gate.request_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if not self._failed:
            try:
                self._parse(data)
            except httptools.HttpParserError:
                self._end(NO_HTTP)
        # uvicorn's keep-alive clock ends with the first byte; what follows may be no request, or the rest of a body that was
        # answered early. Whatever it is, a connection without a running request has a clock.
        if self._due == math.inf and self._idle and self.timeout_keep_alive_task is None:
            self._start_clock(_LINGER_S if self.transport.is_closing() else self.timeout_keep_alive)

    def _parse(self, data: bytes) -> None:
        rest = memoryview(data)
        while True:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if self._skipping or self.transport.is_closing():
                    self._failed = True  # CONNECT: what follows is no HTTP
                    return
                # The parser takes an upgrade for granted, and what follows for another protocol. No upgrade is made here, so
                # the request is parsed as the one without it: the body is the body.
                rest = rest[upgrade.args[0] :]
                head = [self.parser.get_method(), b" ", self.url, b" HTTP/%s\r\n" % self.parser.get_http_version().encode()]
                for name, value in self.headers:
                    if name != b"upgrade":
                        head += [name, b": ", value, b"\r\n"]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self.parser.feed_data(b"".join([*head, b"\r\n"]))

    def _end(self, message: str) -> None:
        """What came is no request, or not the rest of one: it is told so when it is its turn, and that is the end."""
        self._failed = True
        if self._skipping or self.transport.is_closing():
            self._hang_up()
            return
        if self._begun and self._at_body:
            if self.pipeline:
                self.pipeline.popleft()  # it waits behind others
            elif self.cycle.response_started:
                self._hang_up()
                return
            else:
                self.cycle.disconnected = True  # it is being answered, and there will be no more of it
                self.cycle.message_event.set()
                self._refuse(400, message, None, close=True)
                self._hang_up()
                return
        if self.pipeline or not self._idle:
            self._begun = self._at_body = False
            self._stop_clock()
            return  # the answers before it come first: `on_response_complete`
        self._refuse(400, message, None, close=True)
        self._hang_up()

    @property
    def _idle(self) -> bool:
        """Whether no request of this connection is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _start_clock(self, seconds: float) -> None:
        # A timer that rings too early looks again and is set anew: starting and stopping the clock, twice a request, is then
        # no more than an assignment.
        self._due = self.loop.time() + seconds
        if self._rings_at > self._due:
            self._set_timer()

    def _stop_clock(self) -> None:
        self._due = math.inf

    def _set_timer(self) -> None:
        self._end_timer()
        # uvloop counts in whole milliseconds: what is due in less would ring at once, again and again.
        self._rings_at = max(self._due, self.loop.time() + 0.001)
        self._timer = self.loop.call_at(self._rings_at, self._ring)

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._rings_at = None, math.inf

    def _ring(self) -> None:
        self._timer, self._rings_at = None, math.inf
        if self._due == math.inf:
            return
        if self.loop.time() < self._due:
            self._set_timer()
            return
        if self.flow.write_paused or self.transport.is_closing():
            # It does not read what it asked for: waiting until that is sent would be for ever.
            self._due = math.inf
            self.transport.abort()
        elif self.pipeline or not (self._at_body or self._idle):
            # The rest of a request that is not next in line; the one before is ours to answer.
            self._start_clock(self.gate.request_timeout_s)
        else:
            # An answer that nobody asked for, or a second one, would be taken for that of the next request.
            if self._begun and not self._skipping and not (self._at_body and self.cycle.response_started):
                self.transport.write(plain_response(408, "the request took too long to arrive", close=True))
            self._hang_up()

    def _hang_up(self) -> None:
        """Close as soon as everything is sent; `_ring` ends what is not."""
        self.transport.close()
        self._start_clock(_LINGER_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_clock(self.gate.request_timeout_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.transport.is_closing():
            self._start_clock(_LINGER_S)
        elif self._begun:
            self._start_clock(self.gate.request_timeout_s)
        elif self._idle and self.timeout_keep_alive_task is None:
            self._start_clock(self.timeout_keep_alive)
        else:
            self._stop_clock()

    def on_response_complete(self) -> None:
        if self._failed and not self.pipeline and not self.transport.is_closing():
            self._refuse(400, NO_HTTP, None, close=True)
            self._hang_up()
        super().on_response_complete()
        if self.transport.is_closing():
            self._start_clock(_LINGER_S)

    def timeout_keep_alive_handler(self) -> None:
        self._hang_up()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._start_clock(_LINGER_S)

    def on_message_begin(self) -> None:
        self._header_bytes, self._begun, self._at_body = 0, True, False
        if self.transport.is_closing():
            self._skipping = True  # it is behind the last one that is answered here
        else:
            self._start_clock(self.gate.request_timeout_s)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._header_bytes += len(url)
        if self._header_bytes > _MAX_HEADER_BYTES:
            self._refuse_headers()
        elif not self._skipping:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value) + 4
        if self._header_bytes > _MAX_HEADER_BYTES or len(self.headers) >= _MAX_HEADERS:
            self._refuse_headers()
        elif not self._skipping and not self._at_body:  # what follows a body in chunks is no header
            super().on_header(name, value)

    def _refuse_headers(self) -> None:
        if self._at_body or not self._idle:
            # The request is being answered, or the one before it is: no place for another answer.
            self.transport.abort()
        elif not self._skipping:
            self._refuse(431, f"more than {_MAX_HEADERS} headers or {_MAX_HEADER_BYTES} bytes of them", None, close=True)
            self._hang_up()

    def _refused_head(self, method: bytes) -> tuple[int, str] | None:
        """Why nobody can say what is asked, or where it ends: status and message; None when all is well.

        Leaves the target as a path, and the host that is asked in its header.
        """
        version = self.parser.get_http_version()
        if version not in ("1.1", "1.0"):
            return 505, "this server speaks HTTP/1.1"
        hosts, codings, others = [], [], False
        for name, value in self.headers:
            if name == b"host":
                hosts.append(value)
            elif name == b"transfer-encoding":
                codings.append(value.strip().lower())
            elif name == b"expect":
                others = others or value.strip().lower() != b"100-continue"
        if len(hosts) != 1 and (hosts or version == "1.1"):
            return 400, f"{len(hosts)} Host headers; a request has one"
        if hosts and not _HOST.fullmatch(hosts[0].strip()):
            return 400, "the Host header is no host"
        if codings and version == "1.0":
            return 400, "Transfer-Encoding in HTTP/1.0, which has none; send Content-Length"
        if codings not in ([], [b"chunked"]):
            return 501, "a Transfer-Encoding other than chunked; send the body as it is"
        if others:
            return 417, "an Expect other than 100-continue"
        if version == "1.0":
            self.expect_100_continue = False  # it knows no such answer
        if method == b"CONNECT":
            return 501, "this server is no proxy"
        if b"#" in self.url:
            return 400, "the target of a request has no #"
        if self.url[:1] == b"/":
            return None
        if self.url == b"*" and method == b"OPTIONS":
            self.url = b"/"  # of the server as a whole
            return None
        absolute = _ABSOLUTE.match(self.url)
        if absolute is None or not absolute[1] or not _HOST.fullmatch(absolute[1]):
            return 400, "the target of a request is a path, or begins with http://HOST"
        # Who is asked says the target then, whatever the header says.
        rest = self.url[absolute.end() :]
        self.url = rest if rest[:1] == b"/" else b"/" + rest
        self.headers[:] = [(b"host", absolute[1]), *(pair for pair in self.headers if pair[0] != b"host")]
        return None

    def on_headers_complete(self) -> None:
        if self._skipping:
            return
        method = self.parser.get_method()
        if method != b"CONNECT" and self.parser.should_upgrade():
            return  # it begins again, without the upgrade
        # A pipelined request waits for its turn: only what is next in line can be answered here.
        refused: tuple[int, str, float | None] | None = None
        wrong = self._refused_head(method)
        if wrong is not None:
            if not self._idle:
                raise httptools.HttpParserError(wrong[1])
            refused = (*wrong, None)
        elif self._idle:
            crowded = self._max_connections is not None and len(self.connections) > self._max_connections
            refused = self.gate.refusal(method, self.url, self.headers, crowded=crowded)
        self._at_body = True
        if refused is None:
            super().on_headers_complete()
            return
        status, message, retry_after_s = refused
        close = wrong is not None or self.expect_100_continue or status == 413
        self._refuse(status, message, retry_after_s, close=close)
        if self.expect_100_continue:
            # Who waits for "100 continue" will not send the body that the parser expects.
            self._hang_up()
        elif self._close_after:
            # Closing at once would reset the connection before the client has read why.
            self._start_clock(_LINGER_S)

    def _refuse(self, status: int, message: str, retry_after_s: float | None, *, close: bool) -> None:
        self._skipping, self._close_after, self._skipped = True, close, 0
        if self.flow.write_paused:
            # It asks and does not read the answers.
            self.transport.abort()
            return
        answer = plain_response(status, message, retry_after_s, close=close)
        if self.parser.get_method() == b"HEAD":
            answer = answer[: answer.index(b"\r\n\r\n") + 4]
        self.transport.write(answer)

    def on_body(self, body: bytes) -> None:
        if not self._skipping:
            super().on_body(body)
            return
        self._skipped += len(body)
        if self._skipped > 4 * self.gate.max_body:
            self.transport.abort()

    def on_message_complete(self) -> None:
        if not self._skipping and self.parser.should_upgrade():
            return  # it begins again, without the upgrade
        self._begun = False
        if not self.flow.write_paused and not self.transport.is_closing():
            self._stop_clock()
        if not self._skipping:
            super().on_message_complete()
            return
        self._skipping = False
        if self._close_after or not self.parser.should_keep_alive():
            self._hang_up()
