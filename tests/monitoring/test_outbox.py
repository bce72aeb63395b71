"""An alarm is one durable row a detector, however often its window is judged."""

from __future__ import annotations

import datetime
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from watched import END, START

from components.contracts.errors import RegistryUnavailable, UnknownName
from components.databases import Database, now
from monitoring.governor import Governor, GovernorPolicy, Request
from monitoring.outbox import Outbox, alarm_id, window_id
from monitoring.records import open_records
from monitoring.verdicts import DriftStatus, DriftVerdict, Shift, WindowFacts


def drift(*detectors: str, status: DriftStatus = "drift", model: str = "digits", version: str = "1") -> DriftVerdict:
    facts = WindowFacts(
        model=model,
        version=version,
        release="r" * 64,
        since=START.isoformat(),
        until=END.isoformat(),
        rows=9,
        judged=9,
        distinct_images=9,
        content="c" * 64,
    )
    shifts = tuple(Shift(detector=name, status="drift", message="m", statistic="s") for name in detectors)
    return DriftVerdict(
        window=facts,
        status=status,
        diagnosis="appearance",
        reasons=("because",),
        shifts=shifts,
        alpha=0.01,
        policy="p",
        reference="f",
    )


def test_an_alarm_is_there_once(database: Database) -> None:
    outbox = Outbox(database)
    alarm, new = outbox.raise_alarm(drift("embeddings", "confidence"), "w1")
    assert new
    assert (alarm.id, alarm.detectors) == ("drift:digits:w1", ("confidence", "embeddings"))
    again, new = outbox.raise_alarm(drift("embeddings", "confidence"), "w1")
    assert not new
    assert (again.id, again.at) == (alarm.id, alarm.at)
    assert [found.id for found in outbox.alarms("digits")] == [alarm.id]
    _, new = outbox.raise_alarm(drift("image_statistics"), "w1")
    assert new  # a late row made another detector see it: the same alarm, one detector more
    (found,) = outbox.alarms()
    assert found.detectors == ("confidence", "embeddings", "image_statistics")
    assert outbox.alarm(alarm.id) == found


def test_many_who_raise_it_raise_one(database: Database) -> None:
    outbox = Outbox(database)
    with ThreadPoolExecutor(8) as pool:
        new = list(pool.map(lambda _: outbox.raise_alarm(drift("embeddings"), "w1")[1], range(24)))
    assert new.count(True) == 1
    assert len(outbox.alarms()) == 1


@pytest.mark.parametrize("status", ["pass", "inconclusive", "no data"])
def test_only_drift_is_an_alarm(database: Database, status: DriftStatus) -> None:
    with pytest.raises(ValueError, match="raises no alarm"):
        Outbox(database).raise_alarm(drift("embeddings", status=status), "w1")
    assert Outbox(database).alarms() == []


def test_an_alarm_that_nobody_raised_is_not_known(database: Database) -> None:
    outbox = Outbox(database)
    outbox.raise_alarm(drift("embeddings"), "w1")
    with pytest.raises(UnknownName, match="unknown alarm 'drift:digits:forged'; valid: drift:digits:w1"):
        outbox.alarm("drift:digits:forged")


def test_what_nobody_acted_on_is_found(database: Database) -> None:
    outbox = Outbox(database)
    alarm, _ = outbox.raise_alarm(drift("embeddings"), "w1")
    outbox.emitted(alarm)
    assert outbox.alarms()[0].emissions == 1
    assert outbox.waiting("digits", grace_s=60) == []
    assert [found.id for found in outbox.waiting("digits", grace_s=0)] == [alarm.id]
    assert outbox.waiting("other", grace_s=0) == []
    _asked(database, alarm.id)
    assert outbox.waiting("digits", grace_s=0) == []


def _asked(database: Database, key: str) -> None:
    request = Request(key=key, model="digits", cause="drift", data_version="d2", trained_on="d1")
    Governor(database, GovernorPolicy()).ask(request, holder="h")


