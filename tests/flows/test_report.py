from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flows.pages import figures

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def report(trained: Path) -> Path:
    return Path(json.loads((trained / "summary.json").read_text())["report"])


def test_the_report_is_self_contained_and_well_formed(report: Path) -> None:
    html = report.read_text()
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', html)
    assert "<script" not in html
    assert html.count("<svg") == 5
    assert html.count("data:image/png;base64,") >= 6

    class Balance(HTMLParser):
        depth = 0

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.depth += tag == "section"

        def handle_endtag(self, tag: str) -> None:
            self.depth -= tag == "section"

    parser = Balance()
    parser.feed(html)
    assert parser.depth == 0


def test_the_report_says_what_the_records_say(report: Path, trained: Path) -> None:
    html, summary = report.read_text(), json.loads((trained / "summary.json").read_text())
    assert f"shapes version {summary['version']}" in html
    assert summary["data"]["version"] in html
    for engine in summary["engines"].values():
        assert f"{engine['metrics']['accuracy']['value']:.4f}" in html
    for finding in summary["findings"]:
        assert finding["gate"] in html


def test_names_of_files_and_classes_are_escaped(trained: Path) -> None:

    rendered = figures.environment().from_string("{{ name }}").render(name="<img src=x onerror=alert(1)>")
    assert "<img" not in rendered
    assert "| safe" not in (figures.TEMPLATES / "report.html").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the page in")
def test_the_report_opens_in_a_real_browser(report: Path, tmp_path: Path) -> None:
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-sync",
    ]
    done = subprocess.run(
        [
            str(CHROMIUM),
            *flags,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            report.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Engines on the frozen test split" in done.stdout
    assert done.stdout.count("<svg") == 5
