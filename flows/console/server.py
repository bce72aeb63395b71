"""Running the console: one process, on loopback unless it is told otherwise."""

from __future__ import annotations

import socket

from components.contracts.errors import ConfigError
from flows.console.application import Application
from flows.console.config import PORT, console_config
from flows.terminal import Say
from flows.workspace.people import accounts
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace

_TRIED = 50


def serve(
    workspace: Workspace,
    *,
    host: str,
    port: int | None,
    url: str,
    proxy: str = "127.0.0.1",
    say: Say,
) -> None:
    """Answer until the process is told to end. `proxy` is believed where it says that requests come from, with a `url`.

    Raises ConfigError before anything listens: for a port that is taken, or an address that strangers could decide at.
    """
    import uvicorn

    from flows.console.app import make_app

    settings = read_settings(workspace.state)
    has_users = accounts(workspace).any_users()
    console_config(host, port or PORT, url, has_users=has_users)  # what is wrong is said before a port is taken
    listening = listen(host, port)
    config = console_config(host, listening.getsockname()[1], url, has_users=has_users)
    application = Application(workspace, settings, config)
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(application),
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=True,
            # Addresses that a proxy tells are believed where a proxy was named.
            proxy_headers=bool(url),
            forwarded_allow_ips=proxy,
            timeout_graceful_shutdown=5,
        )
    )
    say(f"the console answers at {config.address}" + ("" if has_users else " (this machine only: there are no users)"))
    server.run(sockets=[listening])


def listen(host: str, port: int | None) -> socket.socket:
    """A socket on the port, or where none was asked for, on the next free one."""
    try:
        family = socket.getaddrinfo(host, None)[0][0]
    except OSError as error:
        raise ConfigError(f"--host {host!r} is no address of this machine ({error.strerror or error})") from None
    for candidate in (port,) if port is not None else range(PORT, PORT + _TRIED):
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((host, candidate))
            made.listen(128)
        except OSError as error:
            made.close()
            if port is not None:
                raise ConfigError(
                    f"port {port} on {host} cannot be had ({error.strerror}); name another with --port"
                ) from None
            continue
        return made
    raise ConfigError(f"ports {PORT} to {PORT + _TRIED - 1} on {host} are all taken; name another with --port")
