"""Public data sets by torchvision's names and addresses: CIFAR10, CIFAR100, MNIST and FashionMNIST, already split.

What is downloaded is opened only once its sha256 is the one that is written down here; torchvision itself names md5
digests, which no longer tell a file from one that was made to look like it. CIFAR's files are pickles: they are opened in a
process of their own, which leaves plain arrays.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict

from components.contracts.errors import DataError, SourceUnavailable
from components.contracts.progress import Progress, silent
from components.samples import class_name_problem
from components.store import sha256_file


class Archive(NamedTuple):
    """A file that is downloaded."""

    url: str
    sha256: str


class Pickled(NamedTuple):
    """A data set of CIFAR's kind: an archive of pickles."""

    archive: Archive
    folder: str
    """In the archive."""
    train: tuple[str, ...]
    test: str
    meta: str
    names: str
    """Key of the classes' names in `meta`."""
    labels: str
    """Key of the class numbers."""


class Idx(NamedTuple):
    """A data set of MNIST's kind: images and labels of train, then of test, as gzipped IDX files."""

    files: tuple[Archive, Archive, Archive, Archive]
    classes: tuple[str, ...]


_CIFAR = "https://www.cs.toronto.edu/~kriz/"
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# Sources of the digests: keras.datasets.cifar10 and cifar100; torchvision's prototype datasets for the other two.
SETS: dict[str, Pickled | Idx] = {
    "CIFAR10": Pickled(
        Archive(f"{_CIFAR}cifar-10-python.tar.gz", "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        "test_batch",
        "batches.meta",
        "label_names",
        "labels",
    ),
    "CIFAR100": Pickled(
        Archive(f"{_CIFAR}cifar-100-python.tar.gz", "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"),
        "cifar-100-python",
        ("train",),
        "test",
        "meta",
        "fine_label_names",
        "fine_labels",
    ),
    "MNIST": Idx(
        (
            Archive(
                f"{_MNIST}train-images-idx3-ubyte.gz", "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
            ),
            Archive(
                f"{_MNIST}train-labels-idx1-ubyte.gz", "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
            ),
            Archive(
                f"{_MNIST}t10k-images-idx3-ubyte.gz", "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
            ),
            Archive(
                f"{_MNIST}t10k-labels-idx1-ubyte.gz", "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
            ),
        ),
        tuple(str(digit) for digit in range(10)),
    ),
    "FashionMNIST": Idx(
        (
            Archive(
                f"{_FASHION}train-images-idx3-ubyte.gz", "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
            ),
            Archive(
                f"{_FASHION}train-labels-idx1-ubyte.gz", "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
            ),
            Archive(
                f"{_FASHION}t10k-images-idx3-ubyte.gz", "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
            ),
            Archive(
                f"{_FASHION}t10k-labels-idx1-ubyte.gz", "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
            ),
        ),
        # "T-shirt/top" cannot be the name of a folder.
        (
            "T-shirt or top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
    ),
}
_PREFIX = "torchvision:"
_MOST_BYTES = 256 * 2**20
"""Of a download, and of a file that is unpacked: the largest one here has 170 million."""
_UNPICKLE = """
import json, pickle, sys
import numpy as np
from safetensors.numpy import save_file
folder, meta, names, labels, *files = sys.argv[1:]
def opened(file):
    with open(f"{folder}/{file}", "rb") as stream:
        return pickle.load(stream, encoding="latin1")
with open(f"{folder}/classes.json", "w") as out:
    json.dump(list(opened(meta)[names]), out)
for file in files:
    entry = opened(file)
    arrays = {"images": np.asarray(entry["data"], np.uint8), "labels": np.asarray(entry[labels], np.int64)}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, f"{folder}/{file}.safetensors")
"""


class Source(BaseModel):
    """A data set of torchvision as train/ and test/ of class folders of PNG files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: Annotated[
        Literal["CIFAR10", "CIFAR100", "MNIST", "FashionMNIST"],
        BeforeValidator(lambda name: str(name).removeprefix(_PREFIX)),
    ]
    """Its name, with or without `torchvision:` before it."""
    folder: Path = Path("~/.cache/visionloop/datasets")
    """Where downloads are kept, a folder for each data set; what lies there already is not downloaded."""
    download: bool = True
    """Whether what is missing is downloaded."""

    @classmethod
    def takes(cls, given: str) -> bool:
        """Whether it is a name such as torchvision:CIFAR10."""
        return given.startswith(_PREFIX)

    def fetch(self, *, out: Path, progress: Progress = silent) -> None:
        """Write `out/train/<class>/<number>.png` and `out/test/...`; raises SourceUnavailable, DataError."""
        found = SETS[self.dataset]
        if isinstance(found, Pickled):
            self._of_pickles(found, out, progress)
        else:
            self._of_idx(found, out, progress)

    def _of_pickles(self, found: Pickled, out: Path, progress: Progress) -> None:
        from safetensors.numpy import load_file

        archive = self._verified(found.archive, progress)
        with tempfile.TemporaryDirectory() as scratch:
            unpacked = Path(scratch)
            files = (*found.train, found.test)
            _unpack(archive, [f"{found.folder}/{name}" for name in (found.meta, *files)], unpacked)
            done = subprocess.run(
                [sys.executable, "-P", "-c", _UNPICKLE, scratch, found.meta, found.names, found.labels, *files],
                capture_output=True,
                text=True,
                check=False,
                process_group=0,  # Ctrl-C is the command's to answer
            )
            if done.returncode:
                said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                raise DataError(f"{archive} is not {self.dataset} as torchvision reads it: {said}")
            classes = tuple(json.loads((unpacked / "classes.json").read_text(encoding="utf-8")))
            start = 0
            for file in files:
                arrays = load_file(unpacked / f"{file}.safetensors")
                flat, labels = arrays["images"], arrays["labels"]
                if flat.ndim != 2 or flat.shape[1] != 3 * 32 * 32:
                    raise DataError(f"{archive}: images of {file} have shape {flat.shape}, expected (n, 3072)")
                images = np.ascontiguousarray(flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
                start = 0 if file == found.test else start
                _write(images, labels, classes, out / ("test" if file == found.test else "train"), start, progress)
                start += len(images)

    def _of_idx(self, found: Idx, out: Path, progress: Progress) -> None:
        paths = [self._verified(file, progress) for file in found.files]
        for split, (images, labels) in (("train", paths[:2]), ("test", paths[2:])):
            _write(_read_idx(images, 3), _read_idx(labels, 1), found.classes, out / split, 0, progress)

    def _verified(self, file: Archive, progress: Progress) -> Path:
        """The file, downloaded where it is not there, whose sha256 is the expected one; raises SourceUnavailable."""
        name = file.url.rsplit("/", 1)[-1]
        path = self.folder.expanduser() / self.dataset / name
        if not path.exists():
            if not self.download:
                raise SourceUnavailable(f"{path} is not there, and `download` is false. {_by_hand(file, path)}")
            _download(file, path, progress)
        found = sha256_file(path)
        if found != file.sha256:
            raise SourceUnavailable(f"{path} has sha256 {found}; it was not opened. Remove it. {_by_hand(file, path)}")
        return path


def _by_hand(file: Archive, path: Path) -> str:
    return f"Without network, put {file.url} (sha256 {file.sha256}) at {path}"


def _download(file: Archive, path: Path, progress: Progress) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with (
            os.fdopen(descriptor, "wb") as out,
            urllib.request.urlopen(file.url, timeout=60.0) as response,  # noqa: S310  (addresses are torchvision's own)
        ):
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else 0
            told = f" of {total / 1e6:.1f}" if total else ""
            while num_bytes <= _MOST_BYTES and (block := response.read(2**20)):
                num_bytes += len(block)
                progress(num_bytes, max(num_bytes, total), f"{path.name}: {num_bytes / 1e6:.1f}{told} MB")
                digest.update(block)
                out.write(block)
        if digest.hexdigest() != file.sha256:
            raise SourceUnavailable(
                f"{file.url} is another file now (sha256 {digest.hexdigest()}); it was not kept. {_by_hand(file, path)}"
            )
        os.replace(temporary, path)
    except (OSError, http.client.HTTPException) as error:
        raise SourceUnavailable(f"cannot download {file.url} ({error}). {_by_hand(file, path)}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _unpack(archive: Path, wanted: list[str], folder: Path) -> None:
    """Write these members, regular files alone, into `folder` under their last names; raises DataError for a missing one."""
    missing = set(wanted)
    try:
        with tarfile.open(archive, "r:gz") as members:
            for member in members:
                if member.name not in missing:
                    continue
                stream = members.extractfile(member) if member.isreg() and member.size <= _MOST_BYTES else None
                if stream is None:
                    raise DataError(f"{archive}: {member.name} is no regular file of at most {_MOST_BYTES} bytes")
                (folder / member.name.rsplit("/", 1)[-1]).write_bytes(stream.read())
                missing.remove(member.name)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{archive} cannot be unpacked: {error}") from error
    if missing:
        raise DataError(f"{archive} lacks {min(missing)}")


def _read_idx(path: Path, num_dimensions: int) -> npt.NDArray[np.uint8]:
    """The array of a gzipped IDX file of unsigned bytes; raises DataError.

    Source: the format's description by LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
    """
    try:
        with gzip.open(path) as stream:
            content = stream.read(_MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}") from error
    header = 4 + 4 * num_dimensions
    shape = tuple(int(n) for n in np.frombuffer(content[4:header], dtype=">u4")) if len(content) >= header else ()
    if content[:4] != bytes((0, 0, 8, num_dimensions)) or len(content) - header != int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{path} is no IDX file of unsigned bytes with {num_dimensions} dimensions")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _write(
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.integer],
    classes: tuple[str, ...],
    out: Path,
    start: int,
    progress: Progress,
) -> None:
    if labels.shape != (len(images),) or not all(0 <= label < len(classes) for label in labels):
        raise DataError(
            f"{len(images)} images have labels of shape {labels.shape}, expected one of {len(classes)} classes each"
        )
    for name in classes:
        if not isinstance(name, str) or (problem := class_name_problem(name)):
            raise DataError(f"{name!r} cannot be the name of a class" + (f": {problem}" if isinstance(name, str) else ""))
        (out / name).mkdir(parents=True, exist_ok=True)
    for index, (image, label) in enumerate(zip(images, labels, strict=True), start):
        # Stored and not compressed: the bytes do not depend on a compression library.
        Image.fromarray(image).save(out / classes[label] / f"{index:05d}.png", compress_level=0)
        progress(index - start + 1, len(images), f"{out.name}: {index + 1} pictures written")
