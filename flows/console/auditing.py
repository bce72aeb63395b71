"""What is refused and begun at the console is put on record, wherever it was asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fastapi import Request

from components.contracts.errors import DecisionRefused
from flows.console.visitors import Refused, Visitor, address_of, application_of


@contextlib.contextmanager
def audited(request: Request, visitor: Visitor, doing: str) -> Iterator[None]:
    """Put a decision that the ledger's rules or the visitor's role refuse on record, and let it be refused."""
    try:
        yield
    except (DecisionRefused, Refused) as error:
        note(request, visitor, "decision refused", f"{doing}: {error}")
        raise


def note(request: Request, visitor: Visitor, what: str, detail: str) -> None:
    """Put something on record that somebody did, or was refused, at the console."""
    who = visitor.signed_in.user.login if visitor.signed_in is not None else visitor.name
    application_of(request).accounts.audit(what, who=who, address=address_of(request), detail=detail[:500])
