"""The registry on the command line: look, decide, go live, go back, and ask what happened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from components import collector
from components.contracts.releases import CriticalClass
from components.contracts.wording import counted, shown_utc
from flows.cli.answers import HERE, AsJson, By, Commands, InWorkspace, OfModel, Reason, finish, moment, opened_desk
from flows.terminal import figure, silent, to_stderr
from flows.workspace.as_json import exceptions_json, row_json, state_json, version_json

if TYPE_CHECKING:
    from flows.workspace.versions import Row, VersionShown
    from registry.approval import State
    from registry.ledger import Entry

Version = Annotated[str, typer.Argument(help="Version of the model, as `visionloop candidates` lists it.")]
ledger_app = Commands(help="The ledger: the append-only record of what was requested, decided and promoted.")
_METHODS = {
    "declared": " (name not verified)",
    "token": " (by token)",
    "password": " (signed in)",
    "oidc": " (signed in)",
    "machine": "",
}
_STATUSES = {"inconclusive": "undecided"}
"""What is shown for a finding's status; machines get the status itself."""


def add_registry_commands(app: Commands) -> None:
    """Put the registry's commands on the command line."""
    for command in (candidates, show, approve, reject, promote, rollback, history, reconcile):
        app.command()(command)
    app.command("except")(except_gates)
    app.command("who-served")(who_served)
    app.add_typer(ledger_app, name="ledger")


