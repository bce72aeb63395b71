"""Templates of the console, which escape whatever they are given, and how they say times, shares and figures."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from fastapi import Request
from starlette.responses import HTMLResponse

from components.contracts.wording import counted, shown_utc
from flows.console.visitors import Visitor, application_of, cookie, set_cookie
from flows.terminal import figure

_FOLDER = Path(__file__).resolve().parent
STATIC = _FOLDER / "static"
_WORDS = {"inconclusive": "undecided"}


@cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters |= {"utc": shown_utc, "figure": figure, "word": lambda status: _WORDS.get(status, status), "day": _day}
    made.globals |= {"counted": counted, "asset": _asset}
    return made


@cache
def _asset(name: str) -> str:
    """The address of a file of ours; another content has another address, so that browsers may keep it."""
    return f"/static/{name}?{hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]}"


def _day(text: str) -> str:
    return shown_utc(text)[:16] + " UTC"


def ago(moment: datetime.datetime | str, now: datetime.datetime) -> str:
    """How long ago something was, `3 hours`; by the server's clock, whatever the browser's says."""
    then = datetime.datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    seconds = max(0.0, (now - then).total_seconds())
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * length or (seconds >= length and unit != "day"):
            return counted(int(seconds // length), unit)
    return "less than a minute"


def page(
    request: Request, visitor: Visitor, template: str, *, status: int = 200, refresh_s: int | None = None, **values: Any
) -> HTMLResponse:
    """A page as the visitor may see it; `refresh_s` lets the browser ask again by itself."""
    application = application_of(request)
    shown: Mapping[str, Any] = {
        "visitor": visitor,
        "path": request.url.path,
        "models": [],
        "model": None,
        "refresh_s": refresh_s,
        "has_provider": application.settings.oidc is not None,
        **values,
    }
    response = HTMLResponse(_environment().get_template(template).render(shown), status_code=status)
    name = cookie(application, "visitor")
    if visitor.signed_in is None and visitor.token and request.cookies.get(name) != visitor.token:
        set_cookie(response, application, name, visitor.token)
    return response
