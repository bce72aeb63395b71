"""Events for Prefect, read back from a real server's own record."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from shapes import free_port

from flows.orchestrator import events
from flows.workspace.settings import Settings, read_settings

PLAIN = Settings("", True, "", 1, "", "", "", "", (), "")
_EMIT = """
import dataclasses, json, sys
from pathlib import Path
from flows.orchestrator.events import emit
from flows.workspace.settings import prepare_environment, read_settings
prepare_environment(Path.cwd())
settings = dataclasses.replace(read_settings(Path.cwd()), prefect_api_url=sys.argv[1])
try:
    emit(settings, "visionloop.model.approved", sys.argv[2], {"version": "7", "seq": 3})
    problem = None
except Exception as error:
    problem = f"{type(error).__name__}: {error}"
print(json.dumps([problem, "prefect" in sys.modules]))
"""


def emitted(api: str, model: str, home: Path, *, prepare: str = "") -> tuple[str | None, bool]:
    """What a process of its own says after it sent an event: the problem, and whether it had to load Prefect."""
    command = [sys.executable, "-c", prepare + _EMIT, api, model]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=True, timeout=120)
    problem, loaded = json.loads(done.stdout.strip().splitlines()[-1])
    return problem, loaded


def recorded(api: str, model: str) -> list[dict[str, Any]]:
    """The events of a model that the server has on record, waited for: it writes them every few seconds."""
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


@dataclass
class Guard:
    """A proxy before a Prefect server: passes on what it is asked where it knows a server, and answers as it likes."""

    api: str = ""
    status: int = 204
    server: str = ""
    asked: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)

    @property
    def settings(self) -> Settings:
        return dataclasses.replace(PLAIN, prefect_api_url=self.api)


@pytest.fixture
def guard() -> Iterator[Guard]:
    made = Guard()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            made.asked.append((self.path, self.headers["authorization"]))
            body = self.rfile.read(int(self.headers["content-length"]))
            if made.server:
                passed = urllib.request.Request(made.server + "/events", body, {"content-type": "application/json"})
                urllib.request.urlopen(passed, timeout=10).close()
            self.send_response(made.status)
            self.send_header("location", f"http://127.0.0.1:{server.server_port}/login")
            self.send_header("content-length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            self.headers["content-length"] = "0"
            self.do_POST()

        def log_message(self, *_: Any) -> None:
            return None

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    made.api = f"http://127.0.0.1:{server.server_port}/api/"
    yield made
    server.shutdown()


def test_an_event_arrives_once_by_every_way(prefect_server: str, guard: Guard, tmp_path: Path) -> None:
    """By one request where Prefect is not loaded, by its client where it is, or where the request is refused."""
    guard.status, guard.server = 401, prefect_server
    assert emitted(guard.api, "refused", tmp_path) == (None, True)
    assert [path for path, _ in guard.asked] == ["/api/events"]
    assert emitted(guard.api, "heavy", tmp_path, prepare="import prefect\n") == (None, True)
    assert len(guard.asked) == 1
    assert emitted(prefect_server, "light", tmp_path) == (None, False)
    # The last one is waited for first: by then the others had their time to arrive twice.
    for model in ("light", "heavy", "refused"):
        (event,) = recorded(prefect_server, model)
        assert event["event"] == "visionloop.model.approved"
        assert event["resource"]["prefect.resource.name"] == model
        assert event["payload"] == {"version": "7", "seq": 3}


def test_what_only_prefects_client_can_send_it_sends_or_says_that_it_could_not(guard: Guard, tmp_path: Path) -> None:
    own = {"PREFECT_CLIENT_CUSTOM_HEADERS": '{"x-tenant": "a"}', "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}
    problem, loaded = emitted(guard.api, "lost", tmp_path, prepare=f"import os\nos.environ.update({own})\n")
    assert loaded
    assert problem is not None
    assert "Connect call failed" in problem
    assert guard.asked == []


@pytest.mark.parametrize("status", [302, 307, 401, 403, 407])
def test_what_prefects_settings_may_know_is_left_to_its_client(guard: Guard, status: int) -> None:
    """A redirect to a login page is not followed: the credential is for this server."""
    guard.status = status
    assert not events._posted(guard.settings, {"event": "x"})
    assert [path for path, _ in guard.asked] == ["/api/events"]


def test_a_certificate_nobody_vouches_for_is_left_to_prefects_client(guard: Guard) -> None:
    encrypted = dataclasses.replace(guard.settings, prefect_api_url=guard.api.replace("http://", "https://"))
    assert not events._posted(encrypted, {"event": "x"})
    assert guard.asked == []


@pytest.mark.parametrize("status", [200, 404, 422, 503])
def test_what_the_server_did_not_take_is_said(guard: Guard, status: int) -> None:
    guard.status = status
    with pytest.raises(ValueError, match=rf"server at 127.0.0.1:\d+ did not take it \(HTTP status {status}\)"):
        events._posted(guard.settings, {"event": "x"})


@pytest.mark.parametrize("address", ["prefect:4200/api", "http://ann:secret@:4200/api", "http:///api"])
def test_an_address_that_is_none_is_said_without_what_is_secret_in_it(address: str) -> None:
    with pytest.raises(ValueError, match="PREFECT_API_URL is no http address") as raised:
        events._posted(dataclasses.replace(PLAIN, prefect_api_url=address), {"event": "x"})
    assert "secret" not in str(raised.value)


def test_a_server_that_is_away_is_said_at_once(tmp_path: Path) -> None:
    port = free_port()
    problem, loaded = emitted(f"http://ann:secret@127.0.0.1:{port}/api", "away", tmp_path)
    assert problem == f"OSError: the Prefect server at 127.0.0.1:{port} does not answer (ConnectionError)"
    assert not loaded


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(
    ("pair", "key"), [(None, None), ("ann:größe", None), (None, "pnu_1"), ("ann:secret", "pnu_1")], ids=str
)
def test_the_credential_is_that_of_prefects_client(
    guard: Guard, pair: str | None, key: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from prefect.client.orchestration import PrefectClient

    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("PREFECT_API_URL", guard.api)
    for name, value in (("PREFECT_API_AUTH_STRING", pair), ("PREFECT_API_KEY", key)):
        monkeypatch.setenv(name, value or "")
    assert events._posted(read_settings(tmp_path), {"event": "x"})
    theirs = PrefectClient(guard.api, auth_string=pair, api_key=key)._client.headers.get("authorization")
    assert guard.asked == [("/api/events", theirs)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PREFECT_API_KEY", "pnu_1\n"),
        ("PREFECT_API_KEY", "größe"),
        ("PREFECT_CLIENT_CUSTOM_HEADERS", '{"x-tenant": "a"}'),
        ("PREFECT_API_SSL_CERT_FILE", "/etc/ca.pem"),
        ("PREFECT_API_TLS_INSECURE_SKIP_VERIFY", "true"),
    ],
)
def test_what_a_plain_request_cannot_carry_is_left_to_prefects_client(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert read_settings(tmp_path).prefect_is_plain
    monkeypatch.setenv(name, value)
    settings = read_settings(tmp_path)
    assert not settings.prefect_is_plain
    assert "pnu" not in repr(settings)
