"""Decisions from a form: each is the use case that the command line calls, by the person who signed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse

from components.contracts.errors import ConfigError, DecisionRefused
from flows.console.auditing import audited, note
from flows.console.candidate import address_of, seen
from flows.console.visitors import AnyVisitor, Posted, Visitor, application_of, expect_role
from flows.loop import decisions
from flows.terminal import silent
from flows.workspace.desk import Desk
from flows.workspace.versions import VersionShown, show

router = APIRouter(include_in_schema=False)


def _told(fields: Mapping[str, str], name: str) -> str:
    value = fields.get(name, "").strip()
    if not value:
        raise ConfigError(f"the form lacks {name}; go back and fill it in")
    return value


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


def _decided(request: Request, visitor: Visitor, model: str, version: str, doing: str, act: Callable[[Desk], Any]) -> Any:
    """Let an approver act on a version; what the ledger refuses is kept in the audit, too."""
    with audited(request, visitor, f"{doing} {model} version {version}"):
        expect_role(visitor, "approver", doing)
        act(application_of(request).deciding_desk(model))
    return RedirectResponse(address_of(model, version), status_code=303)


@router.post("/models/{model}/versions/{version}/approve")
def approve(request: Request, visitor: AnyVisitor, fields: Posted, model: str, version: str) -> Any:
    def act(desk: Desk) -> None:
        _expect_seen(desk, version, fields)
        by = visitor.principal(fields.get("name", ""))
        reason, days = _told(fields, "reason"), _days(fields)
        decisions.approve(desk, version, by, reason, days=days, also=visitor.also, say=silent)

    return _decided(request, visitor, model, version, "approving", act)


@router.post("/models/{model}/versions/{version}/except")
def except_gates(request: Request, visitor: AnyVisitor, fields: Posted, model: str, version: str) -> Any:
    def act(desk: Desk) -> None:
        _expect_seen(desk, version, fields)
        by = visitor.principal(fields.get("name", ""))
        gates = [gate for gate in fields.get("gates", "").splitlines() if gate]
        if not gates:
            raise ConfigError("no gate was chosen; choose at least one that you answer for")
        reason, days = _told(fields, "reason"), _days(fields)
        decisions.except_gates(desk, version, by, gates, reason, days=days, also=visitor.also, say=silent)

    return _decided(request, visitor, model, version, "signing an exception", act)


@router.post("/models/{model}/versions/{version}/reject")
def reject(request: Request, visitor: AnyVisitor, fields: Posted, model: str, version: str) -> Any:
    def act(desk: Desk) -> None:
        # Where it was approved, the page said so and asked for a withdrawal; an approval since is none that was seen.
        withdraw = _expect_seen(desk, version, fields).state.status == "approved"
        by = visitor.principal(fields.get("name", ""))
        decisions.reject(desk, version, by, _told(fields, "reason"), withdraw=withdraw, say=silent)

    return _decided(request, visitor, model, version, "rejecting", act)


@router.post("/models/{model}/versions/{version}/promote")
def promote(request: Request, visitor: AnyVisitor, fields: Posted, model: str, version: str) -> Any:
    def act(desk: Desk) -> None:
        _expect_seen(desk, version, fields)
        by = visitor.principal(fields.get("name", ""))
        note(request, visitor, "promotion started", f"{model} version {version} by {by.name}")
        application_of(request).promotions.start(model, version, by.name)

    return _decided(request, visitor, model, version, "promoting", act)


@router.post("/models/{model}/versions/{version}/rollback")
def rollback(request: Request, visitor: AnyVisitor, fields: Posted, model: str, version: str) -> Any:
    def act(desk: Desk) -> None:
        _expect_seen(desk, version, fields)
        by = visitor.principal(fields.get("name", ""))
        decisions.rollback(desk, version, by, _told(fields, "reason"), say=silent, moving=silent)

    return _decided(request, visitor, model, version, "going back", act)


@router.post("/models/{model}/versions/{version}/comment")
def comment(request: Request, visitor: AnyVisitor, fields: Posted, model: str, version: str) -> Any:
    expect_role(visitor, "trainer", "commenting")
    application = application_of(request)
    state = show(application.desk(model), version).state  # raises UnknownName
    by = visitor.principal(fields.get("name", ""))
    application.comments.add(model, state.version, by, _told(fields, "text"))
    return RedirectResponse(f"{address_of(model, version)}#comments", status_code=303)
