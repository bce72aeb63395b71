"""The web application: its pages, its answers to errors, and what stands before all of them."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from components.contracts.errors import (
    ConfigError,
    DataError,
    DecisionRefused,
    RegistryUnavailable,
    StoreError,
    TamperedArtefact,
    UnknownName,
    VisionloopError,
    redacted,
)
from flows.console import api, decisions, labels, loop, pages, people, pictures
from flows.console.application import Application
from flows.console.guard import Guard
from flows.console.oidc import add_provider
from flows.console.rendering import STATIC, page
from flows.console.visitors import NotSignedIn, Refused, Visitor, local_path, path_of, sign_in_address

_log = logging.getLogger(__name__)
_ROUTERS = (
    pages.router,
    decisions.router,
    pictures.router,
    pictures.open_router,
    people.router,
    loop.router,
    labels.router,
    api.router,
)
_STATUSES: tuple[tuple[type[VisionloopError], int, str], ...] = (
    (UnknownName, 404, "There is nothing of that name"),
    (DecisionRefused, 409, "Not decided"),
    (RegistryUnavailable, 503, "Something that this needs does not answer"),
    (TamperedArtefact, 500, "Something was changed that must not change"),
    (StoreError, 503, "Something that this needs is away"),
    (ConfigError, 422, "That cannot be done as it was asked"),
    (DataError, 422, "That cannot be done as it was asked"),
    (VisionloopError, 500, "That did not work"),
)


def make_app(application: Application) -> FastAPI:
    """The console of one workspace."""
    app = FastAPI(
        title="visionloop console",
        summary="Candidates with their evidence, decisions, labels, and what serves.",
        version="1",
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
    )
    application.prepare()
    app.state.application = application
    for router in _ROUTERS:
        app.include_router(router)
    app.include_router(api.docs)
    app.mount("/static", _Static(directory=STATIC), name="static")
    app.mount("/swagger", StaticFiles(directory=_swagger()), name="swagger")
    app.add_exception_handler(NotSignedIn, _not_signed_in)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(VisionloopError, _failed)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    if application.settings.oidc is not None:
        add_provider(app, application.settings.oidc, application)
    app.add_middleware(_Answering)
    app.add_middleware(Guard, config=application.config)
    # MLflow takes seconds to import; a person should not wait for that in the middle of a decision.
    threading.Thread(target=_warm, args=(application,), daemon=True).start()
    return app


def _warm(application: Application) -> None:
    """Import what the first decision needs, and fetch the evidence of what waits."""
    from contextlib import suppress

    from flows.training.registered import registered_evidence
    from flows.workspace.versions import candidates

    with suppress(VisionloopError, OSError):
        for model in application.models():
            desk = application.desk(model)
            desk.promotion.registry.descriptions(model)
            for state in candidates(desk)[-20:]:
                with suppress(VisionloopError, OSError):
                    registered_evidence(desk, state)


class _Static(StaticFiles):
    def file_response(self, *arguments: Any, **named: Any) -> Response:
        response = super().file_response(*arguments, **named)
        response.headers["cache-control"] = "public, max-age=31536000, immutable"  # an address names its content
        return response


def _swagger() -> Path:
    import swagger_ui_bundle

    return max((Path(swagger_ui_bundle.__file__).parent / "vendor").glob("swagger-ui-*"))


def _wants_json(request: Request) -> bool:
    return request.url.path.startswith("/api/")


def _answer(request: Request, status: int, title: str, message: str, *, retry: bool = False) -> Response:
    """An error as the page of a person or the answer of a program; what it says holds no password."""
    message = redacted(message)
    if _wants_json(request):
        return JSONResponse({"error": title, "message": message}, status_code=status)
    # Who asks may not be known, as the database that knows them is what does not answer.
    nobody = Visitor(None, "", "", has_users=True)
    visitor = getattr(request.state, "visitor", None) or nobody
    back = "" if request.method == "GET" else local_path(path_of(request.headers.get("referer", "")))
    return page(request, visitor, "error.html", status=status, title=title, message=message, retry=retry, back=back)


def _not_signed_in(request: Request, _: Exception) -> Response:
    if _wants_json(request):
        return _answer(request, 401, "Not signed in", "send a token: Authorization: Bearer ... (visionloop user token)")
    return RedirectResponse(sign_in_address(request), status_code=303)


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    titles = {403: "Not allowed", 404: "There is nothing of that name", 410: "Not shown any more"}
    return _answer(request, error.status, titles.get(error.status, "Not done"), error.reason)


def _failed(request: Request, error: Exception) -> Response:
    status, title = next((status, title) for kind, status, title in _STATUSES if isinstance(error, kind))
    return _answer(request, status, title, str(error), retry=status == 503 and request.method == "GET")


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _answer(
        request, error.status_code, "There is no such page" if error.status_code == 404 else "Not done", error.detail
    )


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])
    return _answer(request, 422, "That cannot be done as it was asked", f"{place}: {first['msg']}")


class _Answering:
    """A fault of ours is an answer, too, which passes the guard as every other; the log has where it was."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except ClientDisconnect:
            if not begun:  # by the guard, where a body is too long; to somebody who has left, this says nothing
                await PlainTextResponse("the request was too long, or was cut off\n", 413)(scope, receive, send)
        except Exception as error:
            if scope["type"] != "http" or begun:
                raise
            _log.exception("a fault of the console at %s", scope["path"])
            told = f"this is a fault of visionloop ({type(error).__name__}); the console's log has where"
            await _answer(Request(scope, receive), 500, "That did not work", told)(scope, receive, send)
