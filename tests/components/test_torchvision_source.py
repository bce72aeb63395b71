from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision
from shapes import commit, visionloop

from components import dataversions
from components.companions import TEST_LEDGER
from components.contract_checks import source_breaches
from components.contracts.errors import DataError, SourceUnavailable
from components.images import decode, pixel_digest
from components.sources import torchvision as sets
from components.sources.torchvision import Archive, Idx, Pickled, Source
from components.splitting import TestLedger
from flows.workspace.data import ensure
from flows.workspace.workspace import Workspace

CLASSES = ("airplane", "cat")


def _images(count: int, seed: int, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (count, width)).astype(np.uint8)


def _pickled(count: int, seed: int) -> bytes:
    return pickle.dumps({"data": _images(count, seed, 3072), "labels": [n % 2 for n in range(count)]}, protocol=2)


def _cifar(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as out:
        for name, content in members.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            link = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, target
            out.addfile(link)


MEMBERS = {
    "batches.meta": pickle.dumps({"label_names": list(CLASSES)}, protocol=2),
    "readme.html": b"no picture",
    **{f"data_batch_{n}": _pickled(6, n) for n in range(1, 6)},
    "test_batch": _pickled(8, 9),
}


def _known(monkeypatch: pytest.MonkeyPatch, path: Path, url: str = "http://127.0.0.1:9/") -> None:
    """Let CIFAR10 be the archive at `path`, which is to be downloaded from below `url`."""
    real = sets.SETS["CIFAR10"]
    assert isinstance(real, Pickled)
    archive = Archive(f"{url}cifar-10-python.tar.gz", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(sets.SETS, "CIFAR10", real._replace(archive=archive))


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of downloads that holds a tiny CIFAR-10."""
    _cifar(tmp_path / "sets" / "CIFAR10" / "cifar-10-python.tar.gz", MEMBERS)
    _known(monkeypatch, tmp_path / "sets" / "CIFAR10" / "cifar-10-python.tar.gz")
    return tmp_path / "sets"


def test_addresses_are_torchvisions() -> None:
    for name, known in sets.SETS.items():
        theirs = getattr(torchvision.datasets, name)
        if isinstance(known, Pickled):
            assert known.archive.url == theirs.url
            assert (known.folder, known.meta, known.names) == (
                theirs.base_folder,
                theirs.meta["filename"],
                theirs.meta["key"],
            )
            assert [*known.train, known.test] == [file for file, _ in (*theirs.train_list, *theirs.test_list)]
        else:
            assert [file.url for file in known.files] == [theirs.mirrors[0] + file for file, _ in theirs.resources]
            assert [name.split()[0] for name in known.classes] == [
                name.replace("/", " ").split()[0] for name in theirs.classes
            ] or name == "MNIST"


def test_a_source_that_is_split_becomes_data_whose_test_is_its_own(cifar: Path, tmp_path: Path) -> None:
    source = Source(dataset="CIFAR10", folder=cifar)
    assert not list(source_breaches(source, "torchvision"))
    source.fetch(out=tmp_path / "out")
    third = decode((tmp_path / "out" / "train" / "airplane" / "00008.png").read_bytes()).stored  # third of the second batch
    assert np.array_equal(np.asarray(third), _images(6, 2, 3072)[2].reshape(3, 32, 32).transpose(1, 2, 0))
    root = Workspace.create(tmp_path / "ws").root
    add = ("data", "add", "torchvision:CIFAR10", "--json")
    undecided = visionloop(*add, "--source-setting", f"folder={cifar}", cwd=root)
    assert undecided.returncode == 2
    assert "source 'torchvision' is already split. Keep" in undecided.stdout
    assert not (root / "data").exists()
    done = visionloop(*add, "--source-setting", f"folder={cifar}", "--keep-splits", cwd=root)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["classes"], answer["new_test_images"]) == ({"airplane": 19, "cat": 19}, 8)
    frozen = TestLedger.read(root / TEST_LEDGER).members
    theirs = {pixel_digest(decode(path.read_bytes()))[:32] for path in (tmp_path / "out" / "test").rglob("*.png")}
    assert {picture for picture, test in frozen.items() if test} == theirs
    commit(root)
    # A workspace elsewhere that has the pin alone makes the same bytes, and needs no flag for it.
    (root / "data").rename(tmp_path / "aside")
    assert ensure(Workspace.find(root), "torchvision", {"dataset": "CIFAR10", "folder": str(cifar)}).num_files == 38
    assert dataversions.verify(root).num_files == 38


def test_mnist_is_read_without_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = sets.SETS["MNIST"]
    assert isinstance(known, Idx)
    images, labels = _images(10, 1, 784), bytes(range(10))
    contents = [
        bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in (10, 28, 28)) + images.tobytes(),
        bytes((0, 0, 8, 1)) + (10).to_bytes(4, "big") + labels,
    ] * 2
    (tmp_path / "MNIST").mkdir()
    files = []
    for file, content in zip(known.files, contents, strict=True):
        path = tmp_path / "MNIST" / file.url.rsplit("/", 1)[-1]
        path.write_bytes(gzip.compress(content))
        files.append(Archive(file.url, hashlib.sha256(path.read_bytes()).hexdigest()))
    monkeypatch.setitem(sets.SETS, "MNIST", known._replace(files=(files[0], files[1], files[2], files[3])))
    Source(dataset="MNIST", folder=tmp_path).fetch(out=tmp_path / "out")
    seven = decode((tmp_path / "out" / "test" / "7" / "00007.png").read_bytes()).stored
    assert np.array_equal(np.asarray(seven), images[7].reshape(28, 28))
    path.write_bytes(gzip.compress(contents[1][:-1]))
    files[-1] = Archive(files[-1].url, hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(sets.SETS, "MNIST", known._replace(files=(files[0], files[1], files[2], files[3])))
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte.gz is no IDX file of unsigned bytes with 1 dim"):
        Source(dataset="MNIST", folder=tmp_path).fetch(out=tmp_path / "again")


def test_a_download_is_kept_and_without_network_the_error_says_what_goes_where(
    cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = cifar / "CIFAR10" / "cifar-10-python.tar.gz"
    there = Source(dataset="CIFAR10", folder=tmp_path / "other")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    told = f"put http://127.0.0.1:9/{file.name} .sha256 {digest}. at {tmp_path}/other/CIFAR10/{file.name}"
    with pytest.raises(SourceUnavailable, match=f"cannot download .*{told}"):
        there.fetch(out=tmp_path / "out")
    with pytest.raises(SourceUnavailable, match=f"`download` is false.*{told}"):
        there.model_copy(update={"download": False}).fetch(out=tmp_path / "out")
    _known(monkeypatch, file, url=f"file://{file.parent}/")
    told_of: list[tuple[int, int, str]] = []
    there.fetch(out=tmp_path / "out", progress=lambda *told: told_of.append(told))
    size = file.stat().st_size
    assert told_of[0] == (size, size, f"{file.name}: {size / 1e6:.1f} of {size / 1e6:.1f} MB")
    assert told_of[-1] == (8, 8, "test: 8 pictures written")
    assert len(told_of) == 1 + 38
    assert [path.name for path in (tmp_path / "other" / "CIFAR10").iterdir()] == [file.name]
    file.write_bytes(b"another")
    with pytest.raises(SourceUnavailable, match="sha256 .*; it was not opened. Remove it"):
        Source(dataset="CIFAR10", folder=cifar).fetch(out=tmp_path / "never")
    with pytest.raises(SourceUnavailable, match="is another file now .*; it was not kept"):
        Source(dataset="CIFAR10", folder=tmp_path / "third").fetch(out=tmp_path / "never")
    assert not list((tmp_path / "third" / "CIFAR10").iterdir())
    assert not (tmp_path / "never").exists()


class _Touch:
    """A pickle that writes a file where it is opened, to tell in which process that is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return exec, (f"import os; open({str(self.path)!r}, 'w').write(str(os.getpid()))",)


def test_a_pickle_is_opened_in_a_process_of_its_own_and_only_as_the_known_file(
    cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, trace = cifar / "CIFAR10" / "cifar-10-python.tar.gz", tmp_path / "trace"
    _cifar(file, {**MEMBERS, "test_batch": pickle.dumps(_Touch(trace), protocol=2)})
    with pytest.raises(SourceUnavailable):
        Source(dataset="CIFAR10", folder=cifar).fetch(out=tmp_path / "out")
    assert not trace.exists()
    _known(monkeypatch, file)
    with pytest.raises(DataError, match="is not CIFAR10 as torchvision reads it"):
        Source(dataset="CIFAR10", folder=cifar).fetch(out=tmp_path / "out")
    assert int(trace.read_text()) != os.getpid()


@pytest.mark.parametrize(
    ("members", "links", "message"),
    [
        ({"test_batch": None}, {"test_batch": "/etc/passwd"}, "test_batch is no regular file"),
        ({"test_batch": None}, {}, "lacks cifar-10-batches-py/test_batch"),
        (
            {"batches.meta": pickle.dumps({"label_names": ["airplane", "../cat"]}, protocol=2)},
            {},
            "cannot be the name of a class",
        ),
        ({"batches.meta": pickle.dumps({"label_names": ["airplane"]}, protocol=2)}, {}, "expected one of 1 classes each"),
        (
            {"test_batch": pickle.dumps({"data": np.zeros((2, 7)), "labels": [0, 1]}, protocol=2)},
            {},
            r"shape \(2, 7\), expected",
        ),
    ],
)
def test_an_archive_of_another_content_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    members: dict[str, bytes | None],
    links: dict[str, str],
    message: str,
) -> None:
    path = tmp_path / "CIFAR10" / "cifar-10-python.tar.gz"
    _cifar(path, {name: content for name, content in {**MEMBERS, **members}.items() if content is not None}, links)
    _known(monkeypatch, path)
    with pytest.raises(DataError, match=message):
        Source(dataset="CIFAR10", folder=tmp_path).fetch(out=tmp_path / "out")
