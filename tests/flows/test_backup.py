"""A backup taken while a server answers and candidates are registered is a workspace again, elsewhere, or it is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import evidence
from looped import MODEL, loop_of, predict
from served import png, server
from shapes import visionloop

from components.contracts.errors import ConfigError, RegistryUnavailable, StoreError, VisionloopError, WorkspaceBusy
from components.store import seal
from flows.workspace import backup as backups
from flows.workspace.backup import backup, read, restore
from flows.workspace.desk import desk, registry_of
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace


def answer(*arguments: str, cwd: Path, status: int = 0) -> dict[str, Any]:
    done = visionloop(*arguments, "--json", cwd=cwd)
    assert done.returncode == status, (arguments, done.stdout, done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def rows_of(database: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return sorted(connection.iterdump())


@pytest.fixture(scope="module")
def live(champions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a champion, its log, an alarm that was granted, and a token."""
    root = Path(shutil.copytree(champions, tmp_path_factory.mktemp("live") / "workspace", symlinks=True))
    predict(root, 120, shift=4)
    answer("watch", "--minutes", "60", cwd=root, status=1)
    answer("token", "add", "phone", cwd=root)
    return root


def test_a_backup_of_a_busy_workspace_is_one_elsewhere(live: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(live, tmp_path / "workspace", symlinks=True))
    workspace = Workspace.find(root)
    registry = registry_of(workspace, read_settings(workspace.state))
    registered, stop = threading.Semaphore(0), threading.Event()

    def register() -> None:
        number = 0
        while not stop.is_set():
            registry.register(evidence(tmp_path, "other", digest=f"d{number}"))
            registered.release()
            number += 1

    writer = threading.Thread(target=register)
    with server(root) as running:
        writer.start()
        try:
            label = running.predict(png("disc", 1)).json["label"]
            registered.acquire()
            told = answer("backup", str(tmp_path / "b.tar"), "--with-artefacts", cwd=root)
        finally:
            stop.set()
            writer.join()
        assert running.stop() == 0
    history = desk(root, MODEL).ledger.entries()
    root.rename(tmp_path / "gone")
    here = tmp_path / "elsewhere" / "is it here?"  # a question mark has a meaning in addresses of databases
    done = answer("restore", str(tmp_path / "b.tar"), "--into", str(here), cwd=tmp_path)
    assert (done["problems"], done["ledger"]) == ([], told["ledger"])
    found = desk(here, MODEL)
    assert 4 <= done["ledger"]["rows"] <= len(history)
    assert found.ledger.entries() == history[: done["ledger"]["rows"]]
    # Nothing in one part refers to what another lacks, and the next training finds the champion.
    for model in (MODEL, "other"):
        desk(here, model).promotion.registry.expect_whole_ledger(model)
    entry = found.promotion.registry.champion(MODEL)
    assert entry is not None
    assert (
        found.promotion.registry.fetch_engine(MODEL, entry, out=tmp_path / "engine").record.digest() == entry.body["engine"]
    )
    assert found.promotion.differences() == []
    # What was decided about alarms is decided: nothing is granted a second time.
    assert rows_of(here / ".visionloop" / "loop.db") == rows_of(live / ".visionloop" / "loop.db")
    assert [alarm.id for alarm in loop_of(here).outbox.alarms(MODEL)] == [a.id for a in loop_of(live).outbox.alarms(MODEL)]
    assert answer("token", "list", cwd=here)["tokens"] == {"phone": "predictor"}
    assert answer("store", "verify", cwd=here)["broken"] == []
    assert subprocess.run(["git", "log", "--format=%H"], cwd=here, capture_output=True, check=True).stdout
    assert not (here / "data").exists()
    with server(here) as running:
        assert running.predict(png("disc", 1)).json["label"] == label
    assert not root.exists()


def test_without_artefacts_a_backup_lists_them(live: Path, tmp_path: Path) -> None:
    (live / ".visionloop" / "up").mkdir(exist_ok=True)
    (live / ".visionloop" / "up" / "auth").write_text("visionloop:a-secret-of-this-machine")
    with pytest.raises(ConfigError, match="not a folder"):
        backup(Workspace.find(live), tmp_path / "no" / "b.tar", with_artefacts=False, force=False)
    file = tmp_path / "b.tar"
    made = backup(Workspace.find(live), file, with_artefacts=False, force=False)
    with pytest.raises(ConfigError, match="exists already.*--force"):
        backup(Workspace.find(live), file, with_artefacts=False, force=False)
    assert backup(Workspace.find(live), file, with_artefacts=False, force=True)["ledger"] == made["ledger"]
    assert b"a-secret-of-this-machine" not in file.read_bytes()
    assert any("weights.safetensors" in entry["name"] for entry in made["listed"])
    done = restore(file, tmp_path / "lean")
    assert [path.name for path in (done.root / ".visionloop" / "releases").iterdir()] == ["routes"]
    with pytest.raises(StoreError, match="is not in .*lean"):
        desk(done.root, MODEL).promotion.releases.verify(MODEL, desk(live, MODEL).ledger.champion(MODEL).body["release"])  # type: ignore[union-attr]


