"""The page at `/` in a real browser, and what an abstention looks like there and everywhere else."""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from browser import Browser, browser
from served import MODEL, Server, png, publish, server, variant
from shapes import visionloop

from components.contracts.records import Stored
from components.contracts.releases import NEVER, CriticalClass, Release
from components.releases import ReleaseStore
from serving.protocols.auth import Tokens


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


def opened(window: Browser, running: Server, host: str = "127.0.0.1") -> None:
    window.open(f"http://{host}:{running.port}/")
    window.wait_for(lambda: "Asking" not in window.text("#about"))


def _says(window: Browser, words: str) -> bool:
    return words in window.text("#about")


def answered(window: Browser) -> dict[str, Any]:
    """What the page says of the last picture."""
    window.wait_for(lambda: window.text("#said") and "ing …" not in window.text("#said"))
    found: dict[str, Any] = window.script("""
        const heading = document.querySelector("#label"), rows = [...document.querySelectorAll("#said tr")];
        return {
            label: heading?.textContent, unsure: heading?.dataset.unsure, text: document.querySelector("#said").innerText,
            rows: rows.map((row) => [row.cells[0].textContent, row.querySelector(".bar").style.width, row.cells[2].textContent]),
        };
    """)
    return found


def test_a_picture_is_chosen_or_dropped_and_its_answer_is_seen(window: Browser, running: Server, tmp_path: Path) -> None:
    opened(window, running, "localhost")
    assert window.text("#about") == f"{MODEL}, version 1, answers."
    assert (window.text("#access"), window.text("#choice")) == ("", "")
    file = tmp_path / "picture.png"
    file.write_bytes(png("disc", 1))
    window.type("#file", str(file))
    said, told = answered(window), running.predict(file.read_bytes()).json
    assert (said["label"], said["unsure"]) == (("Unsure", "true") if told["unsure"] else ("disc", "false"))
    assert (said["rows"][0][0], told["predicted"]) == ("disc", "disc")
    assert f"Model {MODEL}, version 1, release " in said["text"]
    shown = [float(share.removesuffix(" %")) for _, _, share in said["rows"]]
    assert (len(shown), shown) == (3, sorted(shown, reverse=True))
    assert sum(shown) == pytest.approx(100, abs=0.2)
    assert [float(width.removesuffix("%")) for _, width, _ in said["rows"]] == pytest.approx(shown, abs=0.06)
    window.drop("cross.png", png("cross", 1))
    assert answered(window)["rows"][0][0] == "cross"
    window.screenshot(tmp_path / "page.png")
    window.drop("words.txt", b"no picture at all")
    assert "The server says: not an image" in answered(window)["text"]
    window.drop("large.png", bytes(3 << 20))
    assert "larger than 2097152 bytes" in answered(window)["text"]
    asked = window.script("return performance.getEntriesByType('resource').map((one) => new URL(one.name).host)")
    assert set(asked) == {f"localhost:{running.port}"}
    assert window.script("return [...document.querySelectorAll('nav a')].map((link) => link.pathname)") == [
        "/docs",
        "/metrics",
        "/status",
    ]
    assert not [line for line in window.complaints() if "400" not in line and "413" not in line]


def test_the_page_is_one_document_and_json_is_for_who_asks_for_it(running: Server) -> None:
    for accept in ("text/html,application/xhtml+xml,*/*;q=0.8", "*/*", "text/html, application/json"):
        page = running.ask("GET", "/", headers={"accept": accept})
        assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]
        assert not any(word in page.body for word in (b"http://", b"https://", b" src=", b"onclick"))
    told = running.ask("GET", "/", headers={"accept": "application/json"})
    assert (told.headers["content-type"], told.json["predict"], told.json["documentation"]) == (
        "application/json",
        "/predict",
        "/docs",
    )


def test_the_page_says_that_a_token_is_needed_and_takes_one(window: Browser, stage: Path) -> None:
    tokens = Tokens(stage / ".visionloop" / "serving" / "tokens.json")
    viewer, predictor = (tokens.issue(f"a-{role}", role) for role in ("viewer", "predictor"))
    with server(stage, "--require-token") as mine:
        opened(window, mine)
        assert "send a token" in window.text("#about")
        assert "visionloop token add NAME --role predictor" in window.text("#access")
        window.drop("disc.png", png("disc", 1))
        assert "send a token" in answered(window)["text"]
        for token, words in [("wrong", "not known here"), (viewer, "answers."), (predictor, "answers.")]:
            window.script("document.querySelector('#token').value = ''")
            window.type("#token", token)
            window.click("#access button")
            window.wait_for(functools.partial(_says, window, words))
            window.drop("disc.png", png("disc", 1))
            if token == viewer:
                assert "this token's role is viewer; this needs predictor" in answered(window)["text"]
        assert answered(window)["rows"][0][0] == "disc"


