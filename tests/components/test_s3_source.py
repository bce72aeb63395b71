"""A bucket becomes class folders, goes on after anything that ends a transfer, and says what is wrong with it."""

from __future__ import annotations

import functools
import http.client
import http.server
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import boto3
import pytest
from failpoints import Died, Failpoints
from moto.s3.models import s3_backends
from shapes import visionloop, write_pictures
from stores import s3_bucket

from components import foreign_files
from components.contract_checks import source_breaches
from components.contracts.errors import DataError, SourceUnavailable
from components.sources.s3 import Source

Fault = Literal["", "cut", "shorter", "other bytes", "no checksum", "away", "denied", "page"]
DENIED = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'


class Between(http.server.ThreadingHTTPServer):
    """Stands before the server of a bucket; by the path of a request it does something else than to pass it on."""

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server = server.removeprefix("http://")
        self.fault: Callable[[str], Fault] = lambda _: ""
        self.asked: list[str] = []
        """Objects that were asked for, those of listings not."""

    def handle_error(self, *_: Any) -> None:
        return None  # that a client hangs up is what is tested


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Between

    def do_GET(self) -> None:
        if "list-type" not in self.path:
            self.server.asked.append(self.path.partition("?")[0])
        fault = self.server.fault(self.path)
        if fault == "away":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        onward = http.client.HTTPConnection(self.server.server)
        onward.request("GET", self.path, headers=dict(self.headers))
        answer = onward.getresponse()
        status, headers, body = answer.status, answer.getheaders(), answer.read()
        onward.close()
        if fault in ("denied", "page"):
            body = DENIED if fault == "denied" else b"<html>Please sign in</html>"
            kind = "application/xml" if fault == "denied" else "text/html"
            status, headers = (
                (403 if fault == "denied" else 200),
                [("Content-Length", str(len(body))), ("Content-Type", kind)],
            )
        elif fault == "shorter":
            status, body = 200, body[:-1]
            headers = [
                ("Content-Length", str(len(body))),
                *((name, value) for name, value in headers if name.lower() == "etag"),
            ]
        elif fault in ("other bytes", "no checksum"):
            body = bytes([body[0] ^ 1]) + body[1:]
            left_out = "x-amz-checksum" if fault == "no checksum" else "nothing"
            headers = [(name, value) for name, value in headers if not name.lower().startswith(left_out)]
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        self.close_connection = fault == "cut"

    def log_message(self, *_: Any) -> None:
        return None


def _only(part: str, fault: Fault, path: str) -> Fault:
    return fault if part in path else ""


