"""Decisions from a form: each is the use case that the command line calls, by the person who signed in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse

from components.contracts.errors import ConfigError, DecisionRefused
from flows.console.auditing import audited, note
from flows.console.candidate import address_of, seen
from flows.console.visitors import AnyVisitor, Posted, Visitor, application_of, expect_role, told
from flows.loop import decisions
from flows.terminal import silent
from flows.workspace.desk import Desk
from flows.workspace.versions import VersionShown, show

if TYPE_CHECKING:
    from registry.ledger import Principal

router = APIRouter(include_in_schema=False)


def _days(fields: Mapping[str, str]) -> float:
    try:
        return float(fields.get("days", "7"))
    except ValueError:
        raise ConfigError(f"{fields['days'][:20]!r} is no number of days; expected 1 to 365") from None


def _expect_seen(desk: Desk, version: str, fields: Mapping[str, str]) -> VersionShown:
    """The version as it was looked at.

    Raises DecisionRefused when something was decided, or another champion went live, since the page was drawn.
    """
    shown = show(desk, version)
    if fields.get("seen") != seen(shown):
        raise DecisionRefused(
            f"something about version {version} changed since you looked at it, so nothing was decided. Look again"
        )
    return shown


@dataclass(frozen=True)
class _Looked:
    """A version as an approver looked at it, and what it is decided by."""

    desk: Desk
    shown: VersionShown
    by: Principal


@contextlib.contextmanager
def _deciding(
    request: Request, visitor: Visitor, fields: Mapping[str, str], model: str, version: str, doing: str
) -> Iterator[_Looked]:
    """Let an approver decide on what they looked at; what is refused is kept in the audit, too."""
    with audited(request, visitor, f"{doing} {model} version {version}"):
        expect_role(visitor, "approver", doing)
        desk = application_of(request).deciding_desk(model)
        yield _Looked(desk, _expect_seen(desk, version, fields), visitor.principal(fields.get("name", "")))


def _back(model: str, version: str) -> RedirectResponse:
    return RedirectResponse(address_of(model, version), status_code=303)


@router.post("/models/{model}/versions/{version}/approve")
def approve(request: Request, visitor: AnyVisitor, fields: Posted, model: str, version: str) -> Any:
    with _deciding(request, visitor, fields, model, version, "approving") as on:
        reason, days = told(fields, "reason"), _days(fields)
        decisions.approve(on.desk, version, on.by, reason, days=days, also=visitor.also, say=silent)
    return _back(model, version)


@router.post("/models/{model}/versions/{version}/except")
def except_gates(request: Request, visitor: AnyVisitor, fields: Posted, model: str, version: str) -> Any:
    with _deciding(request, visitor, fields, model, version, "signing an exception") as on:
        gates = [gate for gate in fields.get("gates", "").splitlines() if gate]
        if not gates:
            raise ConfigError("no gate was chosen; choose at least one that you answer for")
        reason, days = told(fields, "reason"), _days(fields)
        decisions.except_gates(on.desk, version, on.by, gates, reason, days=days, also=visitor.also, say=silent)
    return _back(model, version)


@router.post("/models/{model}/versions/{version}/reject")
def reject(request: Request, visitor: AnyVisitor, fields: Posted, model: str, version: str) -> Any:
    with _deciding(request, visitor, fields, model, version, "rejecting") as on:
        # Where it was approved, the page said so and asked for a withdrawal; an approval since is none that was seen.
        withdraw = on.shown.state.status == "approved"
        decisions.reject(on.desk, version, on.by, told(fields, "reason"), withdraw=withdraw, say=silent)
    return _back(model, version)


@router.post("/models/{model}/versions/{version}/promote")
def promote(request: Request, visitor: AnyVisitor, fields: Posted, model: str, version: str) -> Any:
    with _deciding(request, visitor, fields, model, version, "promoting") as on:
        note(request, visitor, "promotion started", f"{model} version {version} by {on.by.name}")
        application_of(request).promotions.start(model, version, on.by.name)
    return _back(model, version)


@router.post("/models/{model}/versions/{version}/rollback")
def rollback(request: Request, visitor: AnyVisitor, fields: Posted, model: str, version: str) -> Any:
    with _deciding(request, visitor, fields, model, version, "going back") as on:
        decisions.rollback(on.desk, version, on.by, told(fields, "reason"), say=silent, moving=silent)
    return _back(model, version)


@router.post("/models/{model}/versions/{version}/comment")
def comment(request: Request, visitor: AnyVisitor, fields: Posted, model: str, version: str) -> Any:
    expect_role(visitor, "trainer", "commenting")
    application = application_of(request)
    state = show(application.desk(model), version).state  # raises UnknownName
    by = visitor.principal(fields.get("name", ""))
    application.comments.add(model, state.version, by, told(fields, "text"))
    return RedirectResponse(f"{address_of(model, version)}#comments", status_code=303)
