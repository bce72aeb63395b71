from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from components.contracts.verdicts import ClassMetrics
from components.intervals import difference, wilson
from components.phases import Phase
from flows.pages import figures
from flows.training.diagnosis import fit_told, gain_told, imbalance, phase_results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def report(trained: Path) -> Path:
    return Path(json.loads((trained / "summary.json").read_text())["report"])


def test_the_report_is_self_contained_and_well_formed(report: Path) -> None:
    html = report.read_text()
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', html)
    assert "<script" not in html
    assert html.count("<svg") == 7
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
    for told in (
        "There is no champion that it could be compared with, picture by picture.",
        "<h2>Slices, openvino-int8</h2>",
        "brightness between the quarters",
        "<h2>Right, and least sure</h2>",
        "Near in training: ",
        "Grad-CAM of the torch network, for openvino-int8 gives no gradients",
    ):
        assert told in html
    assert f"The first model judged on these {summary['data']['splits']['test']} test pictures." in html


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
    assert done.stdout.count("<svg") == 7


ALL, HEAD = (
    Phase.model_validate_json(json.dumps({"trains": trains, "fit": {"epochs": 3}}), strict=True)
    for trains in ("all", "head")
)


def rows(phase: int | None, first: int, losses: list[tuple[float, float]], right: float) -> list[dict[str, float]]:
    """The history of a phase with these train and valid losses."""
    numbered = {} if phase is None else {"phase": float(phase)}
    return [
        {"epoch": float(epoch), "train_loss": train, "valid_loss": valid, "valid_accuracy": right, **numbered}
        for epoch, (train, valid) in enumerate(losses, first)
    ]


def two_phases(train: float, valid: float, *, before: float = 0.5, n: int = 400) -> str:
    """What is said of two phases whose last one answers these shares of `n` train and valid images right."""
    first, second = rows(1, 1, [(2.0, 2.0)], before), rows(2, 2, [(1.0, 1.0), (0.9, 1.1)], valid)
    for row in (first[0], second[0]):
        row |= {"train_accuracy": train, "train_images": float(n)}
    results = phase_results(first + second, [ALL, HEAD], "accuracy", n)
    return plain(gain_told(results[1]), *fit_told(results, [ALL, HEAD], "accuracy"))


def plain(*lines: str) -> str:
    return " ".join(lines).replace("\u00a0", " ")


def test_a_difference_of_shares_has_newcombes_interval() -> None:
    # Example (a) of Newcombe (1998), Statistics in Medicine 17, table II, method 10.
    found = difference(wilson(56, 70), wilson(48, 80))
    assert (round(found.value, 4), round(found.low, 4), round(found.high, 4)) == (0.2, 0.0524, 0.3339)


def test_over_and_underfitting_are_said_where_the_intervals_show_them() -> None:
    over = two_phases(1.0, 0.9)
    assert "Of 400 train images, as they are, 100.0 % (99.0 % to 100.0 %) are answered right" in over
    assert "Over-fitting: it does at least 7.3 points better" in over
    assert "Under-fitting" not in over
    under = two_phases(0.7, 0.69)
    assert "Under-fitting: at least 25.7 % of the train images are answered wrong too" in under
    assert "Over-fitting" not in under
    few = two_phases(1.0, 0.9, n=20)  # the same shares of images too few to show a gap
    assert "Neither over- nor under-fitting is shown" in few
    assert "Over-fitting" not in few
    assert "+40.0 points (+34.1 to +45.5): better" in over
    assert "+5.0 points (-23.9 to +32.8): no difference is shown" in two_phases(0.5, 0.5, before=0.45, n=20)
    assert "worse" in two_phases(0.5, 0.5, before=0.9)


