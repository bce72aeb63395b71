"""Which source brings what a person names, and the staging folder that it writes into before anything is a version."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components import data_folder, plugins
from components.attributes import FILE, LEFT_OUT, Attributes, expect_no_class, read_said
from components.conformance import failed
from components.contracts.errors import ConfigError, DataError, VisionloopError
from components.contracts.families import Source
from components.contracts.progress import Progress, silent
from components.contracts.records import sha256_text
from components.foreign_files import RECEIVED
from components.store import explained
from flows.workspace.incoming import LeftOut
from flows.workspace.workspace import Workspace

_GIVEN_AS = ("path", "address", "dataset")
"""The settings that a SOURCE can be; the first that a plug-in has."""
_STALE_S = 7 * 24 * 3600.0
"""After this long nobody goes on with a transfer that was killed."""


@dataclass(frozen=True)
class Chosen:
    """A source plug-in and its settings."""

    name: str
    settings: Mapping[str, Any]


def choose(given: str | None, source: str | None, settings: Mapping[str, Any]) -> Path | Chosen | None:
    """The folder or the source that a person named; None where that is neither.

    A folder is a folder of class folders unless a source is named, too; of anything else the sources are asked whether they
    take it (`takes`). Raises ConfigError where it is for none or for several.
    """
    if source is not None:
        return Chosen(source, {**settings, **({} if given is None else _as_setting(source, given, settings))})
    if given is None:
        return None
    is_name, is_folder = given in plugins.names("sources"), Path(given).is_dir()
    if is_name and is_folder:
        raise ConfigError(f"{given} is a folder here and the name of a source; write ./{given} or --source {given}")
    if is_name:
        return Chosen(given, dict(settings))
    if is_folder and settings:
        raise ConfigError(f"{given} is a folder, which has no settings; name the source of --source-setting by --source")
    if is_folder:
        return Path(given)
    takers = [name for name in plugins.names("sources") if _takes(name, given)]
    if len(takers) > 1:
        raise ConfigError(f"{given} can be for several sources ({', '.join(takers)}); name one by --source")
    if not takers:
        raise DataError(_not_taken(given, plugins.names("sources")))
    return Chosen(takers[0], {**settings, **_as_setting(takers[0], given, settings)})


def _not_taken(given: str, names: Sequence[str]) -> str:
    """What is wrong with a SOURCE that is no folder, no source's name and nothing that a source takes."""
    path = Path(given)
    expected = (
        f"expected a folder with one sub-folder per class, a file that a source takes (a .csv or .jsonl manifest, an "
        f"archive), or the name of a source: {', '.join(names)}"
    )
    if path.exists():
        return f"{given} is not a folder, and no source takes such a file; {expected}"
    beside = [path.with_name(other.name) for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(given, [*names, *map(str, beside)], n=1, cutoff=0.8)
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"{given} is not there: no folder, file or source is called so{meant} ({expected})"


def _takes(name: str, given: str) -> bool:
    kind, _ = plugins.member_class("sources", name)
    takes = getattr(kind, "takes", None)
    try:
        return takes is not None and bool(takes(given))
    except Exception as error:
        path = plugins.own("sources").get(name)
        if path is None or isinstance(error, VisionloopError):
            raise
        raise failed(f"source {name!r}", path, "raised in takes", error) from error


def _as_setting(name: str, given: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a person named, as a setting of the source."""
    kind, _ = plugins.member_class("sources", name)
    key = next((key for key in _GIVEN_AS if key in getattr(kind, "model_fields", {})), None)
    if key is None:
        raise ConfigError(
            f"source {name!r} takes nothing by position (it has none of the settings {', '.join(_GIVEN_AS)}); leave "
            f"{given} out, or leave --source out to add a folder"
        )
    if key in settings:
        raise ConfigError(
            f"{given} is the setting {key} of source {name!r}, which --source-setting gives, too; leave one out"
        )
    return {key: given}


@dataclass(frozen=True)
class Staged:
    """What a source wrote, before it is a version."""

    folder: Path
    attributes: Mapping[str, Attributes]
    """By file, relative to the folder."""
    left_out: Sequence[LeftOut]
    """What it did not take."""
    told: str
    """The source, as a person is told of it."""


def clear_stale(workspace: Workspace) -> None:
    """Remove what calls that were killed long ago left half done."""
    for stale in (workspace.state / "tmp").glob("*"):
        with contextlib.suppress(OSError):
            if time.time() - stale.lstat().st_mtime > _STALE_S:
                shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink()


@contextlib.contextmanager
def staged(
    workspace: Workspace, source: str, settings: Mapping[str, Any] | None = None, *, progress: Progress = silent
) -> Iterator[Staged]:
    """A folder with the images of a source plug-in, for this time.

    It is the same one for the same source, settings and code. A source that says `resumes = True` finds there what an
    earlier call left that was killed or failed, and goes on; for others it is emptied first. When all is done it is removed.
    """
    member: Source = plugins.load("sources", source, dict(settings or {}))
    kind, _ = plugins.member_class("sources", source)
    resumes, scratch = bool(getattr(kind, "resumes", False)), workspace.state / "tmp"
    clear_stale(workspace)
    folder = scratch / f"source-{source}-{_key(source, member)}"
    if not resumes:
        shutil.rmtree(folder, ignore_errors=True)
    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    told = f"source {source!r}"
    done = False
    try:
        if (folder / RECEIVED).exists():
            os.replace(folder / RECEIVED, out / RECEIVED)
        # A source's own class is asked, since a workspace's own member is wrapped.
        reports = {"progress": progress} if "progress" in inspect.signature(kind.fetch).parameters else {}
        with explained("write", out):
            member.fetch(out=out, **reports)
        expect_no_class(out)
        if (out / RECEIVED).exists():
            os.replace(out / RECEIVED, folder / RECEIVED)
        for beside in (FILE, LEFT_OUT):
            (folder / beside).unlink(missing_ok=True)
            if (out / beside).exists():
                os.replace(out / beside, folder / beside)
        yield Staged(out, _said(folder / FILE, out, told), _left_out(folder / LEFT_OUT, told), told)
        done = True
    finally:
        if done or not resumes:
            shutil.rmtree(folder, ignore_errors=True)


def _key(source: str, member: Any) -> str:
    # Relative paths are meant from where the person stands.
    settings = {name: value.absolute() if isinstance(value, Path) else value for name, value in member.model_dump().items()}
    code = plugins.member_digest("sources", source)
    return sha256_text(json.dumps([settings, code], sort_keys=True, default=str))[:16]


def _said(path: Path, out: Path, told: str) -> dict[str, Attributes]:
    """What a source knows of the files that it wrote; raises DataError for files that it did not."""
    try:
        said = read_said(path)
        for name in said:
            if Path(name).is_absolute() or ".." in Path(name).parts or not (out / name).is_file():
                raise DataError(f"{FILE} names {name!r}, which it did not write")
    except VisionloopError as error:
        raise DataError(f"{told}: {error}") from error
    return said


def _left_out(path: Path, told: str) -> list[LeftOut]:
    """What a source did not take, and why; raises DataError that names the line."""
    found: list[LeftOut] = []
    if not path.exists():
        return found
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            found.append(LeftOut(data_folder.shown(Path(str(row["file"]))), str(row["reason"])))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{told}: {path.name}, line {number}: {error}; expected `file` and `reason`") from error
    return found
