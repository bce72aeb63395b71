from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from components import issues
from components.clusters import Clusters
from components.contracts.data import SPLITS, Dataset, DataVersion, Splits
from components.contracts.errors import DataError
from components.contracts.issues import Issue
from components.contracts.records import FileDigest, Stored, sha256_text
from components.splitting import SplittingConfig, TestLedger, fold, split
from components.store import describe
from components.tasks.classification import Task

VERSION = DataVersion(dvc_hash="h", num_files=1, bytes=1, ledger_sha256="l")


def pictures(label: str, count: int, start: int = 0) -> list[tuple[str, str]]:
    return [(hashlib.sha256(f"{label}{i}".encode()).hexdigest()[:32], label) for i in range(start, start + count)]


def dataset(folder: Path, members: list[tuple[str, str]]) -> Stored[Dataset]:
    folder.mkdir(exist_ok=True)
    table = pd.DataFrame(
        [{"path": f"{label}/{i}-{p}", "label": label, "sha256": p * 2, "picture": p} for i, (p, label) in enumerate(members)]
    )
    table.to_parquet(folder / "samples.parquet", index=False)
    digest = describe(folder / "samples.parquet", within=folder)
    classes = tuple(sorted({label for _, label in members}))
    record = Dataset(
        data=VERSION,
        samples=digest,
        quarantine=FileDigest(name="q", sha256="", bytes=0),
        classes=classes,
        class_counts=dict(Counter(label for _, label in members)),
        num_input=len(members),
        num_kept=len(members),
        num_quarantined=0,
        warnings=(),
    )
    return Stored(record, folder)


def sides(splits: Splits, folder: Path) -> dict[str, str]:
    table = pd.read_parquet(folder / splits.table.name)
    return dict(zip(table["picture"], table["split"], strict=True))


def run(
    tmp_path: Path,
    name: str,
    members: list[tuple[str, str]],
    ledger: TestLedger,
    clusters: Clusters | None = None,
    **config: object,
) -> tuple[Splits, dict[str, str]]:
    out = tmp_path / f"{name}-out"
    out.mkdir()
    settings = SplittingConfig.model_validate(config)
    found = split(dataset(tmp_path / name, members), ledger, settings, Task(), clusters=clusters, out=out)
    return found, sides(found, out)


def test_every_image_is_in_one_split_and_classes_are_balanced(tmp_path: Path) -> None:
    members = pictures("a", 100) + pictures("b", 300)
    found, where = run(tmp_path, "d", members, TestLedger(0.2, {}).extended(members))
    assert sum(found.counts.values()) == 400
    assert set(where.values()) == set(SPLITS)
    assert found.class_counts["test"]["a"] in (20, 21)
    assert found.class_counts["test"]["b"] in (60, 61)
    assert found.class_counts["valid"]["b"] == 24


def test_file_order_and_names_do_not_matter(tmp_path: Path) -> None:
    members = pictures("a", 50) + pictures("b", 50)
    ledger = TestLedger(0.2, {}).extended(members)
    _, first = run(tmp_path, "x", members, ledger)
    backwards = list(reversed(members))
    _, second = run(tmp_path, "y", backwards, TestLedger(0.2, {}).extended(backwards))
    assert first == second


def test_duplicates_stay_together(tmp_path: Path) -> None:
    members = pictures("a", 40) + pictures("b", 40) + pictures("a", 40) + pictures("a", 40)
    found, where = run(tmp_path, "d", members, TestLedger(0.2, {}).extended(members))
    assert found.num_duplicate_groups == 40
    assert sum(found.counts.values()) == 160
    assert len(where) == 80


def test_appended_data_never_moves_an_image_between_test_and_the_rest(tmp_path: Path) -> None:
    members = pictures("a", 60) + pictures("b", 60)
    ledger = TestLedger(0.25, {}).extended(members)
    before = dict(ledger.members)
    for step in range(1, 6):
        # Removed, re-added and relabelled images are in there too.
        again = pictures("a", 30) + [(picture, "b") for picture, _ in pictures("a", 10)]
        ledger = ledger.extended(again + pictures("a", 17, start=60 * step) + pictures("b", 5, start=60 * step))
        assert {p: ledger.members[p] for p in before} == before
        before = dict(ledger.members)


