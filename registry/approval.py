"""The rules of approval: pure functions from ledger rows to what may follow.

A candidate is requested by a machine or a person, decided once by another person, and promoted once. An approval names
the digests of everything it was given for (data, split, weights, every engine, gate policy, evidence, release, the
champion it was compared with) and expires. A version that some gates did not decide on is undecided until somebody who did
not ask for it has signed an exception for each of them, bound to the same digests; an approval rests on these, and ends with
the first of them. Nothing here reads a clock, a file or a database: `Ledger.decide` calls these inside its transaction.
"""

from __future__ import annotations

import datetime
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from components.contracts.errors import ConfigError, DecisionRefused, UnknownName
from components.contracts.wording import shown_utc
from registry.ledger import Draft, Entry, Principal, Rule

Status = Literal["undecided", "waiting", "approved", "expired", "rejected", "champion", "retired"]
MAX_NAME = 128
APPROVAL_DAYS = 7.0
EXCEPTION_DAYS = 7.0


@dataclass(frozen=True)
class State:
    """Where a requested version stands, as the ledger tells it."""

    version: str
    requested: Entry
    decision: Entry | None
    """The latest approval or rejection by a person."""
    promoted: Entry | None
    status: Status
    left: Entry | None = None
    """The rollback that went back from it, where that is the last thing that happened to it as champion."""
    undecided: tuple[str, ...] = ()
    """The gates that did not decide on it; none of a candidate, which passed them all."""
    exceptions: Mapping[str, Entry] = field(default_factory=dict)
    """By gate, the exception for it that was signed last and is valid now."""

    @property
    def missing(self) -> tuple[str, ...]:
        """The undecided gates for which no valid exception is signed."""
        return tuple(gate for gate in self.undecided if gate not in self.exceptions)

    @property
    def expires_at(self) -> datetime.datetime | None:
        if self.decision is None or self.decision.kind != "approved":
            return None
        return datetime.datetime.fromisoformat(self.decision.body["expires_at"])


def person(name: str, method: Literal["declared", "token", "password", "oidc"] = "declared") -> Principal:
    """The Principal of a person's name; raises ConfigError for one that names nobody."""
    return Principal(name=checked_name(name, "--as"), method=method)


def checked_name(name: str, what: str) -> str:
    """A person's name as it is kept; raises ConfigError, which calls it `what`, for one that names nobody."""
    shown = unicodedata.normalize("NFKC", name).strip()
    if not shown or len(shown) > MAX_NAME or not shown.isprintable():
        raise ConfigError(
            f"{what} {name[: 2 * MAX_NAME]!r} names nobody; give a name of at most {MAX_NAME} printable characters"
        )
    if "/" in shown:
        raise ConfigError(f"{what} {name!r}: names with '/' belong to flows; give the name of a person")
    return shown


def plain_name(name: str) -> str:
    """What two spellings of one name have in common, whatever their case, Unicode form and white space."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return " ".join(folded.split())


def same_person(one: Principal, other: Principal) -> bool:
    """Whether two principals are one: names differ neither by case nor by Unicode spelling."""
    return plain_name(one.name) == plain_name(other.name)


def _names(entry: Entry) -> dict[str, str]:
    """The names of whoever a row is by, as they are compared and as they are shown."""
    return _compared([entry.actor.name, *entry.body.get("known_as", ())])


def _compared(names: Sequence[str]) -> dict[str, str]:
    return {plain_name(name): name for name in names}


def _expect_second(by: Principal, known_as: Sequence[str], requested: Entry, what: str) -> None:
    """Raise DecisionRefused when who decides asked for it, under this name or another one of theirs."""
    asked = _names(requested)
    if plain_name(by.name) in asked:
        raise DecisionRefused(f"{by.name} requested {what}: a second person has to")
    for plain, name in _compared(known_as).items():
        if plain in asked:
            raise DecisionRefused(f"{by.name} is also {name}, who requested {what}: a second person has to")


def _known_as(by: Principal, also: Sequence[str]) -> list[str]:
    """The other names of who decides, each once; raises ConfigError for one that names nobody."""
    names = _compared([checked_name(name, "also") for name in also])
    return sorted(name for plain, name in names.items() if plain != plain_name(by.name))


def champion(entries: Sequence[Entry]) -> Entry | None:
    """The row that made today's champion of these rows of one model."""
    moves = [entry for entry in entries if entry.kind in ("promoted", "rolled_back")]
    return moves[-1] if moves else None


