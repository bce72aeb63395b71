from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from components.contracts.errors import ConfigError, DecisionRefused, UnknownName, VisionloopError
from components.databases import now
from registry import approval
from registry.approval import person
from registry.ledger import Entry, Ledger, Principal

ANN, BOB = person("ann"), person("Bob Müller")
FLOW = Principal(name="flows/train", method="machine")
DAY = datetime.timedelta(days=1)


@pytest.fixture
def ledger(fresh: Callable[..., str]) -> Ledger:
    return Ledger(fresh("visionloop_ledger"))


def request(
    ledger: Ledger,
    version: str,
    *,
    by: Principal = FLOW,
    champion: str = "none",
    engine: str = "",
    undecided: tuple[str, ...] = (),
) -> Entry:
    bound = {
        "data": f"data {version}",
        "engines": {"e": engine or f"engine {version}"},
        "serving": "e",
        "release": f"release {version}",
        "champion": champion,
    }
    body: dict[str, Any] = {"version": version, "manifest_sha256": f"manifest {version}", "bound": bound}
    body |= {"undecided": list(undecided)} if undecided else {}
    return ledger.append("requested", model="m", subject=f"candidate {version}", actor=by, body=body, key=f"r{version}")


def approve(ledger: Ledger, version: str, by: Principal = ANN, **options: Any) -> Entry:
    return ledger.decide(model="m", actor=by, rule=approval.approve(version, by, "looked at it", **options))


def except_(ledger: Ledger, version: str, *gates: str, by: Principal = ANN, **options: Any) -> Entry:
    rule = approval.except_gates(version, by, gates, "looked at the images", **options)
    return ledger.decide(model="m", actor=by, rule=rule)


def reject(ledger: Ledger, version: str, by: Principal = BOB, **options: Any) -> Entry:
    return ledger.decide(model="m", actor=by, rule=approval.reject(version, by, "not now", **options))


def promote(ledger: Ledger, version: str) -> Entry:
    return ledger.decide(model="m", actor=FLOW, rule=approval.promote(version, f"release {version}"))


def rollback(ledger: Ledger, to: str | None = None, *, leaving: int | None = None) -> Entry:
    current = ledger.champion("m")
    seq = leaving if leaving is not None else (current.seq if current else 0)
    return ledger.decide(model="m", actor=ANN, rule=approval.rollback(to, ANN, "it was worse", leaving=seq))


def status(ledger: Ledger, version: str, now: datetime.datetime | None = None) -> str:
    return approval.state_of(ledger.entries("m"), version, now or ledger.now()).status


def reign(ledger: Ledger, *versions: str) -> None:
    """Promote versions one after the other, each judged against the one before."""
    for version in versions:
        current = ledger.champion("m")
        request(ledger, version, champion=current.body["engine"] if current else "none")
        approve(ledger, version)
        promote(ledger, version)


def test_the_way_of_a_candidate(ledger: Ledger) -> None:
    request(ledger, "1")
    assert status(ledger, "1") == "waiting"
    entry = approve(ledger, "1")
    assert entry.body["bound"]["data"] == "data 1"
    assert status(ledger, "1") == "approved"
    promote(ledger, "1")
    assert status(ledger, "1") == "champion"
    request(ledger, "2", champion="engine 1")
    approve(ledger, "2", BOB)
    promote(ledger, "2")
    assert (status(ledger, "1"), status(ledger, "2")) == ("retired", "champion")
    rollback(ledger)
    assert (status(ledger, "1"), status(ledger, "2")) == ("champion", "retired")


def test_who_asked_for_it_cannot_approve_it_under_any_spelling(ledger: Ledger) -> None:
    request(ledger, "1", by=person("Bob Müller"))
    for spelling in ("Bob Müller", "bob müller", " BOB MU\u0308LLER "):
        with pytest.raises(DecisionRefused, match="requested version 1 and cannot approve it: a second person"):
            approve(ledger, "1", person(spelling))
    assert status(ledger, "1") == "waiting"
    approve(ledger, "1", ANN)