def test_the_share_holds_over_many_appends_of_one_picture() -> None:
    ledger = TestLedger(0.2, {})
    for picture in pictures("a", 2000):
        ledger = ledger.extended([picture])
    assert 340 <= sum(ledger.members.values()) <= 460


def test_an_image_outside_the_ledger_is_refused(tmp_path: Path) -> None:
    members = pictures("a", 50) + pictures("b", 50)
    ledger = TestLedger(0.2, {}).extended(members[:-1])
    with pytest.raises(DataError, match="the test ledger lacks 1 image .*data add"):
        run(tmp_path, "d", members, ledger)


def test_a_class_that_misses_a_split_is_refused(tmp_path: Path) -> None:
    members = pictures("a", 50) + pictures("b", 2)
    ledger = TestLedger(0.2, {p: False for p, _ in members} | {members[0][0]: True})
    with pytest.raises(DataError, match="class 'b' has no image in the"):
        run(tmp_path, "d", members, ledger)


def test_the_ledger_survives_its_file_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    ledger = TestLedger(0.2, {}).extended(pictures("a", 30))
    path = tmp_path / "ledger.csv"
    ledger.write(path)
    assert TestLedger.read(path) == ledger
    path.write_text(path.read_text().replace(",rest", ",maybe", 1))
    with pytest.raises(DataError, match="not a readable test ledger.*git checkout"):
        TestLedger.read(path)
    path.write_text("")
    with pytest.raises(DataError, match="not a readable test ledger"):
        TestLedger.read(path)


def test_the_test_digest_names_images_and_labels_alone(tmp_path: Path) -> None:
    members = pictures("a", 50) + pictures("b", 50)
    ledger = TestLedger(0.2, {}).extended(members)
    first, _ = run(tmp_path, "x", members, ledger)
    more = members + pictures("a", 1, start=900)
    second, _ = run(tmp_path, "y", more, TestLedger(0.2, {**ledger.members, more[-1][0]: False}))
    third, _ = run(tmp_path, "z", more, TestLedger(0.2, {**ledger.members, more[-1][0]: True}))
    assert first.test_digest == second.test_digest
    assert first.test_digest != third.test_digest


def test_without_clusters_every_side_and_digest_is_what_it_was_before_there_were_any(tmp_path: Path) -> None:
    members = pictures("a", 203) + pictures("b", 61) + pictures("c", 17) + pictures("a", 9)
    ledger = TestLedger(0.23, {}).extended([*members, (members[0][0], "b")])
    more = pictures("a", 30, start=300) + pictures("c", 3, start=90)
    ledger = ledger.extended(more)
    found, where = run(tmp_path, "d", members + more, ledger)
    plain = found.model_copy(update={"table": FileDigest(name="t", sha256="", bytes=0)})
    # What commit f7edb38 made of these pictures.
    assert (
        sha256_text(f"{sorted(ledger.members.items())!r}{sorted(where.items())!r}{plain.digest()}")
        == "6bb2eff54ccabcd56ab210cf2509146e0438c048c018529198af220a72d23a0e"
    )


def clusters_of(*together: list[str]) -> Clusters:
    return Clusters().grown((one, other) for each in together for one, other in pairwise(each))


def in_groups(*groups: list[str]) -> Clusters:
    """Every picture has one file, whose sha256 begins as the picture does."""
    return Clusters(groups={picture: f"group {number}" for number, each in enumerate(groups) for picture in each})


def test_new_pictures_of_one_cluster_join_one_side_and_the_share_holds() -> None:
    members = [picture for label in "ab" for picture in pictures(label, 300)]
    chunks = [[picture for picture, _ in members[at : at + 5]] for at in range(0, 600, 5)]
    # Every second cluster, so that single pictures are among them; one holds both classes.
    near = clusters_of(*chunks[::2], [chunks[0][0], chunks[-2][0]]).near
    ledger = TestLedger(0.2, {}).extended(members, together=near, near=near)
    for cluster in set(near.values()):
        assert len({ledger.members[picture] for picture, each in near.items() if each == cluster}) == 1
    for label in "ab":
        assert 58 <= sum(ledger.members[picture] for picture, each in members if each == label) <= 62
    in_clusters = sum(ledger.members[picture] for picture in near)
    assert 30 <= in_clusters <= 90  # clusters are drawn as single pictures are, neither first nor last


