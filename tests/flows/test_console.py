from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib
import json
import pkgutil
import re
import shutil
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from consoled import Site, application_of, csrf_in, seen_in, site
from fastapi.testclient import TestClient
from looped import loop_of, predict
from markupsafe import escape
from served import png, unpacked
from stores import s3_bucket

import flows.console
from components.contracts.errors import ConfigError
from components.objects import open_objects
from flows.console.app import make_app
from flows.console.candidate import seen
from flows.console.config import console_config
from flows.console.visitors import cookie, local_path
from flows.loop.predictions import erase_image
from flows.loop.windows import Span, judge_window
from flows.workspace.settings import read_settings, sqlite_url
from flows.workspace.versions import show
from registry import approval
from serving.log.sending import send_all

VERSION = "/models/shapes/versions/1"
PASSWORD = "correct horse battery staple"


@pytest.fixture
def waiting(trained: Path, tmp_path: Path) -> Path:
    """A workspace of one's own, in which version 1 waits for a decision."""
    return Path(shutil.copytree(trained, tmp_path / "workspace", symlinks=True))


@pytest.fixture
def local(waiting: Path) -> Iterator[Site]:
    """A console without users."""
    with site(waiting) as found:
        yield found


@pytest.fixture
def peopled(waiting: Path) -> Iterator[Site]:
    """A console with a user of each role; Ann has a second login."""
    accounts = application_of(waiting).accounts
    for login, role in {"vic": "viewer", "tim": "trainer", "ann": "approver", "bob": "approver", "eve": "admin"}.items():
        accounts.add(login, name=login.capitalize(), role=role, password=PASSWORD, by="test")
    with site(waiting) as found:
        yield found


def session_of(found: Site) -> str:
    return cookie(found.application, "session")


def signed_in(found: Site, login: str) -> httpx.Client:
    client = found.client()
    page = client.get("/sign-in").text
    answer = client.post("/sign-in", data={"csrf": csrf_in(page), "login": login, "password": PASSWORD})
    assert answer.status_code == 303, answer.text
    return client


def decide(
    client: httpx.Client, doing: str, *, page: str | None = None, version: str = VERSION, **fields: Any
) -> httpx.Response:
    """Send the form of a version's page, as it was when it was looked at."""
    html = client.get(version).text if page is None else page
    given = {"csrf": csrf_in(html), "seen": seen_in(html), "reason": "looked at every picture", **fields}
    return client.post(f"{version}/{doing}", data=given)


def entries(found: Site) -> list[str]:
    return [entry.kind for entry in found.application.deciding_desk("shapes").ledger.entries("shapes")]


def test_a_person_approves_under_a_declared_name(local: Site) -> None:
    client = local.client()
    queue = client.get("/").text
    assert "passed every gate" in queue
    assert f'href="{VERSION}"' in queue
    page = client.get(VERSION).text
    assert decide(client, "approve", page=page, name="").status_code == 422, "nobody is named"
    requester = local.application.desk("shapes").ledger.entries()[0].actor.name
    refused = decide(client, "approve", page=page, name=requester.upper())
    assert refused.status_code == 409
    assert "a second person has to" in refused.text
    assert decide(client, "approve", page=page, name="Ann", reason=" ").status_code == 422
    assert entries(local) == ["requested"]
    answer = decide(client, "approve", page=page, name="Ann", days="3")
    assert (answer.status_code, answer.headers["location"]) == (303, VERSION)
    row = local.application.deciding_desk("shapes").ledger.entries()[-1]
    assert (row.actor.name, row.actor.method) == ("Ann", "declared")
    assert row.body["reason"] == "looked at every picture"
    assert "Approved by <b>Ann</b>" in client.get(VERSION).text
    replayed = decide(client, "approve", page=page, name="Ann")
    assert replayed.status_code == 409
    assert "changed since you looked at it" in replayed.text
    assert entries(local) == ["requested", "approved"]