def test_who_asked_for_it_cannot_decide_under_another_name_of_theirs(ledger: Ledger) -> None:
    request(ledger, "1", by=BOB)
    request(ledger, "2", by=BOB, undecided=("latency",))
    robert = person("Robert Müller", "password")
    for spelling in ("bob müller", " Bob  MU\u0308LLER "):
        with pytest.raises(
            DecisionRefused, match="(?i)Robert Müller is also bob +müller, who requested version 1 and cannot"
        ):
            approve(ledger, "1", robert, also=["robert", spelling])
        with pytest.raises(DecisionRefused, match="(?i)is also bob +müller, who requested version 2 and cannot sign"):
            except_(ledger, "2", "latency", by=robert, also=["robert", spelling])
    with pytest.raises(ConfigError, match="names nobody"):
        approve(ledger, "1", robert, also=["a\nb"])
    assert len(ledger.entries("m")) == 2
    # The row says who else they are, and says nothing where they are nobody else.
    assert approve(ledger, "1", ANN, also=["annie", "a@b.org", "ANN", "Annie"]).body["known_as"] == ["Annie", "a@b.org"]
    assert except_(ledger, "2", "latency", also=["annie"]).body["known_as"] == ["annie"]
    assert "known_as" not in approve(ledger, "2", ANN, also=["Ann"]).body


def test_machines_do_not_decide(ledger: Ledger) -> None:
    request(ledger, "1")
    for rule in (approval.approve, approval.reject):
        with pytest.raises(DecisionRefused, match="machines may request, only people decide"):
            rule("1", FLOW, "why not")
    with pytest.raises(DecisionRefused, match="only people decide"):
        approval.rollback(None, FLOW, "why not", leaving=1)


@pytest.mark.parametrize("name", ["", "  ", "flows/train", "a\nb", "x" * 129, "\u200b"])
def test_a_name_that_names_nobody_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--as"):
        person(name)


def test_a_decision_needs_a_reason(ledger: Ledger) -> None:
    request(ledger, "1")
    with pytest.raises(ConfigError, match="--reason"):
        approval.approve("1", ANN, "  ")


def test_an_approval_expires_and_can_be_given_again(ledger: Ledger) -> None:
    request(ledger, "1")
    approve(ledger, "1", days=0.000001)
    later = ledger.now() + DAY
    assert status(ledger, "1", later) == "expired"
    with pytest.raises(DecisionRefused, match="its approval by ann .* has expired; approve it again"):
        approval.promotable(ledger.entries("m"), "1", later)
    while status(ledger, "1") != "expired":
        pass
    with pytest.raises(DecisionRefused, match="expired"):
        promote(ledger, "1")
    approve(ledger, "1", BOB)
    promote(ledger, "1")


@pytest.mark.parametrize("days", [0, -1, 366, float("nan")])
def test_an_approval_has_a_sane_length(days: float) -> None:
    with pytest.raises(ConfigError, match="days"):
        approval.approve("1", ANN, "why", days=days)


def test_a_decision_is_made_once(ledger: Ledger) -> None:
    request(ledger, "1")
    approve(ledger, "1")
    with pytest.raises(DecisionRefused, match="it was approved by ann"):
        approve(ledger, "1", BOB)
    with pytest.raises(DecisionRefused, match="--withdraw"):
        reject(ledger, "1")
    reject(ledger, "1", withdraw=True)
    assert status(ledger, "1") == "rejected"
    with pytest.raises(DecisionRefused, match="it was rejected by Bob Müller"):
        approve(ledger, "1")
    with pytest.raises(DecisionRefused, match="rejected"):
        promote(ledger, "1")


def test_what_is_not_approved_is_not_promoted(ledger: Ledger) -> None:
    request(ledger, "1")
    with pytest.raises(DecisionRefused, match="waits for a person's approval"):
        promote(ledger, "1")
    with pytest.raises(UnknownName, match="valid: 1"):
        promote(ledger, "7")
    approve(ledger, "1")
    with pytest.raises(DecisionRefused, match="release other is not the one"):
        ledger.decide(model="m", actor=FLOW, rule=approval.promote("1", "other"))
    assert ledger.champion("m") is None


def test_an_approval_for_other_digests_is_void(ledger: Ledger) -> None:
    requested = request(ledger, "1")
    body = {**requested.body, "bound": {**requested.body["bound"], "data": "other"}}
    body |= {"requested_seq": requested.seq, "reason": "r", "expires_at": (ledger.now() + DAY).isoformat()}
    ledger.append("approved", model="m", subject="s", actor=ANN, body=body, key="forged")
    with pytest.raises(DecisionRefused, match="it is void"):
        promote(ledger, "1")


