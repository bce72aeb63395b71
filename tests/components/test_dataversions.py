from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError
from failpoints import Died, Failpoints
from shapes import free_port, visionloop_process, write_pictures

from components import dataversions, dvc_repository, transfers
from components.companions import COMPANIONS, FILES, PIN, TEST_LEDGER
from components.contracts.errors import ConfigError, DataDiffers, DataError
from flows.workspace.data import add, ensure
from flows.workspace.workspace import Workspace


def test_the_pin_names_exactly_the_bytes(workspace: Path) -> None:
    version = dataversions.verify(workspace)
    assert version.num_files == 180
    assert dataversions.changes(workspace) == {}


def test_changed_added_and_deleted_files_are_named(workspace: Path) -> None:
    (workspace / "data" / "disc" / "0000.png").write_bytes(b"changed")
    (workspace / "data" / "disc" / "new.png").write_bytes(b"new")
    (workspace / "data" / "cross" / "0003.png").unlink()
    with pytest.raises(DataDiffers) as caught:
        dataversions.verify(workspace)
    message = str(caught.value)
    for part in ("disc/0000.png", "disc/new.png", "cross/0003.png", "visionloop data add", "visionloop data pull --force"):
        assert part in message
    assert (workspace / "data" / "disc" / "new.png").exists()


def test_a_changed_ledger_is_found(workspace: Path) -> None:
    ledger = workspace / TEST_LEDGER
    ledger.write_text(ledger.read_text().replace(",test", ",rest", 1))
    with pytest.raises(DataDiffers, match="not the one that data.dvc names.*git checkout"):
        dataversions.verify(workspace)


def test_missing_pin_and_missing_data_say_what_to_do(workspace: Path, tmp_path: Path) -> None:
    shutil.rmtree(workspace / "data")
    with pytest.raises(DataDiffers, match="visionloop data pull"):
        dataversions.verify(workspace)
    Workspace.create(tmp_path / "empty")
    with pytest.raises(DataError, match="no data.dvc; add images with `visionloop data add FOLDER`"):
        dataversions.pinned(tmp_path / "empty")
    (workspace / "data.dvc").write_text("outs: 3")
    with pytest.raises(DataError, match="not a pin that DVC wrote for a folder"):
        dataversions.pinned(workspace)


def test_appending_makes_a_new_version_and_keeps_the_test_side(workspace: Path, tmp_path: Path) -> None:
    from components.splitting import TestLedger

    before, ledger = dataversions.pinned(workspace), TestLedger.read(workspace / TEST_LEDGER)
    write_pictures(tmp_path / "more", 20, start=500)
    added = add(Workspace.find(workspace), tmp_path / "more", test_share=None)
    after = TestLedger.read(workspace / TEST_LEDGER)
    assert added.num_copied == 60
    assert added.version.dvc_hash != before.dvc_hash
    assert {p: after.members[p] for p in ledger.members} == dict(ledger.members)
    assert len(after.members) == len(ledger.members) + 60
    again = add(Workspace.find(workspace), tmp_path / "more", test_share=None)
    assert (again.num_copied, again.num_already_there, again.version) == (0, 60, added.version)


def test_a_name_that_is_taken_by_other_bytes_loses_nothing(workspace: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "more", 2, start=700, kinds=("disc",))
    (tmp_path / "more" / "disc" / "0700.png").rename(tmp_path / "more" / "disc" / "0000.png")
    original = (workspace / "data" / "disc" / "0000.png").read_bytes()
    add(Workspace.find(workspace), tmp_path / "more", test_share=None)
    assert (workspace / "data" / "disc" / "0000.png").read_bytes() == original
    assert len(list((workspace / "data" / "disc").glob("0000-*.png"))) == 1


