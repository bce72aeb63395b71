"""Data versions: which bytes `data/` holds, pinned by `data.dvc` in git. The only DVC code.

A data version is files committed together: `data.dvc` (DVC's directory hash), `data.test-ledger.csv` (which pictures are
test for ever, `components/splitting.py`) and the companions (`components/companions.py`). `data.dvc` carries the sha256 of
each in its `meta`, so none can change without the others.

DVC is asked for its hashes, its cache and its remotes alone. It sees no git (`no_scm`): what git is told is told here, and
files that are replaced are replaced here, whole and verified first.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from components.companions import COMPANIONS, digest_of_all, digests
from components.contracts.data import DataVersion
from components.contracts.errors import ConfigError, DataDiffers, DataError
from components.contracts.wording import counted, is_text
from components.differences import difference
from components.store import explained, write_atomically

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.repo import Repo
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

DATA = "data"
PIN = "data.dvc"
TEST_LEDGER = "data.test-ledger.csv"
_LEDGER_KEY = "visionloop_test_ledger_sha256"
_RENAMED_KEY = "visionloop_renamed"
STATE = ".visionloop"
"""The folder of a workspace that git ignores: tables, artefacts, caches."""
_OID = re.compile(r"[0-9a-f]{32}")
_CONFIG = Path(".dvc", "config")
_NEW_CONFIG = """\
[core]
    analytics = false
    check_update = false
    autostage = true
[cache]
    type = "reflink,copy"
"""
_DVC_IGNORED = ("/config.local", "/tmp", "/cache")  # noqa: S108 - of the .dvc folder
_DATA_IGNORED = (".DS_Store", "Thumbs.db", "[Tt]humbs.db", "[Dd]esktop.ini")
"""What file managers drop into folders is not data."""
_ATTRIBUTES = (
    f"/{PIN} -text -filter",
    f"/{TEST_LEDGER} -text -filter",
    *(f"/{companion.file} -text -filter" for companion in COMPANIONS),
    "/.dvc/** -text",
    "/.dvcignore -text",
    "/.gitattributes -text",
    "/.gitignore -text",
)
"""The pin names the bytes of the ledger and the companions, and rules are read by line: no setting of git may change any of
them on the way in or out."""
_GIT_OPTIONS = (
    "-c",
    "core.hooksPath=/dev/null",
    "-c",
    "core.fsmonitor=false",
    "-c",
    "core.autocrlf=false",
    "-c",
    "core.safecrlf=false",
    "-c",
    "core.quotePath=false",
    "-c",
    "color.ui=false",
)
"""What other people set for git and must not change what is recorded here."""


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", *_GIT_OPTIONS, *arguments]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", errors="replace", check=False)
    except FileNotFoundError:
        raise DataError("git is not installed; data versions live in git, install it and run the command again") from None


def _git_failed(root: Path, arguments: tuple[str, ...], done: subprocess.CompletedProcess[str]) -> NoReturn:
    said = (done.stderr or done.stdout).strip()
    if "safe.directory" in said:
        # Git's own proposal names the folder that it means, in whatever language it speaks.
        proposed = re.search(r"safe\.directory (.*)", said)
        folder = proposed[1].strip() if proposed else f"'{root}'"
        raise DataError(
            f"git does not trust {root}, because it belongs to another account. If you trust it: "
            f"`git config --global --add safe.directory {folder}`; otherwise work as the account that owns it"
        )
    command = next((argument for argument in arguments if not argument.startswith("-") and "=" not in argument), "")
    raise DataError(f"git {command} failed in {root}: {said}")


def git(root: Path, *arguments: str) -> str:
    """Run git in `root` and return what it printed; raises DataError with git's own words."""
    done = _git(root, *arguments)
    if done.returncode:
        _git_failed(root, arguments, done)
    return done.stdout.strip()


def try_git(root: Path, *arguments: str) -> str | None:
    """What git printed, byte for byte where that is UTF-8; None where it says no."""
    done = _git(root, *arguments)
    return None if done.returncode else done.stdout


def git_state(root: Path) -> tuple[str, bool]:
    """Commit of the workspace (`none` before the first one), and whether files that git sees differ from it."""
    asked = ("rev-parse", "--quiet", "--verify", "HEAD")
    done = _git(root, *asked)
    if done.returncode == 1 and not done.stderr.strip():
        return "none", True
    if done.returncode:
        _git_failed(root, asked, done)
    # A look at the state is no reason to write git's index, which others may be about to.
    status = git(
        root,
        "--no-optional-locks",
        "status",
        "--porcelain",
        "--untracked-files=normal",
        "--ignore-submodules=none",
        "--",
        ".",
    )
    return done.stdout.strip(), bool(status)


def stage(root: Path, *names: str) -> None:
    """Stage files of ours in git, whatever anyone's ignore rules say; raises DataError unless git then has them."""
    git(root, "add", "--force", "--", *names)
    listed = git(root, "ls-files", "-z", "--", *names).split("\0")
    missing = sorted(set(names) - set(listed))
    if missing:
        raise DataError(f"git did not take {', '.join(missing)} in {root}; see `git status` there")


