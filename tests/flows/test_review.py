"""From issues by a person's file to the next data version: what is decided is done, all of it or nothing, and nothing is lost."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browser
from shapes import SMOKE, commit, make_workspace, visionloop

from components import attributes, dataversions, transfers
from components.companions import ATTRIBUTES, TEST_LEDGER
from components.contracts.errors import ConfigError, DataDiffers, DataError
from components.contracts.issues import Issue, issue_id
from components.images import decode, pixel_digest
from components.reviews import reviews
from components.splitting import TestLedger
from components.store import sha256_file
from flows.review import Asked, apply_file, ask
from flows.reviewing import sheet
from flows.reviewing.applying import Applied
from flows.reviewing.cards import Card, CardFile, cards_of
from flows.reviewing.deciding import Decision, decide
from flows.workspace.workspace import Workspace


def apply_it(workspace: Workspace, file: Path, **asked: Any) -> Applied:
    return apply_file(workspace, file, who="ann", why="second look", **asked)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of a few pictures; copy it, never use it."""
    return make_workspace(tmp_path_factory.mktemp("small") / "workspace", per_class=5)


@pytest.fixture
def workspace(small: Path, tmp_path: Path) -> Workspace:
    return Workspace.find(Path(shutil.copytree(small, tmp_path / "workspace", symlinks=True)))


def files_of(workspace: Workspace) -> list[CardFile]:
    ledger = TestLedger.read(workspace.root / TEST_LEDGER)
    return [
        CardFile(
            path=path.relative_to(workspace.data).as_posix(),
            label=path.parent.name,
            sha256=sha256_file(path),
            test=ledger.members[pixel_digest(decode(path.read_bytes()))[:32]],
        )
        for path in sorted(workspace.data.glob("*/*"))
    ]


def card(kind: str, *files: CardFile, candidate: str = "", score: float = 0.1, detail: str = "seen") -> Card:
    return Card(
        issue=Issue(
            kind=kind,
            severity="warning",
            files=tuple(file.path for file in files),
            score=score,
            threshold=0.5,
            detail=detail,
            action="look at it",
            candidate=candidate,
            id=issue_id(kind, [(file.sha256, file.label) for file in files]),
        ),
        files=files,
    )


def sides(files: list[CardFile]) -> tuple[list[CardFile], list[CardFile]]:
    """Frozen test pictures, and the others, of which the first three are crosses, discs and stripes."""
    rest = [file for file in files if not file.test]
    first = [next(file for file in rest if file.label == label) for label in ("cross", "disc", "stripes")]
    return [file for file in files if file.test], first + [file for file in rest if file not in first]


def questions(workspace: Workspace, *cards: Card) -> Asked:
    return ask(workspace, dataversions.pinned(workspace.root).dvc_hash, cards, files_of(workspace))


def filled(asked: Asked, decisions: Mapping[Card, str], **others: str) -> Path:
    """The CSV file with decisions."""
    assert asked.csv is not None
    rows = list(csv.DictReader(io.StringIO(asked.csv.read_bytes().decode("utf-8-sig"), newline="")))
    said = {each.issue.id: decision for each, decision in decisions.items()}
    for row in rows:
        row |= {"decision": said.get(row["issue"], "")} | others
    asked.csv.write_bytes(sheet.text(rows))
    return asked.csv


def state(workspace: Workspace) -> dict[str, str]:
    """All that a version is, and whether the next one was begun."""
    root = workspace.root
    names = [*workspace.data.glob("*/*"), *root.glob("data.*"), *root.glob(".visionloop/reviews/*.json")]
    return {path.relative_to(root).as_posix(): sha256_file(path) for path in names}


