"""The command that shows the loop close."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.answers import AsJson, finish
from flows.terminal import to_stderr


def demo(
    directory: Annotated[
        Path, typer.Option("--directory", help="Scratch workspace; kept, so a second demo goes on where this one stopped.")
    ] = Path(".demo"),
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the Prefect server.")] = None,
    stop: Annotated[bool, typer.Option("--stop", help="Leave nothing running at the end: no pages to look at.")] = False,
    json_: AsJson = False,
) -> None:
    """The whole loop on the embedded digits, in a scratch workspace: no account, no server of yours, no download."""
    from flows.demo.workspace import prepare
    from flows.workspace.settings import prepare_environment, read_settings

    workspace = prepare(directory)
    prepare_environment(workspace.state)
    from flows.demo.story import Show
    from flows.starting import start_training
    from flows.training.chosen import choose
    from flows.up.processes import Up

    show = Show(workspace, lambda: start_training(choose("digits", workspace), by=None), to_stderr, port=port)
    up = Up(workspace, read_settings(workspace.state))
    try:
        phases = show.run()
        if not stop:
            up.start_console(say=lambda line: to_stderr(f"  {line}"))
            up.start_pages(say=lambda line: to_stderr(f"  {line}"))
        answer = show.finish({} if stop else up.addresses())
    finally:
        if stop:
            up.stop(say=to_stderr)
    finish(answer | {"phases": phases}, json_, lambda: show.text(answer))
    if phases["train"]["outcome"] != "candidate":
        raise typer.Exit(1)
