"""The evidence of a candidate in words and figures: for the report, `show`, the model card and the ledger."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from components.contracts.errors import VisionloopError
from components.contracts.evidence import CandidateEvidence, Flips, ShownPicture
from components.contracts.models import Preprocessing
from components.contracts.verdicts import Estimate, Robustness, SliceFigure
from components.contracts.wording import counted
from components.corruptions import BEHAVIOURS, CLEAN, CORRUPTED, changed
from components.images import load_prepared
from components.slices import SHOWN_AT

_WORST = 3
_SLICES_SHOWN = 20
_HEADINGS = {
    "lost": "Right by the champion, wrong now",
    "won": "Wrong by the champion, right now",
    "surest errors": "Errors that it was surest of",
    "least sure": "Right, and least sure",
}


def sentence(evidence: CandidateEvidence) -> str:
    """What became of the champion's answers, in one sentence."""
    if evidence.flips is None:
        return "There is no champion that it could be compared with, picture by picture."
    told = _difference_told(evidence.flips.difference)
    worse = shown_worse(evidence)
    if worse:
        names = "; ".join(
            f"{named(one.kind, one.name)} by {_points(-one.to_champion.value)}" for one in worse if one.to_champion
        )
        return f"{told}; it is shown to be worse in {counted(len(worse), 'slice')}: {names}."
    looked_at = sum(one.to_champion is not None for one in evidence.slices)
    nowhere = f"; in none of {counted(looked_at, 'slice')} is it shown to be worse" if looked_at else ""
    return f"{told}{nowhere}."


def named(kind: str, name: str) -> str:
    """A slice as a person reads it, such as `class 7`; the name of a cluster says what it is."""
    return name if name.startswith(kind) else f"{kind} {name}"


def shown_worse(evidence: CandidateEvidence) -> list[SliceFigure]:
    """The slices in which it is shown to be worse than the champion."""
    return [one for one in evidence.slices if one.p_below_champion is not None and one.p_below_champion <= SHOWN_AT]


def shown_weak(evidence: CandidateEvidence) -> list[SliceFigure]:
    """The slices in which it is shown to be worse than on all other pictures."""
    return [one for one in evidence.slices if one.p_below_rest <= SHOWN_AT]


def _difference_told(difference: Estimate) -> str:
    interval = f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    on = f"on {counted(difference.n, 'frozen test picture')}"
    if difference.low > 0:
        return f"Better than the champion by {_points(difference.value)} {interval} {on}"
    if difference.high < 0:
        return f"Worse than the champion by {_points(-difference.value)} {interval} {on}"
    return f"Not shown to be better or worse than the champion: {100 * difference.value:+.1f} points {interval} {on}"


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"


def evidence_json(evidence: CandidateEvidence) -> dict[str, Any]:
    """What the ledger and summaries hold of it."""
    return {
        "sentence": sentence(evidence),
        "flips": flips_json(evidence.flips) if evidence.flips else None,
        "worse_than_champion": [_slice_json(one) for one in shown_worse(evidence)],
        "worse_than_the_rest": [_slice_json(one) for one in shown_weak(evidence)[:_WORST]],
        "num_slices": len(evidence.slices),
        "notes": list(evidence.notes),
    }


def flips_json(flips: Flips) -> dict[str, Any]:
    return {
        **{name: getattr(flips, name) for name in ("both", "won", "lost", "neither")},
        "difference": {name: getattr(flips.difference, name) for name in ("value", "low", "high", "n")},
    }


def _slice_json(one: SliceFigure) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "name": one.name,
        "n": one.n,
        "value": one.accuracy.value,
        "low": one.accuracy.low,
        "high": one.accuracy.high,
        "champion": one.champion.value if one.champion else None,
        "p_below_rest": one.p_below_rest,
        "p_below_champion": one.p_below_champion,
    }


def told(summary: dict[str, Any]) -> list[str]:
    """The lines of `show`, from what the ledger holds; nothing for versions from before."""
    if not summary:
        return []
    lines = [summary["sentence"]]
    if flips := summary["flips"]:
        lines.append(
            f"Of the champion's answers {flips['lost']} right ones are wrong now and {flips['won']} wrong ones are right "
            f"(both right {flips['both']}, neither {flips['neither']})."
        )
    lines += [
        f"Weaker than on all other pictures: {named(one['kind'], one['name'])}, {one['value']:.4f} [{one['low']:.4f}, "
        f"{one['high']:.4f}] (n={one['n']})."
        for one in summary["worse_than_the_rest"]
    ]
    return lines


