"""The registry on the command line: look, decide, go live, go back, and ask what happened."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components import garbage
from components.contracts.errors import VisionloopError
from components.contracts.wording import counted, shown_utc
from flows.cli.answers import HERE, AsJson, Commands, InWorkspace, finish, moment
from flows.terminal import figure

if TYPE_CHECKING:
    from flows.workspace.desk import Desk
    from registry.approval import State
    from registry.ledger import Entry, Principal, Rule

OfModel = Annotated[str | None, typer.Option("--model", "-m", help="The model; needed where the ledger knows several.")]
Version = Annotated[str, typer.Argument(help="Version of the model, as `visionloop candidates` lists it.")]
By = Annotated[str, typer.Option("--as", help="Your name, as others will read it; nobody checks it.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; others will read it.")]
ledger_app = Commands(help="The ledger: the append-only record of what was requested, decided and promoted.")
_METHODS = {"declared": " (name not verified)", "token": " (by token)", "oidc": " (signed in)", "machine": ""}
_STATUSES = {"inconclusive": "undecided"}
"""What is shown for a finding's status; machines get the status itself."""


def add_registry_commands(app: Commands) -> None:
    """Put the registry's commands on the command line."""
    for command in (candidates, show, approve, reject, promote, rollback, history, reconcile):
        app.command()(command)
    app.command("who-served")(who_served)
    app.add_typer(ledger_app, name="ledger")


def _desk(workspace: Path, model: str | None) -> Desk:
    from flows.workspace.desk import desk
    from flows.workspace.settings import prepare_environment
    from flows.workspace.workspace import Workspace

    # Before MLflow or Prefect is imported by anything.
    prepare_environment(Workspace.find(workspace).state)
    return desk(workspace, model)


