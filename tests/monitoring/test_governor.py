"""Every rule of the governor, what it refuses and what it lets through, and one grant for a hundred deliveries."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from components.contracts.errors import ConfigError
from components.databases import Database
from components.databases import now as real_now
from monitoring.governor import Decision, Governor, GovernorPolicy, Granted, Known, Request, decide

AT = datetime.datetime(2026, 3, 2, 12, 0, tzinfo=datetime.UTC)
HOUR = datetime.timedelta(hours=1)
POLICY = GovernorPolicy()


def request(key: str = "drift:m:w1", **changes: Any) -> Request:
    given: dict[str, Any] = {
        "key": key,
        "model": "m",
        "cause": "drift",
        "data_version": "new",
        "trained_on": "old",
        "detectors": ("embeddings",),
        "seen_by": "1",
        "champion": "1",
        "diagnosis": "appearance",
    }
    return Request(**(given | changes))


def run(key: str = "drift:m:w0", **changes: Any) -> Granted:
    given: dict[str, Any] = {
        "key": key,
        "cause": "drift",
        "granted_at": AT - 12 * HOUR,
        "attempts": 1,
        "state": "finished",
        "lease_until": AT - 11 * HOUR,
        "data_version": "old",
        "outcome": "candidate",
        "ended_at": AT - 11 * HOUR,
        "body": {"version": "2", "detectors": ["embeddings"]},
    }
    return Granted(**(given | changes))


def answer(given: Request, *runs: Granted, policy: GovernorPolicy = POLICY, **known: Any) -> Decision:
    state: dict[str, Any] = {"runs": runs, "queued": [], "stopped": None, "reset_at": None}
    return decide(given, Known(**(state | known)), policy, AT)


def test_nothing_speaks_against_the_first() -> None:
    assert answer(request()).answer == "granted"
    assert answer(request(), run()).answer == "granted"
    assert answer(request(trained_on=None)).answer == "granted"


@pytest.mark.parametrize("state", ["running", "finished"])
def test_one_key_is_granted_once(state: Any) -> None:
    found = answer(request(), run("drift:m:w1", state=state))
    assert (found.answer, found.rule) == ("refused", "duplicate")


def test_a_killed_run_is_taken_up_once() -> None:
    found = answer(request(), run("drift:m:w1", state="crashed", outcome=None))
    assert (found.answer, found.rule) == ("granted", "resumed")
    found = answer(request(), run("drift:m:w1", state="crashed", outcome=None, attempts=2))
    assert (found.answer, found.rule) == ("refused", "given up")


def test_a_killed_run_is_not_taken_up_beside_another() -> None:
    dead, other = run("drift:m:w1", state="crashed", outcome=None), run("drift:m:w2", state="running")
    assert answer(request(), dead, other).answer == "queued"


def test_the_kill_switch_stops_everything() -> None:
    for given in (request(), request("schedule:m:1", cause="schedule")):
        found = answer(given, stopped="ann since noon: too hot")
        assert (found.answer, found.rule) == ("refused", "kill switch")
        assert "ann since noon: too hot" in found.reason


def test_broken_input_teaches_nothing() -> None:
    found = answer(request(diagnosis="broken input"))
    assert (found.answer, found.rule) == ("refused", "broken input")


def test_without_new_data_nothing_is_trained() -> None:
    found = answer(request(data_version="old"))
    assert (found.answer, found.rule) == ("refused", "no new data")
    assert "to-label.csv" in found.reason


def test_a_schedule_without_a_change_is_skipped() -> None:
    nightly = request("schedule:m:1", cause="schedule", data_version="old", changed=False)
    found = answer(nightly)
    assert (found.answer, found.rule) == ("refused", "nothing changed")
    assert answer(request("schedule:m:1", cause="schedule", data_version="old", changed=True)).answer == "granted"


def test_a_schedule_that_comes_too_late_is_skipped_with_its_reason() -> None:
    late = request("schedule:m:1", cause="schedule", overdue="it was planned for last week")
    assert answer(late) == Decision("refused", "overdue", "it was planned for last week")


def test_one_at_a_time_and_one_behind_it() -> None:
    busy = run("drift:m:w0", state="running", outcome=None, granted_at=AT - 12 * HOUR)
    found = answer(request(), busy)
    assert (found.answer, found.rule) == ("queued", "single flight")
    assert answer(request(), busy, queued=["drift:m:w1"]).answer == "queued"
    found = answer(request("drift:m:w2"), busy, queued=["drift:m:w1"])
    assert (found.answer, found.rule) == ("refused", "single flight")
    assert "no more than one may wait" in found.reason


def test_drift_waits_for_the_cool_down() -> None:
    found = answer(request(), run(granted_at=AT - 5 * HOUR))
    assert (found.answer, found.rule) == ("refused", "cool-down")
    assert "not again before 2026-03-02T13:00 UTC" in found.reason
    assert answer(request(), run(granted_at=AT - 6 * HOUR)).answer == "granted"
    nightly = request("schedule:m:1", cause="schedule")
    assert answer(nightly, run(granted_at=AT - 5 * HOUR)).answer == "granted"


def test_a_day_has_a_budget() -> None:
    runs = [run(f"schedule:m:{i}", cause="schedule", granted_at=AT - (i + 1) * HOUR) for i in range(4)]
    found = answer(request(), *runs)
    assert (found.answer, found.rule) == ("refused", "budget")
    assert answer(request(), *runs[:3]).answer == "granted"
    assert answer(request(), *runs[:3], run("schedule:m:9", cause="schedule", granted_at=AT - 25 * HOUR)).answer == "granted"


@pytest.mark.parametrize("outcome", ["rejection", "failed"])
def test_a_training_that_did_not_help_does_not_start_the_next(outcome: Any) -> None:
    found = answer(request(), run(outcome=outcome))
    assert (found.answer, found.rule) == ("refused", "loop breaker")
    assert "visionloop governor reset" in found.reason
    assert answer(request(), run(outcome=outcome), reset_at=AT - HOUR).answer == "granted"
    assert answer(request(), run(outcome=outcome), reset_at=AT - 13 * HOUR).answer == "refused"


def test_a_version_that_sees_the_same_drift_did_not_help() -> None:
    found = answer(request(champion="2", seen_by="2"), run())
    assert (found.answer, found.rule) == ("refused", "loop breaker")
    assert answer(request(champion="2", seen_by="2", detectors=("predicted_classes",)), run()).answer == "granted"
    # A rejection before a success is forgotten.
    assert answer(request(), run("drift:m:wa", outcome="rejection", granted_at=AT - 20 * HOUR), run()).answer == "granted"


def test_a_version_that_a_person_refused_did_not_help() -> None:
    found = answer(request(failed_versions=frozenset({"2"})), run())
    assert (found.answer, found.rule) == ("refused", "loop breaker")
    assert "gave version 2, which a person rejected or rolled back" in found.reason
    assert answer(request(failed_versions=frozenset({"7"})), run()).answer == "granted"


def test_an_alarm_about_a_version_that_does_not_reign_is_stale() -> None:
    """A replay of an old alarm, or a late row of an old window, trains nothing."""
    found = answer(request(seen_by="1", champion="2"), run())
    assert (found.answer, found.rule) == ("refused", "stale")
    assert "is about version 1, but version 2 is champion now" in found.reason


def test_a_hundred_deliveries_of_one_alarm_are_one_grant(database: Database) -> None:
    governors = [Governor(database, POLICY) for _ in range(4)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: governors[i % 4].ask(request(), holder=f"h{i}"), range(100)))
    assert [found.answer for found in answers].count("granted") == 1
    assert {found.rule for found in answers if found.answer != "granted"} == {"duplicate"}
    history = governors[0].history("m")
    assert len(history) == 100
    assert all(row["reason"] for row in history)
    (granted,) = governors[0].runs("m")
    assert (granted.state, granted.attempts) == ("running", 1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime.timedelta], None]:
    """Set the governor's clock ahead, or back."""
    ahead = [datetime.timedelta(0)]
    monkeypatch.setattr("monitoring.governor.now", lambda connection: real_now(connection) + ahead[0])

    def move(by: datetime.timedelta) -> None:
        ahead[0] += by

    return move


