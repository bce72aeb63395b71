"""The environment, read once per process: addresses, and quiet defaults for every library.

| variable                  | meaning                                       | default                                |
|---------------------------|-----------------------------------------------|----------------------------------------|
| VISIONLOOP_TRACKING_URI   | MLflow tracking and registry URI              | SQLite under .visionloop/              |
| VISIONLOOP_LEDGER_URL     | SQLAlchemy URL of the ledger                  | SQLite under .visionloop/              |
| VISIONLOOP_NUM_THREADS    | threads of training, features and engines     | the cores of this machine, at most 8   |
| VISIONLOOP_CACHE_GB       | most that features, maps and pictures take in the cache | 20                           |
| VISIONLOOP_FORMATS        | encodings that new data and serving accept, comma-separated | all: JPEG,PNG,WebP,BMP,PPM,TIFF |
| VISIONLOOP_MAX_PIXELS     | most pixels of a picture that is accepted     | 67108864                               |
| VISIONLOOP_MAX_IMAGE_MB   | most megabytes of one (of 1,048,576 bytes)    | 32                                     |
| VISIONLOOP_RELEASES       | where releases are published: folder or s3:// | .visionloop/releases                   |
| VISIONLOOP_PREDICTIONS    | where the sealed prediction log goes: folder or s3:// | .visionloop/predictions           |
| VISIONLOOP_CAPTURES       | where kept images of production go: folder or s3:// | .visionloop/serving/captures        |
| VISIONLOOP_WINDOWS        | where the evidence of judged windows goes: folder or s3:// | .visionloop/monitoring       |
| VISIONLOOP_NOTIFY         | Apprise URLs and Prefect blocks, comma-separated | nobody                              |
| VISIONLOOP_LOOP_URL       | SQLAlchemy URL of alarms, decisions, labels   | the ledger's, else SQLite under .visionloop/ |
| VISIONLOOP_STUDIES        | SQLAlchemy URL of the studies of searches     | SQLite under .visionloop/              |
| VISIONLOOP_PREFECT_DB     | database of the Prefect server of `up`        | SQLite under .visionloop/up/           |
| VISIONLOOP_OIDC_ISSUER, ..._CLIENT_ID, ..._CLIENT_SECRET | OpenID Connect provider of the console | none |
| VISIONLOOP_RAY_ADDRESS    | Ray cluster of `launcher: ray` and `tune --ray`, HOST:PORT | none                      |
| PREFECT_API_URL           | Prefect server that runs are recorded by      | that of `visionloop up`, else a temporary one |
| PREFECT_API_AUTH_STRING, PREFECT_API_KEY | its credential: user:password, or a key | that of `visionloop up`, else none |
"""

from __future__ import annotations

import atexit
import contextlib
import getpass
import json
import os
import shutil
import tempfile
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from components.contracts.errors import ConfigError, UnknownName
from components.formats import FORMATS, PINNED, Accepted, shown
from components.ray_address import RayAddress


@dataclass(frozen=True)
class OpenIDProvider:
    """Who says who signs in at the console."""

    issuer: str
    client_id: str
    client_secret: str = field(repr=False)


@dataclass(frozen=True)
class Settings:
    """Addresses and limits of this process."""

    tracking_uri: str
    tracking_is_local: bool
    ledger_url: str
    num_threads: int
    releases_url: str
    predictions_url: str
    captures_url: str
    """Where images of production are kept."""
    windows_url: str
    """Where the evidence of judged windows lies."""
    notify: tuple[str, ...]
    prefect_api_url: str
    accepted: Accepted = field(default_factory=Accepted)
    """Which pictures new data may have and serving answers."""
    cache_bytes: int = 20 * 10**9
    """Most that the caches of training data take; the least recently used give way."""
    loop_url: str = ""
    studies_url: str = ""
    ray_address: RayAddress = field(default_factory=RayAddress)
    oidc: OpenIDProvider | None = None
    prefect_database_url: str = ""
    prefect_authorization: str = field(default="", repr=False)
    """The header that Prefect's client would send, without a profile."""
    prefect_is_plain: bool = True
    """Whether address and header are all that a request to the server needs."""


