"""The registry on the command line: look, decide, go live, go back, and ask what happened."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components import garbage
from components.contracts import shown_utc
from flows.answering import HERE, AsJson, Commands, InWorkspace, figure, finish, moment

if TYPE_CHECKING:
    from flows.deciding import Desk
    from registry.approval import State
    from registry.ledger import Entry, Principal, Rule

OfModel = Annotated[str | None, typer.Option("--model", "-m", help="The model; needed where the ledger knows several.")]
Version = Annotated[str, typer.Argument(help="Version of the model, as `visionloop candidates` lists it.")]
By = Annotated[str, typer.Option("--as", help="Who decides; recorded as declared.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; others will read it.")]
ledger_app = Commands(help="The append-only ledger.")


def add_registry_commands(app: Commands) -> None:
    """Put the registry's commands on the command line."""
    for command in (candidates, show, approve, reject, promote, rollback, history, reconcile):
        app.command()(command)
    app.command("who-served")(who_served)
    app.add_typer(ledger_app, name="ledger")


def _desk(workspace: Path, model: str | None) -> Desk:
    from flows.deciding import desk
    from flows.run import Workspace
    from flows.settings import prepare_environment

    # Before MLflow or Prefect is imported by anything.
    prepare_environment(Workspace.find(workspace).state)
    return desk(workspace, model)


