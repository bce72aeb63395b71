"""The console in a real browser: looked at by a person, by keyboard alone, and by axe."""

from __future__ import annotations

import datetime
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from consoled import Site, application_of, chromium, expect_accessible, expect_quiet, person_before, site
from looped import loop_of
from served import unpacked
from shapes import visionloop

from flows.loop.labelling import choices, to_label
from registry.account_tables import SESSIONS, iso

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

VERSION = "/models/shapes/versions/1"
PASSWORD = "correct horse battery staple"


@pytest.fixture
def waiting(trained: Path, tmp_path: Path) -> Path:
    """A workspace of one's own, in which version 1 waits for a decision."""
    return Path(shutil.copytree(trained, tmp_path / "workspace", symlinks=True))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


def look(page: Page, name: str) -> None:
    """Keep a picture of the page where VISIONLOOP_SCREENSHOTS names a folder, for a person to look at."""
    folder = os.environ.get("VISIONLOOP_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def wait_until(page: Page, condition: str) -> None:
    """Wait until an expression is true; Playwright's own way would evaluate text in the page, which our policy refuses."""
    deadline = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)


def add_users(root: Path) -> Site:
    accounts = application_of(root).accounts
    for login, role in {"ann": "approver", "bob": "approver", "vic": "viewer"}.items():
        accounts.add(login, name=login.capitalize(), role=role, password=PASSWORD, by="test")
    return Site("", application_of(root))


def sign_in(page: Page, found: Site, login: str, to: str = "/") -> None:
    page.goto(found.address + to)
    page.get_by_label("Login").fill(login)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(found.address + to)


@pytest.mark.parametrize(
    ("scheme", "size"), [("light", (1200, 900)), ("dark", (390, 800))], ids=["light, wide", "dark, phone"]
)
def test_every_page_can_be_read_by_everybody(waiting: Path, browser: Browser, scheme: str, size: tuple[int, int]) -> None:
    viewport = {"width": size[0], "height": size[1]}
    with site(waiting) as found:
        # A browser whose clock is wrong by decades: what it is told is the server's time.
        page = person_before(browser, color_scheme=scheme, viewport=viewport)
        page.clock.set_fixed_time("1999-12-31T23:59:00")
        for number, path in enumerate(
            ("/", VERSION, "/models/shapes/history", "/models/shapes/loop", "/models/shapes/labels")
        ):
            page.goto(found.address + path)
            expect_accessible(page)
            wide = page.evaluate("document.scrollingElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 0, f"{path} is wider than the screen by {wide} pixels"
            look(page, f"page-{scheme}-{number}")
        page.goto(found.address + VERSION)
        page.locator("ul.pictures img").first.scroll_into_view_if_needed()
        wait_until(page, "document.querySelector('ul.pictures img').naturalWidth > 0")
        drawings = page.locator("figure.drawing img")
        assert drawings.count() >= 4
        for number in range(drawings.count()):
            drawings.nth(number).scroll_into_view_if_needed()
        wait_until(page, "[...document.querySelectorAll('figure.drawing img')].every((each) => each.naturalWidth > 100)")
        look(page, f"whole-{scheme}")
        expect_quiet(page)


def test_a_decision_by_keyboard_alone(waiting: Path, browser: Browser) -> None:
    with site(waiting) as found:
        page = person_before(browser)
        page.goto(found.address)
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.getAttribute('href')") == VERSION:
                break
        page.keyboard.press("Enter")
        page.wait_for_url(f"**{VERSION}")
        form = page.get_by_role("form", name="Approve")
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.closest('form')?.getAttribute('aria-label')") == "Approve":
                break
        assert form.get_by_label("Your name").evaluate("each => each === document.activeElement")
        page.keyboard.type("Ann")
        page.keyboard.press("Tab")
        page.keyboard.type("looked at every flip")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.locator("h1 .badge", has_text="approved").wait_for()
        expect_quiet(page)
    assert [e.kind for e in application_of(waiting).deciding_desk("shapes").ledger.entries()] == ["requested", "approved"]


@pytest.mark.slow
def test_the_story_from_queue_to_rollback_by_clicking(waiting: Path, browser: Browser) -> None:
    add_users(waiting)
    with site(waiting) as found:
        ann, bob = (person_before(browser, viewport={"width": 1200, "height": 900}) for _ in range(2))
        ann.goto(found.address + VERSION)
        look(ann, "story-1-sign-in")
        sign_in(ann, found, "ann", VERSION)
        sign_in(bob, found, "bob", VERSION)
        look(ann, "story-2-candidate")
        # Two approvers at one version: the second learns that the first was there.
        for page in (ann, bob):
            page.get_by_role("form", name="Approve").get_by_label("Reason").fill("every flip was looked at")
        ann.get_by_role("button", name="Approve version 1").click()
        ann.locator("h1 .badge", has_text="approved").wait_for()
        bob.get_by_role("button", name="Approve version 1").click()
        bob.get_by_text("changed since you looked at it").wait_for()
        look(bob, "story-3-second-approver")
        look(ann, "story-4-approved")
        promote(ann, "1")
        look(ann, "story-5-champion")
        done = visionloop("train", "-r", "smoke", "--set", "training.fit.seed=7", "--as", "Carol", "--json", cwd=waiting)
        assert (done.returncode, '"outcome": "undecided"' in done.stdout) == (1, True), done.stderr[-2000:]
        ann.goto(found.address)
        look(ann, "story-6-queue")
        ann.get_by_role("link", name="Version 2").click()
        # 54 pictures do not decide whether it is as good: somebody who did not ask for it answers for that.
        ann.get_by_role("form", name="Sign an exception").get_by_label("Reason").fill("compared all 54 pictures by eye")
        ann.get_by_role("button", name="Sign the exception").click()
        ann.locator("h1 .badge", has_text="excepted").wait_for()
        ann.get_by_role("form", name="Approve").get_by_label("Reason").fill("nothing got worse")
        ann.get_by_role("button", name="Approve version 2").click()
        ann.locator("h1 .badge", has_text="approved").wait_for()
        promote(ann, "2")
        # A session that ended asks to sign in, and leads back to where it was.
        long_ago = iso(datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=9))
        with sa.create_engine(found.application.settings.ledger_url).begin() as connection:
            connection.execute(SESSIONS.update().values(seen_at=long_ago))
        ann.get_by_role("link", name="version 1", exact=True).first.click()  # which was champion before
        ann.get_by_role("heading", name="Sign in").wait_for()
        ann.get_by_label("Login").fill("ann")
        ann.get_by_label("Password").fill(PASSWORD)
        ann.get_by_role("button", name="Sign in").click()
        ann.wait_for_url(found.address + VERSION)
        form = ann.get_by_role("form", name="Roll back")
        form.get_by_label("Reason").fill("complaints from line 2")
        ann.get_by_role("button", name="Roll back to version 1").click()
        ann.locator("h1 .badge", has_text="champion").wait_for()
        look(ann, "story-7-rolled-back")
        ann.get_by_role("link", name="History").click()
        ann.get_by_text("rolled back by Ann").wait_for()
        look(ann, "story-8-history")
        for page in (ann, bob):
            said: list[str] = page.visionloop_said  # type: ignore[attr-defined]
            assert all("409" in line for line in said), said
    verified = visionloop("ledger", "verify", "--json", cwd=waiting)
    assert verified.returncode == 0
    kinds = [entry.kind for entry in application_of(waiting).deciding_desk("shapes").ledger.entries()]
    assert kinds == ["requested", "approved", "promoted", "requested", "excepted", "approved", "promoted", "rolled_back"]