_PREFECTS_OWN = ("PREFECT_CLIENT_CUSTOM_HEADERS", "PREFECT_API_SSL_CERT_FILE", "PREFECT_API_TLS_INSECURE_SKIP_VERIFY")
"""Settings that change how a server is talked to, and that Prefect's client alone understands."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
UP = "up"
"""Folder of the workspace's state in which `visionloop up` keeps what it started."""


def prepare_environment(state: Path) -> None:
    """Set the workspace's defaults, which have to be there before any library is imported; what is set already stays."""
    workspace_state, state = state, _writable(state)
    for name in ("prefect", "cache"):
        (state / name).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PREFECT_HOME", str(state / "prefect"))
    home = Path(os.environ["PREFECT_HOME"])
    if set(str(home)) & set("?#%$") and not _prefect_database_is_set():
        # Prefect would write its path into an address as it is, and end up in a file beside the workspace.
        os.environ["PREFECT_API_DATABASE_CONNECTION_URL"] = sqlite_url(home / "prefect.db", driver="aiosqlite")
    if "'" in str(Path.cwd()):
        # MLflow writes the folder it is started in into a statement, quote and all; nothing of ours is kept there.
        os.environ.setdefault("_MLFLOW_SERVER_ARTIFACT_ROOT", (state / "mlruns").as_uri())
    os.environ.setdefault("MPLCONFIGDIR", str(state / "cache" / "matplotlib"))
    # Torch asks for the account's name to choose this folder, and an account may have none.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(state / "cache" / "torchinductor"))
    if have_home(state):
        (state / "cache" / "home").mkdir(exist_ok=True)
    _reach_own_machine()
    if "PREFECT_API_URL" not in os.environ:
        os.environ.update(standing(workspace_state))