def test_what_a_person_decides_is_the_next_version_and_is_not_asked_again(workspace: Workspace) -> None:
    test, (wrong, copy, kept, ugly, fine, *others) = sides(files_of(workspace))
    one, two = others[-2:]
    told = attributes.Attributes(label_source="model", confidence="0.9", source="camera 3")
    attributes.write(workspace.root, {wrong.sha256: told, copy.sha256: told})
    before = dataversions.pin(workspace.root)
    hashes = dataversions.hashes(workspace.root)
    commit(workspace.root)
    other = workspace.data / "disc" / Path(wrong.path).name
    assert other.is_file(), "the name is to be taken in the other class"
    cards = [
        card("label_error", wrong, candidate="disc"),
        card("near_duplicate", copy, kept, candidate=kept.path),
        card("blurred", ugly),
        card("dark", fine, score=0.2),
        card("dark", wrong),
        card("contradictory_label", one, two, candidate="disc", score=0.3),
        card("leak", fine, test[0], candidate=fine.path, score=0.4),
    ]
    asked = questions(workspace, *cards)
    ordered = ["leak", "blurred", "dark", "label_error", "near_duplicate", "dark", "contradictory_label"]
    assert [each.issue.kind for each in asked.cards] == ordered
    answers = ("accept", "Accept ", "remove", "not_a_problem", "not_a_problem", "accept")
    said = dict(zip(cards, answers, strict=False))
    file = filled(asked, said, note="=seen\nat the desk")
    objects = {path: workspace.root / ".dvc" / "cache" / "files" / "md5" / oid[:2] / oid[2:] for path, oid in hashes.items()}
    objects[ugly.path].unlink()
    objects[copy.path].chmod(0o644)
    objects[copy.path].write_bytes(b"damaged")
    planned = apply_it(workspace, file, dry_run=True)
    assert dataversions.verify(workspace.root) == before
    applied = apply_it(workspace, file)
    target = applied.relabelled[wrong.path]
    assert target == f"disc/{Path(wrong.path).stem}-{wrong.sha256[:12]}.png"
    assert (planned.relabelled, planned.removed, planned.message) == (applied.relabelled, applied.removed, applied.message)
    assert sha256_file(workspace.data / target) == wrong.sha256
    assert {Path(applied.relabelled[each.path]).parent.name for each in (one, two)} == {"disc"}
    assert applied.removed == tuple(sorted([copy.path, ugly.path]))
    assert not [name for name in (wrong.path, copy.path, ugly.path) if (workspace.data / name).exists()]
    assert applied.message == "Data reviewed by ann: 3 relabelled, 2 removed, 2 not a problem (second look)"
    version = dataversions.verify(workspace.root)
    assert (version.dvc_hash, version.num_files) == (applied.data_version, before.num_files - 2)
    known = attributes.read(workspace.root)
    assert known == {wrong.sha256: attributes.Attributes(label_source="person", source="camera 3"), copy.sha256: told}
    written = reviews(workspace.root)
    assert {(each.who, each.why) for each in written.values()} == {("ann", "second look")}
    assert [written[each.issue.id].decision for each in said] == [each.strip().lower() for each in answers]
    assert written[cards[0].issue.id].note == "=seen at the desk"
    # Under the label that a person gave, neither the label nor what was said of the picture is asked about again.
    mended = CardFile(path=target, label="disc", sha256=wrong.sha256, test=False)
    again = questions(
        workspace, cards[6], card("label_error", mended, candidate="cross"), card("dark", mended), card("blurred", fine)
    )
    assert [each.issue.kind for each in again.cards] == ["leak", "blurred"]
    once_more = apply_it(workspace, file)
    assert (once_more.num_already, once_more.message, once_more.data_version) == (6, "", version.dvc_hash)
    commit(workspace.root)
    names = ("data.dvc", ATTRIBUTES.file)
    subprocess.run(["git", "checkout", "--quiet", "HEAD^", "--", *names], cwd=workspace.root, check=True)
    (workspace.root / "data.reviews.csv").unlink()
    assert transfers.pull(workspace.root) > 0
    assert dataversions.verify(workspace.root) == before


