"""Where a Ray cluster that exists already is reached, and by what certificates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RayAddress:
    """The address of a cluster's head."""

    head: str = ""
    """HOST:PORT; empty where none is named."""
    tls: tuple[str, str, str] | None = None
    """Files of the certificate, its key and the authority, where Ray is told to use TLS."""

    def __str__(self) -> str:
        return self.head


NO_CLUSTER = RayAddress()
