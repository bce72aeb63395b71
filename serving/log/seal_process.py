"""The sealing process: `python -m serving.log.seal_process JOURNALS LOG idle|low`. No answer waits for it.

It steps back before it imports anything: half a second of imports at full weight is half a second of one of two cores.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def step_back(priority: str) -> None:
    """Give way: `low` takes a small share of a busy machine, `idle` what nobody else of the session wants.

    Low alone is not enough beside an engine: a lane that wakes up waits until the process that runs has used up its slice.
    """
    os.nice(19)
    if priority == "idle" and sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class _NoPandas:
    """pyarrow imports pandas, where it is installed, to ask whether a list is a Series: more than sealing itself takes."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        """Pandas is not there; everything else is found as always."""
        if name == "pandas":
            raise ModuleNotFoundError("sealing needs no pandas", name=name)


def main(arguments: list[str]) -> None:
    """Seal what is ready; exit status 1 when that failed, and the journals are kept for the next time."""
    from pathlib import Path

    import orjson

    from serving.log.sealing import seal_all

    journals, log_url = arguments
    try:
        count = seal_all(Path(journals), log_url)
    except Exception as error:
        # The journal is kept; the next sealing takes it up.
        problem = {"event": "sealing failed", "problem": f"{type(error).__name__}: {error}"}
        print(orjson.dumps(problem).decode(), file=sys.stderr)
        sys.exit(1)
    if count:
        print(orjson.dumps({"event": "journals sealed", "count": count}).decode(), file=sys.stderr)


if __name__ == "__main__":
    step_back(sys.argv[3])
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # in the terminal's background: what it says there must not stop it
    sys.meta_path.insert(0, _NoPandas)
    main(sys.argv[1:3])
