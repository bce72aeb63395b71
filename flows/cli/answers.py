"""How every command answers: one JSON object or text, and errors that say what to do with exit status 2.

A command gets this by being registered with `Commands`: nothing that it raises becomes a traceback.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from components.contracts.errors import ConfigError, VisionloopError, redacted
from components.contracts.wording import utc_of
from flows import stopping

if TYPE_CHECKING:
    from flows.workspace.desk import Desk

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
InWorkspace = Annotated[Path, typer.Option("--workspace", "-w", help="The workspace, or a folder in it.")]
HERE = Path()
OfModel = Annotated[str | None, typer.Option("--model", "-m", help="The model; needed where the ledger knows several.")]
By = Annotated[str, typer.Option("--as", help="Your name, as others will read it; nobody checks it.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; others will read it.")]


_output: ContextVar[TextIO | None] = ContextVar("output", default=None)
"""Where the JSON object goes while everything else that is printed goes to standard error."""


def opened_desk(workspace: Path, model: str | None) -> Desk:
    """The registry of a workspace, in an environment that is made ready before MLflow or Prefect is imported by anything."""
    from flows.workspace.desk import desk
    from flows.workspace.settings import prepare_environment
    from flows.workspace.workspace import Workspace

    prepare_environment(Workspace.find(workspace).state)
    return desk(workspace, model)


def finish(answer: dict[str, Any], as_json: bool, text: Callable[[], str]) -> None:
    """Print the answer as one JSON line or as text."""
    print(json.dumps(answer, allow_nan=False) if as_json else text(), file=_output.get())


@contextlib.contextmanager
def _alone(as_json: bool) -> Iterator[None]:
    """With --json, standard output is the object's alone: what libraries and plug-ins print would run into it."""
    if not as_json or _output.get() is not None:  # it is alone already where a group of commands began to answer
        yield
        return
    before = _output.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _output.reset(before)


def _fail(kind: str, message: str, as_json: bool, notes: Sequence[str] = (), **facts: str | None) -> NoReturn:
    """Print an error and end with status 2. Passwords of addresses in it are left out."""
    message, notes = redacted(message), [redacted(note) for note in notes]
    if as_json:
        print(json.dumps({"error": kind, "message": message, "notes": notes, **facts}), file=_output.get())
    else:
        print(f"error: {message}", file=sys.stderr)
        for note in notes:
            print(f"  {note}", file=sys.stderr)
    raise typer.Exit(2)


@contextlib.contextmanager
def _answering(doing: str, as_json: bool, workspace: Path) -> Iterator[None]:
    """Errors become answers: ours as they are, a wrong command line as JSON where that was asked for, others explained."""
    try:
        yield
    except (typer.Exit, typer.Abort, EOFError):
        raise
    except stopping.Stopped as stopped:
        stopping.end(stopped.number)
    except TyperException as error:
        if not as_json:
            raise
        _fail("UsageError", error.format_message(), as_json)
    except VisionloopError as error:
        _fail(type(error).__name__, str(error), as_json, getattr(error, "__notes__", []))
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            raise
        from flows.cli.failures import failure

        told = failure(error, doing, _root(workspace))
        _fail(told.kind, told.message, as_json, log=str(told.log) if told.log else None, place=told.place)


def _reader_left() -> bool:
    """Whether it is our own output that nobody reads any more, such as `| head`."""
    output = select.poll()
    with contextlib.suppress(OSError, ValueError):
        output.register((_output.get() or sys.stdout).fileno(), 0)
        return bool(output.poll(0))
    return False


def _root(start: Path) -> Path | None:
    """The workspace at or above a folder, without touching it."""
    with contextlib.suppress(OSError):
        start = start.resolve()
        return next((folder for folder in (start, *start.parents) if (folder / ".visionloop").is_dir()), None)
    return None


class _Command(TyperCommand):
    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        with _answering(self.name or "", "--json" in args, HERE):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        workspace = ctx.params.get("workspace") or ctx.params.get("directory") or HERE
        as_json = bool(ctx.params.get("json_"))
        with _alone(as_json), _answering(ctx.command_path, as_json, workspace):
            return super().invoke(ctx)


class _Group(TyperGroup):
    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        with _answering(self.name or "", "--json" in args, HERE):
            context = super().make_context(info_name, args, parent, **extra)
            context.meta["json"] = "--json" in args
            return context

    def invoke(self, ctx: Any) -> Any:
        as_json = bool(ctx.meta.get("json"))
        with _alone(as_json), _answering(ctx.command_path, as_json, HERE):
            stopping.started()
            return super().invoke(ctx)


class Commands(typer.Typer):
    """A group of commands; every one that is registered answers as this module says."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=_Group, rich_markup_mode=None, **{"no_args_is_help": True, **settings})

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """Register a command; see `typer.Typer.command`."""
        return super().command(name, cls=_Command, **settings)


def moment(option: str, text: str, *, past: bool = False) -> datetime.datetime:
    """An option's time, UTC unless it says otherwise, in UTC; raises ConfigError, also for a future that has to be past."""
    try:
        found = utc_of(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} is {error}") from None
    if past and found > datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5):  # clocks differ
        raise ConfigError(f"{option} {text!r} is {found:%Y-%m-%d %H:%M} UTC, which has not come yet")
    return found