def test_an_approval_row_of_a_machine_or_of_the_requester_is_void(ledger: Ledger) -> None:
    """Whoever writes into the database past the rules still promotes nothing."""
    for version, by, known_as in (("1", FLOW, []), ("2", BOB, []), ("3", ANN, ["BOB  müller"])):
        requested = request(ledger, version, by=BOB)
        body = {**requested.body, "reason": "r", "expires_at": (ledger.now() + DAY).isoformat(), "known_as": known_as}
        ledger.append("approved", model="m", subject="s", actor=by, body=body, key=f"forged {version}")
        with pytest.raises(DecisionRefused, match="not approved by a second person"):
            promote(ledger, version)


def test_evidence_against_another_champion_is_stale(ledger: Ledger) -> None:
    request(ledger, "1")
    request(ledger, "2")
    approve(ledger, "1")
    approve(ledger, "2")
    promote(ledger, "1")
    with pytest.raises(DecisionRefused, match="judged against no champion, but now version 1 is champion.*stale"):
        promote(ledger, "2")
    request(ledger, "3")
    with pytest.raises(DecisionRefused, match="stale"):
        approve(ledger, "3")


def test_a_repeated_promotion_is_one_row(ledger: Ledger) -> None:
    reign(ledger, "1")
    assert promote(ledger, "1") == ledger.champion("m")
    assert [e.kind for e in ledger.entries("m")].count("promoted") == 1


def test_rolling_back_goes_back_and_not_forth(ledger: Ledger) -> None:
    with pytest.raises(DecisionRefused, match="no champion to roll back from"):
        rollback(ledger)
    reign(ledger, "1")
    with pytest.raises(DecisionRefused, match="there is no earlier champion to go back to; promoted so far: 1"):
        rollback(ledger)
    reign(ledger, "2", "3")
    assert rollback(ledger).body["version"] == "2"
    assert rollback(ledger).body["version"] == "1"
    with pytest.raises(DecisionRefused, match="no champion before this one"):
        rollback(ledger)
    assert rollback(ledger, "3").body["version"] == "3"
    with pytest.raises(DecisionRefused, match="no version 9 among the earlier champions.*promoted so far: 1, 2, 3"):
        rollback(ledger, "9")
    with pytest.raises(DecisionRefused, match="version 3 is champion already"):
        rollback(ledger, "3")
    assert ledger.champion("m").body["release"] == "release 3"  # type: ignore[union-attr]


def test_what_a_rollback_left_is_promoted_again_only_by_a_new_approval(ledger: Ledger) -> None:
    reign(ledger, "1", "2")
    back = rollback(ledger)
    with pytest.raises(DecisionRefused, match="`visionloop rollback --to 2` .*or `visionloop approve 2` approves it anew"):
        promote(ledger, "2")
    again = approve(ledger, "2", BOB, shown=["what was rejected"])
    assert (again.body["after_rollback"], again.body["shown"]) == (back.seq, ["what was rejected"])
    assert status(ledger, "2") == "approved"
    promote(ledger, "2")
    assert status(ledger, "2") == "champion"
    assert rollback(ledger).body["version"] == "1"
    # With another champion its evidence compares with nothing of today's: the refusal names the ways that there are.
    reign(ledger, "3")
    with pytest.raises(
        DecisionRefused, match="stale. Run the training again.*go back to it with `visionloop rollback --to 2`"
    ):
        approve(ledger, "2")


def test_what_was_rolled_back_from_is_never_what_a_rollback_goes_to(ledger: Ledger) -> None:
    reign(ledger, "1", "2", "3")
    assert rollback(ledger).body["version"] == "2"
    reign(ledger, "4")
    assert rollback(ledger).body["version"] == "2"  # not 3, the last one promoted before 4
    assert rollback(ledger).body["version"] == "1"
    reign(ledger, "5")
    assert rollback(ledger).body["version"] == "1"
    with pytest.raises(DecisionRefused, match="no champion before this one"):
        rollback(ledger)
    # Champion after all: what served before it was not left, what was left stays left.
    assert rollback(ledger, "4").body["version"] == "4"
    assert rollback(ledger).body["version"] == "1"
    reign(ledger, "6", "7", "8")
    assert rollback(ledger, "6").body["version"] == "6"
    assert rollback(ledger).body["version"] == "1"