NAMES = ("unsure", 'nan, "null"\nÜbung', "constructor")
"""Classes that other people's formats would take for something else, in the place of cross, disc and stripes."""


def test_a_class_is_never_taken_for_an_abstention(
    window: Browser, stage: Path, smoke: Stored[Release], tmp_path: Path
) -> None:
    engine = smoke.record.engine
    assert engine.classes == ("cross", "disc", "stripes")
    renamed = engine.model_copy(update={"classes": NAMES})
    store = ReleaseStore(str(stage / ".visionloop" / "releases"))
    photos = tmp_path / "photos"
    photos.mkdir()
    for kind in engine.classes:
        (photos / f"{kind}.png").write_bytes(png(kind, 1))
    share = smoke.record.decision.coverage
    critical = CriticalClass(name=NAMES[1], rate=0.01, threshold=NEVER, valid=share, test=share, found=share)
    # Nothing is unsure, all is, and what names a critical class is.
    rules: list[tuple[float, tuple[CriticalClass, ...], list[bool]]] = [
        (0.0, (), [False] * 3),
        (1.0, (), [True] * 3),
        (0.0, (critical,), [False, True, False]),
    ]
    for generation, (threshold, classes, abstained) in enumerate(rules, start=2):
        labels = ["(unsure)" if unsure else name for name, unsure in zip(NAMES, abstained, strict=True)]
        version = str(generation)
        rule = smoke.record.decision.model_copy(update={"threshold": threshold, "critical": classes})
        publish(store, variant(smoke, tmp_path / version, decision=rule, engine=renamed), generation, version)
        with server(stage) as mine:
            parameters = mine.ask("GET", f"/v2/models/{MODEL}").json["parameters"]
            assert (parameters["label_when_unsure"], parameters["threshold"]) == ("(unsure)", threshold)
            assert parameters.get("class_thresholds") == ({NAMES[1]: NEVER} if classes else None)
            opened(window, mine)
            for kind, name, label, unsure in zip(engine.classes, NAMES, labels, abstained, strict=True):
                told = mine.predict(png(kind, 1)).json
                assert (told["label"], told["unsure"], told["predicted"]) == (label, unsure, name)
                window.drop(f"{kind}.png", png(kind, 1))
                said = answered(window)
                assert (said["label"], said["unsure"]) == ("Unsure" if unsure else name, str(unsure).lower())
                assert said["rows"][0][0] == name
                assert ("No answer:" in said["text"], f"“{name}”" in said["text"].replace("\xa0", " ")) == (unsure, unsure)
                # What is said to be needed is the threshold of the class, where it has one of its own.
                assert (", below the 100.0 % that an answer needs." in said["text"]) == unsure
            for library, port in ((triton_http, mine.port), (triton_grpc, mine.grpc_port)):
                client = library.InferenceServerClient(f"127.0.0.1:{port}")
                given = library.InferInput("images", [3], "BYTES")
                given.set_data_from_numpy(_files(photos))
                result = client.infer(MODEL, [given], outputs=[library.InferRequestedOutput("label")])
                assert [text.decode() for text in result.as_numpy("label")] == labels
                result = client.infer(MODEL, [given])
                assert result.as_numpy("unsure").tolist() == abstained
        out = tmp_path / f"out-{version}"
        assert visionloop("predict", str(photos), "--out", str(out), "-m", MODEL, cwd=stage).returncode == 0
        table = pd.read_parquet(next(out.glob("*.parquet")))
        assert (table["label"].tolist(), table["unsure"].tolist()) == (labels, abstained)
    log = tmp_path / "log.csv"
    done = visionloop("predictions", "export", str(log), cwd=stage)
    assert done.returncode == 0, done.stderr
    with log.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * (3 + 3 + 4 * 3)
    assert {(row["predicted"], row["unsure"]) for row in rows} == {
        (name, said) for name in NAMES for said in ("False", "True")
    }


def _files(folder: Path) -> Any:
    import numpy as np

    return np.array([path.read_bytes() for path in sorted(folder.iterdir())], dtype=np.object_)
