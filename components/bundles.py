"""Bundles: an engine with all that it needs on another machine, in one folder or zip, signed, verified before it is read.

    manifest.json      the sha256 and size of every file below, and the record of the bundle; sealed
    signature.json     of all files but itself, by model-signing; signer.pub is the key that made it
    engine/            the engine's files
    labels.txt         its classes, a line each, in the order of the logits
    golden/            pictures, inputs.npy (what they become) and logits.npy (what the engine has to answer)
    model-card.md      what a user of the model has to know
    LICENCES.md        what is known of the licences of what is inside
    predict.py         answers pictures by the engine alone; runner/ is its code, requirements.txt its libraries

Reading begins with a private copy, in which nothing but regular files of bounded size lies; then seal, digests and signature
are compared; then the engine's files are looked into. Only then does a runtime open them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import os
import re
import shutil
import stat
import tempfile
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from components import engine_files, plugins, signatures
from components.contracts.errors import ConfigError, DataError, EngineUnavailable, StoreError, TamperedArtefact, in_short
from components.contracts.families import Predictor
from components.contracts.models import Engine
from components.contracts.records import FileDigest, Record, Stored
from components.contracts.verdicts import Finding
from components.formats import format_of, suffix_of
from components.images import decode, prepare
from components.int8_arithmetic import int8_arithmetic
from components.releases import TOLERANCE
from components.sources.archive import Source as Archive
from components.store import MANIFEST, describe, explained, seal, sha256_file, unseal

KIND = "engine bundle"
SIGNATURE, SIGNER, ENGINE, GOLDEN = "signature.json", "signer.pub", "engine", "golden"
MAX_FILES = 1000
MAX_GB = 8
_MAX_MANIFEST = 4 << 20
_PIXEL_TOLERANCE = 2.0
"""Mean difference of a picture, in grey levels, that another build of the JPEG library may make."""
_LOSSLESS = (".png", ".bmp", ".ppm")
_LOSSLESS_TOLERANCE = 0.5
"""The same where a file says each pixel: only the colour conversion and the resizing may round otherwise then."""
_INT8_SHARE = 0.01
"""Of the logits' range, where int8 is multiplied as where the golden logits were written; elsewhere it is TOLERANCE's."""
_RUNNERS = Path(__file__).parent / "runners"
_CARRIED = ("images", "colours", "formats", "int8_arithmetic", "contracts/errors", "contracts/progress")
"""Modules of this package that decode and prepare pictures; the runner has them word for word."""
_IMPORT = re.compile(r"^(\s*from )components(?=[. ])", re.MULTILINE)
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every file in a zip, so that equal bundles are equal files."""


