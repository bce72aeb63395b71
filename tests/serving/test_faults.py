"""What a server does when its world breaks: processes die, disks fill, releases are bad, clients are slow."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import http.client
import io
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from served import MODEL, Reply, Server, health, jpeg, png, publish, route, server, staged, variant
from shapes import KINDS, free_port, visionloop, visionloop_process

from components import predictionlog
from components.contracts.records import Stored
from components.contracts.releases import Release
from components.objects import open_objects
from components.releases import ReleaseStore
from components.store import seal, unseal
from serving.engines.deployment import Deployment
from serving.engines.frames import Facts, Form
from serving.engines.limits import Limits
from serving.log import audit, sealing
from serving.metrics import Metrics
from serving.protocols.auth import ROLES, Tokens


def releases(workspace: Path) -> ReleaseStore:
    return ReleaseStore(str(workspace / ".visionloop" / "releases"))


class Clients:
    """Threads that keep asking until they are stopped; every reply is kept."""

    def __init__(self, target: Server, count: int = 3) -> None:
        self.target, self.broken = target, 0
        self.replies: list[Reply] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(count)]

    def _ask(self, number: int) -> None:
        index = 0
        while not self._stop.is_set():
            index += 1
            try:
                self.replies.append(self.target.predict(png(KINDS[index % 3], number * 1000 + index % 50)))
            except (OSError, http.client.HTTPException):  # the connection, or an answer that ended in its middle
                self.broken += 1
                time.sleep(0.05)

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def statuses(self) -> set[int]:
        return {reply.status for reply in self.replies}


def log_rows(workspace: Path) -> list[dict[str, Any]]:
    """Every row of the prediction log, what lies in journals included."""
    state = workspace / ".visionloop"
    deadline = time.monotonic() + 30
    while True:
        sealing.seal_all(state / "serving" / "journal", str(state / "predictions"))
        # A sealing process of the server's own may be at one of them: it takes only time that nobody wants.
        if not audit.unsealed(state / "serving" / "journal") or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    tables = list(predictionlog.read_log(str(state / "predictions")))
    return pa.concat_tables(tables).to_pylist() if tables else []


def test_the_engine_process_killed_again_and_again_costs_no_answer(stage: Path) -> None:
    with server(stage) as mine:
        with Clients(mine) as clients:
            for kill in range(1, 4):
                time.sleep(0.4)
                (worker,) = mine.engine_processes()
                os.kill(worker, signal.SIGKILL)
                mine.wait_for(lambda kill=kill: mine.figure("worker_restarts_total") == kill)  # type: ignore[misc]
                mine.wait_for(lambda: mine.status()["models"][MODEL]["ready"])
            time.sleep(0.5)
        assert clients.broken == 0
        assert clients.statuses() == {200}
        assert mine.figure("worker_restarts_total") == 3
        assert mine.figure("blocked_pictures_total") == 0
        assert len(mine.engine_processes()) == 1


DEADLY = '''
"""An engine that dies, or hangs, when a picture is almost white: what a bug in a native library does."""
import ctypes
from components.targets.openvino import Target as OpenVino


class Target(OpenVino):
    def load(self, engine, *, num_threads, num_streams=1):
        real = super().load(engine, num_threads=num_threads, num_streams=num_streams)

        class Deadly:
            def predict(self, images):
                if (images.reshape(len(images), -1).min(axis=1) > 250).any():
                    # No signal to the process: another thread may take it, after this one has answered.
                    ctypes.string_at(0)
                return real.predict(images)

        return Deadly()
'''


def with_target(stage: Path, smoke: Stored[Release], source: str, generation: int) -> str:
    """Route a release whose engine is run by a plug-in target of the workspace."""
    plugins = stage / "plugins" / "targets"
    plugins.mkdir(parents=True, exist_ok=True)
    name = f"special{generation}"
    (plugins / f"{name}.py").write_text(source)
    engine = smoke.record.engine.model_copy(update={"target": name})
    other = variant(smoke, stage.parent / name, engine=engine)
    return publish(releases(stage), other, generation, str(generation))


def white() -> bytes:
    from PIL import Image
    from served import encoded

    return encoded(Image.new("L", (16, 16), 255), "PNG")


def test_a_picture_that_kills_the_engine_is_found_and_blocked_and_its_neighbours_are_answered(
    stage: Path, smoke: Stored[Release]
) -> None:
    with_target(stage, smoke, DEADLY, 2)
    with server(stage) as mine:
        assert mine.version == "2"
        with ThreadPoolExecutor(12) as pool:
            bad = pool.submit(mine.predict, white())
            good = [pool.submit(mine.predict, png("disc", seed)) for seed in range(10)]
            replies = [future.result() for future in good]
            assert [reply.json for reply in replies if reply.status != 200] == [], mine.told[-20:]
            assert bad.result().status == 400
        assert bad.result().json == {"error": "this picture killed a decoder before and is blocked"}
        restarts = mine.figure("worker_restarts_total")
        assert restarts == 2
        assert mine.predict(white()).status == 400
        assert mine.figure("worker_restarts_total") == restarts
        assert mine.figure("blocked_pictures_total") == 2
        assert mine.predict(png("cross", 1)).status == 200


def test_an_engine_that_hangs_is_replaced_and_nobody_waits_for_it_for_ever(smoke: Stored[Release]) -> None:
    async def act() -> tuple[int, float]:
        limits = Limits(batch_timeout_s=2.0)
        made = Deployment(smoke, version="1", generation=1, limits=limits, metrics=Metrics(), plugins=None)
        await made.start()
        try:
            assert made._link is not None
            hung = made._link.process.pid
            os.kill(hung, signal.SIGSTOP)
            since = time.monotonic()
            # The process that follows gets the picture once more: one death is not its fault yet.
            (answer,) = made.submit([(Form.ENCODED, png("disc", 1))])
            facts = await asyncio.wait_for(answer, 60)
            assert isinstance(facts, Facts)
            assert made._link.process.pid != hung
            return len(facts.probabilities), time.monotonic() - since
        finally:
            await made.close()

    classes, took_s = asyncio.run(act())
    assert classes == 3
    assert 2.0 <= took_s < 30


def test_a_delay_makes_one_batch_of_what_comes_within_it(stage: Path) -> None:
    with server(stage, "--batch-delay-ms", "1000", "--max-wait-ms", "5000") as mine:
        batches, pictures = mine.figure("batch_size_count"), mine.figure("batch_size_sum")
        with ThreadPoolExecutor(4) as pool:
            since = time.monotonic()
            four = [pool.submit(mine.predict, png("disc", seed)) for seed in range(4)]
            assert {future.result().status for future in four} == {200}
            full_s = time.monotonic() - since
        assert mine.figure("batch_size_sum") - pictures == 4
        assert mine.figure("batch_size_count") - batches == 1
        since = time.monotonic()
        assert mine.predict(png("disc", 9)).status == 200  # alone: it waits for the delay, and no longer
        alone_s = time.monotonic() - since
        assert full_s < 1.0 <= alone_s < 4.0


def test_a_row_of_the_log_says_what_was_answered(stage: Path) -> None:
    data = jpeg("cross", 77)
    with server(stage) as mine:
        known = {row["prediction_id"] for row in log_rows(stage)}
        headers = {"idempotency_key": "order-1", "x_event_time": "2026-01-02T03:04:05Z"}
        before = datetime.datetime.now(datetime.UTC)
        told = mine.predict(data, kind="image/jpeg", **headers).json
        after = datetime.datetime.now(datetime.UTC)
        mine.stop()
    (row,) = [row for row in log_rows(stage) if row["prediction_id"] not in known]
    release = ReleaseStore(str(stage / ".visionloop" / "releases")).fetch(MODEL, told["release"], cache=stage / "fetched")
    engine = release.record.engine
    assert row["prediction_id"] == told["prediction_id"]
    assert (row["idempotency_key"], row["image_sha256"]) == ("order-1", hashlib.sha256(data).hexdigest())
    assert row["event_at"] == datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    assert before <= row["ingest_at"] <= after
    assert (row["release"], row["engine_digest"], row["version"]) == (
        told["release"],
        engine.digest(),
        told["model_version"],
    )
    assert (row["model"], row["role"], row["protocol"], row["form"]) == (MODEL, "champion", "http", "encoded")
    assert dict(zip(engine.classes, row["probabilities"], strict=True)) == pytest.approx(told["probabilities"])
    assert (row["predicted"], row["confidence"]) == (told["label"], pytest.approx(max(told["probabilities"].values())))
    image = Image.open(io.BytesIO(data))
    assert (row["width"], row["height"], row["bytes"]) == (*image.size, len(data))
    grey = np.asarray(image.convert("RGB"), np.float64).mean() / 255
    assert row["brightness"] == pytest.approx(grey, abs=0.1)
    embedding = np.asarray(row["embedding"], np.float32)
    assert embedding.shape == (engine.embedding_dim,)
    assert np.isfinite(embedding).all()
    assert embedding.std() > 0
    assert 0 < row["latency_ms"] < 30_000


def test_what_was_answered_before_a_kill_is_in_the_log_and_no_engine_is_left(stage: Path) -> None:
    with server(stage) as mine:
        (worker,) = mine.engine_processes()
        with Clients(mine, 4) as clients:
            time.sleep(2.0)
            mine.process.kill()
            mine.process.wait(10)
        deadline = time.monotonic() + 10
        while _runs(worker):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    answered = {reply.json["prediction_id"] for reply in clients.replies if reply.status == 200}
    assert len(answered) > 50
    logged = [row["prediction_id"] for row in log_rows(stage)]
    assert len(logged) == len(set(logged))
    assert answered <= set(logged)
    # The next server starts where this one was killed.
    with server(stage) as again:
        assert again.predict(png("disc", 1)).status == 200
        assert again.stop() == 0
    assert len(log_rows(stage)) == len(logged) + 1


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_sigterm_answers_what_was_taken_and_leaves_with_status_zero(stage: Path) -> None:
    with server(stage) as mine:
        with Clients(mine, 6) as clients:
            time.sleep(1.0)
            status = mine.stop()
        assert status == 0
        taken = [reply for reply in clients.replies if reply.status == 200]
        assert clients.statuses() <= {200, 503}
    assert {reply.json["prediction_id"] for reply in taken} == {row["prediction_id"] for row in log_rows(stage)}
    assert list((stage / ".visionloop" / "serving" / "journal").glob("*.journal")) == []
    assert any('"stopped"' in line for line in mine.told)


def test_a_new_champion_takes_over_without_a_failed_request(stage: Path, smoke: Stored[Release], tmp_path: Path) -> None:
    other = variant(smoke, tmp_path / "other", threshold=1.0)
    with server(stage) as mine:
        with Clients(mine) as clients:
            time.sleep(0.5)
            first = releases(stage).routes(MODEL)
            assert first is not None
            digest = publish(releases(stage), other, 2, "2")
            mine.wait_for(lambda: mine.version == "2")
            time.sleep(0.5)
            route(releases(stage), first.routes[0].release, 3, "1")  # back: the release before is still warm
            mine.wait_for(lambda: mine.version == "1")
            time.sleep(0.3)
        assert clients.broken == 0
        assert clients.statuses() == {200}
        seen = [(r.json["model_version"], r.json["release"], r.json["unsure"], r.json["label"]) for r in clients.replies]
        assert {version for version, *_ in seen} == {"1", "2"}
        for version, release, unsure, label in seen:
            assert (release == digest) == (version == "2")
            assert unsure or version == "1"
            assert (label == "unsure") == unsure
        assert mine.figure("switches_total") == 3
    for row in log_rows(stage):
        assert (row["release"] == digest) == (row["version"] == "2")
        assert row["unsure"] or row["version"] == "1"


HANGING = "import time\nfrom components.targets.openvino import Target as OpenVino\nclass Target(OpenVino):\n    def load(self, *a, **k): time.sleep(3600)\n"
WRONG = """
import numpy as np
from components.targets.openvino import Target as OpenVino


