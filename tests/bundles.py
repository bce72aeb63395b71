"""A candidate without a training: every record real and consistent, the engine's file a few bytes that nothing executes."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from components.contracts.data import Dataset, DataVersion, Splits
from components.contracts.models import Engine, Preprocessing
from components.contracts.records import Record
from components.contracts.releases import DecisionRule, Release
from components.contracts.verdicts import EngineVerdict, Estimate, Evaluation, Finding, Verdict
from components.gating import combined
from components.store import describe, sha256_file
from registry.approval import person
from registry.models import CandidateBundle, bound_in
from registry.tracking import DataInput

HISTORY = [{"epoch": float(e), "valid_loss": 1 / e, "train_loss": 2 / e} for e in range(1, 4)]
CLASSES = ("cat", "dog")


def _golden(digest: str) -> bytes:
    """A picture without answers, another for each digest."""
    shade = zlib.crc32(digest.encode()) % 256
    return bytes(save({"pixels": np.full((1, 8, 8, 1), shade, dtype=np.uint8)}))


def evidence(
    tmp_path: Path,
    model: str,
    *,
    status: str = "pass",
    digest: str = "d1",
    champion_engine: str | None = None,
    requester: str | None = None,
) -> CandidateBundle:
    """CandidateBundle whose files lie under `tmp_path`; `digest` makes candidates differ, and so do their engines.

    With status `undecided` the gates latency and no_regression did not decide, and nothing else is wrong.
    """
    folder = tmp_path / f"{model}-{digest}"
    files: dict[str, Path] = {}

    def write(name: str, data: bytes) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        files[name] = path
        return path

    def record(name: str, value: Record) -> None:
        write(f"evidence/{name}.json", json.dumps(value.to_json()).encode())

    write("checkpoint/weights.safetensors", f"weights of {digest}".encode())
    write("report.html", b"<html>")
    data = DataVersion(dvc_hash=f"{digest}.dir", num_files=20, bytes=2000, ledger_sha256="0" * 64)
    table = describe(files["report.html"], within=folder)
    record(
        "dataset",
        Dataset(
            data=data,
            samples=table,
            quarantine=table,
            classes=CLASSES,
            class_counts={"cat": 10, "dog": 10},
            num_input=20,
            num_kept=20,
            num_quarantined=0,
            warnings=(),
        ),
    )
    counts: Any = {"train": 10, "valid": 4, "calibration": 2, "test": 4}
    record(
        "splits",
        Splits(
            data=data,
            table=table,
            classes=CLASSES,
            counts=counts,
            class_counts={name: {"cat": 1, "dog": 1} for name in counts},
            num_duplicate_groups=0,
            test_digest="t" * 64,
        ),
    )
    graph = write("engines/e/model.bin", f"engine of {digest}".encode())
    engine = Engine(
        name="e",
        target="openvino",
        precision="int8",
        settings={},
        checkpoint_digest="c" * 64,
        files=(describe(graph, within=graph.parent),),
        entry="model.bin",
        preprocessing=Preprocessing(
            channels=1, height=8, width=8, resize_shortest=8, interpolation="bilinear", mean=(0.5,), std=(0.5,)
        ),
        classes=CLASSES,
        embedding_dim=4,
        temperature=1.0,
        runtime="none 0",
        built_for=(),
        facts={},
    )
    record("e.engine", engine)
    share = Estimate(value=0.9, low=0.8, high=0.95, n=40, method="wilson")
    common: Any = {"test_digest": "t" * 64, "status": "evaluated", "num_images": 4, "metrics": {"accuracy": share}}
    record("e.evaluation", Evaluation(engine="e", engine_digest=engine.digest(), **common))
    if champion_engine is not None:
        record("champion.evaluation", Evaluation(engine="e", engine_digest=champion_engine, **common))
    findings = [
        Finding(gate="accuracy", status="fail" if status in ("fail", "inconclusive") else "pass", message="so it was")
    ]
    if status == "undecided":
        findings += [
            Finding(gate=gate, status="inconclusive", message="too few", n=4) for gate in ("latency", "no_regression")
        ]
    judged = EngineVerdict(
        engine="e",
        engine_digest=engine.digest(),
        required=True,
        serving=True,
        status=combined(findings),
        findings=tuple(findings),
    )
    verdict = Verdict.model_validate(
        {
            "status": "inconclusive" if status == "undecided" else status,
            "serving_engine": "e",
            "engines": (judged,),
            "reasons": () if status == "pass" else ("accuracy too low",),
            "policy_digest": "p" * 64,
        }
    )
    record("verdict", verdict)
    if status in ("pass", "undecided"):
        reference = write("release/reference.parquet", f"reference of {digest}".encode())
        golden = write("release/golden.safetensors", _golden(digest))
        rule = DecisionRule(threshold=0.6, target_accuracy=0.99, num_valid=4, coverage=share, accuracy=share)
        record(
            "release",
            Release(
                model=model,
                engine=engine,
                task="classification",
                task_settings={},
                decision=rule,
                reference=describe(reference, within=reference.parent),
                golden=describe(golden, within=golden.parent),
                golden_tolerance=0.1,
            ),
        )
    return CandidateBundle(
        model=model,
        candidate_digest=sha256_file(files["checkpoint/weights.safetensors"]),
        training_key=f"{model}-{digest}-training",
        verdict=verdict,
        files=files,
        tags={"visionloop.run": "r", "visionloop.data": "v"},
        params={"training.fit.epochs": "3"},
        metrics={"evaluation.e.accuracy": 0.9},
        history=HISTORY,
        bound=bound_in(folder),
        requester=person(requester) if requester else None,
        inputs=[
            DataInput("train", f"{digest}-train", {"cat": 5, "dog": 5}, {"visionloop.data": data.dvc_hash}),
            DataInput("test", "t" * 64, {"cat": 2, "dog": 2}, {"visionloop.data": data.dvc_hash}),
        ],
    )
