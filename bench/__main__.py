"""Run one benchmark; its last line is one JSON object: name, ours, peers, ratio, n, unit.

`--short` goes the same way in a minute or two, with the small numbers of the module's SHORT: it shows that the benchmark
runs, and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path

from flows.workspace.settings import prepare_environment


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
    print(json.dumps({"name": arguments.name, "short": arguments.short, **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
