"""The images of production that servers kept: which there are, and their bytes, verified.

They lie where VISIONLOOP_CAPTURES says. What a server of this workspace has not sent there yet lies in its own folder.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.contracts.errors import DataError
from components.contracts.wording import shown_utc
from flows.workspace.settings import Settings, own_captures, read_settings
from flows.workspace.workspace import Workspace
from serving.log.capture_store import CaptureStore, is_image_of

if TYPE_CHECKING:
    # A machine that only serves verifies and erases what it kept, and has none of the libraries of the loop.
    from flows.loop.loop import Loop


@dataclass(frozen=True)
class KeptImages:
    """The kept images of a workspace's servers."""

    own: CaptureStore
    """The servers' own folder on this machine."""
    kept: CaptureStore
    """Where they are kept in the end; the same, unless a setting says otherwise."""

    @property
    def stores(self) -> tuple[CaptureStore, ...]:
        """The own folder first: an image that is sent meanwhile is then there twice, and never missing."""
        return (self.own,) if self.own is self.kept else (self.own, self.kept)

    def names(self) -> set[str]:
        """Digests of all images that are kept."""
        return set().union(*(store.names() for store in self.stores))

    def among(self, sha256s: Collection[str]) -> set[str]:
        """Those of some images that are kept."""
        found: set[str] = set()
        for store in self.stores:
            found |= store.among(set(sha256s) - found)
        return found

    def read(self, sha256: str) -> bytes:
        """The bytes of an image; raises ConfigError, or DataError where it was erased, is not kept, or is damaged."""
        self.kept.place(sha256)  # is it a name at all?
        if (erased := self.erased().get(sha256)) is not None:
            raise DataError(f"image {sha256[:16]} was erased at {shown_utc(erased['at'])}; it is never kept again")
        read = [data for store in self.stores if (data := store.read(sha256)) is not None]
        if not read:
            raise DataError(
                f"image {sha256[:16]} is not kept: servers keep a share of what they are asked (`visionloop serve "
                f"--capture-share`), for some days (`--retain-days`)"
            )
        for data in read:
            if is_image_of(data, sha256):
                return data
        raise DataError(
            f"image {sha256[:16]} is kept with other bytes than those of its name, so it was not used; "
            f"`visionloop predictions verify` lists what is damaged"
        )

    def erased(self) -> Mapping[str, dict[str, Any]]:
        """The records of erasures by image."""
        return {sha256: record for store in self.stores for sha256, record in store.erased().items()}

    def erase(self, sha256: str, *, by: str, reason: str) -> dict[str, Any]:
        """Remove an image for good, wherever it lies, and record it; see `CaptureStore.erase`.

        Raises RegistryUnavailable for an address that is away: then nothing is recorded, and nothing is removed.
        """
        found = any(store.has(sha256) for store in self.stores)
        records = [store.erase(sha256, by=by, reason=reason, found=found) for store in reversed(self.stores)]
        return records[0]

    def verify(self) -> list[str]:
        """What is wrong with them, in sentences."""
        erased = self.erased().keys()  # also what a server here has not heard of yet
        return [problem for store in self.stores for problem in store.verify(erased)]


def captures_of(workspace: Workspace, settings: Settings | None = None) -> KeptImages:
    """The kept images of a workspace's servers."""
    url = (settings or read_settings(workspace.state)).captures_url
    return _opened(str(own_captures(workspace.state)), url)


@functools.lru_cache(maxsize=32)
def _opened(own: str, url: str) -> KeptImages:
    """One that is open already shares its connections."""
    store = CaptureStore(own, private=True)
    return KeptImages(store, store if is_same_folder(own, url) else CaptureStore(url))


def is_same_folder(own: str, url: str) -> bool:
    """Whether an address is a server's own folder, by whatever path."""
    return not url.startswith("s3://") and os.path.realpath(own) == os.path.realpath(url)


def kept_of(loop: Loop, sha256s: Collection[str]) -> set[str]:
    """Those of some images whose bytes were kept."""
    return captures_of(loop.workspace, loop.settings).among(sha256s)


def read_capture(loop: Loop, sha256: str) -> bytes:
    """The bytes of a kept image, which are those of its name.

    Raises ConfigError for what is no sha256, DataError for an image that was erased, is not kept, or is damaged.
    """
    return captures_of(loop.workspace, loop.settings).read(sha256)


def place_of(loop: Loop, sha256: str) -> str:
    """Where an image is kept, for people; in the workspace from its root on, so that a copy of it names its own images."""
    place, root = captures_of(loop.workspace, loop.settings).kept.place(sha256), f"{loop.workspace.root}/"
    return place.removeprefix(root)


def local_copies(loop: Loop, sha256s: Collection[str], folder: Path) -> dict[str, Path]:
    """Files of some kept images: those that lie in the servers' own folder there, copies of the others in `folder`.

    What is damaged or gone is not among them. Raises RegistryUnavailable for an address that is away.
    """
    kept, found = captures_of(loop.workspace, loop.settings), {}
    for sha256 in sha256s:
        own = Path(kept.own.place(sha256))
        if kept.own is kept.kept:
            found[sha256] = own
            continue
        try:
            data = kept.read(sha256)
        except DataError:
            continue
        found[sha256] = folder / sha256[:2] / sha256
        found[sha256].parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        found[sha256].write_bytes(data)
    return found
