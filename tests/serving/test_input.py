"""What a server does with what it is sent: good pictures, hostile ones, and requests that are no requests."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from served import MODEL, Server, encoded, exif_rotated, header_bomb, jpeg, mutated, png
from shapes import KINDS, picture

INTERNALS = re.compile(
    r"/(?:work|tmp|root|home|usr)|\.py\b|Traceback|site-packages|(?:openvino|numpy|Pillow|uvicorn|starlette)", re.IGNORECASE
)


def assert_clean(body: bytes) -> None:
    """An error of ours: JSON, and nothing about the inside of the server."""
    told = json.loads(body)
    assert list(told) == ["error"]
    assert told["error"]
    assert not INTERNALS.search(body.decode()), body


def rss_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_gets_its_label(running: Server, kind: str, form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {"quality": 95} if form == "JPEG" else {}
    reply = running.predict(encoded(Image.fromarray(picture(kind, 7000)), form, **options), f"image/{form.lower()}")
    assert reply.status == 200
    told = reply.json
    assert (told["label"], told["predicted"], told["unsure"]) == (kind, kind, False)
    assert sum(told["probabilities"].values()) == pytest.approx(1.0, abs=1e-4)
    assert told["confidence"] == max(told["probabilities"].values())
    assert (told["model"], told["model_version"]) == (MODEL, "1")
    assert re.fullmatch(r"[0-9a-f]{32}", told["prediction_id"])


def test_a_form_upload_is_the_same_as_a_raw_one(running: Server) -> None:
    data = jpeg("cross")
    raw = running.predict(data, "image/jpeg").json
    boundary = "xyz"
    body = (
        f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="a.jpg"\r\n'
        f"content-type: image/jpeg\r\n\r\n".encode()
        + data
        + f"\r\n--{boundary}--\r\n".encode()
    )
    form = running.ask("POST", "/predict", body, {"content-type": f"multipart/form-data; boundary={boundary}"}).json
    assert form["probabilities"] == raw["probabilities"]
    assert form["prediction_id"] != raw["prediction_id"]


def test_ids_sort_as_they_were_made(running: Server) -> None:
    ids = []
    for seed in range(5):
        ids.append(running.predict(png("disc", 100 + seed)).json["prediction_id"])
        time.sleep(0.002)
    assert ids == sorted(ids)


@pytest.mark.parametrize(
    "data",
    [
        exif_rotated("stripes", 1),
        encoded(Image.fromarray(picture("disc", 1)).convert("CMYK"), "JPEG"),
        encoded(Image.fromarray(picture("disc", 1).astype(np.uint16) * 257), "PNG"),
        encoded(Image.fromarray(picture("disc", 1)).convert("RGBA"), "PNG"),
        encoded(Image.fromarray(picture("disc", 1)).convert("P"), "PNG"),
        encoded(Image.fromarray(picture("disc", 1)).convert("1"), "PNG"),
        encoded(Image.new("L", (1, 1)), "PNG"),
        encoded(Image.new("L", (3000, 2)), "PNG"),
    ],
    ids=["exif", "cmyk", "16 bit", "alpha", "palette", "1 bit", "one pixel", "very wide"],
)
def test_unusual_pictures_are_answered(running: Server, data: bytes) -> None:
    assert running.predict(data).status == 200


def test_a_rotated_picture_is_set_upright(running: Server) -> None:
    """Upright stripes stay stripes; the pixels that the engine saw are those of the upright picture."""
    upright = running.predict(encoded(Image.fromarray(picture("stripes", 9)), "JPEG", quality=95), "image/jpeg").json
    turned = running.predict(exif_rotated("stripes", 9), "image/jpeg").json
    assert turned["label"] == upright["label"] == "stripes"


def gif(frames: int) -> bytes:
    data = io.BytesIO()
    first, *rest = [Image.new("P", (8, 8), index % 255) for index in range(frames)]
    first.save(data, "GIF", save_all=True, append_images=rest)
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"hello", "not an image"),
        (jpeg()[:100], "damaged or truncated|not an image"),
        (jpeg()[:-200], "damaged or truncated"),
        (png("disc", 1)[:-30], "damaged or truncated"),
        (gif(10_000), "a GIF, which is not an accepted format"),
        (header_bomb("PNG"), "pixels, accepted are up to|more pixels"),
        (header_bomb("JPEG"), "pixels, accepted are up to|more pixels"),
        (header_bomb("WEBP"), "pixels, accepted are up to|more pixels|damaged"),
        (header_bomb("TIFF"), "pixels, accepted are up to"),
        (header_bomb("BMP"), "pixels, accepted are up to"),
        (encoded(Image.new("RGB", (16, 16)), "ICO"), "an icon, which is not an accepted format"),
        (b"%PDF-1.4 " + b"x" * 500, "a PDF, which is not an accepted format"),
    ],
    ids=[
        "empty",
        "text",
        "head only",
        "cut jpeg",
        "cut png",
        "gif",
        "png bomb",
        "jpeg bomb",
        "webp bomb",
        "tiff bomb",
        "bmp bomb",
        "ico",
        "pdf",
    ],
)
def test_what_is_no_picture_is_refused_with_a_reason(running: Server, data: bytes, why: str) -> None:
    (worker,) = running.engine_processes()
    before = rss_mb(worker)
    started = time.monotonic()
    reply = running.predict(data)
    assert reply.status == 400, reply.body
    assert re.search(why, reply.json["error"]), reply.body
    assert_clean(reply.body)
    assert rss_mb(worker) - before < 64
    assert time.monotonic() - started < 5
    assert running.engine_processes() == [worker]


def test_two_thousand_mutated_pictures_kill_nothing(running: Server) -> None:
    (worker,) = running.engine_processes()
    originals = [jpeg("disc", 1), jpeg("cross", 2), png("stripes", 3), png("disc", 4)]
    statuses: dict[int, int] = {}
    for seed in range(200):
        running.predict(mutated(originals[seed % 4], seed))
    before = rss_mb(worker), rss_mb(running.process.pid)
    for seed in range(2000):
        reply = running.predict(mutated(originals[seed % 4], seed))
        statuses[reply.status] = statuses.get(reply.status, 0) + 1
        if reply.status != 200:
            assert_clean(reply.body)
    assert set(statuses) == {200, 400}, statuses
    assert running.engine_processes() == [worker]
    assert running.figure("worker_restarts_total") == 0
    after = rss_mb(worker), rss_mb(running.process.pid)
    assert max(after[0] - before[0], after[1] - before[1]) < 48, (before, after)


def test_what_is_asked_wrongly_is_refused(running: Server) -> None:
    data = png("disc", 1)
    for path, headers, status in [
        ("/predict", {"content-type": "text/html"}, 415),
        ("/predict", {"content-type": "application/json"}, 415),
        ("/predict", {"content-type": "image/png", "content-encoding": "gzip"}, 415),
        ("/predict?top=0", {"content-type": "image/png"}, 400),
        ("/predict?top=x", {"content-type": "image/png"}, 400),
        ("/predict?top=%C2%B2", {"content-type": "image/png"}, 400),
        ("/predict?topp=3", {"content-type": "image/png"}, 400),
        ("/predict?top=3&top=4", {"content-type": "image/png"}, 400),
        ("/predict?model=nothing", {"content-type": "image/png"}, 404),
        ("/predict?model=..%2f..%2fetc", {"content-type": "image/png"}, 400),
        ("/predict", {"content-type": "image/png", "x-event-time": "yesterday"}, 400),
        ("/predict", {"content-type": "image/png", "x-event-time": "2999-01-01T00:00:00Z"}, 400),
        ("/predict", {"content-type": "image/png", "idempotency-key": "k" * 200}, 400),
        ("/predict", {"content-type": "multipart/form-data"}, 400),
        ("/predict", {"content-type": "multipart/form-data; boundary=a"}, 400),
        ("/nothing", {}, 404),
        ("/predict/", {"content-type": "image/png"}, 404),
        ("/v2/models/%2e%2e%2fx/infer", {}, 404),
        ("/v2/models/UPPER/infer", {}, 400),
        ("/v2/models/other/infer", {}, 404),
        (f"/v2/models/{MODEL}/versions/77/infer", {}, 404),
        ("/metrics", {}, 405),
    ]:
        reply = running.ask("POST", path, data, headers)
        assert reply.status == status, (path, headers, reply)
        assert_clean(reply.body)


def test_every_route_tells_its_methods(running: Server) -> None:
    for path, methods in (
        ("/predict", "OPTIONS, POST"),
        (f"/v2/models/{MODEL}/versions/1/infer", "OPTIONS, POST"),
        ("/status", "GET, HEAD, OPTIONS"),
        ("/", "GET, HEAD, OPTIONS"),
        ("/docs/assets/swagger-ui.css", "GET, HEAD, OPTIONS"),
    ):
        told = running.ask("OPTIONS", path)
        assert (told.status, told.headers["allow"], told.body) == (204, methods, b"")
        for method in {"PUT", "DELETE", "PATCH", "TRACE", "POST", "GET"} - set(methods.split(", ")):
            reply = running.ask(method, path)
            assert (reply.status, reply.headers["allow"]) == (405, methods), (method, path)
            assert_clean(reply.body)
        if "HEAD" in methods:
            head = running.ask("HEAD", path)
            assert (head.status, head.body) == (200, b"")
    for path in ("/docs/assets/%00", "/docs/assets/../../x", "/docs/assets/" + "a" * 300, "/%00", "//status", "/a?%zz=%00"):
        assert_clean(running.ask("GET", path).body)


@pytest.mark.parametrize(
    ("coding", "status"), [("Identity", 200), ("", 200), ("identity, IDENTITY", 200), ("br", 415), ("identity, gzip", 415)]
)
def test_a_body_that_is_not_compressed_may_say_so(running: Server, coding: str, status: int) -> None:
    reply = running.ask("POST", "/predict", png("disc", 1), {"content-type": "image/png", "content-encoding": coding})
    assert reply.status == status


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here; the upgrade that it asks for is tested without it")
def test_a_client_that_would_rather_speak_http_2_is_answered(running: Server, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png("disc", 1))
    command = ["curl", "-s", "--http2", "-H", "content-type: image/png", "--data-binary", f"@{tmp_path / 'x.png'}"]
    done = subprocess.run(
        [*command, f"http://127.0.0.1:{running.port}/predict"], capture_output=True, check=True, timeout=60
    )
    assert json.loads(done.stdout)["probabilities"] == running.predict(png("disc", 1)).json["probabilities"]


def test_a_form_with_a_thousand_parts_is_refused(running: Server) -> None:
    part = '--b\r\ncontent-disposition: form-data; name="f{}"; filename="x"\r\n\r\nx\r\n'
    body = ("".join(part.format(i) for i in range(1000)) + "--b--\r\n").encode()
    reply = running.ask("POST", "/predict", body, {"content-type": "multipart/form-data; boundary=b"})
    assert reply.status == 400
    assert_clean(reply.body)


def test_a_form_with_options_that_would_have_no_effect_is_refused(running: Server) -> None:
    part = '--b\r\ncontent-disposition: form-data; name="{}"{}\r\n\r\n'
    picture = part.format("file", '; filename="x"').encode() + png("disc", 1)
    for more, status in [(b"", 200), (f"\r\n{part.format('top', '')}1".encode(), 400)]:
        body = picture + more + b"\r\n--b--\r\n"
        reply = running.ask("POST", "/predict", body, {"content-type": "multipart/form-data; boundary=b"})
        assert (reply.status, "/predict?model=NAME&top=3" in reply.body.decode()) == (status, status == 400)


def test_a_body_over_the_limit_is_refused_whether_it_says_so_or_not(running: Server) -> None:
    big = b"\xff" * (3 << 20)
    reply = running.ask("POST", "/predict", b"", {"content-type": "image/jpeg", "content-length": str(1 << 30)})
    assert reply.status == 413
    assert_clean(reply.body)
    # A client that sends all of it all the same still reads why.
    assert running.ask("POST", "/predict", b"x" * (6 << 20), {"content-type": "image/jpeg"}).status == 413
    with socket.create_connection(("127.0.0.1", running.port)) as raw:
        raw.sendall(
            b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/jpeg\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        answer = b""
        with contextlib.suppress(OSError):  # it hangs up on us, as it may
            raw.sendall(f"{len(big):x}\r\n".encode() + big + b"\r\n0\r\n\r\n")
        raw.settimeout(10)
        with contextlib.suppress(OSError):
            answer = raw.recv(65536)
        assert answer == b"" or b" 413 " in answer.split(b"\r\n")[0]
    assert running.predict(png("disc", 3)).status == 200


@pytest.mark.parametrize(
    "garbage", [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"POST /predict HTTP/9.9\r\n\r\n", b"A" * 200_000]
)
def test_what_is_no_http_is_hung_up_on(running: Server, garbage: bytes) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as raw:
        try:
            raw.sendall(garbage)
            raw.shutdown(socket.SHUT_WR)
            answer = raw.recv(4096)
        except OSError:
            answer = b""
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert running.predict(png("disc", 3)).status == 200


def test_the_same_key_is_answered_the_same_and_once(running: Server) -> None:
    data = png("cross", 42)
    rows = running.figure("journal_rows_total")
    first = running.predict(data, idempotency_key="order-1").json
    again = running.predict(data, idempotency_key="order-1").json
    assert first == again
    assert running.figure("journal_rows_total") == rows + 1
    other = running.predict(png("disc", 42), idempotency_key="order-1")
    assert other.status == 422
    assert_clean(other.body)
    # A refusal is no answer: the key can be used again.
    assert running.predict(b"nonsense", idempotency_key="order-2").status == 400
    assert running.predict(data, idempotency_key="order-2").status == 200


def test_answers_are_remembered_by_the_pictures_that_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pictures a request with a key has: memory is bounded by all of them."""
    from serving.engines.frames import Form
    from serving.inference import Answered, Inference, Rejected
    from serving.log.captures import Captures
    from serving.log.journal import Journal, JournalConfig
    from serving.metrics import Metrics

    metrics = Metrics()
    inference = Inference({}, Journal(Path("j"), JournalConfig(), metrics), Captures(Path("c")), metrics)
    deployment = SimpleNamespace(model="m")
    answered: list[int] = []

    async def answer(_: object, pictures: list[tuple[Form, bytes]], **__: object) -> Answered:
        answered.append(len(pictures))
        if pictures[0][1] == b"refused":
            raise Rejected(503, "full")
        return Answered(deployment, "1", ())  # type: ignore[arg-type]

    monkeypatch.setattr(inference, "deployment", lambda *_: deployment)
    monkeypatch.setattr(inference, "_answer", answer)

    async def act() -> None:
        many = [(Form.ENCODED, b"x")] * 64
        for number in range(200):
            await inference.answer("m", None, many, protocol="http", key=f"many-{number}")
            with pytest.raises(Rejected):
                await inference.answer("m", None, [(Form.ENCODED, b"refused")], protocol="http", key="refused")
        assert inference._remembered_pictures == 64 * len(inference._remembered) <= 4000 + 64
        await inference.answer("m", None, many, protocol="http", key="many-199")
        assert len(answered) == 400  # the newest is remembered,
        await inference.answer("m", None, many, protocol="http", key="many-0")
        assert len(answered) == 401  # the oldest is not
        for number in range(5000):
            await inference.answer("m", None, many[:1], protocol="http", key=f"one-{number}")
        assert 3900 < len(inference._remembered) <= 4001

    asyncio.run(act())