def candidates(
    every: Annotated[bool, typer.Option("--all", help="Also versions that were rejected, or champion before.")] = False,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Versions that wait for a decision or for their promotion, and the champion."""
    from flows.workspace.versions import candidates as listed

    found = opened_desk(workspace, model)
    shown = listed(found, every=every)
    lines = [f"{found.model}:"] + [_line(state) for state in shown]
    finish(
        {"model": found.model, "candidates": [state_json(state) for state in shown]},
        json_,
        lambda: "\n".join(lines) if shown else f"{found.model}: nothing waits; `visionloop candidates --all` lists the past",
    )


def _line(state: State) -> str:
    summary = state.requested.body.get("summary") or {}
    headline = summary.get("headline", "accuracy")
    estimate = summary.get("metrics", {}).get(headline)
    shown = f"{headline} {figure(estimate)}" if estimate else ""
    return f"  version {state.version:>4}  {_status(state):42} {shown}  asked for by {state.requested.actor.name}"


def _status(state: State) -> str:
    if state.status == "approved" and state.decision is not None:
        return f"approved by {state.decision.actor.name} until {shown_utc(state.decision.body['expires_at'])}"
    if state.status == "undecided":
        return f"undecided: {', '.join(state.missing)}"
    if state.status == "waiting":
        return "waits for approval" + (" under an exception" if state.undecided else "")
    if state.status in ("rejected", "expired") and state.decision is not None:
        verb = "rejected" if state.status == "rejected" else "approval expired, given"
        return f"{verb} by {state.decision.actor.name}"
    if state.status == "retired":
        return f"left by a rollback of {state.left.actor.name}" if state.left is not None else "was champion before"
    return state.status


def _exceptions_lines(exceptions: Mapping[str, Entry]) -> list[str]:
    return [
        f"{gate} did not decide; excepted by {_who(e)} at {shown_utc(e.at)} until {shown_utc(e.body['expires_at'])} "
        f"(ledger row {e.seq}): {e.body['reason']}"
        for gate, e in exceptions.items()
    ]


def show(version: Version, model: OfModel = None, workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """One version for the person who decides: the verdict in words, the champion beside it, what an approval is bound to."""
    from flows.workspace.versions import show as look_at

    found = opened_desk(workspace, model)
    shown = look_at(found, version)
    answer = version_json(found.model, shown)
    finish(answer, json_, lambda: _page(found.model, shown))


def _page(model: str, shown: VersionShown) -> str:
    from flows.training.candidate_evidence import told as evidence_told
    from flows.training.data_since import told as data_told
    from flows.training.passes_told import lines as passes_told

    state, champion = shown.state, shown.champion
    summary, bound = state.requested.body.get("summary") or {}, state.requested.body["bound"]
    lines = [f"{model} version {state.version}: {_status(state)}", ""]
    if state.decision is not None:
        verb = "approved" if state.decision.kind == "approved" else "rejected"
        lines += [f"  {verb} by {_who(state.decision)} at {shown_utc(state.decision.at)}: {state.decision.body['reason']}"]
        lines += [f"  {shown.same_account}"] if shown.same_account else []
        lines += [""]
    if state.exceptions:
        lines += [*(f"  {line}" for line in _exceptions_lines(state.exceptions)), ""]
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
            *([f"Trained on {summary['computed_on']}."] if summary.get("computed_on") else []),
            *([f"It learned from a teacher: {summary['teacher']}."] if summary.get("teacher") else []),
            *(
                [f"The recipe's values are those of study {tuned['study']}, digest {tuned['study_digest'][:16]}."]
                if (tuned := summary.get("tuned"))
                else []
            ),
            *(
                [f"It is variant {of['variant']} of recipe {of['recipe']}, choice {of['choice_digest'][:16]}."]
                if (of := summary.get("chosen"))
                else []
            ),
            "",
            *_beside(state, champion, shown.compared_with),
        ]
        lines += ["", f"{shown.holdout.told(summary['images']['test'])}."] if shown.holdout else []
        told = evidence_told(summary.get("evidence") or {})
        told += passes_told(summary.get("optimisation"), summary.get("headline", "accuracy").replace("_", " "))
        told += data_told(summary.get("data_since"), summary.get("spent"))
        lines += ["", *told] if told else []
        worst = sorted(summary["recall"].items(), key=lambda item: item[1]["value"])[:3]
        lines += ["", "Weakest classes: " + "; ".join(f"{name} recall {figure(e)}" for name, e in worst) + "."]
        if summary.get("decision"):
            rule = summary["decision"]
            accuracy = f", accuracy on them {figure(rule['accuracy'])}" if rule["accuracy"] else ""
            lines.append(
                f'Answers below confidence {rule["threshold"]:.3f} are "unsure": it answers {figure(rule["coverage"])} '
                f"of the test images{accuracy}."
            )
            lines += [f"{CriticalClass.read(each).told()}." for each in rule.get("critical", [])]
        lines += ["", "Gates:"]
        lines += [
            f"  {_STATUSES.get(f['status'], f['status']):18} {f['engine']:20} {f['gate']:14} {f['message']}"
            for f in summary["findings"]
        ]
        lines += ["", *shown.notes] if shown.notes else []
    lines += ["", "An approval is bound to:"]
    for name in ("data", "split", "weights", "policy", "release", "champion"):
        lines.append(f"  {name:10} {bound.get(name, 'unknown')}")
    lines += [f"  engine     {digest} ({name})" for name, digest in bound["engines"].items()]
    lines += [
        "",
        f"Asked for by {_who(state.requested)} at {shown_utc(state.requested.at)}.",
    ]
    if shown.report:
        lines.append(f"Report: {shown.report}")
    fresh = shown.is_fresh
    approving = f'visionloop approve {state.version} --as WHO --reason "..."'
    if state.missing and state.status in ("undecided", "expired") and fresh:
        gates = " ".join(f"--gate {gate}" for gate in state.missing)
        lines.append(
            f"Next: more evidence, as the undecided gates say; or who did not ask for it answers for what is not decided: "
            f'visionloop except {state.version} {gates} --as WHO --reason "..."'
        )
    elif state.status in ("undecided", "waiting", "expired"):
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
    if summary.get("folds"):
        lines.append(f"  {summary['folds']['told']}.")
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
        lines.append("  A class renamed without `visionloop data rename-class` looks like this: one is gone and one is new.")
    now = str(champion.body["version"]) if champion else None
    if champion is not None and now not in (version, state.version):
        same = " (the same engine)" if champion.body["engine"] == was else ""
        lines.append(f"  Champion today: version {now}{same}.")
    return lines


def _who(entry: Entry) -> str:
    """Who a row is by, and how much that name is worth."""
    return entry.actor.name + _METHODS[entry.actor.method]


def except_gates(
    version: Version,
    gates: Annotated[list[str], typer.Option("--gate", help="A gate that did not decide on it. May be repeated.")],
    as_: By,
    reason: Reason,
    days: Annotated[float, typer.Option(help="For how many days the exception is valid, and what is approved by it.")] = 7.0,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Answer for gates that did not decide on a version, by name and with a reason; then it can be approved.

    The person who asked for it cannot. What a gate failed, parity, or an engine that was not executed cannot be excepted.
    """
    from flows.loop.decisions import declared
    from flows.loop.decisions import except_gates as decide

    by = declared(as_)
    done = decide(opened_desk(workspace, model), version, by, gates, reason, days=days, say=to_stderr)
    entry = done.entry
    if done.same_account:
        to_stderr(f"Note: {done.same_account}.")
    left = f"still undecided: {', '.join(done.missing)}" if done.missing else f"visionloop approve {version}"
    finish(
        row_json(entry) | {"missing": list(done.missing), "same_account": done.same_account},
        json_,
        lambda: (
            f"{', '.join(entry.body['gates'])} of {entry.model} version {version} is excepted by {by.name} until "
            f"{shown_utc(entry.body['expires_at'])} (ledger row {entry.seq}).\nNext: {left}"
        ),
    )


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
    from flows.loop.decisions import approve as decide
    from flows.loop.decisions import declared

    by = declared(as_)
    done = decide(opened_desk(workspace, model), version, by, reason, days=days, say=to_stderr)
    entry = done.entry
    if done.same_account:
        to_stderr(f"Note: {done.same_account}.")
    finish(
        row_json(entry) | {"same_account": done.same_account},
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
    from flows.loop.decisions import declared
    from flows.loop.decisions import reject as decide

    by = declared(as_)
    entry = decide(opened_desk(workspace, model), version, by, reason, withdraw=withdraw, say=to_stderr)
    finish(row_json(entry), json_, lambda: f"{entry.model} version {version} is rejected by {by.name} (row {entry.seq}).")


def promote(version: Version, model: OfModel = None, workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Check an approved version again, publish its release, and make it champion. Servers switch by themselves."""
    found = opened_desk(workspace, model)
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
    # Nothing of what is imported for it is garbage.
    with collector.kept():
        from flows.loop.decisions import declared
        from flows.loop.decisions import rollback as go_back

        by = declared(as_)
        found = opened_desk(workspace, model)
        # Most of a rollback is importing MLflow.
        entry = go_back(found, to, by, reason, say=to_stderr, moving=silent if json_ else to_stderr)
    finish(
        row_json(entry),
        json_,
        lambda: f"{found.model} serves version {entry.body['version']} again (ledger row {entry.seq}), read back.",
    )


def history(model: OfModel = None, workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Everything the ledger knows about a model, in order."""
    from flows.workspace.versions import history as rows_of

    found = opened_desk(workspace, model)
    rows = rows_of(found)
    finish(
        {"model": found.model, "entries": [row_json(row.entry, by_gates=row.by_gates) for row in rows]},
        json_,
        lambda: "\n".join(_told_row(row) for row in rows),
    )


def who_served(
    at: Annotated[str, typer.Option(help="Moment as ISO 8601, UTC unless it says otherwise.")],
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """What was champion at a moment, who approved it, and why."""
    from flows.workspace.versions import who_served as find

    when = moment("--at", at, past=True)
    found = opened_desk(workspace, model)
    served = find(found, when)
    if served is None:
        finish(
            {"model": found.model, "version": None},
            json_,
            lambda: f"{found.model} had no champion at {when:%Y-%m-%d %H:%M:%S} UTC.",
        )
        return
    moved, approved = served.moved, served.approved
    answer = {
        "model": found.model,
        "version": moved.body["version"],
        "release": moved.body["release"],
        "since": moved.at,
        "by": moved.actor.name,
        "approved_by": approved.actor.name,
        "approved_at": approved.at,
        "reason": approved.body["reason"],
        "bound": approved.body["bound"],
        "exceptions": exceptions_json(served.exceptions),
    }
    under = "".join(f"\nunder an exception: {line}" for line in _exceptions_lines(served.exceptions))
    finish(
        answer,
        json_,
        lambda: (
            f"{found.model} version {answer['version']} (release {answer['release'][:12]}), "
            f"{moved.kind.replace('_', ' ')} at {shown_utc(moved.at)} by {moved.actor.name};\n"
            f"approved at {shown_utc(approved.at)} by {_who(approved)}: {approved.body['reason']}{under}"
        ),
    )


def reconcile(
    repair: Annotated[bool, typer.Option(help="Mend what differs: the ledger is right, the rest is written anew.")] = False,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Compare what servers and MLflow are told with the ledger. Exit status 1 when something differs and is not repaired."""
    from flows.loop.decisions import reconcile as compare

    found = opened_desk(workspace, model)
    differences = compare(found, repair=repair)
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
    from flows.workspace.versions import verify_ledger
    from flows.workspace.workspace import Workspace

    verified = verify_ledger(Workspace.find(workspace))
    finish(
        {"rows": verified.rows, "head": verified.head},
        json_,
        lambda: (
            f"The ledger is whole: {counted(verified.rows, 'row')}, each with the hash of the one before; "
            f"last hash {verified.head or '(none)'}"
        ),
    )


def _told_row(row: Row) -> str:
    entry = row.entry
    version = f"version {entry.body['version']}" if "version" in entry.body else "a model"
    why = entry.body.get("reason") or "; ".join(entry.body.get("reasons", []))
    if entry.kind == "excepted":
        why = f"{', '.join(entry.body['gates'])}: {why}"
    kind, by = entry.kind.replace("_", " "), f"by {_who(entry)}"
    if row.by_gates:
        # The row's actor is who asked for the training; it is the gates that refused.
        kind = "undecided" if entry.body.get("status") == "inconclusive" else kind
        by = f"by the gates, asked for by {_who(entry)}"
    return f"{entry.seq:>5}  {shown_utc(entry.at)}  {kind:12} {version:12} {by}" + (f": {why}" if why else "")
