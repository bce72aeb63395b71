"""The sending process: `python -m serving.log.send_process FOLDER ADDRESS RETAIN_DAYS idle|low`. No answer waits for it."""

from __future__ import annotations

import signal
import sys

from serving.log.seal_process import step_back


def main(arguments: list[str]) -> None:
    """Send what waits; exit status 1 when that failed, and the images wait for the next time."""
    from pathlib import Path

    import orjson

    from serving.log.sending import send_all

    folder, url, retain_days = arguments
    try:
        count = send_all(Path(folder), url, retain_days=float(retain_days))
    except Exception as error:
        # The images stay where they are; the next sending takes them up.
        problem = {"event": "images were not sent", "problem": f"{type(error).__name__}: {error}"}
        print(orjson.dumps(problem).decode(), file=sys.stderr)
        sys.exit(1)
    if count:
        print(orjson.dumps({"event": "images sent", "count": count}).decode(), file=sys.stderr)


if __name__ == "__main__":
    step_back(sys.argv[4])
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # as in seal_process
    main(sys.argv[1:4])
