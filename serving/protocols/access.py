"""Who may ask, and how much of it is held at once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from components.addresses import is_loopback
from serving.inference import Inference, Rejected
from serving.protocols.auth import TokenRole, Tokens, allows, bearer, digest_of

_PROXIED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")


class Access:
    """Who may do what on this server."""

    def __init__(self, tokens: Tokens, *, required: bool) -> None:
        self.tokens, self.required = tokens, required

    def check(self, authorization: str | None, needed: TokenRole) -> str:
        """Who asks, as a digest; raises Rejected unless they may do what needs `needed`."""
        if not self.required:
            return ""
        token = bearer(authorization)
        if token is None:
            raise Rejected(401, "send a token: Authorization: Bearer ...")
        role = self.tokens.role_of(token)
        if role is None:
            raise Rejected(401, "this token is not known here")
        if not allows(role, needed):
            raise Rejected(403, f"this token's role is {role}; this needs {needed}")
        return digest_of(token)

    def check_proxy(self, headers: Mapping[str, str]) -> None:
        """Raise Rejected when a request says that it came through a proxy, and no token is needed: it may be anybody's.

        Not every proxy says so.
        """
        if not self.required and any(name in headers for name in _PROXIED):
            raise Rejected(403, "this came through a proxy; behind one, start the server with --require-token")

    def check_origin(self, headers: Mapping[str, str]) -> None:
        """Raise Rejected when a page of another site speaks for the person before the browser.

        Where no token is needed, only this machine can ask; but every page that is open on it runs there as well.
        """
        if self.required:
            return
        host, origin, site = headers.get("host"), headers.get("origin"), headers.get("sec-fetch-site")
        foreign = site in ("cross-site", "same-site")
        if origin is not None and not is_loopback(_hostname(origin.partition("://")[2])):
            foreign = True
        if foreign or (host is not None and not is_loopback(_hostname(host))):
            raise Rejected(403, "without tokens this server answers this machine's own programs and pages alone")


def _hostname(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


class Budget:
    """Bytes of all bodies that are held at once."""

    def __init__(self, most: int) -> None:
        self._left = most

    def take(self, count: int) -> bool:
        """Whether there was room for so many more."""
        if count > self._left:
            return False
        self._left -= count
        return True

    def release(self, count: int) -> None:
        """Give back what was taken."""
        self._left += count


class Room:
    """Bytes of all messages held at once. One tells its size only when it is there: until then it counts as the largest."""

    def __init__(self, most: int, largest: int) -> None:
        self._left, self.largest = max(most, largest), largest
        self._freed = asyncio.Event()

    async def take(self) -> int:
        """Hold room for the largest message, as soon as there is some; returns how much."""
        while self._left < self.largest:
            self._freed.clear()
            await self._freed.wait()
        self._left -= self.largest
        return self.largest

    def settle(self, taken: int, needed: int) -> int:
        """Hold `needed` in place of `taken`; raises Rejected, and changes nothing, when there is no room for it."""
        if needed - taken > self._left:
            raise Rejected(503, "the server is full; try again later", retry_after_s=1.0)
        self._left += taken - needed
        self._freed.set()
        return needed


def model_ready(inference: Inference, name: str, version: str | None) -> bool:
    """Whether a model answers; raises Rejected without telling those who have no token what there is."""
    try:
        return inference.deployment(name, version).ready and not inference.draining
    except Rejected as error:
        if error.status in (400, 404):
            raise Rejected(404, "no such model or version is served here") from None
        raise
