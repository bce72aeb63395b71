"""Where the engine's own process begins: `python -m serving.engines.process FD SERVER NICENESS`.

What it runs is serving/engines/worker.py.

It is bound to its server before it imports anything that takes time: from then on it cannot be left behind, also while the
server has made it stand still.
"""

from __future__ import annotations

import os
import signal
import sys


def _end_with(server: int) -> None:
    """Linux: be killed when the server is; it may be gone already."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != server:
        sys.exit(1)


if __name__ == "__main__":
    _end_with(int(sys.argv[2]))
    os.nice(int(sys.argv[3]))  # before there are threads, which inherit it
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTTOU):
        # Meant for the server, which drains first; this process ends with the server's socket. It is in the terminal's
        # background: what it says there must not stop it.
        signal.signal(number, signal.SIG_IGN)
    import socket

    from serving.engines.worker import serve

    serve(socket.socket(fileno=int(sys.argv[1])))
