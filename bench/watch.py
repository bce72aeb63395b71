"""What watching costs and what it is worth.

One window of 100,000 predictions with 64-d embeddings, from the sealed log to the page: ours against plain Evidently (its
own drift of the same columns and its own embedding drift, default methods) on the same file, each in a process of its own,
three runs each. Ours compares a sample of the rows, by policy; what each compared is in the answer.

Then the error rates, on real digits: 500 windows without drift at n = 200 and 1,000 (alarms, and windows beyond a threshold
whether or not the shift matters, against the stated alpha, one-sided binomial), and the power against noise, blur and
darkening of three strengths at n = 1,000. Reference and window are random halves of the same pool of held-out pictures, so
that without drift nothing but chance tells them apart. DATA is not used.
"""

from __future__ import annotations

import dataclasses
import datetime
import io
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from monitoring.verdicts import Sample

ROWS, DIM = 100_000, 64
CLASSES = tuple("0123456789")
RUNS = 3
WINDOWS, POWER_WINDOWS = 500, 40
ALPHA = 0.01
PEER_LIMIT_S = 300
SHORT = {"ROWS": 2000, "RUNS": 1, "WINDOWS": 2, "POWER_WINDOWS": 1}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Both halves; the ratio is plain Evidently's seconds over ours."""
    say(f"one window of {ROWS} rows with {DIM}-d embeddings")
    ours = [_apart("ours", scratch) for _ in range(RUNS)]
    peers = [_apart("evidently", scratch) for _ in range(RUNS)]
    for name, found in (("ours", ours), ("plain Evidently", peers)):
        say(f"  {name}: {[f.get('seconds') for f in found]} s, {[f.get('peak_mb') for f in found]} MB")
    pool = _digits(scratch)
    sizes = {n: false_alarms(pool, n) for n in (200, 1000)}
    power = powers(pool)
    seconds = statistics.median(f["seconds"] for f in ours)
    finished = [f["seconds"] for f in peers if "seconds" in f]
    return {
        "ours": seconds,
        "peers": {"plain Evidently": statistics.median(finished) if finished else f"not within {PEER_LIMIT_S} s"},
        "ratio": round(statistics.median(finished) / seconds, 2) if finished else None,
        "unit": f"s for a window of {ROWS} predictions with {DIM}-d embeddings",
        "n": RUNS,
        "runs": {"ours": ours, "plain Evidently": peers},
        "false_alarms": sizes,
        "power_at_1000": power,
    }


def _apart(side: str, scratch: Path) -> dict[str, Any]:
    """One side in a process of its own: what it took, and its peak memory."""
    command = [sys.executable, "-m", "bench.watch", side, str(scratch), str(ROWS)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PEER_LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"over_s": PEER_LIMIT_S}
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _window(seed: int, rows: int, shift: float) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {
        "statistics": rng.normal([0.4 + 0.05 * shift, 0.5, 0.2, 0.1], 0.05, (rows, 4)),
        "confidence": np.clip(rng.normal(0.9 - 0.03 * shift, 0.03, rows), 0, 1),
        "predicted": rng.integers(0, 10, rows),
        "embeddings": rng.normal(0.3 * shift, 1, (rows, DIM)).astype(np.float32),
    }


