"""Versions of the data in git's history: what `data.dvc` said when, by whom and why. Nothing is changed."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from components import dataversions, git
from components.companions import PIN, TEST_LEDGER
from components.contracts.errors import ConfigError, DataError
from components.differences import Difference, TestChanges

_SHORTEST = 4
"""Hex digits of a version's hash that name it."""
_SHOWN = ("-z", "--encoding=UTF-8", "--no-show-signature", "--no-patch", "--format=%H%x00%an%x00%aI%x00%B")
"""Commits as fields that no commit can hold the separator of, whatever a person set for git."""


@dataclass(frozen=True)
class Commit:
    """Who made a version, when and why."""

    id: str
    author: str
    at: str
    """ISO 8601, with the author's offset."""
    message: str


@dataclass(frozen=True)
class Version:
    """What a `data.dvc` says, and where it was read."""

    given: str
    """What it was asked for by."""
    dvc_hash: str
    hash_name: str
    num_files: int
    bytes: int
    ledger_sha256: str
    """Empty where DVC alone made it."""
    renamed: tuple[tuple[str, str], ...]
    """Classes that were renamed since the data set began, (old, new), in their order."""
    commit: Commit | None = None
    """None of what is pinned here, and maybe not committed yet."""
    problem: str = ""
    """Why it cannot be read; then the hash is empty."""


@dataclass(frozen=True)
class Compared:
    """Two versions side by side."""

    before: Version
    after: Version
    found: Difference | None
    """None where the list of files of one of them is not here."""
    problem: str
    """Why, then."""
    test: TestChanges
    not_here: dict[str, str]
    """Files that differ and whose bytes could not be looked at, and why."""

    @property
    def differs(self) -> bool:
        """Whether files, or the frozen test set, are others."""
        return (self.before.dvc_hash, self.before.ledger_sha256) != (self.after.dvc_hash, self.after.ledger_sha256)


def parse(text: str, given: str, commit: Commit | None = None) -> Version:
    """The version that the text of a `data.dvc` pins; raises DataError."""
    try:
        content = yaml.safe_load(text)
        out = content["outs"][0]
        meta = content.get("meta") or {}
        return Version(
            given=given,
            dvc_hash=_expected(r"[0-9a-f]{32}\.dir", out["md5"]),
            hash_name="md5" if out.get("hash") == "md5" else "md5-dos2unix",
            num_files=int(out["nfiles"]),
            bytes=int(out["size"]),
            ledger_sha256=dataversions.ledger_in(meta),
            renamed=dataversions.renamed_in(meta),
            commit=commit,
        )
    except (yaml.YAMLError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{PIN} of {given} is not a pin that DVC wrote for a folder ({type(error).__name__}: {error})"
        ) from None


def _expected(pattern: str, text: Any) -> str:
    if not re.fullmatch(pattern, str(text)):
        raise ValueError(f"{text!r} is no hash of a folder")
    return str(text)


def pinned(root: Path) -> Version:
    """What data.dvc says here and now; raises DataError without one."""
    dataversions.pinned(root)
    return parse((root / PIN).read_text(encoding="utf-8"), "pinned")


def find(root: Path, given: str) -> Version:
    """The version that a git revision or the beginning of its own hash names.

    Raises ConfigError where nothing does, or both do and mean different versions.
    """
    by_hash = _by_hash(root, given)
    try:
        by_revision = _at(root, given)
    except DataError:
        if by_hash is None:
            raise
        by_revision = None
    if by_hash and by_revision and by_hash.dvc_hash != by_revision.dvc_hash:
        raise ConfigError(
            f"{given!r} is both a git revision ({by_revision.dvc_hash}) and the beginning of a data version's hash "
            f"({by_hash.dvc_hash}); give more of one of them"
        )
    found = by_revision or by_hash
    if found is None:
        raise ConfigError(
            f"{given!r} is no version of the data; expected `pinned`, `now`, a git revision such as HEAD~1, or at least "
            f"{_SHORTEST} digits of a data version's hash (`visionloop data log` lists them)"
        )
    return found


def _at(root: Path, given: str) -> Version | None:
    done = git.ask(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{given}^{{commit}}")
    if done is None:
        return None
    text = _text(root, done.strip())
    if text is None:
        raise DataError(f"git revision {given!r} has no {PIN}: nothing was pinned then")
    return parse(text, given, _commit(root, done.strip()))


def _by_hash(root: Path, given: str) -> Version | None:
    if not re.fullmatch(rf"[0-9a-f]{{{_SHORTEST},32}}(\.dir)?", given):
        return None
    found: dict[str, Version] = {}
    # Commits in which the text appears or vanishes; in a data.dvc it may also stand for a ledger's hash.
    said = git.ask(root, "log", "--all", "--format=%H", f"-S{given}", "--", PIN) or ""
    for commit in [*said.split(), ""]:
        text = _text(root, commit)
        try:
            version = parse(text, given, _commit(root, commit) if commit else None) if text else None
        except DataError:
            continue
        if version is not None and version.dvc_hash.startswith(given):
            found.setdefault(version.dvc_hash, version)
    if len(found) > 1:
        raise ConfigError(
            f"{given!r} is the beginning of several data versions ({', '.join(sorted(found))}); give more of it"
        )
    return next(iter(found.values()), None)


def _text(root: Path, commit: str) -> str | None:
    """The text of data.dvc in a commit, or here where none is named."""
    if commit:
        return git.ask(root, "cat-file", "blob", f"{commit}:./{PIN}")
    try:
        return (root / PIN).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _commit(root: Path, commit: str) -> Commit:
    return _commits(git.run(root, "show", *_SHOWN, commit))[0]


def _commits(said: str) -> list[Commit]:
    fields = said.split("\0")
    return [Commit(*(field.strip() for field in fields[at : at + 4])) for at in range(0, len(fields) - 3, 4)]


def log(root: Path, most: int) -> list[Version]:
    """Versions of this branch's history, newest first, at most `most`; before them what is pinned and not committed yet."""
    said = git.ask(root, "log", f"-n{most}", *_SHOWN, "--", PIN) or ""
    found = []
    for commit in _commits(said):
        text = _text(root, commit.id)
        if text is not None:  # a commit that took the pin away pins nothing
            found.append(_parsed(text, commit.id[:12], commit))
    here = _text(root, "")
    if here is not None and here != _text(root, "HEAD"):
        found.insert(0, _parsed(here, "pinned", None))
    return found[:most]


def _parsed(text: str, given: str, commit: Commit | None) -> Version:
    try:
        return parse(text, given, commit)
    except DataError as error:
        return Version(given, "", "", 0, 0, "", (), commit, str(error))


def sides(root: Path, version: Version) -> dict[str, bool] | None:
    """Whether each picture that the version's ledger knows is test; None where the ledger is not the one it names."""
    if version.commit is None:
        try:
            text = (root / TEST_LEDGER).read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            return None
    else:
        text = git.ask(root, "cat-file", "blob", f"{version.commit.id}:./{TEST_LEDGER}") or ""
    if hashlib.sha256(text.encode()).hexdigest() != version.ledger_sha256:
        return None
    return {line[:32]: line[33:] == "test" for line in text.splitlines()[1:]}
