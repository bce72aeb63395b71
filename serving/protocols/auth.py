"""Who may ask: bearer tokens with a role, of which only the sha256 is kept. On loopback none is needed unless demanded."""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from components.contracts.errors import ConfigError, StoreError, UnknownName
from components.store import write_atomically

TokenRole = Literal["viewer", "predictor", "admin"]
ROLES: tuple[TokenRole, ...] = ("viewer", "predictor", "admin")
"""Each may do what the ones before it may: look; ask for predictions; act on the server."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Tokens:
    """The tokens of one file; read again when it changes, so that a token that was removed stops working."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_at: tuple[int, int] | None = None
        self._roles: dict[str, TokenRole] = {}

    def issue(self, name: str, role: str) -> str:
        """Make a token; it is told once and not kept. An earlier one of this name stops working."""
        if role not in ROLES:
            raise UnknownName("role", role, ROLES)
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is not a name for a token; use letters, digits, '.', '_' and '-', at most 63")
        token = f"vl_{secrets.token_urlsafe(32)}"
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with self._alone():
            entries = [entry for entry in self._entries() if entry["name"] != name]
            entries.append({"name": name, "role": role, "sha256": digest_of(token), "created_at": made})
            self._write(entries)
        return token

    def revoke(self, name: str) -> None:
        """Make a token useless; raises UnknownName."""
        with self._alone():
            entries = self._entries()
            left = [entry for entry in entries if entry["name"] != name]
            if len(left) == len(entries):
                raise UnknownName("token", name, [str(entry["name"]) for entry in entries])
            self._write(left)

    def names(self) -> dict[str, str]:
        """Roles by name."""
        return {str(entry["name"]): str(entry["role"]) for entry in self._entries()}

    def role_of(self, token: str) -> TokenRole | None:
        """The role of a token, None for one that is not known."""
        self._refresh()
        return self._roles.get(digest_of(token))

    def _refresh(self) -> None:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self._roles, self._read_at = {}, None
            return
        now = (status.st_mtime_ns, status.st_ino)
        if now != self._read_at:
            self._roles = {entry["sha256"]: entry["role"] for entry in self._entries() if entry["role"] in ROLES}
            self._read_at = now

    def _entries(self) -> list[dict[str, str]]:
        try:
            found: list[dict[str, str]] = json.loads(self.path.read_bytes())["tokens"]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.path} is not a token file; remove it and issue the tokens again") from error
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One change at a time: of two at once, the later would write back what the earlier took away."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.path.parent / f".{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, entries: list[dict[str, str]]) -> None:
        write_atomically(self.path, json.dumps({"tokens": entries}, indent=1).encode())
        self.path.chmod(0o600)


def digest_of(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def bearer(header: str | None) -> str | None:
    """The token of an Authorization header."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def allows(role: TokenRole | None, needed: TokenRole) -> bool:
    """Whether a role may do what needs another."""
    return role is not None and ROLES.index(role) >= ROLES.index(needed)
