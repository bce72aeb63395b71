"""Data versions: which bytes `data/` holds, pinned by `data.dvc` in git.

A data version is files committed together: `data.dvc` (DVC's directory hash), `data.test-ledger.csv` (which pictures are
test for ever, `components/splitting.py`) and the companions (`components/companions.py`). `data.dvc` carries the sha256 of
each in its `meta`, so none can change without the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from components import git
from components.companions import COMPANIONS, PIN, TEST_LEDGER, digest_of_all, digests
from components.contracts.data import DataVersion
from components.contracts.errors import DataDiffers, DataError
from components.contracts.wording import counted
from components.data_folder import DATA
from components.differences import difference
from components.dvc_cache import count_missing, hashes_of, mend_by, pinned_folder, pinned_tree, tree_of
from components.dvc_repository import GIT_ATTRIBUTES, add_lines, opened, remote_url
from components.store import write_atomically

_LEDGER_KEY = "visionloop_test_ledger_sha256"
_RENAMED_KEY = "visionloop_renamed"


def _pin_content(root: Path) -> dict[str, Any]:
    """What data.dvc holds; empty when it is missing or no pin at all."""
    try:
        content = yaml.safe_load((root / PIN).read_text(encoding="utf-8"))
        return content if isinstance(content["outs"][0], dict) else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, IndexError, TypeError):
        return {}


def pinned(root: Path) -> DataVersion:
    """What data.dvc says, without looking at the data; raises DataError when there is no valid pin."""
    path = root / PIN
    if not path.is_file():
        raise DataError(f"{root} has no {PIN}; add images with `visionloop data add FOLDER` (one sub-folder per class)")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        out = content["outs"][0]
        dvc_hash, num_files, size = str(out["md5"]), int(out["nfiles"]), int(out["size"])
        if _LEDGER_KEY not in (content.get("meta") or {}):
            raise DataError(
                f"{path} was made by DVC alone: no picture is frozen as test yet. `visionloop data add` without a folder "
                f"takes over what lies in {DATA}/ as it is"
            )
        expected_ledger = str(content["meta"][_LEDGER_KEY])
        companions = {each.name: str(content["meta"][each.key]) for each in COMPANIONS if each.key in content["meta"]}
        renamed = renamed_in(content["meta"])
    except (yaml.YAMLError, KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is not a pin that DVC wrote for a folder ({type(error).__name__}: {error}); bring it back with "
            f"`git checkout -- {PIN}`"
        ) from error
    ledger = root / TEST_LEDGER
    found = hashlib.sha256(ledger.read_bytes()).hexdigest() if ledger.is_file() else "missing"
    if found != expected_ledger:
        raise DataDiffers(
            f"{ledger} is not the one that {PIN} names (sha256 {expected_ledger[:12]}, found {found[:12]}). "
            f"The two are one version: restore both with `git checkout -- {PIN} {TEST_LEDGER}`"
        )
    _expect_companions(root, companions)
    return DataVersion(
        dvc_hash=dvc_hash,
        num_files=num_files,
        bytes=size,
        ledger_sha256=expected_ledger,
        companions_sha256=digest_of_all(companions),
        renamed=renamed,
    )


def _expect_companions(root: Path, expected: Mapping[str, str]) -> None:
    """Raises DataDiffers unless the companions that are there are those that data.dvc names."""
    there = digests(root)
    for companion in COMPANIONS:
        file, wanted = root / companion.file, expected.get(companion.name)
        found = there.get(companion.name)
        if found == wanted:
            continue
        if wanted is None:
            raise DataDiffers(
                f"{file} is there, and {PIN} names none: it is of no version. If an interrupted `visionloop data add` left "
                f"it, run that again; otherwise remove it"
            )
        raise DataDiffers(
            f"{file} is not the one that {PIN} names (sha256 {wanted[:12]}, found {found[:12] if found else 'missing'}). "
            f"The two are one version: restore both with `git checkout -- {PIN} {companion.file}`"
        )


def adoptable(root: Path) -> bool:
    """Whether a data set without a test ledger may get its first one: nothing is pinned, or by DVC alone.

    A pin of ours without its ledger has lost it: another draw would move test pictures into training.
    """
    try:
        content = yaml.safe_load((root / PIN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and _LEDGER_KEY not in (content.get("meta") or {})


def ledger_in(meta: Mapping[str, Any]) -> str:
    """The sha256 of the test ledger in the meta of a data.dvc; empty where DVC alone wrote it."""
    return str(meta.get(_LEDGER_KEY) or "")


def renamed_in(meta: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Classes that were renamed by the meta of a data.dvc, (old, new) in their order; raises ValueError for other things."""
    found = meta.get(_RENAMED_KEY) or []
    if not isinstance(found, list) or not all(
        isinstance(one, dict) and set(one) == {"old", "new"} and all(isinstance(name, str) for name in one.values())
        for one in found
    ):
        raise ValueError(f"{_RENAMED_KEY} is no list of old and new names")
    return tuple((one["old"], one["new"]) for one in found)