def _sealed(folder: Path) -> tuple[str, datetime.datetime]:
    """A log of one sealed segment with the window's rows, as a server leaves it; made once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from components.images import STATISTICS
    from components.objects import open_objects
    from components.predictionlog import SCHEMA_VERSION, schema
    from components.store import seal, sha256_file

    at = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
    log = folder / "log"
    name = f"date={at.date().isoformat()}/window"
    if (log / f"{name}.json").is_file():
        return str(log), at
    given = _window(1, ROWS, 0.5)
    probabilities = np.zeros((ROWS, 10), np.float32)
    probabilities[np.arange(ROWS), given["predicted"]] = given["confidence"]
    columns: dict[str, Any] = {field.name: [None] * ROWS for field in schema()}
    columns |= {
        "prediction_id": [f"{i:032x}" for i in range(ROWS)],
        "image_sha256": [f"{i:064x}" for i in range(ROWS)],
        "model": ["digits"] * ROWS,
        "version": ["1"] * ROWS,
        "release": ["r"] * ROWS,
        "ingest_at": [at] * ROWS,
        "predicted": [CLASSES[i] for i in given["predicted"]],
        "confidence": given["confidence"].astype(np.float32),
        "unsure": [False] * ROWS,
        "probabilities": list(probabilities),
        "embedding": list(given["embeddings"].astype(np.float16)),
        **{column: given["statistics"][:, i].astype(np.float32) for i, column in enumerate(STATISTICS)},
    }
    file = log / f"{name}.parquet"
    file.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns, schema=schema()), file, compression="zstd", row_group_size=10_000)
    moment = at.isoformat()
    body = {
        "schema_version": SCHEMA_VERSION,
        "sha256": sha256_file(file),
        "rows": ROWS,
        "gaps": [],
        "first": moment,
        "last": moment,
    }
    open_objects(str(log)).swap(f"{name}.json", lambda _: seal(body))
    return str(log), at


def _ours(folder: Path) -> dict[str, Any]:
    """From the sealed log to the verdict, Evidently's page and its history, as a watch does it."""
    log, at = _sealed(folder)
    rows = _window(0, 2000, 0.0)
    columns = {"confidence": rows["confidence"], "predicted": np.array(CLASSES)[rows["predicted"]]}
    reference = Sample(rows["statistics"], columns, rows["embeddings"], CLASSES)
    began = time.perf_counter()
    from components import plugins
    from components.predictionlog import read_stretch
    from monitoring.drift import DriftPolicy, judge
    from monitoring.window import open_window

    policy, until = DriftPolicy(), at + datetime.timedelta(hours=1)
    found = read_stretch(log, None, model="digits", since=at, until=until, now=until)
    window = open_window(
        found,
        _release(),
        plugins.load("tasks", "classification"),
        "r",
        "1",
        since=at,
        until=until,
        most=policy.most_images,
    )
    verdict, measured = judge(reference, window, policy, reference_sha256="0" * 64)
    assert measured is not None
    measured.save_page(folder / "page.html")
    measured.keep(folder / "history", "digits", "window", [])
    seconds = round(time.perf_counter() - began, 2)
    compared = {"rows": window.facts.rows, "compared": window.facts.judged}
    return {"seconds": seconds, "status": verdict.status, "detectors": list(verdict.detectors), **compared}


def _release() -> Any:
    """What a window needs to know of a release."""
    from types import SimpleNamespace

    return SimpleNamespace(model="digits", engine=SimpleNamespace(classes=CLASSES, embedding_dim=DIM))


def _evidently(folder: Path) -> dict[str, Any]:
    """Evidently by itself, as its documentation does it: every column and the embeddings, default methods."""
    import warnings

    import pandas as pd

    warnings.simplefilter("ignore")
    log, _ = _sealed(folder)
    rows = _window(0, 2000, 0.0)
    names = ["brightness", "contrast", "sharpness", "saturation", "confidence", "predicted"]
    embeddings = [f"e{i}" for i in range(DIM)]
    reference = pd.DataFrame(rows["statistics"], columns=names[:4])
    reference = reference.assign(confidence=rows["confidence"], predicted=rows["predicted"].astype(str))
    reference = pd.concat([reference, pd.DataFrame(rows["embeddings"], columns=embeddings)], axis=1)
    began = time.perf_counter()
    from components.tables import read_frame

    (file,) = Path(log).rglob("*.parquet")
    read = read_frame(file, [*names, "embedding"])
    wide = pd.DataFrame(np.stack(read["embedding"].to_list()).astype(np.float32), columns=embeddings)
    frames = [reference, pd.concat([read[names], wide], axis=1)]
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import ValueDrift
    from evidently.metrics.embeddings import EmbeddingsDrift

    columns = ["brightness", "contrast", "sharpness", "saturation", "confidence"]
    definition = DataDefinition(
        numerical_columns=columns, categorical_columns=["predicted"], embeddings={"e": [f"e{i}" for i in range(DIM)]}
    )
    ours, theirs = (Dataset.from_pandas(frame, data_definition=definition) for frame in frames)
    report = Report([*(ValueDrift(column=name) for name in [*columns, "predicted"]), EmbeddingsDrift(embeddings_name="e")])
    snapshot = report.run(theirs, ours)
    snapshot.dict()
    (folder / "peer.html").write_text(snapshot.get_html_str(as_iframe=False))
    return {"seconds": round(time.perf_counter() - began, 2), "rows": ROWS, "compared": ROWS}


