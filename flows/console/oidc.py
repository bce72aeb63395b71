"""Signing in by an OpenID Connect provider: authorization code with PKCE, by Authlib, and the identity that it proves.

Whom an identity belongs to is said by an admin (`visionloop user add LOGIN --oidc "ISSUER SUBJECT"`): an address or a name
that a provider passes on is never taken for a person, as its users may choose them.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.middleware.sessions import SessionMiddleware

from components.contracts.errors import SignInRefused
from flows.console.application import Application
from flows.console.rendering import page
from flows.console.visitors import AnyVisitor, Refused, address_of, application_of, cookie, local_path, set_cookie
from flows.workspace.settings import OpenIDProvider

router = APIRouter(include_in_schema=False)
_COOKIE = "visionloop_oidc"
_MINUTES = 10
"""That signing in at a provider may take."""
_NAME = "provider"


def add_provider(app: FastAPI, provider: OpenIDProvider, application: Application) -> None:
    """Let people sign in by a provider."""
    from authlib.integrations.starlette_client import OAuth

    oauth = OAuth()
    oauth.register(
        _NAME,
        server_metadata_url=f"{provider.issuer.rstrip('/')}/.well-known/openid-configuration",
        client_id=provider.client_id,
        client_secret=provider.client_secret,
        client_kwargs={"scope": "openid profile email", "code_challenge_method": "S256", "timeout": 10},
    )
    app.state.oidc = oauth.create_client(_NAME)
    app.include_router(router)
    # What is signed here is the way there and back, for minutes; a session of ours is a row of the database.
    app.add_middleware(
        SessionMiddleware,
        secret_key=application.secret.hex(),
        session_cookie=_COOKIE,
        max_age=60 * _MINUTES,
        path="/sign-in",
        same_site="lax",
        https_only=application.config.is_secure,
    )


def _callback(application: Application) -> str:
    return f"{application.config.address}/sign-in/oidc/callback"


@router.get("/sign-in/oidc")
async def leave(request: Request, to: str = "/") -> Response:
    """Send the browser to the provider."""
    application = application_of(request)
    request.session.clear()
    request.session["to"] = local_path(to)
    try:
        found: Response = await request.app.state.oidc.authorize_redirect(request, _callback(application))
    except Exception as error:
        # httpx, Authlib and joserfc raise many things for a provider that is away or misconfigured.
        raise _away(error) from error
    return found


@router.get("/sign-in/oidc/callback")
async def come_back(request: Request, visitor: AnyVisitor) -> Any:
    """Take the provider's word for who it is, once it is verified, and begin a session."""
    application = application_of(request)
    to = local_path(str(request.session.get("to", "/")))
    if request.query_params.get("error"):
        # Its words are whatever somebody put into the address.
        return page(request, visitor, "sign-in.html", status=401, to=to, problem="the provider let nobody in; begin again")
    try:
        token = await request.app.state.oidc.authorize_access_token(request)
    except Exception as error:
        raise _away(error) from error
    finally:
        request.session.clear()
    claims = token.get("userinfo")
    provider = application.settings.oidc
    if not claims or provider is None or claims.get("iss") != provider.issuer or not claims.get("sub"):
        raise Refused(401, "the provider did not prove who you are: its answer lacks a verified id_token of its own")
    hint = str(claims.get("email") or claims.get("preferred_username") or "")
    try:
        session = await run_in_threadpool(
            application.accounts.sign_in_subject,
            provider.issuer,
            str(claims["sub"]),
            login_hint=f"oidc: {hint}",
            address=address_of(request),
        )
    except SignInRefused as error:
        return page(request, visitor, "sign-in.html", status=401, to=to, problem=str(error))
    response = RedirectResponse(to, status_code=303)
    set_cookie(response, application, cookie(application, "session"), session.token)
    return response


def _away(error: Exception) -> Refused:
    told = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}" if str(error) else type(error).__name__
    return Refused(503, f"signing in by the provider did not work ({told}). Begin again, or sign in with a password")
