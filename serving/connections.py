"""HTTP connections with bounds: time to send a request, size of a body, and a refusal that costs next to nothing.

Under overload most of what a server does is refusing. So a request that would be shed is answered as soon as its headers are
there, without a task, an application or its body; that keeps the processors for the requests that were taken.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol


class Gate(Protocol):
    """Decides at the headers whether a request is refused without reading on."""

    request_timeout_s: float

    def refusal(self, method: bytes, url: bytes, headers: list[tuple[bytes, bytes]]) -> tuple[int, str, float | None] | None:
        """Status, message and retry-after seconds of a refusal, None to go on."""
        ...


def plain_response(status: int, message: str, retry_after_s: float | None = None, *, close: bool = False) -> bytes:
    """A whole HTTP response with an error of ours."""
    body = orjson.dumps({"error": message})
    parts = [STATUS_LINE[status], b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)]
    if retry_after_s is not None:
        parts.append(b"retry-after: %d\r\n" % max(1, round(retry_after_s)))
    if close:
        parts.append(b"connection: close\r\n")
    return b"".join((*parts, b"\r\n", body))


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol with a clock on every request and a gate at its headers."""

    gate: Gate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._skipping = False
        self._clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def _start_clock(self) -> None:
        if self._clock is None:
            self._clock = self.loop.call_later(self.gate.request_timeout_s, self._too_slow)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _too_slow(self) -> None:
        self._clock = None
        if self.transport.is_closing():
            return
        if self._free and not self._skipping:
            self.transport.write(plain_response(408, "the request took too long to arrive", close=True))
        self.transport.close()

    @property
    def _free(self) -> bool:
        """Whether no earlier request of this connection is still being answered."""
        return self.cycle is None or self.cycle.response_complete or not self.cycle.response_started

    def on_message_begin(self) -> None:
        self._start_clock()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        refused = self.gate.refusal(self.parser.get_method(), self.url, self.headers) if idle else None
        if refused is None:
            super().on_headers_complete()
            return
        status, message, retry_after_s = refused
        # Who waits for "100 continue" will not send the body that the parser expects; and a body over the limit is not read.
        close = self.expect_100_continue or status == 413
        self.transport.write(plain_response(status, message, retry_after_s, close=close))
        if close:
            self.transport.close()
        self._skipping = True

    def on_body(self, body: bytes) -> None:
        if not self._skipping:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop_clock()
        if self._skipping:
            self._skipping = False
            if not self.parser.should_keep_alive():
                self.transport.close()
            elif not self.transport.is_closing():
                self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
            return
        super().on_message_complete()