def store(root: Path) -> None:
    """Put the bytes that now lie in `data/` into DVC's cache, so that a version of them can be pinned."""
    with opened(root) as repo:
        tree_of(repo, root / DATA, store=True)


def pin(root: Path, *, renamed: tuple[str, str] | None = None) -> DataVersion:
    """Record the present content of `data/`, the ledger and the companions as the new data version; stages all in git."""
    ledger_sha256 = hashlib.sha256((root / TEST_LEDGER).read_bytes()).hexdigest()
    with opened(root) as repo:
        meta, tree = tree_of(repo, root / DATA, store=True)
    content = _pin_content(root)
    before = content["outs"][0] if content else {}
    out = {"md5": str(tree.hash_info.value), "size": int(meta.size), "nfiles": int(meta.nfiles), "hash": "md5", "path": DATA}
    content = {**content, "outs": [{**out, **{key: value for key, value in before.items() if key not in out}}]}
    companions = digests(root)
    keys = {each.key: companions[each.name] for each in COMPANIONS if each.name in companions}
    others = {key: value for key, value in (content.get("meta") or {}).items() if key not in {e.key for e in COMPANIONS}}
    content["meta"] = {**others, _LEDGER_KEY: ledger_sha256, **keys}
    if renamed is not None:
        old, new = renamed
        content["meta"][_RENAMED_KEY] = [*(content["meta"].get(_RENAMED_KEY) or []), {"old": old, "new": new}]
    write_atomically(root / PIN, yaml.safe_dump(content, sort_keys=False).encode())
    names = [PIN, TEST_LEDGER, ".gitignore", *(each.file for each in COMPANIONS)]
    if companions:
        add_lines(root / ".gitattributes", GIT_ATTRIBUTES)  # a workspace from before companions has no rules for them
        names.append(".gitattributes")
    git.stage(root, *(name for name in names if (root / name).exists()))
    gone = [each.file for each in COMPANIONS if each.name not in companions]
    if gone:
        git.run(root, "rm", "--cached", "--quiet", "--ignore-unmatch", "--", *gone)
    return pinned(root)


def hashes(root: Path) -> dict[str, str]:
    """md5 of every file that lies in `data/`, by its path there. DVC reads only what it has not seen as it is now."""
    with opened(root) as repo:
        return hashes_of(tree_of(repo, root / DATA)[1])


def pinned_hashes(root: Path) -> dict[str, str]:
    """The same of the pinned version, without a look at its files; empty where DVC's cache lacks its list of them.

    So is that of a version that DVC 2 pinned, whose hashes of files that look like text are no md5 of their bytes.
    """
    with opened(root) as repo:
        out = pinned_folder(repo)
        tree = pinned_tree(out) if out.hash_name == "md5" else None
        return {} if tree is None else hashes_of(tree)


def files_of(root: Path) -> dict[str, str]:
    """`pinned_hashes`; raises DataError where they are not known."""
    found = pinned_hashes(root)
    if not found:
        raise DataError(
            f"DVC's cache lacks the list of files of the pinned version, or DVC 2 wrote it: `visionloop data pull` brings "
            f"the list back from the remote, `visionloop data add` pins what lies in {DATA}/ anew"
        )
    return found


