"""What stands before every page: which names of this machine are answered to, how large a request may be, and what a
browser is told to allow.
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.console.config import ConsoleConfig

MAX_BODY = 1 << 20
"""Bytes of a request; a decision is a few hundred, a day of labels some ten thousand."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
FIGURE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
"""Of a drawing: its styles are its own, and nothing in it runs."""
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


class Guard:
    """ASGI middleware around the whole application, its errors included."""

    def __init__(self, app: ASGIApp, config: ConsoleConfig) -> None:
        self._app, self._config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        answer = self._refusal(headers)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._mark(MutableHeaders(scope=message))
            await send(message)

        if answer is not None:
            await answer(scope, receive, guarded)
            return
        await self._app(scope, _limited(receive), guarded)

    def _refusal(self, headers: Headers) -> PlainTextResponse | None:
        # Another name for this machine would be another site to the browser: pages of such a site could read ours.
        if headers.get("host", "").lower() not in self._config.hosts:
            known = ", ".join(sorted(self._config.hosts))
            return PlainTextResponse(f"this console is not known by that name; it answers to {known} (see --url)\n", 421)
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY:
            return PlainTextResponse(f"more than {MAX_BODY >> 20} MiB are not taken here\n", 413)
        return None

    def _mark(self, headers: MutableHeaders) -> None:
        for name, value in _HEADERS.items():
            headers.setdefault(name, value)
        headers.setdefault("content-security-policy", POLICY)
        headers.setdefault("cache-control", "no-store")
        if self._config.is_secure:
            headers.setdefault("strict-transport-security", "max-age=31536000")


def _limited(receive: Receive) -> Receive:
    """The same body, ended where it is longer than a request may be, whatever its header said."""
    taken = 0

    async def limited() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > MAX_BODY:
            return {"type": "http.disconnect"}
        return message

    return limited