def test_a_killed_add_is_completed_by_running_it_again(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "more", 15, start=500)
    found = Workspace.find(workspace)
    with monkeypatch.context() as patched:
        Failpoints([(shutil, "copyfile")], nth=5, when="after")(patched)
        patched.setattr(Path, "unlink", lambda *_, **__: None)  # who is killed cleans nothing up
        with pytest.raises(Died):
            add(found, tmp_path / "more", test_share=None)
    assert len(list((found.state / "tmp").iterdir())) == 1
    with monkeypatch.context() as patched:
        Failpoints([(dataversions, "pin")], nth=1, when="before")(patched)
        with pytest.raises(Died):
            add(found, tmp_path / "more", test_share=None)
    assert list((found.state / "tmp").iterdir()) == []
    with pytest.raises(DataError):
        dataversions.verify(workspace)
    add(found, tmp_path / "more", test_share=None)
    assert dataversions.verify(workspace).num_files == 225


def test_a_version_that_has_every_companion_is_pinned(workspace: Path) -> None:
    for companion in COMPANIONS:
        if not (workspace / companion.file).exists():
            (workspace / companion.file).write_text("sha256\n")
    dataversions.pin(workspace)
    assert dataversions.verify(workspace).num_files == dataversions.pinned(workspace).num_files


def _loose(folder: Path) -> None:
    write_pictures(folder, 1)
    (folder / "x.png").write_bytes(b"")


def _deep(folder: Path) -> None:
    write_pictures(folder, 1)
    (folder / "disc" / "deep").mkdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "is not a folder"),
        (lambda folder: folder.mkdir(), "has no sub-folders"),
        (lambda folder: (folder / "a").mkdir(parents=True), "class 'a' has no images"),
        (_loose, "beside the class folders"),
        (_deep, "a folder inside a class"),
    ],
)
def test_folders_of_the_wrong_shape_change_nothing(
    workspace: Path, tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "given")
    with pytest.raises(DataError, match=message):
        add(Workspace.find(workspace), tmp_path / "given", test_share=None)
    dataversions.verify(workspace)


def test_what_is_no_picture_by_its_name_is_left_out_beside_the_classes(workspace: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "given", 1, start=900)
    (tmp_path / "given" / "notes.txt").write_text("from the second shift")
    added = add(Workspace.find(workspace), tmp_path / "given", test_share=None)
    assert [(left.file, left.reason) for left in added.left_out] == [("notes.txt", "it lies beside the class folders")]
    inside = tmp_path / "given" / "disc"
    with pytest.raises(DataError, match=f"has no sub-folders.*name the folder that holds it: {inside.parent}$"):
        add(Workspace.find(workspace), inside, test_share=None)


