"""The pages that only show something."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from flows.console.candidate import address_of, candidate_page, class_rows, told_row
from flows.console.queue import queue
from flows.console.rendering import page
from flows.console.visitors import Refused, Viewer, application_of
from flows.training.progress import running
from flows.training.registered import registered_evidence
from flows.workspace.versions import history, served_spans, show

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)
_ROWS = 100
"""Of a table on one page."""
_CLASSES = 500
_PROMOTING_S = 2
"""Seconds until a page on which a promotion runs asks again."""
_TRAINING_S = 10


@router.get("/")
def first_page(request: Request, visitor: Viewer) -> HTMLResponse:
    """What waits, of all models."""
    application = application_of(request)
    now = application.ledger.now()
    runs: dict[str, list[str]] = {}
    for each in running(application.workspace):
        runs.setdefault(each.model, []).append(each.told())
    queues = [queue(application, model, now) for model in application.models()]
    return page(request, visitor, "queue.html", queues=queues, queue_runs=runs, refresh_s=_TRAINING_S if runs else None)


@router.get("/models/{model}/versions/{version}")
def candidate(request: Request, visitor: Viewer, model: str, version: str) -> HTMLResponse:
    """A version, for the person who decides."""
    shown = candidate_page(application_of(request), visitor, model, version)
    refresh_s = _PROMOTING_S if shown["promoting"] else None
    return page(request, visitor, "candidate.html", refresh_s=refresh_s, told_row=told_row, **shown)


@router.get("/models/{model}/versions/{version}/classes")
def classes(
    request: Request, visitor: Viewer, model: str, version: str, start: Annotated[int, Query(ge=0)] = 0
) -> HTMLResponse:
    """Every class of a version, the weakest first."""
    desk = application_of(request).desk(model)
    rows = class_rows(registered_evidence(desk, show(desk, version).state))
    return page(
        request,
        visitor,
        "classes.html",
        model=model,
        version=version,
        address=address_of(model, version),
        rows=rows[start : start + _CLASSES],
        start=start,
        num_rows=len(rows),
        step=_CLASSES,
    )


@router.get("/models/{model}/history")
def past(request: Request, visitor: Viewer, model: str, before: Annotated[int | None, Query(ge=1)] = None) -> HTMLResponse:
    """What was asked, decided and promoted, the latest first, and what served when."""
    desk = application_of(request).desk(model)
    rows = [row for row in history(desk) if before is None or row.entry.seq < before]
    shown = rows[-_ROWS:][::-1]
    return page(
        request,
        visitor,
        "history.html",
        model=model,
        rows=[told_row(row) for row in shown],
        older=shown[-1].entry.seq if len(rows) > len(shown) else None,
        newest=before is None,
        spans=served_spans(desk)[-_ROWS:][::-1],
    )


@router.get("/audit")
def audit(request: Request, visitor: Viewer) -> HTMLResponse:
    """Who signed in, was refused, and changed users; for admins."""
    if not visitor.may("admin") or visitor.is_local:
        raise Refused(403, "the audit is for the role admin")
    rows = application_of(request).accounts.audit_rows(_ROWS)
    return page(request, visitor, "audit.html", rows=rows)