def served_at(entries: Sequence[Entry], moment: datetime.datetime) -> Entry | None:
    """The row that was in force at a moment."""
    moves = [
        entry
        for entry in entries
        if entry.kind in ("promoted", "rolled_back") and datetime.datetime.fromisoformat(entry.at) <= moment
    ]
    return moves[-1] if moves else None


def compared_with(entries: Sequence[Entry], requested: Entry) -> Entry | None:
    """The row that made the champion with which a request's evidence compares; None where there was none.

    Two versions may share an engine, so the champion of the time of the request goes before others with the same one.
    """
    engine = requested.body["bound"].get("champion", "none")
    earlier = [entry for entry in entries if entry.kind in ("promoted", "rolled_back") and entry.seq < requested.seq]
    found = [entry for entry in earlier if entry.body.get("engine") == engine]
    return found[-1] if found else None


def states(entries: Sequence[Entry], now: datetime.datetime) -> list[State]:
    """Every requested version in order."""
    current, left = champion(entries), _left(entries)
    rows: dict[str, list[Entry]] = {}
    for entry in entries:
        if "version" in entry.body:
            rows.setdefault(str(entry.body["version"]), []).append(entry)
    requests = [(str(entry.body["version"]), entry) for entry in entries if entry.kind == "requested"]
    return [_state(requested, rows[version], current, left.get(version), now) for version, requested in requests]


def _state(
    requested: Entry, rows: Sequence[Entry], current: Entry | None, left: Entry | None, now: datetime.datetime
) -> State:
    """Where a requested version stands, from the rows that name it and the champion's."""
    version = str(requested.body["version"])
    later = [entry for entry in rows if entry.seq > requested.seq]
    decisions = [entry for entry in later if entry.kind in ("approved", "rejected")]
    promotions = [entry for entry in later if entry.kind == "promoted"]
    decision = decisions[-1] if decisions else None
    promoted = promotions[-1] if promotions else None
    undecided = tuple(requested.body.get("undecided", ()))
    exceptions = _exceptions(later, now)
    status = _status(decision, promoted, current, version, now)
    if status == "waiting" and not exceptions.keys() >= set(undecided):
        status = "undecided"
    return State(version, requested, decision, promoted, status, left, undecided, exceptions)


def _exceptions(later: Sequence[Entry], now: datetime.datetime) -> dict[str, Entry]:
    """The exceptions among a version's rows that are valid now, by gate."""
    return {
        gate: entry
        for entry in later
        if entry.kind == "excepted" and now < datetime.datetime.fromisoformat(entry.body["expires_at"])
        for gate in entry.body["gates"]
    }


def _left(entries: Sequence[Entry]) -> dict[str, Entry | None]:
    """By version, the rollback that took the championship from it, unless it was champion again since."""
    left: dict[str, Entry | None] = {}
    for move in entries:
        if move.kind in ("promoted", "rolled_back"):
            if previous := move.body.get("previous"):
                left[str(previous["version"])] = move if move.kind == "rolled_back" else None
            left[str(move.body["version"])] = None
    return left


def _status(
    decision: Entry | None, promoted: Entry | None, current: Entry | None, version: str, now: datetime.datetime
) -> Status:
    if current is not None and current.body["version"] == version:
        return "champion"
    if promoted is not None and (decision is None or decision.seq < promoted.seq):
        return "retired"
    if decision is None:
        return "waiting"
    if decision.kind == "rejected":
        return "rejected"
    return "approved" if now < datetime.datetime.fromisoformat(decision.body["expires_at"]) else "expired"


def state_of(entries: Sequence[Entry], version: str, now: datetime.datetime) -> State:
    """The state of one version; raises UnknownName listing the requested ones."""
    requests = [entry for entry in entries if entry.kind == "requested"]
    asked = [entry for entry in requests if str(entry.body["version"]) == version]
    if not asked:
        raise UnknownName("version", version, sorted({str(entry.body["version"]) for entry in requests}))
    rows = [entry for entry in entries if "version" in entry.body and str(entry.body["version"]) == version]
    return _state(asked[-1], rows, champion(entries), _left(entries).get(version), now)


