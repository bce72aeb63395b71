from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from components.contracts.errors import RegistryUnavailable, TamperedArtefact
from components.databases import Database
from registry.ledger import _LOCK, GENESIS, Draft, FollowedLedger, Ledger, Principal, _hash

FLOW = Principal(name="flow", method="machine")


def append(ledger: Ledger, key: str, kind: str = "requested", model: str = "m") -> int:
    return ledger.append(kind, model=model, subject=f"s-{key}", actor=FLOW, body={"version": key}, key=key).seq  # type: ignore[arg-type]


@pytest.fixture
def url(fresh: Callable[..., str]) -> str:
    return fresh("visionloop_ledger")


def test_rows_are_chained_and_found_again(url: str) -> None:
    ledger = Ledger(url)
    assert ledger.entries() == []
    assert [append(ledger, "a"), append(ledger, "b", model="n"), append(ledger, "c")] == [1, 2, 3]
    first, second, third = Ledger(url).entries()
    assert first.previous == GENESIS
    assert (second.previous, third.previous) == (first.hash, second.hash)
    assert [entry.key for entry in ledger.entries("m")] == ["a", "c"]
    assert ledger.find("c") == third
    assert ledger.find("z") is None


def test_appending_twice_under_one_key_appends_once(url: str) -> None:
    ledger = Ledger(url)
    assert append(ledger, "a") == append(ledger, "a") == 1
    assert len(ledger.entries()) == 1


def test_appenders_racing_each_other_make_one_chain(url: str) -> None:
    ledgers = [Ledger(url) for _ in range(8)]
    ledgers[0].entries()
    with ThreadPoolExecutor(8) as pool:
        seqs = list(pool.map(lambda n: append(ledgers[n % 8], f"k{n}"), range(40)))
        again = list(pool.map(lambda n: append(ledgers[n % 8], f"k{n % 4}"), range(40)))
    assert sorted(seqs) == list(range(1, 41))
    assert len(set(again)) == 4
    assert len(ledgers[0].entries()) == 40


def test_the_database_refuses_updates_and_deletes(url: str) -> None:
    append(Ledger(url), "a")
    statements = ["UPDATE visionloop_ledger SET actor = 'x'", "DELETE FROM visionloop_ledger"]
    if url.startswith("sqlite"):
        statements += ["INSERT OR REPLACE INTO visionloop_ledger SELECT * FROM visionloop_ledger"]
        # One unique column is enough to take the place of a row.
        columns = ["seq", "at", "kind", "model", "subject", "actor", "actor_method", "body", "key", "previous", "hash"]
        for same in ("seq", "key", "previous", "hash"):
            others = {"seq": "9", "key": "'9'", "previous": "'9'", "hash": "'9'"}
            values = ", ".join(others[name] if name in others and name != same else name for name in columns)
            statements += [f"INSERT OR REPLACE INTO visionloop_ledger SELECT {values} FROM visionloop_ledger"]
    else:
        statements += ["TRUNCATE visionloop_ledger"]
    for statement in statements:
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), sa.create_engine(url).begin() as connection:
            connection.execute(sa.text(statement))


@pytest.mark.parametrize(
    "damage",
    [
        'UPDATE visionloop_ledger SET body = \'{"version":"evil"}\' WHERE seq = 2',
        "UPDATE visionloop_ledger SET actor = 'x' WHERE seq = 1",
        "DELETE FROM visionloop_ledger WHERE seq = 2",
        "UPDATE visionloop_ledger SET seq = 9 WHERE seq = 3",
    ],
)
def test_a_row_changed_behind_its_back_breaks_the_chain(tmp_path: Path, damage: str) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    for key in "abc":
        append(ledger, key)
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        for trigger in ("visionloop_ledger_no_UPDATE", "visionloop_ledger_no_DELETE"):
            connection.execute(f"DROP TRIGGER {trigger}")
        connection.execute(damage)
    with pytest.raises(TamperedArtefact, match=r"broken at row \d.*restore a backup"):
        ledger.entries()
    with pytest.raises(TamperedArtefact):
        ledger.champion("m")


