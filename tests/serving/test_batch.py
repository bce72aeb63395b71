from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from served import MODEL, jpeg, png
from shapes import KINDS, visionloop, write_pictures
from stores import s3_bucket

COUNT = 90


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    write_pictures(folder, COUNT // 3, start=9000)
    return folder


def rows(out: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(path) for path in sorted(out.glob("part-*.parquet"))], ignore_index=True)


def predict(stage: Path, source: Path | str, out: Path, *options: str, **environment: str) -> tuple[int, dict[str, Any]]:
    done = visionloop("predict", str(source), "--out", str(out), "-m", MODEL, "--json", *options, cwd=stage, **environment)
    return done.returncode, json.loads(done.stdout.strip().splitlines()[-1])


def test_every_image_is_one_row_and_a_bad_one_is_an_error_row(stage: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "disc" / "bad.jpg").write_bytes(b"nonsense")
    (photos / "disc" / "cut.jpg").write_bytes(jpeg()[:150])
    (photos / "disc" / "empty.jpg").touch()
    (photos / ".hidden").write_bytes(b"x")
    status, told = predict(stage, photos, tmp_path / "out", "--shard-size", "40", "--embeddings")
    assert (status, told["rows"], told["errors"], told["shards"]) == (1, COUNT + 3, 3, 3)
    assert [refusal["name"] for refusal in told["refused"]] == ["disc/bad.jpg", "disc/cut.jpg", "disc/empty.jpg"]
    assert all("Error" not in refusal["error"] for refusal in told["refused"])
    found = rows(tmp_path / "out")
    names = sorted(
        path.relative_to(photos).as_posix() for path in photos.rglob("*") if path.is_file() and path.name[0] != "."
    )
    assert found["name"].tolist() == names
    bad = found[found["error"].notna()]
    assert sorted(bad["name"]) == ["disc/bad.jpg", "disc/cut.jpg", "disc/empty.jpg"]
    good = found[found["error"].isna()]
    assert (good["predicted"] == good["name"].str.split("/").str[0]).mean() > 0.9
    assert good["embedding"].map(len).eq(16).all()
    assert set(good["version"]) == {"1"}


def test_one_setting_bounds_what_is_answered_and_another_is_another_batch(stage: Path, photos: Path, tmp_path: Path) -> None:
    strict = {"VISIONLOOP_FORMATS": "jpeg", "VISIONLOOP_MAX_PIXELS": "300"}
    (photos / "disc" / "right.jpg").write_bytes(jpeg())
    status, told = predict(stage, photos, tmp_path / "out", VISIONLOOP_FORMATS="jpeg,webp")
    assert (status, told["errors"]) == (1, COUNT)
    assert (
        told["refused"][0]["error"]
        == "a PNG picture, which is not an accepted format (JPEG, WebP); convert it to JPEG or WebP"
    )
    status, told = predict(stage, photos, tmp_path / "out", **strict)
    assert (status, told["error"]) == (2, "ConfigError")
    assert "accepted differ" in told["message"]


