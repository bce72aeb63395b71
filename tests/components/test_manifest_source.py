from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from shapes import visionloop, write_pictures

from components import attributes, dataversions
from components.attributes import COLUMNS, FILE, Attributes, read_said
from components.companions import TEST_LEDGER
from components.contract_checks import source_breaches
from components.contracts.errors import DataError
from components.sources.manifest import Source
from components.splitting import TestLedger
from components.store import sha256_file
from flows.workspace.data import ensure
from flows.workspace.workspace import Workspace


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six pictures a kind in folders of no meaning."""
    write_pictures(tmp_path / "photos", 6, start=800, kinds=("cross", "disc"))
    (tmp_path / "photos" / "cross").rename(tmp_path / "photos" / "monday")
    (tmp_path / "photos" / "disc").rename(tmp_path / "photos" / "tuesday")
    return tmp_path / "photos"


def problems(path: Path, out: Path, **settings: Any) -> list[str]:
    """What a manifest is refused for, and that nothing was written."""
    with pytest.raises(DataError) as caught:
        Source(path=path, **settings).fetch(out=out)
    assert not out.exists() or not list(out.iterdir())
    return [str(caught.value), *getattr(caught.value, "__notes__", [])]


def written(out: Path) -> dict[str, str]:
    return {path.relative_to(out).as_posix(): sha256_file(path) for path in out.rglob("*.png")}


def test_a_manifest_of_any_dialect_is_classes_of_pictures_and_what_is_known_of_them(photos: Path, tmp_path: Path) -> None:
    (photos / "tuesday" / "0800.png").rename(photos / "tuesday" / 'o "dd", one.png')
    rows = [
        ("monday/0800.png", "scratch", "part, 7", "2026-03-01T14:00+01:00", "Werk Süd", "person", ""),
        ("monday/0801.png", "scratch", "", "", "", "", ""),
        ("tuesday/0801.png", "scratch", "", "2026-03-01", "", "model", "0"),  # a name that is there already
        ('tuesday/o "dd", one.png', "7", "part, 7", "", "", "", ""),
    ]
    columns = ("path", "label", *COLUMNS)
    quoted = [",".join(f'"{value.replace(chr(34), 2 * chr(34))}"' for value in row) for row in rows]
    (photos / "a.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([" , ".join(columns), *quoted, "", ""]).encode())
    lines = [json.dumps({c: v for c, v in zip(columns, row, strict=True) if v}, ensure_ascii=False) for row in rows]
    (photos / "b.jsonl").write_text("\n\n".join(lines).replace('"7"', "7").replace('"0"', "0"))
    for name in ("a.csv", "b.jsonl"):
        out = tmp_path / name
        out.mkdir()
        Source(path=photos / name).fetch(out=out)
        files = written(out)
        assert len(files) == 4
        (again,) = (file for file in files if file.startswith("scratch/0801-"))
        assert files[again] == sha256_file(photos / "tuesday" / "0801.png")
        assert files["scratch/0801.png"] == sha256_file(photos / "monday" / "0801.png")
        assert read_said(out / FILE) == {
            "scratch/0800.png": Attributes("part, 7", "2026-03-01T13:00:00Z", "Werk Süd", "person", ""),
            again: Attributes("", "2026-03-01T00:00:00Z", "", "model", "0.0"),
            '7/o "dd", one.png': Attributes("part, 7"),
        }
    assert not list(source_breaches(Source(path=photos / "a.csv"), "manifest"))


def test_every_problem_is_told_by_its_line_and_nothing_is_imported(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes((photos / "monday" / "0800.png").read_bytes())
    (photos / "link.png").symlink_to("../outside.png")
    (photos / "folder").symlink_to("..")
    write_pictures(tmp_path / "photos-2", 1, kinds=("cross",))  # a path that begins alike
    (photos / "beside").symlink_to("../photos-2")
    (photos / "inner.png").symlink_to("monday/0804.png")
    os.link(photos / "monday" / "0805.png", photos / "twin.png")
    os.mkfifo(photos / "pipe.png")
    expected = [
        ("monday/0800.png,cat,,", ""),
        ("monday/0899.png,cat,,", "'monday/0899.png' is not there (No such file or directory)"),
        ("monday\\0801.png,cat,,", "expected '/' and not '\\' between folders"),
        ("../outside.png,cat,,", "'../outside.png' holds '..'; expected a path below"),
        (f"{photos}/monday/0801.png,cat,,", "is absolute; expected a path relative to"),
        ("link.png,cat,,", "'link.png' is a link that leads outside of"),
        ("folder/outside.png,cat,,", "'folder/outside.png' leads outside of"),
        ("beside/cross/0000.png,cat,,", "'beside/cross/0000.png' leads outside of"),
        ("monday,cat,,", "'monday' is no regular file"),
        ("pipe.png,cat,,", "'pipe.png' is no regular file"),
        (",cat,,", "path is empty"),
        ("monday/0801.png,,,", "label is empty"),
        ("monday/0801.png,a/b,,", "label 'a/b' cannot be the name of a class: it holds '/'"),
        ("monday/0801.png, cat,,", "label ' cat' cannot be the name of a class: it is empty, or begins or ends"),
        ("monday/0801.png,..,,", "label '..' cannot be the name of a class: it begins with a dot"),
        ("monday/0800.png,cat,,", "'monday/0800.png' is the file of line 2, too; expected each file once"),
        ("./monday//0800.png,dog,,", "'./monday//0800.png' is the file of line 2, there with label 'cat'"),
        ("monday/0804.png,cat,,", ""),
        ("inner.png,dog,,", "'inner.png' is the file of line 19, there with label 'cat'"),
        ("monday/0805.png,cat,,", ""),
        ("twin.png,cat,,", ""),  # a file of two names is two files of one class
        ("tuesday/0801.png,cat,01.03.2026,", "captured_at '01.03.2026' is not a moment; expected ISO 8601"),
        ("tuesday/0802.png,cat,,2", "confidence is '2'; expected a number from 0 to 1"),
        ("tuesday/0803.png,cat", "it has 2 values, expected 4"),
        ('"tuesday/08"03.png,cat,,', "expected after '\"'; expected values between commas"),
        ("tuesday/\xff.png,cat,,", "byte 9 is no UTF-8"),
        ('"tues\nday.png",cat,,', "path is 'tues\\nday.png'; expected the name of a file"),
        ("tuesday/0805.png,cat,,", ""),
        ("https://example.com/1.png,cat,,", "nothing is fetched from addresses, so bring the file here"),
        ("tuesday/0807.png,cat\r,,", "a carriage return in the middle of a line (save it with the line ends LF)"),
        (f"{'x/' * 200}1.png,cat,,", "x/...' is not there"),
        ('"tuesday/0804.png,cat,,', "double quotes begin here and never end"),
    ]
    place = photos / "all.csv"
    place.write_bytes(
        b"path,label,captured_at,confidence\n" + "\n".join(row for row, _ in expected).encode("latin-1") + b"\n"
    )
    told = problems(place, tmp_path / "out")
    line, wanted = 2, []
    for row, why in expected:
        wanted += [(f"line {line}: ", why)] if why else []
        line += 1 + row.count("\n")
    assert told[0] == f"{place} has {len(wanted)} problems; nothing of it was imported"
    for (where, why), found in zip(wanted, sorted(told[1:], key=lambda text: int(text.split()[1][:-1])), strict=True):
        assert found.startswith(where)
        assert why in found, found
    done = visionloop("data", "add", str(place), "--json", cwd=Workspace.create(tmp_path / "ws").root)
    assert json.loads(done.stdout)["notes"] == told[1:]
    assert not (tmp_path / "ws" / "data").exists()


def test_objects_are_told_by_line_too(photos: Path, tmp_path: Path) -> None:
    lines = {
        "[1]": "it is '[1]'; expected an object",
        '{"path": "monday/0800.png", "label": "a"': "it is no JSON (Expecting ',' delimiter, column 41)",
        '{"path": "monday/0800.png"}': "there is no column 'label'; valid: path, label, split",
        '{"path": "monday/0800.png", "label": "a", "colour": 1}': "unknown column 'colour'",
        '{"path": "monday/0800.png", "label": "a", "label": "b"}': "a column is there twice",
        '{"path": "monday/0800.png", "label": true}': "label is 'True'; expected text",
        '{"path": "monday/0800.png", "label": null}': "label is empty",
        '{"path": "monday/\\u0000.png", "label": "a"}': "expected the name of a file",
        "[" * 100_000: "",
    }
    (photos / "all.jsonl").write_text("\n".join(lines))
    told = problems(photos / "all.jsonl", tmp_path / "out")
    assert len(told) == 1 + len(lines)
    for number, (why, found) in enumerate(zip(lines.values(), told[1:], strict=True), 1):
        assert found.startswith(f"line {number}: ")
        assert why in found


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty; expected a first line with the columns path, label"),
        (b"\xff\xfep\x00", "is UTF-16; save it as UTF-8"),
        (b"path|label\n", "the columns are not separated by commas, semicolons or tabs .*'path|label'"),
        (b"path,label,colour\n", "line 1: unknown column 'colour'; expected path, label and any of split, group"),
        (b"path,label,path\n", "column 'path' is there twice"),
        (b"file,label\n", "unknown column 'file'"),
        (b"path,group\n", "there is no column 'label'"),
        (b"path,label\n", "names no file with a label"),
        (b"path,label\rmonday/0800.png,a\r", "1 problem"),
        (b"path,label\nmonday/0800.png,attributes.jsonl\n", "a class cannot be called attributes.jsonl"),
        (b"path,label\n" + b"x" * 2**20, "line 2 has more than 1048576 bytes"),
        (b"path,label,split\nmonday/0800.png,a,dev\n", "1 problem"),
        (b"path,label,split\nmonday/0800.png,a,Train\nmonday/0801.png,a,\n", "1 problem"),
    ],
)
def test_what_is_no_manifest_is_refused_as_a_whole(photos: Path, tmp_path: Path, content: bytes, why: str) -> None:
    (photos / "m.csv").write_bytes(content)
    with pytest.raises(DataError, match=why):
        Source(path=photos / "m.csv").fetch(out=tmp_path)


def test_a_manifest_that_is_not_there_or_of_another_kind_is_told(photos: Path, tmp_path: Path) -> None:
    assert (Source.takes("A.CSV"), Source.takes("s3://bucket/a.csv")) == (True, False)
    with pytest.raises(DataError, match="cannot read .*no.csv: No such file"):
        Source(path=photos / "no.csv").fetch(out=tmp_path)
    with pytest.raises(DataError, match="no manifest by its name; expected a .csv or .jsonl file"):
        Source(path=photos / "no.tsv").fetch(out=tmp_path)
    with pytest.raises(DataError, match="root .* is not a folder"):
        Source(path=photos / "no.csv", root=photos / "no").fetch(out=tmp_path)


def test_absolute_paths_are_taken_below_a_root_that_is_named(photos: Path, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere.csv"
    place.write_text(f"path,label\n{photos}/monday/0800.png,a\ntuesday/0801.png,b\n")
    (tmp_path / "out").mkdir()
    Source(path=place, root=photos).fetch(out=tmp_path / "out")
    assert set(written(tmp_path / "out")) == {"a/0800.png", "b/0801.png"}
    place.write_text(f"path,label\n{place},a\n")
    assert "leads outside of" in problems(place, tmp_path / "none", root=photos)[1]


def test_columns_of_a_projects_own_are_kept_where_they_are_named(photos: Path, tmp_path: Path) -> None:
    (photos / "m.csv").write_text("path,label,weather,site\nmonday/0800.png,cat,rain,\nmonday/0801.png,dog,,3\n")
    (photos / "m.jsonl").write_text(
        '{"path": "monday/0800.png", "label": "cat", "weather": "rain"}\n'
        '{"path": "monday/0801.png", "label": "dog", "site": 3}\n'
    )
    for name in ("m.csv", "m.jsonl"):
        out = tmp_path / name
        out.mkdir()
        Source(path=photos / name, columns=("weather", "site")).fetch(out=out)
        said = {file: one.columns for file, one in read_said(out / FILE).items()}
        assert said == {"cat/0800.png": {"weather": "rain"}, "dog/0801.png": {"site": "3"}}
    told = problems(photos / "m.csv", tmp_path / "refused", columns=("weather",))
    assert "unknown column 'site'" in told[0]
    assert "--source-setting 'columns=[NAME]' keeps columns of your own" in told[0]
    assert (
        "there is no column 'time', which the setting"
        in problems(photos / "m.csv", tmp_path / "refused", columns=("weather", "site", "time"))[0]
    )


def test_long_names_that_meet_in_a_class_are_told_apart(photos: Path, tmp_path: Path) -> None:
    names = [f"{folder}/{'ä' * 125}.png" for folder in ("monday", "tuesday")]
    for name in names:
        (photos / name).write_bytes(name.encode())
    (photos / "m.csv").write_text("path,label\n" + "".join(f"{name},cat\n" for name in names))
    (tmp_path / "out").mkdir()
    Source(path=photos / "m.csv").fetch(out=tmp_path / "out")
    assert {path.read_text() for path in (tmp_path / "out" / "cat").iterdir()} == set(names)


def test_suggestions_that_a_person_labelled_are_a_manifest(photos: Path, tmp_path: Path) -> None:
    (photos / "suggestions.csv").write_text(
        "path,label,proposal,confidence,why,found_as\n"
        "monday/0800.png,cat,dog,0.5123,unsure,a/b.png\nmonday/0801.png,,dog,0.4,new,c.png\n"
    )
    root = Workspace.create(tmp_path / "ws").root
    answer = json.loads(visionloop("data", "add", str(photos / "suggestions.csv"), "--json", cwd=root).stdout)
    assert (answer["classes"], answer["left_out"]) == (
        {"cat": 1},
        [{"file": "monday/0801.png", "reason": "nobody labelled it"}],
    )
    assert list(attributes.read(root).values()) == [Attributes(label_source="person")]
    # As a spreadsheet saves it whose language writes commas into numbers.
    (photos / "suggestions.csv").write_bytes(
        b"\xef\xbb\xbf\r\npath;label;proposal;confidence;why;found_as\r\n"
        b'monday/0802.png;"cat; black, large";dog;0,5123;"unsure, new";a/b.png\r\ntuesday/0800.png;;dog;0,4;new;c.png\r\n'
    )
    answer = json.loads(visionloop("data", "add", str(photos / "suggestions.csv"), "--json", cwd=root).stdout)
    assert (answer["classes"], len(answer["left_out"])) == ({"cat": 1, "cat; black, large": 1}, 1)
    (photos / "suggestions.csv").write_text('path\tlabel\nmonday/0800.png\t"cat\n')
    assert "between tabs" in problems(photos / "suggestions.csv", tmp_path / "out")[1]
    (photos / "suggestions.csv").write_text("path,label,why\nmonday/0800.png,cat,unsure\n")
    assert "unknown column 'why'" in problems(photos / "suggestions.csv", tmp_path / "out")[0]


def test_a_label_that_is_none_of_the_named_classes_is_a_problem(photos: Path, tmp_path: Path) -> None:
    (photos / "m.csv").write_text("path,label\nmonday/0800.png,cat\nmonday/0801.png,catt\n")
    told = problems(photos / "m.csv", tmp_path / "out", classes=("cat", "dog"))
    assert told[1:] == ["line 3: unknown label 'catt'; valid: cat, dog"]


def test_no_more_problems_are_told_than_a_person_reads(photos: Path, tmp_path: Path) -> None:
    (photos / "m.csv").write_text("path,label\n" + "".join(f"{number}.png,a\n" for number in range(250)))
    told = problems(photos / "m.csv", tmp_path / "out")
    assert told[0].startswith(f"{photos}/m.csv has 250 problems")
    assert (len(told), told[100].split(":")[0], told[-1]) == (102, "line 101", "and 150 more")


def test_a_column_of_splits_is_kept_as_the_frozen_test_and_its_files_are_copies(photos: Path, tmp_path: Path) -> None:
    rows = [
        f"{path.relative_to(photos)},{path.parent.name},{'Test' if path.stem > '0803' else 'train'},g"
        for path in sorted(photos.rglob("*.png"))
    ]
    (photos / "split.csv").write_text("\n".join(["path,label,split,group", *rows]))
    root = Workspace.create(tmp_path / "ws").root
    undecided = visionloop("data", "add", str(photos / "split.csv"), cwd=root)
    assert "source 'manifest' is already split. Keep its test" in undecided.stderr
    arguments = ("data", "add", str(photos / "split.csv"), "--keep-splits", "--json")
    refused = visionloop(*arguments, cwd=root)
    assert (refused.returncode, json.loads(refused.stdout)["conflicts"][0]["kind"]) == (1, "group across splits")
    answer = json.loads(visionloop(*arguments, "--near-duplicates", "exclude", cwd=root).stdout)
    assert (answer["copied"], answer["new_test_images"], answer["with_attributes"]) == (12, 4, 12)
    assert sum(TestLedger.read(root / TEST_LEDGER).members.values()) == 4
    assert {one.group for one in attributes.read(root).values()} == {"g"}
    lying = sorted((root / "data").rglob("*.png"))
    assert [path.name for path in lying if path.is_symlink() or path.stat().st_nlink > 1] == []
    # A recipe that names the manifest fills a workspace that has the pin alone, also with copies.
    (root / "data").rename(tmp_path / "aside")
    assert ensure(Workspace.find(root), "manifest", {"path": str(photos / "split.csv")}).num_files == 12
    assert not any(path.is_symlink() for path in (root / "data").rglob("*.png"))


def test_a_manifest_of_the_workspaces_own_files_says_more_of_them_and_relabels_none(workspace: Path, tmp_path: Path) -> None:
    files = sorted((workspace / "data" / "disc").iterdir())[:2]
    (tmp_path / "m.csv").write_text("path,label,group\n" + "".join(f"disc/{path.name},disc,g\n" for path in files))
    arguments = ("data", "add", str(tmp_path / "m.csv"), "--source-setting", f"root={workspace}/data", "--json")
    answer = json.loads(visionloop(*arguments, cwd=workspace).stdout)
    assert (answer["copied"], answer["already_there"], answer["with_attributes"]) == (0, 2, 2)
    (tmp_path / "m.csv").write_text(f"path,label\ndisc/{files[0].name},cross\n")
    refused = json.loads(visionloop(*arguments, cwd=workspace).stdout)
    assert "lies in this workspace's data, and source 'manifest' says 'cross'; move the file" in refused["message"]
    dataversions.verify(workspace)


def test_what_is_kept_of_a_row_does_not_grow_with_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    peaks = []
    for count in (1_000, 2_000):
        for number in range(count):
            (tmp_path / "pictures" / f"{number:07d}.png").touch()
        rows = (f"pictures/{n:07d}.png,{n % 10},{n // 50},2026-03-01T14:00:{n % 60:02d}\n" for n in range(count))
        (tmp_path / "m.csv").write_text("path,label,group,captured_at\n" + "".join(rows))
        out = tmp_path / f"out{count}"
        out.mkdir()
        tracemalloc.start()
        Source(path=tmp_path / "m.csv").fetch(out=out)
        peaks.append(tracemalloc.get_traced_memory()[1] / count)
        tracemalloc.stop()
        assert sum(1 for _ in (out / "3").iterdir()) == count // 10
    assert max(peaks) < 2_000
    assert peaks[1] < 1.3 * peaks[0]
