"""Kept images and the evidence of windows where a setting says: a team's machines see the same, and nothing else changes."""

from __future__ import annotations

import datetime
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from looped import MODEL, loop_of, now, predict
from served import unpacked
from shapes import visionloop
from stores import s3_bucket

from components.contracts.errors import ConfigError, DataError, RegistryUnavailable
from components.objects import open_objects
from components.store import unseal
from flows.loop import permits
from flows.loop.captures import captures_of
from flows.loop.labelling import count_asked, give_labels, picture, pictures_of, to_label
from flows.loop.labels import gathered
from flows.loop.overview import overview
from flows.loop.predictions import erase_image, erased_images, verify_predictions
from flows.loop.report import render
from flows.loop.windows import Span, judge_window, past_windows, prune
from flows.workspace.settings import read_settings
from monitoring.governor import Request
from serving.log.sending import send_all


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(tmp_path_factory.mktemp("older"))


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "workspace", symlinks=True))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket("addresses") as found:
        yield found


@pytest.fixture(params=["folder", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where images and windows go, as the environment says it."""
    found = f"{bucket}/{uuid.uuid4().hex}" if request.param == "s3" else str(tmp_path / "team")
    monkeypatch.setenv("VISIONLOOP_CAPTURES", f"{found}/captures")
    monkeypatch.setenv("VISIONLOOP_WINDOWS", f"{found}/windows")
    return found


def span(begin_h: float, end_h: float) -> Span:
    return Span(*(datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=hours) for hours in (begin_h, end_h)))


def own_of(root: Path) -> Path:
    return root / ".visionloop" / "serving" / "captures"


def send(root: Path) -> int:
    """As the server of a workspace does it beside its answers."""
    return send_all(own_of(root), read_settings(root / ".visionloop").captures_url, retain_days=30)


def test_a_window_is_judged_labelled_and_shown_from_an_address(
    root: Path, made: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(own_of(root))
    predict(root, 200, shift=4, capture=True)
    waiting = {path.name for path in own_of(root).glob("??/*")}
    loop = loop_of(root)
    before = sorted(str(path) for path in (root / ".visionloop" / "monitoring" / MODEL / "windows").rglob("*"))
    assert loop.window_store.names() == []
    written: list[str] = []
    real = type(loop.window_store).write

    def writing(self: object, window: str, file: str, data: bytes) -> None:
        written.append(file)
        real(self, window, file, data)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(type(loop.window_store), "write", writing)
        judged = judge_window(loop, span(1, 0), datetime.datetime.now(datetime.UTC))
    assert judged is not None
    assert (judged.verdict.status, judged.files) == ("drift", ("report.html", "to-label.csv"))
    assert written == ["rows.parquet", "to-label.csv", "report.html", "verdict.json"]
    assert judged.place == f"{address}/windows/{MODEL}/windows/{judged.window}"
    assert before == sorted(str(path) for path in (root / ".visionloop" / "monitoring" / MODEL / "windows").rglob("*"))
    # Images are seen while they wait, and once they are sent.
    asked = to_label(loop)
    assert (len(asked), all(row.kept for row in asked)) == (50, True)
    first = asked[0].image_sha256
    shown = picture(loop, first)
    assert (
        f"{address}/captures/{first[:2]}/{first}" in (loop.window_store.read(judged.window, "to-label.csv") or b"").decode()
    )
    assert send(root) == len(waiting)
    assert not list(own_of(root).glob("??/*"))
    assert (picture(loop, first), to_label(loop)) == (shown, asked)
    assert [one.image_sha256 for one in pictures_of(loop, judged.window)][:1]
    html = render(loop, tmp_path, story={}, pages={})
    assert "taken for" in html
    # Another machine with the same settings and tables, and nothing of its own.
    other = Path(shutil.copytree(root, tmp_path / "console", symlinks=True))
    shutil.rmtree(own_of(other))
    shutil.rmtree(other / ".visionloop" / "monitoring" / MODEL / "windows")
    console = loop_of(other)
    seen = overview(console)
    assert judged.window in [window.name for window in seen.windows]
    assert [row.image_sha256 for row in to_label(console)] == [row.image_sha256 for row in asked]
    assert picture(console, first) == shown
    assert give_labels(loop, [(row.image_sha256, "disc") for row in asked[:3]], by="Ann").imported.new == 3
    told = {window["id"]: window["realised_accuracy"] for window in past_windows(loop, 20)}
    assert told[judged.window] is not None
    assert told[judged.window]["n"] == 3
    with gathered(loop) as labelled:
        assert len(labelled.staged.attributes) == 3
    # Erased from the other machine, and gone everywhere.
    erased_bytes = captures_of(loop.workspace).read(first)
    erase_image(console.workspace, first, by="Ann", reason="asked for")
    with pytest.raises(DataError, match="was erased"):
        picture(loop, first)
    assert not captures_of(loop.workspace).among([first])
    assert (erased_images(loop.workspace), verify_predictions(loop.workspace).erased) == (frozenset({first}), 1)
    assert verify_predictions(loop.workspace).captures == ()
    # A server that has not heard of it keeps it once more.
    again = Path(captures_of(loop.workspace).own.place(first))
    again.parent.mkdir(parents=True, exist_ok=True)
    again.write_bytes(erased_bytes)
    assert verify_predictions(loop.workspace).captures == (f"{first} was erased and is there; erase it again",)
    assert send(root) == 0
    assert verify_predictions(loop.workspace).captures == ()
    # Bytes that are not those of its name.
    second = asked[1].image_sha256
    open_objects(f"{address}/captures").write(f"{second[:2]}/{second}", b"other bytes")
    with pytest.raises(DataError, match="is kept with other bytes"):
        picture(loop, second)
    assert verify_predictions(loop.workspace).captures == (f"{second} is not the image it is named after",)
    with gathered(loop) as labelled:
        assert (len(labelled.staged.attributes), len(labelled.staged.left_out), labelled.not_kept) == (1, 1, 1)
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=400)
    assert prune(loop, later) == 1
    assert list(open_objects(f"{address}/windows").stamps()) == []
    assert count_asked(loop).num_pictures == 0


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("address", ["s3"], indirect=True)
def test_the_command_line_watches_and_adds_from_an_address(root: Path, address: str, tmp_path: Path) -> None:
    since = now()
    predict(root, 200, shift=4, capture=True)
    send(root)
    done = visionloop("watch", "--since", since, cwd=root)
    (window,) = [name for name in loop_of(root).window_store.names() if name > "2026-11-28"]
    assert done.returncode == 1, done.stderr
    assert f"    label   {address}/windows/{MODEL}/windows/{window}/to-label.csv" in done.stdout.splitlines()
    rows = to_label(loop_of(root))
    file = tmp_path / "labels.csv"
    file.write_text("image_sha256,label\n" + "".join(f"{row.image_sha256},disc\n" for row in rows[:5]))
    assert visionloop("labels", "import", str(file), "--as", "ann", cwd=root).returncode == 0
    done = visionloop("data", "add", "--from-predictions", MODEL, "--json", cwd=root)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["copied"] == 5
    done = visionloop("data", "suggest", "--captured", "--model", MODEL, "--out", str(tmp_path / "batch"), cwd=root)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "batch" / "images").iterdir())) > 0
    assert not list((root / ".visionloop" / "tmp").glob("captured-*"))  # no copy of production's images stays behind
    done = visionloop("backup", str(tmp_path / "backup.tar"), "--json", cwd=root)
    assert done.returncode == 0, done.stderr
    assert {"captures", "windows"} <= json.loads(done.stdout.splitlines()[-1])["elsewhere"].keys()


def test_an_address_that_is_away_is_said_and_nothing_is_lost(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = next(path.name for path in own_of(root).glob("??/*"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name, value in (("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_DEFAULT_REGION", "eu")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VISIONLOOP_CAPTURES", "s3://nowhere/captures")
    loop = loop_of(root)
    before = sorted(own_of(root).rglob("*"))
    for refused in (
        lambda: erase_image(loop.workspace, sha256, by="Ann", reason="asked for"),
        lambda: picture(loop, "ab" * 32),
        lambda: send(root),
    ):
        with pytest.raises(RegistryUnavailable, match="s3://nowhere/captures does not answer"):
            refused()
    assert sorted(own_of(root).rglob("*")) == before
    monkeypatch.delenv("VISIONLOOP_CAPTURES")
    monkeypatch.setenv("VISIONLOOP_WINDOWS", "s3://nowhere/windows")
    loop = loop_of(root)
    predict(root, 200, shift=4)
    with pytest.raises(RegistryUnavailable, match="s3://nowhere/windows.* does not answer"):
        judge_window(loop, span(1, 0), datetime.datetime.now(datetime.UTC))
    monkeypatch.delenv("VISIONLOOP_WINDOWS")
    (alarm,) = loop_of(root).outbox.alarms(MODEL)
    # The governor answers without the list that it would name.
    request = Request(alarm.id, MODEL, "drift", "", None)
    assert permits._list_of(loop, request) is None


def test_settings_that_are_no_address_are_refused_and_a_folder_is_the_same_from_everywhere(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = root / ".visionloop"
    assert read_settings(state).captures_url == str(own_of(root))
    assert read_settings(state).windows_url == str(state / "monitoring")
    for variable in ("VISIONLOOP_CAPTURES", "VISIONLOOP_WINDOWS"):
        for wrong in ("gs://bucket/x", "s3://", "http://server/x"):
            monkeypatch.setenv(variable, wrong)
            with pytest.raises(ConfigError, match=f"{variable} is '{wrong}'; expected a folder, or s3://bucket/prefix"):
                read_settings(state)
        monkeypatch.setenv(variable, "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISIONLOOP_CAPTURES", "kept")
    assert read_settings(state).captures_url == str(tmp_path / "kept")
    # By whatever path: what is the servers' own folder is not sent anywhere.
    (tmp_path / "link").symlink_to(own_of(root))
    monkeypatch.setenv("VISIONLOOP_CAPTURES", str(tmp_path / "link"))
    kept = captures_of(loop_of(root).workspace)
    assert kept.stores == (kept.own,)


def test_a_window_that_was_changed_at_its_address_has_no_verdict(root: Path, address: str) -> None:
    predict(root, 200, shift=4, capture=True)
    loop = loop_of(root)
    judged = judge_window(loop, span(1, 0), datetime.datetime.now(datetime.UTC))
    assert judged is not None
    data = loop.window_store.read(judged.window, "verdict.json")
    assert data is not None
    assert unseal(data) is not None
    loop.window_store.write(judged.window, "verdict.json", data.replace(b"drift", b"pass!"))
    assert judged.window not in [name for name, _ in past_names(loop)]
    assert to_label(loop) == []
    loop.window_store.write(judged.window, "verdict.json", data)
    give_labels(loop, [(to_label(loop, limit=1)[0].image_sha256, "disc")], by="Ann")
    assert past_windows(loop, 5)[-1]["realised_accuracy"] is not None
    loop.window_store.write(judged.window, "rows.parquet", b"no parquet")
    assert past_windows(loop, 5)[-1]["realised_accuracy"] is None


def test_of_months_of_windows_only_as_many_are_listed_as_are_shown(root: Path, address: str) -> None:
    store = loop_of(root).window_store
    old, recent = "2020-01-01T0000Z-0123456789", f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H%M}Z-0123456789"
    store.write(old, "verdict.json", b"")
    assert store.names(1) == [old]
    store.write(recent, "verdict.json", b"")
    assert store.names(1)[0] == recent
    assert store.names(2) == store.names() == [recent, old]
    assert len(store.names(1)) == (1 if address.startswith("s3://") else 2)


def past_names(loop: object) -> list[tuple[str, object]]:
    from flows.loop.windows import windows

    return [(name, verdict) for name, verdict in windows(loop)]  # type: ignore[arg-type]