def test_a_later_picture_follows_what_was_frozen_and_a_twin_of_a_test_picture_is_no_second_one() -> None:
    test, rest, *new = (picture for picture, _ in pictures("a", 8))
    ledger = TestLedger(0.5, {test: True, rest: False})
    near = clusters_of([test, new[0]], [rest, new[1]]).near
    grouped = clusters_of([test, new[0]], [rest, new[1]], [test, new[2], new[3]], [new[1], new[4]]).near
    # As `data add` does, with the pictures that were frozen before: their rows are never written anew.
    after = ledger.extended([(picture, "a") for picture in (test, rest, *new)], together=grouped, near=near).members
    assert [after[picture] for picture in (test, rest)] == [True, False]
    assert [after[picture] for picture in new[:5]] == [False, False, True, True, False]


def test_what_belongs_to_a_frozen_test_picture_is_in_no_split_and_named(tmp_path: Path) -> None:
    members = pictures("a", 100) + pictures("b", 100)
    ledger = TestLedger(0.2, {}).extended(members)
    test = [picture for picture, _ in members if ledger.members[picture]]
    rest = [picture for picture, _ in members if not ledger.members[picture]]
    plain, before = run(tmp_path, "plain", members, ledger)
    known = clusters_of([test[0], rest[0], rest[1]], [rest[2], rest[3]])
    groups = {test[1]: "g", rest[4]: "g"}
    known = Clusters(near=known.near, groups=groups)
    found, where = run(tmp_path, "x", members, ledger, known)
    assert {rest[0], rest[1], rest[4]} == before.keys() - where.keys()
    assert where[rest[2]] == where[rest[3]]
    assert found.test_digest == plain.test_digest
    assert found.num_left_out == {
        "near-duplicate of a frozen test picture": 2,
        "of one group with a frozen test picture": 1,
    }
    assert found.left_out is not None
    left_out = pd.read_parquet(tmp_path / "x-out" / found.left_out.name).set_index("picture")
    paths = dict(zip(*(dataset_table(tmp_path / "x")[column] for column in ("picture", "path")), strict=True))
    assert left_out.loc[rest[0], "belongs_to"] == paths[test[0]]
    note = found.notes[0]
    assert note.startswith("2 images in no split, near-duplicate of a frozen test picture: ")
    assert f"{paths[rest[0]]} (with {paths[test[0]]})" in note
    assert Splits.read(found.to_json()) == found
    # A twin of a test picture whose file is gone is left out as well.
    gone = [(picture, label) for picture, label in members if picture != test[0]]
    assert rest[0] not in run(tmp_path, "gone", gone, ledger, known)[1]
    assert run(tmp_path, "ungrouped", members, ledger, known, groups=False)[1].keys() - where.keys() == {rest[4]}


def test_copies_of_test_pictures_that_validation_found_are_in_no_split(tmp_path: Path) -> None:
    """An older version is pinned without them, and `data add` has no embeddings."""
    members = pictures("a", 100) + pictures("b", 100)
    ledger = TestLedger(0.2, {}).extended(members)
    _, before = run(tmp_path, "plain", members, ledger)
    paths = dataset_table(tmp_path / "plain").set_index("picture")["path"].to_dict()
    test, *others = (p for p, _ in members[:100] if ledger.members[p])
    rest = [p for p, _ in members[:100] if not ledger.members[p]]
    other_label = next(p for p, _ in members[100:] if not ledger.members[p])

    def leak(tested: str, *copies: str) -> Issue:
        return Issue(
            kind="leak",
            severity="warning",
            files=tuple(paths[p] for p in (*copies, tested)),
            score=0.1,
            threshold=1.0,
            detail="d",
            action="a",
            candidate=paths[tested],
            id=f"issue of {tested}",
        )

    found = [leak(test, rest[0], rest[1], other_label), leak(others[0], rest[2]), leak(others[1], rest[3], rest[4])]
    known = Clusters(no_problems=frozenset({found[1].id})).with_apart({(others[1], rest[3]): "resized"})
    stored = dataset(tmp_path / "plain", members)
    issues.write(found, tmp_path / "plain" / issues.FILE)
    record = stored.record.model_copy(
        update={"issues": describe(tmp_path / "plain" / issues.FILE, within=tmp_path / "plain")}
    )
    (tmp_path / "out").mkdir()
    config = SplittingConfig()
    splits = split(Stored(record, stored.folder), ledger, config, Task(), clusters=known, out=tmp_path / "out")
    assert before.keys() - sides(splits, tmp_path / "out").keys() == {rest[0], rest[1], rest[4]}
    assert splits.num_left_out == {"near-duplicate of a frozen test picture": 3}
    turns = [fold(Stored(record, stored.folder), ledger, n, 5, config, Task(), clusters=known) for n in range(5)]
    assert all(turn.members[rest[0]] == turn.members[test] for turn in turns)


