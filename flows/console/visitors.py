"""Who stands before the browser: a user who signed in, or, where there are no users, anybody on this machine by a name of
their own.

What a page of ours sends back carries a secret of the visitor's session (`csrf`) and comes from our own origin; both are
checked before a form is read by anything else, and no route reads a form but through `posted`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import quote, urlsplit

from fastapi import Depends, Request, Response

from components.contracts.errors import ConfigError
from flows.console.application import Application
from flows.loop.decisions import declared

if TYPE_CHECKING:
    from registry.accounts import Role, SignedIn
    from registry.ledger import Principal


_PROXIED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
_FIELDS = 1_000
_VISITOR = re.compile(r"[A-Za-z0-9_-]{43}")


def cookie(application: Application, kind: Literal["session", "visitor"]) -> str:
    """The name of a cookie: of a user who signed in, or of anybody else, so that a form can be told from a forged one.

    Browsers tell hosts apart by cookies and not ports: two consoles of one machine have each their own.
    """
    if application.config.is_secure:
        return f"__Host-visionloop-{kind}"
    return f"visionloop-{kind}-{application.config.port}"


class NotSignedIn(Exception):
    """A page that somebody has to sign in for."""


class Refused(Exception):
    """A request that is not answered, and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Visitor:
    """Who asks."""

    signed_in: SignedIn | None
    token: str
    """The value of their cookie."""
    csrf: str
    has_users: bool

    @property
    def is_local(self) -> bool:
        """Whether there are no users, so that a decision asks for a name and records it as declared."""
        return not self.has_users

    @property
    def name(self) -> str:
        return self.signed_in.user.name if self.signed_in else ""

    @property
    def role(self) -> str:
        return self.signed_in.user.role if self.signed_in else ""

    @property
    def also(self) -> tuple[str, ...]:
        """Other names and logins of the same person."""
        return self.signed_in.user.known_as if self.signed_in else ()

    def may(self, role: Role) -> bool:
        """Whether they may do what a role may."""
        return self.is_local or (self.signed_in is not None and self.signed_in.may(role))

    def principal(self, declared_name: str) -> Principal:
        """Whom a decision is recorded by: who signed in, or the name that was given where there are no users."""
        return self.signed_in.principal if self.signed_in else declared(declared_name)


def application_of(request: Request) -> Application:
    """What the console works with."""
    found: Application = request.app.state.application
    return found


def anybody(request: Request) -> Visitor:
    """Who asks, also where they have not signed in."""
    application = application_of(request)
    has_users = application.accounts.any_users()
    token = request.cookies.get(cookie(application, "session"), "")
    signed_in = application.accounts.session(token) if has_users and token else None
    if signed_in is not None:
        return _known(request, Visitor(signed_in, token, signed_in.csrf, has_users))
    if not has_users:
        expect_this_machine(request)
    visitor = request.cookies.get(cookie(application, "visitor"), "")
    if not _VISITOR.fullmatch(visitor):
        visitor = secrets.token_urlsafe(32)
    csrf = hmac.new(application.secret, visitor.encode(), hashlib.sha256).hexdigest()
    return _known(request, Visitor(None, visitor, csrf, has_users))


def _known(request: Request, visitor: Visitor) -> Visitor:
    """Also to the page of an error."""
    request.state.visitor = visitor
    return visitor


def viewer(found: Annotated[Visitor, Depends(anybody)]) -> Visitor:
    """Somebody who may look."""
    if not found.may("viewer"):
        raise NotSignedIn
    return found


def expect_this_machine(request: Request) -> None:
    """Raise Refused where there are no users and somebody of another machine may be asking: anybody could decide.

    The last user may be removed while a console that others reach goes on.
    """
    if not application_of(request).config.is_loopback:
        raise Refused(
            403, "this console is reached from other machines and has no users: nobody is let in. visionloop user add"
        )
    if any(name in request.headers for name in _PROXIED):
        raise Refused(403, "this came through a proxy, and there are no users: anybody could decide. visionloop user add")


AnyVisitor = Annotated[Visitor, Depends(anybody)]
Viewer = Annotated[Visitor, Depends(viewer)]


async def posted(request: Request) -> Mapping[str, str]:
    """The fields of a form that one of our own pages sent; several of one name are joined by newlines.

    Raises Refused for one that comes from elsewhere, or without the session's secret.
    """
    expect_own_origin(request)
    given: dict[str, list[str]] = {}
    async with request.form(max_files=0, max_fields=_FIELDS) as form:
        for name, value in form.multi_items():
            if isinstance(value, str):
                given.setdefault(name, []).append(value)
    fields = {name: "\n".join(values) for name, values in given.items()}
    # Who asks is found out here and not by a dependency, so that nobody can use a form without this check.
    visitor = await _in_thread(request)
    if not hmac.compare_digest(fields.pop("csrf", "").encode(), visitor.csrf.encode()):
        raise Refused(
            403,
            "this form was not made for this session: it may have ended, or you signed in or out in another tab. "
            "Nothing was done; reload the page and try again",
        )
    return fields


async def _in_thread(request: Request) -> Visitor:
    from starlette.concurrency import run_in_threadpool

    return await run_in_threadpool(anybody, request)


Posted = Annotated[Mapping[str, str], Depends(posted)]


def address_of(request: Request) -> str:
    """Where a request comes from."""
    return request.client.host if request.client else ""


def expect_own_origin(request: Request) -> None:
    """Raise Refused unless a browser says that one of our own pages sends this; every browser says where from."""
    origins = application_of(request).config.origins
    said = request.headers.get("origin") or _origin(request.headers.get("referer", ""))
    if said.lower() not in origins or request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
        raise Refused(403, "this came from a page of another site; nothing was done")


def _origin(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return f"{parts.scheme}://{parts.netloc}" if parts.netloc else ""


def expect_role(visitor: Visitor, role: Role, doing: str) -> None:
    """Raise Refused unless the visitor may do this."""
    if visitor.may(role):
        return
    if visitor.signed_in is None:
        raise NotSignedIn
    raise Refused(403, f"{doing} is for the role {role} and above; {visitor.name} is {visitor.role}")


def told(fields: Mapping[str, str], name: str) -> str:
    """A field of a form that has to be filled in; raises ConfigError."""
    value = fields.get(name, "").strip()
    if not value:
        raise ConfigError(f"the form lacks {name}; go back and fill it in")
    return value


def set_cookie(response: Response, application: Application, name: str, value: str) -> None:
    """A cookie that scripts cannot read, and that other sites' pages do not send along."""
    response.set_cookie(name, value, path="/", secure=application.config.is_secure, httponly=True, samesite="lax")


def sign_in_address(request: Request) -> str:
    """Where to sign in, and come back from to what was asked for."""
    there = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return "/sign-in" if request.method != "GET" or there == "/" else f"/sign-in?to={quote(there, safe='')}"


def path_of(url: str) -> str:
    """The path of an address; `/` of what is none."""
    try:
        return urlsplit(url).path or "/"
    except ValueError:
        return "/"


def local_path(text: str) -> str:
    """A path of this console, `/` for anything else: an address that somebody sends may lead away from it."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return "/"
    is_ours = text.startswith("/") and not text.startswith(("//", "/\\")) and not parts.netloc and not parts.scheme
    return text if is_ours and text.isprintable() and "\\" not in text else "/"
