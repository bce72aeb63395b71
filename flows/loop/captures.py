"""The images of production that servers kept: which there are, and their bytes, verified."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from components.contracts.errors import DataError
from components.contracts.wording import shown_utc
from flows.workspace.workspace import Workspace
from serving.log.captures import Captures, kept_at

if TYPE_CHECKING:
    # A machine that only serves verifies and erases what it kept, and has none of the libraries of the loop.
    from flows.loop.loop import Loop


def captures_of(workspace: Workspace) -> Captures:
    """The captures of a workspace's servers."""
    return Captures(workspace.state / "serving" / "captures")


def captured(workspace: Workspace) -> set[str]:
    """Digests of the images of production whose bytes were kept."""
    return {path.name for path in captures_of(workspace).folder.glob("??/*") if len(path.name) == 64}


def capture_path(workspace: Workspace, sha256: str) -> Path:
    """Where the bytes of a kept image lie."""
    return kept_at(captures_of(workspace).folder, sha256)


def kept_of(loop: Loop, sha256s: Iterable[str]) -> set[str]:
    """Those of some images whose bytes were kept."""
    return {sha256 for sha256 in sha256s if capture_path(loop.workspace, sha256).is_file()}


def read_capture(loop: Loop, sha256: str) -> bytes:
    """The bytes of a kept image, which are those of its name.

    Raises ConfigError for what is no sha256, DataError for an image that was erased, is not kept, or is damaged.
    """
    captures = captures_of(loop.workspace)
    path = captures.path(sha256)
    erased = captures.erasure(sha256)
    if erased is not None:
        raise DataError(f"image {sha256[:16]} was erased at {shown_utc(erased['at'])}; it is never kept again")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"image {sha256[:16]} is not kept: servers keep a share of what they are asked (`visionloop serve "
            f"--capture-share`), for some days (`--retain-days`)"
        ) from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(
            f"image {sha256[:16]} is kept with other bytes than those of its name, so it was not used; "
            f"`visionloop predictions verify` lists what is damaged"
        )
    return data
