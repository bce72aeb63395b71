"""Environments of the peers: their libraries never meet the product's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent.parent


def python_of(lock: str, folder: str) -> Path:
    """Python of the environment `folder` with exactly what `bench/peers/<lock>` holds, made on first use.

    Raises OSError or subprocess.CalledProcessError where it cannot be made.
    """
    wanted, place = _ROOT / "bench" / "peers" / lock, _ROOT / folder
    python, stamp = place / "bin" / "python", place / ".lock"
    if python.exists() and stamp.exists() and stamp.read_bytes() == wanted.read_bytes():
        return python
    uv = shutil.which("uv") or str(_ROOT / ".uv" / "bin" / "uv")
    print(f"installing the peers (bench/peers/{lock})", file=sys.stderr, flush=True)
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(place)], check=True)
    subprocess.run([uv, "pip", "sync", "--quiet", "--python", str(python), str(wanted)], check=True)
    stamp.write_bytes(wanted.read_bytes())
    return python
