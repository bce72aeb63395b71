from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from bundles import evidence
from stores import s3_bucket

from components import releases
from components.contracts.errors import ConfigError, RegistryUnavailable, SchemaTooNew, StoreError, TamperedArtefact
from components.contracts.records import Stored
from components.contracts.releases import Release, Route, Routes
from components.objects import open_objects, safe_name
from components.releases import ReleaseStore
from components.store import MANIFEST, seal, unseal


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """Address of a bucket with conditional writes."""
    with s3_bucket("releases") as url:
        yield url


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ReleaseStore:
    if request.param == "folder":
        return ReleaseStore(str(tmp_path / "store"))
    bucket: str = request.getfixturevalue("bucket")
    return ReleaseStore(f"{bucket}/{tmp_path.name.replace('_', '-').replace('[', '').replace(']', '')}")


@pytest.fixture
def release(tmp_path: Path) -> Stored[Release]:
    from registry.models import release_in

    evidence(tmp_path, "m")
    return release_in(tmp_path / "m-d1", out=tmp_path / "release")


def routes(digest: str, generation: int) -> Routes:
    return Routes(
        model="m", generation=generation, routes=(Route(release=digest, version="1", role="champion", weight=1.0),)
    )


def overwrite(store: ReleaseStore, name: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "overwrite"
    path.write_bytes(data)
    store._objects.put(name, path)


def test_what_is_published_is_what_is_fetched(store: ReleaseStore, release: Stored[Release], tmp_path: Path) -> None:
    digest = store.publish(release)
    assert digest == release.record.digest()
    assert store.publish(release) == digest
    assert store.published("m") == [digest]
    assert store.verify("m", digest) == release.record
    fetched = store.fetch("m", digest, cache=tmp_path / "cache")
    assert fetched.record == release.record
    for file in release.record.files:
        assert (fetched.folder / file.name).read_bytes() == (release.folder / file.name).read_bytes()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [digest]


def test_a_fetched_release_needs_no_store(store: ReleaseStore, release: Stored[Release], tmp_path: Path) -> None:
    digest = store.publish(release)
    first = store.fetch("m", digest, cache=tmp_path / "cache")
    gone = ReleaseStore(str(tmp_path / "nowhere"))
    assert gone.fetch("m", digest, cache=tmp_path / "cache") == first


def test_every_flipped_file_is_refused_and_nothing_stays(
    store: ReleaseStore, release: Stored[Release], tmp_path: Path
) -> None:
    digest = store.publish(release)
    for file in (*release.record.files, None):
        name = f"releases/m/{digest}/{file.name if file else MANIFEST}"
        good = store._objects.read(name, most=1 << 20)
        assert good is not None
        for bad in (good[:-1], good + b"x", bytes([good[0] ^ 1]) + good[1:], b""):
            overwrite(store, name, bad, tmp_path)
            with pytest.raises(StoreError):
                store.fetch("m", digest, cache=tmp_path / "cache")
            with pytest.raises(StoreError):
                store.verify("m", digest)
        assert list((tmp_path / "cache").glob("*")) == []
        assert store.publish(release) == digest  # publishing again repairs
        assert store.verify("m", digest)


def test_a_bad_copy_of_our_own_is_fetched_anew(store: ReleaseStore, release: Stored[Release], tmp_path: Path) -> None:
    digest = store.publish(release)
    fetched = store.fetch("m", digest, cache=tmp_path / "cache")
    (fetched.folder / "engine" / "model.bin").write_bytes(b"another engine")
    again = store.fetch("m", digest, cache=tmp_path / "cache")
    assert (again.folder / "engine" / "model.bin").read_bytes() == b"engine of d1"


def test_a_release_that_was_never_published_is_said_to_be_missing(store: ReleaseStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="was not published to"):
        store.fetch("m", "a" * 64, cache=tmp_path / "cache")
    with pytest.raises(StoreError, match="visionloop reconcile"):
        store.verify("m", "a" * 64)
    assert store.routes("m") is None


def test_a_release_of_a_newer_schema_is_refused(store: ReleaseStore, release: Stored[Release], tmp_path: Path) -> None:
    digest = store.publish(release)
    name = f"releases/m/{digest}/{MANIFEST}"
    body = unseal(store._objects.read(name, most=1 << 20) or b"")
    assert body is not None
    body["record"]["schema_version"] = 99
    overwrite(store, name, seal(body), tmp_path)
    with pytest.raises(SchemaTooNew, match="schema version 99.*upgrade"):
        store.fetch("m", digest, cache=tmp_path / "cache")


def test_a_manifest_that_describes_another_release_is_refused(
    store: ReleaseStore, release: Stored[Release], tmp_path: Path
) -> None:
    digest = store.publish(release)
    name = f"releases/m/{digest}/{MANIFEST}"
    body = unseal(store._objects.read(name, most=1 << 20) or b"")
    assert body is not None
    body["record"]["decision"]["threshold"] = 0.0
    overwrite(store, name, seal(body), tmp_path)
    with pytest.raises(TamperedArtefact, match="describes another release"):
        store.fetch("m", digest, cache=tmp_path / "cache")


def test_routes_only_move_forward(store: ReleaseStore) -> None:
    assert store.move(routes("a" * 64, 5)).generation == 5
    assert store.move(routes("b" * 64, 3)).generation == 5
    assert store.routes("m") == routes("a" * 64, 5)
    store.move(routes("b" * 64, 6))
    assert store.routes("m") == routes("b" * 64, 6)


def test_routes_changed_by_hand_are_refused_and_replaced(store: ReleaseStore, tmp_path: Path) -> None:
    store.move(routes("a" * 64, 5))
    body = routes("e" * 64, 9).to_json()
    overwrite(store, "routes/m.json", json.dumps(body).encode(), tmp_path)
    with pytest.raises(TamperedArtefact, match="changed by hand.*reconcile --repair"):
        store.routes("m")
    store.move(routes("a" * 64, 5))
    assert store.routes("m") == routes("a" * 64, 5)


def test_racing_movers_end_with_the_latest_generation(store: ReleaseStore) -> None:
    threads = [threading.Thread(target=store.move, args=(routes(f"{g:064x}", g),)) for g in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = store.routes("m")
    assert found is not None
    assert found.generation == 8


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\b", "", "a\0b", ".."])
def test_a_name_with_tricks_is_refused(name: str) -> None:
    with pytest.raises(TamperedArtefact):
        safe_name(name)


@pytest.mark.parametrize("model", ["../m", "M", "", "a/b", "m" * 64, "%2e%2e"])
def test_a_model_name_with_tricks_is_refused(store: ReleaseStore, model: str) -> None:
    with pytest.raises(ConfigError):
        store.routes(model)


def test_a_release_that_claims_too_much_is_not_copied(
    store: ReleaseStore, release: Stored[Release], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.publish(release)
    monkeypatch.setattr(releases, "MAX_RELEASE_BYTES", 10)
    with pytest.raises(StoreError, match="more than 10 bytes"):
        store.fetch("m", digest, cache=tmp_path / "cache")


def test_s3_down_is_said_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    store = ReleaseStore("s3://bucket/prefix")
    with pytest.raises(RegistryUnavailable, match="s3://bucket/prefix does not answer"):
        store.routes("m")


@pytest.mark.parametrize("page", ["<html><body>Sign in<br></body></html>", "<html><body>ok</body></html>"])
@pytest.mark.parametrize("status", [200, 302, 403, 404])
def test_what_does_not_answer_as_s3_does_is_never_taken_for_content_or_for_none(
    status: int, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sign-in page of a network, with an ETag as web servers give one; botocore parses it only where it is XML."""

    class Page(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            given = {"Content-Type": "text/html", "Content-Length": str(len(page)), "ETag": '"1"', "Location": "/sign-in"}
            for name, value in given.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(page.encode())

        do_GET = do_PUT = do_HEAD = do_POST = _answer

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        own = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_ACCESS_KEY_ID": "k"}
        for name, value in (own | {"AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}).items():
            monkeypatch.setenv(name, value)
        objects = open_objects("s3://bucket/prefix")
        (tmp_path / "file").write_text("anything")
        requests: list[Callable[[], object]] = [
            lambda: ReleaseStore("s3://bucket/prefix").routes("m"),
            lambda: list(objects.chunks("a")),
            lambda: objects.digest("a"),
            lambda: objects.stamps(),
            lambda: objects.put("a", tmp_path / "file"),
            lambda: objects.swap("a", lambda _: b"new"),
        ]
        for request in requests:
            with pytest.raises(
                RegistryUnavailable, match=r"does not answer as S3 does .*Check the address in AWS_ENDPOINT_URL"
            ):
                request()
        server.shutdown()


def test_an_s3_that_takes_connections_and_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one request may take stays below 20 s; how often it is asked is counted."""
    from botocore.httpsession import URLLib3Session
    from urllib3.exceptions import ReadTimeoutError

    asked: list[str] = []
    allowed: list[float] = []

    def hang(self: object, method: str, url: str, **_: object) -> object:
        asked.append(url)
        raise ReadTimeoutError(None, url, "Read timed out.")  # type: ignore[arg-type]  # the pool is only kept

    def session(self: Any, *arguments: Any, **options: Any) -> None:
        allowed.append(sum(options["timeout"]))
        original(self, *arguments, **options)

    original = URLLib3Session.__init__
    monkeypatch.setattr(URLLib3Session, "__init__", session)
    monkeypatch.setattr("urllib3.connectionpool.HTTPConnectionPool.urlopen", hang)
    monkeypatch.setattr("time.sleep", lambda _: None)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "k")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with pytest.raises(RegistryUnavailable, match="does not answer: Read timeout"):
        ReleaseStore("s3://bucket/prefix").routes("m")
    assert 0 < len(asked) * max(allowed) <= 22


def test_a_full_disk_leaves_no_half_release(
    release: Stored[Release], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    store = ReleaseStore(str(tmp_path / "store"))
    digest = store.publish(release)
    real: Any = os.fsync

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="no space left"):
        store.fetch("m", digest, cache=tmp_path / "cache")
    monkeypatch.setattr(os, "fsync", real)
    assert list((tmp_path / "cache").iterdir()) == []
    assert store.fetch("m", digest, cache=tmp_path / "cache").record == release.record


def test_a_folder_whose_name_begins_alike_is_another_one(bucket: str, tmp_path: Path) -> None:
    from components.objects import open_objects

    path = tmp_path / "x"
    path.write_bytes(b"x")
    for prefix in ("img", "img-old", "img/deeper"):
        open_objects(f"{bucket}/{prefix}").put("b.jpg", path)
    assert list(open_objects(f"{bucket}/img").stamps()) == ["b.jpg", "deeper/b.jpg"]
    assert list(open_objects(f"{bucket}/img").stamps("deeper")) == ["deeper/b.jpg"]