def test_of_two_rollbacks_at_once_one_happens(ledger: Ledger) -> None:
    reign(ledger, "1", "2", "3")
    seen = ledger.champion("m")
    assert seen is not None
    rollback(ledger, leaving=seen.seq)
    with pytest.raises(DecisionRefused, match="the champion changed meanwhile: it is version 2, by ann"):
        rollback(ledger, leaving=seen.seq)


def race(*actions: Any) -> list[str]:
    def attempt(action: Any) -> str:
        try:
            action()
        except VisionloopError as error:
            return type(error).__name__
        return "done"

    with ThreadPoolExecutor(len(actions)) as pool:
        return list(pool.map(attempt, actions))


@pytest.mark.parametrize("attempt", range(4))
def test_of_racing_deciders_exactly_one_wins(ledger: Ledger, attempt: int) -> None:
    url = ledger.url
    for version in ("1", "2", "3"):
        request(ledger, version)
    outcome = race(lambda: approve(Ledger(url), "1", ANN), lambda: approve(Ledger(url), "1", BOB))
    assert sorted(outcome) == ["DecisionRefused", "done"]
    outcome = race(lambda: approve(Ledger(url), "2", ANN), lambda: reject(Ledger(url), "2", BOB))
    assert sorted(outcome) == ["DecisionRefused", "done"]
    approve(ledger, "3")
    if status(ledger, "2") == "rejected":
        assert len([e for e in ledger.entries("m") if e.body["version"] == "2" and e.kind == "approved"]) == 0
    outcome = race(*[lambda v=v: promote(Ledger(url), v) for v in ("1", "3")])
    assert sorted(outcome) == ["DecisionRefused", "done"]
    assert [e.kind for e in ledger.entries("m")].count("promoted") == 1


GATES = ("latency", "no_regression")


def test_the_way_of_an_undecided_version(ledger: Ledger) -> None:
    requested = request(ledger, "1", undecided=GATES)
    assert status(ledger, "1") == "undecided"
    with pytest.raises(DecisionRefused, match="visionloop except 1 --gate latency --gate no_regression --as WHO"):
        approve(ledger, "1")
    signed = except_(ledger, "1", "no_regression", by=BOB)
    assert (signed.kind, signed.subject) == ("excepted", requested.subject)
    assert (signed.body["gates"], signed.body["bound"]) == (["no_regression"], requested.body["bound"])
    assert (signed.body["manifest_sha256"], signed.body["reason"]) == ("manifest 1", "looked at the images")
    # One of two is not enough, and the command names what is left.
    assert status(ledger, "1") == "undecided"
    with pytest.raises(DecisionRefused, match="undecided: latency did not .* except 1 --gate latency --as WHO"):
        approve(ledger, "1")
    with pytest.raises(DecisionRefused, match="cannot be promoted: latency did not decide"):
        promote(ledger, "1")
    other = except_(ledger, "1", "latency")
    assert status(ledger, "1") == "waiting"
    approved = approve(ledger, "1")  # who signed an exception may approve as well
    assert approved.body["exceptions"] == {"latency": other.seq, "no_regression": signed.seq}
    assert promote(ledger, "1").body["version"] == "1"
    entries = ledger.entries("m")
    assert approval.exceptions_of(entries, approved) == {"latency": other, "no_regression": signed}


