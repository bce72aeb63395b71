"""What a choice came to, as a record in its folder, as JSON data and as a table in words."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.contracts.wording import counted
from components.store import write_atomically
from components.variant_rule import not_beaten
from components.variants import Choice, Variant
from flows.pages.figures import in_words
from flows.training.results import estimate_json

CAUTION = (
    "The best of many is flattered by what was lucky on the same valid images; what it is worth, the gates say on the test "
    "images, about which no variant was asked."
)
RECORD = "choice.json"
Column = tuple[str, Callable[[Mapping[str, Any]], str]]
"""The head of a column, and what stands below it of a variant."""
NUMBERS = 4
"""Columns from this one on hold plain numbers."""


def keep(choice: Choice, folder: Path) -> None:
    """Write the choice into its folder."""
    write_atomically(folder / RECORD, json.dumps(choice.to_json(), indent=1).encode())


def summarise(choice: Choice, winner: Path | None, page: Path) -> dict[str, Any]:
    """What a choice came to."""
    measured = [one for one in choice.variants if one.status == "measured"]
    front = {
        "latency": [one.name for one in not_beaten(measured, lambda one: one.latency_ms)],
        "cost": [one.name for one in not_beaten(measured, lambda one: one.core_hours or 0.0)],
        "size": [one.name for one in not_beaten(measured, lambda one: one.size_bytes)],
    }
    return {
        "recipe": choice.recipe,
        "model": choice.model,
        "digest": choice.digest(),
        "headline": choice.headline,
        "num_valid": choice.num_valid,
        "machine": choice.machine,
        "num_threads": choice.num_threads,
        "hourly_price": choice.hourly_price,
        "rule": choice.rule,
        "chosen": choice.chosen or None,
        "nearest": choice.nearest or None,
        "variants": [_json(one) for one in choice.variants],
        "not_beaten": front,
        "winner": winner.stem if winner else None,
        "file": str(winner) if winner else None,
        "page": str(page),
    }


def _json(one: Variant) -> dict[str, Any]:
    estimates = ("headline", "worst_recall", "difference", "drop", "images_a_second")
    plain = (
        *("name", "backbone", "passes", "engine", "status", "engine_digest", "worst_class", "p50_ms", "p99_ms"),
        *("rounds_p50_ms", "core_hours", "cost", "size_bytes", "memory_mb", "missed", "told"),
    )
    values = one.to_json()
    found = {name: getattr(one, name) for name in estimates}
    return {name: values[name] for name in plain} | {
        name: None if estimate is None else estimate_json(estimate) for name, estimate in found.items()
    }


def told(summary: Mapping[str, Any]) -> str:
    """The summary as text: a line of figures a variant, and below it what the rule says of it."""
    variants = summary["variants"]
    of = columns(summary)
    table = [["", *(head for head, _ in of)]]
    for one in variants:
        mark = "*" if one["name"] == summary["chosen"] else ""
        measured = one["status"] == "measured"
        table.append([mark, *(cell(one) for _, cell in of)] if measured else [mark, one["name"]])
    widths = [max(len(row[at]) for row in table if len(row) > at) for at in range(len(table[0]))]
    images, threads = counted(summary["num_valid"], "valid image"), counted(summary["num_threads"], "thread")
    lines = [
        f"recipe {summary['recipe']}: {counted(len(variants), 'variant')} on {images}, timed in turns with {threads} on "
        f"{summary['machine']}",
        f"rule: {summary['rule']}",
        "",
        _line(table[0], widths),
    ]
    for one, row in zip(variants, table[1:], strict=True):
        lines += [_line(row, widths), f"     {'' if one['status'] == 'measured' else one['status'] + ': '}{one['told']}"]
    lines += [
        "",
        f"95 % intervals; beside p50 the range of its rounds. {CAUTION}",
        f"page    {os.path.relpath(summary['page'])}",
    ]
    if summary["chosen"]:
        return "\n".join(
            [
                *lines,
                f"chosen  {summary['chosen']}",
                f"recipe  {os.path.relpath(summary['file'])}; next: visionloop train --recipe {summary['winner']}",
            ]
        )
    return "\n".join([*lines, f"chosen  none: {none_chosen(summary)}"])


def none_chosen(summary: Mapping[str, Any]) -> str:
    """Why no variant was chosen, and which one came nearest."""
    nearest = next((one for one in summary["variants"] if one["name"] == summary["nearest"]), None)
    near = f"; the nearest is {nearest['name']}: {'; '.join(nearest['missed'])}" if nearest else ""
    return f"no variant is within the recipe's limits{near}"


def columns(summary: Mapping[str, Any]) -> list[Column]:
    """Heads of the table, and what stands below them."""
    found: list[Column] = [
        ("variant", lambda one: str(one["name"])),
        (f"valid {in_words(summary['headline'])}", lambda one: _figure(one["headline"])),
        ("points to the best", lambda one: _gap(one["difference"])),
        ("worst class", lambda one: _worst(one["worst_recall"], one["worst_class"])),
        ("p50 ms", _latency),
        ("images/s", lambda one: f"{one['images_a_second']['value']:,.0f}"),
        ("MB", lambda one: f"{one['size_bytes'] / 1e6:.3g}"),
    ]
    if any(one["memory_mb"] is not None for one in summary["variants"]):
        found.append(("MB memory", lambda one: "-" if one["memory_mb"] is None else f"{one['memory_mb']:.0f}"))
    if summary["hourly_price"] is not None:
        found.append(("a million costs", lambda one: f"{one['cost']:.3g}"))
    else:
        found.append(("core-hours a million", lambda one: f"{one['core_hours']:.3g}"))
    return found


def _latency(one: Mapping[str, Any]) -> str:
    return f"{one['p50_ms']:.3g} [{min(one['rounds_p50_ms']):.3g}, {max(one['rounds_p50_ms']):.3g}]"


def _figure(share: Mapping[str, float]) -> str:
    return f"{share['value']:.4f} [{share['low']:.4f}, {share['high']:.4f}]"


def _gap(gap: Mapping[str, float]) -> str:
    return f"{gap['value'] * 100:+.2f} [{gap['low'] * 100:+.2f}, {gap['high'] * 100:+.2f}]"


def _worst(recall: Mapping[str, float] | None, name: str) -> str:
    return f"{recall['value']:.4f} {name}" if recall is not None else ""


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = zip(row, widths, strict=False)
    placed = [cell.rjust(width) if at > NUMBERS else cell.ljust(width) for at, (cell, width) in enumerate(cells)]
    return "  ".join(placed).rstrip()
