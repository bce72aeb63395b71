"""The terminal summary of a run: the verdict first, then why, then where to look."""

from __future__ import annotations

import io
import shutil
import sys
from typing import Any

from components.contracts.wording import counted
from flows.training.serving_check import SERVES


def told(summary: dict[str, Any]) -> str:
    """The summary as text; coloured on a terminal, plain elsewhere."""
    from rich.console import Console
    from rich.table import Table

    from flows.pages.figures import in_words

    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size((120, 40)).columns if terminal else 140
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=width, highlight=False)
    console.print()
    if summary["outcome"] == "candidate":
        console.print(
            f"[bold green]PASS[/]  {summary['model']} version {summary['version']} is a candidate "
            f"and waits for a person's approval (next: visionloop show {summary['version']})"
        )
    elif summary["verdict"] == "inconclusive":
        version = f" version {summary['version']}" if summary["version"] else ""
        console.print(
            f"[bold yellow]UNDECIDED[/]  {summary['model']}{version}: this model is neither shown to be good enough nor "
            f"shown not to be, so it is no candidate. What is missing:"
        )
    else:
        console.print(f"[bold red]FAIL[/]  {summary['model']}: the gates rejected this model; the evidence is kept. Why:")
    for reason in summary["reasons"]:
        console.print(f"  - {reason}", markup=False, soft_wrap=True)
    if summary.get("undecided"):
        gates = " ".join(f"--gate {gate}" for gate in summary["undecided"])
        console.print(
            f"What is missing decides it. Or a person who did not ask for it answers for what is not decided, and then it "
            f'can be approved: visionloop except {summary["version"]} {gates} --as WHO --reason "..."',
            markup=False,
            soft_wrap=True,
        )
    for line in _serving_told(summary) if summary["outcome"] == "candidate" else ():
        console.print(f"  - {line}", markup=False, soft_wrap=True)
    evidence = summary.get("evidence")
    if evidence and evidence["flips"]:
        console.print(f"  - {evidence['sentence']}", markup=False, soft_wrap=True)
    data = summary["data"]
    kept = counted(data["kept"], "image")
    splits = ", ".join(f"{name} {count}" for name, count in data["splits"].items())
    console.print(f"data  {data['version']}: {kept} kept, {data['quarantined']} quarantined ({splits})")
    for warning in data["warnings"]:
        console.print(f"      warning: {warning}", markup=False, soft_wrap=True)
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    headline = summary.get("headline", "accuracy")
    measured = [engine["metrics"] for engine in summary["engines"].values() if engine["metrics"]]
    others = [name for name in ("log_loss", "ece") if all(name in metrics for metrics in measured)]
    columns = [f"{in_words(headline)} (95 % interval)", *map(in_words, others)]
    for heading in ("engine", "verdict", *columns, "p50 / p99 ms", "size"):
        table.add_column(heading, justify="left" if heading in ("engine", "verdict") else "right")
    statuses = {finding["engine"]: finding["engine_status"] for finding in summary["findings"]}
    for name, engine in summary["engines"].items():
        metrics, latency = engine["metrics"], engine["latency_ms"]
        label = name + (" (serving)" if name == summary["serving_engine"] else "")
        verdict = statuses.get(name, "reference").replace("inconclusive", "undecided")
        if not metrics:
            blank = [""] * (len(others) + 1)
            table.add_row(label, verdict, "built, not executed here", *blank, f"{engine['size_bytes'] / 1e6:.2f} MB")
            continue
        first = metrics[headline]
        table.add_row(
            label,
            verdict,
            f"{first['value']:.4f} ({first['low']:.4f} to {first['high']:.4f}, n={first['n']})",
            *(f"{metrics[name]['value']:.4f}" for name in others),
            f"{latency['p50']:.2f} / {latency['p99']:.2f}" if latency["p50"] is not None else "",
            f"{engine['size_bytes'] / 1e6:.2f} MB",
        )
    console.print(table)
    if noisy := [name for name, engine in summary["engines"].items() if engine["latency_ms"].get("noisy")]:
        console.print(
            f"      the machine was busy while {', '.join(noisy)} was timed: `train --measure-again`, when it is quiet, may "
            f"choose another engine",
            markup=False,
            soft_wrap=True,
        )
    console.print()
    if summary.get("folds"):
        console.print(f"{summary['folds']['told']}.", markup=False, soft_wrap=True)
        console.print()
    if summary.get("folds_proposed"):
        console.print(f"{summary['folds_proposed']}.", markup=False, soft_wrap=True)
        console.print()
    slowest = sorted(summary["seconds"].items(), key=lambda item: -item[1]["seconds"])
    spent = ", ".join(f"{name} {spent['seconds']:.1f} s" for name, spent in slowest[:6] if not spent["cached"])
    console.print(f"time    {spent or 'every stage came from the store'}", soft_wrap=True)
    if summary.get("computed_on"):
        console.print(f"trained on {summary['computed_on']}", markup=False, soft_wrap=True)
    console.print(f"report  {summary['report']}")
    return text.getvalue().rstrip()


def _serving_told(summary: dict[str, Any]) -> list[str]:
    """Why the engine that serves was chosen, and why the engines that did not pass could not be."""
    findings = summary["findings"]
    chosen = [f"{f['engine']} serves: {f['message']}" for f in findings if f["gate"] == "serving" and f["status"] == "pass"]
    chosen += [f"tried as it will serve: {f['message']}" for f in findings if f["gate"] == SERVES and f["status"] == "pass"]
    unmet = [
        f"{f['engine']} cannot serve: {f['gate']}: {f['message']}"
        for f in findings
        if f["engine_status"] != "pass" and f["status"] not in ("pass", "not applicable")
    ]
    return chosen + unmet