class Target(OpenVino):
    def load(self, engine, *, num_threads, num_streams=1):
        real = super().load(engine, num_threads=num_threads, num_streams=num_streams)

        class Wrong:
            def predict(self, images):
                logits, embedding = real.predict(images)
                return np.roll(logits, 1, axis=1), embedding

        return Wrong()
"""
DYING = "import os\nfrom components.targets.openvino import Target as OpenVino\nclass Target(OpenVino):\n    def load(self, *a, **k): os._exit(3)\n"


def test_a_hanging_release_is_given_up(stage: Path, smoke: Stored[Release]) -> None:
    # Long enough for the good release on a busy machine.
    with server(stage, "--load-timeout-s", "8") as mine:
        with_target(stage, smoke, HANGING, 2)
        mine.wait_for(lambda: mine.figure("load_failures_total") == 1)
        assert "not ready within 8 s" in mine.status()["models"][MODEL]["problem"]
        assert mine.predict(png("disc", 1)).json["model_version"] == "1"
        mine.wait_for(lambda: len(mine.engine_processes()) == 1)


def test_bad_and_tampered_releases_leave_the_old_one_serving(stage: Path, smoke: Stored[Release], tmp_path: Path) -> None:
    store, folder = releases(stage), stage / ".visionloop" / "releases"

    def flipped_byte(path: Path) -> None:
        engine = path / "engine" / smoke.record.engine.entry
        engine.write_bytes(engine.read_bytes()[:-1] + b"X")

    def newer_schema(path: Path) -> None:
        body = unseal((path / "manifest.json").read_bytes())
        assert body is not None
        body["record"]["schema_version"] = 99
        (path / "manifest.json").write_bytes(seal(body))

    def missing(path: Path) -> None:
        shutil.rmtree(path)

    with server(stage) as mine:

        def refused(why: str) -> None:
            mine.wait_for(lambda: why in (mine.status()["models"][MODEL]["problem"] or ""))
            problem = mine.status()["models"][MODEL]["problem"]
            assert not re.search(r"(?<!\w)/", problem)  # names, and no folders of the machine
            assert mine.version == "1"
            assert mine.predict(png("disc", 1)).status == 200
            assert mine.ask("GET", "/v2/health/ready").status == 200
            mine.wait_for(lambda: len(mine.engine_processes()) == 1)

        for generation, (source, why) in enumerate([(WRONG, "golden vectors wrongly"), (DYING, "died while it loaded")], 2):
            with_target(stage, smoke, source, generation)
            refused(why)
            assert mine.figure("load_failures_total") == generation - 1
        tampered = [
            (newer_schema, "schema version 99, this visionloop reads up to"),
            (missing, "was not published"),
            (flipped_byte, "is not what its manifest says; nothing was loaded from it; version 1 goes on"),
        ]
        for generation, (tamper, why) in enumerate(tampered, 4):
            other = variant(smoke, tmp_path / str(generation), threshold=0.9 + generation / 100)
            digest = store.publish(other)
            tamper(folder / "releases" / MODEL / digest)
            route(store, digest, generation, str(generation))
            refused(why)
        path = folder / "routes" / f"{MODEL}.json"
        kept = path.read_text()
        path.write_text(kept.replace('"generation":6', '"generation":9'))
        refused("were changed by hand")
        # Published again, it is what its digest says, and is taken.
        path.write_text(kept)
        store.publish(other)
        mine.ask("POST", "/admin/refresh")
        assert mine.version == "6"


@pytest.mark.parametrize("what", ["flipped byte", "missing", "hanging"])
def test_a_restart_beside_a_release_that_cannot_serve_serves_what_was_served_before(
    stage: Path, smoke: Stored[Release], tmp_path: Path, what: str
) -> None:
    with server(stage) as mine:
        assert mine.version == "1"
    if what == "hanging":
        with_target(stage, smoke, HANGING, 2)
    else:
        store, other = releases(stage), variant(smoke, tmp_path / "other", threshold=0.9)
        digest = store.publish(other)
        route(store, digest, 2, "2")
        folder = stage / ".visionloop" / "releases" / "releases" / MODEL / digest
        if what == "missing":
            shutil.rmtree(folder)
        else:
            path = next(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
            path.write_bytes(path.read_bytes()[:-1] + b"\x00\xff")
    with server(stage, *(["--load-timeout-s", "8"] if what == "hanging" else [])) as again:
        assert again.predict(png("disc", 1)).json["model_version"] == "1"
        problem = again.status()["models"][MODEL]["problem"]
        assert "(version 2) was not taken" in problem
        assert problem.endswith("; version 1 goes on")
        assert again.figure("load_failures_total") == 1
        if what == "missing":
            # As soon as it can be taken, it is.
            store.publish(other)
            again.ask("POST", "/admin/refresh")
            assert again.version == "2"
            assert again.status()["models"][MODEL]["problem"] is None


def test_a_move_there_and_back_between_two_looks_is_told_by_its_row(stage: Path) -> None:
    with server(stage) as mine:
        served = mine.status()["models"][MODEL]
        assert mine.figure("generation") == served["generation"] == 1
        route(releases(stage), served["release"], 3, "1")
        mine.wait_for(lambda: mine.status()["models"][MODEL]["generation"] == 3)
        assert mine.figure("generation") == 3
        assert mine.figure("switches_total") == 1


def test_with_everything_else_gone_a_server_goes_on_and_even_starts_again(stage: Path) -> None:
    with server(stage) as mine:
        for path in (stage / ".visionloop").iterdir():
            if path.name != "serving":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        time.sleep(0.5)
        assert mine.predict(png("disc", 1)).status == 200
        assert mine.ask("GET", "/v2/health/ready").status == 200
    down = {"VISIONLOOP_RELEASES": "s3://nowhere/releases", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
    with server(stage, env={**down, **keys}) as again:
        assert again.predict(png("disc", 1)).json["model_version"] == "1"
        assert "does not answer" in again.status()["models"][MODEL]["problem"]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_full_disk_loses_rows_that_are_counted_for_good_and_no_answer(stage: Path, end: int) -> None:
    def verified() -> str:
        done = visionloop("predictions", "verify", cwd=stage)
        assert done.returncode == 1, done.stdout
        assert re.search(r"24 predictions of \S+ lost between 20\S+ and 20\S+: File too large \(EFBIG\)", done.stdout)
        return done.stdout

    with server(stage) as mine:
        assert mine.predict(png("disc", 1)).status == 200
        (journal,) = (mine.state / "journal").glob("*.journal")

        def fill(size: int) -> None:
            resource.prlimit(mine.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        fill(journal.stat().st_size + 100)
        for seed in range(20):
            assert mine.predict(png("disc", seed)).status == 200
        assert mine.figure("journal_lost_rows_total") == 20
        assert "EFBIG" in mine.status()["journal_problem"]
        fill(resource.RLIM_INFINITY)
        assert mine.predict(png("disc", 2)).status == 200
        assert mine.status()["journal_problem"] is None
        fill(journal.stat().st_size)
        for seed in range(4):
            assert mine.predict(png("disc", seed)).status == 200
        assert mine.stop(end) == (0 if end == signal.SIGTERM else -end)
    verified()
    assert len(log_rows(stage)) == 2
    (segment,) = predictionlog.segments(open_objects(str(stage / ".visionloop" / "predictions")))
    assert [gap["gap"] for gap in segment.gaps] == [24]
    assert "2 predictions, 0 twice, 24 lost" in verified()


@pytest.fixture(scope="module")
def hurried(tmp_path_factory: pytest.TempPathFactory, smoke: Stored[Release]) -> Iterator[Server]:
    """A server that waits two seconds for a request."""
    with server(staged(tmp_path_factory.mktemp("hurried"), smoke), "--request-timeout-s", "2") as found:
        yield found


def test_slow_clients_are_hung_up_on_and_nobody_waits_for_them(hurried: Server) -> None:
    head = b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/jpeg\r\ncontent-length: 1000\r\n"
    with contextlib.ExitStack() as stack:
        slow = []
        for start in (b"", b"POST /pre", head, head + b"\r\nabc"):
            slow.append(stack.enter_context(socket.create_connection(("127.0.0.1", hurried.port), timeout=10)))
            slow[-1].sendall(start)
        assert hurried.predict(png("disc", 1)).status == 200
        for raw in slow:
            answer = raw.recv(4096)
            assert answer == b"" or b" 408 " in answer.split(b"\r\n")[0], answer
            with contextlib.suppress(OSError):
                while raw.recv(4096):
                    pass


def test_calls_whose_message_does_not_come_are_ended_and_block_nobody_for_long(hurried: Server) -> None:
    """gRPC takes 128 calls at once: that many which only begin would otherwise be the end of it."""
    live = "/inference.GRPCInferenceService/ServerLive"

    async def act(port: int) -> tuple[set[Any], Any, Any]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            begin: Any = channel.stream_unary(live)
            begun = [begin() for _ in range(128)]
            # gRPC's core reads no message that nobody asks for: these calls have a head and no body.
            told = await asyncio.gather(*(call.code() for call in begun))
            answer = await channel.unary_unary(live)(b"", timeout=10)
            empty: Any = begin()
            await empty.done_writing()
            garbled = channel.unary_unary("/inference.GRPCInferenceService/ModelReady")(b"\x0a\xff", timeout=10)
            return set(told), answer, (await empty.code(), await garbled.code())

    codes, answer, others = asyncio.run(asyncio.wait_for(act(hurried.grpc_port), 60))
    assert codes == {grpc.StatusCode.DEADLINE_EXCEEDED}
    assert answer == b"\x08\x01"
    assert others == (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INVALID_ARGUMENT)
    assert hurried.predict(png("disc", 1)).status == 200


def test_overload_is_refused_at_once_and_what_is_taken_is_answered(stage: Path, smoke: Stored[Release]) -> None:
    slow = (
        "import time\nfrom components.targets.openvino import Target as OpenVino\n\n\nclass Target(OpenVino):\n"
        "    def load(self, engine, *, num_threads, num_streams=1):\n"
        "        real = super().load(engine, num_threads=num_threads, num_streams=num_streams)\n\n"
        "        class Slow:\n            def predict(self, images):\n"
        "                time.sleep(0.05 * len(images))\n                return real.predict(images)\n\n"
        "        return Slow()\n"
    )
    with_target(stage, smoke, slow, 2)
    with server(stage, "--max-queue", "8", "--max-batch", "2", "--max-wait-ms", "400", "--load-timeout-s", "30") as mine:
        with ThreadPoolExecutor(64) as pool:
            replies = list(pool.map(lambda seed: mine.predict(png("disc", seed)), range(300)))
        statuses = [reply.status for reply in replies]
        assert set(statuses) == {200, 503}
        refused = [reply for reply in replies if reply.status == 503]
        assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
        assert refused[0].json == {"error": "the server is full; try again later"}
        assert mine.figure("shed_total") == len(refused)
        with ThreadPoolExecutor(40) as pool:
            codes = list(pool.map(lambda seed: _grpc_code(mine, png("disc", seed)), range(120)))
        assert set(codes) == {"", "StatusCode.RESOURCE_EXHAUSTED"}
        assert mine.figure("journal_rows_total") == statuses.count(200) + codes.count("")
        assert mine.predict(png("disc", 1)).status == 200


def _grpc_code(mine: Server, data: bytes) -> str:
    import numpy as np
    import tritonclient.grpc as triton

    client = triton.InferenceServerClient(f"127.0.0.1:{mine.grpc_port}")
    given = triton.InferInput("images", [1], "BYTES")
    given.set_data_from_numpy(np.array([data], dtype=np.object_))
    try:
        client.infer(MODEL, [given])
    except triton.InferenceServerException as error:
        return str(error.status())
    finally:
        client.close()
    return ""


def test_captured_images_are_those_of_the_log_and_can_be_erased(stage: Path) -> None:
    with server(stage, "--capture-share", "0.5") as mine:
        for seed in range(40):
            assert mine.predict(png(KINDS[seed % 3], seed)).status == 200
        assert mine.stop() == 0
    logged = {row["image_sha256"] for row in log_rows(stage)}
    kept = {path.name for path in (mine.state / "captures").glob("??/*")}
    assert len(logged) == 40
    assert 5 < len(kept) < 35
    assert kept <= logged
    victim = min(kept)
    done = visionloop("predictions", "erase", victim, "--as", "ann", "--reason", "asked for", cwd=stage)
    assert done.returncode == 0
    assert "It was kept and is removed" in done.stdout
    assert not list((mine.state / "captures").rglob(victim))
    assert visionloop("predictions", "verify", cwd=stage).returncode == 0


def test_a_port_in_use_is_said_before_anything_is_loaded(stage: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = visionloop_process("serve", "-m", MODEL, "--port", port, cwd=stage)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr


def test_a_server_for_others_needs_a_token_first(stage: Path) -> None:
    done = visionloop_process("serve", "-m", MODEL, "--host", "0.0.0.0", "--port", str(free_port()), cwd=stage)
    assert done.returncode == 2
    assert "visionloop token add NAME --role predictor" in done.stderr
    done = visionloop_process("serve", cwd=stage)
    assert done.returncode == 2
    assert "--model NAME" in done.stderr


def test_a_model_that_nobody_promoted_is_waited_for(stage: Path, smoke: Stored[Release]) -> None:
    path = stage / ".visionloop" / "releases" / "routes" / f"{MODEL}.json"
    kept = path.read_bytes()
    path.unlink()
    with server(stage, ready=False) as mine:
        mine.wait_for(lambda: any("no release of shapes is routed yet (visionloop promote)" in line for line in mine.told))
        assert mine.ask("GET", "/v2/health/live").status == 200
        assert mine.ask("GET", "/v2/health/ready").status == 503
        reply = mine.predict(png("disc", 1))
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        watched = {name: health(mine, "Watch", name, timeout=60) for name in ("", MODEL, "other")}
        told = {name: [next(said)] for name, said in watched.items()}
        assert told == {"": ["NOT_SERVING"], MODEL: ["NOT_SERVING"], "other": ["SERVICE_UNKNOWN"]}
        names = ("", "inference.GRPCInferenceService", MODEL)
        assert health(mine, "List") == dict.fromkeys(names, "NOT_SERVING")
        path.write_bytes(kept)
        mine.wait_for(lambda: mine.ask("GET", "/v2/health/ready").status == 200)
        assert [next(watched[name]) for name in ("", MODEL)] == ["SERVING", "SERVING"]
        assert [health(mine, "Check", name) for name in names] == ["SERVING"] * 3
        with pytest.raises(grpc.RpcError) as refused:
            health(mine, "Check", "other")
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        crowd = [health(mine, "Watch", timeout=60) for _ in range(64 - len(watched))]
        assert {next(said) for said in crowd} == {"SERVING"}
        with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
            next(health(mine, "Watch"))  # calls are left for those who want answers
        assert health(mine, "Check") == "SERVING"
        mine.process.send_signal(signal.SIGTERM)
        # Who watches is told, and keeps no server that stops waiting.
        assert [list(watched[name]) for name in ("", MODEL, "other")] == [["NOT_SERVING"], ["NOT_SERVING"], []]
        assert mine.stop() == 0


ROUTES = {
    ("GET", "/"): None,
    ("GET", "/v2/health/live"): None,
    ("GET", "/v2/health/ready"): None,
    ("GET", f"/v2/models/{MODEL}/ready"): None,
    ("GET", f"/v2/models/{MODEL}/versions/1/ready"): None,
    ("GET", "/v2"): "viewer",
    ("GET", f"/v2/models/{MODEL}"): "viewer",
    ("GET", f"/v2/models/{MODEL}/versions/1"): "viewer",
    ("GET", f"/v2/models/{MODEL}/config"): "viewer",
    ("GET", f"/v2/models/{MODEL}/versions/1/config"): "viewer",
    ("GET", "/status"): "viewer",
    ("GET", "/metrics"): "viewer",
    ("GET", "/docs"): None,
    ("GET", "/openapi.json"): None,
    ("POST", "/predict"): "predictor",
    ("POST", f"/v2/models/{MODEL}/infer"): "predictor",
    ("POST", f"/v2/models/{MODEL}/versions/1/infer"): "predictor",
    ("POST", "/admin/refresh"): "admin",
}


def test_every_route_is_among_those_whose_role_is_tested() -> None:
    from serving.protocols.http import specification

    named = {(method.upper(), path) for path, item in specification()["paths"].items() for method in item}
    tested = {
        (method, path.replace(MODEL, "{model}").replace("versions/1", "versions/{version}")) for method, path in ROUTES
    }
    assert tested == named


def test_tokens_that_change_at_once_neither_get_lost_nor_come_back(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    names = [f"t{number}" for number in range(24)]
    for name in names[:12]:
        Tokens(path).issue(name, "viewer")
    with ThreadPoolExecutor(24) as pool:
        list(pool.map(lambda name: Tokens(path).issue(name, "viewer"), names[12:]))
        list(pool.map(lambda n: Tokens(path).revoke(n) if n in names[:12] else Tokens(path).issue(f"{n}x", "admin"), names))
    assert sorted(Tokens(path).names()) == sorted([*names[12:], *(f"{name}x" for name in names[12:])])


def test_every_route_asks_for_the_role_it_needs(stage: Path) -> None:
    import numpy as np
    import tritonclient.grpc as triton

    tokens = Tokens(stage / ".visionloop" / "serving" / "tokens.json")
    known: dict[str, str] = {role: tokens.issue(f"a-{role}", role) for role in ROLES}

    async def begun(port: int) -> Any:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            begin: Any = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
            return await begin().code()

    assert (tokens.path.stat().st_mode & 0o777) == 0o600
    assert not any(token in tokens.path.read_text() for token in known.values())
    # Longer than the test waits: who asks is known before a message is waited for.
    with server(stage, "--host", "0.0.0.0", "--request-timeout-s", "60") as mine:
        assert asyncio.run(asyncio.wait_for(begun(mine.grpc_port), 20)) is grpc.StatusCode.UNAUTHENTICATED
        for (method, path), needed in ROUTES.items():
            for role in (None, "wrong", *ROLES):
                token = {None: None, "wrong": "vl_wrong"}.get(role, known.get(role or ""))
                headers = {"content-type": "image/png"} | ({"authorization": f"Bearer {token}"} if token else {})
                reply = mine.ask(method, path, png("disc", 1) if method == "POST" else None, headers)
                if needed is None or (role in ROLES and ROLES.index(role) >= ROLES.index(needed)):
                    assert reply.status in (200, 400), (method, path, role, reply)  # 400: a picture is no v2 request
                elif role in (None, "wrong"):
                    assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer"), (method, path, role)
                else:
                    assert reply.status == 403, (method, path, role, reply)
        client = triton.InferenceServerClient(f"127.0.0.1:{mine.grpc_port}")
        given = triton.InferInput("images", [1, 16, 16, 1], "UINT8")
        given.set_data_from_numpy(np.zeros((1, 16, 16, 1), dtype=np.uint8))
        assert client.is_server_live()
        for role, why in [(None, "UNAUTHENTICATED"), ("viewer", "PERMISSION_DENIED"), ("predictor", "")]:
            sent = {"authorization": f"Bearer {known[role]}"} if role else {}
            if why:
                with pytest.raises(triton.InferenceServerException, match=why):
                    client.infer(MODEL, [given], headers=sent)
            else:
                client.infer(MODEL, [given], headers=sent)
        assert client.is_server_ready()
        assert client.is_model_ready(MODEL)
        assert health(mine, "Check", MODEL) == "SERVING"
        with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
            health(mine, "List")  # names of models
        assert health(mine, "List", token=known["viewer"])[MODEL] == "SERVING"
        for look in (
            client.get_server_metadata,
            lambda headers: client.get_model_metadata(MODEL, headers=headers),
            lambda headers: client.get_model_config(MODEL, headers=headers),
        ):
            with pytest.raises(triton.InferenceServerException, match="UNAUTHENTICATED"):
                look(headers={})
            look(headers={"authorization": f"Bearer {known['viewer']}"})
        tokens.revoke("a-admin")
        headers = {"authorization": f"Bearer {known['admin']}"}
        assert mine.ask("GET", "/status", headers=headers).status == 401


def test_a_server_loads_no_heavy_library(running: Server) -> None:
    """What is mapped into the two processes, not what is imported by name."""
    running.predict(jpeg())
    for pid in (running.process.pid, *running.engine_processes()):
        mapped = Path(f"/proc/{pid}/maps").read_text()
        assert not [name for name in ("libtorch", "mlflow", "prefect", "sqlalchemy") if name in mapped]
    assert "openvino" not in Path(f"/proc/{running.process.pid}/maps").read_text()
    program = (
        "import serving.server, serving.engines.worker, serving.protocols.http, serving.protocols.grpc, serving.batch, serving.log.sealing, sys;"
        "print(sorted({n.split('.')[0] for n in sys.modules}))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    for name in ("torch", "prefect", "mlflow", "great_expectations", "evidently", "sqlalchemy", "dvc", "pandas"):
        assert f"'{name}'" not in loaded