class Bundle(Record):
    """What a bundle holds, for who runs it elsewhere."""

    model: str
    version: str
    standing: str
    """Where the version stood when the bundle was made, such as `champion`."""
    engine: Engine
    """With its labels, preprocessing, temperature, and the runtime that built it."""
    preprocessing_fingerprint: str
    """Digest of the preprocessing: whoever prepares pictures by another one gets other answers."""
    task: str
    task_settings: dict[str, bool | int | float | str]
    threshold: float | None = Field(ge=0, le=1)
    """Answers of a lower confidence are "unsure"; None for an engine that no decision rule was fitted for."""
    class_thresholds: dict[str, float] = {}
    """The same of answers that name a critical class; left out of JSON where there are none, as in older bundles."""
    golden: tuple[str, ...] = Field(min_length=1)
    """Names of the pictures in `golden/`, in the order of the rows of inputs and logits."""
    tolerance: float = Field(gt=0)
    """Largest difference of a logit that another machine may make."""
    int8_arithmetic: str = ""
    """Of an int8 engine, how the machine multiplies that wrote the golden logits; empty where that does not matter."""
    tolerance_elsewhere: float | None = Field(default=None, gt=0)
    """In place of `tolerance`, where int8 is multiplied otherwise."""
    made_by: str
    """The visionloop that made it."""
    gates: tuple[Finding, ...] = ()
    """What each gate said of the engine that it passed, and on how many pictures; older bundles do not tell."""
    built_later: bool = False
    """Whether it was built and judged after its version was registered: no person's approval is about it."""

    @model_serializer(mode="wrap")
    def _without_the_field(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if not self.class_thresholds:
            del values["class_thresholds"]
        return values


@dataclass(frozen=True)
class Contents:
    """What a bundle is made of."""

    model: str
    version: str
    standing: str
    engine: Stored[Engine]
    task: str
    task_settings: dict[str, bool | int | float | str]
    threshold: float | None
    pictures: Sequence[bytes]
    """The golden pictures, encoded."""
    probabilities: npt.NDArray[np.float32] | None
    """What the engine has to answer to them, where a release says so."""
    card: str
    licences: str
    made_by: str
    gates: tuple[Finding, ...] = ()
    built_later: bool = False
    class_thresholds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Opened:
    """A bundle whose every byte verified."""

    record: Bundle
    folder: Path
    """A private copy."""
    signer: str
    """Fingerprint of the key that signed it."""
    origin_proven: bool
    """Whether that key was given, and did not come with the bundle."""
    num_files: int
    num_bytes: int


@dataclass(frozen=True)
class Answered:
    """How the engine of a bundle answers its golden vectors here."""

    pictures: int
    pixel_difference: float
    """The mean difference, in grey levels, of the worst picture."""
    logit_difference: float
    """Infinite where an answer is no number."""
    tolerance: float
    runtime: str
    """Library and version that answered."""
    lossless_difference: float = 0.0
    """As `pixel_difference`, of the pictures that are stored without loss."""

    @property
    def problem(self) -> str:
        """Why they are not answered as they should be; empty when they are."""
        if self.lossless_difference > _LOSSLESS_TOLERANCE:
            return (
                f"a golden picture that is stored without loss decodes to other pixels here (mean difference "
                f"{self.lossless_difference:.1f} grey levels): pictures are prepared otherwise than the engine was built for"
            )
        if self.pixel_difference > _PIXEL_TOLERANCE:
            return f"a golden picture decodes to other pixels here (mean difference {self.pixel_difference:.1f} grey levels)"
        if not self.logit_difference <= self.tolerance:
            return (
                f"the engine answers its golden vectors wrongly here: a logit differs by {self.logit_difference:.4g}, "
                f"accepted are {self.tolerance:.4g} ({self.runtime})"
            )
        return ""


def runners() -> list[str]:
    """The targets and tasks that can run out of a bundle."""
    return sorted(path.stem for path in _RUNNERS.glob("[!_]*.py") if path.stem != "predict")


def expect_runner(engine: Engine, task: str) -> None:
    """Raise ConfigError for an engine that could not answer without visionloop."""
    for what, name in (("target", engine.target), ("task", task)):
        if name not in runners():
            raise ConfigError(
                f"an engine of the {what} {name!r} cannot leave in a bundle: nothing runs it without visionloop; bundles "
                f"are made for {', '.join(runners())}"
            )


def write(contents: Contents, out: Path, *, key: Path, num_threads: int) -> Bundle:
    """Write a folder, or a zip where `out` ends so, whole or not at all; signed by the private `key`.

    Raises ConfigError, StoreError, and EngineUnavailable where the engine cannot run here or answers its golden vectors
    otherwise than its release says.
    """
    expect_runner(contents.engine.record, contents.task)
    out = out.absolute()
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists already; name a folder or a .zip that does not")
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent} is not a folder; make it first")
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    packed = partial.with_name(f"{partial.name}.zip")
    try:
        with explained("write", out):
            partial.mkdir()
            record = _fill(partial, contents, key, num_threads)
            if out.suffix == ".zip":
                _pack(partial, packed)
                os.rename(packed, out)
            else:
                os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        packed.unlink(missing_ok=True)
    return record


