"""Run one benchmark; its last line is one JSON object: name, ours, peers, ratio, n, unit, and the load before it began.

`--short` goes the same way in a minute or two, with the small numbers of the module's SHORT: it shows that the benchmark
runs, and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

from components.contracts.wording import counted
from flows.workspace.settings import prepare_environment


def load_of_others() -> float:
    """The 1-minute load average, which forgets by exp(-t), less what this process added to it by running until now."""
    own = 1.0 - math.exp(-time.process_time() / 60.0)
    return max(0.0, os.getloadavg()[0] - own)


def main() -> int:
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py") if path.stem != "load")
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--data", type=Path, help="a folder with one sub-folder of images per class")
    parser.add_argument("--short", action="store_true", help="the same way with tiny numbers: no measurement")
    arguments = parser.parse_args()
    if arguments.name not in names:
        print(f"unknown benchmark {arguments.name!r}; valid: {', '.join(names)}", file=sys.stderr)
        return 2
    load, cores = load_of_others(), os.cpu_count() or 1
    if load > cores / 2:
        print(
            f"the load average of other programs is {load:.1f} on {counted(cores, 'core')}: what is measured now is slower "
            f"than this machine, and less certain",
            file=sys.stderr,
        )
    with tempfile.TemporaryDirectory(prefix="visionloop-bench-") as scratch:
        prepare_environment(Path(scratch))
        module = importlib.import_module(f"bench.{arguments.name}")
        if arguments.short:
            print(
                f"a short run of {arguments.name}: it shows that the benchmark runs, and measures nothing", file=sys.stderr
            )
            for name, value in module.SHORT.items():
                setattr(module, name, value)
        result = module.run(arguments.data, Path(scratch))
    print(json.dumps({"name": arguments.name, "short": arguments.short, "load": round(load, 2), **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