def test_a_followed_ledger_verifies_each_row_once_and_waits_for_nobody(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []

    def hash_and_tell(row: Mapping[str, Any]) -> str:
        hashed.append(row["key"])
        return _hash(row)

    monkeypatch.setattr("registry.ledger._hash", hash_and_tell)
    ledger, followed = Ledger(url), FollowedLedger(url)
    assert followed.entries() == []
    for key in "abc":
        append(ledger, key, model="n" if key == "b" else "m")
    assert followed.entries() == ledger.entries()
    append(ledger, "d")
    hashed.clear()
    assert [entry.key for entry in followed.entries("m")] == ["a", "c", "d"]
    assert ([entry.key for entry in followed.entries("n")], followed.entries("z")) == (["b"], [])
    assert hashed == ["c", "d", "d", "d"]  # the head of each reading, and what is new
    # Somebody else is in the middle of a transaction, and may be for long.
    with Database(url, sa.MetaData(), name="another", lock=_LOCK).transaction():
        assert len(followed.entries()) == 4
        assert followed.now().tzinfo is not None
    champion = followed.append("promoted", model="m", subject="s", actor=FLOW, body={"version": "1"}, key="p")
    assert followed.champion("m") == champion


def test_threads_that_follow_one_ledger_see_a_growing_chain(url: str) -> None:
    followed = FollowedLedger(url)

    def watch(_: int) -> list[int]:
        return [len(followed.entries()) for _ in range(30)]

    with ThreadPoolExecutor(5) as pool:
        seen = [pool.submit(watch, number) for number in range(4)]
        for number in range(20):
            pool.submit(append, Ledger(url), str(number)).result()
    assert all(future.result() == sorted(future.result()) for future in seen)
    assert followed.entries() == Ledger(url).entries()
    assert len(followed.entries()) == 20


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE visionloop_ledger SET actor = 'x' WHERE seq = 3",
        "DELETE FROM visionloop_ledger WHERE seq = 3",
        "DELETE FROM visionloop_ledger WHERE seq = 2",
        "INSERT INTO visionloop_ledger SELECT 4, at, kind, model, subject, actor, actor_method, body, 'd', hash, 'h' "
        "FROM visionloop_ledger WHERE seq = 3",
        "replaced",
        "another file",
    ],
)
def test_a_followed_ledger_that_does_not_go_on_from_its_head_is_broken(tmp_path: Path, damage: str) -> None:
    file, other = tmp_path / "ledger.db", tmp_path / "other.db"
    ledger, followed = Ledger(f"sqlite:///{file}"), FollowedLedger(f"sqlite:///{file}")
    for key in "abc":
        append(ledger, key)
        append(Ledger(f"sqlite:///{other}"), key)
    rows = followed.entries()
    if damage == "another file":
        other.replace(file)
    else:
        with sqlite3.connect(file) as connection:
            for trigger in ("UPDATE", "DELETE", "replacement"):
                connection.execute(f"DROP TRIGGER visionloop_ledger_no_{trigger}")
            if damage == "replaced":  # by a row that is right by itself
                connection.execute("DELETE FROM visionloop_ledger WHERE seq = 3")
                connection.commit()
                append(Ledger(f"sqlite:///{file}"), "e")
            else:
                connection.execute(damage)
    for _ in range(2):
        with pytest.raises(TamperedArtefact, match="broken at row"):
            followed.entries("m")
    assert len(rows) == 3


def test_what_is_changed_below_the_head_is_found_by_a_decision(tmp_path: Path) -> None:
    followed = FollowedLedger(f"sqlite:///{tmp_path / 'ledger.db'}")
    for key in "abc":
        append(followed, key)
    rows = followed.entries()
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        connection.execute("DROP TRIGGER visionloop_ledger_no_UPDATE")
        connection.execute("UPDATE visionloop_ledger SET actor = 'x' WHERE seq = 1")
    assert followed.entries() == rows
    draft = Draft("approved", "s", {"version": "a"}, "k")
    with pytest.raises(TamperedArtefact, match="broken at row 1"):
        followed.decide(model="m", actor=FLOW, rule=lambda entries, now: draft)
    with pytest.raises(TamperedArtefact):
        FollowedLedger(followed.url).entries()


def test_the_champion_is_the_last_promotion(url: str) -> None:
    ledger = Ledger(url)
    append(ledger, "r")
    assert ledger.champion("m") is None
    append(ledger, "p1", kind="promoted")
    append(ledger, "p2", kind="promoted")
    append(ledger, "other", kind="promoted", model="n")
    champion = ledger.champion("m")
    assert champion is not None
    assert champion.key == "p2"


def test_a_database_that_is_down_is_named_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(RegistryUnavailable, match="does not answer.*run the same command again"):
        Ledger(f"sqlite:///{tmp_path / 'no' / 'such' / 'ledger.db'}").entries()
    with pytest.raises(RegistryUnavailable) as caught:
        Ledger("postgresql+psycopg2://u:hunter2@127.0.0.1:9/x").entries()
    assert "hunter2" not in str(caught.value)