def test_a_run_that_stops_saying_it_lives_is_crashed_and_due(
    database: Database, clock: Callable[[datetime.timedelta], None]
) -> None:
    governor = Governor(database, POLICY)
    assert governor.ask(request(), holder="one").answer == "granted"
    clock(datetime.timedelta(seconds=50))
    assert governor.renew("drift:m:w1", "one")
    clock(datetime.timedelta(seconds=50))
    assert governor.due("m") == []
    clock(datetime.timedelta(seconds=50))
    assert governor.due("m") == ["drift:m:w1"]
    assert governor.ask(request(), holder="two").rule == "resumed"
    assert not governor.renew("drift:m:w1", "one")
    assert not governor.end("drift:m:w1", "one", "candidate", {})
    assert governor.end("drift:m:w1", "two", "candidate", {"version": "2"})
    (found,) = governor.runs("m")
    assert (found.state, found.outcome, found.attempts, found.body["version"]) == ("finished", "candidate", 2, "2")
    assert governor.due("m") == []


def test_a_run_killed_twice_is_given_up(database: Database, clock: Callable[[datetime.timedelta], None]) -> None:
    governor = Governor(database, POLICY)
    for expected in ("granted", "resumed", "given up"):
        assert governor.ask(request(), holder=expected).rule == expected
        clock(2 * datetime.timedelta(seconds=POLICY.lease_s))
    assert governor.due("m") == []


