from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from components.contracts.errors import ConfigError, TamperedArtefact
from serving.log.captures import CaptureConfig, Captures


def image(number: int) -> tuple[str, bytes]:
    data = f"image {number}".encode()
    return hashlib.sha256(data).hexdigest(), data


def test_nothing_is_kept_by_default(tmp_path: Path) -> None:
    captures = Captures(tmp_path)
    captures.start()
    for number in range(50):
        captures.offer(*image(number))
    captures.close()
    assert list(tmp_path.iterdir()) == []


def test_the_sample_is_chosen_by_content(tmp_path: Path) -> None:
    captures = Captures(tmp_path, CaptureConfig(share=0.3))
    captures.start()
    for _ in range(2):
        for number in range(400):
            captures.offer(*image(number))
            time.sleep(0.0001)
    captures.close()
    kept = {path.name for path in tmp_path.glob("??/*")}
    assert kept == {image(number)[0] for number in range(400) if captures.wanted(image(number)[0])}
    assert 60 < len(kept) < 180
    assert captures.store.verify() == []
    for path in tmp_path.glob("??/*"):
        assert (path.stat().st_mode & 0o777) == 0o600


def test_old_images_are_forgotten(tmp_path: Path) -> None:
    captures = Captures(tmp_path, CaptureConfig(share=1.0, retain_days=2))
    for number in range(3):
        captures.keep(*image(number))
    old = Path(captures.store.place(image(0)[0]))
    os.utime(old, (time.time() - 3 * 86400, time.time() - 3 * 86400))
    # What a server that was killed left of one grows old as well; what is not ours stays.
    begun = Path(captures.store.place(image(5)[0]))
    begun.parent.mkdir(exist_ok=True)
    half, young = (begun.with_name(f".{begun.name}.{digit * 32}.tmp") for digit in "ab")
    foreign = tmp_path / "notes.txt"
    for path, days in ((half, 3), (young, 1), (foreign, 3)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - days * 86400, time.time() - days * 86400))
    assert captures.store.sweep(captures.config.retain_days) == 2
    assert (half.exists(), young.exists(), foreign.exists()) == (False, True, True)
    assert not old.exists()
    assert Path(captures.store.place(image(1)[0])).exists()


def test_the_bytes_of_an_erased_image_never_touch_the_disk_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captures = Captures(tmp_path, CaptureConfig(share=1.0))
    sha, data = image(1)
    captures.store.erase(sha, by="ann", reason="asked for")
    written: list[Path] = []
    monkeypatch.setattr("components.objects.write_atomically", lambda path, _: written.append(path))
    assert captures.keep(sha, data) is False
    assert written == []


def test_an_erased_image_is_gone_for_good_and_that_is_proven(tmp_path: Path) -> None:
    captures = Captures(tmp_path, CaptureConfig(share=1.0))
    sha, data = image(1)
    captures.keep(sha, data)
    captures.keep(*image(2))
    record = captures.store.erase(sha, by="ann", reason="asked for by the person in it")
    assert record["found"]
    assert not Path(captures.store.place(sha)).exists()
    assert not captures.keep(sha, data)
    assert captures.store.erase(sha, by="bob", reason="again") == record
    assert Captures(tmp_path).keep(sha, data) is False
    assert captures.store.verify() == []
    assert captures.store.erasures() == (1, record["hash"])
    Path(captures.store.place(sha)).write_bytes(data)  # restored from a backup by somebody who did not know
    assert captures.store.verify() == [f"{sha} was erased and is there; erase it again"]
    captures.store.erase(sha, by="ann", reason="again")
    assert captures.store.verify() == []


def test_erasures_cannot_be_edited(tmp_path: Path) -> None:
    captures = Captures(tmp_path)
    for number in range(3):
        captures.store.erase(image(number)[0], by="ann", reason="why")
    path = tmp_path / "erased.jsonl"
    lines = path.read_text().splitlines()
    for changed in (lines[1:], [lines[0], lines[2]], [lines[0].replace("ann", "eve"), *lines[1:]]):
        path.write_text("\n".join(changed) + "\n")
        with pytest.raises(TamperedArtefact, match="was changed by hand"):
            captures.store.verify()


def test_erasures_that_were_cut_off_have_another_head(tmp_path: Path) -> None:
    """What `verify` cannot see by itself is seen by whoever kept the head."""
    captures = Captures(tmp_path)
    heads = [captures.store.erasures()]
    for number in range(3):
        captures.store.erase(image(number)[0], by="ann", reason="why")
        heads.append(captures.store.erasures())
    assert [count for count, _ in heads] == [0, 1, 2, 3]
    assert len({head for _, head in heads}) == 4
    path = tmp_path / "erased.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert captures.store.verify() == []
    assert captures.store.erasures() == heads[2] != heads[3]


def test_what_is_no_digest_or_has_no_reason_is_refused(tmp_path: Path) -> None:
    captures = Captures(tmp_path)
    for name in ("../../etc/passwd", "ABC", "", "a" * 63):
        with pytest.raises(ConfigError, match="64 hex digits"):
            captures.store.erase(name, by="ann", reason="why")
    with pytest.raises(ConfigError, match="--reason"):
        captures.store.erase(image(1)[0], by="ann", reason=" ")


def test_an_image_that_was_changed_is_found(tmp_path: Path) -> None:
    captures = Captures(tmp_path, CaptureConfig(share=1.0))
    sha, data = image(1)
    captures.keep(sha, data)
    Path(captures.store.place(sha)).write_bytes(b"another")
    assert captures.store.verify() == [f"{sha} is not the image it is named after"]