def test_bad_exceptions_are_refused_and_leave_no_row(ledger: Ledger) -> None:
    request(ledger, "1", by=BOB, undecided=GATES)
    request(ledger, "2")
    with pytest.raises(DecisionRefused, match="requested version 1 and cannot sign an exception"):
        except_(ledger, "1", "latency", by=person("bob müller"))
    with pytest.raises(DecisionRefused, match="machine"):
        except_(ledger, "1", "latency", by=FLOW)
    for gate in ("accuracy", "nonsense", "parity"):
        with pytest.raises(UnknownName, match=f"undecided gate of version 1 '{gate}'; valid: latency, no_regression"):
            except_(ledger, "1", "latency", gate)
    with pytest.raises(DecisionRefused, match="version 2 passed every gate"):
        except_(ledger, "2", "latency")
    with pytest.raises(UnknownName, match="version '3'; valid: 1, 2"):
        except_(ledger, "3", "latency")
    with pytest.raises(ConfigError, match="--gate"):
        except_(ledger, "1")
    with pytest.raises(ConfigError, match="--reason"):
        approval.except_gates("1", ANN, ["latency"], "  ")
    for days in (0.0, 366.0, float("nan")):
        with pytest.raises(ConfigError, match="365 days"):
            except_(ledger, "1", "latency", days=days)
    assert [entry.kind for entry in ledger.entries("m")] == ["requested", "requested"]
    except_(ledger, "1", "latency")
    with pytest.raises(DecisionRefused, match="latency of version 1 is excepted already by ann until .* row 3"):
        except_(ledger, "1", "no_regression", "latency", by=person("carol"))
    reject(ledger, "1", by=ANN)
    with pytest.raises(DecisionRefused, match="cannot be excepted: it was rejected"):
        except_(ledger, "1", "no_regression")
    assert [entry.kind for entry in ledger.entries("m")] == ["requested", "requested", "excepted", "rejected"]


def test_an_exception_expires_and_takes_the_approval_with_it(ledger: Ledger) -> None:
    request(ledger, "1", undecided=GATES)
    first = except_(ledger, "1", "latency", days=1)
    except_(ledger, "1", "no_regression", days=3)
    approved = approve(ledger, "1", days=30)
    assert approved.body["expires_at"] == first.body["expires_at"]
    entries, later = ledger.entries("m"), ledger.now() + 2 * DAY
    assert approval.state_of(entries, "1", later).status == "expired"
    assert approval.state_of(entries, "1", later).missing == ("latency",)
    with pytest.raises(DecisionRefused, match="expired"):
        approval.promotable(entries, "1", later)
    with pytest.raises(DecisionRefused, match="--gate latency --as WHO"):
        approval.approve("1", ANN, "again")(entries, later)
    draft = approval.except_gates("1", ANN, ["latency"], "still fine")(entries, later)
    assert draft.body["gates"] == ["latency"]


def test_an_exception_against_another_champion_is_stale(ledger: Ledger) -> None:
    request(ledger, "1", undecided=GATES)
    reign(ledger, "2")
    with pytest.raises(DecisionRefused, match="its evidence is stale"):
        except_(ledger, "1", "latency")


@pytest.mark.parametrize(
    ("change", "actor"),
    [
        ({"bound": {"data": "other"}}, ANN),
        ({"manifest_sha256": "other"}, ANN),
        ({"gates": ["latency"]}, ANN),
        ({"known_as": ["BOB  müller"]}, ANN),
        ({}, BOB),
        ({}, FLOW),
    ],
)
def test_a_promotion_looks_at_the_exceptions_again(ledger: Ledger, change: dict[str, Any], actor: Principal) -> None:
    """Rows that no rule would write, as somebody with access to the database could."""
    request(ledger, "1", by=BOB, undecided=("no_regression",))
    entries = ledger.entries("m")
    body = dict(approval.except_gates("1", ANN, ["no_regression"], "fine")(entries, ledger.now()).body) | change
    signed = ledger.append("excepted", model="m", subject="candidate 1", actor=actor, body=body, key="forged")
    rule = approval.approve("1", ANN, "fine")
    try:
        draft = dict(rule(ledger.entries("m"), ledger.now()).body)
    except DecisionRefused:  # no valid exception for this gate: then the approval is forged as well
        bound = entries[0].body["bound"]
        expires = (ledger.now() + DAY).isoformat()
        draft = {"version": "1", "bound": bound, "manifest_sha256": "manifest 1", "reason": "fine", "expires_at": expires}
    draft["exceptions"] = {"no_regression": signed.seq}
    ledger.append("approved", model="m", subject="candidate 1", actor=ANN, body=draft, key="approved")
    with pytest.raises(DecisionRefused, match="rests on no exception of a second person for no_regression"):
        promote(ledger, "1")


def test_of_two_who_except_the_same_gate_at_once_one_does(ledger: Ledger) -> None:
    request(ledger, "1", undecided=GATES)
    url = ledger.url
    outcome = race(
        lambda: except_(Ledger(url), "1", "latency", by=ANN), lambda: except_(Ledger(url), "1", "latency", by=BOB)
    )
    assert sorted(outcome) == ["DecisionRefused", "done"]
    assert [entry.kind for entry in ledger.entries("m")].count("excepted") == 1


