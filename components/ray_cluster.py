"""A Ray cluster that exists already, for a training or the trials of a search: whether it answers, and what is asked of it.

Nothing here starts a cluster, or imports Ray: see `components/ray_job.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import plugins
from components.compute import PLACE
from components.contracts.errors import ClusterUnavailable, ConfigError
from components.ray_address import RayAddress

if TYPE_CHECKING:
    import grpc

SETTING = "VISIONLOOP_RAY_ADDRESS"
_ADDRESS = re.compile(r"[\w.-]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")
_ANSWERS_S = 5.0
_SERVING = b"\x08\x01"
"""What gRPC's health service answers: status SERVING."""
_LIBRARIES = ("numpy", "openvino", "pillow", "timm", "torch")
"""Other versions of these train to other bits."""


def expect_answers(address: RayAddress, needed_by: str = f"{PLACE}.launcher: ray") -> None:
    """Raise ClusterUnavailable unless a cluster answers at this address within seconds: Ray would try for minutes.

    Raises ConfigError without such an address or its certificates, and where Ray is not installed.
    """
    import grpc

    if not address.head:
        raise ConfigError(
            f"{needed_by} needs a Ray cluster that exists, and {SETTING} names none; set it to the address of its head, "
            f"such as head.example:6379. No cluster is started from here"
        )
    if not _ADDRESS.fullmatch(address.head):
        raise ConfigError(
            f"{SETTING} is {address.head!r}; expected the address of a cluster's head as HOST:PORT, such as "
            f"head.example:6379"
        )
    if find_spec("ray") is None:
        raise ConfigError(f"{needed_by}: Ray is not installed here; run: python -m pip install 'visionloop[ray]'")
    with _channel(address) as channel:
        # The head has gRPC's own health service.
        ask = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            answer = ask(b"", timeout=_ANSWERS_S)
        except grpc.RpcError as error:
            raise ClusterUnavailable(
                f"no Ray cluster answers at {address}, which {SETTING} names ({error.code().name}: {error.details()}); "
                f"start one (`ray start --head`), or correct the address"
            ) from None
    if answer != _SERVING:
        raise ClusterUnavailable(
            f"the Ray cluster at {address}, which {SETTING} names, says that it does not serve; look after it"
        )


def _channel(address: RayAddress) -> grpc.Channel:
    """A channel as Ray itself makes it: past every proxy, and by its certificates where it has them."""
    import grpc

    options = (("grpc.enable_http_proxy", 0),)
    if address.tls is None:
        return grpc.insecure_channel(address.head, options)
    try:
        certificate, key, authority = (Path(file).read_bytes() for file in address.tls)
    except OSError as error:
        raise ConfigError(
            f"RAY_USE_TLS is on, and a file of it cannot be read ({error}); set RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and "
            f"RAY_TLS_CA_CERT to the files of the cluster"
        ) from None
    return grpc.secure_channel(address.head, grpc.ssl_channel_credentials(authority, key, certificate), options)


def command(request: Path) -> list[str]:
    """The command that has a cluster do what a request asks; Ray reports to nobody."""
    return ["env", "RAY_USAGE_STATS_ENABLED=0", sys.executable, "-m", "components.ray_job", str(request)]


@contextlib.contextmanager
def shared_folder(cache: Path) -> Iterator[dict[str, str]]:
    """A folder that every machine of a cluster has to see, and what it holds; it is gone afterwards.

    Those of processes of this machine that were killed go with the next one: a folder's token is locked while it is used.
    """
    folder, token = cache / "ray" / secrets.token_hex(8), secrets.token_hex(16)
    _remove_left(folder.parent)
    folder.mkdir(parents=True)
    with (folder / "token").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write(token)
        held.flush()
        try:
            yield {"shared": str(folder), "token": token}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.parent.rmdir()


def _remove_left(folders: Path) -> None:
    for path in folders.glob("*/token"):
        # Another one may be about to lock its own, or may be gone by now.
        with contextlib.suppress(OSError), path.open() as left:
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if left.read():
                shutil.rmtree(path.parent, ignore_errors=True)


def expect_alike(request: Mapping[str, Any], node: str, here: Mapping[str, str]) -> None:
    """Raise ClusterUnavailable on a machine that does not see the shared folder, or has other versions than the request."""
    path = Path(request["shared"], "token")
    try:
        seen = path.read_text()
    except OSError:
        seen = ""
    if seen != request["token"]:
        raise ClusterUnavailable(
            f"the Ray worker on {node} does not see {path.parent}: workspace, store and cache have to lie on a file system "
            f"that all machines of the cluster share, at the same path"
        )
    there: Mapping[str, str] = request["versions"]
    others = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if others:
        raise ClusterUnavailable(
            f"the Ray worker on {node} has another version of {', '.join(others)} than this machine; install the same "
            f"visionloop, with its locked libraries, on all machines"
        )


def versions() -> dict[str, str]:
    """What a training's result depends on: the code that trains, and the libraries as installed, whatever is locked."""
    return {"visionloop": plugins.source_digest(Path(__file__).with_name("training.py"))} | {
        library: _installed(library) for library in _LIBRARIES
    }


def _installed(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "none"
