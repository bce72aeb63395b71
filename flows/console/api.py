"""The JSON API: what the pages show and do, for programs. The same use cases, the same rules, the same rows.

With users a program sends a token of one of them (`visionloop user token`), and acts as that person. Without users it has to
be on this machine, and says in `by` who decides, as `--as` does on the command line. Cookies mean nothing here, so that no
other site's page can speak for the person before the browser.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import HTMLResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field

from components.contracts.errors import DecisionRefused
from flows.console.auditing import audited, note
from flows.console.visitors import (
    NotSignedIn,
    Refused,
    Visitor,
    application_of,
    expect_own_origin,
    expect_role,
    expect_this_machine,
)
from flows.loop import decisions
from flows.loop.governing import switch
from flows.loop.labelling import choices, give_labels, to_label
from flows.terminal import silent
from flows.workspace.as_json import row_json, state_json, version_json
from flows.workspace.desk import Desk
from flows.workspace.versions import candidates, history, served_spans, show

router = APIRouter(
    prefix="/api/v1",
    tags=["console"],
    # For the documentation: whether a token is one is found out by `caller`.
    dependencies=[Depends(HTTPBearer(auto_error=False, description="A token of `visionloop user token`."))],
)


def caller(request: Request) -> Visitor:
    """Who asks, by a token; where there are no users, anybody on this machine."""
    application = application_of(request)
    if request.headers.get("origin") is not None:
        expect_own_origin(request)
    if not application.accounts.any_users():
        expect_this_machine(request)
        return Visitor(None, "", "", has_users=False)
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    signed_in = application.accounts.of_token(token.strip()) if kind.lower() == "bearer" else None
    if signed_in is None:
        raise NotSignedIn
    return Visitor(signed_in, token, signed_in.csrf, has_users=True)


Caller = Annotated[Visitor, Depends(caller)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Decision(_Body):
    """A decision, and who makes it where there are no users."""

    reason: str = Field(min_length=1, max_length=2000, description="Why; others will read it.")
    by: str = Field(default="", max_length=128, description="Who decides; only where there are no users.")


class Approval(Decision):
    days: float = Field(default=7.0, gt=0, le=365, description="For how many days it is valid.")


class Exceptions(Approval):
    gates: list[str] = Field(min_length=1, description="Gates that did not decide.")


class Rejecting(Decision):
    withdraw: bool = Field(default=False, description="Also when it is approved and not yet promoted.")


class Comment(_Body):
    text: str = Field(min_length=1, max_length=4000)
    by: str = Field(default="", max_length=128, description="Who comments; only where there are no users.")


class Label(_Body):
    image_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    label: str = Field(min_length=1, max_length=512)


class Labels(_Body):
    labels: list[Label] = Field(min_length=1, max_length=10_000)
    by: str = Field(default="", max_length=128, description="Who labels; only where there are no users.")
    new_classes: bool = Field(default=False, description="Also labels that the champion does not know.")


class Switch(Decision):
    switch: Literal["stop", "start", "reset"]


def _named(visitor: Visitor, by: str) -> Any:
    if visitor.signed_in is not None and by and by.casefold() not in {n.casefold() for n in (visitor.name, *visitor.also)}:
        raise Refused(403, f"the token is {visitor.name}'s, who cannot decide as {by}; leave `by` out")
    return visitor.principal(by)


@contextlib.contextmanager
def _deciding(request: Request, visitor: Visitor, doing: str, model: str, version: str) -> Iterator[Desk]:
    with audited(request, visitor, f"{doing} {model} version {version}"):
        expect_role(visitor, "approver", doing)
        yield application_of(request).deciding_desk(model)


@router.get("/models", summary="The models of the ledger")
def models(request: Request, visitor: Caller) -> dict[str, list[str]]:
    expect_role(visitor, "viewer", "looking")
    return {"models": application_of(request).models()}


@router.get("/models/{model}/candidates", summary="Versions that wait, and the champion")
def waiting(
    request: Request, visitor: Caller, model: str, every: Annotated[bool, Query(alias="all")] = False
) -> dict[str, Any]:
    expect_role(visitor, "viewer", "looking")
    found = candidates(application_of(request).desk(model), every=every)
    return {"model": model, "candidates": [state_json(state) for state in found]}


@router.get("/models/{model}/versions/{version}", summary="One version, with all that a person decides on")
def version(request: Request, visitor: Caller, model: str, version: str) -> dict[str, Any]:
    expect_role(visitor, "viewer", "looking")
    application = application_of(request)
    said = [each.to_json() for each in application.comments.of(model, version)]
    return version_json(model, show(application.desk(model), version)) | {"comments": said}


@router.post(
    "/models/{model}/versions/{version}/approve", summary="Approve a candidate; nothing moves before it is promoted"
)
def approve(request: Request, visitor: Caller, model: str, version: str, body: Approval) -> dict[str, Any]:
    with _deciding(request, visitor, "approving", model, version) as desk:
        by = _named(visitor, body.by)
        done = decisions.approve(desk, version, by, body.reason, days=body.days, also=visitor.also, say=silent)
        return row_json(done.entry) | {"same_account": done.same_account}


@router.post("/models/{model}/versions/{version}/except", summary="Answer for gates that did not decide")
def except_gates(request: Request, visitor: Caller, model: str, version: str, body: Exceptions) -> dict[str, Any]:
    with _deciding(request, visitor, "signing an exception", model, version) as desk:
        by = _named(visitor, body.by)
        done = decisions.except_gates(
            desk, version, by, body.gates, body.reason, days=body.days, also=visitor.also, say=silent
        )
        return row_json(done.entry) | {"missing": list(done.missing), "same_account": done.same_account}


@router.post("/models/{model}/versions/{version}/reject", summary="Reject a candidate; it can then never be promoted")
def reject(request: Request, visitor: Caller, model: str, version: str, body: Rejecting) -> dict[str, Any]:
    with _deciding(request, visitor, "rejecting", model, version) as desk:
        entry = decisions.reject(desk, version, _named(visitor, body.by), body.reason, withdraw=body.withdraw, say=silent)
        return row_json(entry)


@router.post(
    "/models/{model}/versions/{version}/promote",
    status_code=202,
    summary="Begin to promote an approved version; ask for the version to see how it ended",
)
def promote(request: Request, visitor: Caller, model: str, version: str, by: str = "") -> dict[str, Any]:
    with _deciding(request, visitor, "promoting", model, version) as desk:
        state = show(desk, version).state
        if state.status not in ("approved", "champion"):
            raise DecisionRefused(f"version {version} is {state.status}, and cannot be promoted")
        name = _named(visitor, by).name
        note(request, visitor, "promotion started", f"{model} version {version} by {name}")
        begun = application_of(request).promotions.start(model, version, name)
        return {
            "model": model,
            "version": version,
            "since": begun.since.isoformat(),
            "ended": begun.ended,
            "error": begun.error,
        }


@router.post("/models/{model}/versions/{version}/rollback", summary="Make an earlier champion the champion again, at once")
def rollback(request: Request, visitor: Caller, model: str, version: str, body: Decision) -> dict[str, Any]:
    with _deciding(request, visitor, "going back", model, version) as desk:
        by = _named(visitor, body.by)
        return row_json(decisions.rollback(desk, version, by, body.reason, say=silent, moving=silent))


@router.post("/models/{model}/versions/{version}/comments", status_code=201, summary="Comment on a version")
def comment(request: Request, visitor: Caller, model: str, version: str, body: Comment) -> dict[str, Any]:
    expect_role(visitor, "trainer", "commenting")
    application = application_of(request)
    show(application.desk(model), version)  # raises UnknownName
    made: dict[str, Any] = application.comments.add(model, version, _named(visitor, body.by), body.text).to_json()
    return made


@router.get("/models/{model}/history", summary="The ledger's rows of a model, the first first")
def rows(request: Request, visitor: Caller, model: str, after: Annotated[int, Query(ge=0)] = 0) -> dict[str, Any]:
    expect_role(visitor, "viewer", "looking")
    found = [row for row in history(application_of(request).desk(model)) if row.entry.seq > after]
    return {"model": model, "entries": [row_json(row.entry, by_gates=row.by_gates) for row in found[:1000]]}


@router.get("/models/{model}/served", summary="What was champion from when to when")
def served(request: Request, visitor: Caller, model: str) -> dict[str, Any]:
    expect_role(visitor, "viewer", "looking")
    return {"model": model, "served": [vars(span) for span in served_spans(application_of(request).desk(model))]}


@router.get("/models/{model}/labels", summary="Pictures of which a label would teach most, and the classes to choose from")
def labels(request: Request, visitor: Caller, model: str) -> dict[str, Any]:
    expect_role(visitor, "viewer", "looking")
    application = application_of(request)
    loop = application.loop(model)
    return {"model": model, "classes": list(choices(loop)), "pictures": [vars(each) for each in to_label(loop)]}


@router.post("/models/{model}/labels", status_code=201, summary="Give labels, through the same import as a file")
def label(request: Request, visitor: Caller, model: str, body: Labels) -> dict[str, Any]:
    expect_role(visitor, "trainer", "labelling")
    application = application_of(request)
    loop = application.loop(model)
    by = _named(visitor, body.by).name
    found = give_labels(loop, [(each.image_sha256, each.label) for each in body.labels], by=by, new_classes=body.new_classes)
    return {"model": model, **vars(found.imported), "labelled_images": found.labelled_images}


@router.post("/models/{model}/governor", summary="Switch what trains by itself off or on")
def govern(request: Request, visitor: Caller, model: str, body: Switch) -> dict[str, Any]:
    expect_role(visitor, "trainer", "switching the governor")
    application = application_of(request)
    loop = application.loop(model)
    done = switch(loop, body.switch, by=_named(visitor, body.by).name, reason=body.reason)
    return {"model": done.model, "switch": done.kind, "by": done.by}


docs = APIRouter(include_in_schema=False)


@docs.get("/api")
def documentation() -> Response:
    """The API's documentation, drawn by Swagger UI from our own files."""
    return HTMLResponse(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>API · visionloop</title>'
        '<link rel="stylesheet" href="/swagger/swagger-ui.css"></head><body><div id="swagger-ui"></div>'
        '<script src="/swagger/swagger-ui-bundle.js"></script><script src="/static/api.js"></script></body></html>',
        headers={"content-security-policy": _DOCS_POLICY},
    )


_DOCS_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
"""Swagger UI sets styles of its own; it runs no script but its files."""
