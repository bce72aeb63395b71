"""How every command answers: one JSON object or text, and errors that say what to do with exit status 2."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from components.contracts import ConfigError, VisionloopError

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
InWorkspace = Annotated[Path, typer.Option("--workspace", "-w", help="The workspace, or a folder in it.")]
HERE = Path()


def finish(answer: dict[str, Any], as_json: bool, text: Callable[[], str]) -> None:
    """Print the answer as one JSON line or as text."""
    print(json.dumps(answer, allow_nan=False) if as_json else text())


def fail(error: VisionloopError, as_json: bool) -> NoReturn:
    """Print an error and end with status 2."""
    notes = list(getattr(error, "__notes__", []))
    if as_json:
        print(json.dumps({"error": type(error).__name__, "message": str(error), "notes": notes}))
    else:
        print(f"error: {error}", file=sys.stderr)
        for note in notes:
            print(f"  {note}", file=sys.stderr)
    raise typer.Exit(2)


def guarded(action: Callable[[], None], as_json: bool) -> None:
    """Run a command's body; our own errors become answers."""
    try:
        action()
    except VisionloopError as error:
        fail(error, as_json)


def moment(option: str, text: str) -> datetime.datetime:
    """An option's time, UTC unless it says otherwise; raises ConfigError."""
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not a moment; expected ISO 8601, such as 2026-03-01T14:00") from None
    return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)


def figure(estimate: Mapping[str, float]) -> str:
    """An estimate as `estimate_json` gives it, with its interval and n."""
    return f"{estimate['value']:.4f} [{estimate['low']:.4f}, {estimate['high']:.4f}] n={estimate['n']}"