def _told_row_by_row(entries: list[Entry], version: str, now: datetime.datetime) -> tuple[Any, ...]:
    """What of a state depends on other rows of its version, in as few words as it can be said."""
    requested = [e for e in entries if e.kind == "requested" and e.body["version"] == version][-1]
    later = [e for e in entries if e.seq > requested.seq and e.body.get("version") == version]
    left = None
    for move in (e for e in entries if e.kind in ("promoted", "rolled_back")):
        if move.body["version"] == version:
            left = None
        elif (move.body["previous"] or {}).get("version") == version:
            left = move if move.kind == "rolled_back" else None
    return (
        requested,
        next((e for e in reversed(later) if e.kind in ("approved", "rejected")), None),
        next((e for e in reversed(later) if e.kind == "promoted"), None),
        left,
        {g: e for e in later if e.kind == "excepted" and e.body["expires_at"] > now.isoformat() for g in e.body["gates"]},
    )


class _Counted(list[Entry]):
    """Rows that count how often they are gone through."""

    passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return super().__iter__()


def _random_rows(seed: int, num_rows: int, versions: Sequence[str], now: datetime.datetime) -> _Counted:
    """Rows in any order, also in those that no rule allows."""
    rng, rows = random.Random(seed), _Counted()
    for seq in range(1, num_rows + 1):
        kind = rng.choice(["requested", "requested", "excepted", "rejected", "approved", "promoted", "rolled_back"])
        body: dict[str, Any] = {"version": rng.choice(versions), "gates": rng.sample("ab", rng.randint(1, 2))}
        body |= {"previous": rng.choice([None, {"version": rng.choice(versions)}]), "undecided": rng.sample("ab", 1)}
        body |= {"expires_at": (now + rng.choice([-DAY, DAY])).isoformat()}
        if kind == "rejected" and rng.random() < 0.3:
            del body["version"]  # by the gates
        facts = {"at": "", "model": "m", "subject": "s", "actor": ANN, "previous": "", "hash": "", "key": str(seq)}
        rows.append(Entry.model_validate({"seq": seq, "kind": kind, "body": body, **facts}))
    return rows


def test_all_states_are_found_in_few_passes_and_as_one_by_one() -> None:
    now = datetime.datetime.now(datetime.UTC)
    seen = 0
    for seed in range(150):
        rows = _random_rows(seed, seed % 40, "123456"[: 2 + seed % 4], now)
        found = {state.version: state for state in approval.states(rows, now)}
        for version, state in found.items():
            facts = (state.requested, state.decision, state.promoted, state.left, state.exceptions)
            assert facts == _told_row_by_row(rows, version, now)
            assert approval.state_of(rows, version, now) == state
            seen += state.left is not None
    assert seen > 20
    passes = {}
    for num_versions in (5, 300):
        rows = _random_rows(1, 900, [str(number) for number in range(num_versions)], now)
        assert len(approval.states(rows, now)) > 200
        passes[num_versions] = rows.passes
    assert passes[5] == passes[300] < 10


def test_who_served_at_a_moment(ledger: Ledger) -> None:
    before = ledger.now()
    reign(ledger, "1", "2")
    moves = [e for e in ledger.entries("m") if e.kind == "promoted"]
    assert approval.served_at(ledger.entries("m"), before) is None
    between = datetime.datetime.fromisoformat(moves[1].at) - datetime.timedelta(microseconds=1)
    for moment, expected in ((between, "1"), (ledger.now() + DAY, "2")):
        served = approval.served_at(ledger.entries("m"), moment)
        assert served is not None
        assert served.body["version"] == expected


def test_a_clock_that_is_set_back_does_not_reorder_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    reign(ledger, "1")
    monkeypatch.setattr("registry.ledger.now", lambda connection: now(connection) - datetime.timedelta(hours=1))
    request(ledger, "2", champion="engine 1")
    approve(ledger, "2")
    promote(ledger, "2")
    times = [entry.at for entry in ledger.entries("m")]
    assert times == sorted(times)
    served = approval.served_at(ledger.entries("m"), datetime.datetime.fromisoformat(times[-1]))
    assert served is not None
    assert served.body["version"] == "2"