def card_lines(evidence: CandidateEvidence) -> list[str]:
    """The section of the model card."""
    lines = [sentence(evidence)]
    weak = shown_weak(evidence)
    lines += [f"Weaker than on all other pictures: {named(one.kind, one.name)}, {one.accuracy}" for one in weak[:_WORST]]
    if evidence.slices and not weak:
        lines.append(f"None of {counted(len(evidence.slices), 'slice')} is shown to be weaker than all other pictures")
    return lines


Address = Callable[[str], str]
"""From the name of a picture of the evidence to what a page's `src` says; empty for what is not there."""


def embedded(folder: Path) -> Address:
    """Pictures as part of the page."""
    return lambda name: "data:image/png;base64," + base64.b64encode((folder / name).read_bytes()).decode() if name else ""


def page(record: CandidateEvidence, address: Address) -> dict[str, Any]:
    """What report and console draw."""
    return {
        "sentence": sentence(record),
        "engine": record.engine,
        "flips": record.flips,
        "groups": [
            {"heading": heading, "pictures": [_picture(one, address) for one in record.pictures if one.why == why]}
            for why, heading in _HEADINGS.items()
            if any(one.why == why for one in record.pictures)
        ],
        "slices": _rows(record.slices),
        "num_slices": len(record.slices),
        "has_champion": any(one.champion for one in record.slices),
        "clusters": [
            {"name": one.name, "images": [image for name in one.thumbnails if (image := address(name))]}
            for one in record.clusters
        ],
        "saliency_by": record.saliency_by,
        "notes": record.notes,
    }


def corruptions(
    corrupted: Sequence[Robustness], champion: Robustness | None, examples: Sequence[dict[str, str]] = ()
) -> dict[str, Any] | None:
    """What engines and champion answer where the camera is worse, for report and console; None where none was asked.

    `examples` are the variants of one picture (`variants`).
    """
    asked = [record for record in corrupted if record.right]
    if not asked:
        return None
    columns = [(one.engine, one) for one in asked]
    if champion is not None and champion.right:
        columns.append(("the champion", champion))
    return {
        "n": asked[0].num_images,
        "engines": [name for name, _ in columns],
        "rows": [
            {
                "name": variant.replace("_", " ").replace("-", ", severity "),
                "cells": [_share(one.right.get(variant)) for _, one in columns],
            }
            for variant in (CLEAN, *CORRUPTED)
        ],
        "mean": [_share(one.corrupted) for _, one in columns],
        "behaviours": [
            {"name": name, "cells": [_share(one.unchanged.get(name)) for _, one in columns]} for name in BEHAVIOURS
        ],
        "examples": list(examples),
    }


def variants(preprocessing: Preprocessing, example: Path) -> list[dict[str, str]]:
    """One picture in every variant, as the network sees it; none of a picture that is not there or does not decode."""
    try:
        pixels = load_prepared(example, preprocessing)
    except (OSError, VisionloopError):
        return []
    found = []
    for variant in (CLEAN, *CORRUPTED):
        picture = changed(pixels[None], variant, ["an example"])[0]
        image = Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)
        image.thumbnail((96, 96))
        data = io.BytesIO()
        image.save(data, format="PNG")
        source = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        found.append({"name": variant.replace("_", " ").replace("-", " "), "image": source})
    return found


def _share(estimate: Estimate | None) -> tuple[str, str]:
    return ("", "") if estimate is None else (f"{estimate.value:.4f}", f"{estimate.low:.4f} to {estimate.high:.4f}")


def _rows(slices: Sequence[SliceFigure]) -> list[dict[str, Any]]:
    def cell(estimate: Estimate | None, sign: str = "") -> tuple[str, str]:
        if estimate is None:
            return "", ""
        return f"{estimate.value:{sign}.4f}", f"{estimate.low:{sign}.4f} to {estimate.high:{sign}.4f}"

    return [
        {
            "name": named(one.kind, one.name),
            "n": one.n,
            "accuracy": cell(one.accuracy),
            "to_rest": cell(one.to_rest, "+"),
            "to_champion": cell(one.to_champion, "+"),
            "weak": one.p_below_rest <= SHOWN_AT,
            "worse": one.p_below_champion is not None and one.p_below_champion <= SHOWN_AT,
        }
        for one in slices[:_SLICES_SHOWN]
    ]


def _picture(one: ShownPicture, address: Address) -> dict[str, Any]:
    return {
        "path": one.path,
        "label": one.label,
        "predicted": one.predicted,
        "confidence": one.confidence,
        "champion": one.champion_predicted,
        "champion_confidence": one.champion_confidence,
        "image": address(one.thumbnail),
        "saliency": address(one.saliency),
        "neighbours": [
            {"label": near.label, "path": near.path, "similarity": near.similarity, "image": address(near.thumbnail)}
            for near in one.neighbours
        ],
    }