def repository(root: Path) -> Path:
    """The top folder of the git repository that the workspace is in; raises DataError when there is none."""
    return Path(git(root, "rev-parse", "--show-toplevel"))


def _belongs_to_a_repository(root: Path) -> bool:
    """Whether a repository above `root` would hold its files: it has a work tree there and does not ignore the folder."""
    if not any((folder / ".git").exists() for folder in root.resolve().parents):
        return False
    inside = _git(root, "rev-parse", "--is-inside-work-tree")
    if inside.returncode and "safe.directory" in inside.stderr:
        _git_failed(root, ("rev-parse",), inside)
    if inside.stdout.strip() != "true":
        return False
    return _git(root, "check-ignore", "--quiet", "--no-index", "--", str(root.resolve())).returncode != 0


_traceless: ContextVar[bool] = ContextVar("traceless", default=False)


@contextlib.contextmanager
def leaving_no_trace() -> Iterator[None]:
    """Meanwhile what only reads writes no cache of DVC's either: every file is hashed anew."""
    before = _traceless.set(True)
    try:
        yield
    finally:
        _traceless.reset(before)


@contextlib.contextmanager
def _repo(root: Path, config: Mapping[str, Any] | None = None) -> Iterator[Repo]:
    import logging

    import dvc  # noqa: F401 - whose import sets the levels of its loggers

    # What goes wrong reaches us as an exception; DVC's own words would come twice, and without saying what to do here.
    logging.getLogger("dvc").setLevel(logging.CRITICAL + 1)
    logging.getLogger("dvc_data").setLevel(logging.CRITICAL + 1)
    logging.getLogger("dvc_objects").setLevel(logging.CRITICAL + 1)
    with contextlib.ExitStack() as stack:
        # The library of DVC's hash cache takes a dollar sign in a path for a variable, and DVC writes into that cache also
        # where it only reads: there, hashes are computed anew.
        unusable = _traceless.get() or "$" in str(root) or not os.access(root / STATE, os.W_OK)
        cache = stack.enter_context(tempfile.TemporaryDirectory()) if unusable else str(_site_cache(root))
        yield from _opened(root, cache, config or {})