def test_every_problem_is_told_by_line_and_nothing_is_changed(workspace: Workspace, tmp_path: Path) -> None:
    test, (first, second, third, fourth, fifth, *_) = sides(files_of(workspace))
    cards = [
        card("label_error", first, candidate="disc"),
        card("blurred", first),
        card("near_duplicate", second, third, candidate=third.path),
        card("near_duplicate", third, second, candidate=second.path, score=0.3),
        card("dark", test[0]),
        card("dark", fourth),
        card("dark", fifth),
        card("imbalance"),
    ]
    cards[3] = cards[3].model_copy(update={"issue": cards[3].issue.model_copy(update={"id": "f" * 32})})
    asked = questions(workspace, *cards)
    assert asked.csv is not None
    rows = {row["issue"]: row for row in csv.DictReader(io.StringIO(asked.csv.read_bytes().decode("utf-8-sig"), newline=""))}
    before = state(workspace)

    def row(number: int, decision: str, **changed: str) -> dict[str, str]:
        return {**rows[cards[number].issue.id], "decision": decision, **changed}

    given = [
        row(0, "accept"),
        row(1, "remove"),
        row(2, "accept"),
        row(3, "accept"),
        row(4, "remove"),
        row(5, "not_a_problem"),
    ]
    file = tmp_path / "given.csv"

    def told(*wrong: dict[str, str]) -> list[str]:
        file.write_bytes(sheet.text(wrong))
        with pytest.raises(DataError, match="nothing was changed") as caught:
            apply_it(workspace, file)
        assert state(workspace) == before
        return list(caught.value.__notes__)

    assert told(*given) == [
        f"{first.path} is decided differently: line 2 relabels it to 'disc'; line 3 removes it. Empty all but one",
        f"line 4, line 5: of {' and '.join(sorted([second.path, third.path]))}, which show the same, none would be left",
        f"line 6: {test[0].path} is a frozen test picture, and both models are judged by it; if it is meant: --test-pictures",
    ]
    outside = "../../outside.png"
    problems = told(
        row(0, "accept", issue="0" * 32),
        row(0, "accept", file=outside),
        row(0, "accept", data_version="1" * 32 + ".dir"),
        row(0, "accept", data_version="../../x"),
        row(5, "remove"),
        row(5, "not_a_problem", note="two\r\nlines"),
        row(0, "relabel:disc", score="0.1"),
    )
    for line, words in zip(
        (2, 3, 4, 5, 7),
        (
            "was not asked",
            f"file is {outside!r}, and was {first.path!r}",
            "nothing was asked",
            "nothing was asked",
            "is 'not_a_",
        ),
        strict=True,
    ):
        assert [problem for problem in problems if problem.startswith(f"line {line}: ") and words in problem], problems
    assert len(problems) == 5
    problems = told(
        row(0, "delete"), row(1, "relabel:dog"), row(5, "accept"), row(6, f"relabel:{fifth.label}"), row(7, "remove")
    )
    for line, words in enumerate(
        ("unknown decision 'delete'", "no class 'dog'", "nothing is proposed", "already", "no file"), 2
    ):
        assert words in problems[line - 2], problems
    whole = sheet.text([row(5, "not_a_problem")]).decode("utf-8-sig")
    for content, words in (
        (whole.replace(",", ";").replace("decision", "answer").encode(), "lacks decision and has 'answer' too"),
        (whole.replace("decision", "Decision").encode(), "lacks decision and has 'Decision' too"),
        (whole.encode("utf-16"), "not UTF-8"),
        (whole.replace("not_a_problem", '"not').encode(), "is no CSV"),
        (whole.replace("not_a_problem", "").encode(), "decides nothing"),
        (b"", "lacks data_version"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=words):
            apply_it(workspace, file)
    assert state(workspace) == before
    file.write_bytes(sheet.text([row(4, "remove")]))
    applied = apply_it(workspace, file, test_pictures=True)
    assert (applied.removed, applied.test_pictures) == ((test[0].path,), (test[0].path,))
    file.write_bytes(sheet.text([row(4, "not_a_problem")]))
    with pytest.raises(DataError) as caught:
        apply_it(workspace, file)
    assert "was decided as 'remove' by ann" in caught.value.__notes__[0]


def test_what_is_decided_of_a_file_holds_for_each_copy_of_its_bytes(workspace: Workspace) -> None:
    _, (kept, *_) = sides(files_of(workspace))
    shutil.copyfile(workspace.data / kept.path, workspace.data / kept.label / "again.png")
    empty = hashlib.sha256(b"").hexdigest()
    there = files_of(workspace) + [
        CardFile(path=f"disc/{name}.png", label="disc", sha256=empty, test=False) for name in "ab"
    ]
    for file in there[-2:]:
        (workspace.data / file.path).write_bytes(b"")
    dataversions.pin(workspace.root)
    copy, first, second = (
        next(file for file in there if file.path.endswith(name)) for name in ("again.png", "a.png", "b.png")
    )
    issues = [
        *(card("unreadable", file).issue for file in (first, second)),
        *(card("dark", file).issue for file in (copy, kept)),
        card("exact_duplicate", copy, kept, candidate=kept.path).issue,
    ]
    cards = {each.issue.kind: each for each in cards_of(issues, there)}
    assert cards["dark"].files == (copy, kept)
    asked = ask(workspace, dataversions.pinned(workspace.root).dvc_hash, list(cards.values()), there)
    applied = apply_it(
        workspace,
        filled(asked, {cards["unreadable"]: "remove", cards["exact_duplicate"]: "remove", cards["dark"]: "remove"}),
    )
    assert applied.removed == tuple(sorted(file.path for file in (first, second, copy, kept)))


def test_a_sheet_counts_as_spreadsheets_of_all_languages_write_it(workspace: Workspace) -> None:
    _, (first, *_) = sides(files_of(workspace))
    named = [CardFile(path=f"{label}/x.png", label=label, sha256=first.sha256, test=False) for label in ("007", "true")]
    for each in named:
        (workspace.data / each.label).mkdir()
        shutil.copyfile(workspace.data / first.path, workspace.data / each.path)
    dataversions.pin(workspace.root)
    cards = [card("dark", each, score=0.25) for each in named]
    file = filled(questions(workspace, *cards), dict.fromkeys(cards, "not_a_problem"), note='"odd";\x00 1,5 \u00e9')
    text = file.read_bytes().decode("utf-8-sig")
    rows = [[{"007": "7", "true": "TRUE"}.get(value, value) for value in row] for row in csv.reader(text.splitlines())]
    rows[1][3], rows[2][3] = "0,25", "25. Jan"
    for separator, quoted, encoding, end in (
        (";", False, "utf-8-sig", "\r\n"),
        ("\t", True, "utf-8", "\n"),
        (",", True, "utf-8-sig", "\r\n"),
    ):
        written = io.StringIO()
        writer = csv.writer(written, delimiter=separator, quoting=1 if quoted else 0, lineterminator=end)
        writer.writerows([*rows, [""] * len(rows[0])])
        file.write_bytes(written.getvalue().encode(encoding))
        assert apply_it(workspace, file, dry_run=True).num_not_a_problem == 2
    apply_it(workspace, file)
    assert {each.note for each in reviews(workspace.root).values()} == {'"odd"; 1,5 \u00e9'}
    rows[1][7] = "disc"  # a candidate that was written by hand would be accepted for another one
    file.write_bytes(sheet.text([dict(zip(rows[0], row, strict=True)) for row in rows[1:]]))
    with pytest.raises(DataError, match="nothing was changed"):
        apply_it(workspace, file)


def test_a_file_of_an_earlier_version_counts_where_its_files_are_as_they_were(workspace: Workspace) -> None:
    _, (first, second, third, *_) = sides(files_of(workspace))
    cards = [card("dark", first), card("dark", second), card("dark", third)]
    asked = questions(workspace, *cards)
    file = filled(asked, {cards[0]: "remove"})
    with pytest.raises(DataError, match="holds decisions that were not applied"):
        questions(workspace, *cards)
    apply_it(workspace, file)
    filled(asked, {cards[0]: "remove", cards[1]: "remove"})
    applied = apply_it(workspace, file)
    assert (applied.removed, applied.num_already) == ((second.path,), 1)
    (workspace.data / third.path).write_bytes(b"another picture")
    filled(asked, {cards[2]: "not_a_problem"})
    with pytest.raises(DataDiffers, match="differs from data.dvc"):
        apply_it(workspace, file)
    dataversions.pin(workspace.root)
    with pytest.raises(DataError) as caught:
        apply_it(workspace, file)
    assert [note.partition(": ")[2] for note in caught.value.__notes__] == [
        f"{third.path} has other bytes than when it was asked about"
    ]


_KILLED = """
import json, os, signal, shutil, sys
from pathlib import Path
import pytest
from failpoints import Failpoints
from components import dataversions, git, transfers
from flows.review import apply_file
from flows.reviewing import applying
from flows.workspace.workspace import Workspace

def kill(_):
    os.kill(os.getpid(), signal.SIGKILL)

def attempt(root, places, nth):
    child = os.fork()
    if not child:
        status, found = 1, Workspace.find(root)
        try:
            if places == "one by one":  # as where data/ is a mount of its own, and cannot change places
                transfers._exchanged = lambda *_: False
            if nth:
                Failpoints(PLACES[places], nth=nth, when="after", fail=kill)(pytest.MonkeyPatch())
            file = next(root.glob(".visionloop/reviews/*/review.csv"))
            applied = apply_file(found, file, who="ann", why="why")
            status = 0 if applied.completed else 3
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

PLACES = {
    "at once": [(applying, "write_atomically"), (transfers, "_exchanged"), (applying, "add_reviews"),
                (dataversions, "write_atomically"), (git, "stage")],
    "one by one": [(Path, "unlink")],
}
original = Path(sys.argv[1])
dataversions.verify(original)  # loads what every child would load by itself
for places in PLACES:
    nth, first = 1, None
    while first != 3:
        root = original.with_name(f"{places} {nth}")
        shutil.copytree(original, root, symlinks=True)
        first = attempt(root, places, nth)
        print(json.dumps([root.name, first, attempt(root, places, 0)]), flush=True)
        nth += 1
"""


@pytest.mark.slow
def test_killed_at_any_step_it_is_completed_by_the_same_command(workspace: Workspace) -> None:
    _, (first, second, third, *_) = sides(files_of(workspace))
    cards = [card("label_error", first, candidate="disc"), card("dark", second), card("dark", third)]
    filled(questions(workspace, *cards), {cards[0]: "accept", cards[1]: "remove", cards[2]: "not_a_problem"})
    here = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(workspace.root)],
        cwd=here.parent,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{here.parent}:{here}"},
    )
    assert done.returncode == 0, done.stderr
    attempts = {name: (killed, again) for name, killed, again in map(json.loads, done.stdout.splitlines())}
    # Killed before data/ changed it begins again (3), after that it goes on (0); where nothing was left to do, it says so (3).
    assert attempts == {
        "at once 1": (-9, 3),
        **{f"at once {number}": (-9, 0) for number in range(2, 6)},
        "at once 6": (3, 3),
        **{f"one by one {number}": (-9, 0) for number in range(1, 5)},
        "one by one 5": (-9, 3),
        "one by one 6": (3, 3),
    }, done.stderr
    made = {name: _rid_of_time(workspace.root.with_name(name)) for name in attempts}
    assert {name: each == made["at once 6"] for name, each in made.items()} == dict.fromkeys(attempts, True)