def test_a_second_run_does_nothing_and_a_damaged_shard_is_made_anew(stage: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(stage, photos, out, "--shard-size", "30")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    stamps = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    _, told = predict(stage, photos, out, "--shard-size", "30")
    assert told["resumed"] == 3
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    (out / "part-00001.parquet").write_bytes(b"damaged")
    _, told = predict(stage, photos, out, "--shard-size", "30")
    assert told["resumed"] == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("seed", range(3))
def test_a_job_killed_at_random_ends_with_the_same_rows(stage: Path, photos: Path, tmp_path: Path, seed: int) -> None:
    plain = tmp_path / "plain"
    predict(stage, photos, plain, "--shard-size", "10")
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "flows", "predict", str(photos), "--out", str(out), "-m", MODEL, "--shard-size", "10"]
    job = subprocess.Popen(command, cwd=stage, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    wanted = random.Random(seed).randint(1, 5)
    while len(list(out.glob("part-*.json"))) < wanted and job.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(job.pid, signal.SIGSTOP)
    if psutil.Process(job.pid).status() == psutil.STATUS_STOPPED:  # not ended already
        engines = [child for child in psutil.Process(job.pid).children() if "serving.engines.process" in child.cmdline()]
        assert [engine.nice() for engine in engines] == [os.nice(0)]  # a batch has nobody to refuse
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    status, told = predict(stage, photos, out, "--shard-size", "10")
    assert (status, told["rows"]) == (0, COUNT)
    assert {p.name for p in out.iterdir() if p.name[0] != "."} == {p.name for p in plain.iterdir() if p.name[0] != "."}
    pd.testing.assert_frame_equal(
        rows(out).drop(columns=["confidence", "probabilities"]), rows(plain).drop(columns=["confidence", "probabilities"])
    )


def test_a_table_of_bytes_or_paths_is_answered(stage: Path, photos: Path, tmp_path: Path) -> None:
    files = sorted(path for path in photos.rglob("*.png"))[:5]
    table = tmp_path / "images.parquet"
    images: list[bytes | None] = [*(path.read_bytes() for path in files), b"x", None]
    pd.DataFrame({"image": images}).to_parquet(table)
    _, told = predict(stage, table, tmp_path / "out1")
    assert (told["rows"], told["errors"]) == (7, 2)
    assert rows(tmp_path / "out1")["name"].tolist()[:2] == ["row 0", "row 1"]
    pd.DataFrame({"path": [str(path.relative_to(tmp_path)) for path in files] + ["photos/none.png"]}).to_parquet(table)
    _, told = predict(stage, table, tmp_path / "out2")
    assert (told["rows"], told["errors"]) == (6, 1)
    assert predict(stage, table, tmp_path / "out2")[1]["resumed"] == 1
    # The table is the same; an image that it names is not.
    files[0].write_bytes(files[1].read_bytes())
    status, told = predict(stage, table, tmp_path / "out2")
    assert status == 2
    assert "holds another batch (inputs differ)" in str(told["message"])


def test_a_bucket_is_answered_into_a_bucket(stage: Path, photos: Path, tmp_path: Path) -> None:
    import boto3

    with s3_bucket("photos"):
        client = boto3.client("s3")
        for path in sorted(photos.rglob("*.png"))[:6]:
            client.put_object(Bucket="photos", Key=f"new/{path.parent.name}/{path.name}", Body=path.read_bytes())
        status, told = predict(stage, "s3://photos/new", "s3://photos/answers")  # type: ignore[arg-type]
        assert (status, told["rows"], told["errors"]) == (0, 6, 0)
        keys = {item["Key"] for item in client.list_objects_v2(Bucket="photos", Prefix="answers/")["Contents"]}
        assert keys == {"answers/plan.json", "answers/part-00000.parquet", "answers/part-00000.json"}


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("nowhere", "is no folder, .parquet file or s3:// address"),
        ("empty", "holds no images"),
        ("wrong.parquet", "no column `image`"),
        ("broken.parquet", "cannot be read as Parquet"),
    ],
)
def test_sources_that_are_none_are_refused(stage: Path, tmp_path: Path, source: str, why: str) -> None:
    (tmp_path / "empty").mkdir()
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "wrong.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"x")
    status, told = predict(stage, tmp_path / source, tmp_path / "out")
    assert status == 2
    assert why in str(told["message"])


def test_another_batch_does_not_fit_into_the_same_folder(stage: Path, photos: Path, tmp_path: Path) -> None:
    predict(stage, photos, tmp_path / "out")
    (photos / "disc" / "new.png").write_bytes(png(KINDS[0], 1))
    status, told = predict(stage, photos, tmp_path / "out")
    assert status == 2
    assert "holds another batch (images, inputs differ)" in str(told["message"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    status, told = predict(stage, photos, tmp_path / "mine")
    assert "is not empty and holds no batch" in str(told["message"])


def test_a_model_without_champion_answers_nothing(stage: Path, photos: Path, tmp_path: Path) -> None:
    done = visionloop("predict", str(photos), "--out", str(tmp_path / "o"), "-m", "other", cwd=stage)
    assert done.returncode == 2
    assert "other has no champion yet" in done.stderr
