"""Makes the workspace of an older commit that `tests/test_older.py` opens: `python tests/older/make_workspace.py 8385ffc`.

Everything in it is made by that commit's own code, through its command line and its server: a data version with its test
ledger, a promoted version, the log of what it served (one journal sealed, one left by a killed server), a window of each
kind and a rejected run. Caches are left out. A fixture is never made anew to please a later commit: it stands for the
workspaces that people have.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOT_KEPT = ("cache", "prefect", "tmp")
"""Folders of `.visionloop/` that a workspace does without."""
LOOP = """
recipe: smoke
every_minutes: 60
drift:
  min_images: 20
  min_reference: 50
  detectors: [{detector: image_statistics, settings: {material: 1.5}}, {detector: confidence, settings: {material: 1.5}}]
"""


@contextlib.contextmanager
def source_of(commit: str) -> Iterator[Path]:
    """The tree of a commit, in a folder that goes again."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], cwd=HERE, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=HERE, check=True)


# Runs inside the older tree, with its packages and its test helpers first on the path.
_INSIDE = """
import io
import os
import signal
import sys
from pathlib import Path

from PIL import Image, ImageOps
from served import png, server
from shapes import KINDS, make_workspace

step, root = sys.argv[1], Path(sys.argv[2])
if step == "make":
    make_workspace(root)
else:
    start, count, shifted, kill = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "shifted", sys.argv[6] == "kill"
    with server(root, "--capture-share", "1") as running:
        for number in range(start, start + count):
            data = png(KINDS[number % 3], number)
            if shifted:
                out = io.BytesIO()
                ImageOps.invert(Image.open(io.BytesIO(data))).save(out, "PNG")
                data = out.getvalue()
            assert running.predict(data).status == 200
        if kill:
            for pid in (running.process.pid, *running.engine_processes()):
                os.kill(pid, signal.SIGKILL)
        else:
            assert running.stop() == 0
"""


def make(commit: str, out: Path) -> None:
    """Write `out`, a .tar.xz whose one folder `workspace` is the workspace."""
    with source_of(commit) as tree, tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "workspace"
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("VISIONLOOP_", "PREFECT_"))},
            "PYTHONPATH": f"{tree}:{tree / 'tests'}",
            "VISIONLOOP_NUM_THREADS": "1",
        }

        def inside(*arguments: str) -> None:
            command = [sys.executable, "-c", _INSIDE, *arguments]
            subprocess.run(command, cwd=tree, env=environment, check=True)

        def visionloop(*arguments: str, status: int = 0) -> None:
            command = [sys.executable, "-m", "flows", *arguments]
            done = subprocess.run(command, cwd=root, env=environment, check=False)
            assert done.returncode == status, f"{arguments} ended with {done.returncode}"

        inside("make", str(root))
        (root / "loops").mkdir()
        (root / "loops" / "shapes.yaml").write_text(LOOP)
        visionloop("train", "-r", "smoke")
        visionloop("approve", "1", "--as", "Ann", "--reason", "the first one")
        visionloop("promote", "1")
        too_fast = "gating.gates=[{gate: latency, settings: {max_p99_ms: 0.0001, min_runs: 40}}]"
        visionloop("train", "-r", "smoke", "--set", too_fast, status=1)
        for start, look, verdict in ((60_000, "as before", 0), (70_000, "shifted", 1)):
            since = datetime.datetime.now(datetime.UTC).isoformat()
            inside("serve", str(root), str(start), "90", look, "stop")
            visionloop("watch", "--since", since, "--until", datetime.datetime.now(datetime.UTC).isoformat(), status=verdict)
        inside("serve", str(root), "80000", "5", "as before", "kill")
        subprocess.run(["git", "add", "--all"], cwd=root, check=True)
        who = ["-c", "user.name=older", "-c", "user.email=older@example.invalid"]
        subprocess.run(["git", *who, "commit", "--quiet", "--message", "Loop"], cwd=root, check=True)
        for name in NOT_KEPT:
            shutil.rmtree(root / ".visionloop" / name, ignore_errors=True)
        shutil.rmtree(root / ".git" / "hooks", ignore_errors=True)
        (root / "made-by.json").write_text(json.dumps({"commit": commit, "made_in": str(root)}))
        with tarfile.open(out, "w:xz", preset=9) as archive:
            archive.add(root, arcname="workspace")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    make(sys.argv[1], HERE / f"{sys.argv[1]}.tar.xz")
