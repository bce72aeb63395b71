"""The `visionloop` command: signals are heard before anything that takes time is imported."""

from __future__ import annotations

import sys

from flows import stopping


def main() -> None:
    """The command line, which can be stopped from its first moment on."""
    stopping.watch(as_json="--json" in sys.argv, starting=True)
    from flows.cli.app import run

    run()
