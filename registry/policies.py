"""What a person who approves has to know: how gate policy and data differ from earlier ones, what these weights failed.

Pure functions of ledger rows. A policy is recorded in the summary of every request and rejection; rows written before that
have only its digest, and then it is said that the policies differ and not how.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from components.contracts.wording import shown_utc
from registry.ledger import Entry

_MOST_REJECTIONS = 3

Setting = tuple[str, str, str]
"""Engine, gate, and the setting's name; an empty name for the gate itself."""


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What of the policy `after` is not as in `before`, each with whether that is looser or tighter."""
    old, new = _settings(before), _settings(after)
    engines = [name for name in after["engines"] if name in before["engines"]]
    found: dict[tuple[str, str], list[str]] = {}
    for engine in engines:
        for gate, setting in sorted({key[1:] for key in (*old, *new) if key[0] == engine}):
            key = (engine, gate, setting)
            told = _change(gate, setting, key in old, key in new, old.get(key), new.get(key))
            # A gate that is added or dropped is one change, not one a setting.
            if told and (setting == "" or ((engine, gate, "") in old) == ((engine, gate, "") in new)):
                found.setdefault(told, []).append(engine)
    lines = [
        f"{what}{'' if len(of) == len(engines) else ' for ' + ', '.join(of)} ({direction})"
        for (what, direction), of in found.items()
    ]
    for name in engines:
        was, now = before["engines"][name]["required"], after["engines"][name]["required"]
        if was != now:
            lines.append(f"{name} is {'required now (tighter)' if now else 'no longer required (looser)'}")
    lines += [
        f"{name} is no longer built or judged ({'looser' if of['required'] else 'it was not required'})"
        for name, of in before["engines"].items()
        if name not in after["engines"]
    ]
    lines += [f"{name} is new" for name in after["engines"] if name not in before["engines"]]
    lines += _of_limits(before.get("limits"), after.get("limits"))
    if before["serving"] != after["serving"]:
        lines.append(f"it serves {after['serving']} instead of {before['serving']}")
    return lines


def _of_limits(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[str]:
    """What changed of the limits that the served engine is chosen within; None where the recipe names that engine."""
    if before is None and after is None:
        return []
    if after is None:
        return ["the recipe names the engine that is served, no limits choose it (changed)"]
    if before is None:
        told = ", ".join(f"{name} {_shown(value)}" for name, value in after.items() if value is not None)
        return [f"the engine that is served is chosen, no longer named, within the limits {told or '(none)'} (changed)"]
    lines = []
    for name in sorted({*before, *after}):
        was, now = before.get(name), after.get(name)
        if was != now:
            looser = now is None or (was is not None and now > was)
            both = ["unset" if value is None else _shown(value) for value in (was, now)]
            lines.append(f"limits.{name} {' -> '.join(both)} ({'looser' if looser else 'tighter'})")
    return lines


def notes(entries: Sequence[Entry], body: Mapping[str, Any], *, subject: str = "") -> list[str]:
    """What a person has to know of a candidate's policy, past and data, from the rows of its model.

    `body` is that of its request, `subject` its digest: its own rows are no past.
    """
    others = [entry for entry in entries if entry.subject != subject]
    own = next((entry.seq for entry in entries if entry.subject == subject), None)
    gated = [entry for entry in others if by_gates(entry) and (own is None or entry.seq < own)]
    found = []
    moves = [entry for entry in entries if entry.kind in ("promoted", "rolled_back")]
    if moves:
        version = moves[-1].body["version"]
        requests = [e for e in entries if e.kind == "requested" and str(e.body["version"]) == str(version)]
        found += _beside(f"the champion's (version {version})", requests[-1].body, body) if requests else []
    seen: set[str] = set()
    for entry in reversed(gated[-_MOST_REJECTIONS:]):
        digest = str(entry.body.get("bound", {}).get("policy"))
        if digest not in seen:
            seen.add(digest)
            found += _beside(f"that of {verb(entry)} of {shown_utc(entry.at)} (ledger row {entry.seq})", entry.body, body)
    found += [f"These weights before: {told}" for told in _rejections(others, body)]
    found += (body.get("summary") or {}).get("data_notes") or []
    return found


def exceptions_told(signed: Iterable[Entry]) -> list[str]:
    """What a reader is told of exceptions: for what, by whom, and why."""
    return [
        f"Excepted: {', '.join(entry.body['gates'])}, which did not decide, by {entry.actor.name} at {shown_utc(entry.at)} "
        f"(ledger row {entry.seq}): {entry.body['reason']}"
        for _, entry in sorted({entry.seq: entry for entry in signed}.items())
    ]


def by_gates(entry: Entry) -> bool:
    """Whether a row is the gates' rejection of a model, and not a person's of a version."""
    return entry.kind == "rejected" and "version" not in entry.body


def verb(entry: Entry) -> str:
    """What the gates' row is called: what did not decide was not rejected for what it is."""
    return "the undecided run" if entry.body.get("status") == "inconclusive" else "the rejection"