def test_of_decisions_at_the_same_moment_one_is_made(local: Site) -> None:
    clients = [local.client(timeout=60) for _ in range(4)]
    pages = [client.get(VERSION).text for client in clients]
    together = threading.Barrier(len(clients))
    answers: list[int] = []

    def press(number: int) -> None:
        doing = "approve" if number % 2 else "reject"
        together.wait()
        answers.append(decide(clients[number], doing, page=pages[number], name=f"person {number}").status_code)

    threads = [threading.Thread(target=press, args=(number,)) for number in range(len(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [303, 409, 409, 409]
    assert len(entries(local)) == 2


def test_forms_from_elsewhere_do_nothing(local: Site) -> None:
    client = local.client()
    page = client.get(VERSION).text
    fields = {"csrf": csrf_in(page), "seen": seen_in(page), "reason": "looked at it", "name": "Ann", "switch": "stop"}
    modules = [
        importlib.import_module(f"flows.console.{each.name}") for each in pkgutil.iter_modules(flows.console.__path__)
    ]
    routes = [route for module in modules if hasattr(module, "router") for route in module.router.routes]
    forms = [
        route.path.format(model="shapes", version="1")
        for route in routes
        if "POST" in route.methods and not route.path.startswith("/api/")
    ]
    assert len(forms) >= 9
    for form in forms:
        for change in ({"csrf": ""}, {"csrf": "0" * 64}):
            assert client.post(form, data={**fields, **change}).status_code == 403, form
        for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
            assert client.post(form, data=fields, headers=headers).status_code == 403, form
        assert httpx.post(local.address + form, data=fields, trust_env=False).status_code == 403, form
        other = local.client().post(form, data=fields)
        assert other.status_code == 403, "the secret of another session"
    api = f"/api/v1{VERSION}/approve"
    for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
        assert client.post(api, json={"reason": "x", "by": "Ann"}, headers=headers).status_code == 403
    assert entries(local) == ["requested"]
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421
    assert client.post(f"{VERSION}/approve", content=b"x" * (2 << 20)).status_code == 413
    for path in ("/", "/api/v1/models"):
        assert client.get(path, headers={"x-forwarded-for": "192.0.2.1"}).status_code == 403
    answer = client.get(VERSION)
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-store"
    assert "httponly" in local.client().get("/").headers["set-cookie"].lower()


def test_roles_say_who_may_do_what(peopled: Site) -> None:
    nobody = peopled.client()
    assert nobody.get(VERSION).headers["location"] == "/sign-in?to=%2Fmodels%2Fshapes%2Fversions%2F1"
    assert nobody.get(f"{VERSION}/pictures/x.png").status_code == 303
    client = peopled.client()
    wrong = [
        client.post("/sign-in", data={"csrf": csrf_in(client.get("/sign-in").text), "login": login, "password": "wrong" * 4})
        for login in ("ann", "nobody")
    ]
    assert [answer.status_code for answer in wrong] == [401, 401]
    told = [re.findall(r'role="alert"[^>]*>([^<]*)', answer.text) for answer in wrong]
    assert told[0] == told[1], "whether there is such a login is not told"
    viewer, trainer, ann = (signed_in(peopled, login) for login in ("vic", "tim", "ann"))
    page = viewer.get(VERSION).text
    assert "Decisions are made by approvers" in page
    assert "/approve" not in page
    for client in (viewer, trainer):
        html = client.get(VERSION).text
        assert decide(client, "approve", page=html, seen=seen_in(ann.get(VERSION).text)).status_code == 403
    assert viewer.post(f"{VERSION}/comment", data={"csrf": csrf_in(page), "text": "hm"}).status_code == 403
    assert viewer.get("/audit").status_code == 403
    assert entries(peopled) == ["requested"]
    assert decide(ann, "approve", name="Somebody Else").status_code == 303
    row = peopled.application.deciding_desk("shapes").ledger.entries()[-1]
    assert (row.actor.name, row.actor.method) == ("Ann", "password"), "who is signed in decides, whatever a form says"
    forged = peopled.client(cookies={session_of(peopled): "A" * 43})
    assert forged.get(VERSION).status_code == 303
    value = ann.cookies[session_of(peopled)]
    out = ann.post("/sign-out", data={"csrf": csrf_in(ann.get(VERSION).text)})
    assert out.status_code == 303
    assert peopled.client(cookies={session_of(peopled): value}).get(VERSION).status_code == 303, "a session that was ended"
    audit = signed_in(peopled, "eve").get("/audit").text
    assert "<td>sign-in refused</td>" in audit
    assert "<td>decision refused</td>" in audit


def test_two_logins_of_one_person_are_one(waiting: Path) -> None:
    application = application_of(waiting)
    requester = application.desk("shapes").ledger.entries()[0].actor.name
    application.accounts.add("second", name="Second", role="approver", password=PASSWORD, also=(requester,), by="test")
    with site(waiting) as found:
        client = signed_in(found, "second")
        page = client.get(VERSION).text
        assert "You asked for this training" in page
        # The form is not even shown; here it is sent all the same.
        looked_at = seen(show(found.application.desk("shapes"), "1"))
        refused = decide(client, "approve", page=page, csrf=csrf_in(page), seen=looked_at)
        assert (refused.status_code, "a second person has to" in refused.text) == (409, True)
        token = found.application.accounts.make_token("second", name="ci", days=1, by="test")
        answer = httpx.post(
            f"{found.address}/api/v1{VERSION}/approve",
            json={"reason": "looked at it"},
            headers={"authorization": f"Bearer {token}"},
            trust_env=False,
        )
        assert answer.status_code == 409
        assert "a second person has to" in answer.json()["message"]
        assert entries(found) == ["requested"]


def test_a_script_in_a_text_is_text(local: Site) -> None:
    script = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    client = local.client()
    html = client.get(VERSION).text
    given = {"csrf": csrf_in(html), "name": "Ann <b>", "text": script}
    assert client.post(f"{VERSION}/comment", data=given).status_code == 303
    assert decide(client, "reject", name="Bob <i>", reason=script).status_code == 303
    for address in (VERSION, "/models/shapes/history", "/"):
        text = client.get(address).text
        assert "<script>alert" not in text
        assert "<img src=x" not in text
        assert "Bob <i>" not in text
    assert "&lt;script&gt;alert(1)" in client.get(VERSION).text
    for strange in ("/models/<script>alert(1)/versions/1", f"/models/shapes/versions/{script}", "/nothing/<script>"):
        assert "<script>alert" not in client.get(strange).text


def test_evidence_that_is_away_or_erased_is_told(local: Site) -> None:
    from flows.training.registered import kept_in, registered_evidence

    application, client = local.application, local.client()
    desk = application.desk("shapes")
    state = show(desk, "1").state
    evidence = registered_evidence(desk, state)
    assert evidence.shown is not None
    first = evidence.shown.pictures[0]
    page = client.get(VERSION).text
    address = f"{VERSION}/pictures/{first.thumbnail}"
    assert f'src="{address}"' in page
    picture = client.get(address)
    assert picture.headers["content-type"] == "image/png"
    erase_image(application.workspace, first.sha256, by="Ann", reason="asked for by the person on it")
    assert client.get(address).status_code == 410
    assert "erased since" in client.get(VERSION).text
    assert f'src="{address}"' not in client.get(VERSION).text
    other = next(one for one in evidence.shown.pictures if one.thumbnail != first.thumbnail)
    kept = evidence.pictures / other.thumbnail
    kept.write_bytes(kept.read_bytes() + b"\0")
    assert client.get(f"{VERSION}/pictures/{other.thumbnail}").status_code == 500, "changed in the cache"
    assert client.get(f"{VERSION}/pictures/%2e%2e/verdict.json").status_code == 404
    record = kept_in(desk, state) / "evidence" / "shown.json"
    told = json.loads(record.read_text())
    told["num_images"] += 1
    record.write_text(json.dumps(told))
    page = client.get(VERSION).text
    assert "is not what the ledger" in page
    assert "was changed" in page
    assert "Beside the champion" in page, "what the ledger holds is shown all the same"
    assert "was changed" not in client.get(VERSION).text, "it was fetched anew"
    shutil.rmtree(kept_in(desk, state))
    shutil.rmtree(application.workspace.state / "mlflow-artifacts")
    assert "The evidence cannot be shown" in client.get(VERSION).text


def test_a_database_that_is_away_is_told(waiting: Path) -> None:
    application = application_of(waiting)
    with TestClient(make_app(application), base_url=f"http://127.0.0.1:{application.config.port}") as client:
        assert client.get("/").status_code == 200
        ledger = application.workspace.state / "ledger.db"
        ledger.rename(ledger.with_suffix(".away"))
        ledger.mkdir()
        answer = client.get("/")
        assert (answer.status_code, "Nothing was changed" in answer.text) == (503, True)
        ledger.rmdir()
        ledger.with_suffix(".away").rename(ledger)
        assert client.get("/").status_code == 200


def test_the_api_does_what_the_pages_do(peopled: Site) -> None:
    api = peopled.closing.enter_context(httpx.Client(base_url=f"{peopled.address}/api/v1", trust_env=False))
    assert api.get("/models").status_code == 401
    value = signed_in(peopled, "ann").cookies[session_of(peopled)]
    assert api.get("/models", headers={"cookie": f"{session_of(peopled)}={value}"}).status_code == 401, (
        "a cookie is no token"
    )
    tokens = {
        login: peopled.application.accounts.make_token(login, name="ci", days=1, by="test") for login in ("vic", "ann")
    }

    def call(login: str, method: str, path: str, **options: Any) -> httpx.Response:
        return api.request(method, path, headers={"authorization": f"Bearer {tokens[login]}"}, **options)

    assert call("vic", "GET", "/models").json() == {"models": ["shapes"]}
    waiting = call("vic", "GET", "/models/shapes/candidates").json()["candidates"]
    assert [each["status"] for each in waiting] == ["waiting"]
    assert call("vic", "POST", VERSION + "/approve", json={"reason": "good"}).status_code == 403
    assert call("ann", "POST", VERSION + "/approve", json={"reason": "good", "by": "Bob"}).status_code == 403
    assert call("ann", "POST", VERSION + "/approve", json={"reason": "good", "days": 0}).status_code == 422
    done = call("ann", "POST", VERSION + "/approve", json={"reason": "good"})
    assert done.json()["actor"] == "Ann"
    assert done.json()["actor_method"] == "token"
    assert call("vic", "GET", VERSION).json()["status"] == "approved"
    rows = call("vic", "GET", "/models/shapes/history").json()["entries"]
    assert [row["kind"] for row in rows] == ["requested", "approved"]
    missing = call("vic", "GET", "/models/shapes/versions/9")
    assert (missing.status_code, "valid: 1" in missing.json()["message"]) == (404, True)
    document = httpx.get(f"{peopled.address}/api/openapi.json", trust_env=False).json()
    assert "/api/v1/models/{model}/versions/{version}/approve" in document["paths"]
    assert httpx.get(f"{peopled.address}/api", trust_env=False).status_code == 200


def with_evidence(local: Site, monkeypatch: pytest.MonkeyPatch, names: Sequence[str], path: str = "") -> None:
    """Let the pages show version 1 as if its classes and one of its files had these names."""
    from components.contracts.verdicts import ClassMetrics
    from flows.console import candidate, pages
    from flows.training.registered import registered_evidence

    desk = local.application.desk("shapes")
    found = registered_evidence(desk, show(desk, "1").state)
    assert found.shown is not None
    some = found.serving.per_class[0]
    many = tuple(ClassMetrics(**{**some.model_dump(), "name": name}) for name in names)
    confusion = tuple((1,) * len(names) for _ in names) if len(names) < 10 else ()
    changed = {"per_class": many, "confusion": confusion}
    evaluations = tuple(
        type(stored)(stored.record.model_copy(update=changed), stored.folder) for stored in found.evaluations
    )
    first, *others = found.shown.pictures
    strange = first.model_copy(update={"path": path or first.path, "label": names[0], "predicted": names[1]})
    shown = found.shown.model_copy(update={"pictures": (strange, *others)})
    replaced = replace(found, evaluations=evaluations, shown=shown)
    for module in (candidate, pages):
        monkeypatch.setattr(module, "registered_evidence", lambda *_: replaced)


def test_a_script_in_the_name_of_a_class_or_a_file_is_text(local: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    strange = '"><script>alert(3)</script>'
    with_evidence(local, monkeypatch, [strange, "'onclick='alert(4)"], f"data/{strange}.png")
    client = local.client()
    for address in (VERSION, f"{VERSION}/classes"):
        page = client.get(address).text
        assert "&lt;script&gt;alert(3)" in page
        assert "<script>alert" not in page
        assert "='alert(4)" not in page


def test_thousands_of_classes_are_shown_in_parts(local: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with_evidence(local, monkeypatch, [f"class {number}" for number in range(5000)])
    client = local.client()
    page = client.get(VERSION).text
    assert "All 5000 classes" in page
    assert len(page) < 500_000
    classes = client.get(f"{VERSION}/classes?start=500").text
    assert classes.count('<th scope="row">') == 500


@pytest.mark.parametrize(
    ("host", "url", "has_users"),
    [
        ("0.0.0.0", "", False),
        ("0.0.0.0", "https://models.example.org", False),
        ("127.0.0.1", "https://models.example.org", False),
        ("0.0.0.0", "", True),
        ("127.0.0.1", "http://models.example.org", True),
        ("127.0.0.1", "models.example.org", True),
        ("127.0.0.1", "https://models.example.org/path", True),
    ],
)
def test_strangers_are_not_let_in(host: str, url: str, has_users: bool) -> None:
    with pytest.raises(ConfigError):
        console_config(host, 8400, url, has_users=has_users)


def test_behind_a_proxy_cookies_are_kept_to_tls() -> None:
    config = console_config("0.0.0.0", 8400, "https://Models.example.org/", has_users=True)
    assert config.is_secure
    assert config.hosts == {"models.example.org"}
    assert console_config("127.0.0.1", 8443, "https://Models.example.org:443", has_users=True).hosts == config.hosts
    assert "localhost" in console_config("127.0.0.1", 80, "", has_users=False).hosts
    assert console_config("127.0.0.1", 8400, "", has_users=False).is_loopback


@pytest.mark.parametrize(
    "text", ["https://evil.example", "//evil.example", "/\\evil.example", "javascript:alert(1)", "", "\t/x"]
)
def test_signing_in_leads_nowhere_else(text: str) -> None:
    assert local_path(text) == "/"


def test_a_decision_is_about_what_was_seen(local: Site) -> None:
    client = local.client()
    page = client.get(VERSION).text
    desk = local.application.deciding_desk("shapes")
    bob = approval.person("Bob")
    desk.ledger.decide(model="shapes", actor=bob, rule=approval.approve("1", bob, "fine"))
    refused = decide(client, "reject", page=page, name="Ann")
    assert refused.status_code == 409
    assert "changed since you looked at it" in refused.text
    assert decide(client, "reject", name="Ann").status_code == 303, "after another look"
    assert entries(local) == ["requested", "approved", "rejected"]


def test_people_sign_in_by_a_provider(waiting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        importlib.import_module("authlib.deprecate")  # which sets filters of its own
        warnings.simplefilter("ignore")  # the mock still uses what Authlib is about to drop
        import oidc_provider_mock
    with oidc_provider_mock.run_server_in_thread() as provider:
        issuer = f"http://localhost:{provider.server_port}"
        for name, value in {"ISSUER": issuer, "CLIENT_ID": "console", "CLIENT_SECRET": "hush"}.items():
            monkeypatch.setenv(f"VISIONLOOP_OIDC_{name}", value)
        accounts = application_of(waiting).accounts
        accounts.add("ann", name="Ann", role="approver", subject=f"{issuer} ann@example.org", by="test")
        with site(waiting) as found:
            client = found.client()
            assert "Sign in by your organisation" in client.get("/sign-in").text
            away = client.get("/sign-in/oidc", params={"to": VERSION}).headers["location"]
            assert away.startswith(f"{issuer}/oauth2/authorize?")
            assert "code_challenge_method=S256" in away
            back = httpx.post(away, data={"sub": "ann@example.org"}, trust_env=False).headers["location"]
            assert back.startswith(f"{found.address}/sign-in/oidc/callback?")
            stranger = found.client()
            assert stranger.get(back).status_code == 503, "an answer to what this browser never asked"
            answer = client.get(back)
            assert (answer.status_code, answer.headers["location"]) == (303, VERSION), answer.text
            assert decide(client, "approve").status_code == 303
            row = found.application.deciding_desk("shapes").ledger.entries()[-1]
            assert (row.actor.name, row.actor.method) == ("Ann", "oidc")
            assert found.client(cookies=dict(client.cookies)).get(back).status_code == 503, "an answer twice"
            away = stranger.get("/sign-in/oidc").headers["location"]
            back = httpx.post(away, data={"sub": "somebody@example.org"}, trust_env=False).headers["location"]
            refused = stranger.get(back)
            assert refused.status_code == 401
            assert stranger.get(VERSION).status_code == 303, "nobody is signed in"
        # A provider that calls itself otherwise than the settings do is another one.
        monkeypatch.setenv("VISIONLOOP_OIDC_ISSUER", f"{issuer}/")
        with site(waiting) as found:
            client = found.client()
            away = client.get("/sign-in/oidc").headers["location"]
            back = httpx.post(away, data={"sub": "ann@example.org"}, trust_env=False).headers["location"]
            told = client.get(back)
            assert (told.status_code, "did not prove who you are" in told.text) == (401, True)
    monkeypatch.setenv("VISIONLOOP_OIDC_CLIENT_SECRET", "")
    with pytest.raises(ConfigError, match="VISIONLOOP_OIDC_CLIENT_SECRET"):
        application_of(waiting)
    monkeypatch.setenv("VISIONLOOP_OIDC_ISSUER", "http://login.example.org")
    with pytest.raises(ConfigError):
        application_of(waiting)


def test_an_approval_that_has_ended_promotes_nothing(local: Site) -> None:
    client = local.client()
    assert decide(client, "approve", name="Ann", days="0.00001").status_code == 303
    page = client.get(VERSION).text
    time.sleep(1)
    promoted = decide(client, "promote", page=page, name="Ann")
    assert promoted.status_code == 303, "the page was right when it was drawn; the ledger decides"
    deadline = time.monotonic() + 120
    while "did not go through" not in (html := client.get(VERSION).text):
        assert time.monotonic() < deadline, html
        time.sleep(0.2)
    assert "approval expired" in html
    assert entries(local) == ["requested", "approved"]


def test_a_kept_picture_that_cannot_be_shown_is_told(tmp_path: Path) -> None:
    root = unpacked(tmp_path)
    captures = root / ".visionloop" / "serving" / "captures"
    with site(root) as found:
        client = found.client()
        (model,) = found.application.models()
        (kept, *_) = [path for path in sorted(captures.glob("??/*")) if len(path.name) == 64]
        address = f"/models/{model}/captures"
        assert client.get(f"{address}/{kept.name}").headers["content-type"].startswith("image/")
        kept.write_bytes(b"no picture")
        assert client.get(f"{address}/{kept.name}").status_code == 422, "not the bytes that its name says"
        data = b"never was a picture"
        other = hashlib.sha256(data).hexdigest()
        (captures / other[:2]).mkdir(exist_ok=True)
        (captures / other[:2] / other).write_bytes(data)
        told = client.get(f"{address}/{other}")
        assert (told.status_code, "cannot be decoded" in told.text) == (422, True)
        assert client.get(f"{address}/{'0' * 64}").status_code == 422
        assert client.get(f"{address}/..%2F..%2Fledger.db").status_code in (404, 422)


@pytest.fixture(params=["folder", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where a team keeps images and windows, as the environment says it."""
    with s3_bucket("team") if request.param == "s3" else contextlib.nullcontext(str(tmp_path / "team")) as found:
        monkeypatch.setenv("VISIONLOOP_CAPTURES", f"{found}/{tmp_path.name}/captures")
        monkeypatch.setenv("VISIONLOOP_WINDOWS", f"{found}/{tmp_path.name}/windows")
        yield f"{found}/{tmp_path.name}"


def another_machine(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with the tables, releases and log of another, and with nothing in its own folders of what that has seen."""
    state = root / ".visionloop"
    monkeypatch.setenv("VISIONLOOP_LEDGER_URL", sqlite_url(state / "ledger.db"))
    monkeypatch.setenv("VISIONLOOP_LOOP_URL", sqlite_url(state / "loop.db"))
    monkeypatch.setenv("VISIONLOOP_RELEASES", str(state / "releases"))
    monkeypatch.setenv("VISIONLOOP_PREDICTIONS", str(state / "predictions"))
    own = ("ledger.db*", "loop.db*", "releases", "predictions", "serving", "monitoring")
    return Path(shutil.copytree(root, folder, symlinks=True, ignore=shutil.ignore_patterns(*own)))


def test_a_console_elsewhere_shows_what_servers_kept_and_watches_judged(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = unpacked(tmp_path)
    predict(root, 200, shift=4, capture=True)
    other = another_machine(root, tmp_path / "console", monkeypatch)
    now = datetime.datetime.now(datetime.UTC)
    judged = judge_window(loop_of(root), Span(now - datetime.timedelta(hours=1), now), now)
    assert judged is not None
    assert judged.verdict.status == "drift"
    page, captures = "/models/shapes/loop", root / ".visionloop" / "serving" / "captures"
    with site(other) as found:
        client = found.client(timeout=60)
        assert "What is new in it" not in client.get(page).text, "the images wait in their server's folder"
        send_all(captures, read_settings(root / ".visionloop").captures_url, retain_days=30)
        html = client.get(page).text
        for reason in judged.verdict.reasons:
            assert str(escape(reason)) in html
        assert "What is new in it" in html
        shown = re.findall(r'src="(/models/shapes/captures/[0-9a-f]{64})"', html)
        assert len(shown) >= 3
        assert {client.get(each).headers["content-type"] for each in shown} <= {"image/png", "image/jpeg"}
        assert not (other / ".visionloop" / "monitoring" / "shapes" / "windows").exists()
        asked = client.get("/models/shapes/labels").text
        assert re.findall(r'src="(/models/shapes/captures/[0-9a-f]{64})"', asked)
        # Erased on the machine of the server.
        erase_image(loop_of(root).workspace, shown[0][-64:], by="Ann", reason="asked for by the person on it")
        gone = client.get(shown[0])
        assert (gone.status_code, "was erased" in gone.text) == (422, True)
        assert shown[0] not in client.get(page).text
        assert client.get(shown[1]).status_code == 200
        # Bytes that somebody put in its place.
        open_objects(f"{address}/captures").write(f"{shown[1][-64:][:2]}/{shown[1][-64:]}", png("disc", 1))
        changed = client.get(shown[1])
        assert (changed.status_code, "with other bytes" in changed.text) == (422, True)


@pytest.mark.parametrize("variable", ["VISIONLOOP_CAPTURES", "VISIONLOOP_WINDOWS"])
def test_an_address_that_is_away_is_told(
    waiting: Path, variable: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name, value in (("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_DEFAULT_REGION", "eu")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(variable, "s3://away/place")
    with site(waiting) as found:
        client = found.client(timeout=60)
        away = ["/models/shapes/loop"] if variable == "VISIONLOOP_WINDOWS" else [f"/models/shapes/captures/{'ab' * 32}"]
        for path in away:
            answer = client.get(path)
            assert (answer.status_code, "s3://away/place" in answer.text) == (503, True)
            assert "does not answer" in answer.text
        # What the ledger holds is there to decide on; pictures of the evidence are not, as one of them may have been erased.
        version = client.get(VERSION)
        assert version.status_code == 200
        assert ("The evidence cannot be shown" in version.text) == (variable == "VISIONLOOP_CAPTURES")
        assert client.get("/").status_code == 200
        assert "Traceback" not in answer.text + version.text
    assert not [record for record in caplog.records if record.exc_info]


def test_files_of_runs_are_those_of_runs_alone(local: Site, tmp_path: Path) -> None:
    client = local.client()
    (run,) = [path.name for path in local.application.workspace.runs.iterdir()]
    page = client.get(VERSION).text
    docs, *_ = re.findall(r'href="(/runs/[^"]*/data-docs/[^"]*)"', page)
    answer = client.get(docs)
    assert "Expectation Validation Result" in answer.text
    assert (answer.status_code, "sandbox" in answer.headers["content-security-policy"]) == (200, True)
    assert client.get(f"/runs/{run}/report.html").status_code == 200
    outside = tmp_path / "other" / "data_docs" / "secret.html"
    outside.parent.mkdir(parents=True)
    outside.write_text("secret")
    folder = docs.partition("/validations/")[0]
    for name in (f"/{outside}", "%2e%2e/%2e%2e/config.json", f"%2F{str(outside).replace('/', '%2F')}", "../../config.json"):
        assert client.get(f"{folder}/{name}").status_code == 404, name
    assert client.get(f"/runs/{run}/data-docs/{'0' * 64}/index.html").status_code == 303
    assert client.get("/runs/..%2f..%2f/report.html").status_code == 404


def test_where_the_last_user_goes_nobody_is_let_in(waiting: Path) -> None:
    application = application_of(waiting, host="0.0.0.0", url="https://models.example.org")
    application.accounts.add("ann", role="approver", password=PASSWORD, by="test")
    with TestClient(make_app(application), base_url="https://models.example.org", follow_redirects=False) as client:
        assert client.get("/").status_code == 303
        application.accounts.remove("ann", by="test")
        assert client.get("/").status_code == 403
        assert client.get("/api/v1/models").status_code == 403
        origin = {"origin": "https://models.example.org"}
        assert client.post(f"/api/v1{VERSION}/approve", json={"reason": "x", "by": "Eve"}, headers=origin).status_code == 403


def test_strange_requests_are_answered(peopled: Site) -> None:
    client = peopled.client()
    page = client.get("/sign-in").text
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert client.get("/sign-in?to=//[").status_code == 200
    assert client.post("/sign-in", headers={"origin": "", "referer": "http://["}).status_code == 403
    assert client.post("/sign-in", content=iter([b"a" * 700_000] * 3), headers=form).status_code == 413
    assert client.post("/sign-in", data={"csrf": csrf_in(page), **{f"a{n}": "x" for n in range(2000)}}).status_code == 400
    proxied = httpx.get(f"{peopled.address}/api/v1/models", headers={"x-forwarded-for": "192.0.2.1"}, trust_env=False)
    assert proxied.status_code == 401
    for _ in range(6):
        answer = client.post("/sign-in", data={"csrf": csrf_in(page), "login": "ann", "password": "wrong" * 4})
    assert answer.status_code == 429
    assert client.get(f"{VERSION}/approve").status_code in (303, 405)