def _fill(folder: Path, contents: Contents, key: Path, num_threads: int) -> Bundle:
    engine = contents.engine.record
    for file in engine.files:
        copy = folder / ENGINE / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(contents.engine.folder / file.name, copy)
        if sha256_file(copy) != file.sha256:
            raise TamperedArtefact(f"{file.name} of engine {engine.name} is not the file that was registered")
    names, logit_range = _write_golden(folder / GOLDEN, contents, num_threads)
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in engine.classes))
    (folder / "model-card.md").write_text(contents.card)
    (folder / "LICENCES.md").write_text(contents.licences)
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements(engine)))
    (folder / SIGNER).write_bytes(signatures.public_key(key))
    _write_runner(folder, engine.target, contents.task)
    share, arithmetic = TOLERANCE[engine.precision], int8_arithmetic() if engine.precision == "int8" else ""
    record = Bundle(
        model=contents.model,
        version=contents.version,
        standing=contents.standing,
        engine=engine,
        preprocessing_fingerprint=engine.preprocessing.digest(),
        task=contents.task,
        task_settings=contents.task_settings,
        threshold=contents.threshold,
        class_thresholds=dict(contents.class_thresholds),
        golden=names,
        tolerance=(_INT8_SHARE if arithmetic else share) * logit_range,
        int8_arithmetic=arithmetic,
        tolerance_elsewhere=share * logit_range if arithmetic else None,
        made_by=contents.made_by,
        gates=contents.gates,
        built_later=contents.built_later,
    )
    files = [describe(path, within=folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    body = {"kind": KIND, "files": [file.to_json() for file in files], "record": record.to_json()}
    (folder / MANIFEST).write_bytes(seal(body))
    signatures.sign(folder, folder / SIGNATURE, key)
    verified(folder)  # what would be refused elsewhere does not leave
    return record


def _write_golden(folder: Path, contents: Contents, num_threads: int) -> tuple[tuple[str, ...], float]:
    """Names of the pictures, and the range of the logits that are written here."""
    engine = contents.engine.record
    folder.mkdir()
    pictures = [*contents.pictures, *_without_loss(contents)]
    names = []
    for index, data in enumerate(pictures):
        path = folder / f"{index:03d}"
        path.write_bytes(data)
        names.append(f"{index:03d}{suffix_of(path)}")
        path.rename(folder / names[-1])
    inputs = np.stack([prepare(decode(data), engine.preprocessing) for data in pictures])
    logits, _ = _predictor(contents.engine, num_threads).predict(inputs)
    if not np.isfinite(logits).all():
        raise EngineUnavailable(f"engine {engine.name} gives no finite answers here; nothing was written")
    if contents.probabilities is not None:
        task = plugins.load("tasks", contents.task, contents.task_settings)
        found = task.probabilities(logits[: len(contents.probabilities)], engine.temperature)
        share = TOLERANCE[engine.precision]
        worst = float(np.abs(found - contents.probabilities).max())
        if not worst <= share:  # what is no number differs by more than anything
            raise EngineUnavailable(
                f"the engine answers its golden vectors wrongly here: a probability differs by {worst:.3f}, accepted are "
                f"{share:g}; nothing was written"
            )
    np.save(folder / "inputs.npy", inputs)
    np.save(folder / "logits.npy", logits.astype(np.float32))
    return tuple(names), max(float(np.ptp(logits)), 1e-3)


def _without_loss(contents: Contents) -> list[bytes]:
    """The smallest of the pictures as a PNG, where none is stored without loss: a JPEG decodes otherwise elsewhere."""
    if any(f".{format_of(data).lower()}" in _LOSSLESS for data in contents.pictures):
        return []
    picture = decode(min(contents.pictures, key=len))
    copy = io.BytesIO()
    colours = picture.srgb() if contents.engine.record.preprocessing.colour == "srgb" else picture.stored
    colours.save(copy, "PNG")
    return [copy.getvalue()]


def _predictor(engine: Stored[Engine], num_threads: int) -> Predictor:
    record = engine.record
    predictor: Predictor = plugins.load("targets", record.target, record.settings).load(engine, num_threads=num_threads)
    return predictor


def requirements(engine: Engine) -> tuple[str, ...]:
    """What `predict.py` needs, at the versions by which the golden vectors were answered."""
    return tuple(f"{name}=={importlib.metadata.version(name)}" for name in (_package(engine), "numpy", "pillow"))


def _package(engine: Engine) -> str:
    """The distribution that runs an engine; what built it may be another."""
    if engine.target not in runners():
        return engine.runtime.split()[0]
    package: str = importlib.import_module(f"components.runners.{engine.target}").PACKAGE
    return package


def _write_runner(folder: Path, target: str, task: str) -> None:
    shutil.copyfile(_RUNNERS / "predict.py", folder / "predict.py")
    runner = folder / "runner"
    (runner / "contracts").mkdir(parents=True)
    (runner / "contracts" / "__init__.py").write_text('"""What the decoder and who calls it agree on."""\n')
    for name in ("__init__", target, task):
        shutil.copyfile(_RUNNERS / f"{name}.py", runner / f"{name}.py")
    for name in _CARRIED:
        text = (_RUNNERS.parent / f"{name}.py").read_text()
        (runner / f"{name}.py").write_text(_IMPORT.sub(r"\1runner", text))


def _pack(folder: Path, out: Path) -> None:
    """A zip of a folder's files, the same for the same files."""
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _EPOCH)
                entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
                archive.writestr(entry, path.read_bytes())


@contextlib.contextmanager
def opened(place: Path, *, key: Path | None = None) -> Iterator[Opened]:
    """A verified private copy of a bundle, a folder or a zip, for as long as the context lasts.

    Signed it has to be by the public `key`; without one, by the key that came in it. Raises TamperedArtefact, StoreError for
    what is no bundle, SchemaTooNew and ConfigError.
    """
    with tempfile.TemporaryDirectory(prefix="visionloop-bundle-") as scratch:
        folder = Path(scratch, "bundle")
        folder.mkdir()
        if place.is_dir():
            _copy(place, folder)
        elif place.is_file():
            _unpack(place, folder)
        else:
            raise StoreError(f"{place} is not there; name a folder or a .zip that `visionloop engine bundle` wrote")
        yield verified(folder, key=key)


def _copy(place: Path, folder: Path) -> None:
    count, size = 0, 0
    waiting = [(place, folder)]
    while waiting:
        source, copy = waiting.pop()
        with os.scandir(source) as entries:
            for entry in entries:
                mode = entry.stat(follow_symlinks=False).st_mode
                count += 1
                _expect_few(count)
                if stat.S_ISDIR(mode):
                    (copy / entry.name).mkdir()
                    waiting.append((Path(entry.path), copy / entry.name))
                elif stat.S_ISREG(mode):
                    # Opened without following a link that took its place meanwhile.
                    descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW)
                    with os.fdopen(descriptor, "rb") as file, (copy / entry.name).open("xb") as out:
                        while chunk := file.read(1 << 20):
                            size += len(chunk)
                            if size > MAX_GB << 30:
                                raise TamperedArtefact(f"it has more than {MAX_GB} GB")
                            out.write(chunk)
                else:
                    raise TamperedArtefact(f"{Path(entry.path).relative_to(place)} is a link or a special file")


