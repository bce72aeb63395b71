from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shapes import visionloop, write_pictures

from components import attributes
from components.attributes import FILE, Attributes, read_said
from components.contracts.errors import DataError
from components.sources.label_studio import Source
from components.store import sha256_file
from flows.workspace.workspace import Workspace


def answer(*labels: str, by: int = 3, day: int = 1, **more: Any) -> dict[str, Any]:
    """An annotation as Label Studio exports it."""
    return {
        "id": 7000 + day,
        "completed_by": by,
        "result": [
            {
                "id": "x1",
                "type": "choices",
                "value": {"choices": list(labels)},
                "origin": "manual",
                "to_name": "image",
                "from_name": "kind",
            }
        ],
        "was_cancelled": False,
        "ground_truth": False,
        "created_at": f"2026-03-{day:02d}T21:22:16.408728Z",
        "updated_at": f"2026-03-{day:02d}T21:52:49.513742Z",
        "lead_time": 4.288,
        **more,
    }


def edited(value: object) -> dict[str, Any]:
    """An annotation whose choice something else than Label Studio wrote."""
    return answer(result=[{"type": "choices", "from_name": "kind", "value": value}])


def task(number: int, image: str, *annotations: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A task as Label Studio exports it."""
    return {
        "id": number,
        "annotations": list(annotations),
        "file_upload": image.rsplit("/", 1)[-1],
        "drafts": [],
        "predictions": [],
        "data": {"image": image},
        "meta": {},
        "project": 1,
        **more,
    }


def exported(folder: Path, *tasks: dict[str, Any]) -> Path:
    (folder / "export.json").write_text(json.dumps(tasks))
    return folder / "export.json"


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """Label Studio's media folder with ten uploaded pictures of project 1, two of them in a folder with a space."""
    write_pictures(tmp_path / "media", 10, start=900, kinds=("disc",))
    (tmp_path / "media" / "upload").mkdir()
    (tmp_path / "media" / "disc").rename(tmp_path / "media" / "upload" / "1")
    (tmp_path / "media" / "line 2").mkdir()
    for number in (908, 909):
        (tmp_path / "media" / "upload" / "1" / f"0{number}.png").rename(tmp_path / "media" / "line 2" / f"0{number}+a.png")
    return tmp_path / "media"


def uploaded(number: int) -> str:
    return f"/data/upload/1/{number:04d}.png"


def test_choices_of_people_become_classes_and_the_others_are_left_out_and_told(media: Path, tmp_path: Path) -> None:
    predicted = {"model_version": "m1", "score": 0.75, "result": answer("disc")["result"]}
    place = exported(
        media,
        task(1, uploaded(900), answer("disc")),
        task(2, uploaded(901), answer("cross", by=3), answer("cross", by=5, day=4)),
        task(3, uploaded(902), answer("cross"), answer("disc", by=5)),
        task(4, uploaded(903), answer("cross"), answer("disc", by=5, ground_truth=True)),
        task(5, uploaded(904), answer("cross", was_cancelled=True)),
        task(6, uploaded(905)),
        task(7, uploaded(906), predictions=[predicted]),
        task(8, uploaded(907), answer("disc", "cross")),
        task(9, "/data/local-files/?d=line%202/0908+a.png", answer("disc", completed_by={"id": 9, "email": "a@b.c"})),
        task(10, "line 2/0909+a.png", answer("cross", result=[])),
        task(11, uploaded(901), answer("cross", result=5)),
        *(task(12 + number, uploaded(901), edited(value)) for number, value in enumerate(("cross", {"choices": 5}))),
    )
    out = tmp_path / "out"
    out.mkdir()
    Source(path=place).fetch(out=out)
    person = Attributes(label_source="person")
    assert read_said(out / FILE) == {
        "disc/0900.png": person._replace(source="Label Studio, annotator 3, 2026-03-01"),
        "cross/0901.png": person._replace(source="Label Studio, annotator 3 and 5, 2026-03-04"),
        "disc/0903.png": person._replace(source="Label Studio, annotator 5, 2026-03-01"),
        "disc/0908+a.png": person._replace(source="Label Studio, annotator 9, 2026-03-01"),
    }
    root = Workspace.create(tmp_path / "ws").root
    done = json.loads(visionloop("data", "add", str(place), "--json", cwd=root).stdout)
    assert (done["found"], done["copied"], done["with_attributes"]) == (13, 4, 4)
    assert [(row["file"], row["reason"]) for row in done["left_out"]] == [
        ("task 3 (upload/1/0902.png)", "the answers disagree (cross: 1, disc: 1)"),
        ("task 5 (upload/1/0904.png)", "nobody labelled it"),
        ("task 6 (upload/1/0905.png)", "nobody labelled it"),
        ("task 7 (upload/1/0906.png)", "nobody labelled it, it has predictions only"),
        ("task 8 (upload/1/0907.png)", "an answer has no choice, or several"),
        ("task 10 (line 2/0909+a.png)", "an answer has no choice, or several"),
        *((f"task {number} (upload/1/0901.png)", "an answer has no choice, or several") for number in (11, 12, 13)),
    ]
    more = visionloop("data", "add", str(place), "--source-setting", "predictions=true", "--json", cwd=root)
    assert (json.loads(more.stdout)["copied"], json.loads(more.stdout)["new_test_images"]) == (1, 0)
    known = attributes.read(root)
    of_model = Attributes(source="Label Studio, model m1", label_source="model", confidence="0.75")
    assert known[sha256_file(media / "upload" / "1" / "0906.png")] == of_model


def test_what_is_known_of_a_task_goes_with_its_file(media: Path, tmp_path: Path) -> None:
    known = {"image": uploaded(900), "group": "part 7", "captured_at": "2026-02-01T08:00:00+01:00", "other": 1}
    out = tmp_path / "out"
    out.mkdir()
    Source(path=exported(media, task(1, "", answer("disc"), data=known))).fetch(out=out)
    (one,) = read_said(out / FILE).values()
    assert (one.group, one.captured_at) == ("part 7", "2026-02-01T07:00:00Z")


def test_problems_are_told_by_task_and_nothing_is_imported(media: Path, tmp_path: Path) -> None:
    place = exported(
        media,
        task(11, "https://example.com/1.jpg", answer("disc")),
        task(12, "s3://bucket/1.jpg", answer("disc")),
        task(13, uploaded(999), answer("disc")),
        task(14, "/data/local-files/?d=../secret.png", answer("disc")),
        task(15, "/data/local-files/?d=%2e%2e/secret.png", answer("disc")),
        task(16, "/etc/passwd", answer("disc")),
        task(17, uploaded(900), answer("disc")),
        task(18, uploaded(900), answer("cross")),
        task(19, uploaded(901), answer("a/b")),
        task(20, "", answer("disc"), data={"photo": uploaded(902)}),
        task(21, uploaded(903), answer("disc"), annotations=[5]),
        task(22, uploaded(904), answer("disc", updated_at="yesterday")),
    )
    with pytest.raises(DataError, match="has 11 problems; nothing of it was imported") as caught:
        Source(path=place).fetch(out=tmp_path / "out")
    for told, wanted in zip(
        caught.value.__notes__,
        [
            "task 11: its picture is at 'https://example.com/1.jpg'; nothing is fetched from https:// addresses. Bring",
            "task 12: its picture is at 's3://bucket/1.jpg'; nothing is fetched from s3:// addresses",
            "task 13: 'upload/1/0999.png' is not there",
            "task 14: '../secret.png' holds '..'",
            "task 15: '../secret.png' holds '..'",
            "task 16: '/etc/passwd' is absolute",
            "task 18: 'upload/1/0900.png' is the file of task 17, there with label 'disc'",
            "task 19: label 'a/b' cannot be the name of a class",
            "task 20: its data has no text 'image' (keys: photo); name the key by the setting image",
            "task 21: its annotations are no objects; export the project as JSON with its annotations",
            "task 22: not a moment",
        ],
        strict=True,
    ):
        assert told.startswith(wanted), told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('"\udcff"', "is no JSON"),
        ('{"id": 1}', "holds no list of objects; expected the list of tasks"),
        ("[]", "has no tasks"),
        ('[{"id": 1, "image": "/data/upload/1/a.png", "choice": "disc"}]', r"no JSON export.*\(not JSON-MIN, CSV or COCO\)"),
        ('[{"id": 1, "data": {}, "completions": []}]', "of a Label Studio before 1.0"),
        (json.dumps([task(1, uploaded(900))]), r"names no file with a label \(1 left out: task 1 .*nobody labelled it"),
        (
            json.dumps([task(1, uploaded(900), answer("a", result=[{"type": "rectanglelabels"}]))]),
            "annotations of another kind .rectanglelabels.; expected a choice a picture",
        ),
        (
            json.dumps([task(1, "x", answer("a"), answer("a", result=[{"type": "choices", "from_name": "quality"}]))]),
            "several choices a picture .kind, quality.; say which",
        ),
    ],
)
def test_what_is_no_export_of_choices_is_refused_as_a_whole(tmp_path: Path, content: str, why: str) -> None:
    (tmp_path / "export.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=why):
        Source(path=tmp_path / "export.json").fetch(out=tmp_path)
    with pytest.raises(DataError, match="cannot read .*none.json"):
        Source(path=tmp_path / "none.json").fetch(out=tmp_path)


def test_one_of_several_choices_is_the_class_where_it_is_named(media: Path, tmp_path: Path) -> None:
    other = [{"type": "choices", "from_name": "quality", "value": {"choices": ["good"]}}]
    both = answer("disc")
    both["result"] += other
    Source(path=exported(media, task(1, uploaded(900), both)), choice="quality").fetch(out=tmp_path)
    assert (tmp_path / "good" / "0900.png").is_file()