def test_an_unreadable_folder_is_named() -> None:
    """As a user without the right to read it; root becomes one first."""
    script = (
        "import os, pathlib, sys\n"
        "from components.contracts.errors import DataError\n"
        "from flows.workspace.incoming import incoming\n"
        "import dvc.fs, dvc.ignore, dvc.repo\n"
        "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "try: incoming(pathlib.Path(sys.argv[1]), pathlib.Path('data'))\n"
        "except DataError as error: print(error)\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        given = Path(scratch, "given")
        write_pictures(given, 2)
        Path(scratch).chmod(0o755)
        (given / "disc").chmod(0)
        done = subprocess.run([sys.executable, "-c", script, str(given)], capture_output=True, text=True, check=False)
        (given / "disc").chmod(0o755)
    assert f"cannot read {given / 'disc'}" in done.stdout, done.stderr
    assert "give read permission" in done.stdout


def test_a_source_that_makes_other_bytes_is_refused_and_leaves_no_data(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.sources.digits import Source

    shutil.rmtree(workspace / "data")
    monkeypatch.setattr(Source, "fetch", lambda self, *, out: write_pictures(out, 3))
    with pytest.raises(DataDiffers, match="made other bytes than data.dvc pins.*they were not kept"):
        ensure(Workspace.find(workspace), "digits")
    assert not (workspace / "data").exists()


def test_push_and_pull_through_a_folder(workspace: Path, tmp_path: Path) -> None:
    version = dataversions.pinned(workspace)
    dvc_repository.set_remote(workspace, str(tmp_path / "remote"))
    assert transfers.push(workspace) > 0
    shutil.rmtree(workspace / "data")
    shutil.rmtree(workspace / ".dvc" / "cache")
    transfers.pull(workspace)
    assert dataversions.verify(workspace) == version


def test_pull_removes_nothing_that_it_cannot_replace(workspace: Path, tmp_path: Path) -> None:
    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted((workspace / "data").rglob("*")) if path.is_file()}

    version = dataversions.pinned(workspace)
    disc = workspace / "data" / "disc"
    cached = next(path for path in (workspace / ".dvc" / "cache").rglob("*") if path.is_file() and path.suffix != ".dir")
    aside = cached.read_bytes()
    cached.unlink()
    (disc / "0000.png").write_bytes(b"changed")
    (disc / "0001.png").rename(disc / "renamed.png")
    before = content()
    assert dataversions.changes(workspace)["renamed"] == ["data/disc/0001.png -> data/disc/renamed.png"]
    with pytest.raises(DataDiffers, match="no way back.*no remote is set"):
        dataversions.verify(workspace)
    with pytest.raises(DataError, match="no remote is set"):
        transfers.pull(workspace, force=True)
    dvc_repository.set_remote(workspace, str(tmp_path / "empty, \u00e9 #1"))
    with pytest.raises(DataError, match="neither DVC.s cache here nor the remote"):
        transfers.pull(workspace, force=True)
    assert content() == before
    cached.write_bytes(aside)
    with pytest.raises(DataDiffers, match="would lose 1 file of .* that no version holds"):
        transfers.pull(workspace)
    assert content() == before
    assert transfers.pull(workspace, force=True) == 3
    assert dataversions.verify(workspace) == version


def test_a_damaged_object_of_the_cache_is_not_sent(workspace: Path, tmp_path: Path) -> None:
    version = dataversions.pinned(workspace)
    dvc_repository.set_remote(workspace, str(tmp_path / "remote"))
    cached = next(path for path in (workspace / ".dvc" / "cache").rglob("*") if path.is_file() and path.suffix != ".dir")
    cached.chmod(0o600)
    cached.write_bytes(b"damaged")
    cached.chmod(0o444)
    transfers.push(workspace)
    shutil.rmtree(workspace / "data")
    shutil.rmtree(workspace / ".dvc" / "cache")
    transfers.pull(workspace)
    assert dataversions.verify(workspace) == version
    sent = tmp_path / "remote" / "files" / "md5" / cached.parent.name / cached.name
    sent.chmod(0o600)
    sent.write_bytes(b"damaged")
    shutil.rmtree(workspace / ".dvc" / "cache")
    shutil.rmtree(workspace / "data")
    with pytest.raises(DataError, match=f"1 damaged file .{cached.parent.name}/{cached.name}.*Remove these from the remote"):
        transfers.pull(workspace)


def test_rules_that_hide_pinned_files_are_told(workspace: Path) -> None:
    (workspace / ".dvcignore").write_text("data/disc/000*.png\n")
    assert len(dataversions.changes(workspace)["left out by .dvcignore"]) == 10
    with pytest.raises(DataDiffers, match="take the rule out of"):
        dataversions.verify(workspace)
    (workspace / ".dvcignore").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="dvcignore cannot be read"):
        dataversions.verify(workspace)


