"""What happened to the data since the champion was trained, and what this run took: what an approver asks first."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from components import attributes, stored_files
from components.contracts.data import Renames
from components.contracts.errors import DataError, VisionloopError
from components.contracts.wording import counted
from components.differences import Difference, class_of, difference
from components.tables import read_frame
from flows.training.results import Results
from flows.training.run import Run

_MOST = 5
"""Classes and sources that are named, the largest first."""


def data_since(run: Run, results: Results) -> dict[str, Any] | None:
    """Files added, removed and relabelled since the champion's data version, by class and source; None without champion."""
    champion = results.current_champion
    if champion is None:
        return None
    since: dict[str, Any] = {"version": champion.version, "data_version": champion.data.dvc_hash}
    if champion.data.dvc_hash == run.data.dvc_hash:
        return since | {"added": 0, "removed": 0, "relabelled": 0, "by_class": {}, "by_source": {}}
    try:
        found = _between(run.workspace.root, champion.data.dvc_hash, run.data.dvc_hash, results.renamed)
    except VisionloopError as error:
        return since | {"problem": str(error)}
    new = {*found.added, *found.changed}
    sources = attributes.sources(run.workspace.root)
    samples = read_frame(results.dataset.folder / results.dataset.record.samples.name, ["path", "sha256"])
    by_source = Counter(
        sources.get(sha256, "") for path, sha256 in zip(samples["path"], samples["sha256"], strict=True) if path in new
    )
    return since | {
        "added": len(found.added),
        "removed": len(found.removed),
        "relabelled": len(found.relabelled),
        "changed": len(found.changed),
        "by_class": _by_class(found.added, found.removed, (one.after for one in found.relabelled)),
        "by_source": {name or "not said": number for name, number in by_source.most_common()},
    }


@functools.lru_cache(maxsize=1)
def _between(root: Path, before: str, after: str, renamed: Renames) -> Difference:
    """What differs between two versions, which their hashes name; asked for by the report and by the ledger's row."""
    with stored_files.objects(root) as objects:
        first, second = (objects.listed(version, "md5") for version in (before, after))
    if first.files is None or second.files is None:
        raise DataError(first.why_not or second.why_not)
    return difference(first.files, second.files, renamed)


def _by_class(added: Iterable[str], removed: Iterable[str], relabelled: Iterable[str]) -> dict[str, dict[str, int]]:
    counts = {
        what: Counter(map(class_of, paths))
        for what, paths in (("added", added), ("removed", removed), ("relabelled to", relabelled))
    }
    names = sorted({name for of in counts.values() for name in of} - {""})
    return {name: {what: of[name] for what, of in counts.items() if of[name]} for name in names}


def spent(run: Run, results: Results) -> dict[str, Any]:
    """What this run took: minutes of each stage that was computed, and how many of its labels are a person's."""
    table = read_frame(results.dataset.folder / results.dataset.record.samples.name, ["sha256"])
    known = attributes.read(run.workspace.root)
    of_model = sum(1 for sha256 in table["sha256"] if (one := known.get(sha256)) is not None and one.label_source == "model")
    computed = {name: seconds for name, (seconds, cached) in run.console.durations.items() if not cached}
    return {
        "labels": len(table),
        "labels_of_models": of_model,
        "minutes": round(sum(computed.values()) / 60, 1),
    }


def told(since: Mapping[str, Any] | None, cost: Mapping[str, Any] | None) -> list[str]:
    """Both in words, for `show` and the report; nothing for versions from before."""
    lines = []
    if since is not None:
        whose = f"Since the data of the champion (version {since['version']})"
        if "problem" in since:
            lines.append(f"{whose} it is not known what changed: {since['problem']}.")
        elif not any(since[name] for name in ("added", "removed", "relabelled")) and not since.get("changed"):
            lines.append(f"{whose} no file changed.")
        else:
            parts = [f"{since[name]} {name}" for name in ("added", "removed", "relabelled", "changed") if since.get(name)]
            lines.append(f"{whose}: {', '.join(parts)} files{_named(since)}.")
    if cost is not None:
        of_models = f", {cost['labels_of_models']} of them by a model" if cost["labels_of_models"] else ""
        lines.append(
            f"It took {counted(cost['labels'], 'labelled file')}{of_models} and {cost['minutes']:g} minutes of this machine."
        )
    return lines


def _named(since: Mapping[str, Any]) -> str:
    classes = sorted(since["by_class"].items(), key=lambda item: -sum(item[1].values()))
    shown = [f"{name} ({', '.join(f'{number} {what}' for what, number in of.items())})" for name, of in classes[:_MOST]]
    more = f" and {len(classes) - _MOST} more" if len(classes) > _MOST else ""
    sources = [f"{number} from {name}" for name, number in since["by_source"].items() if name != "not said"][:_MOST]
    return f"; {', '.join(shown)}{more}" * bool(shown) + f"; {', '.join(sources)}" * bool(sources)