def _cut(data: bytes, _: Path) -> bytes:
    return data[: len(data) // 2]


def _end(data: bytes, _: Path) -> bytes:
    return data[: data.rindex(b"manifest.json", 0, len(data) - 20_000)]


def _flip(data: bytes, _: Path) -> bytes:
    middle = data.index(b"SQLite format 3") + 5000
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _foreign(*names: str, link: bool = False) -> Callable[[bytes, Path], bytes]:
    def make(_: bytes, __: Path) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for name in names:
                entry = tarfile.TarInfo(name)
                if link:
                    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc"
                archive.addfile(entry, io.BytesIO())
            body = seal({"format": 1, "files": [], "listed": []})
            entry = tarfile.TarInfo("manifest.json")
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
        return out.getvalue()

    return make


@pytest.mark.parametrize(
    "change",
    [
        _cut,
        _end,
        _flip,
        lambda data, _: b"",
        lambda data, _: b"no tar at all" * 500,
        _foreign("files/../../escape"),
        _foreign("/etc/escape"),
        _foreign("files/.git/hooks/post-checkout"),
        _foreign("files/recipes", link=True),
        _foreign("files/a", "files/a"),
        _foreign("files/not-in-the-manifest"),
    ],
)
def test_what_is_no_whole_backup_is_refused_before_anything_is_written(
    live: Path, tmp_path: Path, change: Callable[[bytes, Path], bytes]
) -> None:
    file = tmp_path / "b.tar"
    backup(Workspace.find(live), file, with_artefacts=False, force=False)
    file.write_bytes(change(file.read_bytes(), tmp_path))
    with pytest.raises(VisionloopError, match=r"restored|cut short|nothing was read"):
        restore(file, tmp_path / "into")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar"]


_KILLED = """
import os, signal, sys
from pathlib import Path
import flows.workspace.backup as backups
from flows.workspace.workspace import Workspace
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
what, one, two = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
if what == "backup":
    os.replace = die
    backups.backup(Workspace.find(one), two, with_artefacts=False, force=True)
else:
    os.rename = die
    backups.restore(one, two)
"""


def test_a_kill_leaves_no_half(live: Path, tmp_path: Path) -> None:
    file, into = tmp_path / "b.tar", tmp_path / "into"
    made = backup(Workspace.find(live), file, with_artefacts=False, force=False)
    before = file.read_bytes()
    for what in (("backup", live, file), ("restore", file, into)):
        killed = subprocess.run([sys.executable, "-c", _KILLED, *map(str, what)], check=False)
        assert killed.returncode == -signal.SIGKILL
    assert file.read_bytes() == before
    assert not into.exists()
    into.mkdir()
    with backups._alone(tmp_path / ".into.restoring", 0), pytest.raises(WorkspaceBusy):
        restore(file, into)
    assert restore(file, into).manifest["ledger"] == made["ledger"]
    backup(Workspace.find(live), file, with_artefacts=False, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar", "into"]
    for place in (into, live):
        with pytest.raises(ConfigError, match="not empty"):
            restore(file, place)


def test_a_damaged_table_is_no_backup(live: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(live, tmp_path / "workspace", symlinks=True))
    database = root / ".visionloop" / "mlflow.db"
    data = bytearray(database.read_bytes())
    data[4096 * 3 : 4096 * 3 + 200] = b"\xff" * 200
    database.write_bytes(data)
    with pytest.raises(RegistryUnavailable, match="mlflow.db"):
        backup(Workspace.find(root), tmp_path / "b.tar", with_artefacts=False, force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["workspace"]
    with pytest.raises(ConfigError, match="is a folder"):
        backup(Workspace.find(root), tmp_path, with_artefacts=False, force=True)
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path, tmp_path / "pipe", tmp_path / "missing"):
        with pytest.raises(ConfigError, match="is no file"):
            restore(source, tmp_path / "into")


def test_what_is_kept_elsewhere_is_said(live: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(shutil.copytree(live, tmp_path / "workspace", symlinks=True))
    (root / ".visionloop" / "ledger.db").rename(tmp_path / "shared.db")
    monkeypatch.setenv("VISIONLOOP_LEDGER_URL", f"sqlite:///{tmp_path / 'shared.db'}")
    monkeypatch.setenv("VISIONLOOP_RELEASES", str(tmp_path / "published"))
    made = backup(Workspace.find(root), tmp_path / "b.tar", with_artefacts=False, force=False)
    assert set(made["elsewhere"]) == {"ledger", "loop", "releases"}
    assert (made["ledger"], read(tmp_path / "b.tar")) == (None, made)