def changes(root: Path) -> dict[str, list[str]]:
    """Files of `data/` that differ from data.dvc by kind (added, modified, deleted, renamed, relabelled); empty when equal.

    The same bytes elsewhere are told as `data/old -> data/new`: renamed in one class, relabelled from one to another, and
    a class whose files all went to a new one as a renamed class. What .dvcignore hides has a kind of its own. Where DVC's
    cache lacks the listing of the pinned version, which files differ cannot be told: {'unknown': [why]}.
    """
    pinned(root)
    with opened(root) as repo:
        out = pinned_folder(repo)
        _, tree = tree_of(repo, root / DATA, hash_name=out.hash_name)
        if tree.hash_info.value == out.hash_info.value:
            return {}
        before = pinned_tree(out)
        if before is None:
            return {
                "unknown": [
                    f"{DATA}/ is another version; which files differ cannot be told, since DVC's cache lacks the pinned "
                    f"version's list of files ({out.hash_info.value})"
                ]
            }
        found = _difference(hashes_of(before), hashes_of(tree))
    ignored = [name for name in found.get("deleted", []) if (root / name).is_file()]
    deleted = [name for name in found.pop("deleted", []) if name not in ignored]
    return {**found, **{kind: names for kind, names in (("deleted", deleted), (_IGNORED, ignored)) if names}}


_IGNORED = "left out by .dvcignore"


def _difference(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, list[str]]:
    found = difference(before, now)
    named = {
        "added": [f"{DATA}/{name}" for name in found.added],
        "modified": [f"{DATA}/{name}" for name in found.changed],
        "deleted": [f"{DATA}/{name}" for name in found.removed],
        "renamed": [f"{DATA}/{one.before} -> {DATA}/{one.after}" for one in found.renamed],
        "relabelled": [f"{DATA}/{one.before} -> {DATA}/{one.after}" for one in found.relabelled],
        "classes renamed": [f"{DATA}/{one.old} -> {DATA}/{one.new}" for one in found.renamed_classes],
    }
    return {kind: files for kind, files in named.items() if files}


def verify(root: Path) -> DataVersion:
    """The pinned version, once `data/` is known to hold exactly its bytes; raises DataDiffers naming files."""
    version = pinned(root)
    if not (root / DATA).is_dir():
        raise DataDiffers(
            f"{root / DATA} is not there, {PIN} pins {counted(version.num_files, 'file')} ({version.dvc_hash}). "
            f"{_way_back(root)}"
        )
    found = hash_of(root, root / DATA)
    if found == version.dvc_hash:
        return version
    differing = changes(root)
    named = "; ".join(
        f"{len(files)} {kind} ({', '.join(files[:3])}{', ...' if len(files) > 3 else ''})"
        for kind, files in differing.items()
    )
    if _IGNORED in differing:
        raise DataDiffers(
            f"{root / DATA} differs from {PIN}: {named}. The pinned version holds these files: take the rule out of "
            f"{root / '.dvcignore'} (`git diff -- .dvcignore` shows what was added), or pin the data without them by "
            f"`visionloop data add`"
        )
    raise DataDiffers(
        f"{root / DATA} differs from {PIN}: expected {version.dvc_hash}, found {found}. {named or 'its files changed'}. "
        f"To make this a new version: `visionloop data add`. {_way_back(root)}"
    )


def _way_back(root: Path) -> str:
    """How the pinned version comes back into data/, as far as can be known without asking a remote."""
    command = "`visionloop data pull --force`" if (root / DATA).is_dir() else "`visionloop data pull`"
    with opened(root) as repo:
        missing, total = count_missing(pinned_folder(repo))
        remote = remote_url(repo)
    if not missing:
        return f"To go back to the pinned version: {command}"
    if remote:
        return f"To go back to the pinned version: {command}, if it was pushed to {remote}; if not, nothing is changed"
    return (
        f"There is no way back to the pinned version from here: DVC's cache lacks {missing} of its "
        f"{counted(total, 'file')} and no remote is set. Set the one that it was pushed to with `visionloop data remote URL`"
    )


def hash_of(root: Path, folder: Path) -> str:
    """DVC's hash of a folder's files, as it would be pinned; DVC names such a hash `....dir`."""
    with opened(root) as repo:
        hash_name = pinned_folder(repo).hash_name if (root / PIN).exists() else "md5"
        return str(tree_of(repo, folder, hash_name=hash_name)[1].hash_info.value)


def keep(root: Path) -> None:
    """Put the bytes of `data/`, which have to be the pinned ones, into DVC's cache; raises DataDiffers."""
    verify(root)
    with opened(root) as repo:
        out = pinned_folder(repo)
        there = hashes_of(tree_of(repo, root / DATA, hash_name=out.hash_name)[1])
        mend_by(out, {oid: root / DATA / name for name, oid in there.items()})
        tree_of(repo, root / DATA, hash_name=out.hash_name, store=True)