def _rid_of_time(root: Path) -> Any:
    """What a version is, but for when it was made."""
    version = dataversions.verify(root)
    names = state(Workspace(root))
    written = [(each.issue, each.decision, each.who, each.why) for each in reviews(root).values()]
    fixed = {name: digest for name, digest in names.items() if name not in ("data.dvc", "data.reviews.csv")}
    staged = subprocess.run(["git", "diff", "--name-only"], cwd=root, capture_output=True, text=True, check=True).stdout
    return version.dvc_hash, written, fixed, staged


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


def test_the_page_is_filled_with_keys_and_its_file_is_applied(workspace: Workspace, window: Browser, tmp_path: Path) -> None:
    _, (first, second, third, fourth, fifth, *_) = sides(files_of(workspace))
    hostile = "<img src=x onerror=\"document.title='broken'\">"
    named = CardFile(path=f"cross/{hostile}.png", label="cross", sha256=first.sha256, test=False)
    (workspace.data / first.path).rename(workspace.data / named.path)
    dataversions.pin(workspace.root)
    cards = [
        card("label_error", named, candidate="disc", score=0.1, detail="</script><script>document.title='broken'</script>"),
        card("near_duplicate", second, third, candidate=third.path, score=0.2),
        card("blurred", fourth, score=0.3),
        card("imbalance", score=0.4),
        card("outlier", fifth, score=0.5),
    ]
    asked = questions(workspace, *cards)
    assert asked.page is not None
    window.open(asked.page.as_uri())

    def here() -> str:
        return str(window.script("return document.querySelector('.card.here h2').textContent"))

    def keys(text: str) -> None:
        window.type(".card.here", text)

    assert (here(), window.text("#progress")) == ("label error", "0 of 5 decided")
    window.wait_for(lambda: window.script("return [...document.images].filter((one) => one.naturalWidth).length") >= 7)
    assert hostile in window.text(".card.here figcaption")
    keys("a")
    assert here() == "near duplicate"
    keys("r")
    window.type("#label", "STR\ue007")
    assert here() == "blurred"
    keys("a")  # says that nothing is proposed, and stays
    assert window.text(".card.here .said") == "Nothing is proposed here: R, X or N."
    keys("x")
    keys("x")  # an issue about no file has nothing to remove
    assert window.text(".card.here .said").startswith("No file is named here")
    keys("n")
    held = "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'x', repeat: true, bubbles: true}))"
    window.script(held.replace("document.", "document.querySelector('.card.here').", 1))  # decides nothing
    assert window.text("#progress") == "4 of 5 decided, not saved"
    keys("r")
    window.type("#label", "red fox")
    assert window.text("#choices") == "new class: red fox"
    window.type("#label", "\ue007")
    assert "--as YOU --reason WHY --new-class 'red fox'" in window.text("main p")
    assert window.text("#progress") == "5 of 5 decided, not saved"
    window.click("#open")
    assert window.text("#nothing") == "No card is left to show."
    window.open(asked.page.as_uri())
    assert window.text("#progress") == "5 of 5 decided"
    keys("\ue012\ue012j")  # two back are none, as it begins at the first card; one on
    assert here() == "near duplicate"
    keys("u")
    keys("a")
    assert here() == "blurred"
    keys("e")
    window.type(".card.here input", 'smeared, with "dirt"\ue007')
    folder = tmp_path / "downloads"
    window.call(
        "POST",
        "/goog/cdp/execute",
        cmd="Browser.setDownloadBehavior",
        params={"behavior": "allow", "downloadPath": str(folder)},
    )
    keys("s")
    window.wait_for(lambda: (folder / "review.csv").is_file())
    assert window.text("#progress") == "5 of 5 decided, saved as review.csv among the downloads"
    for width, height in ((390, 800), (1200, 900)):
        window.call("POST", "/window/rect", width=width, height=height)
        assert window.script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth"), width
    assert window.script("return document.title") == "Review of 5 issues · visionloop"
    assert window.complaints() == []
    with pytest.raises(DataError) as caught:
        apply_it(workspace, folder / "review.csv")
    assert "there is no class 'red fox'" in caught.value.__notes__[0]
    assert "where a new one is meant: --new-class 'red fox'" in caught.value.__notes__[0]
    for name in ("Disc", "a/b", ".hidden"):
        with pytest.raises(ConfigError, match="cannot be the name of a class"):
            apply_it(workspace, folder / "review.csv", new_classes=["red fox", name])
    applied = apply_it(workspace, folder / "review.csv", new_classes=["red fox"])
    assert (set(applied.relabelled), applied.removed) == ({named.path, fifth.path}, (fourth.path, second.path))
    assert applied.relabelled[fifth.path] == f"red fox/{Path(fifth.path).name}"
    assert applied.notes == ("class 'red fox' is new",)
    assert reviews(workspace.root)[cards[2].issue.id].note == 'smeared, with "dirt"'


