"""What a person is told of versions of the data: what differs, on the command line and in a browser, and which there were."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import browser
from PIL import Image, ImageCms
from shapes import commit, make_workspace, picture, visionloop, write_pictures

from components import dataversions, git, transfers
from components.companions import TEST_LEDGER
from components.contracts.errors import DataError
from components.differences import TestChanges, difference
from components.history import Compared, Version
from components.images import decode, pixel_digest
from components.splitting import TestLedger
from flows.pages.differences import render
from flows.review import apply
from flows.workspace.workspace import Workspace

HOSTILE = "<img src=x onerror=document.title='broken'>"


def told(*arguments: str, cwd: Path, status: int = 0) -> dict[str, Any]:
    done = visionloop("data", *arguments, "--json", cwd=cwd)
    assert done.returncode == status, (done.stdout, done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_pictures(root: Path, label: str) -> list[str]:
    """Names of frozen test pictures of a class."""
    members = TestLedger.read(root / TEST_LEDGER).members
    return [
        path.name
        for path in sorted((root / "data" / label).iterdir())
        if members.get(pixel_digest(decode(path.read_bytes()))[:32])
    ]


test_pictures.__test__ = False  # type: ignore[attr-defined]


def test_a_file_is_known_by_its_bytes_wherever_it_goes() -> None:
    before = {"a/1": "x", "a/2": "y", "b/1": "z", "b/2": "same", "b/3": "same", "c/1": "c", "c/2": "d", "stray": "s"}
    after = {"a/1": "z", "b/1": "x", "a/two": "y", "b/2": "same", "a/3": "same", "d/1": "c", "d/2": "d", "e/1": "e"}
    found = difference(before, after)
    assert [(one.before, one.after) for one in found.relabelled] == [("a/1", "b/1"), ("b/1", "a/1"), ("b/3", "a/3")]
    assert [(one.before, one.after) for one in found.renamed] == [("a/2", "a/two")]
    assert [(one.old, one.new, one.num_files, one.recorded) for one in found.renamed_classes] == [("c", "d", 2, False)]
    assert (found.added, found.removed, found.changed) == ({"e/1": "e"}, {"stray": "s"}, {})
    assert (found.class_counts_before, found.class_counts_after["a"]) == ({"a": 2, "b": 3, "c": 2}, 3)
    # Recorded, a rename is no difference of its files: what was renamed, relabelled or replaced besides is.
    found = difference(before, {**after, "d/1": "other"}, (("c", "d"),))
    assert [(one.old, one.new, one.num_files, one.recorded) for one in found.renamed_classes] == [("c", "d", 2, True)]
    assert found.changed == {"d/1": ("c", "other")}
    # Two classes that were merged are no rename, and neither is a class some of whose files went elsewhere.
    assert difference({"a/1": "x", "b/1": "y"}, {"c/1": "x", "c/2": "y"}).renamed_classes == ()
    assert difference({"a/1": "x", "a/2": "y", "b/1": "z"}, {"c/1": "x", "b/2": "y", "b/1": "z"}).renamed_classes == ()
    many = difference({f"a/{n}": "same" for n in range(3000)}, {f"b/{n}": "same" for n in range(1, 3001)})
    assert (many.counts["relabelled"], many.renamed_classes[0].num_files) == (0, 3000)


def test_no_version_is_made_in_the_middle_of_a_merge_and_after_it_no_side_is_forgotten(tmp_path: Path) -> None:
    root = make_workspace(tmp_path / "workspace", per_class=5)
    for key in ("user.name", "user.email"):
        git.run(root, "config", key, "t@t.invalid")
    write_pictures(tmp_path / "theirs", 8, start=100)
    write_pictures(tmp_path / "ours", 8, start=107)  # one of each class came to both
    before = TestLedger.read(root / TEST_LEDGER).members
    git.run(root, "checkout", "--quiet", "-b", "theirs")
    told("add", str(tmp_path / "theirs"), cwd=root)
    theirs = TestLedger.read(root / TEST_LEDGER)
    # Other sides than would be drawn again.
    theirs = TestLedger(theirs.test_share, {key: side ^ (key not in before) for key, side in theirs.members.items()})
    theirs.write(root / TEST_LEDGER)
    dataversions.pin(root)
    commit(root)
    git.run(root, "checkout", "--quiet", "main")
    transfers.pull(root)
    told("add", str(tmp_path / "ours"), cwd=root)
    commit(root)
    ours = TestLedger.read(root / TEST_LEDGER).members

    def state() -> tuple[str, str, list[Path]]:
        return git.run(root, "status", "--porcelain"), git.run(root, "diff", "HEAD"), sorted((root / "data").glob("*/*"))

    (tmp_path / "again.patch").write_text(git.run(root, "format-patch", "--stdout", "-1", "HEAD"))
    for command, *arguments in (
        ("rebase", "--exec", "false", "HEAD~1"),
        ("rebase", "--apply", "theirs"),
        ("am", str(tmp_path / "again.patch")),
        ("cherry-pick", "HEAD"),
        ("revert", "--no-commit", "HEAD"),
        ("merge", "--no-commit", "--strategy=ours", "theirs"),
    ):
        git.ask(root, command, *arguments)
        left = state()
        for asked in (("add", str(tmp_path / "theirs")), ("rename-class", "disc", "circle")):
            done = visionloop("data", *asked, cwd=root)
            assert (done.returncode, f"in the middle of `git {command}`" in done.stderr) == (2, True), done.stderr
            assert f"`git {command} --abort`" in done.stderr
        with pytest.raises(DataError, match=f"in the middle of `git {command}`"):
            apply(Workspace(root), [], who="ann", why="why")
        assert state() == left
        git.run(root, command, "--abort")
    git.run(root, "merge", "--quiet", "--strategy=ours", "-m", "both", "theirs")
    git.run(root, "commit", "--quiet", "--allow-empty", "-m", "what was merged need not be the last commit")
    told("add", str(tmp_path / "theirs"), cwd=root)
    assert TestLedger.read(root / TEST_LEDGER).members == {**theirs.members, **ours}


@pytest.fixture
def changed(workspace: Path) -> Path:
    """A workspace with a difference of every kind in data/, and a class whose name is hostile."""
    data = workspace / "data"
    write_pictures(data, 3, start=700, kinds=("stripes",))
    (data / HOSTILE).mkdir()
    for name in ("a.png", HOSTILE.replace("/", "") + ".png"):
        Image.fromarray(picture("disc", len(name), side=24)).save(data / HOSTILE / name)
    assert visionloop("data", "add", cwd=workspace).returncode == 0
    commit(workspace)
    first, second = test_pictures(workspace, "disc")[:2]
    (data / "disc" / first).rename(data / "cross" / f"moved-{first}")
    (data / "disc" / second).unlink()
    (data / "stripes" / "0700.png").rename(data / "stripes" / "seven.png")
    Image.fromarray(picture("cross", 900)).save(data / "cross" / "0001.png")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(data / HOSTILE / "new.png")
    (data / HOSTILE / "bomb.png").write_bytes(bomb())
    return workspace


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 60,000 pixels wide and high."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(99)), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def test_relabels_and_renames_are_told_for_what_they_are(changed: Path) -> None:
    status = told("status", cwd=changed, status=1)
    first = status["changes"]["relabelled"][0].split(" -> ")[0].rpartition("/")[2]
    assert status["changes"]["relabelled"] == [f"data/disc/{first} -> data/cross/moved-{first}"]
    assert status["changes"]["renamed"] == ["data/stripes/0700.png -> data/stripes/seven.png"]
    assert (len(status["changes"]["added"]), len(status["changes"]["deleted"])) == (2, 1)
    assert status["changes"]["modified"] == ["data/cross/0001.png"]
    assert (
        f"1 frozen test picture relabelled: champion and candidate are judged by the new label (data/disc/{first}"
        in (status["notes"][0])
    )
    found = told("diff", cwd=changed, status=1)
    assert found["relabelled"] == [{"before": f"data/disc/{first}", "after": f"data/cross/moved-{first}"}]
    assert found["renamed"] == [{"before": "data/stripes/0700.png", "after": "data/stripes/seven.png"}]
    assert (found["changed"], found["removed"]) == (["data/cross/0001.png"], status["changes"]["deleted"])
    assert found["added"] == [f"data/{HOSTILE}/bomb.png", f"data/{HOSTILE}/new.png"]
    assert found["test"]["relabelled"] == [f"data/cross/moved-{first}"]
    assert found["test"]["left"] == status["changes"]["deleted"]
    assert sorted(found["test"]["undecided"]) == [f"data/{HOSTILE}/new.png", "data/cross/0001.png"]
    assert (found["classes_before"]["disc"], found["classes_after"]["disc"], found["not_here"]) == (60, 58, [])
    text = visionloop("data", "diff", cwd=changed).stdout
    assert "class disc: 60 -> 58 files, 32.4 % -> 31.2 %" in text
    # The same, backwards, between a commit and one by its hash; pinned anew, test pictures are named once more.
    added = told("add", cwd=changed)
    assert "1 frozen test picture relabelled" in added["notes"][0]
    assert told("status", cwd=changed)["changes"] == {}
    back = told("diff", "pinned", "HEAD", cwd=changed, status=1)
    assert back["relabelled"] == [{"before": f"data/cross/moved-{first}", "after": f"data/disc/{first}"}]
    assert (back["added"], back["removed"]) == (found["removed"], found["added"])
    assert back["test"]["rewritten"] == 0
    assert told("diff", found["before"]["data_version"][:9], "now", cwd=changed, status=1)["removed"] == found["removed"]
    assert told("diff", cwd=changed)["differs"] is False


def test_what_the_cache_lacks_is_said_file_by_file(changed: Path) -> None:
    cache = changed / ".dvc" / "cache" / "files" / "md5"
    removed = told("diff", cwd=changed, status=1)["removed"]
    listing = json.loads(next(cache.rglob(f"{dataversions.pinned(changed).dvc_hash[2:]}")).read_text())
    oid = next(entry["md5"] for entry in listing if f"data/{entry['relpath']}" == removed[0])
    lost = cache / oid[:2] / oid[2:]
    whole = lost.read_bytes()
    lost.unlink()
    found = told("diff", "--html", str(changed / "page.html"), cwd=changed, status=1)
    assert found["not_here"] == [{"file": removed[0], "reason": "not in DVC's cache"}]
    assert (found["removed"], found["test"]["left"]) == (removed, [])
    assert "not in DVC&#39;s cache" in (changed / "page.html").read_text()
    lost.write_bytes(whole[:-1])
    assert told("diff", cwd=changed, status=1)["not_here"][0]["reason"] == "damaged in DVC's cache"
    # Without the list of files of a version it is said that nothing can be told, and that they differ.
    shutil.rmtree(changed / ".dvc" / "cache")
    found = told("diff", "--html", str(changed / "page.html"), cwd=changed, status=1)
    assert "does not have the list of files" in found["problem"]
    assert "Which files differ is not known" in (changed / "page.html").read_text()
    assert "does not have the list of files" in told("log", cwd=changed)["versions"][0]["problem"]


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("HEAD~7", "'HEAD~7' is no version of the data; expected `pinned`, `now`, a git revision"),
        ("--all", "No such option"),
        ("0123456789", "is no version of the data"),
        ("HEAD~1", "has no data.dvc: nothing was pinned then"),
        ("", "is no version of the data"),
    ],
)
def test_what_names_no_version_is_refused(workspace: Path, before: str, words: str) -> None:
    if before == "HEAD~1":
        git = ["git", "-c", "user.name=t", "-c", "user.email=t@t.invalid"]
        subprocess.run([*git, "rm", "-q", "--cached", "data.dvc"], cwd=workspace, check=True)
        commit(workspace)
        subprocess.run([*git, "add", "data.dvc"], cwd=workspace, check=True)
        commit(workspace)
    done = visionloop("data", "diff", before, "--json", cwd=workspace)
    assert done.returncode == 2
    assert words in json.loads(done.stdout.splitlines()[-1])["message"]


def test_the_log_tells_who_made_which_version_and_why(changed: Path) -> None:
    git = ["git", "-c", "user.name=Zo\u00eb \u202e", "-c", "user.email=z@t.invalid", "-c", "i18n.commitEncoding=latin1"]
    assert visionloop("data", "add", cwd=changed).returncode == 0
    pending = told("log", cwd=changed)["versions"]
    assert (pending[0]["committed"], pending[0]["author"], len(pending)) == (False, None, 3)
    subprocess.run([*git, "config", "log.showSignature", "true"], cwd=changed, check=True)
    message = "Labels of line 2 corrected\n\nby hand\x1b[31m"
    subprocess.run([*git, "commit", "-q", "-m", message], cwd=changed, check=True)
    found = told("log", cwd=changed)["versions"]
    assert [one["committed"] for one in found] == [True, True, True]
    assert found[0]["message"].startswith("Labels of line 2 corrected")
    assert found[0]["author"].startswith("Zo")
    assert found[0]["changes"] == {
        "added": 2,
        "removed": 1,
        "changed": 1,
        "relabelled": 1,
        "renamed": 1,
        "renamed_classes": 0,
    }
    assert (found[1]["changes"]["added"], found[1]["files"]) == (5, 185)
    assert (found[2]["changes"], found[2]["problem"], found[2]["classes"]) == (None, "", ["cross", "disc", "stripes"])
    assert len(told("log", "-n", "1", cwd=changed)["versions"]) == 1
    (changed / "data.dvc").write_text("<<<<<<< HEAD\n")
    assert "not a pin that DVC wrote" in told("log", cwd=changed)["versions"][0]["problem"]
    assert "\x1b" not in visionloop("data", "log", cwd=changed).stdout


def test_the_page_shows_test_pictures_first_small_and_without_what_their_files_say() -> None:
    names = {f"a/{number:04d}.jpg": f"{number:032x}" for number in range(620)}
    before, after = (Version(given, "0" * 32 + ".dir", "md5", 0, 0, "l", ()) for given in ("pinned", "now"))
    after = dataclasses.replace(after, dvc_hash="1" * 32 + ".dir", num_files=620)
    test = TestChanges(joined=("a/0600.jpg",))
    compared = Compared(before, after, difference({}, names), "", test, {})
    image, exif = Image.fromarray(np.full((300, 400, 3), 90, np.uint8)), Image.Exif()
    exif[0x010E] = "where somebody lives"
    out = io.BytesIO()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(out, "JPEG", exif=exif, comment=b"who took it", icc_profile=profile)
    read: list[str] = []

    def reader(path: str, oid: str) -> bytes | str:
        assert names[path] == oid
        read.append(path)
        return out.getvalue() if path == "a/0600.jpg" else "not in DVC's cache"

    page = render(compared, reader, most_pictures=2)
    assert read == ["a/0600.jpg", "a/0000.jpg"], "no more is read than is shown"
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert captions == ['<span class="badge test">test</span> a/0600.jpg', "a/0000.jpg"]
    (shown,) = (base64.b64decode(text) for text in re.findall(r"data:image/jpeg;base64,([^\"]+)", page))
    small = Image.open(io.BytesIO(shown))
    assert small.size == (128, 96)
    assert small.getpixel((64, 48)) == pytest.approx((90, 90, 90), abs=3)
    assert not [said for said in (b"lives", b"took", b"ICC_PROFILE") if said in shown]
    assert "618 more" in page
    listed = re.findall(r"<li>(a/\d+\.jpg)</li>", page)
    assert (len(listed), listed[0], "118 more are in" in page) == (500, "a/0001.jpg", True)
    assert "620<br><small>100.0 %</small>" in page


def test_the_page_is_seen_in_light_and_dark_and_on_a_telephone(changed: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert visionloop("data", "diff", "--html", str(page), "--pictures", "2", cwd=changed).returncode == 1
    assert not re.findall(r'(?:src|href)="(?!data:image/jpeg;base64,)', page.read_text())
    with browser(tmp_path / "profile") as window:
        for dark in (False, True):
            window.call(
                "POST",
                "/goog/cdp/execute",
                cmd="Emulation.setEmulatedMedia",
                params={"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
            )
            for width in (1200, 360):
                size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
                window.call("POST", "/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=size)
                window.open(page.as_uri())
                assert window.complaints() == []
                assert window.script("return document.documentElement.scrollWidth") <= width
                paper, ink = window.script("""
                    const light = (text) => text.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3;
                    const section = document.querySelector("section");
                    return [light(getComputedStyle(section).backgroundColor), light(getComputedStyle(section).color)];
                """)
                assert (ink - paper if dark else paper - ink) > 150
        assert window.script("return document.title").startswith("Data: pinned and now")
        # Two of what changed; the bomb is none.
        assert window.script("return document.querySelectorAll('img').length") == 6
        assert window.script("return [...document.images].every((image) => image.naturalWidth > 0)")
        assert HOSTILE in window.text("#balance")
        assert "1 test picture relabelled: every model is judged" in window.text("#test")
        assert "60000x60000 pixels" in window.text(".none")