class Bucket:
    """A bucket behind what can fail, and the pictures below its prefix `set`."""

    def __init__(self, client: Any, between: Between) -> None:
        self.client, self.between = client, between
        self.files: dict[str, bytes] = {}

    def put(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket="photos", Key=f"set/{name}", Body=content)
        self.files[name] = content

    def asked(self) -> list[str]:
        """Names that were asked for since the last time."""
        found = sorted(path.removeprefix("/photos/set/") for path in self.between.asked)
        self.between.asked.clear()
        return found


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    write_pictures(tmp_path / "pictures", 8, kinds=("cross", "disc"))
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "5")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with s3_bucket("photos"):
        s3_backends["123456789012"]["aws"].buckets["photos"].keys.clear()  # of the test before
        between = Between(os.environ["AWS_ENDPOINT_URL"])
        found = Bucket(boto3.client("s3"), between)
        for path in sorted((tmp_path / "pictures").rglob("*.png")):
            found.put(path.relative_to(tmp_path / "pictures").as_posix(), path.read_bytes())
        thread = threading.Thread(target=between.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{between.server_port}")
        yield found
        between.shutdown()
        between.server_close()
        thread.join()


def source(**settings: Any) -> Source:
    return Source(address="s3://photos/set/", **{"workers": 2} | settings)


def written(out: Path) -> dict[str, bytes]:
    files = {path.relative_to(out).as_posix(): path for path in sorted(out.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(f"{foreign_files.RECEIVED}/")}


def refused(out: Path, **settings: Any) -> str:
    out.mkdir(exist_ok=True)
    with pytest.raises(DataError) as caught:
        source(**settings).fetch(out=out)
    assert [place for place in out.iterdir() if not place.name.startswith(".")] == []
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


def test_a_prefix_becomes_class_folders_page_by_page(bucket: Bucket, tmp_path: Path) -> None:
    assert Source.takes("s3://photos/set")
    bucket.client.put_object(Bucket="photos", Key="set/disc/", Body=b"")
    bucket.client.put_object(Bucket="photos", Key="set2/disc/other.png", Body=b"of a prefix that begins alike")
    bucket.client.put_object(Bucket="photos", Key="set/disc/summed.png", Body=b"with a checksum", ChecksumAlgorithm="SHA256")
    (tmp_path / "out").mkdir()
    source().fetch(out=tmp_path / "out")
    found = written(tmp_path / "out")
    assert found.pop("disc/summed.png") == b"with a checksum"
    assert found == bucket.files
    bucket.client.delete_object(Bucket="photos", Key="set/disc/summed.png")
    assert not list(source_breaches(source(), "s3"))


def test_data_add_goes_on_where_the_server_went_away_in_the_middle(bucket: Bucket, workspace: Path) -> None:
    pinned = (workspace / "data.dvc").read_bytes()
    last = "set/disc/0005.png"
    away = threading.Event()

    def fault(path: str) -> Fault:
        if last in path:
            away.set()
            return "cut"
        return "away" if away.is_set() else ""

    bucket.between.fault = fault
    add = ("data", "add", "s3://photos/set", "--source-setting", "workers=1")
    done = visionloop(*add, cwd=workspace)
    assert done.returncode == 2
    assert "13 of 16 objects are here and are kept; run the same command again, it goes on" in done.stderr
    assert (workspace / "data.dvc").read_bytes() == pinned
    bucket.asked()
    bucket.between.fault = lambda _: ""
    done = visionloop(*add, cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert bucket.asked() == ["disc/0005.png", "disc/0006.png", "disc/0007.png"]
    # The workspace has cross/0000 to 0059 of the same names and bytes.
    assert {name for name in bucket.files if (workspace / "data" / name).read_bytes() != bucket.files[name]} == set()
    assert not list((workspace / ".visionloop" / "tmp").glob("source-*"))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("place", "nth"), [((os, "replace"), 4), ((foreign_files, "linked"), 1), ((foreign_files, "linked"), 16)]
)
def test_a_transfer_that_was_killed_keeps_what_is_whole_and_what_is_listed(
    bucket: Bucket,
    tmp_path: Path,
    place: tuple[object, str],
    nth: int,
    when: Literal["before", "after"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with monkeypatch.context() as patched:
        Failpoints([place], nth=nth, when=when)(patched)
        with pytest.raises(Died):
            source(workers=1).fetch(out=out)
    kept = {path.name for path in out.rglob("*.png")}
    assert len(kept) >= 3
    # Of what is kept one is another one there now, one is gone there, and one was changed here.
    bucket.put("cross/0000.png", b"another")
    bucket.client.delete_object(Bucket="photos", Key="set/cross/0001.png")
    del bucket.files["cross/0001.png"]
    here = next(out.rglob("cross/0002.png"))
    here.write_bytes(bytes(here.stat().st_size))
    before = {name for name in bucket.files if list(out.rglob(name))}
    bucket.asked()
    source().fetch(out=out)
    assert written(out) == bucket.files
    assert bucket.asked() == sorted((bucket.files.keys() - before) | {"cross/0000.png", "cross/0002.png"})


def test_an_object_whose_etag_says_nothing_is_kept_by_its_own_digest(bucket: Bucket, tmp_path: Path) -> None:
    def upload() -> None:
        named = {"Bucket": "photos", "Key": "set/disc/parts.png"}
        named["UploadId"] = bucket.client.create_multipart_upload(**named)["UploadId"]
        part = bucket.client.upload_part(**named, PartNumber=1, Body=b"parts")
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        bucket.client.complete_multipart_upload(**named, MultipartUpload=parts)

    def another(path: str) -> Fault:
        if "parts" in path:  # of as many bytes, put there since the prefix was listed
            s3_backends["123456789012"]["aws"].put_object("photos", "set/disc/parts.png", b"other")
        return ""

    upload()
    out = tmp_path / "out"
    for name in list(bucket.files):
        if name not in ("cross/0000.png", "disc/0000.png"):
            bucket.client.delete_object(Bucket="photos", Key=f"set/{name}")
    bucket.client.copy_object(Bucket="photos", CopySource="photos/set/cross/0000.png", Key="set/zebra/0000.png")
    bucket.between.fault = lambda path: "shorter" if "parts" in path else ""
    assert "set/disc/parts.png has 4 bytes, and 5 are listed, 3 times" in refused(out, workers=1)
    bucket.between.fault = another
    told = refused(out, workers=1)
    assert "set/disc/parts.png: an object is another one since it was listed; run the same command again" in told
    upload()
    bucket.between.fault = lambda path: "away" if "zebra" in path else ""
    assert "3 of 4 objects are here" in refused(out)
    bucket.asked()
    bucket.between.fault = lambda _: ""
    source().fetch(out=out)
    assert bucket.asked() == ["zebra/0000.png"]
    assert (out / "disc" / "parts.png").read_bytes() == b"parts"


def test_other_bytes_than_s3_says_never_count(bucket: Bucket, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kinds: dict[Fault, str] = {"other bytes": "checksum", "no checksum": "ETag"}
    for kind, what in kinds.items():
        bucket.between.fault = functools.partial(_only, "disc/0003", kind)
        told = refused(out)
        assert f"s3://photos/set/disc/0003.png came with other bytes than its {what} is of, 3 times" in told
        assert not list(out.rglob("disc/0003.png"))
    faults: list[Fault] = ["cut", "other bytes"]
    bucket.between.fault = lambda path: faults.pop() if faults and "disc/0003" in path else ""
    source().fetch(out=out)
    assert written(out) == bucket.files


def test_what_does_not_work_says_what_to_do(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    bucket.between.fault = lambda _: "denied"
    assert "access is denied; the credentials need s3:ListBucket" in refused(out)
    bucket.between.fault = lambda path: "denied" if "cross/0000" in path else ""
    assert "s3://photos/set/cross/0000.png: access is denied" in refused(out)
    bucket.between.fault = lambda _: "page"
    assert "does not answer as S3 does" in refused(out)
    bucket.between.fault = lambda _: ""
    for name in bucket.files:
        bucket.client.put_object_acl(Bucket="photos", Key=f"set/{name}", ACL="public-read")
    with pytest.raises(DataError, match="there is nothing below s3://photos/sets/"):
        Source(address="s3://photos/sets").fetch(out=out)
    with pytest.raises(SourceUnavailable, match="there is no such bucket; check its name"):
        Source(address="s3://photo/set").fetch(out=out)
    with monkeypatch.context() as patched:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patched.delenv(name)
        patched.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        patched.setattr(boto3, "DEFAULT_SESSION", None)  # which has kept them
        assert "no usable credentials (Unable to locate credentials); set AWS_ACCESS_KEY_ID" in refused(out)
        source(anonymous=True).fetch(out=out)
    assert written(out) == bucket.files
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "does not answer (Could not connect to the endpoint URL" in refused(tmp_path / "none")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nowhere")
    with pytest.raises(ValueError, match="check AWS_ENDPOINT_URL"):
        source().fetch(out=out)


def test_keys_that_are_no_names_of_files_are_listed_before_anything_is_transferred(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    keys = {
        "disc/../../evil.png": "leads out of its folder",
        "disc//1.png": "is empty or '.'",
        "disc/full/": "is empty or '.'",
        "zebra/1.png": "differs from ZEBRA only in upper and lower case",
        "disc/a.png": "differs from disc/A.png only",
        "disc/0000.png/1.png": "a file has the name of its folder",
        f"disc/{'x' * 256}": "a part of it more than 255",
    }
    kept = s3_backends["123456789012"]["aws"]  # boto3 would take ".." away
    for key in (*keys, "ZEBRA/1.png", "disc/A.png"):
        kept.put_object("photos", f"set/{key}", b"x")
    bucket.asked()
    told = refused(out)
    assert f"has {len(keys)} files that cannot be taken; nothing of it was imported" in told
    for key, why in keys.items():
        shown = f"set/{key}".replace("//", "/").rstrip("/")
        assert [line for line in told.splitlines() if f"{shown}: " in line and why in line], key
    for key in (*keys, "ZEBRA/1.png", "disc/A.png"):
        kept.delete_object("photos", f"set/{key}")
    assert "more than 15 files" in refused(out, max_files=15)
    bucket.put("disc/large.png", bytes((1 << 20) + 1))
    assert "set/disc/large.png has more than 1 MB" in refused(out, max_file_mb=1)
    monkeypatch.setattr(foreign_files, "GB", 1)
    assert "holds more than 2000 GB" in refused(out, max_gb=2000)
    assert bucket.asked() == []


def test_a_manifest_in_a_bucket_says_what_the_pictures_are(bucket: Bucket, tmp_path: Path) -> None:
    rows = [f"{name},{'round' if name.startswith('disc') else 'other'}" for name in bucket.files if "0007" not in name]
    bucket.client.put_object(Bucket="photos", Key="set/manifest.csv", Body="\n".join(["path,label", *rows]).encode())
    (tmp_path / "out").mkdir()
    source().fetch(out=tmp_path / "out")
    found = written(tmp_path / "out")
    everything = set(found)
    assert found.pop("left_out.jsonl").count(b"manifest.csv does not name it") == 2
    found.pop("attributes.jsonl", None)
    assert sorted(found.values()) == sorted(content for name, content in bucket.files.items() if "0007" not in name)
    assert {name.split("/")[0] for name in found} == {"round", "other"}
    bucket.asked()
    source().fetch(out=tmp_path / "out")  # after a kill
    assert (bucket.asked(), set(written(tmp_path / "out"))) == ([], everything)
