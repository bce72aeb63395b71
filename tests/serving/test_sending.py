"""Kept images on their way from a server's own folder to the address where they are kept: none is lost, none is there twice."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from failpoints import Died, Failpoints
from served import png, server
from shapes import KINDS, visionloop
from stores import s3_bucket

from components.contracts.errors import ConfigError, RegistryUnavailable, StoreError
from components.objects import open_objects
from serving.log import sending
from serving.log.capture_store import CaptureStore
from serving.log.captures import CaptureConfig, Captures
from serving.metrics import Metrics


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket("kept") as found:
        yield found


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, bucket: str) -> str:
    """An address where images are kept."""
    return f"{bucket}/{uuid.uuid4().hex}" if request.param == "s3" else str(tmp_path / "kept")


def image(number: int) -> tuple[str, bytes]:
    data = f"image {number}".encode()
    return hashlib.sha256(data).hexdigest(), data


IMAGES = dict(image(number) for number in range(12))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A server's own folder with images that wait."""
    folder = tmp_path / "own"
    captures = Captures(folder, CaptureConfig(share=1.0, url="elsewhere"))
    for sha256, data in IMAGES.items():
        assert captures.keep(sha256, data)
    return folder


def send(own: Path, url: str, *, retain_days: float = 30.0) -> int:
    return sending.send_all(own, url, retain_days=retain_days)


def test_what_waits_is_sent_and_is_one_wherever_it_was_asked(own: Path, url: str) -> None:
    here, there = CaptureStore(str(own)), CaptureStore(url)
    assert send(own, url) == len(IMAGES)
    assert (here.names(), there.names()) == (set(), set(IMAGES))
    assert {sha256: there.read(sha256) for sha256 in IMAGES} == IMAGES
    assert send(own, url) == 0
    first, *_ = IMAGES
    # Asked again, also where its bytes went bad meanwhile; and one that went bad before it was sent.
    Captures(own, CaptureConfig(share=1.0, url=url)).keep(first, IMAGES[first])
    there.write(first, b"damaged")
    damaged = image(77)[0]
    here.write(damaged, b"other bytes")
    assert there.verify() == [f"{first} is not the image it is named after"]
    assert send(own, url) == 1
    assert (there.names(), there.verify()) == (set(IMAGES), [])
    assert here.verify() == [f"{damaged} is not the image it is named after"]


PLACES = [(CaptureStore, name) for name in ("take_over", "read", "write", "digest", "erased", "remove")]