def test_the_page_tells_at_once_which_cards_contradict_each_other(
    workspace: Workspace, window: Browser, tmp_path: Path
) -> None:
    _, (first, second, third, fourth, fifth, *_) = sides(files_of(workspace))
    cards = [
        card("label_error", first, candidate="disc", score=0.1),
        card("near_duplicate", first, second, candidate=second.path, score=0.2),
        card("near_duplicate", third, fourth, candidate=fourth.path, score=0.3),
        card("leak", fourth, third, candidate=third.path, score=0.4),
        card("blurred", first, score=0.5),
        card("contradictory_label", second, third, candidate="stripes", score=0.6),
        card("dark", fourth, score=0.7),
        card("outlier", fifth, score=0.8),
    ]
    asked = questions(workspace, *cards)
    assert asked.page is not None
    window.open(asked.page.as_uri())
    window.call("POST", "/window/rect", width=1200, height=900)
    assert window.text("#contradictions") == ""

    def marked() -> dict[int, str]:
        """What the page says of each card that it marks, by the card's number."""
        code = """return [...document.querySelectorAll(".card")].map((one) => one.classList.contains("conflict")
            === (one.querySelector(".conflicts").innerText !== "") ? one.querySelector(".conflicts").innerText : "unmarked")"""
        return {number: text for number, text in enumerate(window.script(code), 1) if text}

    for _ in range(2):
        window.type(".card.here", "a")
    assert marked() == {
        1: f"Contradiction: {first.path} is to be relabelled to disc here, and removed by card 2.\n\nGo to card 2",
        2: f"Contradiction: {first.path} is to be removed here, and relabelled to disc by card 1.\n\nGo to card 1",
    }
    assert window.text("#contradicting").startswith("Cards 1, 2 contradict each other: ")
    assert window.text(".card.here h2") == "near duplicate"
    for _ in range(2):
        window.type(".card.here", "a")
    none_left = f"of {' and '.join(sorted([third.path, fourth.path]))}, which show the same, cards 3, 4 would leave none"
    assert {number: none_left in text for number, text in marked().items()} == {1: False, 2: False, 3: True, 4: True}
    window.screenshot(tmp_path / "contradictions.png")
    window.click("#open")
    window.click("#first")
    assert (window.text(".card.here h2"), window.script("return document.activeElement.className")) == (
        "label error",
        "card conflict here",
    )
    for width, height in ((390, 800), (1200, 900)):
        window.call("POST", "/window/rect", width=width, height=height)
        assert window.script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth"), width
    # Whatever is decided, the page marks the cards that `apply` would name.
    choices = ("", "accept", "remove", "not_a_problem", "relabel:disc", "relabel:stripes")
    drawn = random.Random(7)
    num_marked = 0
    for _ in range(60):
        said = [drawn.choice(choices) for _ in cards]
        said = [one if one != "accept" or each.proposal else "" for one, each in zip(said, cards, strict=True)]
        said = [
            "" if one[:8] == "relabel:" and not each.not_labelled(one[8:]) else one
            for one, each in zip(said, cards, strict=True)
        ]
        window.script("arguments[0].forEach((one, index) => one ? decide(index, one) : undo(index))", said)
        found = decide(
            [
                Decision(f"line {number}", each, one)
                for number, (each, one) in enumerate(zip(cards, said, strict=True), 1)
                if one
            ],
            ["cross", "disc", "stripes"],
        )
        named = {int(number) for problem in found.problems for number in re.findall(r"line (\d+)", problem)}
        assert marked().keys() == named, (said, found.problems)
        num_marked += bool(named)
    assert 10 < num_marked < 60
    assert window.complaints() == []


