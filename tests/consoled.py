"""A console that really listens, and a real browser before it: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from flows.console.application import Application
from flows.console.config import ConsoleConfig
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass(frozen=True)
class Site:
    """A console of one workspace."""

    address: str
    application: Application
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def client(self, **options: Any) -> httpx.Client:
        """A browser without scripts: it keeps cookies, and says from where it sends what it sends; closed with the site."""
        made = httpx.Client(base_url=self.address, headers={"origin": self.address}, trust_env=False, **options)
        return self.closing.enter_context(made)


def application_of(root: Path, **config: Any) -> Application:
    """What a console of the workspace works with, without a server."""
    workspace = Workspace.find(root)
    return Application(workspace, read_settings(workspace.state), ConsoleConfig(**config))


@contextlib.contextmanager
def site(root: Path) -> Iterator[Site]:
    """The console of a workspace, listening in a thread of this process."""
    import uvicorn

    from flows.console.app import make_app
    from flows.console.server import listen

    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    application = application_of(root, port=port)
    server = uvicorn.Server(uvicorn.Config(make_app(application), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive(), "the console ended"
        assert time.monotonic() < deadline, "the console did not begin to listen"
        time.sleep(0.02)
    try:
        found = Site(f"http://127.0.0.1:{port}", application)
        with found.closing:
            yield found
    finally:
        server.should_exit = True
        thread.join(20)


def csrf_in(html: str) -> str:
    """The secret of the forms of a page."""
    return html.partition('name="csrf" value="')[2].partition('"')[0]


def seen_in(html: str) -> str:
    """What a decision of this page is about."""
    return html.partition('name="seen" value="')[2].partition('"')[0]


def found_browser() -> str:
    """The browser that VISIONLOOP_BROWSER names, or one of the PATH; a test without one is left out, or fails in `make test`."""
    named = os.environ.get("VISIONLOOP_BROWSER", "")
    found = named or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found:
        return found
    told = "no Chromium: infra/browser.sh installs Debian's, or VISIONLOOP_BROWSER names one"
    if os.environ.get("VISIONLOOP_BROWSER_DEMANDED"):
        pytest.fail(told)
    pytest.skip(told)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser; each `context` of it is a person of their own."""
    from playwright.sync_api import sync_playwright

    path = found_browser()
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=_OPTIONS)
        try:
            yield started
        finally:
            started.close()


def person_before(browser: Browser, **options: Any) -> Page:
    """A page of a person's own, with cookies of their own; what the browser complains of fails the test at `expect_quiet`."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(30_000)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.visionloop_said = said  # type: ignore[attr-defined]
    return page


def expect_quiet(page: Page) -> None:
    """Fail where a script failed, or the browser refused something of our own pages."""
    said: list[str] = page.visionloop_said  # type: ignore[attr-defined]
    assert not said, said


def expect_accessible(page: Page) -> None:
    """Fail where axe finds something serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    told = [(each["id"], each["help"], [node["html"][:200] for node in each["nodes"][:3]]) for each in serious]
    assert not told, told
