"""Commands about what stays running."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from components.contracts.wording import counted
from flows.cli.answers import HERE, AsJson, Commands, InWorkspace, finish
from flows.terminal import silent, to_stderr


def add_up_commands(app: Commands) -> None:
    """Put them onto the command line."""
    for command in (up, deploy, status, down):
        app.command()(command)


def up(
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="A model to loop. By default all of the ledger and of loops/.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the Prefect server; 4200 or the next free one by default.")
    ] = None,
    console: Annotated[bool, typer.Option(help="Also the console, where people look at candidates and decide.")] = True,
    pages: Annotated[bool, typer.Option("--pages", help="Also MLflow's and Evidently's pages, for looking.")] = False,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Start what the loop needs on this machine.

    A Prefect server with a credential of its own, deployments, schedules, automations, a worker, and the console. Running it
    again starts what is missing, brings the deployments up to date, and takes up trainings that were stopped.
    """
    from flows.workspace.settings import prepare_environment
    from flows.workspace.workspace import Workspace

    found = Workspace.find(workspace)
    prepare_environment(found.state)
    from flows.up.stack import bring_up

    answer = bring_up(found, model or [], port=port, console=console, pages=pages, say=silent if json_ else to_stderr)
    finish(answer, json_, lambda: _shown_up(answer))


def deploy(
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="A model to deploy. By default all.")] = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Make deployments, schedules and automations on the Prefect server that PREFECT_API_URL names, or that of `up`."""
    from flows.workspace.settings import prepare_environment
    from flows.workspace.workspace import Workspace

    found = Workspace.find(workspace)
    prepare_environment(found.state)
    from flows.up.stack import deploy_models

    models = deploy_models(found, model or [], say=silent if json_ else to_stderr)
    finish({"models": models}, json_, lambda: f"Deployed: {', '.join(models) or 'no model yet'}.")


def _shown_up(answer: dict[str, Any]) -> str:
    lines = [f"{name:9} {address}" for name, address in answer["pages"].items()]
    lines.append(f"Prefect and MLflow ask for the user and password in {answer['credential_file']}.")
    for model, facts in answer["models"].items():
        lines.append(f"{model}: {', '.join(facts['deployments'])}; {counted(len(facts['automations']), 'automation')}")
    if not answer["models"]:
        lines.append("No model yet: train one, promote it, and run `visionloop up` again.")
    lines.append("Next: visionloop status; visionloop down")
    return "\n".join(lines)


def status(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """What runs, what was seen last, what waits for a person. Exit status 1 when something that should run does not."""
    from flows.up.processes import Up
    from flows.workspace.settings import prepare_environment, read_settings
    from flows.workspace.workspace import Workspace

    found = Workspace.find(workspace)
    prepare_environment(found.state)
    from flows.up.stack import state_of

    answer = state_of(Up(found, read_settings(found.state)))
    finish(answer, json_, lambda: _shown_status(answer))
    if answer["problems"]:
        raise typer.Exit(1)


def _shown_status(answer: dict[str, Any]) -> str:
    lines = []
    if answer["team"]:
        lines.append(f"server    {answer['team']}, which PREFECT_API_URL names")
    for name in ("server", "worker") if not answer["team"] else ():
        running = answer[name]
        lines.append(f"{name:9} " + (f"runs (pid {running['pid']}, {running['api']})" if running else "does not run"))
    for model, facts in answer["models"].items():
        lines.append(f"{model}: champion version {facts['champion'] or '(none)'}")
        last = facts["last_window"]
        lines.append(
            f"  last window   {last['status']}, {counted(last['rows'], 'prediction')} until {last['until'][:16]} UTC"
            if last
            else "  last window   none so far"
        )
        lines += [f"  waits         version {version} for approval" for version in facts["waiting_versions"]]
        lines += [f"  waits         {key} for its training" for key in facts["pending"]]
        lines += [f"  trains        {key}" for key in facts["running"]]
        lines += [f"  next          {name} at {when[:16]} UTC" for name, when in facts["scheduled"].items()]
        if facts["stopped"]:
            lines.append(f"  switched off  by {facts['stopped']}")
    lines += [f"problem: {problem}" for problem in answer["problems"]]
    return "\n".join(lines)


def down(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Stop what `visionloop up` started. A training that runs is stopped too; the next `up` or watch takes it up again."""
    from flows.up.processes import Up
    from flows.workspace.settings import read_settings
    from flows.workspace.workspace import Workspace

    found = Workspace.find(workspace)
    standing = Up(found, read_settings(found.state))
    with standing.locked():
        ended = standing.stop(say=silent if json_ else to_stderr)
    finish({"stopped": ended}, json_, lambda: f"Stopped: {', '.join(ended) or 'nothing ran'}.")