def _opened(root: Path, site_cache: str, config: Mapping[str, Any]) -> Iterator[Repo]:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import SCMError

    settings: dict[str, dict[str, Any]] = {
        # DVC would keep a machine-wide cache under the system's temporary folder. Told anew each time and not written
        # down: an absolute path in a file would lead a workspace that was moved or copied into its old place.
        "core": {"no_scm": True, "site_cache_dir": site_cache},
        # Not hard links: an editor that writes in place would corrupt the cache behind them.
        "cache": {"type": ["reflink", "copy"]},
    }
    for section, values in config.items():
        settings[section] = {**settings.get(section, {}), **values}
    ignore_rules(root / DATA)  # says which file it is that cannot be read
    _let_paths_have_braces()
    try:
        with Repo(str(root), config=settings) as repo:
            yield repo
    except (DvcException, SCMError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise DataError(f"DVC: {error}{cause}") from error


@functools.cache
def _let_paths_have_braces() -> None:
    """DVC's progress bar takes the path of a cache or a remote for a format string: there, braces are doubled."""
    from dvc_data.hashfile import _progress

    plain = _progress.QueryingProgress

    def bar(*arguments: Any, name: str | None = None, **options: Any) -> Any:
        return plain(*arguments, name=name and name.replace("{", "{{").replace("}", "}}"), **options)

    _progress.QueryingProgress = bar


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
    return root / STATE / "cache" / "dvc"


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


def initialise(root: Path, *, own_repository: bool = False) -> None:
    """Make `root` a folder of git with DVC in it; leaves what is already there alone.

    Inside another repository that does not ignore the folder, that one is used: a repository inside it would be left out of
    its commits. `own_repository` makes one in any case.
    """
    root.mkdir(parents=True, exist_ok=True)
    if not (root / ".git").exists() and (own_repository or not _belongs_to_a_repository(root)):
        git(root, "init", "--quiet", "--initial-branch=main")
    (root / ".dvc").mkdir(exist_ok=True)
    if not (root / _CONFIG).exists():
        write_atomically(root / _CONFIG, _NEW_CONFIG.encode())
    if not (root / ".dvc" / "config.local").exists():
        # For people who call DVC by themselves; `settle` follows the workspace.
        quote = "'" if '"' in str(root) else '"'
        line = f"[core]\n    site_cache_dir = {quote}{_site_cache(root)}{quote}\n"
        write_atomically(root / ".dvc" / "config.local", line.encode())
    add_lines(root / ".dvc" / ".gitignore", _DVC_IGNORED)
    if not (root / PIN).exists():
        # With a pin, another rule could leave files out that it counts.
        add_lines(root / ".dvcignore", _DATA_IGNORED)
    add_lines(root / ".gitattributes", _ATTRIBUTES)
    ours = (_CONFIG.as_posix(), ".dvc/.gitignore", ".dvcignore", ".gitattributes")
    stage(root, *(name for name in ours if (root / name).exists()))


def add_lines(path: Path, wanted: tuple[str, ...]) -> None:
    """Append to a text file the lines that it lacks; its own bytes, whatever their encoding, stay as they are."""
    there = path.read_bytes() if path.exists() else b""
    missing = [line for line in wanted if line.encode() not in there.splitlines()]
    if missing:
        end = b"" if not there or there.endswith(b"\n") else b"\n"
        write_atomically(path, there + end + ("\n".join(missing) + "\n").encode())


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


@dataclass(frozen=True)
class Listing:
    """The files of a version, as they lie in a data folder."""

    classes: dict[str, list[Path]]
    """Files directly in a class folder by class, sorted; hidden ones are not among them."""
    strays: list[Path]
    """Files of the version that belong to no class: beside the classes, deeper than a class, or hidden."""
    ignored: list[Path]
    """Files and folders that DVC's ignore rules leave out of the version."""

    @property
    def files(self) -> list[Path]:
        """Every file of the version, sorted."""
        return sorted([*(path for paths in self.classes.values() for path in paths), *self.strays])


def ignore_rules(data: Path) -> Callable[[str, list[str], list[str]], tuple[list[str], list[str]]]:
    """DVC's own rule of what a version leaves out: (absolute folder under `data`, sub-folders, files) -> those that stay."""
    from dvc.fs import localfs
    from dvc.ignore import DvcIgnoreFilter

    try:
        rules: Callable[[str, list[str], list[str]], tuple[list[str], list[str]]] = DvcIgnoreFilter(
            localfs, str(data.parent.absolute())
        )
        rules(str(data.absolute()), [], [])
    except (OSError, UnicodeDecodeError, re.error) as error:
        raise DataError(f"{data.parent / '.dvcignore'} cannot be read ({error}); expected lines of text in UTF-8") from error
    return rules


def listing(data: Path) -> Listing:
    """What lies in a data folder, by the one rule that adding, validating, comparing and pinning share.

    Raises DataError for what no version can hold and nothing can read: links to folders or to nothing, special files, names
    that are not UTF-8, folders without read permission.
    """
    rules = ignore_rules(data)
    classes: dict[str, list[Path]] = {}
    strays: list[Path] = []
    ignored: list[Path] = []

    def stop(error: OSError) -> NoReturn:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; give read permission and run again") from error

    for place, folders, names in os.walk(data.absolute(), onerror=stop):
        kept_folders, kept_names = rules(place, folders, names)
        ignored += [Path(place, name) for name in {*folders, *names} - {*kept_folders, *kept_names}]
        for path in (Path(place, name) for name in kept_folders):
            expect_utf8(path)
            if path.is_symlink():
                raise DataError(f"{shown(path)} is a link to a folder, which no version holds; put the folder itself there")
        for path in (Path(place, name) for name in kept_names):
            expect_utf8(path)
            if path.name == ".dvcignore":
                raise DataError(f"{shown(path)}: DVC takes rules from the workspace's .dvcignore only; move them there")
            if not path.is_file():
                kind = "a link to nothing" if path.is_symlink() else "no regular file"
                raise DataError(f"{shown(path)} is {kind}, which no version holds; remove it")
            label, *rest = path.relative_to(data.absolute()).parts
            if len(rest) == 1 and not label.startswith(".") and not rest[0].startswith("."):
                classes.setdefault(label, []).append(data / label / rest[0])
            else:
                strays.append(data.joinpath(label, *rest))
        folders[:] = kept_folders
    return Listing({label: sorted(paths) for label, paths in sorted(classes.items())}, sorted(strays), sorted(ignored))


def expect_utf8(path: Path) -> None:
    """Raises DataError for a name that a version, which is text, cannot hold."""
    try:
        os.fsencode(path.name).decode()
    except UnicodeDecodeError:
        raise DataError(f"{shown(path)}: the name is not UTF-8; rename it (`convmv` does many at once)") from None


def shown(path: Path) -> str:
    """A path as it can be printed anywhere, on one line: what is no text or no printable character is escaped."""
    return "".join(
        character if is_text(character) else "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
        for character in str(path)
    )


def _out(repo: Repo) -> Output:
    # Not find_outs_by_path: it builds the graph of every output in the repository first.
    return repo.stage.load_one(str(Path(repo.root_dir, PIN))).outs[0]


def _tree(repo: Repo, data: Path, *, hash_name: str = "md5", store: bool = False) -> tuple[Any, Tree]:
    """DVC's (meta, tree) of a data folder, which is exactly what `listing` lists; with `store`, in the cache too."""
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.transfer import transfer

    cache = repo.cache.local if hash_name == "md5" else repo.cache.legacy
    expected = {path.relative_to(data).parts for path in listing(data).files}
    if not expected:
        raise DataError(
            f"{data} holds no file that a version could hold: it is empty, or {data.parent / '.dvcignore'} leaves out "
            f"what is there. Add images with `visionloop data add FOLDER`"
        )
    # A folder of our own making lies where a person's rules may leave everything out.
    rules = repo.dvcignore if data == Path(repo.root_dir, DATA) else None
    try:
        staging, meta, tree = build(cache, str(data), repo.fs, hash_name, dry_run=not store, ignore=rules)
        found = {key for key, _, _ in tree}
        if found != expected:
            differing = sorted("/".join(key) for key in found ^ expected)
            raise DataError(f"{data} changed while it was read ({', '.join(differing[:3])}); run the command again")
        if store:
            with explained("keep the data in", Path(repo.root_dir, ".dvc", "cache")):
                failed = transfer(staging, cache, {tree.hash_info}, shallow=False, hardlink=False).failed
            if failed:
                raise DataError(
                    f"{counted(len(failed), 'file')} of {data} could not be copied into DVC's cache; run the command again"
                )
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; mend it, run it again") from error
    return meta, tree


def store(root: Path) -> None:
    """Put the bytes that now lie in `data/` into DVC's cache, so that a version of them can be pinned."""
    with _repo(root) as repo:
        _tree(repo, root / DATA, store=True)


def pin(root: Path, *, renamed: tuple[str, str] | None = None) -> DataVersion:
    """Record the present content of `data/`, the ledger and the companions as the new data version; stages all in git."""
    ledger_sha256 = hashlib.sha256((root / TEST_LEDGER).read_bytes()).hexdigest()
    with _repo(root) as repo:
        meta, tree = _tree(repo, root / DATA, store=True)
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
        add_lines(root / ".gitattributes", _ATTRIBUTES)  # a workspace from before companions has no rules for them
        names.append(".gitattributes")
    stage(root, *(name for name in names if (root / name).exists()))
    gone = [each.file for each in COMPANIONS if each.name not in companions]
    git(root, "rm", "--cached", "--quiet", "--ignore-unmatch", "--", *gone)
    return pinned(root)


def _before(out: Output) -> Tree | None:
    """The files of the pinned version, as its listing in DVC's cache names them; None when the cache lacks it whole.

    Raises DataError for a listing that would lead outside of `data/` or of the cache.
    """
    from dvc_data.hashfile.tree import Tree

    try:
        content = _listing_file(out).read_bytes()
    except FileNotFoundError:
        return None
    # DVC reads whatever lies there. A remote, or a disk, may have put something else in the place.
    if f"{hashlib.md5(content, usedforsecurity=False).hexdigest()}.dir" != out.hash_info.value:
        return None
    tree = Tree.load(out.cache, out.hash_info)
    for name, oid in _hashes(tree).items():
        _expect_inside(name, oid)
    return tree


def _expect_inside(name: str, oid: str) -> None:
    if not {"", ".", ".."}.isdisjoint(name.split("/")) or not _OID.fullmatch(oid):
        raise DataError(
            f"the list of files that {PIN} names is not one that DVC wrote ({name!r}, {oid!r}); nothing was read or "
            f"written by it. Ask who made this version, or bring an earlier {PIN} back with git"
        )


def _hash_of_file(out: Output, path: Path) -> str:
    from dvc_data.hashfile.hash import hash_file

    return str(hash_file(str(path), out.fs, out.hash_name)[1].value)


def _listing_file(out: Output) -> Path:
    return Path(out.cache.oid_to_path(str(out.hash_info.value)))


def _hashes(tree: Tree) -> dict[str, str]:
    """Content hash by path (relative to data/)."""
    return {"/".join(key): str(found.value) for key, _, found in tree if found is not None}


def hashes(root: Path) -> dict[str, str]:
    """md5 of every file that lies in `data/`, by its path there. DVC reads only what it has not seen as it is now."""
    with _repo(root) as repo:
        return _hashes(_tree(repo, root / DATA)[1])


def pinned_hashes(root: Path) -> dict[str, str]:
    """The same of the pinned version, without a look at its files; empty where DVC's cache lacks its list of them.

    So is that of a version that DVC 2 pinned, whose hashes of files that look like text are no md5 of their bytes.
    """
    with _repo(root) as repo:
        out = _out(repo)
        tree = _before(out) if out.hash_name == "md5" else None
        return {} if tree is None else _hashes(tree)


def changes(root: Path) -> dict[str, list[str]]:
    """Files of `data/` that differ from data.dvc by kind (added, modified, deleted, renamed, relabelled); empty when equal.

    The same bytes elsewhere are told as `data/old -> data/new`: renamed in one class, relabelled from one to another, and
    a class whose files all went to a new one as a renamed class. What .dvcignore hides has a kind of its own. Where DVC's
    cache lacks the listing of the pinned version, which files differ cannot be told: {'unknown': [why]}.
    """
    pinned(root)
    with _repo(root) as repo:
        out = _out(repo)
        _, tree = _tree(repo, root / DATA, hash_name=out.hash_name)
        if tree.hash_info.value == out.hash_info.value:
            return {}
        before = _before(out)
        if before is None:
            return {
                "unknown": [
                    f"{DATA}/ is another version; which files differ cannot be told, since DVC's cache lacks the pinned "
                    f"version's list of files ({out.hash_info.value})"
                ]
            }
        found = _difference(_hashes(before), _hashes(tree))
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
    with _repo(root) as repo:
        missing, total = _missing(_out(repo))
        remote = _remote_url(repo)
    if not missing:
        return f"To go back to the pinned version: {command}"
    if remote:
        return f"To go back to the pinned version: {command}, if it was pushed to {remote}; if not, nothing is changed"
    return (
        f"There is no way back to the pinned version from here: DVC's cache lacks {missing} of its "
        f"{counted(total, 'file')} and no remote is set. Set the one that it was pushed to with `visionloop data remote URL`"
    )


def _missing(out: Output) -> tuple[int, int]:
    """How many files of the pinned version DVC's cache lacks, of how many; all of them when its listing is missing."""
    before = _before(out)
    if before is None:
        total = int(out.meta.nfiles or 0)
        return total, total
    wanted = set(_hashes(before).values())
    absent = {oid for oid in wanted if not Path(out.cache.oid_to_path(oid)).is_file()}
    return sum(oid in absent for oid in _hashes(before).values()), len(before)


def _objects(out: Output) -> set[HashInfo]:
    """The pinned version's listing and, where the cache has it, every file that it names."""
    before = _before(out)
    files = [] if before is None else [found for _, _, found in before if found is not None]
    return {out.hash_info, *files}


def _remote_url(repo: Repo) -> str | None:
    name = repo.config["core"].get("remote")
    return str(repo.config["remote"][name]["url"]) if name and name in repo.config["remote"] else None


def hash_of(root: Path, folder: Path) -> str:
    """DVC's hash of a folder's files, as it would be pinned; DVC names such a hash `....dir`."""
    with _repo(root) as repo:
        hash_name = _out(repo).hash_name if (root / PIN).exists() else "md5"
        return str(_tree(repo, folder, hash_name=hash_name)[1].hash_info.value)


def keep(root: Path) -> None:
    """Put the bytes of `data/`, which have to be the pinned ones, into DVC's cache; raises DataDiffers."""
    verify(root)
    with _repo(root) as repo:
        out = _out(repo)
        there = _hashes(_tree(repo, root / DATA, hash_name=out.hash_name)[1])
        _mend_by(out, {oid: root / DATA / name for name, oid in there.items()})
        _tree(repo, root / DATA, hash_name=out.hash_name, store=True)


def _mend_by(out: Output, paths: Mapping[str, Path]) -> None:
    """Replace damaged objects of DVC's cache by the files that hold their bytes.

    DVC takes what lies in its cache for what it is named after, and would send it.
    """
    for oid, path in paths.items():
        damaged = Path(out.cache.oid_to_path(oid)).is_file() and not _is_kept(out, oid)
        if damaged and not _replaced(out, oid, functools.partial(shutil.copyfile, path)):
            raise DataError(f"{path} changed while it was read; run the command again")


def push(root: Path) -> int:
    """Send the pinned version to the remote; returns how many objects were sent. Raises DataDiffers, DataError."""
    # DVC sends what its cache holds, and calls it a success when that is nothing.
    keep(root)
    with _repo(root) as repo:
        remote = _remote_url(repo)
        if remote is None:
            raise DataError("no remote is set; name one with `visionloop data remote URL` (a folder, or s3://bucket/prefix)")
        with _remote():
            sent = repo.cloud.push(_objects(_out(repo)))
        if sent.failed:
            raise DataError(
                f"{counted(len(sent.failed), 'file')} could not be sent to {remote}, {len(sent.transferred)} sent; check "
                f"its free space and permissions, and run the command again: it sends what is missing"
            )
        return len(sent.transferred)


def pull(root: Path, *, force: bool = False) -> int:
    """Bring the pinned version into `data/`, from DVC's cache or the remote; returns how many files changed.

    The whole version is made and verified beside `data/` first; then the two change places in one step, so that whatever
    happens `data/` is either as it was or the pinned version. Where it cannot be moved as a whole (it is a link or a mount
    of its own), its files are replaced one by one, and a run that is killed there is completed by running it again.
    Raises DataError when neither cache nor remote has all of it, DataDiffers when files would be lost that are in no
    version and `force` was not given; `data/` is untouched then.
    """
    pinned(root)
    data, scratch = root / DATA, root / STATE / "tmp"
    for stale in scratch.glob("pull-*"):
        shutil.rmtree(stale, ignore_errors=True)
    made = scratch / f"pull-{uuid.uuid4().hex}"
    with _repo(root) as repo:
        out = _out(repo)
        there = _hashes(_tree(repo, data, hash_name=out.hash_name)[1]) if data.is_dir() and any(data.iterdir()) else {}
        _fetch(repo, out)
        wanted = _wanted(out)
        if there == wanted:
            return 0
        lost = sorted(name for name, oid in there.items() if wanted.get(name) != oid and not _is_kept(out, oid))
        if lost and not force:
            raise DataDiffers(
                f"this would lose {counted(len(lost), 'file')} of {data} that no version holds ({', '.join(lost[:3])}). To "
                f"keep what is there: `visionloop data add`. To drop it: `visionloop data pull --force`"
            )
        try:
            with explained("make the pinned version in", made):
                damaged = _make(out, wanted, there, data, made)
                if damaged:
                    # An object that is not what it is named after is no copy of anything; the remote may have a good one.
                    _mend(repo, out, damaged)
                    shutil.rmtree(made)
                    damaged = _make(out, wanted, there, data, made)
            if damaged:
                objects = ", ".join(sorted(f"{oid[:2]}/{oid[2:]}" for oid in damaged)[:3])
                told = f"DVC's cache has {counted(len(damaged), 'damaged file')} ({objects}) of the pinned version"
                remote = _remote_url(repo)
                if remote is None:
                    raise DataError(
                        f"{told}, and no remote is set to fetch them from. {data} and the cache were not touched. Set the "
                        f"remote that it was pushed to with `visionloop data remote URL`"
                    )
                raise DataError(
                    f"{told}, and the remote {remote} has no whole copy of them. {data} and the cache were not touched. "
                    f"Remove these from the remote, where they are there, and run `visionloop data push` in a workspace "
                    f"that has the pinned version"
                )
            _put_in_place(made, data, wanted, there)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return sum(wanted.get(name) != there.get(name) for name in {*wanted, *there})


def files_of(root: Path) -> dict[str, str]:
    """`pinned_hashes`; raises DataError where they are not known."""
    found = pinned_hashes(root)
    if not found:
        raise DataError(
            f"DVC's cache lacks the list of files of the pinned version, or DVC 2 wrote it: `visionloop data pull` brings "
            f"the list back from the remote, `visionloop data add` pins what lies in {DATA}/ anew"
        )
    return found


def moved(files: Mapping[str, str], moves: Mapping[str, str | None]) -> dict[str, str]:
    """The files of a version after `moves`: a new path for some, None for those that leave it."""
    after = {name: oid for name, oid in files.items() if name not in moves}
    for name, target in moves.items():
        if target is not None:
            assert target not in after, f"{target} is taken"
            after[target] = files[name]
    return after


def move(root: Path, before: Mapping[str, str], moves: Mapping[str, str | None]) -> None:
    """Let `data/` hold the files of a version after `moves`, in one step; nothing is pinned by it.

    `before` are the files of the version that is pinned. Their bytes are in DVC's cache, and whole, before one of them
    leaves `data/`. Where `data/` cannot be replaced as a whole (see `pull`), a run that is killed is completed by the same
    call. Raises DataDiffers for a file in `data/` that is neither of the version nor of what is to be made of it.
    """
    data, scratch = root / DATA, root / STATE / "tmp"
    for stale in scratch.glob("pull-*"):
        shutil.rmtree(stale, ignore_errors=True)
    made = scratch / f"pull-{uuid.uuid4().hex}"
    with _repo(root) as repo:
        out = _out(repo)
        there = _hashes(_tree(repo, data, hash_name=out.hash_name)[1])
        wanted = moved(before, moves)
        strange = sorted(name for name, oid in there.items() if oid not in (before.get(name), wanted.get(name)))
        if strange:
            raise DataDiffers(f"{data} holds what no version does: {', '.join(strange[:3])}; see `visionloop data status`")
        if there == wanted:
            return
        _mend_by(out, {oid: data / name for name, oid in there.items()})
        _tree(repo, data, hash_name=out.hash_name, store=True)
        try:
            with explained("make the next version in", made):
                damaged = _make(out, wanted, there, data, made)
            if damaged:
                raise DataError(f"DVC's cache changed while it was read ({', '.join(sorted(damaged)[:3])}); run it again")
            _put_in_place(made, data, wanted, there)
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _wanted(out: Output) -> dict[str, str]:
    tree = _before(out)
    assert tree is not None
    return _hashes(tree)


def _fetch(repo: Repo, out: Output) -> None:
    """Bring what DVC's cache lacks of the pinned version from the remote; raises DataError unless it is whole then."""
    missing, total = _missing(out)
    if not missing:
        return
    remote = _remote_url(repo)
    if remote is None:
        raise DataError(
            f"DVC's cache lacks {missing} of the {counted(total, 'file')} of the pinned version ({out.hash_info.value}), "
            f"and no remote is set to fetch them from. {DATA}/ was not touched. Set the remote that it was pushed to with "
            f"`visionloop data remote URL`, or pin what is in {DATA}/ now with `visionloop data add`"
        )
    with _remote():
        if _before(out) is None and _listing_file(out).exists():
            _mend(repo, out, {str(out.hash_info.value)})  # DVC would not replace a damaged one
        elif _before(out) is None:
            repo.cloud.pull([out.hash_info])
        if _before(out) is not None:
            repo.cloud.pull(_objects(out))
    missing, total = _missing(out)
    if missing:
        raise DataError(
            f"neither DVC's cache here nor the remote {remote} holds {missing} of the {counted(total, 'file')} of the "
            f"pinned version ({out.hash_info.value}). {DATA}/ was not touched. Run `visionloop data push` in the workspace "
            f"that has them, name another remote (`visionloop data remote URL`), or pin what {DATA}/ holds "
            f"(`visionloop data add`)"
        )


def _mend(repo: Repo, out: Output, damaged: set[str]) -> None:
    """Replace damaged objects of DVC's cache by the remote's, where that has them whole; the others stay as they are."""
    if _remote_url(repo) is None:
        return
    with _remote():
        remote = repo.cloud.get_remote_odb(None, "pull", hash_name=out.hash_name)
        for oid in damaged:
            with contextlib.suppress(FileNotFoundError):
                _replaced(out, oid, functools.partial(remote.fs.get_file, remote.oid_to_path(oid)))


def _replaced(out: Output, oid: str, bring: Callable[[str], object]) -> bool:
    """Let an object of DVC's cache be what `bring` writes, once that is whole; False where it is something else."""
    cached = Path(out.cache.oid_to_path(oid))
    proposed = cached.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        bring(str(proposed))
        if _hash_of_file(out, proposed) != oid.removesuffix(".dir"):
            return False
        proposed.chmod(0o444)
        os.replace(proposed, cached)
    finally:
        proposed.unlink(missing_ok=True)
    return True


def _is_kept(out: Output, oid: str) -> bool:
    """Whether DVC's cache has an object, and whole."""
    cached = Path(out.cache.oid_to_path(oid))
    return cached.is_file() and _hash_of_file(out, cached) == oid


def _make(out: Output, wanted: Mapping[str, str], there: Mapping[str, str], data: Path, made: Path) -> set[str]:
    """Write the wanted files, and what DVC ignores in `data`, into `made`; returns the objects whose bytes were wrong."""
    made.mkdir(parents=True)
    damaged = set()
    for name, oid in wanted.items():
        target = made / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if there.get(name) == oid and linked(data / name, target):
            continue
        shutil.copyfile(out.cache.oid_to_path(oid), target)
        if _hash_of_file(out, target) != oid:
            damaged.add(oid)
    if data.is_dir():
        for path in listing(data).ignored:
            for file in [path] if not path.is_dir() or path.is_symlink() else path.rglob("*"):
                if file.is_dir() and not file.is_symlink():
                    continue
                target = made / file.relative_to(data)
                target.parent.mkdir(parents=True, exist_ok=True)
                if not linked(file, target):
                    shutil.copy2(file, target, follow_symlinks=False)
        shutil.copymode(data, made)
    return damaged


def linked(source: Path, target: Path) -> bool:
    """Give a file a second name; False where the file system, or a boundary between two, does not allow it."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        return False
    return True


def _put_in_place(made: Path, data: Path, wanted: Mapping[str, str], there: Mapping[str, str]) -> None:
    if not os.path.lexists(data):
        os.rename(made, data)
        return
    if not data.is_symlink() and _exchanged(made, data):
        return
    for name, oid in wanted.items():
        if there.get(name) != oid:
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            temporary = (data / name).with_name(f".{uuid.uuid4().hex}.tmp")
            shutil.copyfile(made / name, temporary)
            os.replace(temporary, data / name)
    for name in there.keys() - wanted.keys():
        (data / name).unlink()


def _exchanged(first: Path, second: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


def set_remote(root: Path, url: str, *, endpoint_url: str | None = None) -> None:
    """Use `url` (a folder or s3://bucket/prefix) as the default remote. Credentials stay in the AWS environment.

    Raises ConfigError or DataError for an address that cannot be used or written; then nothing is changed.
    """
    from configobj import ConfigObj, ConfigObjError
    from dvc.config import Config

    scheme, separator, _ = url.partition("://")
    # DVC would take the rest for a folder's name, or find out at the first push that it lacks a library.
    if not separator and re.match(r"[^/\\]+@[^/\\]+:", url):
        raise ConfigError(f"{url!r} is an address for ssh; a remote is a folder or s3://bucket/prefix")
    if separator and scheme not in ("s3", "file") and importlib.util.find_spec(f"dvc_{scheme}") is None:
        raise ConfigError(
            f"{scheme}:// is no remote that works here; use a folder (also a mounted one) or s3://bucket/prefix"
        )
    path = root / _CONFIG
    written = url
    if not re.match(r"\w+://", url) and not url.startswith("~"):
        # A relative path is meant from where the person stands, and kept relative to the file, as DVC reads it.
        written = url if Path(url).is_absolute() else os.path.relpath(url, path.parent)
    values = {"url": written} | ({"endpointurl": endpoint_url} if endpoint_url else {})
    try:
        config = ConfigObj(io.BytesIO(path.read_bytes()), encoding="utf-8", interpolation=False, write_empty_values=True)
    except (ConfigObjError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); mend it, or restore it with `git checkout -- {_CONFIG}`"
        ) from error
    config['remote "storage"'] = values
    config.setdefault("core", {})["remote"] = "storage"
    with _repo(root, {"remote": {"storage": {**values, "url": url}}, "core": {"remote": "storage"}}) as repo:
        repo.cloud.get_remote()
    text = io.BytesIO()
    config.write(text)
    proposed = root / STATE / "tmp" / f"config-{uuid.uuid4().hex}"
    proposed.parent.mkdir(parents=True, exist_ok=True)
    try:
        proposed.write_bytes(text.getvalue())
        understood = Config.load_file(str(proposed))["remote"].get("storage")
    except Exception as error:  # whatever DVC's reader makes of it
        raise ConfigError(f"{url!r} cannot be written into {path} ({error}); name the folder otherwise") from error
    finally:
        proposed.unlink(missing_ok=True)
    if understood != values:
        raise ConfigError(f"{url!r} cannot be written into {path}: DVC would read {understood}; name the folder otherwise")
    write_atomically(path, text.getvalue())
    stage(root, _CONFIG.as_posix())


@dataclass(frozen=True)
class Listed:
    """The files that a version names, as far as it is known here."""

    files: dict[str, str] | None
    """Hash of the bytes by path in `data/`; None where nobody here has the list."""
    why_not: str = ""


class Objects:
    """The bytes of versions that are here: DVC's cache, and `data/` as it lies. Nothing but lists of files is fetched."""

    def __init__(self, root: Path, repo: Repo) -> None:
        self._root, self._repo = root, repo

    def now(self) -> tuple[str, int, dict[str, str]]:
        """DVC's hash of what lies in `data/`, its size in bytes, and its files."""
        meta, tree = _tree(self._repo, self._root / DATA)
        return str(tree.hash_info.value), int(meta.size), _hashes(tree)

    def listed(self, dvc_hash: str, hash_name: str) -> Listed:
        """The files of a version by its hash; the list alone is fetched from the remote where the cache lacks it."""
        path = Path(self._cache(hash_name).oid_to_path(dvc_hash))
        remote, trouble = _remote_url(self._repo), ""
        if not path.is_file() and remote is not None and not _traceless.get():
            from dvc_data.hashfile.hash_info import HashInfo

            try:
                with _remote():
                    self._repo.cloud.pull([HashInfo(hash_name, dvc_hash)])
            except Exception as error:  # of a library behind it: what is not here is told, and nothing else fails for it
                trouble = f" ({str(error) or type(error).__name__})"
        try:
            content = path.read_bytes()
        except OSError:
            where = f"neither DVC's cache nor the remote {remote}{trouble} has" if remote else "DVC's cache does not have"
            return Listed(None, f"{where} the list of files of {dvc_hash}")
        if f"{hashlib.md5(content, usedforsecurity=False).hexdigest()}.dir" != dvc_hash:
            return Listed(None, f"DVC's cache has a damaged list of files of {dvc_hash}; `visionloop data pull` mends it")
        return Listed(_listed_files(content))

    def read(self, path: str, oid: str, hash_name: str) -> bytes | str:
        """The bytes of a file of a version; a sentence where they are not here."""
        cached = Path(self._cache(hash_name).oid_to_path(oid))
        for place in (cached, self._root / DATA / path):
            try:
                content = place.read_bytes() if place.is_file() and place.stat().st_size <= _LARGEST else b""
            except OSError:
                continue
            if hashlib.md5(content, usedforsecurity=False).hexdigest() == oid:
                return content
        return "damaged in DVC's cache" if cached.is_file() and hash_name == "md5" else "not in DVC's cache"

    def _cache(self, hash_name: str) -> Any:
        return self._repo.cache.local if hash_name == "md5" else self._repo.cache.legacy


_LARGEST = 1 << 30
"""Bytes of a file that is still looked at; no picture that is accepted comes near it."""


@contextlib.contextmanager
def objects(root: Path) -> Iterator[Objects]:
    """What is here of the bytes of versions."""
    with _repo(root) as repo:
        yield Objects(root, repo)


def _listed_files(content: bytes) -> dict[str, str]:
    """Read DVC's list of a version's files; raises DataError for one that leads outside of `data/` or of the cache."""
    import json

    try:
        files = {str(entry["relpath"]): str(entry["md5"]) for entry in json.loads(content)}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"the list of files of a version is not one that DVC wrote ({type(error).__name__})") from error
    for name, oid in files.items():
        _expect_inside(name, oid)
    return files


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