def dataset_table(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "samples.parquet")


def test_clusters_are_divided_as_evenly_as_they_allow_and_what_is_off_is_told(tmp_path: Path) -> None:
    members = pictures("a", 400) + pictures("b", 40)
    ledger = TestLedger(0.2, {picture: int(picture, 16) % 5 == 0 for picture, _ in members})
    rest = {label: [p for p, each in members if each == label and not ledger.members[p]] for label in "ab"}
    # Of class a 60 clusters of 4 and single pictures; class b is three clusters, one of which also holds pictures of a.
    near = clusters_of(
        *(rest["a"][at : at + 4] for at in range(0, 240, 4)),
        rest["b"][:12],
        [*rest["b"][12:20], *rest["a"][240:243]],
        rest["b"][20:],
    )
    found, where = run(tmp_path, "d", members, ledger, near)
    assert all(
        len({where[p] for p, each in near.near.items() if each == cluster}) == 1 for cluster in set(near.near.values())
    )
    wanted = {"valid": 0.10 * len(rest["a"]), "calibration": 0.03 * len(rest["a"])}
    for name, num in wanted.items():
        assert abs(found.class_counts[name]["a"] - num) <= 3  # type: ignore[index]
        assert found.class_counts[name]["b"] > 0  # type: ignore[index]
    assert found.num_clusters == 63
    assert found.off_balance["valid"]["b"] == found.class_counts["valid"]["b"] - round(0.1 * len(rest["b"]))
    assert found.notes[0].startswith("63 clusters kept whole, the largest of ")
    assert "class 'b')" in found.notes[0]
    two = clusters_of(rest["b"][:16], rest["b"][16:])
    with pytest.raises(DataError, match=f"class 'b' has no image in the .*Its 40 pictures are {2 + 40 - len(rest['b'])} cl"):
        run(tmp_path, "two", members, ledger, two)


def test_the_newest_pictures_are_valid_when_order_is_by_time(tmp_path: Path) -> None:
    members = pictures("a", 100) + pictures("b", 100)
    ledger = TestLedger(0.2, {}).extended(members)
    times = {picture: f"2026-01-{1 + i % 100 // 4:02d}T00:00:00Z" for i, (picture, _) in enumerate(members) if i % 10}
    known = Clusters(captured_at=times)
    found, where = run(tmp_path, "d", members, ledger, known, order="captured_at")
    for label in "ab":
        of = {name: [times.get(p, "") for p, each in members if each == label and where[p] == name] for name in SPLITS}
        assert min(of["valid"]) >= max(of["calibration"])
        assert min(of["calibration"]) >= max(of["train"])
    assert len({name for picture, name in where.items() if picture not in times}) == 2  # test and train
    assert "of unknown captured_at count as the oldest" in found.notes[0]
    with pytest.raises(DataError, match="splitting.order is captured_at, and of no picture"):
        run(tmp_path, "x", members, ledger, order="captured_at")


def test_what_a_model_labelled_only_trains(tmp_path: Path) -> None:
    members = pictures("a", 100) + pictures("b", 100)
    ledger = TestLedger(0.2, {}).extended(members)
    before = run(tmp_path, "x", members, ledger)[1]
    of_models = {next(p for p, split in before.items() if split == name) for name in SPLITS}
    found, where = run(tmp_path, "y", members, ledger, Clusters(of_models=frozenset(of_models)))
    assert {where.get(picture) for picture in of_models} == {"train", None}
    assert found.num_left_out == {"labelled by a model, which only trains": 1}  # the one of test
    stored, settings = Stored(dataset(tmp_path / "y", members).record, tmp_path / "y"), SplittingConfig()
    known = Clusters(of_models=frozenset(of_models))
    turns = [fold(stored, ledger, n, 5, settings, Task(), clusters=known) for n in range(5)]
    judged = Counter(picture for turn in turns for picture, test in turn.members.items() if test)
    assert judged == Counter(before.keys() - of_models)  # all others once, and those never
    # Beside a picture of valid it would leak.
    valid = next(picture for picture, split in where.items() if split == "valid")
    train = next(picture for picture, split in where.items() if split == "train" and picture not in of_models)
    near = clusters_of([valid, train]).near
    _, again = run(tmp_path, "z", members, ledger, Clusters(near=near, of_models=frozenset({train})))
    assert again.get(train) == (None if again[valid] != "train" else "train")


