"""Events for Prefect, sent without importing it: one message is not worth the seconds that Prefect takes to load.

A process that runs a flow has Prefect loaded and sends by its client, which names the run as related. Any other sends one
POST to the server's API and hears whether the server took it. What such a plain request cannot settle (credentials out of
a profile, headers or certificates that only Prefect's settings know) is left to Prefect's client.
"""

from __future__ import annotations

import os
import sys
from base64 import b64encode
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from requests import PreparedRequest

_TIMEOUT_S = 4.0


def emit(api: str, event: str, model: str, payload: Mapping[str, Any]) -> None:
    """Send an event about a model to the Prefect server at `api`.

    Raises ValueError when Prefect takes nothing, and what the transports raise (OSError of `requests`; Prefect's own share
    no base class).
    """
    resource = {"prefect.resource.id": f"visionloop.model.{model}", "prefect.resource.name": model}
    identifier = uuid4()
    if "prefect" not in sys.modules:
        sent = {"id": str(identifier), "occurred": datetime.now(UTC).isoformat(), "event": event}
        if _posted(api, {**sent, "resource": resource, "payload": dict(payload)}):
            return
    from prefect.events import emit_event

    # The same identifier: should the server have taken it after all, it is still one event.
    if emit_event(event, resource=resource, payload=dict(payload), id=identifier) is None:
        raise ValueError("Prefect's event client took nothing")


def _posted(api: str, event: Mapping[str, Any]) -> bool:
    """Whether the server took it; False where its answer, or its certificate, asks for more than is known here."""
    import requests

    try:
        answer = requests.post(
            f"{api.rstrip('/')}/events",
            json=[event],
            auth=_authorised,
            timeout=_TIMEOUT_S,
            allow_redirects=False,  # the credential is for this server
        )
    except requests.exceptions.SSLError:
        return False
    return answer.status_code == HTTPStatus.NO_CONTENT


def _authorised(request: PreparedRequest) -> PreparedRequest:
    """The credential that Prefect's client would send; being a callable, it keeps `requests` from reading ~/.netrc."""
    pair, key = os.environ.get("PREFECT_API_AUTH_STRING"), os.environ.get("PREFECT_API_KEY")
    if pair:
        request.headers["Authorization"] = "Basic " + b64encode(pair.encode()).decode()
    elif key:
        request.headers["Authorization"] = f"Bearer {key}"
    return request