@dataclasses.dataclass(frozen=True)
class Pool:
    """Held-out digits and what the engine says about them, clean and corrupted."""

    clean: Any
    corrupted: dict[str, Any]
    accuracy: dict[str, float]


def _digits(scratch: Path) -> Pool:
    """The engine of a short training on all pictures that it was not trained on, and on their corruptions."""
    from bench.serving import visionloop
    from components import plugins
    from components.contracts.data import Splits
    from components.contracts.records import Stored
    from components.contracts.releases import Release
    from components.images import appearance, decode, prepare
    from components.samples import rows
    from components.store import Store, read_manifest
    from monitoring.verdicts import Sample

    workspace = scratch / "workspace"
    visionloop("init", str(workspace), cwd=scratch)
    visionloop("data", "add", "--source", "digits", cwd=workspace)
    identity = ["-c", "user.name=bench", "-c", "user.email=bench@bench.invalid", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, "commit", "--quiet", "-m", "bench"], cwd=workspace, check=True)
    say("training the engine whose answers are watched")
    gates = "gating.gates=[{gate: accuracy, settings: {floor: 0.8}}]"
    one_engine = "export.targets=[{target: openvino, precision: int8}]"
    settings = ["--set", "training.fit.epochs=12", "--set", gates, "--set", one_engine]
    visionloop("train", "-r", "digits", *settings, cwd=workspace)
    store = Store(workspace / ".visionloop" / "store")
    (folder,) = (workspace / ".visionloop" / "store" / "packaging").iterdir()
    release = store.open("packaging", folder.name, Release)
    (split_folder,) = (workspace / ".visionloop" / "store" / "splitting").iterdir()
    assert release is not None
    splits = Stored(Splits.read(read_manifest(split_folder)["record"]), split_folder)
    engine = release.record.engine
    predictor = plugins.load("targets", engine.target, engine.settings).load(
        Stored(engine, release.folder / "engine"), num_threads=2
    )
    task = plugins.load("tasks", release.record.task, release.record.task_settings)
    world = scratch / "world"
    plugins.load("sources", "digits").fetch_world(out=world)
    files = [
        (workspace / "data" / p, int(c)) for p, c in zip(*(rows(splits, "test")[n] for n in ("path", "label")), strict=True)
    ]
    files += [(path, int(path.parent.name)) for path in sorted(world.rglob("*.bmp"), key=lambda p: p.name)]
    pixels = [np.asarray(decode(path.read_bytes()).stored.convert("L")) for path, _ in files]
    labels = np.array([label for _, label in files])

    def answered(change: Callable[[npt.NDArray[np.uint8], int], npt.NDArray[Any]]) -> tuple[Sample, float]:
        images = []
        for index, picture in enumerate(pixels):
            data = io.BytesIO()
            Image.fromarray(np.clip(change(picture, index), 0, 255).astype(np.uint8)).save(data, "PNG")
            images.append(prepare(decode(data.getvalue()), engine.preprocessing))
        logits, embeddings = predictor.predict(np.stack(images))
        probabilities = task.probabilities(logits, engine.temperature)
        sample = Sample(
            statistics=np.array([appearance(image) for image in images], dtype=np.float64),
            columns=task.drift_columns(probabilities, engine.classes),
            embeddings=embeddings.astype(np.float16).astype(np.float32),
            classes=engine.classes,
        )
        return sample, float((sample.columns["predicted"].astype(int) == labels).mean())

    def noise(level: float) -> Callable[[npt.NDArray[np.uint8], int], npt.NDArray[Any]]:
        return lambda picture, index: picture + np.random.default_rng(index).normal(0, level, picture.shape)

    def blur(radius: float) -> Callable[[npt.NDArray[np.uint8], int], npt.NDArray[Any]]:
        return lambda picture, _: np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))

    def darker(factor: float) -> Callable[[npt.NDArray[np.uint8], int], npt.NDArray[Any]]:
        return lambda picture, _: picture * factor

    changes = {
        **{f"noise, sigma {level:g} of 255": noise(level) for level in (4, 12, 30)},
        **{f"blur, radius {radius:g} px": blur(radius) for radius in (0.4, 0.7, 1.2)},
        **{f"brightness x {factor:g}": darker(factor) for factor in (0.95, 0.85, 0.6)},
    }
    clean, accuracy = answered(lambda picture, _: picture)
    found = {name: answered(change) for name, change in changes.items()}
    say(f"  {len(pixels)} held-out digits; accuracy clean {accuracy:.3f}")
    return Pool(
        clean,
        {name: sample for name, (sample, _) in found.items()},
        {"clean": round(accuracy, 4), **{name: round(value, 4) for name, (_, value) in found.items()}},
    )