def test_the_newest_of_its_kind_speaks_for_the_others(database: Database) -> None:
    outbox = Outbox(database)
    outbox.raise_alarm(drift("embeddings"), "w1")
    later, _ = outbox.raise_alarm(drift("embeddings"), "w2")
    assert [found.id for found in outbox.waiting("digits", grace_s=0)] == [later.id]
    _asked(database, later.id)
    assert outbox.waiting("digits", grace_s=0) == []


def test_another_kind_of_drift_speaks_for_itself_alone(database: Database) -> None:
    """Black frames that are refused must not hide an alarm whose event was lost before them."""
    outbox = Outbox(database)
    lost, _ = outbox.raise_alarm(drift("embeddings"), "w1")
    black, _ = outbox.raise_alarm(drift("repetition").model_copy(update={"diagnosis": "broken input"}), "w2")
    _asked(database, black.id)
    assert [found.id for found in outbox.waiting("digits", grace_s=0)] == [lost.id]


def test_alarms_are_in_the_order_they_were_raised_whatever_the_clock_says(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(database)
    first, _ = outbox.raise_alarm(drift("embeddings"), "w1")
    _asked(database, first.id)
    monkeypatch.setattr("monitoring.outbox.now", lambda connection: now(connection) - datetime.timedelta(hours=1))
    second, _ = outbox.raise_alarm(drift("embeddings"), "w2")
    monkeypatch.undo()
    assert second.at < first.at
    assert [found.id for found in outbox.waiting("digits", grace_s=0)] == [second.id]
    assert [found.id for found in outbox.alarms()] == [first.id, second.id]


def test_people_are_told_of_an_episode_once(database: Database) -> None:
    outbox = Outbox(database)
    first, _ = outbox.raise_alarm(drift("embeddings"), "w1")
    again, _ = outbox.raise_alarm(drift("embeddings"), "w2")
    other, _ = outbox.raise_alarm(drift("embeddings", version="2"), "w3")
    assert [outbox.first_of_its_kind(a) for a in (first, again, other)] == [True, False, True]


def test_windows_are_named_by_what_they_are(database: Database) -> None:
    one = window_id("digits", START.isoformat(), END.isoformat(), "r1")
    assert one == window_id("digits", START.isoformat(), END.isoformat(), "r1")
    assert one.startswith("2026-03-01T1200Z-")
    assert (
        len(
            {
                one,
                window_id("digits", START.isoformat(), END.isoformat(), "r2"),
                window_id("other", START.isoformat(), END.isoformat(), "r1"),
            }
        )
        == 3
    )
    assert alarm_id("digits", one) == f"drift:digits:{one}"


def test_a_database_that_is_away_is_told_and_grants_nothing(tmp_path: Path) -> None:
    away = open_records("postgresql+psycopg2://nobody@127.0.0.1:9/none")
    with pytest.raises(RegistryUnavailable, match="the database of the loop at .*127.0.0.1:9.* does not answer"):
        Outbox(away).raise_alarm(drift("embeddings"), "w1")
    with pytest.raises(RegistryUnavailable, match="Nothing was lost"):
        Governor(away, GovernorPolicy()).ask(Request("k", "m", "drift", "d", None), holder="h")


def test_a_locked_database_is_waited_for(tmp_path: Path) -> None:
    import sqlite3
    import threading

    path = tmp_path / "loop.db"
    outbox = Outbox(open_records(f"sqlite:///{path}"))
    outbox.alarms()
    holder = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.7, lambda: holder.execute("COMMIT"))
    release.start()
    _, new = outbox.raise_alarm(drift("embeddings"), "w1")
    release.join()
    holder.close()
    assert new


def test_the_clock_is_utc(database: Database) -> None:
    with database.transaction() as connection:
        assert now(connection).utcoffset() == datetime.timedelta(0)