def promote(page: Page, version: str) -> None:
    """Press the button, and wait for the page that tells how it ended."""
    page.get_by_role("button", name=f"Promote version {version}").click()
    page.locator("h1 .badge", has_text="champion").wait_for(timeout=180_000)


def test_labels_by_keyboard_one_key_a_class(tmp_path: Path, browser: Browser) -> None:
    root = unpacked(tmp_path)  # with a window that drifted, and pictures that a server kept
    loop = loop_of(root)
    asked = [each.image_sha256 for each in to_label(loop)]
    with site(root) as found:
        page = person_before(browser, viewport={"width": 1200, "height": 900})
        page.goto(f"{found.address}/models/{loop.model}/labels")
        expect_accessible(page)
        wait_until(page, "document.querySelector('#label-form img').naturalWidth > 0")
        look(page, "labels")
        page.get_by_label("Your name").fill("Lea")
        page.locator("#label-form select").first.focus()
        for key in ("1", "2", " ", "3", "Backspace", "1"):  # the third is left out, the fourth is corrected
            page.keyboard.press(key)
        assert page.locator("#counted").inner_text() == "3 of 24 labelled"
        page.get_by_role("button", name="Take these labels").click()
        page.get_by_text("3 new labels taken").wait_for()
        expect_quiet(page)
    said = {sha: (label.label, label.by) for sha, label in loop.labels.latest(loop.model).items()}
    classes = choices(loop)
    expected = {asked[0]: classes[0], asked[1]: classes[1], asked[3]: classes[0]}
    assert {sha: said[sha] for sha in expected} == {sha: (label, "Lea") for sha, label in expected.items()}
    assert asked[2] not in said
