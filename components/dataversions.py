"""Data versions: which bytes `data/` holds, pinned by `data.dvc` in git. The only DVC code.

A data version is two files committed together: `data.dvc` (DVC's directory hash) and `data.test-ledger.csv` (which
pictures are test for ever, `components/splitting.py`). `data.dvc` carries the ledger's sha256 in its `meta`, so neither
can change without the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from components.contracts import ConfigError, DataDiffers, DataError, DataVersion, counted
from components.store import write_atomically

if TYPE_CHECKING:
    from dvc.repo import Repo

DATA = "data"
PIN = "data.dvc"
TEST_LEDGER = "data.test-ledger.csv"
_LEDGER_KEY = "visionloop_test_ledger_sha256"


def git(root: Path, *arguments: str) -> str:
    """Run git in `root` and return what it printed; raises DataError with git's own words."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DataError("git is not installed; data versions live in git, install it and run the command again") from None
    if done.returncode:
        raise DataError(f"git {arguments[0]} failed in {root}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def git_state(root: Path) -> tuple[str, bool]:
    """Commit of the workspace (`none` before the first one), and whether files that git sees differ from it."""
    try:
        commit = git(root, "rev-parse", "--verify", "HEAD")
    except DataError:
        return "none", True
    return commit, bool(git(root, "status", "--porcelain"))


@contextlib.contextmanager
def _repo(root: Path) -> Iterator[Repo]:
    import logging

    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import SCMError

    # What goes wrong reaches us as an exception; DVC's own words would come twice, and without saying what to do here.
    logging.getLogger("dvc").setLevel(logging.CRITICAL + 1)
    try:
        # DVC would keep a machine-wide cache under the system's temporary folder, or the one of a place it was copied from.
        with Repo(str(root), config={"core": {"site_cache_dir": str(_site_cache(root))}}) as repo:
            yield repo
    except (DvcException, SCMError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise DataError(f"DVC: {error}{cause}") from error


@contextlib.contextmanager
def _remote() -> Iterator[None]:
    """Say of a remote that refuses or does not answer what it is, instead of a stack of storage libraries."""
    from botocore.exceptions import BotoCoreError

    try:
        yield
    except (OSError, BotoCoreError) as error:
        raise DataError(
            f"the data could not be transferred ({type(error).__name__}: {error}). Check the disk's free space, the "
            f"remote's address (`visionloop data remote`) and, for S3, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error


def _site_cache(root: Path) -> Path:
    return root / ".visionloop" / "cache" / "dvc"


_SITE_CACHE = re.compile(r"""^(\s*site_cache_dir\s*=\s*)(["']?)(.*/\.visionloop/cache/dvc)\2[ \t]*$""", re.MULTILINE)


def settle(root: Path) -> None:
    """Let what DVC and git keep about a workspace's place be about `root`, where it is now.

    Raises DataError for the copy of a git worktree: its index is its original's.
    """
    local = root / ".dvc" / "config.local"
    with contextlib.suppress(OSError, UnicodeDecodeError):  # read-only is no harm: our own calls say where it is
        text = local.read_bytes().decode()
        found = _SITE_CACHE.search(text)
        if found is not None and found[3] != str(_site_cache(root)):
            quote = found[2] or ('"' if re.search(r"[#,']", str(root)) else "")
            line = f"{found[1]}{quote}{_site_cache(root)}{quote}"
            write_atomically(local, (text[: found.start()] + line + text[found.end() :]).encode())
    link = root / ".git"
    if link.is_file():
        with contextlib.suppress(OSError, UnicodeDecodeError):
            repository = root / link.read_text().strip().removeprefix("gitdir: ")
            original = Path((repository / "gitdir").read_text().strip())
            if original.is_file() and not original.samefile(link):
                raise DataError(
                    f"{root} is a copy of the git worktree {original.parent} and would stage into its index. Remove {link} "
                    f"and run `git init` for a repository of its own, or make a worktree with `git worktree add`"
                )


def initialise(root: Path) -> None:
    """Make `root` a git repository with DVC in it; leaves what is already there alone."""
    from dvc.repo import Repo

    root.mkdir(parents=True, exist_ok=True)
    if not (root / ".git").exists():
        git(root, "init", "--quiet", "--initial-branch=main")
    if not (root / ".dvc").exists():
        with contextlib.redirect_stdout(io.StringIO()):
            Repo.init(str(root)).close()
    with _repo(root) as repo, repo.config.edit("repo") as config:
        config["core"].update({"analytics": False, "check_update": False, "autostage": True})
        # Not hard links: an editor that writes in place would corrupt the cache behind them.
        config["cache"]["type"] = ["reflink", "copy"]
    # For people who call DVC by themselves.
    with _repo(root) as repo, repo.config.edit("local") as config:
        config["core"]["site_cache_dir"] = str(_site_cache(root))
    ignore = root / ".dvcignore"
    lines = ignore.read_text().splitlines() if ignore.exists() else []
    # What file managers drop into folders is not data.
    missing = [line for line in (".DS_Store", "Thumbs.db") if line not in lines]
    if missing:
        write_atomically(ignore, ("\n".join([*lines, *missing]) + "\n").encode())
    git(root, "add", ".dvc/config", ".dvc/.gitignore", ".dvcignore")


def pinned(root: Path) -> DataVersion:
    """What data.dvc says, without looking at the data; raises DataError when there is no valid pin."""
    path = root / PIN
    if not path.is_file():
        raise DataError(f"{root} has no {PIN}; add images with `visionloop data add FOLDER` (one sub-folder per class)")
    try:
        content = yaml.safe_load(path.read_text())
        out = content["outs"][0]
        dvc_hash, num_files, size = str(out["md5"]), int(out["nfiles"]), int(out["size"])
        if _LEDGER_KEY not in (content.get("meta") or {}):
            raise DataError(
                f"{path} was made by DVC alone: no picture is frozen as test yet. `visionloop data add` without a folder "
                f"takes over what lies in {DATA}/ as it is"
            )
        expected_ledger = str(content["meta"][_LEDGER_KEY])
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
    return DataVersion(dvc_hash=dvc_hash, num_files=num_files, bytes=size, ledger_sha256=expected_ledger)


def adoptable(root: Path) -> bool:
    """Whether a data set without a test ledger may get its first one: nothing is pinned, or by DVC alone.

    A pin of ours without its ledger has lost it: another draw would move test pictures into training.
    """
    try:
        content = yaml.safe_load((root / PIN).read_text())
    except FileNotFoundError:
        return True
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and _LEDGER_KEY not in (content.get("meta") or {})


def pin(root: Path) -> DataVersion:
    """Record the present content of `data/` and the ledger as the new data version; stages both in git."""
    ledger_sha256 = hashlib.sha256((root / TEST_LEDGER).read_bytes()).hexdigest()
    with _repo(root) as repo:
        repo.add(str(root / DATA))
    path = root / PIN
    content = yaml.safe_load(path.read_text())
    content["meta"] = {**content.get("meta", {}), _LEDGER_KEY: ledger_sha256}
    write_atomically(path, yaml.safe_dump(content, sort_keys=False).encode())
    git(root, "add", PIN, TEST_LEDGER, ".gitignore")
    return pinned(root)


def changes(root: Path) -> dict[str, list[str]]:
    """Files of `data/` that differ from data.dvc: {'added' | 'modified' | 'deleted': paths}; empty when equal.

    Where DVC's cache lacks the old version, which files differ cannot be told: {'unknown': [data/]}.
    """
    if _directory_hash(root) == pinned(root).dvc_hash:
        return {}
    with _repo(root) as repo:
        status = repo.data_status(granular=True)
    found: dict[str, list[str]] = {}
    uncommitted: dict[str, Any] = dict(status.get("uncommitted", {}))
    for kind in ("added", "modified", "deleted"):
        entries = [entry if isinstance(entry, str) else str(entry["path"]) for entry in uncommitted.get(kind, [])]
        files = sorted(entry for entry in entries if entry.startswith(f"{DATA}/") and not entry.endswith("/"))
        if files:
            found[kind] = files
    return found or {"unknown": [f"{DATA}/ (the pinned version is not in DVC's cache)"]}


def verify(root: Path) -> DataVersion:
    """The pinned version, once `data/` is known to hold exactly its bytes; raises DataDiffers naming files."""
    version = pinned(root)
    if not (root / DATA).is_dir():
        raise DataDiffers(
            f"{root / DATA} is not there, {PIN} pins {counted(version.num_files, 'file')} ({version.dvc_hash}); "
            f"fetch them with `visionloop data pull`"
        )
    found = _directory_hash(root)
    if found == version.dvc_hash:
        return version
    listing = changes(root)
    named = "; ".join(
        f"{len(files)} {kind} ({', '.join(files[:3])}{', ...' if len(files) > 3 else ''})" for kind, files in listing.items()
    )
    raise DataDiffers(
        f"{root / DATA} differs from {PIN}: expected {version.dvc_hash}, found {found}. {named or 'its files changed'}. "
        f"To make this a new version: `visionloop data add`. To go back: `visionloop data pull --force`"
    )


def _directory_hash(root: Path) -> str:
    from dvc_data.hashfile.build import build

    with _repo(root) as repo:
        # Not find_outs_by_path: it builds the graph of every output in the repository first.
        out = repo.stage.load_one(str(root / PIN)).outs[0]
        _, _, found = build(out.cache, out.fs_path, out.fs, out.hash_name, dry_run=True, ignore=out.dvcignore)
        return str(found.hash_info.value)


def keep(root: Path) -> None:
    """Put the bytes of `data/`, which have to be the pinned ones, into DVC's cache; raises DataDiffers."""
    verify(root)
    pin_bytes = (root / PIN).read_bytes()
    with _repo(root) as repo:
        repo.commit(str(root / PIN), force=True)
    # DVC writes the pin anew and wraps its lines; the version is the same, and so should git's view of it be.
    write_atomically(root / PIN, pin_bytes)


def push(root: Path) -> int:
    """Send the pinned version to the remote; returns how many objects were sent. Raises DataDiffers, DataError."""
    # DVC sends what its cache holds, and calls it a success when that is nothing.
    keep(root)
    with _repo(root) as repo, _remote():
        return int(repo.push())


def pull(root: Path, *, force: bool = False) -> int:
    """Bring the pinned version from the remote into `data/`; returns how many files changed."""
    with _repo(root) as repo, _remote():
        statistics = repo.pull(force=force)
    return sum(int(count) for name, count in statistics["stats"].items() if name != "fetched")


def set_remote(root: Path, url: str, *, endpoint_url: str | None = None) -> None:
    """Use `url` (a folder or s3://bucket/prefix) as the default remote. Credentials stay in the AWS environment."""
    scheme, separator, _ = url.partition("://")
    # DVC would take the rest for a folder's name, or find out at the first push that it lacks a library.
    if not separator and re.match(r"[^/\\]+@[^/\\]+:", url):
        raise ConfigError(f"{url!r} is an address for ssh; a remote is a folder or s3://bucket/prefix")
    if separator and scheme not in ("s3", "file") and importlib.util.find_spec(f"dvc_{scheme}") is None:
        raise ConfigError(
            f"{scheme}:// is no remote that works here; use a folder (also a mounted one) or s3://bucket/prefix"
        )
    with _repo(root) as repo, repo.config.edit("repo") as config:
        config["remote"]["storage"] = {"url": url} | ({"endpointurl": endpoint_url} if endpoint_url else {})
        config["core"]["remote"] = "storage"
    git(root, "add", ".dvc/config")
