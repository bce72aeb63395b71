"""DVC in a workspace: its settings, its place, its remote, and how it is opened.

DVC is asked for its hashes, its cache and its remotes alone. It sees no git (`no_scm`): what git is told is told by
`components/git.py`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import git
from components.companions import COMPANIONS, PIN, TEST_LEDGER
from components.contracts.errors import ConfigError, DataError
from components.data_folder import DATA, ignore_rules, import_dvc
from components.store import write_atomically

if TYPE_CHECKING:
    from dvc.repo import Repo

STATE = ".visionloop"
"""The folder of a workspace that git ignores: tables, artefacts, caches."""
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
GIT_ATTRIBUTES = (
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
traceless: ContextVar[bool] = ContextVar("traceless", default=False)


@contextlib.contextmanager
def leaving_no_trace() -> Iterator[None]:
    """Meanwhile what only reads writes no cache of DVC's either: every file is hashed anew."""
    before = traceless.set(True)
    try:
        yield
    finally:
        traceless.reset(before)


@contextlib.contextmanager
def opened(root: Path, config: Mapping[str, Any] | None = None) -> Iterator[Repo]:
    import logging

    import_dvc()  # whose import sets the levels of its loggers
    # What goes wrong reaches us as an exception; DVC's own words would come twice, and without saying what to do here.
    logging.getLogger("dvc").setLevel(logging.CRITICAL + 1)
    logging.getLogger("dvc_data").setLevel(logging.CRITICAL + 1)
    logging.getLogger("dvc_objects").setLevel(logging.CRITICAL + 1)
    with contextlib.ExitStack() as stack:
        # The library of DVC's hash cache takes a dollar sign in a path for a variable, and DVC writes into that cache also
        # where it only reads: there, hashes are computed anew.
        unusable = traceless.get() or "$" in str(root) or not os.access(root / STATE, os.W_OK)
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
def transferring() -> Iterator[None]:
    """Say of a remote that refuses or does not answer what it is, instead of a stack of storage libraries."""
    from botocore.exceptions import BotoCoreError

    try:
        yield
    except (OSError, BotoCoreError) as error:
        raise DataError(
            f"the data could not be transferred ({type(error).__name__}: {error}). Check the disk's free space, the "
            f"remote's address (`visionloop data remote`) and, for S3, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error


def remote_url(repo: Repo) -> str | None:
    name = repo.config["core"].get("remote")
    return str(repo.config["remote"][name]["url"]) if name and name in repo.config["remote"] else None


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
    if not (root / ".git").exists() and (own_repository or not git.holds(root)):
        git.run(root, "init", "--quiet", "--initial-branch=main")
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
    add_lines(root / ".gitattributes", GIT_ATTRIBUTES)
    ours = (_CONFIG.as_posix(), ".dvc/.gitignore", ".dvcignore", ".gitattributes")
    git.stage(root, *(name for name in ours if (root / name).exists()))


def add_lines(path: Path, wanted: tuple[str, ...]) -> None:
    """Append to a text file the lines that it lacks; its own bytes, whatever their encoding, stay as they are."""
    there = path.read_bytes() if path.exists() else b""
    missing = [line for line in wanted if line.encode() not in there.splitlines()]
    if missing:
        end = b"" if not there or there.endswith(b"\n") else b"\n"
        write_atomically(path, there + end + ("\n".join(missing) + "\n").encode())


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
    with opened(root, {"remote": {"storage": {**values, "url": url}}, "core": {"remote": "storage"}}) as repo:
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
    git.stage(root, _CONFIG.as_posix())