def test_a_file_is_known_by_its_bytes_when_its_pixels_are_decoded_otherwise(tmp_path: Path) -> None:
    members = pictures("a", 100) + pictures("b", 100)
    ledger = TestLedger(0.2, {}).extended(members)
    before = run(tmp_path, "x", members, ledger)[1]
    known = Clusters().grown([], {picture * 2: picture for picture, _ in members})
    # The same files, of which another decoder makes other pixels.
    table = dataset_table(tmp_path / "x")
    other = {picture: sha256_text(picture)[:32] for picture, _ in members[::3]}
    (tmp_path / "y").mkdir()
    table.assign(picture=table["picture"].replace(other)).to_parquet(tmp_path / "y" / "samples.parquet", index=False)
    stored = Stored(dataset(tmp_path / "x", members).record, tmp_path / "y")
    (tmp_path / "out").mkdir()
    found = split(stored, ledger, SplittingConfig(), Task(), clusters=known, out=tmp_path / "out")
    assert sides(found, tmp_path / "out") == {other.get(picture, picture): split for picture, split in before.items()}


def test_a_file_keeps_the_picture_that_it_was_first_and_counts_for_its_group_when_it_is_gone() -> None:
    gone, here = "1" * 64, "2" * 64
    known = (
        Clusters().grown([], {gone: "a", here: "b"}).grown([], {gone: "c", here: "c"}).with_groups({gone: "g", here: "g"})
    )
    table = pd.DataFrame({"sha256": [here], "picture": ["b"]})
    assert known.together(table) == {"a": "a", "b": "a"}
    assert known.together(table, groups=False) == {}
    decoded = pd.DataFrame({"sha256": [gone, here], "picture": ["new", "b"]})
    assert list(known.first_seen(decoded, {"a": True, "b": True})) == ["a", "b"]
    swapped = pd.DataFrame({"sha256": [gone], "picture": ["b"]})
    assert list(known.first_seen(swapped, {"a": True, "b": True})) == ["b"]  # its own pixels say which picture it is


def test_ten_thousand_classes_are_divided(tmp_path: Path) -> None:
    members = [each for number in range(10_000) for each in pictures(f"c{number:04d}", 5)]
    near = clusters_of(*([members[at][0], members[at + 1][0]] for at in range(0, 50_000, 5)))
    ledger = TestLedger(0.2, {}).extended(members, together=near.near, near=near.near)
    found, _ = run(tmp_path, "d", members, ledger, near)
    assert {len(found.class_counts[name]) for name in SPLITS} == {10_000}


def test_all_that_is_not_test_may_train_down_to_one_picture_of_a_class(tmp_path: Path) -> None:
    members = pictures("a", 9) + pictures("b", 4)
    test = [picture for picture, _ in members[:4]] + [picture for picture, _ in members[9:12]]
    ledger = TestLedger(0.5, {picture: picture in test for picture, _ in members})
    found, where = run(tmp_path, "few", members, ledger, valid_share=0, calibration_share=0)
    assert found.class_counts["train"] == {"a": 5, "b": 1}
    assert (found.counts["valid"], found.counts["calibration"], found.counts["test"]) == (0, 0, 7)
    assert {side for picture, side in where.items() if picture in test} == {"test"}
    # A class without any is no class to train on, whatever is left out.
    with pytest.raises(DataError, match=r"class 'b' has no image in the train split .*; add images of it"):
        run(tmp_path, "gone", members[:-1], ledger, valid_share=0, calibration_share=0)
    with pytest.raises(
        DataError,
        match=r"class 'b' has no image in the .* split .* It has 1 image outside test, and train, valid and calibration take one "
        r"each at least; where every class has few, the recipe fewshot trains on all of them",
    ):
        run(tmp_path, "standard", members, ledger)
