"""Errors that are not ours, for the person who meets them: what was wrong, what to do, whose code it was, and a log.

Libraries raise what they like. What is known about an error comes from its number, its module and its chain of causes; the
traceback goes to a file of the workspace, `.visionloop/logs/`, where the newest few are kept.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

from components.conformance import place_of
from components.contracts.errors import causes, in_short, redacted

LOGS = "logs"
_KEPT = 20
_MOST_CHARACTERS = 200_000
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNREACHED = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT)
_CLIENTS = ("httpx", "httpcore", "requests", "urllib3", "websockets", "grpc", "botocore", "aiohttp")


@dataclass(frozen=True)
class Failure:
    """One error that a library or a person's own code raised, told in one sentence."""

    kind: str
    message: str
    """What was being done, what went wrong, and what to do."""
    place: str | None
    """`file:line` of the person's own code that it came through; None for a library's."""
    log: Path | None


def failure(error: Exception, doing: str, workspace: Path | None) -> Failure:
    """Tell an error and keep its traceback; `workspace` is the root whose plug-ins and logs are meant, if there is one."""
    place = place_of(error, workspace / "plugins") if workspace else None
    log, unkept = _keep(error, doing, workspace)
    wrong, advice = explained(error)
    if place is not None:
        wrong, advice = f"{place} raised {wrong}", "correct it there and run the command again"
    where = f"The traceback is in {log}" if log else f"The traceback could not be kept ({unkept})"
    return Failure(type(error).__name__, f"{doing} stopped: {wrong}; {advice}. {where}", place, log)


def explained(error: BaseException) -> tuple[str, str]:
    """What went wrong, and what to do about it."""
    for link in causes(error):
        known = _of_the_system(link) or _of_a_library(link)
        if known is not None:
            return known
    return in_short(error), "run it again, and if it comes back, report it with that traceback"


def _of_the_system(error: BaseException) -> tuple[str, str] | None:
    if isinstance(error, MemoryError):
        return "the memory of this machine is used up", "close other programs, or use smaller batches"
    if not isinstance(error, OSError) or error.errno is None:
        return None
    path = f" ({error.filename})" if error.filename else ""
    name = str(error.filename) if error.filename else ""
    if error.errno in _FULL:
        if name.startswith(tempfile.gettempdir() + os.sep):
            return f"the temporary folder is full{path}", "free space there, or set TMPDIR to a folder on a larger disk"
        return f"the disk is full, or your quota of it is used up{path}", "free some space and run the command again"
    if error.errno == errno.EROFS:
        return f"the disk can only be read{path}", "mount it writable, or work in a copy of the workspace elsewhere"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"permission denied{path}{_owner(name)}", "take the folder over (chown, chmod), or run as its owner"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many files are open", "raise the limit (ulimit -n 4096) and run the command again"
    if error.errno in _UNREACHED:
        return f"a server does not answer ({error.strerror or in_short(error)})", "check that it runs and its address"
    if error.errno == errno.EADDRINUSE:
        return "the port is taken", "stop what listens there, or name another port"
    return f"{error.strerror or 'the system refused'}{path}", "check the path and the disk, and run the command again"


def _owner(path: str) -> str:
    with contextlib.suppress(OSError):
        place = Path(path)
        owner, me = (place if place.exists() else place.parent).stat().st_uid, os.geteuid()
        if owner != me:
            return f", it belongs to user {owner} and you are user {me}"
    return ""


def _of_a_library(error: BaseException) -> tuple[str, str] | None:
    library, kind, said = type(error).__module__.split(".")[0], type(error).__name__, in_short(error)
    if library == "sqlite3":
        if "disk is full" in said:
            return "the disk is full, or your quota of it is used up", "free some space and run the command again"
        if "readonly" in said or "unable to open" in said:
            return f"a database cannot be written ({said})", "check who may write to .visionloop/"
        if "disk I/O" in said:
            # On some file systems that is how SQLite says that there is no space left.
            return f"a database could not be read or written ({said})", "check the disk's free space, and run it again"
        return f"a database refused ({said})", "run the command again"
    if isinstance(error, ModuleNotFoundError):
        advice = (
            "install the locked versions (`make setup`); an environment of infra/locks/serve.txt serves and does no more"
        )
        return f"a library is missing ({error})", advice
    if "SOCKS" in said or "proxy URL" in said:
        return f"a proxy of the environment cannot be used ({said})", "name an http proxy, or unset ALL_PROXY and its like"
    if "ephemeral Prefect" in said:
        return (
            "the temporary Prefect server did not start in time",
            "look for a full disk or a busy machine, or keep a server running with `visionloop up`",
        )
    if library == "prefect" or (library in _CLIENTS and "/prefect/" in str(traceback.extract_tb(error.__traceback__))):
        return (
            f"the Prefect server does not answer as expected ({said})",
            "look at it with `visionloop status`; the same command goes on where this one stopped",
        )
    if library in _CLIENTS or (isinstance(error, TimeoutError) and kind == "TimeoutError"):
        return f"a server does not answer as expected ({said})", "check its address, its credential and your proxy settings"
    return None


def _keep(error: Exception, doing: str, workspace: Path | None) -> tuple[Path | None, str]:
    """Write the traceback into the workspace, or the temporary folder, for its owner alone; where, or why not."""
    now = datetime.datetime.now(datetime.UTC)
    whole = "".join(traceback.format_exception(error))
    # The end of a traceback says most.
    text = redacted(f"{doing}, {now:%Y-%m-%d %H:%M:%S} UTC\n\n{whole[-_MOST_CHARACTERS:]}")
    problem = ""
    for folder in (workspace / ".visionloop" / LOGS if workspace else None, None):
        try:
            if folder is not None:
                folder.mkdir(mode=0o700, exist_ok=True)
            prefix = f"error-{now:%Y%m%dT%H%M%S}-" if folder else f"visionloop-error-{now:%Y%m%dT%H%M%S}-"
            handle, name = tempfile.mkstemp(prefix=prefix, suffix=".log", dir=folder)
            os.close(handle)
            kept = Path(name)
            try:
                kept.write_text(text, encoding="utf-8", errors="backslashreplace")
            except OSError:
                kept.unlink(missing_ok=True)
                raise
        except OSError as other:
            problem = other.strerror or str(other)
            continue
        for old in sorted(folder.glob("error-*.log"))[:-_KEPT] if folder else ():
            old.unlink(missing_ok=True)
        return kept, ""
    return None, problem