def test_a_sender_that_dies_anywhere_loses_nothing(own: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_AT_ONCE", 1)
    died = set()
    for nth in range(1, 200):
        with monkeypatch.context() as patch:
            points = Failpoints(PLACES, nth=nth, when="after")
            points(patch)
            with contextlib.suppress(Died):
                send(own, url)
        died.add(points.hit)
        here, there = CaptureStore(str(own)), CaptureStore(url)
        whole = {sha256 for sha256 in IMAGES for store in (here, there) if store.digest(sha256) == sha256}
        assert whole == set(IMAGES)
        if not points.hit:
            break
    assert died == {"", *(name for _, name in PLACES)}
    assert (here.names(), there.names()) == (set(), set(IMAGES))


def test_what_an_address_does_not_give_back_stays(own: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(CaptureStore, "write", lambda *_: None)
        with pytest.raises(StoreError, match="is not what was sent there; the image waits here"):
            send(own, url)
    assert CaptureStore(str(own)).names() == set(IMAGES)


def test_an_address_that_is_away_takes_a_moment_and_images_wait_as_long_as_there_is_room(
    own: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = f"{bucket}/away", []
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        patch.setattr(CaptureStore, "digest", lambda *_: asked.append(1))
        with pytest.raises(RegistryUnavailable, match="does not answer"):
            send(own, url)
    assert (CaptureStore(str(own)).names(), asked) == (set(IMAGES), [])
    # Away from the first image on: the others are not tried one after the other.
    with monkeypatch.context() as patch:
        patch.setattr(CaptureStore, "write", lambda *_: asked.append(1) or _away())  # type: ignore[func-returns-value]
        with pytest.raises(RegistryUnavailable):
            send(own, url)
    assert len(asked) <= sending._AT_ONCE
    assert CaptureStore(str(own)).names() == set(IMAGES)
    metrics = Metrics()
    waiting = sum(map(len, IMAGES.values()))
    captures = Captures(own, CaptureConfig(share=1.0, url=url, max_waiting_bytes=waiting + 20), metrics)
    assert [captures.keep(*image(number)) for number in (20, 21, 22)] == [True, True, False]
    assert b"visionloop_missed_images_total 1.0" in metrics.text()
    assert send(own, url) == 14
    captures._counted_at = 0.0
    assert captures.keep(*image(22))
    assert b"visionloop_waiting_image_bytes 0.0" in metrics.text()


def _away() -> None:
    raise RegistryUnavailable("the address does not answer")


def test_what_was_erased_elsewhere_is_neither_sent_nor_kept_again(own: Path, url: str) -> None:
    first, second, third, *_ = IMAGES
    here, there = CaptureStore(str(own)), CaptureStore(url)
    record = there.erase(first, by="ann", reason="asked for")
    assert not record["found"]
    here.erase(second, by="bob", reason="asked for")
    assert send(own, url) == len(IMAGES) - 2
    for store in (here, there):
        assert store.erased().keys() == {first, second}
        assert store.verify() == []
    assert there.names() == set(IMAGES) - {first, second}
    captures = Captures(own, CaptureConfig(share=1.0, url=url))
    assert not captures.keep(first, IMAGES[first])
    # A server that has not heard of it keeps it once more, and it goes no farther.
    there.erase(third, by="ann", reason="asked for")
    assert captures.keep(third, IMAGES[third])
    assert send(own, url) == 0
    assert (here.names(), third in there.names()) == (set(), False)


def test_an_image_that_is_erased_while_it_is_sent_is_gone(own: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *_ = IMAGES
    real = CaptureStore.digest

    def erased_meanwhile(self: CaptureStore, sha256: str) -> Any:
        found = real(self, sha256)
        if sha256 == first and found is not None:
            there = CaptureStore(url)
            there.erase(first, by="ann", reason="asked for")
            there.write(first, IMAGES[first])  # the erasure removed what was there before this came
        return found

    monkeypatch.setattr(CaptureStore, "digest", erased_meanwhile)
    send(own, url)
    assert CaptureStore(url).names() == set(IMAGES) - {first}
    # A sender that was killed there leaves it in both places.
    monkeypatch.undo()
    CaptureStore(url).write(first, IMAGES[first])
    CaptureStore(str(own)).take_over(CaptureStore(url).lines())
    CaptureStore(str(own)).write(first, IMAGES[first])
    send(own, url)
    assert (CaptureStore(url).verify(), CaptureStore(str(own)).names()) == ([], set())


def test_the_record_of_erasures_goes_on_at_an_address(own: Path, url: str, tmp_path: Path) -> None:
    here, there = CaptureStore(str(own)), CaptureStore(url)
    for sha256 in list(IMAGES)[:3]:
        here.erase(sha256, by="ann", reason="asked for")
    send(own, url)
    assert there.erasures() == here.erasures()  # the head that somebody wrote down
    other = CaptureStore(str(tmp_path / "other"))
    other.erase(image(50)[0], by="bob", reason="asked for")
    send(tmp_path / "other", url)
    send(own, url)
    assert there.erasures()[0] == 4
    assert there.erased().keys() == here.erased().keys() == other.erased().keys()
    assert {line["by"] for line in there.lines()} == {"ann", "bob"}


def test_an_erasure_that_is_taken_over_leaves_no_image_however_that_ends(
    own: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = IMAGES
    here, there = CaptureStore(str(own)), CaptureStore(url)
    send(own, url)
    here.erase(first, by="ann", reason="asked for, before the server had an address")
    assert first in there.names()
    with monkeypatch.context() as patch:
        Failpoints([(CaptureStore, "_record")], nth=1, when="after")(patch)
        with pytest.raises(Died):
            send(own, url)
    assert there.erased().keys() == {first}
    send(own, url)
    assert there.verify() == []


def test_no_version_of_an_erased_image_is_left_in_a_bucket_that_keeps_versions(own: Path, bucket: str) -> None:
    import boto3

    client = boto3.client("s3")
    client.put_bucket_versioning(Bucket="kept", VersioningConfiguration={"Status": "Enabled"})
    try:
        there = CaptureStore(f"{bucket}/versions")
        sha256, data = image(1)
        for content in (b"older", data):
            there.write(sha256, content)
        there.erase(sha256, by="ann", reason="asked for")
        found = client.list_object_versions(Bucket="kept", Prefix=f"versions/{sha256[:2]}/")
        assert (found.get("Versions"), found.get("DeleteMarkers")) == (None, None)
        # And of one that was on its way.
        first, *_ = IMAGES
        with pytest.MonkeyPatch.context() as patch:
            real = CaptureStore.write

            def write(self: CaptureStore, sha256: str, data: bytes) -> None:
                if sha256 == first and self.url == there.url:
                    CaptureStore(there.url).erase(first, by="ann", reason="asked for")
                real(self, sha256, data)

            patch.setattr(CaptureStore, "write", write)
            send(own, there.url)
        found = client.list_object_versions(Bucket="kept", Prefix=f"versions/{first[:2]}/{first}")
        assert (found.get("Versions"), found.get("DeleteMarkers")) == (None, None)
    finally:
        client.put_bucket_versioning(Bucket="kept", VersioningConfiguration={"Status": "Suspended"})


def test_what_is_old_at_an_address_is_removed_once_an_hour(own: Path, url: str) -> None:
    there, swept = CaptureStore(url), own / ".swept"
    send(own, url)
    there.erase(image(99)[0], by="ann", reason="asked for")
    send(own, url, retain_days=0)  # an hour has not passed since it was looked there
    assert there.names() == set(IMAGES)
    os.utime(swept, (0, 0))
    send(own, url, retain_days=1)
    assert there.names() == set(IMAGES)
    os.utime(swept, (0, 0))
    send(own, url, retain_days=0)
    assert there.names() == set()
    assert there.erasures()[0] == 1


def test_an_image_that_came_anew_while_the_old_ones_were_listed_stays(
    own: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *_ = IMAGES
    there = CaptureStore(url)
    send(own, url)
    listed = dict.fromkeys(there._objects.written(), 0.0)
    # The list says that all of them are old; one of them was sent anew since, another one removed.
    monkeypatch.setattr(there._objects, "written", lambda *_: listed)
    there.remove(second)
    real = there._objects.written_at
    new = f"{first[:2]}/{first}"
    monkeypatch.setattr(
        there._objects, "written_at", lambda name: real(name) if name in (new, f"{second[:2]}/{second}") else 0.0
    )
    assert there.sweep(1) == len(IMAGES) - 2
    assert there.names() == {first}


def test_a_server_s_own_folder_by_another_path_is_no_address(own: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(own)
    with pytest.raises(ConfigError, match="is the server's own folder by another path"):
        send(own, str(tmp_path / "link"))
    assert CaptureStore(str(own)).names() == set(IMAGES)


def test_what_is_no_folder_is_said(own: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    there = CaptureStore(str(tmp_path / "file"))
    for refused in (
        lambda: send(own, there.url),
        there.verify,  # not the same as a folder in which nothing is wrong
        lambda: there.erase(image(1)[0], by="ann", reason="asked for"),
    ):
        with pytest.raises(RegistryUnavailable, match="cannot be"):
            refused()
    assert CaptureStore(str(own)).names() == set(IMAGES)


def test_images_that_leave_while_they_are_verified_are_no_problem(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def left(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr("components.objects.sha256_file", left)
    assert CaptureStore(str(own)).verify() == []


def test_images_reach_the_address_though_their_server_is_killed(stage: Path, bucket: str) -> None:
    address = f"{bucket}/{uuid.uuid4().hex}"
    env = {"VISIONLOOP_CAPTURES": address}
    own, there = stage / ".visionloop" / "serving" / "captures", CaptureStore(address)
    asked = {hashlib.sha256(data).hexdigest(): data for data in (png(KINDS[n % 3], n) for n in range(12))}
    with server(stage, "--capture-share", "1", env=env | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}) as mine:
        for data in list(asked.values())[:8]:
            assert mine.predict(data).status == 200
        mine.wait_for(lambda: mine.figure("captured_images_total") == 8)
        mine.wait_for(lambda: any("sending of kept images failed; the images wait here" in line for line in mine.told))
        mine.process.kill()
        mine.process.wait(30)
    assert (CaptureStore(str(own)).names(), there.names()) == (set(list(asked)[:8]), set())
    with server(stage, "--capture-share", "1", env=env) as mine:
        mine.wait_for(lambda: len(there.names()) == 8)
        for data in list(asked.values())[8:]:
            assert mine.predict(data).status == 200
        assert mine.stop() == 0  # what waits then is sent before it ends
    assert (CaptureStore(str(own)).names(), there.names()) == (set(), set(asked))
    first, *_ = asked
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISIONLOOP_CAPTURES", address)
        done = visionloop("predictions", "erase", first, "--as", "ann", "--reason", "asked for", cwd=stage)
        assert "It was kept and is removed" in done.stdout, done.stderr
        assert visionloop("predictions", "verify", cwd=stage).returncode == 0
        open_objects(address).write(f"{first[:2]}/{first}", asked[first])
        found = visionloop("predictions", "verify", cwd=stage)
        assert (found.returncode, f"{first} was erased and is there" in found.stdout) == (1, True)
    assert first not in CaptureStore(str(own)).names()
