"""The console on the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli.answers import HERE, Commands, InWorkspace
from flows.terminal import to_stderr


def add_console_commands(app: Commands) -> None:
    """Put it onto the command line."""
    app.command()(console)


def console(
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; 8400 or the next free one by default.")] = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; beyond this machine that needs users and --url.")
    ] = "127.0.0.1",
    url: Annotated[str, typer.Option(help="What browsers call it behind a proxy that ends TLS: https://...")] = "",
    proxy: Annotated[str, typer.Option(help="Address of that proxy, which says where requests come from.")] = "127.0.0.1",
    workspace: InWorkspace = HERE,
) -> None:
    """Look at candidates, decide, label and see what serves, in a browser.

    Without users (`visionloop user add`) it answers this machine alone, and a decision asks for a name, as `--as` does. With
    users everybody signs in, and may do what their role may.
    """
    from flows.workspace.settings import prepare_environment
    from flows.workspace.workspace import Workspace

    found = Workspace.find(workspace)
    prepare_environment(found.state)
    from flows.console.server import serve

    serve(found, host=host, port=port, url=url, proxy=proxy, say=to_stderr)