def _writable(state: Path) -> Path:
    """Where libraries keep things of their own; for a workspace that can only be read, one that goes with the process."""
    with contextlib.suppress(OSError):
        state.mkdir(parents=True, exist_ok=True)
    if os.access(state, os.W_OK):
        return state
    scratch = Path(tempfile.mkdtemp(prefix="visionloop-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return scratch


def have_home(state: Path) -> bool:
    """A home and a name, which libraries ask for, where the account has none; true where the home is ours.

    An account of a container that runs under any number has neither.
    """
    home = str(state / "cache" / "home")
    if not _has_home():
        os.environ["HOME"] = home
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["LOGNAME"] = _unnamed()
    return os.environ.get("HOME") == home


def _unnamed() -> str:
    return f"uid-{os.getuid()}"


def _prefect_database_is_set() -> bool:
    return any(os.environ.get(f"PREFECT_{part}_DATABASE_CONNECTION_URL") for part in ("API", "SERVER"))


def _has_home() -> bool:
    try:
        return Path.home().is_dir()
    except (RuntimeError, OSError):
        return False


def _reach_own_machine() -> None:
    """What listens on this machine's own addresses is never asked through a proxy."""
    for name in ("NO_PROXY", "no_proxy"):
        given = os.environ.get(name) or os.environ.get(name.swapcase()) or ""
        listed = [part.strip() for part in given.split(",") if part.strip()]
        os.environ[name] = ",".join([*listed, *(address for address in LOOPBACK if address not in listed)])


def login_name() -> str:
    """The account's name; raises ConfigError where it has none, as in a container that runs under any number."""
    name = ""
    with contextlib.suppress(KeyError, OSError, ImportError):
        name = getpass.getuser()
    if name in ("", _unnamed()):
        raise ConfigError(f"the account that runs this (uid {os.getuid()}) has no name; say who you are: --as NAME")
    return name


def standing(state: Path) -> dict[str, str]:
    """Address and credential of the Prefect server that `visionloop up` keeps running here; empty when there is none."""
    try:
        told = json.loads((state / UP / "server.json").read_text())
        alive = began(told["pid"]) == told["began"] and is_of(told, state / UP)
        secret = (state / UP / "auth").read_text().strip()
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {"PREFECT_API_URL": told["api"], "PREFECT_API_AUTH_STRING": secret} if alive else {}


def identity(folder: Path) -> str:
    """What a folder keeps when it is renamed or mounted elsewhere, and what a copy of it does not have."""
    status = folder.stat()
    return f"{status.st_dev}:{status.st_ino}"


def is_of(told: Mapping[str, Any], folder: Path) -> bool:
    """Whether the process that a file in this folder tells about was started for it; older files do not say."""
    return told.get("folder") in (None, identity(folder))


def began(pid: int) -> str | None:
    """When a process began, in a spelling that no clock can change; None when there is none, or it ended."""
    import psutil

    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"
    except (OSError, IndexError):
        pass
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.1f}"
    except psutil.Error:
        return None


_OF_A_PERSONS_GIT = ("GIT_AUTHOR_", "GIT_COMMITTER_", "GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM")
"""What git is told in the environment about a person or a machine, and not about one repository."""


def leave_foreign_git() -> None:
    """Forget what git set for a hook or an alias: it names another repository, index or work tree than the workspace's."""
    for name in list(os.environ):
        if name.startswith("GIT_") and not name.startswith((*_OF_A_PERSONS_GIT, "GIT_EXEC_PATH", "GIT_PYTHON_")):
            del os.environ[name]


def sqlite_url(path: Path, *, driver: str = "pysqlite") -> str:
    """SQLAlchemy's address of a SQLite file, whatever characters its path has."""
    plain = str(path)
    if not set(plain) & set("?#%$"):
        return f"sqlite:///{plain}" if driver == "pysqlite" else f"sqlite+{driver}:///{plain}"
    # A question mark would end the path, and nothing can escape it but SQLite's own addresses. The driver is named because
    # MLflow makes the folders of what begins with `sqlite:///`, and would take this for a relative path.
    return f"sqlite+{driver}:///file:{quote(plain)}?uri=true"


def use_environment(values: Mapping[str, str]) -> None:
    """Set variables of this process and of those that it starts."""
    os.environ.update(values)


def environment_with(values: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with other values, for a process that is started."""
    return {**os.environ, **values}


def sees_gpus(number: int, each: int) -> dict[str, str]:
    """What is set for the process of this number, so that it has so many GPUs of its own, of those that this one sees."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(name) for name in range((number + 1) * each)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[number * each : (number + 1) * each])}


def num_threads() -> int:
    """Threads that this process may use; raises ConfigError."""
    threads = os.environ.get("VISIONLOOP_NUM_THREADS") or str(min(8, _cores()))
    if not threads.isdigit() or int(threads) < 1:
        raise ConfigError(f"VISIONLOOP_NUM_THREADS is {threads!r}; expected a whole number of at least 1")
    return int(threads)


def read_settings(state: Path) -> Settings:
    """Settings from the environment; `state` is the workspace's .visionloop folder. Raises ConfigError."""
    tracking = os.environ.get("VISIONLOOP_TRACKING_URI", "")
    authorization = _prefect_authorization()
    return Settings(
        tracking_uri=tracking or sqlite_url(state / "mlflow.db"),
        tracking_is_local=not tracking.startswith(("http://", "https://")),
        ledger_url=os.environ.get("VISIONLOOP_LEDGER_URL") or sqlite_url(state / "ledger.db"),
        num_threads=num_threads(),
        accepted=_accepted(),
        cache_bytes=_whole("VISIONLOOP_CACHE_GB", 20, 1_000_000) * 10**9,
        releases_url=os.environ.get("VISIONLOOP_RELEASES") or str(state / "releases"),
        predictions_url=os.environ.get("VISIONLOOP_PREDICTIONS") or str(state / "predictions"),
        captures_url=_address("VISIONLOOP_CAPTURES", own_captures(state)),
        windows_url=_address("VISIONLOOP_WINDOWS", state / "monitoring"),
        notify=tuple(filter(None, (part.strip() for part in os.environ.get("VISIONLOOP_NOTIFY", "").split(",")))),
        prefect_api_url=os.environ.get("PREFECT_API_URL", ""),
        loop_url=os.environ.get("VISIONLOOP_LOOP_URL")
        or os.environ.get("VISIONLOOP_LEDGER_URL")
        or sqlite_url(state / "loop.db"),
        studies_url=os.environ.get("VISIONLOOP_STUDIES") or sqlite_url(state / "studies.db"),
        oidc=_oidc(),
        ray_address=_ray_address(),
        prefect_database_url=os.environ.get("VISIONLOOP_PREFECT_DB", ""),
        prefect_authorization=authorization,
        # A header that cannot be sent would be quoted in an error, secret and all.
        prefect_is_plain=authorization.isascii()
        and authorization.isprintable()
        and not any(os.environ.get(name) for name in _PREFECTS_OWN),
    )


def _oidc() -> OpenIDProvider | None:
    issuer, client, secret = (
        os.environ.get(f"VISIONLOOP_OIDC_{name}", "") for name in ("ISSUER", "CLIENT_ID", "CLIENT_SECRET")
    )
    if not issuer:
        return None
    if not client or not secret:
        raise ConfigError(
            "VISIONLOOP_OIDC_ISSUER needs VISIONLOOP_OIDC_CLIENT_ID and VISIONLOOP_OIDC_CLIENT_SECRET beside it"
        )
    if not issuer.startswith("https://") and urlsplit(issuer).hostname not in LOOPBACK:
        raise ConfigError(f"VISIONLOOP_OIDC_ISSUER is {issuer!r}; expected the address of the issuer, https://...")
    return OpenIDProvider(issuer, client, secret)


def _ray_address() -> RayAddress:
    """By Ray's own settings where it is told to use TLS."""
    head = os.environ.get("VISIONLOOP_RAY_ADDRESS", "")
    if os.environ.get("RAY_USE_TLS", "").lower() not in ("1", "true"):
        return RayAddress(head)
    certificate, key, authority = (
        os.environ.get(f"RAY_TLS_{name}", "") for name in ("SERVER_CERT", "SERVER_KEY", "CA_CERT")
    )
    return RayAddress(head, (certificate, key, authority))


def own_captures(state: Path) -> Path:
    """The folder of the servers of a workspace for images, where they stay or wait to be sent."""
    return state / "serving" / "captures"


def _address(variable: str, default: Path) -> str:
    """A folder, whatever folder a process is started in, or an address of S3."""
    given = os.environ.get(variable, "").removeprefix("file://")
    if given.startswith("s3://") and urlsplit(given).netloc:
        return given.rstrip("/")
    if "://" in given:
        raise ConfigError(f"{variable} is {given!r}; expected a folder, or s3://bucket/prefix")
    return str(Path(given).absolute() if given else default)


def _accepted() -> Accepted:
    known = {name.lower(): name for name in FORMATS} | {"jpg": "JPEG", "tif": "TIFF"}
    given = [part.strip() for part in os.environ.get("VISIONLOOP_FORMATS", "").split(",") if part.strip()]
    for name in given:
        if name.lower() not in known:
            raise UnknownName("format in VISIONLOOP_FORMATS", name, shown(FORMATS).split(", "))
    chosen = {known[name.lower()] for name in given} or set(FORMATS)
    return Accepted(
        formats=tuple(name for name in FORMATS if name in chosen),
        max_pixels=_whole("VISIONLOOP_MAX_PIXELS", Accepted().max_pixels, PINNED.max_pixels),
        max_bytes=_whole("VISIONLOOP_MAX_IMAGE_MB", Accepted().max_bytes >> 20, PINNED.max_bytes >> 20) << 20,
    )


def _whole(variable: str, default: int, most: int) -> int:
    given = os.environ.get(variable) or str(default)
    if not (given.isascii() and given.isdigit() and len(given) < 12 and 1 <= int(given) <= most):
        raise ConfigError(f"{variable} is {given!r}; expected a whole number from 1 to {most}")
    return int(given)


def basic(credential: str) -> str:
    """The header of HTTP basic authentication for `user:password`."""
    return "Basic " + b64encode(credential.encode()).decode()


def _prefect_authorization() -> str:
    pair, key = os.environ.get("PREFECT_API_AUTH_STRING"), os.environ.get("PREFECT_API_KEY")
    if pair:
        return basic(pair)
    return f"Bearer {key}" if key else ""


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
