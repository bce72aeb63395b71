"""Events for Prefect, sent without importing it: one message is not worth the seconds that Prefect takes to load.

A process that has loaded Prefect sends by its client, which names the run as related. Any other sends one POST to the
server's API and hears whether the server took it. What only Prefect's own settings may know (a credential of a profile, a
certificate, what a proxy wants to see) is left to Prefect's client.
"""

from __future__ import annotations

import asyncio
import functools
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

from components.contracts.errors import OrchestratorUnavailable
from flows.workspace.settings import Settings

if TYPE_CHECKING:
    from requests import PreparedRequest

_TIMEOUT_S = (1.0, 3.5)
"""To connect and to answer: together less than a notification waits (flows/orchestrator/notifications.py)."""
_LATE = "no answer in time"
_PREFECT_KNOWS_MORE = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.PROXY_AUTHENTICATION_REQUIRED)


def emit(settings: Settings, event: str, model: str, payload: Mapping[str, Any]) -> None:
    """Send an event about a model to the Prefect server of the settings.

    Raises OSError when no server answers, ValueError when it takes nothing, and what Prefect's transports raise, which
    share no base class.
    """
    resource = {"prefect.resource.id": f"visionloop.model.{model}", "prefect.resource.name": model}
    if "prefect" in sys.modules:
        from prefect.events import emit_event

        if emit_event(event, resource=resource, payload=dict(payload)) is None:
            raise ValueError("Prefect's event client took nothing")
        return
    sent: dict[str, Any] = {"id": str(uuid4()), "occurred": datetime.now(UTC).isoformat(), "event": event}
    sent |= {"resource": resource, "payload": dict(payload)}
    if settings.prefect_is_plain and _posted(settings, sent):
        return
    # With the same identifier: had the server taken it after all, it is still one event.
    asyncio.run(_sent_by_prefect(sent))


def expect_server(settings: Settings) -> None:
    """Raise OrchestratorUnavailable unless the Prefect server of the settings, where there is one, answers and lets us in.

    Before a flow begins: Prefect's own client would ask for minutes whoever does not answer. One that takes the call and is
    too busy is asked for one minute.
    """
    if not settings.prefect_api_url:
        return
    try:
        server = _address(settings)
    except ValueError:
        wanted = "expected one such as http://127.0.0.1:4200/api"
        raise OrchestratorUnavailable(f"PREFECT_API_URL is no http address; {wanted}") from None
    if not settings.prefect_is_plain:
        return
    wrong = ""
    for number, wait in enumerate((0.0, 0.5, 1.5, 5.0, 10.0, 20.0)):
        time.sleep(wait)
        wrong = _unanswered(settings)
        if not wrong:
            return
        # It does answer, or nobody is there. One that takes the call is busy: on SQLite, Prefect may stand still a minute.
        if wrong.startswith("it ") or (number >= 2 and wrong != _LATE):
            break
    raise OrchestratorUnavailable(
        f"{server}, which PREFECT_API_URL names, cannot be used: {wrong}. Start it, or unset PREFECT_API_URL and run "
        f"`visionloop up` for one of this workspace's own"
    )


def _unanswered(settings: Settings) -> str:
    """What is wrong with the server; empty when it answers as one."""
    import requests

    try:
        answer = requests.get(
            f"{settings.prefect_api_url.rstrip('/')}/admin/version",
            auth=functools.partial(_authorise, settings),
            timeout=_TIMEOUT_S,
        )
    except requests.exceptions.SSLError as error:
        return f"its certificate is not accepted ({str(error)[:120]})"
    except requests.exceptions.ProxyError:
        return "the proxy that the environment names does not reach it; add its host to NO_PROXY"
    except requests.exceptions.ConnectTimeout:
        return "no connection in time"
    except requests.exceptions.Timeout:
        return _LATE
    except requests.RequestException as error:
        return "the connection is refused" if "refused" in str(error) else f"no connection ({type(error).__name__})"
    if answer.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return "it does not accept our credential; set PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
    if answer.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return f"HTTP status {answer.status_code}"
    if "json" not in answer.headers.get("content-type", ""):
        return "it answers, but not as Prefect's API does; the address has to end as in http://HOST:4200/api"
    return ""


def _address(settings: Settings) -> str:
    """The server by host and port alone; raises ValueError for what is no http address."""
    address = urlsplit(settings.prefect_api_url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError("PREFECT_API_URL is no http address")
    return f"the Prefect server at {address.hostname}:{address.port or address.scheme}"


def _authorise(settings: Settings, request: PreparedRequest) -> PreparedRequest:
    if settings.prefect_authorization:
        request.headers["Authorization"] = settings.prefect_authorization
    return request


def _posted(settings: Settings, event: Mapping[str, Any]) -> bool:
    """Whether the server took it; False where its answer, or its certificate, asks for more than is known here."""
    import requests

    server = _address(settings)
    try:
        answer = requests.post(
            f"{settings.prefect_api_url.rstrip('/')}/events",
            json=[event],
            auth=functools.partial(_authorise, settings),  # a callable, so that ~/.netrc is not read
            timeout=_TIMEOUT_S,
            allow_redirects=False,  # the credential is for this server
        )
    except requests.exceptions.SSLError:
        return False
    except requests.RequestException as error:
        raise OSError(f"{server} does not answer ({type(error).__name__})") from None
    if answer.is_redirect or answer.status_code in _PREFECT_KNOWS_MORE:
        return False
    if answer.status_code != HTTPStatus.NO_CONTENT:
        raise ValueError(f"{server} did not take it (HTTP status {answer.status_code})")
    return True


async def _sent_by_prefect(event: Mapping[str, Any]) -> None:
    """By a client of our own, not by `emit_event`: that one only queues, and nobody hears what became of it."""
    from prefect.events import Event, get_events_client

    async with get_events_client(reconnection_attempts=0, checkpoint_every=1) as client:
        await client.emit(Event.model_validate(event))
