"""Downloads of weights: bounded, whole, and of the digest that is named, or nothing is kept."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from components.contracts.errors import WeightsUnavailable
from components.weights import download

_BODY = b"weights" * 1000


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(_BODY) + (10 if "short" in self.path else 0)))
        self.end_headers()
        self.wfile.write(_BODY)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_only_a_whole_download_of_the_named_digest_is_kept(address: str, tmp_path: Path) -> None:
    sha256 = hashlib.sha256(_BODY).hexdigest()
    for name, digest, limit, why in (
        ("other", "0" * 64, 10**6, "expected 0000000000000000...; it was not kept"),
        ("long", sha256, 6999, "longer than 6,999 bytes; nothing of it was kept"),
        ("short", sha256, 10**6, "ended after 7,000 of 7010 bytes|cannot download"),
    ):
        with pytest.raises(WeightsUnavailable, match=why):
            download(f"{address}/{name}", sha256=digest, cache=tmp_path, max_bytes=limit)
        assert not list((tmp_path / "downloads").iterdir())
    kept = download(f"{address}/good", sha256=sha256[:8], cache=tmp_path, max_bytes=7000)
    assert kept.read_bytes() == _BODY