def test_a_page_in_a_browser_does_not_speak_for_the_person_before_it(running: Server) -> None:
    reply = running.ask("POST", "/predict", png("disc", 1), {"content-type": "image/png", "host": "evil.example"})
    assert reply.status == 403
    assert_clean(reply.body)
    for host in ("localhost", f"127.0.0.1:{running.port}", "[::1]:80"):
        assert running.ask("GET", "/status", headers={"host": host}).status == 200


def test_pages_and_figures(running: Server) -> None:
    assert running.ask("GET", "/v2/health/live").json == {"live": True}
    assert running.ask("GET", "/v2/health/ready").json == {"ready": True}
    page = running.ask("GET", "/docs").body.decode()
    assert "http://" not in page.replace("http://localhost", "")
    assert "https://" not in page
    for asset in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert running.ask("GET", asset).status == 200
    assert running.figure("request_seconds_count") > 0
    assert running.figure("generation") == 1


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium here; the page is looked at where there is one")
def test_the_page_of_the_routes_works_in_a_browser(running: Server, tmp_path: Path) -> None:
    """With the package's own scripts and nothing from anywhere else."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000"]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path}", "--dump-dom", f"http://127.0.0.1:{running.port}/docs"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    for shown in ("visionloop serving", "Upload one picture and get its label", "/v2/models/{model}/infer", "Prediction"):
        assert shown in done.stdout


def test_the_specification_names_every_route_and_no_other() -> None:
    from serving.inference import Inference
    from serving.log.captures import Captures
    from serving.log.journal import Journal, JournalConfig
    from serving.metrics import Metrics
    from serving.protocols.access import Access
    from serving.protocols.auth import Tokens
    from serving.protocols.http import Http, routes_of, specification

    metrics = Metrics()
    inference = Inference({}, Journal(Path("j"), JournalConfig(), metrics), Captures(Path("c")), metrics)
    http = Http(inference, Access(Tokens(Path("t")), required=True), max_body=1, status=dict)
    document = specification()
    named = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert named == routes_of(http.application())
    text = json.dumps(document)
    for reference in re.findall(r'"#/components/schemas/(\w+)"', text):
        assert reference in document["components"]["schemas"]


def test_headers_are_bounded(running: Server) -> None:
    for count, size in [(101, 10), (10, 5000)]:
        reply = running.ask("GET", "/v2/health/live", headers={f"x-{i}": "a" * size for i in range(count)})
        assert reply.status == 431
        assert_clean(reply.body)


def test_a_page_of_another_site_is_refused(running: Server) -> None:
    data = png("disc", 1)
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}, {"origin": "null"}):
        assert running.ask("POST", "/predict", data, {"content-type": "image/png", **headers}).status == 403
        assert running.ask("POST", "/admin/refresh", headers=headers).status == 403
    own = {"origin": f"http://127.0.0.1:{running.port}", "sec-fetch-site": "same-origin", "content-type": "image/png"}
    assert running.ask("POST", "/predict", data, own).status == 200


def test_what_came_through_a_proxy_is_refused_where_no_token_is_asked_for(running: Server) -> None:
    for name in ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via"):
        headers = {"content-type": "image/png", name: "203.0.113.9"}
        reply = running.ask("POST", "/predict", png("disc", 1), headers)
        assert (reply.status, "--require-token" in reply.json["error"]) == (403, True), name


def test_who_has_no_token_learns_no_names(running: Server) -> None:
    reply = running.ask("GET", "/v2/models/other/ready")
    assert reply.status == 404
    assert reply.json == {"error": "no such model or version is served here"}


def test_pipelined_requests_are_answered_in_their_order(running: Server) -> None:
    data = png("cross", 5)
    one = f"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\ncontent-length: {len(data)}\r\n\r\n"
    big = "POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: text/html\r\ncontent-length: 3\r\n\r\nabc"
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as raw:
        raw.sendall(one.encode() + data + big.encode() + one.encode() + data)
        answer = b""
        while answer.count(b"HTTP/1.1 ") < 3 or not answer.endswith(b"}"):
            answer += raw.recv(65536)
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"415", b"200"]


def test_a_client_that_hangs_up_leaves_its_key_with_its_answer(running: Server) -> None:
    data = png("stripes", 77)
    head = f"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\nidempotency-key: gone\r\ncontent-length: {len(data)}\r\n\r\n"
    rows = running.figure("journal_rows_total")
    with socket.create_connection(("127.0.0.1", running.port)) as raw:
        raw.sendall(head.encode() + data)
    deadline = time.monotonic() + 10
    while running.figure("journal_rows_total") == rows:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert running.predict(data, idempotency_key="gone").status == 200
    assert running.figure("journal_rows_total") == rows + 1