def _expect_few(count: int) -> None:
    if count > MAX_FILES:
        raise TamperedArtefact(f"it has more than {MAX_FILES} files and folders")


def _unpack(place: Path, folder: Path) -> None:
    with place.open("rb") as file:
        if file.read(2) != b"PK":
            raise TamperedArtefact("it is neither a folder nor a zip")
    try:
        archive = Archive(path=place, max_files=MAX_FILES, max_gb=MAX_GB, max_file_mb=MAX_GB << 10)
        archive.unpack(folder)
    except DataError as error:
        # Nothing was imported here, it is a bundle.
        raise TamperedArtefact(str(error).partition("; nothing of it was imported")[0]) from error


def verified(folder: Path, *, key: Path | None = None) -> Opened:
    """Compare every byte of a private folder with manifest and signature, and look into the engine's files.

    Raises TamperedArtefact, SchemaTooNew and StoreError.
    """
    present = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    for name in (MANIFEST, SIGNATURE, SIGNER):
        if name not in present:
            raise TamperedArtefact(f"it has no {name}; it is no bundle, or not a whole one")
    if present[MANIFEST].stat().st_size > _MAX_MANIFEST:
        raise TamperedArtefact(f"{MANIFEST} has more than {_MAX_MANIFEST} bytes")
    body = unseal(present[MANIFEST].read_bytes())
    if body is None:
        raise TamperedArtefact(f"{MANIFEST} was changed")
    if body.get("kind") != KIND:
        raise TamperedArtefact(f"it is of the kind {body.get('kind')!r}; expected {KIND!r}")
    try:
        listed = {file.name: file for file in (FileDigest.read(entry) for entry in body["files"])}
        told = dict(body["record"])
    except (KeyError, TypeError, ValueError, StoreError) as error:
        raise TamperedArtefact(f"{MANIFEST} is none of a bundle ({in_short(error)})") from error
    present.pop(MANIFEST)
    signature = present.pop(SIGNATURE)
    if changed := sorted(present.keys() ^ listed.keys()):
        raise TamperedArtefact(f"files were added or are missing: {', '.join(changed[:5])}")
    for name, file in listed.items():
        if present[name].stat().st_size != file.bytes or sha256_file(present[name]) != file.sha256:
            raise TamperedArtefact(f"{name} was changed")
    signer = signatures.verify(folder, signature, key or present[SIGNER])
    record = Bundle.read(told)
    _expect_consistent(record, listed, folder)
    for engine_file in record.engine.files:
        is_entry = engine_file.name == record.engine.entry
        if not engine_files.inspect(folder / ENGINE / engine_file.name, is_entry=is_entry) and key is None:
            raise TamperedArtefact(
                f"{engine_file.name} is of a kind that cannot be looked into, and may hold code; name the public key of who "
                f"made the bundle (--key), from a place that you trust"
            )
    num_bytes = sum(file.bytes for file in listed.values())
    return Opened(record, folder, signer, key is not None, len(listed) + 2, num_bytes)


