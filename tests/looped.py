"""A workspace with a champion and a log of predictions, without a server: rows are written as a server writes them."""

from __future__ import annotations

import datetime
import hashlib
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from served import png
from shapes import KINDS, visionloop

from components.contracts.records import Stored
from components.contracts.releases import Release
from components.images import STATISTICS
from components.journals import empty_head, encode_row
from components.store import Store
from components.tables import read_frame
from flows.loop.loop import Loop
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace
from serving.log.sealing import seal_all

MODEL = "shapes"
# Seventy reference images cannot show small shifts: the tests want large ones.
LOOP = """
recipe: smoke
every_minutes: 60
look_back: 2
to_label: 20
sweep_after_s: 0
drift:
  min_images: 20
  min_reference: 50
  detectors:
    - {detector: image_statistics, settings: {material: 1.5}}
    - {detector: confidence, settings: {material: 1.5}}
    - {detector: predicted_classes, settings: {material: 0.5}}
    - {detector: embeddings, settings: {material: 0.85}}
"""


def promoted(trained: Path, root: Path) -> Path:
    """A copy of the trained workspace whose version 1 is champion, with a loop of its own."""
    shutil.copytree(trained, root, symlinks=True)
    for arguments in (["approve", "1", "--as", "Ann", "--reason", "good"], ["promote", "1"]):
        done = visionloop(*arguments, cwd=root)
        assert done.returncode == 0, done.stderr
    (root / "loops").mkdir()
    (root / "loops" / f"{MODEL}.yaml").write_text(LOOP)
    return root


def loop_of(root: Path) -> Loop:
    workspace = Workspace.find(root)
    return Loop(workspace, read_settings(workspace.state), MODEL)


def champion(root: Path) -> tuple[Stored[Release], str]:
    """The champion's release, and its digest."""
    store = Store(root / ".visionloop" / "store")
    (folder,) = (root / ".visionloop" / "store" / "packaging").iterdir()
    found = store.open("packaging", folder.name, Release)
    assert found is not None
    return found, found.record.digest()


def picture_of(number: int, *, noisy: bool = False) -> bytes:
    """One picture of the smoke data's kind that is in no data version."""
    return png(KINDS[number % 3], 50_000 + number + (10_000 if noisy else 0))


def predict(
    root: Path,
    count: int,
    *,
    shift: float = 0.0,
    name: str = "p",
    at: datetime.datetime | None = None,
    black: bool = False,
    capture: bool = False,
    **changes: Any,
) -> list[str]:
    """Append predictions to the log as a server would have; returns their ids.

    They are the reference's own answers, drawn anew; `shift` moves them by standard deviations.
    """
    release, digest = champion(root)
    reference = read_frame(release.folder / release.record.reference.name)
    rng = np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    picks = reference.iloc[rng.integers(0, len(reference), count)].reset_index(drop=True)
    spread = reference[list(STATISTICS)].std()
    embeddings = np.stack([np.asarray(row, np.float32) for row in picks["embedding"]])
    embeddings = embeddings + shift * np.stack(reference["embedding"].to_list()).astype(np.float32).std(axis=0)
    moment = (at or datetime.datetime.now(datetime.UTC)).timestamp()
    rows, ids = [], []
    captures = root / ".visionloop" / "serving" / "captures"
    for number in range(count):
        probabilities = np.asarray(picks["probabilities"][number], dtype="<f4")
        data = picture_of(number, noisy=shift != 0)
        sha = hashlib.sha256(data).hexdigest()
        if capture:
            (captures / sha[:2]).mkdir(parents=True, exist_ok=True)
            (captures / sha[:2] / sha).write_bytes(data)
        ids.append(f"{name}-{number:05d}")
        looks = {c: 0.0 if black else float(picks[c][number] + shift * spread[c]) for c in STATISTICS}
        facts = {
            "prediction_id": ids[-1],
            "idempotency_key": None,
            "model": MODEL,
            "version": "1",
            "release": digest,
            "engine_digest": release.record.engine.digest(),
            "role": "champion",
            "protocol": "http",
            "form": "encoded",
            "image_sha256": sha,
            "predicted": release.record.engine.classes[int(probabilities.argmax())],
            "event_at": moment,
            "ingest_at": moment,
            "latency_ms": 1.0,
            "confidence": float(probabilities.max()),
            "unsure": False,
            "width": 16,
            "height": 16,
            "bytes": len(data),
            **looks,
            **changes,
        }
        rows.append(encode_row(facts, probabilities.tobytes(), embeddings[number].astype("<f2").tobytes()))
    journal = root / ".visionloop" / "serving" / "journal"
    journal.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    (journal / f"{stamp}-{uuid.uuid4().hex}.journal").write_bytes(empty_head() + b"".join(rows))
    seal_all(journal, str(root / ".visionloop" / "predictions"))
    return ids


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat()
