"""Answers pictures by the engine of this bundle: python predict.py PICTURE [PICTURE ...]

It needs Python 3.11 or later and what requirements.txt lists: the engine's runtime, Pillow and NumPy. Before anything of the
bundle is read, every file that manifest.json lists is compared with its digest there, and code that it does not list is
refused. That shows damage to all but this program itself; who made the bundle is told by its signature, which
`visionloop engine verify --key` checks, and every file with it.

Exit status: 0 answered, 1 the golden vectors are not answered as they should be (--check), 2 an error that says what to do.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Nothing is imported from this folder before its digest is compared, not even a file that is called like a module of
    # Python's own; and importing leaves nothing in it.
    sys.dont_write_bytecode = True
    if not sys.flags.safe_path:
        del sys.path[0]

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FORMAT = 1
_PIXEL_TOLERANCE = 2.0
"""Mean difference of a picture, in grey levels, that another build of the JPEG library may make."""
_LOSSLESS = (".png", ".bmp", ".ppm")
_LOSSLESS_TOLERANCE = 0.5
"""The same where a file says each pixel: only the colour conversion and the resizing may round otherwise then."""
_OURS = ("engine/", "golden/", "runner/")
"""Folders in which nothing may lie that the manifest does not list."""
_CODE = (".py", ".pyc", ".so", ".pyd")
"""What Python could import from here in place of a library that is not installed."""


class Damaged(Exception):
    """The bundle is not what its manifest says."""


def verified(folder: Path) -> dict[str, Any]:
    """The manifest's record, once every file that it lists has its digest; raises Damaged."""
    try:
        raw = (folder / "manifest.json").read_bytes()
        body = json.loads(raw)
        body.pop("manifest_sha256")
        seal = {**body, "manifest_sha256": hashlib.sha256(_canonical(body)).hexdigest()}
        intact = _canonical(seal) == raw
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"manifest.json cannot be read ({error})") from None
    if not intact:
        raise Damaged("manifest.json was changed")
    if body["record"]["schema_version"] > FORMAT:
        raise Damaged(f"a bundle of format {body['record']['schema_version']}; this program reads up to {FORMAT}")
    listed = {file["name"]: file for file in body["files"]}
    for name, file in listed.items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or path.stat().st_size != file["bytes"]:
            raise Damaged(f"{name} is missing, a link, or of another size")
        if hashlib.sha256(path.read_bytes()).hexdigest() != file["sha256"]:
            raise Damaged(f"{name} was changed")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}
    added = sorted(name for name in present - set(listed) if name.startswith(_OURS) or name.endswith(_CODE))
    if added:
        raise Damaged(f"{added[0]} does not belong to it")
    record: dict[str, Any] = body["record"]
    return record


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


class Model:
    """The engine of the bundle, loaded."""

    def __init__(self, folder: Path, record: dict[str, Any], num_threads: int) -> None:
        sys.path.append(str(folder))
        self.engine = record["engine"]
        self.record, self._folder = record, folder
        self._images = importlib.import_module("runner.images")
        self._formats = importlib.import_module("runner.formats")
        self._reading = importlib.import_module(f"runner.{record['task']}")
        self._preprocessing = SimpleNamespace(**{"colour": "as stored", **self.engine["preprocessing"]})
        runtime = importlib.import_module(f"runner.{self.engine['target']}")
        self._logits = runtime.load(folder / "engine" / self.engine["entry"], num_threads)

    def prepare(self, path: Path) -> Any:
        """A picture to the engine's input, uint8 (h, w, c); raises OSError or the decoder's UndecodableImage."""
        accepted = self._formats.Accepted()
        with path.open("rb") as file:
            data = file.read(accepted.max_bytes + 1)
        return self._images.prepare(self._images.decode(data, accepted), self._preprocessing)

    def answer(self, path: Path) -> dict[str, Any]:
        """Label and confidence of one picture, or why there is none."""
        try:
            image = self.prepare(path)
        except IsADirectoryError:
            return {"file": str(path), "error": "it is a folder; name its pictures, such as FOLDER/*.jpg"}
        except OSError as error:
            return {"file": str(path), "error": error.strerror or str(error)}
        except Exception as error:
            # The decoder's own error, which comes from a module of the bundle; hostile bytes may raise anything else.
            return {"file": str(path), "error": str(error) or type(error).__name__}
        logits = self._logits(image[None])
        ((label, confidence),) = self._reading.read(logits, self.engine["temperature"], self.engine["classes"])
        # Older bundles have no thresholds of classes. A critical class has one that is at least the others'.
        threshold = self.record.get("class_thresholds", {}).get(label, self.record["threshold"])
        return {
            "file": str(path),
            "label": label,
            "confidence": confidence,
            "unsure": threshold is not None and confidence < threshold,
        }

    def check(self) -> dict[str, Any]:
        """How far pixels and logits of the golden pictures are from those that the bundle was made with."""
        numpy = importlib.import_module("numpy")
        inputs, expected = (numpy.load(self._folder / "golden" / f"{name}.npy") for name in ("inputs", "logits"))
        pictures = [self.prepare(self._folder / "golden" / name) for name in self.record["golden"]]
        pixels = numpy.abs(numpy.stack(pictures).astype(int) - inputs.astype(int))
        found = numpy.concatenate([self._logits(image[None]) for image in inputs])
        worst = float(numpy.abs(found - expected).max()) if numpy.isfinite(found).all() else None
        tolerance = self.record["tolerance"]
        arithmetic = importlib.import_module("runner.int8_arithmetic").int8_arithmetic()
        if self.record["int8_arithmetic"] not in ("", arithmetic):
            tolerance = self.record["tolerance_elsewhere"]
        means = pixels.mean(axis=(1, 2, 3))
        prepared = all(
            mean <= (_LOSSLESS_TOLERANCE if name.endswith(_LOSSLESS) else _PIXEL_TOLERANCE)
            for name, mean in zip(self.record["golden"], means, strict=True)
        )
        return {
            "pictures": len(pictures),
            "largest_pixel_difference": int(pixels.max()),
            "largest_logit_difference": worst,
            "tolerance": tolerance,
            "right": bool(prepared and worst is not None and worst <= tolerance),
        }