def test_a_damaged_listing_is_fetched_again(workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    version = dataversions.pinned(workspace)
    dvc_repository.set_remote(workspace, str(tmp_path / "remote"))
    transfers.push(workspace)
    listing = next((workspace / ".dvc" / "cache").rglob("*.dir"))
    listing.chmod(0o600)
    listing.write_text('[{"md5": "d41d8cd98f00b204e9800998ecf8427e", "relpath": "../../evil"}]')
    (workspace / "data" / "disc" / "0000.png").unlink()
    assert "unknown" in dataversions.changes(workspace)
    assert transfers.pull(workspace) == 1
    assert dataversions.verify(workspace) == version
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("remote", ["none", "empty", "damaged"])
@pytest.mark.parametrize("kind", ["listing", "picture"])
def test_a_damaged_object_stays_until_a_whole_one_is_there(workspace: Path, tmp_path: Path, kind: str, remote: str) -> None:
    version = dataversions.pinned(workspace)
    cache, there = workspace / ".dvc" / "cache" / "files" / "md5", tmp_path / "remote" / "files" / "md5"
    objects = [path for path in cache.rglob("*") if path.is_file()]
    damaged = next(path for path in objects if (path.suffix == ".dir") == (kind == "listing"))
    sent = there / damaged.relative_to(cache)
    if remote != "none":
        dvc_repository.set_remote(workspace, str(tmp_path / "remote"))
        transfers.push(workspace)
        whole = sent.read_bytes()
        sent.chmod(0o600)
        sent.write_bytes(b"damaged too") if remote == "damaged" else sent.unlink()
    damaged.chmod(0o600)
    damaged.write_bytes(b"[]")
    for path in (workspace / "data").rglob("*.png"):
        path.write_bytes(b"changed" + path.name.encode())

    def content() -> dict[str, bytes]:
        places = (workspace / "data", workspace / ".dvc" / "cache")
        return {str(path): path.read_bytes() for place in places for path in place.rglob("*") if path.is_file()}

    before = content()
    with pytest.raises(DataError, match="visionloop data remote URL" if remote == "none" else "visionloop data push"):
        transfers.pull(workspace, force=True)
    assert content() == before
    if remote != "none":
        sent.unlink(missing_ok=True)
        sent.write_bytes(whole)
        transfers.pull(workspace, force=True)
        assert dataversions.verify(workspace) == version


def test_a_file_that_the_cache_has_damaged_is_not_lost(workspace: Path, tmp_path: Path) -> None:
    found = Workspace.find(workspace)
    names = (PIN, TEST_LEDGER, FILES.file)
    earlier = {workspace / name: (workspace / name).read_bytes() for name in names}
    write_pictures(tmp_path / "more", 1, start=500, kinds=("disc",))
    add(found, tmp_path / "more", test_share=None)
    newest = workspace / "data" / "disc" / "0500.png"
    oid = hashlib.md5(newest.read_bytes()).hexdigest()
    for path, raw in earlier.items():
        path.write_bytes(raw)
    cached = workspace / ".dvc" / "cache" / "files" / "md5" / oid[:2] / oid[2:]
    cached.chmod(0o600)
    cached.write_bytes(b"damaged")
    with pytest.raises(DataDiffers, match="would lose 1 file of .*disc/0500.png"):
        transfers.pull(workspace)
    assert newest.exists()


@pytest.mark.parametrize(("name", "content"), [("../../evil", b"x"), ("/tmp/evil", b"x"), ("disc/0000.png", None)])
def test_a_listing_that_leads_out_of_the_folder_is_refused(workspace: Path, name: str, content: bytes | None) -> None:
    cache, kept = workspace / ".dvc" / "cache" / "files" / "md5", workspace / "kept"
    kept.write_bytes(b"not DVC's")
    oid = "00/../../../../../kept" if content is None else hashlib.md5(content).hexdigest()
    if content is not None:
        (cache / oid[:2]).mkdir(exist_ok=True)
        (cache / oid[:2] / oid[2:]).write_bytes(content)
    listing = json.dumps([{"md5": oid, "relpath": name}]).encode()
    digest = hashlib.md5(listing).hexdigest()
    (cache / digest[:2]).mkdir(exist_ok=True)
    (cache / digest[:2] / f"{digest[2:]}.dir").write_bytes(listing)
    pin = workspace / "data.dvc"
    pin.write_text(pin.read_text().replace(dataversions.pinned(workspace).dvc_hash, f"{digest}.dir"))
    with pytest.raises(DataError, match="not one that DVC wrote"):
        transfers.pull(workspace, force=True)
    assert kept.read_bytes() == b"not DVC's"


@pytest.mark.parametrize("url", ["gs://bucket/x", "ftp://x/y"])
def test_a_remote_that_cannot_be_used_leaves_the_config_as_it_was(workspace: Path, url: str) -> None:
    before = (workspace / ".dvc" / "config").read_bytes()
    with pytest.raises((ConfigError, DataError)):
        dvc_repository.set_remote(workspace, url)
    assert (workspace / ".dvc" / "config").read_bytes() == before != b""


def test_pull_without_the_objects_says_so(workspace: Path, tmp_path: Path) -> None:
    dvc_repository.set_remote(workspace, str(tmp_path / "empty"))
    shutil.rmtree(workspace / "data")
    shutil.rmtree(workspace / ".dvc" / "cache")
    with pytest.raises(DataError, match="DVC"):
        transfers.pull(workspace)


KEY, SECRET = "visionloop-test", "a-secret-of-the-test"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real S3 server that checks signatures, with one bucket."""
    port, folder = free_port(), tmp_path_factory.mktemp("s3")
    server = subprocess.Popen(
        [sys.executable, "-m", "nanio", "serve", "--data-dir", str(folder), "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, "NANIO_ACCESS_KEY": KEY, "NANIO_SECRET_KEY": SECRET},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    client = boto3.client(
        "s3", endpoint_url=address, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1"
    )
    deadline = time.monotonic() + 30
    while True:
        try:
            client.create_bucket(Bucket="images")
            break
        except Exception:
            assert server.poll() is None, "the S3 server died"
            assert time.monotonic() < deadline, "the S3 server did not answer"
            time.sleep(0.2)
    yield address
    server.terminate()
    server.wait(10)


def test_push_and_pull_through_s3_with_real_authentication(workspace: Path, s3: str) -> None:
    right = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    version = dataversions.pinned(workspace)
    assert visionloop_process("data", "remote", "s3://images/one", "--endpoint-url", s3, cwd=workspace).returncode == 0
    refused = visionloop_process("data", "push", cwd=workspace, **{**right, "AWS_SECRET_ACCESS_KEY": "wrong"})
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "error: " in refused.stderr
    pushed = visionloop_process("data", "push", "--json", cwd=workspace, **right)
    assert pushed.returncode == 0, pushed.stderr
    shutil.rmtree(workspace / "data")
    shutil.rmtree(workspace / ".dvc" / "cache")
    pulled = visionloop_process("data", "pull", cwd=workspace, **right)
    assert pulled.returncode == 0, pulled.stderr
    assert dataversions.verify(workspace) == version
    assert "a-secret-of-the-test" not in (workspace / ".dvc" / "config").read_text()


def test_the_s3_server_of_this_test_checks_signatures(s3: str) -> None:
    client = boto3.client(
        "s3", endpoint_url=s3, aws_access_key_id=KEY, aws_secret_access_key="wrong", region_name="us-east-1"
    )
    with pytest.raises(ClientError):
        client.list_objects_v2(Bucket="images")


def test_the_ledger_does_not_depend_on_what_dvcs_cache_holds(workspace: Path, tmp_path: Path) -> None:
    """A cleared cache, or a workspace that was filled from a source."""
    from components.splitting import TestLedger

    shutil.rmtree(workspace / ".dvc" / "cache")
    write_pictures(tmp_path / "more", 5, start=800)
    (workspace / "data" / "disc" / "0001.png").unlink()
    assert "unknown" in dataversions.changes(workspace) or "deleted" in dataversions.changes(workspace)
    before = len(TestLedger.read(workspace / TEST_LEDGER).members)
    add(Workspace.find(workspace), tmp_path / "more", test_share=None)
    assert len(TestLedger.read(workspace / TEST_LEDGER).members) == before + 15


def test_push_sends_the_data_also_when_the_cache_was_empty(workspace: Path, tmp_path: Path) -> None:
    version = dataversions.pinned(workspace)
    shutil.rmtree(workspace / ".dvc" / "cache")
    dvc_repository.set_remote(workspace, str(tmp_path / "remote"))
    assert transfers.push(workspace) > 100
    shutil.rmtree(workspace / "data")
    shutil.rmtree(workspace / ".dvc" / "cache")
    transfers.pull(workspace)
    assert dataversions.verify(workspace) == version