def _expect_consistent(record: Bundle, listed: dict[str, FileDigest], folder: Path) -> None:
    """What stands twice in a bundle says the same."""
    engine = {f"{ENGINE}/{file.name}": (file.sha256, file.bytes) for file in record.engine.files}
    found = {name: (file.sha256, file.bytes) for name, file in listed.items() if name.startswith(f"{ENGINE}/")}
    golden = {f"{GOLDEN}/{name}" for name in (*record.golden, "inputs.npy", "logits.npy")}
    wrong = ""
    if engine != found or f"{ENGINE}/{record.engine.entry}" not in engine:
        wrong = "the engine's files are not those of its record"
    elif golden != {name for name in listed if name.startswith(f"{GOLDEN}/")}:
        wrong = "the golden pictures are not those of its record"
    elif record.preprocessing_fingerprint != record.engine.preprocessing.digest():
        wrong = "the fingerprint of the preprocessing is not that of the engine's"
    elif (folder / "labels.txt").read_text(errors="replace").splitlines() != list(record.engine.classes):
        wrong = "labels.txt does not name the engine's classes"
    if wrong:
        raise TamperedArtefact(wrong)


def answer_golden(bundle: Opened, *, num_threads: int) -> Answered:
    """Prepare the golden pictures and run the engine on them; raises EngineUnavailable where it cannot run here."""
    record, engine = bundle.record, bundle.record.engine
    inputs, expected = (_array(bundle.folder / GOLDEN / f"{name}.npy") for name in ("inputs", "logits"))
    size = engine.preprocessing
    shape = (len(record.golden), size.height, size.width, size.channels)
    if inputs.shape != shape or inputs.dtype != np.uint8 or len(expected) != len(inputs):
        raise TamperedArtefact(f"the golden inputs are {inputs.shape}, expected {shape}")
    pictures = np.stack([prepare(decode((bundle.folder / GOLDEN / name).read_bytes()), size) for name in record.golden])
    here = runtime_here(engine)
    try:
        logits, _ = _predictor(Stored(engine, bundle.folder / ENGINE), num_threads).predict(inputs)
    except (EngineUnavailable, ImportError) as error:
        raise EngineUnavailable(f"{_told(engine, here)} cannot run here: {error}") from error
    except Exception as error:
        # A runtime tells what it does not understand of another version's file by an exception of its own.
        raise EngineUnavailable(f"{_told(engine, here)} was refused here: {in_short(error)[:300]}") from error
    if logits.shape != expected.shape:
        raise EngineUnavailable(f"{_told(engine, here)} gives answers of {logits.shape}, expected {expected.shape}")
    pixels = np.abs(pictures.astype(np.int32) - inputs.astype(np.int32)).mean(axis=(1, 2, 3))
    worst = float(np.abs(logits - expected).max()) if np.isfinite(logits).all() else float("inf")
    lossless = [difference for name, difference in zip(record.golden, pixels, strict=True) if name.endswith(_LOSSLESS)]
    return Answered(
        len(inputs), float(pixels.max()), worst, _tolerance_here(record), here, float(max(lossless, default=0.0))
    )


def _tolerance_here(record: Bundle) -> float:
    same = record.int8_arithmetic in ("", int8_arithmetic())
    return record.tolerance if same or record.tolerance_elsewhere is None else record.tolerance_elsewhere


def _array(path: Path) -> npt.NDArray[Any]:
    try:
        found: npt.NDArray[Any] = np.load(path)
    except (ValueError, OSError, EOFError) as error:
        raise TamperedArtefact(f"{path.name} is no array ({error})") from error
    return found


def runtime_here(engine: Engine) -> str:
    """The library that runs an engine, with the version of this machine."""
    package = _package(engine)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f"{package} {importlib.metadata.version(package)}"
    return f"no {package}"


def _told(engine: Engine, here: str) -> str:
    bound = f" for {', '.join(engine.built_for)}" if engine.built_for else ""
    return f"the files are as they were signed, but the engine that {engine.runtime} built{bound} (here is {here})"
