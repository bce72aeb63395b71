"""A manifest of a million rows: what each part of the data's way takes, in seconds and memory, and how that grows.

Each part is a process of its own and begins with what the one before it wrote: `manifest` reads the CSV file and brings
its files, `table` makes the version's rows of them, `splitting` joins clusters, freezes the test and divides the rest, and
`diff` compares two versions of which 1 % of the files were added, removed, changed, renamed and relabelled each. No picture
is decoded: the files are empty, and what is known of them was found before, as it was in a rerun. DATA is not used.

The floors: at most 4 GiB in any part, and time that grows with the rows and not faster, which is an exponent of 1. The
exponent is that of the processor's seconds, on which other work of the machine tells little.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from bench.serving import say, visionloop
from components import attributes, plugins
from components.clusters import Clusters
from components.companions import PIN, TEST_LEDGER
from components.contracts.data import Dataset, DataVersion
from components.contracts.records import FileDigest, Stored
from components.dvc_repository import opened
from components.facts import File, facts
from components.memory import peak_bytes
from components.sources.manifest import Source
from components.splitting import SplittingConfig, TestLedger, split
from components.store import describe
from components.tables import read_frame
from flows.workspace.differences import compare
from flows.workspace.incoming import incoming
from flows.workspace.workspace import Workspace

SIZES: tuple[int, ...] = (100_000, 300_000, 1_000_000)
CLASSES = 100
SHORT = {"SIZES": (500, 1000, 2000), "CLASSES": 5}
_IN_A_GROUP = 20
_DIFFER = ("added", "removed", "changed", "renamed", "relabelled")


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Peak memory of the hungriest part at the largest size; beside it seconds, memory and growth of each part."""
    measured: dict[str, dict[int, dict[str, float]]] = {part: {} for part in _PARTS}
    for rows in SIZES:
        folder = scratch / str(rows)
        _write_manifest(folder, rows)
        for part in _PARTS:
            if part == "diff":
                _pin_two_versions(folder)
            measured[part][rows] = _apart(part, folder)
            say(f"  {rows} rows, {part}: {measured[part][rows]}")
        shutil.rmtree(folder)
    largest = max(SIZES)
    return {
        "ours": max(found[largest]["peak_gib"] for found in measured.values()),
        "peers": {},
        "ratio": None,
        "n": largest,
        "unit": f"GiB at most in any part, {largest} rows",
        "growth": {part: round(_exponent(found), 2) for part, found in measured.items()},
        "parts": {part: {str(rows): each for rows, each in found.items()} for part, found in measured.items()},
    }


def _exponent(found: dict[int, dict[str, float]]) -> float:
    """The slope of the logarithm of the processor's seconds over that of the rows."""
    rows = [math.log(size) for size in found]
    seconds = [math.log(max(1e-3, each["processor_seconds"])) for each in found.values()]
    return statistics.linear_regression(rows, seconds).slope