def _judged(task: tuple[Any, Any, int, int]) -> tuple[str, tuple[str, ...]]:
    """One window: the pool divided by chance, the window's pictures taken from `world`.

    Returns the verdict, and the detectors beyond their threshold, whether or not the shift matters: alpha is about those.
    """
    from monitoring.drift import DriftPolicy, judge
    from monitoring.verdicts import WindowFacts
    from monitoring.window import Window

    pool, world, n, seed = task
    order = np.random.default_rng([seed, n]).permutation(len(pool))
    theirs, ours = order[:n], order[n:]
    at = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC).isoformat()
    facts = WindowFacts(
        model="digits", version="1", release="r", since=at, until=at, rows=n, judged=n, distinct_images=n, content=str(seed)
    )
    window = Window(facts, _taken(world, theirs), None)  # type: ignore[arg-type]
    policy = DriftPolicy(alpha=ALPHA)
    verdict, _ = judge(_taken(pool, ours), window, policy, reference_sha256=f"{seed:064x}")
    beyond = [
        s.detector for s in verdict.shifts if s.value is not None and s.threshold is not None and s.value > s.threshold
    ]
    return verdict.status, tuple(beyond)


def _taken(sample: Any, picks: npt.NDArray[np.int64]) -> Any:
    return dataclasses.replace(
        sample,
        statistics=sample.statistics[picks],
        columns={name: values[picks] for name, values in sample.columns.items()},
        embeddings=sample.embeddings[picks],
    )


def _one_thread() -> None:
    """Two processes on two cores: more threads would be in each other's way."""
    import threadpoolctl

    threadpoolctl.threadpool_limits(1)


def _all(tasks: Sequence[tuple[Any, Any, int, int]]) -> list[tuple[str, tuple[str, ...]]]:
    found = []
    with ProcessPoolExecutor(2, initializer=_one_thread) as pool:
        for index, judged in enumerate(pool.map(_judged, tasks, chunksize=5), start=1):
            found.append(judged)
            if index % 100 == 0:
                say(f"  {index} of {len(tasks)} windows")
    return found


def false_alarms(pool: Pool, n: int) -> dict[str, Any]:
    """How many of the windows without drift alarm, and whether that many are more than alpha explains."""
    from scipy.stats import binomtest

    say(f"{WINDOWS} windows of {n} without drift")
    found = _all([(pool.clean, pool.clean, n, seed) for seed in range(WINDOWS)])
    statuses = [status for status, _ in found]
    alarms, beyond = statuses.count("drift"), sum(bool(names) for _, names in found)

    def explained(count: int) -> float:
        return round(float(binomtest(count, WINDOWS, ALPHA, alternative="greater").pvalue), 4)

    told = {
        "windows": WINDOWS,
        "alpha": ALPHA,
        "alarms": alarms,
        "p_of_as_many_alarms": explained(alarms),
        "beyond_a_threshold": beyond,
        "p_of_as_many_beyond": explained(beyond),
        "inconclusive": statuses.count("inconclusive"),
        "detectors_beyond": dict(Counter(name for _, names in found for name in names)),
    }
    say(f"  {told}")
    return told


def powers(pool: Pool) -> dict[str, Any]:
    """Share of the windows of each corruption that alarm, with its interval, beside what it does to accuracy."""
    from components.intervals import wilson

    table: dict[str, Any] = {}
    for name, world in pool.corrupted.items():
        found = _all([(pool.clean, world, 1000, 10_000 + seed) for seed in range(POWER_WINDOWS)])
        share = wilson(sum(status == "drift" for status, _ in found), len(found))
        table[name] = {
            "power": round(share.value, 3),
            "low": round(share.low, 3),
            "high": round(share.high, 3),
            "windows": len(found),
            "accuracy": pool.accuracy[name],
            "accuracy_clean": pool.accuracy["clean"],
        }
        say(f"  {name}: {table[name]}")
    return table


if __name__ == "__main__":
    ROWS = int(sys.argv[3])
    result = {"ours": _ours, "evidently": _evidently}[sys.argv[1]](Path(sys.argv[2]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**result, "peak_mb": round(peak)}))
