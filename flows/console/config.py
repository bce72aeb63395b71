"""Where the console listens, and by which addresses browsers may know it."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from components.addresses import is_loopback
from components.contracts.errors import ConfigError

PORT = 8400
"""The first port that is tried where none is asked for."""


@dataclass(frozen=True)
class ConsoleConfig:
    """How it is reached."""

    host: str = "127.0.0.1"
    port: int = PORT
    url: str = ""
    """What browsers call it, such as https://models.example.org, behind a proxy that ends TLS; empty for host and port."""

    @property
    def is_loopback(self) -> bool:
        """Whether only programs and people of this machine can reach it."""
        return is_loopback(self.host) and not self.url

    @property
    def origins(self) -> frozenset[str]:
        """The origins of its own pages: what a browser says in the header Origin of what it sends from them."""
        if self.url:
            return frozenset({_as_browsers_say(self.url)})
        names = ["127.0.0.1", "localhost", "[::1]"] if is_loopback(self.host) else [self.host]
        return frozenset(_as_browsers_say(f"http://{name}:{self.port}") for name in names)

    @property
    def hosts(self) -> frozenset[str]:
        """What the header Host may say."""
        return frozenset(origin.partition("://")[2] for origin in self.origins)

    @property
    def is_secure(self) -> bool:
        """Whether browsers reach it by TLS, so that cookies may be kept to that."""
        return self.url.lower().startswith("https://")

    @property
    def address(self) -> str:
        """What a person opens."""
        return self.url or f"http://{self.host if ':' not in self.host else f'[{self.host}]'}:{self.port}"


def console_config(host: str, port: int, url: str, *, has_users: bool) -> ConsoleConfig:
    """What was asked for; raises ConfigError for what would let strangers decide.

    Without users everybody who reaches the console may decide under any name, so it is kept to this machine then. Passwords
    and sessions cross a network by TLS alone.
    """
    if url:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or parts.query:
            raise ConfigError(f"--url {url!r}: expected the address that browsers use, such as https://models.example.org")
        if parts.scheme == "http" and not is_loopback(parts.hostname):
            raise ConfigError(f"--url {url!r}: passwords would cross the network as they are; expected https://")
        url = f"{parts.scheme}://{parts.netloc}"
    config = ConsoleConfig(host, port, url)
    if not has_users and not config.is_loopback:
        raise ConfigError(
            "there are no users, so whoever reaches the console could decide under any name: it is kept to this machine "
            "(--host 127.0.0.1, no --url). Make users first: visionloop user add LOGIN --role approver"
        )
    if not is_loopback(host) and not config.is_secure:
        raise ConfigError(
            f"--host {host}: passwords would cross the network as they are. Put a proxy that ends TLS in front of it, and "
            f"name its address: --url https://..."
        )
    return config


def _as_browsers_say(url: str) -> str:
    """An origin in the spelling of browsers: in lower case, and without the port where it is the scheme's own."""
    origin = url.lower()
    return origin.removesuffix(":443" if origin.startswith("https:") else ":80")
