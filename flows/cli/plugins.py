"""Commands about a workspace's own plug-ins."""

from __future__ import annotations

from typing import Annotated

import typer

from components.contracts.wording import counted
from flows.cli.answers import HERE, AsJson, Commands, InWorkspace, finish

plugin_app = Commands(
    help="A workspace's own sources, findings, targets, gates, tasks, losses, augmentations, passes, backbones, detectors."
)
_FAMILY = "Its family: sources, findings, targets, gates, tasks, losses, augmentations, passes, backbones or detectors."


@plugin_app.command("new")
def plugin_new(
    family: Annotated[str, typer.Argument(help=_FAMILY)],
    name: Annotated[str, typer.Argument(help="Its name, which is that of its file.")],
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Write plugins/FAMILY/NAME.py: a small working plug-in to edit."""
    from flows.workspace.own_plugins import new_plugin
    from flows.workspace.workspace import Workspace

    made = new_plugin(Workspace.find(workspace).root, family, name)
    finish(
        made.to_json(), json_, lambda: f"{made.file} works as it is. Next: edit it; visionloop plugin check {family} {name}"
    )


@plugin_app.command("check")
def plugin_check(
    family: Annotated[str | None, typer.Argument(help=_FAMILY + " All of them by default.")] = None,
    name: Annotated[str | None, typer.Argument(help="One plug-in of the family.")] = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Try the workspace's plug-ins against their families' contracts. Exit status 1 when one does not keep its own."""
    from flows.workspace.own_plugins import check_plugins
    from flows.workspace.workspace import Workspace

    checked = check_plugins(Workspace.find(workspace).root, family, name)

    def told() -> str:
        if not checked.checked:
            return "No plug-ins of the workspace's own to check. Next: visionloop plugin new FAMILY NAME"
        lines = [f"{f.file}:{f.line}: {f.family}/{f.name}: {f.message}" for f in checked.findings]
        lines += [f"not executed here: {line}" for line in checked.not_executed_here]
        return "\n".join(
            [*lines, f"{counted(len(checked.checked), 'plug-in')} checked, {counted(len(checked.findings), 'finding')}"]
        )

    finish(checked.to_json(), json_, told)
    if checked.findings:
        raise typer.Exit(1)