def except_gates(
    version: str,
    by: Principal,
    gates: Sequence[str],
    reason: str,
    *,
    days: float = EXCEPTION_DAYS,
    also: Sequence[str] = (),
) -> Rule:
    """A person answers for gates that did not decide on a version, by its digests; that approves nothing yet.

    The same person may approve it afterwards; nobody who asked for the training can do either, under this name or one of
    `also`.
    """
    _expect_person(by)
    reason, known_as = _expect_reason(reason), _known_as(by, also)
    if not gates:
        raise ConfigError("name at least one gate with --gate")
    if not 0 < days <= 365:
        raise ConfigError(f"an exception is valid for more than 0 and at most 365 days, not {days:g}")
    wanted = sorted(set(gates))

    def rule(entries: Sequence[Entry], now: datetime.datetime) -> Draft:
        state = state_of(entries, version, now)
        if not state.undecided:
            raise DecisionRefused(f"version {version} passed every gate that decides: there is nothing to except")
        for gate in wanted:
            if gate not in state.undecided:
                raise UnknownName(f"undecided gate of version {version}", gate, list(state.undecided))
        _expect(state, ("undecided", "waiting", "expired", "retired"), "excepted")
        _expect_second(by, known_as, state.requested, f"version {version} and cannot sign an exception for it")
        for gate in wanted:
            if (signed := state.exceptions.get(gate)) is not None:
                raise DecisionRefused(
                    f"{gate} of version {version} is excepted already by {signed.actor.name} until "
                    f"{shown_utc(signed.body['expires_at'])} (ledger row {signed.seq})"
                )
        _expect_fresh(entries, state)
        body = {
            "version": version,
            "requested_seq": state.requested.seq,
            "gates": wanted,
            "bound": state.requested.body["bound"],
            "manifest_sha256": state.requested.body["manifest_sha256"],
            "reason": reason,
            "expires_at": (now + datetime.timedelta(days=days)).isoformat(timespec="microseconds"),
        }
        if known_as:
            body["known_as"] = known_as
        earlier = max((entry.seq for entry in entries if entry.body.get("version") == version), default=0)
        return Draft("excepted", state.requested.subject, body, f"excepted:{state.requested.seq}:{earlier}")

    return rule


def approve(
    version: str,
    by: Principal,
    reason: str,
    *,
    days: float = APPROVAL_DAYS,
    shown: Sequence[str] = (),
    also: Sequence[str] = (),
) -> Rule:
    """A person approves a waiting candidate, for everything it is made of as it was requested.

    So is approved anew what was champion before, with evidence that still compares with today's champion: what a rollback
    left may be right after all, but that is decided by a person again, and the row names the rollback. `shown` is what the
    person was told beforehand of policy and past, `also` are other names of theirs: who asked for the training under one of
    them cannot approve it.
    """
    _expect_person(by)
    reason, known_as = _expect_reason(reason), _known_as(by, also)
    if not 0 < days <= 365:
        raise ConfigError(f"an approval is valid for more than 0 and at most 365 days, not {days:g}")

    def rule(entries: Sequence[Entry], now: datetime.datetime) -> Draft:
        state = state_of(entries, version, now)
        if state.missing and state.status in ("undecided", "expired", "retired"):
            raise DecisionRefused(
                f"version {version} is undecided: {', '.join(state.missing)} did not decide on it. It can be approved once "
                f"each of them is excepted: {exception_command(state)}"
            )
        _expect(state, ("waiting", "expired", "retired"), "approved")
        _expect_second(by, known_as, state.requested, f"version {version} and cannot approve it")
        _expect_fresh(entries, state)
        # It rests on the exceptions: without the first that ends there is no approval.
        ends = [datetime.datetime.fromisoformat(entry.body["expires_at"]) for entry in state.exceptions.values()]
        body = {
            "version": version,
            "requested_seq": state.requested.seq,
            "bound": state.requested.body["bound"],
            "manifest_sha256": state.requested.body["manifest_sha256"],
            "reason": reason,
            "expires_at": min([now + datetime.timedelta(days=days), *ends]).isoformat(timespec="microseconds"),
        }
        if state.undecided:
            body["exceptions"] = {gate: state.exceptions[gate].seq for gate in state.undecided}
        if shown:
            body["shown"] = list(shown)
        if known_as:
            body["known_as"] = known_as
        if state.left is not None:
            body["after_rollback"] = state.left.seq
        earlier = state.decision.seq if state.decision else 0
        return Draft("approved", state.requested.subject, body, f"decision:{state.requested.seq}:{earlier}")

    return rule


def exception_command(state: State) -> str:
    """What signs an exception for each gate of a version that has none."""
    gates = " ".join(f"--gate {gate}" for gate in state.missing)
    return f'visionloop except {state.version} {gates} --as WHO --reason "..."'


