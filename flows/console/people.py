"""Signing in and out."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse

from components.contracts.errors import SignInRefused, TooManyTries
from flows.console.rendering import page
from flows.console.visitors import AnyVisitor, Posted, address_of, application_of, cookie, local_path, set_cookie

router = APIRouter(include_in_schema=False)


@router.get("/sign-in")
def sign_in_page(request: Request, visitor: AnyVisitor, to: str = "/") -> Any:
    if visitor.signed_in is not None or visitor.is_local:
        return RedirectResponse(local_path(to), status_code=303)
    return page(request, visitor, "sign-in.html", to=local_path(to), problem="")


@router.post("/sign-in")
def sign_in(request: Request, visitor: AnyVisitor, fields: Posted) -> Any:
    application = application_of(request)
    to = local_path(fields.get("to", "/"))
    try:
        session = application.accounts.sign_in(
            fields.get("login", ""), fields.get("password", ""), address=address_of(request)
        )
    except (SignInRefused, TooManyTries) as error:
        status = 429 if isinstance(error, TooManyTries) else 401
        return page(request, visitor, "sign-in.html", status=status, to=to, problem=str(error))
    response = RedirectResponse(to, status_code=303)
    set_cookie(response, application, cookie(application, "session"), session.token)
    return response


@router.post("/sign-out")
def sign_out(request: Request, visitor: AnyVisitor, _: Posted) -> Any:
    if visitor.signed_in is not None:
        application_of(request).accounts.sign_out(visitor.token, address=address_of(request))
    response = RedirectResponse("/sign-in", status_code=303)
    response.delete_cookie(
        cookie(application_of(request), "session"), path="/", secure=application_of(request).config.is_secure
    )
    return response
