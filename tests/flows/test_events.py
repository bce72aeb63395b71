"""Events for Prefect, read back from a real server's own record."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from shapes import free_port

from flows import events

_EMIT = """
import json, sys
from flows.events import emit
try:
    emit(sys.argv[1], "visionloop.model.approved", sys.argv[2], {"version": "7", "seq": 3})
    problem = None
except Exception as error:
    problem = [type(error).__name__, isinstance(error, OSError)]
print(json.dumps([problem, "prefect" in sys.modules]))
"""


def emitted(api: str, model: str, *, prepare: str = "") -> tuple[list[Any] | None, bool]:
    """What a process of its own says after it sent an event: the problem, and whether it had to load Prefect."""
    command = [sys.executable, "-c", prepare + _EMIT, api, model]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    problem, loaded = json.loads(done.stdout.strip().splitlines()[-1])
    return problem, loaded


def recorded(api: str, model: str) -> list[dict[str, Any]]:
    """The events of a model that the server has on record, waited for."""
    deadline = time.monotonic() + 30
    criteria = {"filter": {"event": {"prefix": ["visionloop.model."]}, "resource": {"id": [f"visionloop.model.{model}"]}}}
    while time.monotonic() < deadline:
        request = urllib.request.Request(
            f"{api}/events/filter", data=json.dumps(criteria).encode(), headers={"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            found: list[dict[str, Any]] = json.loads(response.read())["events"]
        if found:
            return found
        time.sleep(0.2)
    return []


@pytest.fixture
def guarded() -> Iterator[tuple[str, list[tuple[str, str, str | None]], list[int]]]:
    """A server before Prefect's that answers with the status it is given: its address, what it was asked, the status."""
    asked: list[tuple[str, str, str | None]] = []
    status: list[int] = []

    class Guard(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.command, self.path, self.headers["authorization"]))
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status[0])
            self.send_header("location", f"http://127.0.0.1:{server.server_port}/login")
            self.send_header("content-length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            return None

    server = HTTPServer(("127.0.0.1", 0), Guard)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/api/", asked, status
    server.shutdown()


def test_an_event_arrives_once_by_either_way(prefect_server: str, guarded: Any) -> None:
    """By one request where Prefect is not loaded, by its client where it is, or where the request is not taken."""
    api, asked, status = guarded
    status.append(401)
    assert emitted(prefect_server, "light") == (None, False)
    assert emitted(api, "heavy", prepare="import prefect\n") == (None, True)
    assert asked == []
    assert emitted(api, "refused") == (None, True)
    assert [path for _, path, _ in asked] == ["/api/events"]
    for model in ("light", "heavy", "refused"):
        (event,) = recorded(prefect_server, model)
        assert event["event"] == "visionloop.model.approved"
        assert event["resource"]["prefect.resource.name"] == model
        assert event["payload"] == {"version": "7", "seq": 3}


@pytest.mark.parametrize("status", [200, 302, 307, 401, 422, 503])
def test_only_what_the_server_took_is_sent(guarded: Any, status: int) -> None:
    """Not by a login page, nor by a redirect to one: no credential follows it."""
    api, asked, statuses = guarded
    statuses.append(status)
    assert not events._posted(api, {"event": "x"})
    assert [path for _, path, _ in asked] == ["/api/events"]


def test_a_certificate_that_is_not_understood_is_left_to_prefects_client(guarded: Any) -> None:
    api, asked, _ = guarded
    assert not events._posted(api.replace("http://", "https://"), {"event": "x"})
    assert asked == []


def test_a_server_that_is_away_is_said_at_once() -> None:
    assert emitted(f"http://127.0.0.1:{free_port()}/api", "away") == (["ConnectionError", True], False)


@pytest.mark.parametrize(
    ("pair", "key"), [(None, None), ("ann:größe", None), (None, "pnu_1"), ("ann:secret", "pnu_1")], ids=str
)
def test_the_credential_is_that_of_prefects_client(
    guarded: Any, pair: str | None, key: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from prefect.client.orchestration import PrefectClient

    api, asked, status = guarded
    status.append(204)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    for name, value in (("PREFECT_API_AUTH_STRING", pair), ("PREFECT_API_KEY", key)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    assert events._posted(api, {"event": "x"})
    theirs = PrefectClient(api, auth_string=pair, api_key=key)._client.headers.get("authorization")
    assert asked == [("POST", "/api/events", theirs)]