def notes(folder: Path, *, fitted: bool) -> list[str]:
    """That no rule for "unsure" was `fitted`, and which libraries are of another version than the bundle was made with."""
    found = [] if fitted else ['it never answers "unsure": its version fitted that for the engine that serves']
    for line in (folder / "requirements.txt").read_text().splitlines():
        name, _, wanted = line.partition("==")
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if here != wanted:
            found.append(f"{name} is {here} here, the bundle was made with {wanted}; --check tells whether that matters")
    return found


def say(answer: dict[str, Any]) -> None:
    """Print one answer when it is known: there may be thousands of pictures to come."""
    if "error" in answer:
        print(f"error: {answer['file']}: {answer['error']}", file=sys.stderr)
    else:
        sure = "unsure, most likely " if answer["unsure"] else ""
        print(f"{answer['file']}: {sure}{answer['label']} {answer['confidence']:.4f}", flush=True)


def main() -> int:
    """Read the command line, answer, and return the exit status."""
    # Ctrl-C, and a reader that leaves, such as `| head`, end a program of this kind without a word.
    for name in ("SIGINT", "SIGPIPE"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    parser = argparse.ArgumentParser(prog="predict.py", description="Answers pictures by the engine of this bundle.")
    parser.add_argument("pictures", nargs="*", type=Path, metavar="PICTURE", help="a file: JPEG, PNG, WebP and others")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="answer the golden vectors, and compare")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1), help="threads of the runtime")
    given = parser.parse_args()
    if not given.pictures and not given.check:
        parser.error("name a picture, or --check")
    if given.threads < 1:
        parser.error(f"--threads {given.threads}: expected 1 or more")
    folder = Path(__file__).resolve().parent
    try:
        record = verified(folder)
    except Damaged as error:
        print(f"error: this bundle is damaged: {error}; nothing of it was used. Get it again", file=sys.stderr)
        return 2
    remedy = f"run: python -m pip install -r {folder / 'requirements.txt'}"
    try:
        model = Model(folder, record, given.threads)
    except ImportError as error:
        print(f"error: {error}; {remedy}", file=sys.stderr)
        return 2
    except Exception as error:
        # A runtime tells what it does not understand of another version's file by an exception of its own.
        said, built_by = (str(error).splitlines() or [type(error).__name__])[0], record["engine"]["runtime"]
        print(f"error: the runtime refused the engine, which {built_by} built: {said}; {remedy}", file=sys.stderr)
        return 2
    for note in notes(folder, fitted=record["threshold"] is not None):
        print(f"note: {note}", file=sys.stderr)
    answers = []
    for path in given.pictures:
        answers.append(model.answer(path))
        if not given.json:
            say(answers[-1])
    checked = model.check() if given.check else None
    if given.json:
        told = {"model": record["model"], "version": record["version"], "engine": record["engine"]["name"]}
        print(json.dumps({**told, "answers": answers, "golden": checked}))
    elif checked is not None:
        verdict = "as they should be" if checked["right"] else "NOT as they should be"
        print(f"golden vectors answered {verdict}: {json.dumps(checked)}")
    if any("error" in answer for answer in answers):
        return 2
    return 1 if checked is not None and not checked["right"] else 0


if __name__ == "__main__":
    sys.exit(main())
