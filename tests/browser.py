"""A real browser, driven by the W3C WebDriver protocol: Debian's Chromium and its driver, which `infra/browser.sh` installs."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from shapes import free_port

_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


@dataclass
class Browser:
    """One window."""

    address: str
    """Of the driver's session."""

    def call(self, method: str, path: str, **body: Any) -> Any:
        return _call(method, f"{self.address}{path}", body if method == "POST" else None)

    def open(self, url: str) -> None:
        self.call("POST", "/url", url=url)

    def script(self, code: str, *arguments: Any) -> Any:
        """The value of a function's body."""
        return self.call("POST", "/execute/sync", script=code, args=list(arguments))

    def text(self, css: str) -> str:
        """What a person reads there; empty for what is hidden."""
        code = "const found = document.querySelector(arguments[0]); return found?.checkVisibility() ? found.innerText : ''"
        return str(self.script(code, css))

    def type(self, css: str, text: str) -> None:
        """Keys into a field, or the path of a file into a field for files."""
        element = self.call("POST", "/element", using="css selector", value=css)[_ELEMENT]
        self.call("POST", f"/element/{element}/value", text=text)

    def click(self, css: str) -> None:
        element = self.call("POST", "/element", using="css selector", value=css)[_ELEMENT]
        self.call("POST", f"/element/{element}/click")

    def drop(self, name: str, data: bytes) -> None:
        """A file from the desktop onto the page."""
        code = """
            const bytes = Uint8Array.from(atob(arguments[1]), (letter) => letter.charCodeAt(0));
            const moved = new DataTransfer();
            moved.items.add(new File([bytes], arguments[0]));
            document.body.dispatchEvent(new DragEvent("drop", {bubbles: true, cancelable: true, dataTransfer: moved}));
        """
        self.script(code, name, base64.b64encode(data).decode())

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.script("return document.body.innerText")
            time.sleep(0.05)

    def complaints(self) -> list[str]:
        """Errors of the console since the last time, such as what a content security policy refused."""
        return [entry["message"] for entry in self.call("POST", "/se/log", type="browser") if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))


def _call(method: str, url: str, body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
            return json.load(response)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from None


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a new `profile`; the test fails, and is not left out, where there is none."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.fail("pages are tested in a real browser: run infra/browser.sh, or install chromium and chromedriver")
    port = free_port()
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 30
        while True:
            try:
                assert _call("GET", f"{address}/status", None)["ready"]
                break
            except (OSError, AssertionError):
                if time.monotonic() > deadline or process.poll() is not None:
                    pytest.fail("chromedriver does not start")
                time.sleep(0.05)
        options = {"binary": chromium, "args": [*_OPTIONS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = _call("POST", f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        found = Browser(f"{address}/session/{session}")
        try:
            yield found
        finally:
            found.call("DELETE", "")
    finally:
        process.terminate()
        process.wait(30)