def test_of_one_phase_the_curves_are_read_and_no_more() -> None:
    steady = ALL.model_copy(update={"fit": ALL.fit.model_copy(update={"schedule": "constant"})})

    def told(losses: list[tuple[float, float]], phase: Phase = steady) -> str:
        return plain(*fit_told(phase_results(rows(None, 1, losses, 0.9), [phase], "accuracy", 50), [phase], "accuracy"))

    rising = told([(1.0, 1.0), (0.5, 0.6), (0.1, 0.9)])
    assert "At the best epoch, 2 of 3, 90.0 % (78.6 % to 95.7 %) of 50 valid images are answered right" in rising
    assert (
        "point to over-fitting: by epoch 3 the train loss had fallen to 0.100 while the valid loss rose to 0.900" in rising
    )
    assert "The share of valid images answered right shows no difference" in rising
    falling = told([(1.0, 1.0), (0.5, 0.6), (0.4, 0.5)])
    assert "over-fitting" not in falling
    assert "lowest in the very last epoch" in falling
    # A rate that falls to nothing ends there in any case.
    assert "lowest in the very last epoch" not in told([(1.0, 1.0), (0.5, 0.6), (0.4, 0.5)], ALL)
    # Nor does a loss that is as good as nothing rise.
    assert "over-fitting:" not in told([(1.0, 1.0), (0.0005, 0.0002), (0.0001, 0.0008)])
    assert "lowest in the very last epoch" not in rising + told([(1.0, 1.0), (0.5, 0.6)])  # stopped by a killed schedule


def test_imbalance_is_said_beside_what_it_does_to_the_rarest_classes() -> None:
    def metrics(name: str, hits: int, support: int) -> ClassMetrics:
        return ClassMetrics(name=name, support=support, precision=None, recall=wilson(hits, support), f1=None)

    counts = {"cat": 900, "dog": 800, "owl": 30}
    per_class = [metrics("cat", 290, 300), metrics("dog", 260, 270), metrics("owl", 4, 10)]
    found = imbalance(counts, per_class, [HEAD], one_class=True)
    assert found.said == "The classes are not balanced: 900 train images of 'cat' and 30 of 'owl', 30.0 to 1."
    owl, others = map(plain, found.rare)
    assert owl == "'owl': recall 40.0 % (16.8 % to 68.7 %), n = 10; at least 27.7 points below the others"
    assert others == "all other classes together: recall 96.5 % (94.6 % to 97.7 %), n = 570"
    assert "sampling: balanced" in found.advice
    assert "sampling: balanced" not in imbalance(counts, per_class, [HEAD], one_class=False).advice
    met = HEAD.model_copy(update={"sampling": "balanced"})
    assert imbalance(counts, per_class, [met], one_class=True).advice.startswith("Balanced sampling or")
    per_class[2] = metrics("owl", 9, 10)
    unshown = imbalance(counts, per_class, [HEAD], one_class=True)
    assert "no difference is shown, and it may be up to 36.9 points below the others" in unshown.rare[0]
    assert "sampling: balanced" not in unshown.advice
    even = imbalance({"cat": 30, "owl": 20}, per_class, [HEAD], one_class=True)
    assert (even.said[:30], even.rare, even.advice) == ("The classes are about balanced", (), "")


def test_the_page_shows_what_each_phase_bought(phased: Path) -> None:
    html = Path(json.loads((phased / "summary.json").read_text())["report"]).read_text()
    assert re.search(r"1\. everything</td><td class=\"n\">1 to 2</td>", html)
    assert re.search(r"2\. the last block</td><td class=\"n\">3 to 6</td>", html)
    figure = html[html.index("<h2>Training</h2>") :].partition("</svg>")[0]
    assert all(f">{text}</text>" in figure for text in ("1. everything", "2. the last block", "best epoch"))
    assert "valid, against the phase before" in html
    assert re.search(r"Of \d+ train images, as they are, ", html)
    assert "The classes are not balanced" in html
    assert "all other classes together: recall" in html


def test_the_page_of_one_phase_speaks_of_no_phases(report: Path) -> None:
    html = report.read_text()
    assert "the phase before" not in html
    assert "At the best epoch" in html
    assert "The classes are about balanced: from " in html
