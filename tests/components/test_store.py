from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from components.contracts.errors import StoreError, TamperedArtefact
from components.contracts.records import FileDigest
from components.store import MANIFEST, Store, read_manifest, seal, unseal, write_atomically

RECORD = FileDigest(name="x", sha256="y", bytes=3)


def publish(store: Store, key: str = "k") -> Path:
    with store.writing("thing", key) as out:
        (out / "a.bin").write_bytes(bytes(range(48)))
        (out / "sub").mkdir(exist_ok=True)
        (out / "sub" / "b.txt").write_text("hello")
    return store.publish("thing", key, RECORD, inputs={"i": "1"}, provenance={"p": "q"}).folder


def test_what_was_published_is_opened(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.open("thing", "k", FileDigest) is None
    folder = publish(store)
    found = store.open("thing", "k", FileDigest)
    assert found is not None
    assert found.record == RECORD
    assert (found.folder / "sub" / "b.txt").read_text() == "hello"
    assert store.artefacts() == [folder]


def test_publishing_again_changes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    before = (publish(store) / MANIFEST).read_bytes()
    assert (publish(store) / MANIFEST).read_bytes() == before
    assert len(store.artefacts()) == 1


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    folder = publish(Store(tmp_path))
    tried = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        original = path.read_bytes()
        for position in range(len(original)):
            changed = bytearray(original)
            changed[position] ^= 1
            path.write_bytes(changed)
            with pytest.raises(TamperedArtefact):
                read_manifest(folder)
            tried += 1
        for length in {0, 1, len(original) // 2, len(original) - 1}:
            path.write_bytes(original[:length])
            with pytest.raises(TamperedArtefact):
                read_manifest(folder)
        path.write_bytes(original)
    assert tried > 500
    read_manifest(folder)


def test_added_missing_swapped_and_linked_files_are_found(tmp_path: Path) -> None:
    folder = publish(Store(tmp_path))
    (folder / "extra").write_text("x")
    with pytest.raises(TamperedArtefact, match="extra"):
        read_manifest(folder)
    (folder / "extra").unlink()
    os.rename(folder / "a.bin", folder / "c.bin")
    with pytest.raises(TamperedArtefact, match=r"a\.bin, c\.bin"):
        read_manifest(folder)
    (folder / "a.bin").symlink_to(folder / "c.bin")
    with pytest.raises(TamperedArtefact, match="link"):
        read_manifest(folder)


def test_an_artefact_under_another_key_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    os.rename(publish(store), tmp_path / "thing" / "other")
    with pytest.raises(TamperedArtefact, match="another artefact"):
        store.open("thing", "other", FileDigest)


def test_discarding_keeps_the_bytes_and_frees_the_key(tmp_path: Path) -> None:
    store = Store(tmp_path)
    resting = store.discard(publish(store))
    assert (resting / "a.bin").exists()
    assert store.open("thing", "k", FileDigest) is None
    assert store.artefacts() == []


@pytest.mark.parametrize("name", ["fsync", "replace", "rename", "open"])
def test_a_full_disk_at_any_call_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real, failures = getattr(os, name), 0
    for nth in range(1, 50):
        store, calls = Store(tmp_path / str(nth)), 0

        def failing(*args: Any, _nth: int = nth, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == _nth:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(os, name, failing)
            try:
                publish(store)
            except StoreError as error:
                failures += 1
                assert "free some space" in str(error)
        visible = store.artefacts()
        for folder in visible:
            read_manifest(folder)
        if calls < nth:
            assert visible
            break
        # The same command again ends as if nothing had happened.
        read_manifest(publish(store))
    assert failures > 0


def test_a_failed_atomic_write_keeps_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_atomically(path, b"old")

    def broken(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_seal_holds_exactly_what_was_sealed() -> None:
    raw = seal({"a": 1})
    assert unseal(raw) == {"a": 1}
    assert unseal(raw + b" ") is None
    assert unseal(raw.replace(b"1", b"2", 1)) is None
    assert unseal(b"[]") is None
    assert unseal(b"\xff") is None


def test_what_a_kill_left_of_an_atomic_write_is_not_published(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.writing("thing", "k", resumable=True) as out:
        (out / "kept.bin").write_bytes(b"1")
        (out / ".progress.json.0123.tmp").write_bytes(b"")
    with store.writing("thing", "k", resumable=True) as out:
        assert sorted(path.name for path in out.iterdir()) == ["kept.bin"]


def test_leftovers_serve_to_resume_until_the_result_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, names = Store(tmp_path), ("progress.json", "state-*.bin")

    def write() -> None:
        with store.writing("thing", "k", resumable=True) as out:
            for name in ("result.bin", "progress.json", "state-1.bin"):
                (out / name).write_text(name)

    def release() -> Path:
        return store.publish("thing", "k", RECORD, inputs={}, provenance={}, resumable=True, leftovers=names).folder

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StoreError):
            release()
    with store.writing("thing", "k", resumable=True) as out:
        assert (out / "progress.json").exists()
        assert (out / "state-1.bin").exists()
    folder = release()
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "result.bin"]
    read_manifest(folder)


def test_two_that_write_the_same_at_once_leave_each_other_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first to end publishes, the second finds that; what a killed one left goes."""
    store = Store(tmp_path)
    killed = tmp_path / ".partial" / "thing-k.1"
    killed.mkdir(parents=True)
    with store.writing("thing", "k") as out:
        (out / "a.bin").write_bytes(b"half")
        assert not killed.exists()
        with monkeypatch.context() as other_process:
            other_process.setattr(os, "getpid", lambda: 2)
            first = publish(store)
        before = (first / MANIFEST).read_bytes()
        (out / "a.bin").write_bytes(b"whole")
    second = store.publish("thing", "k", RECORD, inputs={"i": "1"}, provenance={"p": "q"}).folder
    assert second == first
    assert (second / MANIFEST).read_bytes() == before
    assert not list((tmp_path / ".partial").iterdir())


def test_what_a_killed_process_left_of_another_key_goes(tmp_path: Path) -> None:
    """What was measured between two runs may give the second another key."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    partial = tmp_path / ".partial"
    gone = partial / f"thing-other.{ended.pid}"
    kept = [partial / f"thing-other.{os.getppid()}", partial / "thing-other", partial / f"another-k.{ended.pid}"]
    for folder in (gone, *kept):
        folder.mkdir(parents=True)
    publish(Store(tmp_path))
    assert sorted(partial.iterdir()) == sorted(kept), "of a process that runs, of a stage that resumes, of another kind"