def _told(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def candidates(
    every: Annotated[bool, typer.Option("--all", help="Also versions that were rejected, or champion before.")] = False,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Versions that wait for a decision or for their promotion, and the champion."""
    from registry import approval

    found = _desk(workspace, model)
    shown = [
        state
        for state in approval.states(found.ledger.entries(found.model), found.ledger.now())
        if every or state.status in ("waiting", "approved", "expired", "champion")
    ]
    lines = [f"{found.model}:"] + [_line(state) for state in shown]
    finish(
        {"model": found.model, "candidates": [_state_json(state) for state in shown]},
        json_,
        lambda: "\n".join(lines) if shown else f"{found.model}: nothing waits; `visionloop candidates --all` lists the past",
    )


def _line(state: State) -> str:
    accuracy = (state.requested.body.get("summary") or {}).get("metrics", {}).get("accuracy")
    shown = f"accuracy {figure(accuracy)}" if accuracy else ""
    return f"  version {state.version:>4}  {_status(state):42} {shown}  asked for by {state.requested.actor.name}"


def _status(state: State) -> str:
    if state.status == "approved" and state.decision is not None:
        return f"approved by {state.decision.actor.name} until {shown_utc(state.decision.body['expires_at'])}"
    if state.status == "waiting":
        return "waits for approval"
    if state.status in ("rejected", "expired") and state.decision is not None:
        verb = "rejected" if state.status == "rejected" else "approval expired, given"
        return f"{verb} by {state.decision.actor.name}"
    if state.status == "retired":
        return f"left by a rollback of {state.left.actor.name}" if state.left is not None else "was champion before"
    return state.status


def _state_json(state: State) -> dict[str, Any]:
    decision = state.decision
    return {
        "version": state.version,
        "status": state.status,
        "requested_by": state.requested.actor.name,
        "requested_at": state.requested.at,
        "decided_by": decision.actor.name if decision else None,
        "decided_at": decision.at if decision else None,
        "reason": decision.body.get("reason") if decision else None,
        "expires_at": decision.body.get("expires_at") if decision else None,
        "candidate_digest": state.requested.subject,
        "summary": state.requested.body.get("summary") or {},
    }


def show(version: Version, model: OfModel = None, workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """One version for the person who decides: the verdict in words, the champion beside it, what an approval is bound to."""
    from registry import approval
    from registry.policies import notes

    found = _desk(workspace, model)
    entries = found.ledger.entries(found.model)
    state = approval.state_of(entries, version, found.ledger.now())
    champion = approval.champion(entries)
    then = approval.compared_with(entries, state.requested)
    answer = _state_json(state) | {
        "model": found.model,
        "bound": state.requested.body["bound"],
        "champion_version": champion.body["version"] if champion else None,
        "compared_with": then.body["version"] if then else None,
        "notes": notes(entries, state.requested.body, subject=state.requested.subject),
        "same_account": _account_note(state),
        "report": _report(found, state),
    }
    finish(answer, json_, lambda: _page(state, champion, then, answer))


def _account_note(state: State) -> str | None:
    from registry.policies import account_note

    return account_note(state.decision, state.requested) if state.decision is not None else None


def _report(found: Desk, state: State) -> str | None:
    run = (state.requested.body.get("summary") or {}).get("run", "")
    path = found.workspace.runs / run / "report.html"
    return str(path) if run and path.is_file() else None


def _page(state: State, champion: Entry | None, then: Entry | None, answer: dict[str, Any]) -> str:
    summary, bound = state.requested.body.get("summary") or {}, state.requested.body["bound"]
    lines = [f"{answer['model']} version {state.version}: {_status(state)}", ""]
    if state.decision is not None:
        verb = "approved" if state.decision.kind == "approved" else "rejected"
        lines += [f"  {verb} by {_who(state.decision)} at {shown_utc(state.decision.at)}: {state.decision.body['reason']}"]
        lines += [f"  {answer['same_account']}"] if answer["same_account"] else []
        lines += [""]
    if state.left is not None:
        left = state.left
        lines += [
            f"  {left.actor.name} went back from it to version {left.body['version']} at {shown_utc(left.at)}: "
            f"{left.body['reason']}",
            "",
        ]
    if summary:
        lines += [
            f"It serves {summary['serving_engine']}, trained by recipe {summary['recipe']} on data version "
            f"{summary['data_version'][:12]} ({', '.join(f'{k} {v}' for k, v in summary['images'].items())}), "
            f"git {summary['git'][:12]}. Asked for: {summary.get('reason', 'manual')}.",
            "",
            *_beside(state, champion, then),
        ]
        worst = sorted(summary["recall"].items(), key=lambda item: item[1]["value"])[:3]
        lines += ["", "Weakest classes: " + "; ".join(f"{name} recall {figure(e)}" for name, e in worst) + "."]
        if summary.get("decision"):
            rule = summary["decision"]
            accuracy = f", accuracy on them {figure(rule['accuracy'])}" if rule["accuracy"] else ""
            lines.append(
                f'Answers below confidence {rule["threshold"]:.3f} are "unsure": it answers {figure(rule["coverage"])} '
                f"of the test images{accuracy}."
            )
        lines += ["", "Gates:"]
        lines += [
            f"  {_STATUSES.get(f['status'], f['status']):18} {f['engine']:20} {f['gate']:14} {f['message']}"
            for f in summary["findings"]
        ]
        lines += ["", *answer["notes"]] if answer["notes"] else []
    lines += ["", "An approval is bound to:"]
    for name in ("data", "split", "weights", "policy", "release", "champion"):
        lines.append(f"  {name:10} {bound.get(name, 'unknown')}")
    lines += [f"  engine     {digest} ({name})" for name, digest in bound["engines"].items()]
    lines += [
        "",
        f"Asked for by {_who(state.requested)} at {shown_utc(state.requested.at)}.",
    ]
    if answer["report"]:
        lines.append(f"Report: {answer['report']}")
    fresh = bound.get("champion", "none") == (champion.body["engine"] if champion else "none")
    approving = f'visionloop approve {state.version} --as WHO --reason "..."'
    if state.status in ("waiting", "expired"):
        lines.append(f"Next: {approving} (or reject)" if fresh else f"Next: train again. {_stale(champion)}")
    if state.status == "approved":
        lines.append(f"Next: visionloop promote {state.version}" if fresh else f"Next: train again. {_stale(champion)}")
    if state.status == "retired":
        back = f'visionloop rollback --to {state.version} --as WHO --reason "..." makes it champion again at once'
        lines.append(f"Next: {back}" + (f"; {approving} approves it anew for a promotion." if fresh else "."))
    return "\n".join(lines)


def _stale(champion: Entry | None) -> str:
    now = f"version {champion.body['version']}" if champion else "none"
    return f"This version was not compared with today's champion ({now}), so it can no longer be approved or promoted."


def _beside(state: State, champion: Entry | None, then: Entry | None) -> list[str]:
    """The figures of this version beside those of the champion that it was compared with, whoever is champion now."""
    summary = state.requested.body["summary"]
    beside, was = summary.get("champion") or {}, state.requested.body["bound"].get("champion", "none")
    version = summary.get("champion_version") or (str(then.body["version"]) if then else None)
    named = f"version {version}" if version else "a version that is not known any more"
    new, gone = summary.get("classes_new") or [], summary.get("classes_gone") or []
    changed = bool(new or gone)
    heading = "" if was == "none" else f"the champion then, {named}"
    missing = "no champion then" if was == "none" else "not comparable"
    lines = [f"  {'':22} {'this version':38} {heading}".rstrip()]
    for name, estimate in summary["metrics"].items():
        other = beside.get(name)
        lines.append(f"  {name:22} {figure(estimate):38} {figure(other) if other else missing}")
    if changed and beside:
        lines.append(
            f"  The champion's figures are on the {summary['champion_images']} test images of the classes that both know; "
            f"no_regression below compares both on these."
        )
    elif was != "none" and not beside and summary.get("champion_reason"):
        lines.append(f"  The champion could not be compared with: {summary['champion_reason']}.")
    if new:
        lines.append(f"  New classes, which the champion did not know: {', '.join(new)}.")
    if gone:
        lines.append(f"  Classes of the champion that this version does not know: {', '.join(gone)}.")
    if new and gone:
        lines.append("  A renamed class looks like this: one is gone and one is new.")
    now = str(champion.body["version"]) if champion else None
    if champion is not None and now not in (version, state.version):
        same = " (the same engine)" if champion.body["engine"] == was else ""
        lines.append(f"  Champion today: version {now}{same}.")
    return lines


def _who(entry: Entry) -> str:
    """Who a row is by, and how much that name is worth."""
    return entry.actor.name + _METHODS[entry.actor.method]


def _decided(found: Desk, by: Principal, rule: Rule) -> Entry:
    """Append what a rule allows, and tell who wants to know."""
    entry = found.ledger.decide(model=found.model, actor=by, rule=rule)
    try:
        found.promotion.describe(told=_told)
    except VisionloopError as error:
        # It is decided: MLflow only shows it.
        _told(f"MLflow's descriptions are behind ({error}); `visionloop reconcile --repair` writes them")
    _notify(found, entry)
    return entry


def approve(
    version: Version,
    as_: By,
    reason: Reason,
    days: Annotated[float, typer.Option(help="For how many days the approval is valid.")] = 7.0,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Approve a candidate. The person who asked for it cannot; nothing moves before `visionloop promote`."""
    from registry import approval
    from registry.policies import account_note, notes

    by = approval.person(as_)
    found = _desk(workspace, model)
    entries = found.ledger.entries(found.model)
    state = approval.state_of(entries, version, found.ledger.now())
    shown = notes(entries, state.requested.body, subject=state.requested.subject)
    if state.left is not None:
        shown.append(
            f"Version {version} was left by a rollback of {state.left.actor.name} at {shown_utc(state.left.at)}: "
            f"{state.left.body['reason']}"
        )
    for line in shown:
        _told(line)
    entry = _decided(found, by, approval.approve(version, by, reason, days=days, shown=shown))
    account = account_note(entry, state.requested)
    if account:
        _told(f"Note: {account}.")
    finish(
        _entry_json(entry) | {"same_account": account},
        json_,
        lambda: (
            f"{entry.model} version {version} is approved by {by.name} until {shown_utc(entry.body['expires_at'])} "
            f"(ledger row {entry.seq}).\nNext: visionloop promote {version}"
        ),
    )


def reject(
    version: Version,
    as_: By,
    reason: Reason,
    withdraw: Annotated[bool, typer.Option(help="Also when it is approved and not yet promoted.")] = False,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Reject a candidate; it can then never be promoted."""
    from registry import approval

    by = approval.person(as_)
    entry = _decided(_desk(workspace, model), by, approval.reject(version, by, reason, withdraw=withdraw))
    finish(_entry_json(entry), json_, lambda: f"{entry.model} version {version} is rejected by {by.name} (row {entry.seq}).")


def promote(version: Version, model: OfModel = None, workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Check an approved version again, publish its release, and make it champion. Servers switch by themselves."""
    found = _desk(workspace, model)
    from flows.starting import start_promotion

    moved = start_promotion(found, version, quiet=json_)
    finish(moved, json_, lambda: f"{found.model} serves version {version} now (release {moved['release'][:12]}).")


def rollback(
    as_: By,
    reason: Reason,
    to: Annotated[
        str | None, typer.Option(help="A version that was champion before; the one before this by default.")
    ] = None,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Make an earlier champion the champion again, at once: no orchestrator is needed, and no second approval."""
    # Most of a rollback is importing MLflow: nothing of that is garbage.
    with garbage.kept():
        from registry import approval

        by = approval.person(as_)
        found = _desk(workspace, model)
        entry = found.promotion.rollback(to, by, reason, told=(lambda _: None) if json_ else _told)
    _notify(found, entry)
    finish(
        _entry_json(entry),
        json_,
        lambda: f"{found.model} serves version {entry.body['version']} again (ledger row {entry.seq}), read back.",
    )


def history(model: OfModel = None, workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Everything the ledger knows about a model, in order."""
    found = _desk(workspace, model)
    entries = found.ledger.entries(found.model)
    finish(
        {"model": found.model, "entries": [_entry_json(entry) for entry in entries]},
        json_,
        lambda: "\n".join(_told_entry(entry) for entry in entries),
    )


def who_served(
    at: Annotated[str, typer.Option(help="Moment as ISO 8601, UTC unless it says otherwise.")],
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """What was champion at a moment, who approved it, and why."""
    from registry import approval

    when = moment("--at", at, past=True)
    found = _desk(workspace, model)
    entries = found.ledger.entries(found.model)
    served = approval.served_at(entries, when)
    if served is None:
        finish(
            {"model": found.model, "version": None},
            json_,
            lambda: f"{found.model} had no champion at {when:%Y-%m-%d %H:%M:%S} UTC.",
        )
        return
    seqs = {entry.seq: entry for entry in entries}
    promoted = seqs[served.body["promoted_seq"]] if served.kind == "rolled_back" else served
    approved = seqs[promoted.body["approved_seq"]]
    answer = {
        "model": found.model,
        "version": served.body["version"],
        "release": served.body["release"],
        "since": served.at,
        "by": served.actor.name,
        "approved_by": approved.actor.name,
        "approved_at": approved.at,
        "reason": approved.body["reason"],
        "bound": approved.body["bound"],
    }
    finish(
        answer,
        json_,
        lambda: (
            f"{found.model} version {answer['version']} (release {answer['release'][:12]}), "
            f"{served.kind.replace('_', ' ')} at {shown_utc(served.at)} by {served.actor.name};\n"
            f"approved at {shown_utc(approved.at)} by {_who(approved)}: {approved.body['reason']}"
        ),
    )


def reconcile(
    repair: Annotated[bool, typer.Option(help="Mend what differs: the ledger is right, the rest is written anew.")] = False,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Compare what servers and MLflow are told with the ledger. Exit status 1 when something differs and is not repaired."""
    found = _desk(workspace, model)
    differences = found.promotion.reconcile(repair=repair)
    lines = [
        f"{d.what}: expected {d.expected}, found {d.found}" + (" (repaired)" if d.repaired else "") for d in differences
    ]
    if differences and not all(d.repaired for d in differences):
        lines.append(
            "Nothing was approved that this points at: remove it by hand, and find out who set it."
            if repair
            else "Next: visionloop reconcile --repair"
        )
    finish(
        {"model": found.model, "differences": [d.to_json() for d in differences]},
        json_,
        lambda: "\n".join(lines) or f"{found.model}: routes, alias and release say what the ledger says.",
    )
    if not all(d.repaired for d in differences):
        raise typer.Exit(1)


@ledger_app.command("verify")
def ledger_verify(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Check the hash chain, row by row."""
    from flows.workspace.settings import read_settings
    from flows.workspace.workspace import Workspace
    from registry.ledger import Ledger

    ledger = Ledger(read_settings(Workspace.find(workspace).state).ledger_url)
    entries = ledger.entries()
    head = entries[-1].hash if entries else None
    finish(
        {"rows": len(entries), "head": head},
        json_,
        lambda: (
            f"The ledger is whole: {counted(len(entries), 'row')}, each with the hash of the one before; "
            f"last hash {head or '(none)'}"
        ),
    )


def _notify(found: Desk, entry: Entry) -> None:
    from flows.orchestrator.notifications import notify

    facts = {"version": entry.body["version"], "by": entry.actor.name, "reason": entry.body["reason"], "seq": entry.seq}
    notify(found.settings, entry.kind, found.model, facts, told=_told)


def _entry_json(entry: Entry) -> dict[str, Any]:
    """A row for machines: without the summary, which `show` prints."""
    from registry.policies import by_gates

    body = {name: value for name, value in entry.body.items() if name != "summary"}
    return {
        "decided_by": "the gates" if by_gates(entry) else (entry.actor.name if entry.actor.method != "machine" else None),
        "seq": entry.seq,
        "at": entry.at,
        "kind": entry.kind,
        "model": entry.model,
        "actor": entry.actor.name,
        "actor_method": entry.actor.method,
        "body": body,
        "hash": entry.hash,
    }


def _told_entry(entry: Entry) -> str:
    from registry.policies import by_gates

    version = f"version {entry.body['version']}" if "version" in entry.body else "a model"
    why = entry.body.get("reason") or "; ".join(entry.body.get("reasons", []))
    kind, by = entry.kind.replace("_", " "), f"by {_who(entry)}"
    if by_gates(entry):
        # The row's actor is who asked for the training; it is the gates that refused.
        kind = "undecided" if entry.body.get("status") == "inconclusive" else kind
        by = f"by the gates, asked for by {_who(entry)}"
    return f"{entry.seq:>5}  {shown_utc(entry.at)}  {kind:12} {version:12} {by}" + (f": {why}" if why else "")