def same_account(one: Entry, other: Entry) -> str | None:
    """The operating-system account that made both rows, None where it was not one or is not known."""
    mine, theirs = one.body.get("account"), other.body.get("account")
    if not mine or not theirs or (mine["uid"], mine["host"]) != (theirs["uid"], theirs["host"]):
        return None
    logins = {account["login"] for account in (mine, theirs) if account.get("login")}
    return str(mine["user"]) if len(logins) < 2 else None


def account_note(decision: Entry, requested: Entry) -> str | None:
    """What a reader is told where the account that decided is the one that asked; None where it is not, or not known."""
    account = same_account(decision, requested)
    if account is None or decision.actor.method != "declared":
        return None
    did = "the training ran under" if requested.actor.method == "machine" else "also asked for the training"
    return (
        f"declared as {decision.actor.name} by the account that {did} ({account}): "
        f"nothing shows that a second person decided"
    )


def _beside(whose: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    if theirs.get("bound", {}).get("policy") == ours.get("bound", {}).get("policy"):
        return []
    before, after = (theirs.get("summary") or {}).get("policy"), (ours.get("summary") or {}).get("policy")
    if not before or not after:
        return [f"The gate policy is not {whose}; how it differs was not recorded then."]
    differs = changes(before, after)
    if not differs:
        return [f"The gate policy has the settings of {whose}, but the gates' own code changed since."]
    return [f"The gate policy is not {whose}: {'; '.join(differs)}."]


def _rejections(entries: Sequence[Entry], body: Mapping[str, Any]) -> list[str]:
    weights = body.get("bound", {}).get("weights")
    if not weights:
        return []
    requests = {str(e.body["version"]): e for e in entries if e.kind == "requested"}
    found = []
    for entry in entries:
        gates = entry.body.get("undecided") if entry.kind == "requested" else None
        if gates and entry.body.get("bound", {}).get("weights") == weights:
            as_version = f"undecided as version {entry.body['version']} at {shown_utc(entry.at)} (ledger row {entry.seq})"
            found.append(f"{as_version}: {', '.join(gates)}")
        if entry.kind != "rejected":
            continue
        if by_gates(entry):
            if entry.body.get("bound", {}).get("weights") == weights:
                why = "; ".join(entry.body.get("reasons", []))
                result = "undecided" if entry.body.get("status") == "inconclusive" else "rejected by the gates"
                found.append(f"{result} at {shown_utc(entry.at)} (ledger row {entry.seq}): {why}")
        else:
            of = requests.get(str(entry.body["version"]))
            if of is not None and of.body.get("bound", {}).get("weights") == weights:
                who = f"rejected by {entry.actor.name} as version {entry.body['version']}"
                found.append(f"{who} at {shown_utc(entry.at)} (ledger row {entry.seq}): {entry.body['reason']}")
    return found


def _settings(policy: Mapping[str, Any]) -> dict[Setting, Any]:
    """Every setting that an engine is judged by. A gate that judges an engine twice is numbered."""
    found: dict[Setting, Any] = {}
    for engine in policy["engines"]:
        count: dict[str, int] = {}
        for gate in policy["gates"]:
            if gate["engines"] and engine not in gate["engines"]:
                continue
            count[gate["gate"]] = count.get(gate["gate"], 0) + 1
            name = gate["gate"] if count[gate["gate"]] == 1 else f"{gate['gate']} #{count[gate['gate']]}"
            found[(engine, name, "")] = True
            found |= {(engine, name, path): value for path, value in _flat(gate["settings"])}
    return found


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in settings.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return found


def _change(gate: str, setting: str, was: bool, now: bool, old: Any, new: Any) -> tuple[str, str] | None:
    """What changed, and which way."""
    if setting == "":
        if was == now:
            return None
        return (f"{gate} judges", "tighter") if now else (f"{gate} no longer judges", "looser")
    if old == new:
        return None
    return f"{gate}.{setting} {_shown(old)} -> {_shown(new)}", _way(setting, old, new, named=was and now)


def _way(setting: str, old: Any, new: Any, *, named: bool) -> Literal["looser", "tighter", "changed"]:
    """`named` says that both policies have the setting: what one lacks, older code may have judged all the same.

    An entry of a setting by name, such as min_stability.flip, demands something where it is there and nothing where not.
    """
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (old, new))
    name = setting.split(".")[0]
    if name.startswith(("floor", "min", "max")) and (named or "." in setting) and (old is None or new is None):
        return "tighter" if old is None else "looser"
    if not numbers or not name.startswith(("floor", "min", "max", "margin")):
        return "changed"
    lower_is_looser = name.startswith(("floor", "min"))
    return "looser" if (new < old) == lower_is_looser else "tighter"


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    return f"{value:g}" if isinstance(value, float) else str(value)
