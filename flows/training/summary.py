"""The terminal summary of a run: the verdict first, then why, then where to look."""

from __future__ import annotations

import io
import shutil
import sys
from typing import Any

from components.contracts.wording import counted


def told(summary: dict[str, Any]) -> str:
    """The summary as text; coloured on a terminal, plain elsewhere."""
    from rich.console import Console
    from rich.table import Table

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
        console.print(
            f"[bold yellow]UNDECIDED[/]  {summary['model']}: this model is neither shown to be good enough nor shown not to "
            f"be, so it is no candidate. What is missing:"
        )
    else:
        console.print(f"[bold red]FAIL[/]  {summary['model']}: the gates rejected this model; the evidence is kept. Why:")
    for reason in summary["reasons"]:
        console.print(f"  - {reason}", markup=False, soft_wrap=True)
    data = summary["data"]
    kept = counted(data["kept"], "image")
    splits = ", ".join(f"{name} {count}" for name, count in data["splits"].items())
    console.print(f"data  {data['version']}: {kept} kept, {data['quarantined']} quarantined ({splits})")
    for warning in data["warnings"]:
        console.print(f"      warning: {warning}", markup=False, soft_wrap=True)
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("engine", "verdict", "accuracy (95 % interval)", "log-loss", "ECE", "p50 / p99 ms", "size"):
        table.add_column(heading, justify="left" if heading in ("engine", "verdict") else "right")
    statuses = {finding["engine"]: finding["engine_status"] for finding in summary["findings"]}
    for name, engine in summary["engines"].items():
        metrics, latency = engine["metrics"], engine["latency_ms"]
        label = name + (" (serving)" if name == summary["serving_engine"] else "")
        verdict = statuses.get(name, "reference").replace("inconclusive", "undecided")
        if not metrics:
            table.add_row(label, verdict, "built, not executed here", "", "", "", f"{engine['size_bytes'] / 1e6:.2f} MB")
            continue
        accuracy = metrics["accuracy"]
        table.add_row(
            label,
            verdict,
            f"{accuracy['value']:.4f} ({accuracy['low']:.4f} to {accuracy['high']:.4f}, n={accuracy['n']})",
            f"{metrics['log_loss']['value']:.4f}",
            f"{metrics['ece']['value']:.4f}",
            f"{latency['p50']:.2f} / {latency['p99']:.2f}" if latency["p50"] is not None else "",
            f"{engine['size_bytes'] / 1e6:.2f} MB",
        )
    console.print(table)
    console.print()
    slowest = sorted(summary["seconds"].items(), key=lambda item: -item[1]["seconds"])
    spent = ", ".join(f"{name} {spent['seconds']:.1f} s" for name, spent in slowest[:6] if not spent["cached"])
    console.print(f"time    {spent or 'every stage came from the store'}")
    console.print(f"report  {summary['report']}")
    return text.getvalue().rstrip()
