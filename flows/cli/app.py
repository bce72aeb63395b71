"""`visionloop`: the loop on the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from components import collector
from flows.cli.answers import Commands
from flows.cli.backup import add_backup_commands
from flows.cli.choosing import choose
from flows.cli.console import add_console_commands
from flows.cli.data import data_app
from flows.cli.data_versions import add_data_version_commands
from flows.cli.demo import demo
from flows.cli.engine import engine_app
from flows.cli.loop import add_loop_commands
from flows.cli.plugins import plugin_app
from flows.cli.registry import add_registry_commands
from flows.cli.serving import add_serving_commands
from flows.cli.training import add_training_commands
from flows.cli.tuning import add_tuning_commands
from flows.cli.up import add_up_commands
from flows.cli.users import user_app

app = Commands(
    name="visionloop",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="""Turn labelled images into engines that are judged and approved before they are served.

    The loop, in order:

    \b
      visionloop init DIR                a workspace: git, DVC, your recipes
      visionloop data add FOLDER         one sub-folder per class -> a pinned data version
      visionloop data check              what is wrong with the images, and what to do about it
      visionloop data review             a page and a CSV of what may be wrong; review apply makes the next version of it
      visionloop data diff | log         what differs between versions, with pictures (--html); who made which, and why
      visionloop data rename-class       another name for a class, by which models of the old name are compared too
      visionloop recipe list | show      what can be trained, and how; new NAME --from RECIPE copies one to edit
      visionloop plugin new | check      plug-ins of your own, and whether they keep their contracts
      visionloop augment preview         a contact sheet of what a recipe's augmentations make of images
      visionloop train --recipe NAME     validate, split, train, export, evaluate, judge, package, register
      visionloop tune --recipe NAME      many trainings, the best as a recipe of its own; study list | show
      visionloop choose --recipe NAME    networks, passes and engines compared on valid, one taken as a recipe of its own
      visionloop candidates | show V     what waits for a person, with the evidence beside the champion
      visionloop console                 the same in a browser: look, approve, promote, go back, label
      visionloop approve V --as WHO      a second person decides; also reject
      visionloop user add | list | token   who may sign in at the console, and what they may do there
      visionloop promote V               everything is checked again, then it goes live; rollback goes back
      visionloop engine list | build     what each version's engines came to, and why; one more, judged as its own
      visionloop engine bundle [V] --out F  an engine for a machine without visionloop, signed; engine verify | bench
      visionloop serve --model NAME      answers over HTTP and gRPC; picks up a new champion by itself
      visionloop predict SOURCE          a folder, .parquet or s3:// through the champion, resumable
      visionloop predictions export      what was answered; also verify and erase
      visionloop up | status | down      what the loop needs: Prefect server, schedules, automations, a worker; deploy
      visionloop watch | windows         does what the champion sees still look like its reference?
      visionloop alarms | sweep          drift that was seen, and what came of it
      visionloop labels import FILE      what people say that images of production show; data add --from-predictions
      visionloop governor history        what may train without a person, and why or why not; stop, start, reset
      visionloop history | who-served    what was decided, and what served at any moment
      visionloop runs                    what was run, and what came of it
      visionloop store verify | gc       every artefact against its digests; remove what nothing reaches
      visionloop backup FILE | restore   one file that a workspace can be made anew from, while it is in use
      visionloop report                  the page of all this
      visionloop demo                    all of it on real digits, in a scratch workspace

    Every command that answers takes --json and then prints one JSON object as its last line.
    Exit status: 0 done, 1 the answer is no (rejected, drifted, not as it should be), 2 an error that says what to do.""",
)
add_training_commands(app)
add_tuning_commands(app)
app.command()(choose)
add_data_version_commands(data_app)
app.add_typer(data_app, name="data")
app.add_typer(plugin_app, name="plugin")
add_registry_commands(app)
app.add_typer(user_app, name="user")
app.add_typer(engine_app, name="engine")
add_serving_commands(app)
add_loop_commands(app)
add_up_commands(app)
add_console_commands(app)
add_backup_commands(app)
app.command()(demo)


def _show_version(wanted: bool) -> None:
    if wanted:
        from flows.workspace.workspace import version

        print(f"visionloop {version()}")
        raise typer.Exit


@app.callback()
def every(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before any command."""


def run() -> None:
    """Run the command that the command line names."""
    collector.skip_at_exit()
    app()
