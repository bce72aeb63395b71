"""Environments of converters whose libraries clash with ours: a lock each, made by one command, only used here.

A converter is a module of `components/converters/`. It is run by the interpreter of its environment, which has none of our
libraries: what it is asked and what it answers are JSON, what it converts and writes are files.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

from components.contracts.errors import ExportError

_ROOT = Path(__file__).resolve().parent.parent


def lock(name: str) -> Path:
    """The versions that an environment holds."""
    return _ROOT / "infra" / "locks" / f"{name}.txt"


def _folder(name: str) -> Path:
    return _ROOT / f".venv-{name}"


def absent(name: str) -> str:
    """Why this machine cannot convert in the environment `name`, and the command that helps; empty when it can."""
    locked, stamp = lock(name), _folder(name) / ".lock"
    if not locked.is_file():
        return f"not built here: there is no {locked}; converters run from a clone of visionloop, not from its wheel"
    make = f"`make environment NAME={name}` in {_ROOT} makes it"
    if not stamp.is_file() or not (_folder(name) / "bin" / "python").exists():
        return f"not built here: its converter needs the environment {name}, which is not here; {make}"
    if stamp.read_bytes() != locked.read_bytes():
        return f"not built here: the environment {name} holds other versions than {locked.name} names; {make} anew"
    return ""


def convert(name: str, converter: ModuleType, request: dict[str, Any]) -> dict[str, Any]:
    """What a converter answers in the environment `name`; raises ExportError when it fails or crashes.

    One that hangs is ended with the exporter that asks it, whose time is limited.
    """
    problem = absent(name)
    if problem:
        raise ExportError(problem)
    try:
        done = subprocess.run(
            # Neither the variables nor the user's own packages of Python may bring our libraries in.
            [_folder(name) / "bin" / "python", "-E", "-s", "-m", converter.__name__],
            input=json.dumps({**request, "parent": os.getpid()}),
            capture_output=True,
            text=True,
            check=False,
            cwd=_ROOT,
        )
    except OSError as error:
        raise ExportError(f"the converter of {name} could not be started: {error}") from error
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        if done.returncode < 0:
            raise ExportError(f"the converter of {name} was killed by signal {-done.returncode}") from None
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise ExportError(f"the converter of {name} ended with status {done.returncode}: {last[:300]}") from None
    if "error" in answer:
        raise ExportError(f"the converter of {name} could not convert this network: {answer['error']}")
    return answer