def reject(version: str, by: Principal, reason: str, *, withdraw: bool = False) -> Rule:
    """A person rejects a candidate; one that is approved already only by `withdraw`."""
    _expect_person(by)
    reason = _expect_reason(reason)

    def rule(entries: Sequence[Entry], now: datetime.datetime) -> Draft:
        state = state_of(entries, version, now)
        open_: tuple[Status, ...] = ("undecided", "waiting", "expired")
        _expect(state, (*open_, "approved") if withdraw else open_, "rejected")
        earlier = state.decision.seq if state.decision else 0
        body = {"version": version, "requested_seq": state.requested.seq, "reason": reason}
        return Draft("rejected", state.requested.subject, body, f"decision:{state.requested.seq}:{earlier}")

    return rule


def promotable(entries: Sequence[Entry], version: str, now: datetime.datetime) -> tuple[State, Entry]:
    """The state and the valid approval of a version that may be promoted now; raises DecisionRefused."""
    state = state_of(entries, version, now)
    _expect(state, ("approved",), "promoted")
    approval = state.decision
    assert approval is not None
    for name in ("bound", "manifest_sha256"):
        if approval.body[name] != state.requested.body[name]:
            raise DecisionRefused(f"the approval of version {version} is for other digests than were requested; it is void")
    if _names(approval).keys() & _names(state.requested) or approval.actor.method == "machine":
        raise DecisionRefused(f"version {version} was not approved by a second person; it is void")
    _expect_excepted(entries, state, approval)
    _expect_fresh(entries, state)
    return state, approval


def exceptions_of(entries: Sequence[Entry], approval: Entry) -> dict[str, Entry]:
    """The exceptions that an approval rests on, by gate; none where the version passed every gate."""
    rows = {entry.seq: entry for entry in entries}
    return {gate: rows[seq] for gate, seq in approval.body.get("exceptions", {}).items() if seq in rows}


def _expect_excepted(entries: Sequence[Entry], state: State, approval: Entry) -> None:
    """Raise DecisionRefused unless the approval rests on a second person's exception for each undecided gate."""
    found = exceptions_of(entries, approval)
    for gate in state.undecided:
        signed = found.get(gate)
        whole = (
            signed is not None
            and signed.kind == "excepted"
            and signed.seq < approval.seq
            and gate in signed.body["gates"]
            and all(signed.body[name] == state.requested.body[name] for name in ("bound", "manifest_sha256"))
            and signed.actor.method != "machine"
            and not _names(signed).keys() & _names(state.requested)
        )
        if not whole:
            raise DecisionRefused(
                f"the approval of version {state.version} rests on no exception of a second person for {gate}, which did "
                f"not decide on these digests; it is void"
            )


def promote(version: str, release: str) -> Rule:
    """The champion moves to an approved version. `release` is the digest that was published and read back."""

    def rule(entries: Sequence[Entry], now: datetime.datetime) -> Draft:
        current = champion(entries)
        if current is not None and current.kind == "promoted" and current.body["version"] == version:
            return Draft("promoted", current.subject, current.body, current.key)  # a repeated command
        state, approval = promotable(entries, version, now)
        bound = state.requested.body["bound"]
        if release != bound["release"]:
            raise DecisionRefused(f"release {release} is not the one that version {version} was approved with")
        body = {
            "version": version,
            "requested_seq": state.requested.seq,
            "approved_seq": approval.seq,
            "release": release,
            "engine": bound["engines"][bound["serving"]],
            "manifest_sha256": state.requested.body["manifest_sha256"],
            "previous": None if current is None else {"seq": current.seq, "version": current.body["version"]},
        }
        return Draft("promoted", state.requested.subject, body, f"promoted:{approval.seq}")

    return rule


def rollback(to: str | None, by: Principal, reason: str, *, leaving: int) -> Rule:
    """The champion moves back to a version that was champion before: the one before it, or `to`.

    `leaving` is the number of the row that the person saw in force: of two who roll back at once, one does.
    """
    _expect_person(by)
    reason = _expect_reason(reason)

    def rule(entries: Sequence[Entry], _: datetime.datetime) -> Draft:
        current = champion(entries)
        if current is None:
            raise DecisionRefused("there is no champion to roll back from")
        if current.seq != leaving:
            raise DecisionRefused(
                f"the champion changed meanwhile: it is version {current.body['version']}, by {current.actor.name}; "
                f"look at `visionloop history` and decide again"
            )
        target = rollback_target(entries, to)
        body = {
            "version": target.body["version"],
            "promoted_seq": target.seq,
            "release": target.body["release"],
            "engine": target.body["engine"],
            "manifest_sha256": target.body["manifest_sha256"],
            "previous": {"seq": current.seq, "version": current.body["version"]},
            "reason": reason,
        }
        return Draft("rolled_back", target.subject, body, f"rolled_back:{leaving}")

    return rule


