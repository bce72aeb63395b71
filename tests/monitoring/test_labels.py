"""Labels are taken whole or not at all, the newest counts, and nothing is written twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from shapes import write_pictures
from watched import TASK, sha

from components.contracts.errors import ConfigError, DataError
from components.databases import Database
from components.store import sha256_file
from flows.loop.labels import move_relabelled
from flows.workspace.incoming import incoming
from monitoring.labels import Label, Labels, read_file, resolve

if TYPE_CHECKING:
    from flows.loop.loop import Loop

KNOWN = {"p1": sha("1"), "p2": sha("2"), "p3": sha("3")}


def written(tmp_path: Path, text: str, name: str = "labels.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def resolved(path: Path, *, by: str | None = "ann", classes: tuple[str, ...] | None = ("cat", "dog")) -> list[Label]:
    return resolve(
        read_file(path, by=by),
        by_prediction=KNOWN,
        images=set(KNOWN.values()),
        classes=classes or (),
        task=TASK if classes else None,
    )


def test_a_file_names_predictions_or_images(tmp_path: Path) -> None:
    text = f"prediction_id,image_sha256,label\np1,,cat\n,{sha('2').upper()},dog\np3,,\n"
    assert resolved(written(tmp_path, text)) == [Label(sha("1"), "cat", "ann", ""), Label(sha("2"), "dog", "ann", "")]
    lines = "\n".join(json.dumps(row) for row in ({"prediction_id": "p1", "label": "cat", "labelled_by": "bob"},))
    assert resolved(written(tmp_path, lines, "labels.jsonl"), by=None)[0].by == "bob"
    import pandas as pd

    pd.DataFrame({"image_sha256": [sha("3")], "label": ["dog"]}).to_parquet(tmp_path / "labels.parquet")
    assert resolved(tmp_path / "labels.parquet") == [Label(sha("3"), "dog", "ann", "")]


def test_a_time_is_kept_as_utc(tmp_path: Path) -> None:
    path = written(tmp_path, "prediction_id,label,labelled_at\np1,cat,2026-03-01T14:00:00+02:00\n")
    assert resolved(path)[0].at == "2026-03-01T12:00:00.000000+00:00"


@pytest.mark.parametrize(
    ("text", "name", "why"),
    [
        ("", "labels.csv", "holds no rows"),
        ("prediction_id\np1\n", "labels.csv", "expected label and prediction_id"),
        ("label\ncat\n", "labels.csv", "expected label and prediction_id"),
        ("prediction_id,image_sha256,label\n,,cat\n", "labels.csv", "row 1 names no prediction_id"),
        ("image_sha256,label\nabc,cat\n", "labels.csv", "not the sha256 of an image"),
        ("prediction_id,label,labelled_at\np1,cat,noon\n", "labels.csv", "not a moment; expected ISO 8601"),
        ("prediction_id,label\np1,cat,3\n", "labels.csv", "more values than the first line has names"),
        ("prediction_id,label,labelled_at\np1,cat,2999-01-01\n", "labels.csv", "has not come yet"),
        ("prediction_id,label\np1,../cat\n", "labels.csv", "cannot be the name of a class"),
        ("prediction_id,label\np1,.cat\n", "labels.csv", "cannot be the name of a class"),
        (f"prediction_id,label,labelled_by\np1,cat,{'x' * 200}\n", "labels.csv", "at most 128 characters"),
        ("{", "labels.jsonl", "cannot be read as .jsonl"),
        ("[1]", "labels.jsonl", "cannot be read as .jsonl"),
        ("x", "labels.parquet", "cannot be read as .parquet"),
        (
            "prediction_id,label\np1,cat\np9,dog\n",
            "labels.csv",
            "the log knows neither prediction nor image of 1 row .p9.",
        ),
        ("prediction_id,label\np1,cow\n", "labels.csv", "no class 'cow'.*cat, dog"),
        (f"prediction_id,image_sha256,label\np1,{sha('2')},cat\n", "labels.csv", "is about image"),
    ],
)
def test_what_is_no_label_is_refused(tmp_path: Path, text: str, name: str, why: str) -> None:
    with pytest.raises(DataError, match=why):
        resolved(written(tmp_path, text, name))


@pytest.mark.parametrize(
    "name", ["cat", "my cat", "Katze é", "cat ", " cat", " ", "cat\u00a0", ".cat", "a/b", "__MACOSX", "a\tb", "x" * 256]
)
def test_a_label_is_taken_where_data_takes_it_for_a_class(pristine: Path, tmp_path: Path, name: str) -> None:
    """One rule for the folder of a class and for a label: a label that data then refuse would hold all the others up."""
    path = written(tmp_path, "\n".join(json.dumps({"prediction_id": "p1", "label": label}) for label in ("dog", name)))
    path = path.rename(tmp_path / "labels.jsonl")
    given = tmp_path / "given" / name
    with contextlib.suppress(OSError):
        write_pictures(tmp_path / "pictures", 1, kinds=("disc",))
        shutil.copytree(tmp_path / "pictures" / "disc", given)
    try:
        files = incoming(tmp_path / "given", pristine / "data").files
        taken = [label for label, _ in files] == [name]
    except DataError:
        taken = False
    if taken:
        assert resolved(path, classes=None)[1].label == name
    else:
        with pytest.raises(DataError, match=re.escape(f"labels.jsonl row 2: {name[:80]!r} cannot be the name of a class")):
            resolved(path, classes=None)


def test_a_relabelled_image_overwrites_nothing(database: Database, tmp_path: Path) -> None:
    images = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("one", "two")}
    file = {name: f"{digest[:24]}.png" for name, digest in images.items()}
    for name, label in (("one", "cat"), ("two", "cat")):
        (tmp_path / "data" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / label / file[name]).write_bytes(name.encode())
    (tmp_path / "data" / "dog").mkdir()
    edited = tmp_path / "data" / "dog" / file["two"]
    edited.write_bytes(b"two, retouched by hand")
    labels = Labels(database)
    labels.append("m", [Label(digest, "dog", "ann", "") for digest in images.values()], source="x")
    loop = cast(
        "Loop", SimpleNamespace(workspace=SimpleNamespace(root=tmp_path, data=tmp_path / "data"), labels=labels, model="m")
    )

    def content() -> dict[str, bytes]:
        return {str(path.relative_to(tmp_path / "data")): path.read_bytes() for path in (tmp_path / "data").glob("*/*")}

    before = content()
    with pytest.raises(DataError, match=f"{file['two']} is said to show 'dog' now.*would overwrite.*rename or remove"):
        move_relabelled(loop)
    assert content() == before
    edited.write_bytes(b"two")  # the very same image may be in both
    assert move_relabelled(loop) == 2
    assert content() == {f"dog/{file[name]}": name.encode() for name in images}
    # Of two classes into a third: neither is lost there either.
    for label in ("cat", "cow"):
        (tmp_path / "data" / label).mkdir(exist_ok=True)
        (tmp_path / "data" / label / f"{images['one'][:24]}.tif").write_bytes(label.encode())
    before = content()
    with pytest.raises(DataError, match="would overwrite"):
        move_relabelled(loop)
    assert content() == before


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ends in .csv, .jsonl or .parquet"):
        resolved(written(tmp_path, "x", "labels.txt"))
    with pytest.raises(ConfigError, match="is not a file"):
        resolved(tmp_path / "none.csv")
    with pytest.raises(DataError, match="nobody is named"):
        resolved(written(tmp_path, "prediction_id,label\np1,cat\n"), by=None)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(b"prediction_id,label\n\xff\xfe,cat\n")
    with pytest.raises(DataError, match="cannot be read as .csv"):
        resolved(path)


def test_new_classes_come_in_when_asked(tmp_path: Path) -> None:
    assert resolved(written(tmp_path, "prediction_id,label\np1,cow\n"), classes=None)[0].label == "cow"


def test_the_same_file_twice_is_once(database: Database, tmp_path: Path) -> None:
    path = written(tmp_path, "prediction_id,label\np1,cat\np2,dog\n")
    labels = Labels(database)
    first = labels.append("m", resolved(path), source=sha256_file(path))
    again = labels.append("m", resolved(path), source=sha256_file(path))
    assert (first.new, first.known, again.new, again.known) == (2, 0, 0, 2)
    assert {sha_: label.label for sha_, label in labels.latest("m").items()} == {sha("1"): "cat", sha("2"): "dog"}
    assert labels.latest("other") == {}


def test_the_newest_label_counts(database: Database, tmp_path: Path) -> None:
    labels = Labels(database)
    early = written(tmp_path, "prediction_id,label,labelled_at\np1,cat,2026-03-02\n")
    late = written(tmp_path, "prediction_id,label,labelled_at\np1,dog,2026-03-01\n", "late.csv")
    labels.append("m", resolved(early), source=sha256_file(early))
    assert labels.append("m", resolved(late), source=sha256_file(late)).changed == 0  # older than what counts
    assert labels.latest("m")[sha("1")].label == "cat"
    corrected = written(tmp_path, "prediction_id,label\np1,dog\n", "corrected.csv")
    assert labels.append("m", resolved(corrected), source=sha256_file(corrected)).changed == 1
    assert labels.latest("m")[sha("1")].label == "dog"


def test_a_label_can_be_changed_back_and_an_old_file_changes_nothing(database: Database, tmp_path: Path) -> None:
    labels = Labels(database)
    cat = written(tmp_path, "prediction_id,label\np1,cat\n", "1.csv")
    dog = written(tmp_path, "prediction_id,label\np1,dog\n", "2.csv")
    back = written(tmp_path, "prediction_id,label\np1,cat\n\n", "3.csv")
    for path, expected in ((cat, "cat"), (dog, "dog"), (cat, "dog"), (back, "cat"), (back, "cat")):
        labels.append("m", resolved(path), source=sha256_file(path))
        assert labels.latest("m")[sha("1")].label == expected


def test_a_parquet_of_too_many_rows_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas as pd

    monkeypatch.setattr("monitoring.labels.MAX_ROWS", 10)
    monkeypatch.setattr("monitoring.labels.read_table", lambda _: pytest.fail("it was read"))
    pd.DataFrame({"image_sha256": [sha("3")] * 11, "label": ["dog"] * 11}).to_parquet(tmp_path / "labels.parquet")
    with pytest.raises(DataError, match="more than 10 rows"):
        resolved(tmp_path / "labels.parquet")
