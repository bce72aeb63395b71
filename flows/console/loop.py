"""The page of a model in production, and a person's word to the governor."""

from __future__ import annotations

from typing import Any, get_args

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from components.contracts.errors import ConfigError
from flows.console.rendering import page
from flows.console.visitors import AnyVisitor, Posted, Viewer, application_of, expect_role, told
from flows.loop.governing import Switch, switch
from flows.loop.labelling import pictures_of
from flows.loop.overview import overview
from flows.training.progress import running

router = APIRouter(include_in_schema=False)
_PICTURES = 12


@router.get("/models/{model}/loop")
def loop_page(request: Request, visitor: Viewer, model: str) -> Response:
    """Champion, traffic, windows, alarms with what is new in them, the governor, and labels that are asked for."""
    application = application_of(request)
    loop = application.loop(model)
    found = overview(loop)
    runs = [each for each in running(application.workspace) if each.model == model]
    drifted = [window for window in found.windows if window.status == "drift"][-3:]
    return page(
        request,
        visitor,
        "loop.html",
        model=model,
        found=found,
        runs=runs,
        pictures={window.name: pictures_of(loop, window.name, _PICTURES) for window in drifted},
    )


@router.post("/models/{model}/governor")
def govern(request: Request, visitor: AnyVisitor, fields: Posted, model: str) -> Any:
    """Stop what trains by itself, let it go on, or forget that it failed."""
    expect_role(visitor, "trainer", "switching the governor")
    application = application_of(request)
    loop = application.loop(model)
    given = fields.get("switch", "")
    word = next((kind for kind in get_args(Switch) if kind == given), None)
    if word is None:
        raise ConfigError(f"unknown switch {given[:20]!r}; valid: {', '.join(get_args(Switch))}")
    switch(loop, word, by=visitor.principal(fields.get("name", "")).name, reason=told(fields, "reason"))
    return RedirectResponse(f"/models/{model}/loop", status_code=303)