def test_what_waits_is_due_when_there_is_room(database: Database, clock: Callable[[datetime.timedelta], None]) -> None:
    governor = Governor(database, GovernorPolicy(cooldown_h=1))
    governor.ask(request(), holder="one")
    assert governor.ask(request("drift:m:w2"), holder="two").answer == "queued"
    assert governor.due("m") == []
    governor.end("drift:m:w1", "one", "candidate", {"version": "2"})
    assert governor.due("m") == []  # it cools down
    clock(datetime.timedelta(minutes=61))
    assert governor.due("m") == ["drift:m:w2"]
    assert governor.ask(request("drift:m:w2"), holder="two").answer == "granted"
    assert governor.due("m") == []


def test_a_clock_an_hour_back_grants_nothing_twice(database: Database, clock: Callable[[datetime.timedelta], None]) -> None:
    governor = Governor(database, POLICY)
    governor.ask(request(), holder="one")
    clock(-HOUR)
    assert governor.ask(request(), holder="two").rule == "duplicate"
    found = governor.ask(request("drift:m:w2"), holder="two")
    assert found.answer == "queued"
    governor.end("drift:m:w1", "one", "candidate", {"version": "2"})
    assert governor.ask(request("drift:m:w3"), holder="three").rule == "cool-down"


def test_an_alarm_waits_for_data(database: Database) -> None:
    governor = Governor(database, POLICY)
    assert governor.awaiting_data("m", "old") == []
    for key in ("drift:m:w1", "drift:m:w2"):
        assert governor.ask(request(key, data_version="old"), holder="h").rule == "no new data"
    assert governor.awaiting_data("m", "old") == []
    assert governor.awaiting_data("m", "new") == ["drift:m:w2"]  # the newest speaks for all
    assert governor.ask(request("drift:m:w2"), holder="h").answer == "granted"
    assert governor.awaiting_data("m", "newer") == []


def test_a_run_that_could_not_begin_is_given_back(database: Database) -> None:
    governor = Governor(database, POLICY)
    governor.ask(request(), holder="one")
    governor.give_back("drift:m:w1", "another")
    assert governor.due("m") == []
    governor.give_back("drift:m:w1", "one")
    assert governor.due("m") == ["drift:m:w1"]


@pytest.mark.parametrize("later", ["broken input", "kill switch", "failed training"])
def test_whatever_comes_between_does_not_hide_who_waits_for_data(database: Database, later: str) -> None:
    governor = Governor(database, GovernorPolicy(cooldown_h=0))
    assert governor.ask(request(data_version="old"), holder="h").rule == "no new data"
    if later == "broken input":
        assert governor.ask(request("drift:m:w2", diagnosis="broken input"), holder="h").rule == later
    elif later == "kill switch":
        governor.switch("stop", "m", by="ann", reason="r")
        assert governor.ask(request("drift:m:w2"), holder="h").rule == later
        governor.switch("start", "m", by="ann", reason="r")
    else:
        governor.ask(request("schedule:m:1", cause="schedule"), holder="h")
        governor.end("schedule:m:1", "h", "failed", {})
    assert governor.awaiting_data("m", "new") == ["drift:m:w1"]


def test_who_waits_for_data_is_asked_once_with_them_and_again_when_it_has_cooled_down(
    database: Database, clock: Callable[[datetime.timedelta], None]
) -> None:
    """A sweep every quarter of an hour must not tell people of the same refusal every quarter of an hour."""
    governor = Governor(database, POLICY)
    governor.ask(request("drift:m:w0", data_version="old", trained_on="older"), holder="h")
    governor.end("drift:m:w0", "h", "candidate", {"version": "2"})
    assert governor.ask(request(data_version="old"), holder="h").rule == "no new data"
    assert governor.awaiting_data("m", "new") == ["drift:m:w1"]
    assert governor.ask(request(), holder="h").rule == "cool-down"
    assert governor.awaiting_data("m", "new") == []
    clock(7 * HOUR)
    assert governor.awaiting_data("m", "new") == ["drift:m:w1"]
    governor.switch("stop", "m", by="ann", reason="r")
    assert governor.ask(request(), holder="h").rule == "kill switch"
    assert governor.awaiting_data("m", "new") == []


