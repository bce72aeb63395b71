"""The long proofs: a hundred switches under load, memory that stays flat, promotions killed at random."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from bundles import evidence
from served import MODEL, Server, jpeg, mutated, png, publish, route, server, variant
from shapes import KINDS

from components.contracts.records import Stored
from components.contracts.releases import Release
from components.releases import ReleaseStore
from registry import approval
from registry.approval import person
from registry.ledger import Ledger
from registry.models import Registry
from registry.promotion import Promotion

pytestmark = pytest.mark.slow


def memory_mb(pid: int) -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024  # type: ignore[index]


def test_a_hundred_switches_under_load_fail_no_request(stage: Path, smoke: Stored[Release], tmp_path: Path) -> None:
    store = ReleaseStore(str(stage / ".visionloop" / "releases"))
    first = store.routes(MODEL)
    assert first is not None
    releases = {"1": first.routes[0].release}
    for number, factor in (("2", 2.0), ("3", 4.0)):
        # The temperature is the engine process's business: a batch that met another release would show in its answers.
        engine = smoke.record.engine.model_copy(update={"temperature": smoke.record.engine.temperature * factor})
        made = variant(smoke, tmp_path / number, engine=engine, golden_tolerance=0.99)
        releases[number] = publish(store, made, int(number), number)
    # Back and forth: the release before is warm. Then round and round: every one is loaded anew.
    order = ["1", "2"] * 35 + ["3", "1", "2"] * 10
    seen: list[tuple[int, str, str]] = []
    answers: dict[tuple[bytes, str], list[float]] = {}
    stop = threading.Event()

    def ask(mine: Server, number: int) -> None:
        index = 0
        while not stop.is_set():
            index += 1
            data = png(KINDS[index % 3], 100 * number + index % 100)
            try:
                reply = mine.predict(data)
            except OSError as error:
                seen.append((0, repr(error), ""))
                continue
            told = reply.json
            seen.append((reply.status, told.get("model_version", ""), told.get("release", "")))
            answers.setdefault((data, seen[-1][1]), []).append(max(told["probabilities"].values()))
            time.sleep(0.004)

    with server(stage) as mine:
        threads = [threading.Thread(target=ask, args=(mine, n)) for n in range(3)]
        for thread in threads:
            thread.start()
        try:
            for generation, version in enumerate(order, start=10):
                route(store, releases[version], generation, version)
                mine.wait_for(lambda version=version: mine.version == version, 60)  # type: ignore[misc]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert mine.figure("load_failures_total") == 0
        assert mine.figure("switches_total") >= 100
        mine.wait_for(lambda: len(mine.engine_processes()) <= 3)
    assert Counter(status for status, *_ in seen) == {200: len(seen)}, [row for row in seen if row[0] != 200][:5]
    assert len(seen) > 1000
    assert max(max(found) - min(found) for found in answers.values()) < 0.02  # each release answers as itself, always
    apart = [
        min(found) - max(answers[data, "3"])
        for (data, version), found in answers.items()
        if version == "1" and (data, "3") in answers
    ]
    assert len(apart) > 50
    assert np.median(apart) > 0.05
    assert all(release == releases[version] for _, version, release in seen)
    assert {version for _, version, _ in seen} == {"1", "2", "3"}


def test_memory_stays_flat_over_good_and_hostile_requests(stage: Path) -> None:
    good = [png(kind, seed) for kind in KINDS for seed in range(20)]
    bad = [mutated(jpeg("disc", seed), seed) for seed in range(100)]
    with server(stage) as mine:
        (worker,) = mine.engine_processes()

        def round_of(count: int) -> None:
            for index in range(count):
                mine.predict(good[index % len(good)])
                if index % 5 == 0:
                    mine.predict(bad[index % len(bad)])

        round_of(2000)
        before = memory_mb(mine.process.pid), memory_mb(worker)
        round_of(8000)
        after = memory_mb(mine.process.pid), memory_mb(worker)
        assert after[0] - before[0] < 24, (before, after)
        assert after[1] - before[1] < 24, (before, after)
        assert mine.engine_processes() == [worker]


_PROMOTE = """
import sys
from registry.ledger import Ledger
from registry.models import Registry
from registry.promotion import Promotion
from components.releases import ReleaseStore
from pathlib import Path
uri, root, act, version = sys.argv[1:]
registry = Registry(uri, Ledger(f"sqlite:///{root}/ledger.db"), artifacts=Path(root) / "artifacts")
promotion = Promotion(registry, ReleaseStore(f"{root}/releases"), "m")
promotion.registry.alias("m")
print("begin", flush=True)
if act == "promote":
    promotion.promote(version)
else:
    from registry.approval import person
    promotion.rollback(version, person("bob"), act)
"""


def kill_at_random(rng: random.Random, *arguments: str) -> None:
    """Promote or roll back in a process of its own, and kill -9 it within half a second."""
    job = subprocess.Popen([sys.executable, "-c", _PROMOTE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert job.stdout is not None
    assert job.stdout.readline() == b"begin\n"
    time.sleep(rng.uniform(0, 0.5))
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    job.stdout.close()


def test_promotions_killed_at_random_leave_the_truth(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def fresh() -> Promotion:
        registry = Registry(uri, Ledger(f"sqlite:///{tmp_path / 'ledger.db'}"), artifacts=tmp_path / "artifacts")
        return Promotion(registry, ReleaseStore(str(tmp_path / "releases")), "m")

    rng = random.Random(11)
    ann = person("ann")
    for attempt in range(10):
        mine = fresh()
        champion = mine.ledger.champion("m")
        given = evidence(tmp_path, "m", digest=f"d{attempt}", champion_engine=champion.body["engine"] if champion else None)
        version = mine.registry.register(given).version  # type: ignore[union-attr]
        mine.ledger.decide(model="m", actor=ann, rule=approval.approve(version, ann, "good"))
        kill_at_random(rng, uri, str(tmp_path), "promote", version)
        survivor = fresh()
        routes = survivor.releases.routes("m")
        entries = survivor.ledger.entries("m")
        if routes is not None:
            row = next(entry for entry in entries if entry.seq == routes.generation)
            assert row.kind == "promoted"
            survivor.releases.verify("m", routes.routes[0].release)
        survivor.promote(version)
        assert survivor.differences() == []
        current = survivor.ledger.champion("m")
        assert current is not None
        assert current.body["version"] == version
    promoted = [e.body["version"] for e in fresh().ledger.entries("m") if e.kind == "promoted"]
    assert len(promoted) == len(set(promoted)) == 10
    # And back and forth between the last two, each command killed and given again.
    for attempt in range(8):
        target = promoted[-2 - attempt % 2]
        kill_at_random(rng, uri, str(tmp_path), f"complaint {attempt}", target)
        survivor = fresh()
        routes = survivor.releases.routes("m")
        assert routes is not None
        served = next(entry for entry in survivor.ledger.entries("m") if entry.seq == routes.generation)
        assert (served.body["version"], served.body["release"]) == (routes.routes[0].version, routes.routes[0].release)
        survivor.rollback(target, person("bob"), f"complaint {attempt}")
        assert survivor.differences() == []
        current = survivor.ledger.champion("m")
        assert current is not None
        assert current.body["version"] == target
        assert [e.kind for e in survivor.ledger.entries("m")].count("rolled_back") == attempt + 1
