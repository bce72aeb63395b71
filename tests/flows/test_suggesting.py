"""Which pictures to label next, asked of a champion that was really trained."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from looped import MODEL, predict
from PIL import Image
from served import png
from shapes import KINDS, visionloop

from components.images import decode, pixel_digest


@pytest.fixture(scope="module")
def decided(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = Path(shutil.copytree(trained, tmp_path_factory.mktemp("suggested") / "workspace", symlinks=True))
    for arguments in (["approve", "1", "--as", "Ann", "--reason", "good"], ["promote", "1"]):
        assert visionloop(*arguments, cwd=root).returncode == 0
    return root


@pytest.fixture
def pool(decided: Path, tmp_path: Path) -> Path:
    """Pictures of the trained kind, five of another kind, some of the data itself, one twice, and a file that is no picture."""
    folder = tmp_path / "pool"
    (folder / "deeper").mkdir(parents=True)
    for number in range(24):
        (folder / f"like-{number}.png").write_bytes(png(KINDS[number % 3], 90_000 + number))
    rng = np.random.default_rng(3)
    for number in range(5):
        # Called .jpg, and a PNG.
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(
            folder / "deeper" / f"odd-{number}.jpg", "PNG"
        )
    shutil.copy(folder / "deeper" / "odd-0.jpg", folder / "again.jpg")
    for number, path in enumerate(sorted((decided / "data").rglob("*.png"))[:6]):
        shutil.copy(path, folder / f"known-{number}.png")
        if number >= 3:  # the same pixels in other bytes
            Image.open(path).save(folder / f"known-{number}.png", compress_level=1)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.mark.slow
def test_the_smallest_useful_batch_is_written_and_what_is_sure_becomes_pseudo_labels(
    decided: Path, pool: Path, tmp_path: Path
) -> None:
    out = tmp_path / "batch"
    arguments = (
        "data",
        "suggest",
        str(pool),
        "--model",
        "shapes",
        "--out",
        str(out),
        "--most",
        "8",
        "--pseudo-labels",
        "0.5",
    )
    done = visionloop(*arguments, "--json", cwd=decided)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert (told["num_pool"], told["errors"]) == (24 + 5 + 6, 1)
    assert 3 <= told["num_known"] <= 6
    rows = list(csv.DictReader((out / "suggestions.csv").read_text(encoding="utf-8-sig").splitlines()))
    assert 0 < len(rows) == len(told["chosen"]) <= 8
    assert rows[0]["found_as"].startswith("deeper/odd-") or rows[0]["found_as"] == "again.jpg"
    assert not [row for row in rows if row["found_as"].startswith("known-")]
    for row in rows:
        assert (row["label"], row["proposal"] in KINDS) == ("", True)
        assert Path(row["path"]).suffix == ".png"
        assert (out / row["path"]).read_bytes() == (pool / row["found_as"]).read_bytes()
    tasks = json.loads((out / "label-studio-tasks.json").read_text())
    assert [task["data"]["file"] for task in tasks] == [row["path"] for row in rows]
    assert "suggestions.csv" in (out / "suggestions.html").read_text()
    pseudo = list(csv.DictReader((out / "pseudo-labels.csv").read_text().splitlines()))
    assert len(pseudo) == told["num_pseudo"] > 0
    assert {row["label_source"] for row in pseudo} == {"model"}
    assert min(float(row["confidence"]) for row in pseudo) >= 0.5
    chosen = {(out / row["path"]).read_bytes() for row in rows}
    data = {pixel_digest(decode(path.read_bytes())) for path in (decided / "data").rglob("*.png")}
    for row in pseudo:
        content = (out / row["path"]).read_bytes()
        assert content not in chosen
        assert pixel_digest(decode(content)) not in data
    again = visionloop(*arguments, cwd=decided)
    assert again.returncode == 2
    assert f"{out} is there already" in again.stderr


def test_what_a_server_kept_and_nobody_labelled_is_a_pool_too(decided: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(decided, tmp_path / "workspace", symlinks=True))
    arguments = ("data", "suggest", "--captured", "--model", MODEL, "--json", "--out")
    done = visionloop(*arguments, str(tmp_path / "none"), cwd=root)
    assert (done.returncode, "0 captured" in done.stdout) == (2, True), done.stdout
    ids = predict(root, 12, capture=True)
    captures = root / ".visionloop" / "serving" / "captures"
    (captures / "erased.jsonl").write_text("")
    other = png("disc", 77_000)  # another model was asked
    name = hashlib.sha256(other).hexdigest()
    (captures / name[:2]).mkdir(exist_ok=True)
    (captures / name[:2] / name).write_bytes(other)
    (tmp_path / "labels.csv").write_text(f"prediction_id,label\n{ids[0]},{KINDS[0]}\n")
    assert visionloop("labels", "import", str(tmp_path / "labels.csv"), "--as", "ann", cwd=root).returncode == 0
    with (root / ".visionloop" / f"suggest-{MODEL}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = visionloop(*arguments, str(tmp_path / "batch"), cwd=root)
        assert (done.returncode, "another `data suggest --captured` of shapes is running" in done.stdout) == (2, True)
    done = visionloop(*arguments, str(tmp_path / "batch"), "--pseudo-labels", "0.5", cwd=root)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert (told["num_pool"], told["errors"]) == (11, 0)
    rows = list(csv.DictReader((tmp_path / "batch" / "suggestions.csv").read_text(encoding="utf-8-sig").splitlines()))
    assert rows
    for row in rows:
        assert (tmp_path / "batch" / row["path"]).read_bytes() == (captures / row["found_as"]).read_bytes()
        assert Path(row["path"]).suffix == ".png"
    both = visionloop(*arguments, str(tmp_path / "both"), str(tmp_path), cwd=root)
    assert (both.returncode, "one of them" in both.stdout) == (2, True), both.stdout


def test_a_pool_that_nothing_can_be_suggested_of_is_refused(decided: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "notes.txt").write_text("no picture")
    out = tmp_path / "batch"
    for pool, text in ((tmp_path / "none", "no picture"), (tmp_path / "absent", "is not a folder of pictures")):
        done = visionloop("data", "suggest", str(pool), "--model", "shapes", "--out", str(out), cwd=decided)
        assert (done.returncode, text in done.stderr, out.exists()) == (2, True, False), done.stderr
    done = visionloop("data", "suggest", str(tmp_path / "none"), "--model", "other", "--out", str(out), cwd=decided)
    assert (done.returncode, "has no champion yet" in done.stderr) == (2, True)