def rollback_target(entries: Sequence[Entry], to: str | None) -> Entry:
    """The promotion that a rollback goes back to; raises DecisionRefused."""
    current = champion(entries)
    promotions = [entry for entry in entries if entry.kind == "promoted"]
    before = [entry for entry in promotions if current is None or entry.body["version"] != current.body["version"]]
    if current is not None and to == current.body["version"]:
        raise DecisionRefused(f"version {to} is champion already: there is nothing to go back from")
    if to is not None:
        before = [entry for entry in before if entry.body["version"] == to]
    if not before:
        known = sorted({str(entry.body["version"]) for entry in promotions}, key=_number)
        what = "no earlier champion" if to is None else f"no version {to} among the earlier champions"
        raise DecisionRefused(f"there is {what} to go back to; promoted so far: {', '.join(known) or '(none)'}")
    if to is not None or current is None:
        return before[-1]
    standing = _standing(entries)
    if len(standing) < 2:
        raise DecisionRefused("there is no champion before this one; name one that was promoted with --to")
    return standing[-2]


def _standing(entries: Sequence[Entry]) -> list[Entry]:
    """The promotions that nobody went back behind, in order; the champion's is the last."""
    promotions = {entry.seq: entry for entry in entries if entry.kind == "promoted"}
    standing: list[int] = []
    for move in entries:
        if move.kind == "promoted":
            standing.append(move.seq)
        elif move.kind == "rolled_back":
            to = move.body["promoted_seq"]
            # Back to one that stands: what came after it was left. To one that was left: it is champion after all.
            standing = standing[: standing.index(to) + 1] if to in standing else [*standing, to]
    return [promotions[seq] for seq in standing]


def _number(version: str) -> tuple[int, str]:
    return (int(version), "") if version.isdigit() else (0, version)


def _expect_person(by: Principal) -> None:
    if by.method == "machine":
        raise DecisionRefused(f"{by.name} is a machine; machines may request, only people decide")


def _expect_reason(reason: str) -> str:
    if not reason.strip():
        raise ConfigError("a decision needs a --reason that others can read later")
    if len(reason) > 2000:
        raise ConfigError("a --reason has at most 2000 characters")
    return reason.strip()


def _expect(state: State, allowed: tuple[Status, ...], wanted: str) -> None:
    if state.status in allowed:
        return
    decision = state.decision
    who = f" by {decision.actor.name} at {shown_utc(decision.at)}" if decision is not None else ""
    hints: dict[Status, str] = {
        "waiting": "it waits for a person's approval (visionloop approve)",
        "undecided": f"{', '.join(state.missing)} did not decide on it; {exception_command(state)} answers for that",
        "approved": f"it was approved{who}; `visionloop reject --withdraw` takes that back, `visionloop promote` uses it",
        "expired": f"its approval{who} has expired; approve it again",
        "rejected": f"it was rejected{who}: {decision.body['reason'] if decision else ''}",
        "champion": "it is the champion",
        "retired": f"it was champion before; `visionloop rollback --to {state.version}` makes it champion again at once, or "
        f"`visionloop approve {state.version}` approves it anew",
    }
    raise DecisionRefused(f"version {state.version} cannot be {wanted}: {hints[state.status]}")


def _expect_fresh(entries: Sequence[Entry], state: State) -> None:
    """The evidence compares with one champion; when another one is champion now, it proves nothing about it."""
    current = champion(entries)
    compared = state.requested.body["bound"].get("champion", "unknown")
    compared_with = "none" if current is None else current.body["engine"]
    if compared != compared_with:
        was = "no champion" if compared == "none" else f"champion engine {compared[:12]}"
        now = "there is none" if current is None else f"version {current.body['version']} is champion"
        back = (
            f", or go back to it with `visionloop rollback --to {state.version}`, which needs no approval"
            if state.promoted is not None
            else ""
        )
        raise DecisionRefused(
            f"version {state.version} was judged against {was}, but now {now}: its evidence is stale. "
            f"Run the training again; everything but the comparison comes from the store{back}"
        )
