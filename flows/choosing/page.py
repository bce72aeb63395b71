"""The page of a choice: one self-contained HTML file, made of its record alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from components.contracts.wording import counted
from components.store import write_atomically
from components.variant_rule import most_accurate, not_beaten
from components.variants import Choice, Variant
from flows.choosing.figures import pareto_figure
from flows.choosing.outcome import CAUTION, NUMBERS, columns, none_chosen, summarise
from flows.pages.figures import environment, in_words, prepare_figures

PAGE = "report.html"


def write_page(choice: Choice, winner: Path | None, folder: Path) -> Path:
    """Write the page of a choice into its folder."""
    write_atomically(folder / PAGE, render(choice, winner.stem if winner else "").encode())
    return folder / PAGE


def render(choice: Choice, winner: str) -> str:
    """HTML of the page."""
    summary = summarise(choice, None, Path())
    measured = [one for one in choice.variants if one.status == "measured"]
    numbers = {one.name: number for number, one in enumerate(measured, 1)}
    best = most_accurate(measured)
    floor = best.share - choice.config.within if best and choice.config.objective != "most_accurate" else None
    prepare_figures()
    if choice.hourly_price is None:
        costing = "hours of one core for a million answers"
    else:
        costing = f"what a million answers cost at {choice.hourly_price:g} an hour of the machine"
    figures = [
        pareto_figure(choice, numbers, _latencies, "p50 latency of one image, ms; range of the rounds", floor),
        pareto_figure(choice, numbers, _costs, f"{costing}, in batches; range of the rounds", floor),
    ]
    fronts = (not_beaten(measured, lambda one: _latencies(one)[0]), not_beaten(measured, lambda one: _costs(one)[0]))
    front = {one.name for each in fronts for one in each}
    of = columns(summary)
    return (
        environment()
        .get_template("choice.html")
        .render(
            choice=choice,
            chosen=choice.of(choice.chosen),
            winner=winner,
            digest=choice.digest(),
            none_chosen=none_chosen(summary),
            headline=in_words(choice.headline),
            figures=figures,
            floor=floor is not None,
            heads=[head for head, _ in of],
            first_number=NUMBERS,
            rows=[
                _row(one, choice, numbers[one.name], front, [cell(told) for _, cell in of])
                for one, told in zip(choice.variants, summary["variants"], strict=True)
                if one.status == "measured"
            ],
            left_out=[one for one in choice.variants if one.status != "measured"],
            caution=CAUTION,
            counted=counted,
        )
    )


def _latencies(one: Variant) -> list[float]:
    return [one.latency_ms, *one.rounds_p50_ms]


def _costs(one: Variant) -> list[float]:
    cost = one.cost if one.cost is not None else one.core_hours
    assert cost is not None
    return [cost, *(cost * one.rate / rate for rate in one.rounds_images_a_second)]


def _row(one: Variant, choice: Choice, number: int, front: set[str], cells: list[str]) -> dict[str, Any]:
    if one.name == choice.chosen:
        badge, kind = "chosen", "pass"
    elif one.missed:
        badge, kind = "misses a limit", "fail"
    else:
        badge, kind = ("not beaten", "") if one.name in front else ("beaten", "")
    split = [cell.partition(" [") for cell in cells[1:]]  # an interval stands below its value
    parts = [(cells[0], ""), *((value, f"[{interval}" if interval else "") for value, _, interval in split)]
    return {"number": number, "cells": parts, "told": one.told, "badge": badge, "kind": kind, "beaten": badge == "beaten"}