def test_the_commands_say_what_is_to_be_done(workspace: Workspace) -> None:
    root = workspace.root
    _, (first, *_) = sides(files_of(workspace))
    shutil.copyfile(workspace.data / first.path, workspace.data / first.label / "zz.png")
    dataversions.pin(root)
    # Findings that need a network would take most of the time.
    recipe = SMOKE.replace("name: smoke", "name: copies") + "validation: {findings: [{finding: exact_duplicate}]}\n"
    (root / "recipes" / "copies.yaml").write_text(recipe.replace("validation: {min_images_per_class: 10}\n", ""))
    looked = ("data", "review", "--recipe", "copies", "--kind")
    done = visionloop(*looked, "exact_duplicate", "--json", cwd=root)
    told = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, told["issues"], told["kinds"]) == (0, 1, {"exact_duplicate": 1})
    file = Path(told["csv"])
    file.write_bytes(file.read_bytes().replace(b",,\r\n", b",accept,\r\n"))
    asked = ("data", "review", "apply", str(file), "--as", "ann", "--reason", "it's a copy")
    done = visionloop(*asked, "--dry-run", cwd=root)
    assert (done.returncode, f"1 would be removed: {first.label}/zz.png" in done.stdout) == (0, True), done.stdout
    assert (workspace.data / first.label / "zz.png").exists()
    done = visionloop(*asked, cwd=root)
    assert done.returncode == 0
    assert "Next: git commit -m 'Data reviewed by ann: 1 removed (it'\"'\"'s a copy)'" in done.stdout
    done = visionloop(*asked, cwd=root)
    assert (done.returncode, done.stdout.startswith("Already applied: 1 decision")) == (0, True), done.stdout
    done = visionloop(*looked, "exact_duplicate", cwd=root)
    assert (done.returncode, "0 issues to decide on" in done.stdout) == (0, True), done.stdout
    done = visionloop(*looked, "duplicate", cwd=root)
    assert (done.returncode, "unknown kind of issue 'duplicate'; valid: " in done.stderr) == (2, True), done.stderr
    file.write_bytes(file.read_bytes().replace(b"accept", b"keep"))
    done = visionloop(*asked, "--json", cwd=root)
    assert (done.returncode, json.loads(done.stdout)["notes"][0][:14]) == (2, "line 2: issue "), done.stdout
