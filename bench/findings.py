"""What is wrong with a folder of images, told without embeddings: ours against CleanVision over the same files.

Ours is what `visionloop data check` does before embeddings: one look at each file (sha256, the digest of its pixels, its
kind, sizes, light, contrast, sharpness, a descriptor), near-duplicates verified on their pixels, and every finding that
needs no more. CleanVision finds all its kinds of issues at their defaults, in as many processes as there are processors, as
it does by itself. Both sides are whole processes that begin with nothing cached; they take turns. Our second look, with the
facts kept and the files' md5 known, as DVC knows them of a pinned version, is told beside them.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from bench.frozen_training import images_of
from bench.peers.environment import python_of

NUM_IMAGES = 60_000
"""At most; a folder may hold fewer."""
ROUNDS = 3
SHORT = {"NUM_IMAGES": 60, "ROUNDS": 1}
_PEER = Path(__file__).resolve().parent / "peers" / "cleanvision_app.py"


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Seconds of both sides. Without `data`, synthetic photographs: the time says something, the issues nothing."""
    paths, labels = images_of(data, scratch, NUM_IMAGES)
    folder = scratch / "images"
    for number, (path, label) in enumerate(zip(paths, labels, strict=True)):
        place = folder / f"class-{label}" / f"{number:06d}{path.suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            Image.open(path).save(place.with_suffix(".png"))  # CleanVision takes no BMP
        else:
            place.symlink_to(path.resolve())
    peer = python_of("cleanvision.lock", ".venv-cleanvision")
    known = scratch / "md5.json"
    known.write_text(
        json.dumps(
            {
                path.relative_to(folder).as_posix(): hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
                for path in folder.rglob("*.*")
            }
        )
    )
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    again: list[float] = []
    for round_ in range(ROUNDS):
        cache = scratch / f"cache-{round_}"
        ours.append(_timed([sys.executable, "-m", "bench.findings", str(folder), str(cache)]))
        again.append(_timed([sys.executable, "-m", "bench.findings", str(folder), str(cache), str(known)])["seconds"])
        theirs.append(_timed([str(peer), str(_PEER), str(folder), str(os.cpu_count())]))
    seconds = [statistics.median(side["seconds"] for side in sides) for sides in (ours, theirs)]
    return {
        "ours": round(seconds[0], 2),
        "peers": {"CleanVision": round(seconds[1], 2)},
        "ratio": round(seconds[1] / seconds[0], 2),
        "n": len(paths),
        "unit": f"seconds, median of {ROUNDS} whole processes each",
        "spread": {
            "ours": [round(side["seconds"], 2) for side in ours],
            "CleanVision": [round(side["seconds"], 2) for side in theirs],
        },
        "ours_again": round(statistics.median(again), 2),
        "issues": {"ours": ours[-1]["issues"], "CleanVision": theirs[-1]["issues"]},
        "data": str(data) if data else "synthetic",
    }


def _timed(command: list[str]) -> dict[str, Any]:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found | {"seconds": seconds}


def _look(root: Path, cache: Path, known_content: dict[str, str]) -> dict[str, int]:
    """The number of issues of each kind that needs no embeddings."""
    from components.contracts.families import Known
    from components.data_folder import listing
    from components.duplicates import pairs
    from components.facts import File, facts
    from components.images import decode
    from components.issues import chosen, look

    files = [
        File(path, path.relative_to(root).as_posix(), label, known_content.get(path.relative_to(root).as_posix(), ""))
        for label, paths in listing(root).classes.items()
        for path in paths
    ]
    table = facts(files, cache=cache)
    usable = table[table["reason"] == ""].reset_index(drop=True)
    refused = table[table["reason"] != ""].reset_index(drop=True)
    found = pairs(usable, read=lambda path: decode((root / path).read_bytes()))
    known = Known(usable, refused, pairs=found, classes=tuple(sorted(set(usable["label"]))))
    _, looked = look(known, chosen(None))
    return {each.name: each.num_issues for each in looked if each.ran}


if __name__ == "__main__":
    content = json.loads(Path(sys.argv[3]).read_text()) if len(sys.argv) > 3 else {}
    print(json.dumps({"issues": _look(Path(sys.argv[1]), Path(sys.argv[2]), content)}))