def test_a_training_on_the_new_data_answers_who_waited_for_them(database: Database) -> None:
    governor = Governor(database, POLICY)
    governor.ask(request(data_version="old"), holder="h")
    governor.ask(request("schedule:m:1", cause="schedule"), holder="h")
    governor.end("schedule:m:1", "h", "candidate", {"version": "2"})
    assert governor.awaiting_data("m", "new") == []


def test_a_live_run_that_was_taken_for_dead_lives_again(
    database: Database, clock: Callable[[datetime.timedelta], None]
) -> None:
    """A laptop that slept: nobody took the run up, so it is still its own."""
    governor = Governor(database, POLICY)
    governor.ask(request(), holder="one")
    clock(HOUR)
    assert governor.runs("m")[0].state == "crashed"
    assert governor.renew("drift:m:w1", "one")
    assert governor.runs("m")[0].state == "running"
    clock(HOUR)
    assert governor.runs("m")[0].state == "crashed"
    assert governor.end("drift:m:w1", "one", "candidate", {"version": "2"})
    assert governor.runs("m")[0].outcome == "candidate"


def test_a_grant_that_could_not_begin_costs_no_attempt(database: Database) -> None:
    governor = Governor(database, POLICY)
    for _ in range(4):
        assert governor.ask(request(), holder="one").answer == "granted"
        governor.give_back("drift:m:w1", "one", begun=False)
    governor.ask(request(), holder="one")
    governor.give_back("drift:m:w1", "one")
    assert governor.ask(request(), holder="two").rule == "resumed"
    governor.give_back("drift:m:w1", "two")
    assert governor.ask(request(), holder="three").rule == "given up"


def test_a_run_that_a_person_cancelled_stays_ended(database: Database) -> None:
    governor = Governor(database, POLICY)
    governor.ask(request(), holder="one")
    governor.give_back("drift:m:w1", "one")
    governor.cancel("drift:m:w1")
    assert governor.due("m") == []
    assert governor.ask(request(), holder="two").rule == "duplicate"


def test_a_queued_schedule_is_known(database: Database) -> None:
    governor = Governor(database, POLICY)
    governor.ask(request(), holder="one")
    assert governor.ask(request("schedule:m:1", cause="schedule"), holder="two").answer == "queued"
    assert governor.asked("schedule:m:1", "m", "schedule")
    assert not governor.asked("schedule:m:2", "m", "schedule")
    assert not governor.asked("schedule:m:1", "m", "drift")
    governor.end("drift:m:w1", "one", "candidate", {"version": "2"})
    assert governor.due("m") == ["schedule:m:1"]
    assert governor.ask(request("schedule:m:1", cause="schedule"), holder="two").answer == "granted"


def test_a_reset_counts_also_when_a_clock_went_back(database: Database, clock: Callable[[datetime.timedelta], None]) -> None:
    governor = Governor(database, GovernorPolicy(cooldown_h=0))
    governor.ask(request(), holder="one")
    governor.end("drift:m:w1", "one", "rejection", {})
    clock(-HOUR)
    governor.switch("reset", "m", by="ann", reason="looked at it")
    assert governor.ask(request("drift:m:w2"), holder="two").answer == "granted"


def test_people_switch_it_off_and_on(database: Database) -> None:
    governor = Governor(database, POLICY)
    governor.switch("stop", "*", by="ann", reason="the cluster is full")
    assert governor.ask(request(), holder="h").rule == "kill switch"
    assert governor.due("m") == []
    governor.switch("start", "*", by="ann", reason="free again")
    governor.switch("stop", "other", by="ann", reason="only that one")
    assert governor.stopped("m") is None
    assert governor.ask(request(), holder="h").answer == "granted"
    with pytest.raises(ConfigError, match="who and why"):
        governor.switch("stop", "m", by=" ", reason="r")


def test_a_reset_lets_the_loop_go_on(database: Database, clock: Callable[[datetime.timedelta], None]) -> None:
    governor = Governor(database, POLICY)
    governor.ask(request(), holder="one")
    governor.end("drift:m:w1", "one", "rejection", {})
    clock(datetime.timedelta(hours=7))
    assert governor.ask(request("drift:m:w2"), holder="two").rule == "loop breaker"
    governor.switch("reset", "m", by="ann", reason="the labels were wrong")
    assert governor.ask(request("drift:m:w2"), holder="two").answer == "granted"