def _told(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def candidates(
    every: Annotated[bool, typer.Option("--all", help="Also what was decided long ago.")] = False,
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
    return f"  version {state.version:>4}  {_status(state):42} {shown}  requested by {state.requested.actor.name}"


def _status(state: State) -> str:
    if state.status == "approved" and state.decision is not None:
        return f"approved by {state.decision.actor.name} until {state.decision.body['expires_at'][:16]}"
    if state.status == "waiting":
        return "waits for approval"
    if state.status in ("rejected", "expired") and state.decision is not None:
        verb = "rejected" if state.status == "rejected" else "approval expired, given"
        return f"{verb} by {state.decision.actor.name}"
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

    found = _desk(workspace, model)
    entries = found.ledger.entries(found.model)
    state = approval.state_of(entries, version, found.ledger.now())
    champion = approval.champion(entries)
    answer = _state_json(state) | {
        "model": found.model,
        "bound": state.requested.body["bound"],
        "champion_version": champion.body["version"] if champion else None,
        "report": _report(found, state),
    }
    finish(answer, json_, lambda: _page(found.model, state, champion, answer["report"]))


def _report(found: Desk, state: State) -> str | None:
    run = (state.requested.body.get("summary") or {}).get("run", "")
    path = found.workspace.runs / run / "report.html"
    return str(path) if run and path.is_file() else None


def _page(model: str, state: State, champion: Entry | None, report: str | None) -> str:
    summary, bound = state.requested.body.get("summary") or {}, state.requested.body["bound"]
    lines = [f"{model} version {state.version}: {_status(state)}", ""]
    if state.decision is not None:
        lines += [f"  {state.decision.actor.name} at {state.decision.at[:19]}: {state.decision.body['reason']}", ""]
    if summary:
        beside = summary.get("champion") or {}
        reigning = f"champion (version {champion.body['version']})" if champion else "champion"
        lines += [
            f"It serves {summary['serving_engine']}, trained by recipe {summary['recipe']} on data version "
            f"{summary['data_version'][:12]} ({', '.join(f'{k} {v}' for k, v in summary['images'].items())}), "
            f"git {summary['git'][:12]}. Asked for: {summary.get('reason', 'manual')}.",
            "",
            f"  {'':22} {'this version':38} {reigning}",
        ]
        for name, estimate in summary["metrics"].items():
            other = beside.get(name)
            lines.append(f"  {name:22} {figure(estimate):38} {figure(other) if other else 'there is none yet'}")
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
        lines += [f"  {f['status']:18} {f['engine']:20} {f['gate']:14} {f['message']}" for f in summary["findings"]]
    lines += ["", "An approval is bound to:"]
    for name in ("data", "split", "weights", "policy", "release", "champion"):
        lines.append(f"  {name:10} {bound.get(name, 'unknown')}")
    lines += [f"  engine     {digest} ({name})" for name, digest in bound["engines"].items()]
    lines += [
        "",
        f"Requested by {state.requested.actor.name} ({state.requested.actor.method}) at {state.requested.at[:19]}.",
    ]
    if report:
        lines.append(f"Report: {report}")
    if state.status in ("waiting", "expired"):
        lines.append(f'Next: visionloop approve {state.version} --as WHO --reason "..." (or reject)')
    if state.status == "approved":
        lines.append(f"Next: visionloop promote {state.version}")
    return "\n".join(lines)


def _decided(workspace: Path, model: str | None, by: Principal, rule: Rule) -> Entry:
    """Append what a rule allows, and tell who wants to know."""
    found = _desk(workspace, model)
    entry = found.ledger.decide(model=found.model, actor=by, rule=rule)
    found.promotion.describe(told=_told)
    _notify(found, entry)
    return entry


def approve(
    version: Version,
    as_: By,
    reason: Reason,
    days: Annotated[float, typer.Option(help="How long the approval is valid.")] = 7.0,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Approve a candidate. The person who asked for it cannot; nothing moves before `visionloop promote`."""
    from registry import approval

    by = approval.person(as_)
    entry = _decided(workspace, model, by, approval.approve(version, by, reason, days=days))
    finish(
        _entry_json(entry),
        json_,
        lambda: (
            f"{entry.model} version {version} is approved by {by.name} until {entry.body['expires_at'][:16]} UTC "
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
    entry = _decided(workspace, model, by, approval.reject(version, by, reason, withdraw=withdraw))
    finish(_entry_json(entry), json_, lambda: f"{entry.model} version {version} is rejected by {by.name} (row {entry.seq}).")


def promote(version: Version, model: OfModel = None, workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Check an approved version again, publish its release, and make it champion. Servers switch by themselves."""
    found = _desk(workspace, model)
    from flows.events import expect_server

    expect_server(found.settings)
    with garbage.kept():
        from flows.promote import promote as flow

    moved = flow(version, found.model, str(found.workspace.root), quiet=json_)
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
            f"approved at {shown_utc(approved.at)} by {approved.actor.name}: {approved.body['reason']}"
        ),
    )


def reconcile(
    repair: Annotated[bool, typer.Option(help="Make routes, alias and release say what the ledger says.")] = False,
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
    from flows.run import Workspace
    from flows.settings import read_settings
    from registry.ledger import Ledger

    ledger = Ledger(read_settings(Workspace.find(workspace).state).ledger_url)
    entries = ledger.entries()
    head = entries[-1].hash if entries else None
    finish(
        {"rows": len(entries), "head": head},
        json_,
        lambda: f"{len(entries)} rows, every hash follows from the row before; head {head or '(empty)'}",
    )


def _notify(found: Desk, entry: Entry) -> None:
    from flows.notifications import notify

    facts = {"version": entry.body["version"], "by": entry.actor.name, "reason": entry.body["reason"], "seq": entry.seq}
    notify(found.settings, entry.kind, found.model, facts, told=_told)


def _entry_json(entry: Entry) -> dict[str, Any]:
    """A row for machines: without the summary, which `show` prints."""
    body = {name: value for name, value in entry.body.items() if name != "summary"}
    return {
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
    version = f"version {entry.body['version']}" if "version" in entry.body else "a candidate"
    why = entry.body.get("reason") or "; ".join(entry.body.get("reasons", []))
    return (
        f"{entry.seq:>5}  {shown_utc(entry.at)}  {entry.kind:12} {version:12} by {entry.actor.name} ({entry.actor.method})"
        + (f": {why}" if why else "")
    )