def _apart(part: str, folder: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.million_rows", part, str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{part} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _digest(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def _write_manifest(folder: Path, rows: int) -> None:
    """Empty files and the manifest that names them, and the facts that an earlier look would have found."""
    lines = ["path,label,group,captured_at,source,label_source\n"]
    for row in range(rows):
        place = folder / "pictures" / f"{row // 1000:04d}"
        if row % 1000 == 0:
            place.mkdir(parents=True)
        (place / f"{row:07d}.png").touch()
        number = row // _IN_A_GROUP
        group = f"part {number}" if number % 3 else ""  # a third belongs to none
        lines.append(
            f"pictures/{row // 1000:04d}/{row:07d}.png,class {number % CLASSES},{group},"
            f"2026-03-01T{row // 3600 % 24:02d}:{row // 60 % 60:02d}:{row % 60:02d}+01:00,camera {row % 7},person\n"
        )
    (folder / "manifest.csv").write_text("".join(lines))
    picture = folder / "one.png"
    Image.effect_noise((64, 64), 80).save(picture)
    facts([File(picture, "one", "")], cache=folder / "cache")
    (kept,) = (folder / "cache" / "facts").rglob("*.parquet")
    one = read_frame(kept)
    kept.unlink()
    names = [f"{row:07d}.png" for row in range(rows)]
    many = one.loc[one.index.repeat(rows)].assign(
        md5=[_digest(name, 32) for name in names],
        sha256=[_digest(f"{name} file", 64) for name in names],
        picture=[_digest(f"{name} picture", 32) for name in names],
    )
    many.to_parquet(kept, index=False, compression="zstd")
    kept.rename(kept.with_stem(hashlib.sha256(kept.read_bytes()).hexdigest()))


def _manifest(folder: Path) -> None:
    """Of the CSV file's rows to links in class folders, and what is known of each beside its class."""
    (folder / "brought").mkdir()
    Source(path=folder / "manifest.csv").fetch(out=folder / "brought")
    (folder / "brought" / attributes.FILE).rename(folder / attributes.FILE)  # no file beside the classes, as `data add` does


def _table(folder: Path) -> None:
    """Of class folders to the rows of a version: label, digests and attributes."""
    given = incoming(folder / "brought", folder / "data")
    files = [File(path, f"{label}/{path.name}", label, _digest(path.name, 32)) for label, path in given.files]
    table = facts(files, cache=folder / "cache")
    said = attributes.read_said(folder / attributes.FILE)
    known, _ = attributes.learned(
        {}, ((sha256, said[path]) for sha256, path in zip(table["sha256"], table["path"], strict=True))
    )
    attributes.write(folder, known)
    clusters = Clusters.read(folder)
    table["picture"] = clusters.first_seen(table, {})
    clusters.grown([], dict(zip(table["sha256"], table["picture"], strict=True))).write(folder)
    table[["path", "label", "sha256", "picture"]].to_parquet(folder / "samples.parquet", index=False)


def _splitting(folder: Path) -> None:
    """Of rows to clusters, a frozen test and splits; every tenth row is a near-duplicate of the next."""
    table = read_frame(folder / "samples.parquet")
    pictures = list(table.sort_values("path")["picture"])
    clusters = Clusters.read(folder).grown(zip(pictures[::10], pictures[1::10], strict=True))
    ledger = TestLedger(0.2, {}).extended(
        zip(table["picture"], table["label"], strict=True), together=clusters.together(table), near=clusters.near
    )
    clusters.write(folder)
    ledger.write(folder / TEST_LEDGER)
    dataset = Dataset(
        data=DataVersion(dvc_hash="h", num_files=len(table), bytes=len(table), ledger_sha256="l"),
        samples=describe(folder / "samples.parquet", within=folder),
        quarantine=FileDigest(name="quarantine.parquet", sha256="", bytes=0),
        classes=tuple(sorted(set(table["label"]))),
        class_counts=dict(Counter(table["label"])),
        num_input=len(table),
        num_kept=len(table),
        num_quarantined=0,
        warnings=(),
    )
    del table, pictures
    (folder / "splits").mkdir()
    task = plugins.load("tasks", "classification")
    split(
        Stored(dataset, folder),
        TestLedger.read(folder / TEST_LEDGER),
        SplittingConfig(),
        task,
        clusters=Clusters.read(folder),
        out=folder / "splits",
    )


def _pin_two_versions(folder: Path) -> None:
    """A workspace with two commits of data.dvc and lists of files in DVC's cache; the files' bytes are not there."""
    root = folder / "workspace"
    visionloop("init", str(root), cwd=folder)
    shutil.copyfile(folder / TEST_LEDGER, root / TEST_LEDGER)
    table = read_frame(folder / "samples.parquet", columns=["path", "sha256"])
    whole = {path: sha256[:32] for path, sha256 in zip(table["path"], table["sha256"], strict=True)}
    labels = sorted({path.split("/")[0] for path in whole})
    before, after = {}, {}
    for row, (path, md5) in enumerate(whole.items()):
        label, name = path.split("/")
        kind = _DIFFER[row % 100] if row % 100 < len(_DIFFER) else ""
        if kind != "added":
            before[path] = md5
        if kind == "renamed":
            path = f"{label}/again-{name}"
        elif kind == "relabelled":
            path = f"{labels[(labels.index(label) + 1) % len(labels)]}/{name}"
        if kind != "removed":
            after[path] = _digest(md5, 32) if kind == "changed" else md5
    for files in (before, after):
        _commit(root, files)


def _commit(root: Path, files: dict[str, str]) -> None:
    content = json.dumps([{"md5": md5, "relpath": path} for path, md5 in sorted(files.items())]).encode()
    dvc_hash = f"{hashlib.md5(content, usedforsecurity=False).hexdigest()}.dir"
    with opened(root) as repo:
        listing = Path(repo.cache.local.oid_to_path(dvc_hash))
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_bytes(content)
    out = {"md5": dvc_hash, "size": len(files), "nfiles": len(files), "hash": "md5", "path": "data"}
    ledger = hashlib.sha256((root / TEST_LEDGER).read_bytes()).hexdigest()
    (root / PIN).write_text(yaml.safe_dump({"outs": [out], "meta": {"visionloop_test_ledger_sha256": ledger}}))
    identity = ["-c", "user.name=bench", "-c", "user.email=bench@bench.invalid", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "add", PIN, TEST_LEDGER], cwd=root, check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "-m", "bench"], cwd=root, check=True)


def _diff(folder: Path) -> None:
    compared = compare(Workspace.find(folder / "workspace"), "HEAD~1", "HEAD")
    if compared.found is None:
        raise SystemExit(compared.problem)
    rows = compared.before.num_files + len(compared.found.added)
    if {compared.found.counts[kind] for kind in _DIFFER} != {rows // 100}:
        raise SystemExit(f"expected {rows // 100} files of each kind, found {compared.found.counts}")


_PARTS: dict[str, Callable[[Path], None]] = {
    "manifest": _manifest,
    "table": _table,
    "splitting": _splitting,
    "diff": _diff,
}


if __name__ == "__main__":
    name, place = sys.argv[1], Path(sys.argv[2])
    if name == "diff":
        with opened(place / "workspace"):  # DVC's imports are no part of what grows
            pass
    began, began_processor = time.perf_counter(), time.process_time()
    _PARTS[name](place)
    told = {
        "seconds": round(time.perf_counter() - began, 2),
        "processor_seconds": round(time.process_time() - began_processor, 2),
        "peak_gib": round(peak_bytes() / 2**30, 3),
    }
    print(json.dumps(told))
