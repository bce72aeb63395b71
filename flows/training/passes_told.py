"""What passes removed, what that cost and what it bought, in words: for pages, model card, `show` and the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from components.contracts.evidence import ClassCost, PassesCost
from components.contracts.models import AppliedPass, NetworkSize
from components.contracts.wording import counted
from components.intervals import paired_interval
from components.slices import SHOWN_AT
from flows.training.results import Results, estimate_json

_CLASSES = 30
"""Classes that the ledger holds and pages show, at most: those that are shown to be worse, then those that lost most."""


def passes_json(results: Results) -> dict[str, Any] | None:
    """What the ledger holds of it; None without passes."""
    optimised = results.checkpoint.record.optimised
    if optimised is None:
        return None
    return {
        "made_of": optimised.made_of,
        "passes": [_pass_json(each) for each in optimised.passes],
        "cost": _cost_json(results.passes_cost.record) if results.passes_cost else None,
    }


def _pass_json(applied: AppliedPass) -> dict[str, Any]:
    return {
        "name": applied.name,
        "settings": dict(applied.settings),
        "epochs": applied.epochs,
        "before": _size_json(applied.before),
        "after": _size_json(applied.after),
        "valid": list(applied.valid),
        "notes": list(applied.notes),
        **({"compared": {name: list(counts) for name, counts in applied.compared.items()}} if applied.compared else {}),
    }


def _size_json(size: NetworkSize) -> dict[str, int]:
    return {name: getattr(size, name) for name in ("parameters", "zeros", "macs", "stored_bytes")}


def _cost_json(cost: PassesCost) -> dict[str, Any]:
    flips = cost.answers
    worse = [each for each in cost.by_class if _worse(each)]
    others = [each for each in cost.by_class if not _worse(each)]
    known = bool(cost.by_class) and all(each.p_worse is not None for each in cost.by_class)
    return {
        "engine": cost.engine,
        "lost": flips.lost if flips else None,
        "won": flips.won if flips else None,
        "difference": estimate_json(flips.difference) if flips else None,
        "classes": [
            {
                "name": each.name,
                "before": each.before,
                "after": each.after,
                "difference": estimate_json(each.difference),
                "worse": _worse(each),
            }
            for each in (*worse, *others)[:_CLASSES]
        ],
        "num_classes": len(cost.by_class),
        "num_worse": len(worse) if known else None,
        "p50_before_ms": cost.p50_before_ms,
        "p50_after_ms": cost.p50_after_ms,
        "speedup": estimate_json(cost.speedup) if cost.speedup else None,
        "machine": cost.machine,
        "engine_bytes_before": cost.engine_bytes_before,
        "engine_bytes_after": cost.engine_bytes_after,
        "notes": list(cost.notes),
    }


def _worse(cost: ClassCost) -> bool:
    """Whether a class is shown to be worse, as a slice is; records of before the correction show it of none."""
    return cost.p_worse is not None and cost.p_worse <= SHOWN_AT


def page(told: dict[str, Any] | None, headline: str) -> dict[str, Any] | None:
    """What report and console draw of `passes_json`; None without passes, and for versions from before there were any."""
    if not told:
        return None
    cost = told["cost"] or {}
    return {
        "told": [*(note for one in told["passes"] for note in one["notes"]), *_cost_lines(told["cost"], headline)],
        "rows": [_row(each) for each in told["passes"]],
        "classes": [
            {
                "name": each["name"],
                "n": each["difference"]["n"],
                "before": f"{each['before']:.4f}",
                "after": f"{each['after']:.4f}",
                "difference": f"{each['difference']['value']:+.4f}",
                "interval": f"{each['difference']['low']:+.4f} to {each['difference']['high']:+.4f}",
                "worse": each.get("worse", False),
            }
            for each in cost.get("classes", ())
        ],
        "num_classes": cost.get("num_classes", 0),
        "engine": cost.get("engine", ""),
    }


def _row(one: dict[str, Any]) -> dict[str, Any]:
    before, after = one["before"], one["after"]
    return {
        "name": one["name"],
        "settings": ", ".join(f"{key} {_value(value)}" for key, value in one["settings"].items()),
        "epochs": one["epochs"],
        "sizes": [
            ("parameters", f"{before['parameters']:,}", f"{after['parameters']:,}", _fallen(before, after, "parameters")),
            ("multiplications", f"{before['macs']:,}", f"{after['macs']:,}", _fallen(before, after, "macs")),
            ("zeros among the parameters", f"{before['zeros']:,}", f"{after['zeros']:,}", ""),
            ("stored", _mb(before["stored_bytes"]), _mb(after["stored_bytes"]), _fallen(before, after, "stored_bytes")),
        ],
        **_valid_row(one["valid"]),
        "compared": [{"name": name, **_valid_row(counts)} for name, counts in one.get("compared", {}).items()],
        "notes": one["notes"],
    }


def _valid_row(counts: Sequence[int]) -> dict[str, Any]:
    """Paired right answers to valid of the network before a pass and of another one."""
    both, only_before, only_other, neither = counts
    n = sum(counts)
    low, high = paired_interval(both, only_other, only_before, neither)
    return {
        "valid": (f"{(both + only_before) / n:.4f}", f"{(both + only_other) / n:.4f}"),
        "difference": f"{(only_other - only_before) / n:+.4f}",
        "interval": f"{low:+.4f} to {high:+.4f}",
        "n": n,
    }


def lines(told: dict[str, Any] | None, headline: str) -> list[str]:
    """A sentence a pass, and what all of them cost and bought; nothing without passes."""
    if not told:
        return []
    found = []
    for one in told["passes"]:
        row = _row(one)
        sizes = "; ".join(f"{name} {was} to {now}{f' ({share})' if share else ''}" for name, was, now, share in row["sizes"])
        found.append(
            f"{row['name']} ({row['settings']}): {sizes}; valid {headline} {row['valid'][0]} to {row['valid'][1]}, "
            f"{row['difference']} [{row['interval']}] (n={row['n']}{', which chose its epochs' if row['epochs'] else ''})"
        )
        found += list(row["notes"])
    return found + _cost_lines(told["cost"], headline)


def _cost_lines(cost: dict[str, Any] | None, headline: str) -> list[str]:
    if cost is None:
        return ["what the passes cost on test was not asked (optimisation.compare is false)"]
    found = []
    if (difference := cost["difference"]) is not None:
        found.append(
            f"on test, as {cost['engine']}, {headline} changed by {difference['value']:+.4f} [{difference['low']:+.4f}, "
            f"{difference['high']:+.4f}] (n={difference['n']}, image by image): {cost['lost']} right answers are wrong now, "
            f"{cost['won']} wrong ones right"
        )
        # Records of before the correction do not say how many are worse.
        if (num_worse := cost.get("num_worse")) is not None:
            found.append(_worse_line(cost, num_worse))
    if (speedup := cost["speedup"]) is not None:
        found.append(
            f"p50 of a single image {cost['p50_before_ms']:.2f} to {cost['p50_after_ms']:.2f} ms, "
            f"{speedup['value']:.2f}x as fast [{speedup['low']:.2f}, {speedup['high']:.2f}] ({speedup['n']} rounds in "
            f"turns, {cost['machine']})"
        )
    found.append(f"engine {_mb(cost['engine_bytes_before'])} to {_mb(cost['engine_bytes_after'])}")
    return found + list(cost["notes"])


def _worse_line(cost: dict[str, Any], num_worse: int) -> str:
    classes = counted(cost["num_classes"], "class")
    if not num_worse:
        return f"none of {classes} is shown to be worse, after Holm's correction for all of them"
    shown = [each for each in cost["classes"] if each["worse"]]
    named = [f"{each['name']} by {-each['difference']['value']:.4f} (n={each['difference']['n']})" for each in shown]
    more = [f"and {num_worse - len(shown)} more"] if num_worse > len(shown) else []
    return f"shown to be worse, after Holm's correction for {classes}: {', '.join(named + more)}"


def _fallen(before: dict[str, int], after: dict[str, int], name: str) -> str:
    return f"{after[name] / before[name] - 1:+.1%}" if before[name] else ""


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.1f} kB"


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else f"{value}"
