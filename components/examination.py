"""Examination: all that is known of a data set, and what the findings see in it. Nothing of the data is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components import duplicates
from components.contracts.families import Keep, Known, compute_anew
from components.contracts.issues import Issue, Looked
from components.contracts.progress import Progress, silent
from components.data_folder import listing
from components.facts import File, facts, unlooked
from components.formats import PINNED, Accepted
from components.images import decode
from components.issues import FindingConfig, chosen, look, needed

if TYPE_CHECKING:
    from components.embeddings import Encoder


@dataclass(frozen=True)
class Files:
    """The files of a data set: those in class folders, and those that are outside of one."""

    data: Path
    files: tuple[File, ...]
    strays: tuple[str, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Examined:
    """What was known, and what was found; the severest issues first."""

    known: Known
    issues: tuple[Issue, ...]
    looked: tuple[Looked, ...]
    notes: tuple[str, ...] = ()
    """What a person should know of how it was looked for."""


def dataset_files(data: Path, hashes: Mapping[str, str]) -> Files:
    """What lies in `data/`, with the md5 of those files that `hashes` tells by their path."""
    there = listing(data)
    files = tuple(
        File(path, name := path.relative_to(data).as_posix(), label, hashes.get(name, ""))
        for label, paths in there.classes.items()
        for path in paths
    )
    return Files(data, files, tuple(path.relative_to(data).as_posix() for path in there.strays), tuple(there.classes))


def examine(
    there: Files,
    findings: Sequence[FindingConfig] | None = None,
    *,
    members: Mapping[str, bool] | None = None,
    sources: Mapping[str, str] | None = None,
    encoder: Encoder | None = None,
    unlearned: str = "",
    cache: Path | None = None,
    accepted: Accepted = PINNED,
    num_threads: int = 2,
    progress: Progress = silent,
) -> Examined:
    """Look at every file once and ask the findings (all by default) what is wrong.

    `members` says by the digest of a picture whether it is test; one that it does not know is not. `sources` says by the
    sha256 of a file where it comes from. Embeddings are by `encoder`, or by what suits the pictures; `unlearned` says why
    there are to be none. They need a cache.
    """
    import pandas as pd

    asked = chosen(findings)
    needs = needed(asked)
    found = facts(there.files, cache=cache, accepted=accepted, progress=progress)
    table = found[found["reason"] == ""].sort_values("path", ignore_index=True)
    outside = unlooked(there.strays, "not directly in a class folder, or hidden")
    refused = pd.concat([found[found["reason"] != ""], outside]).sort_values("path", ignore_index=True)
    if members is not None:
        table["split"] = ["test" if members.get(picture, False) else "rest" for picture in table["picture"]]
    table["source"] = table["sha256"].map(dict(sources or {})).fillna("").astype(object)
    why = "there is no cache for embeddings" if cache is None else "there are no pictures" if not len(table) else unlearned
    embeddings, key = None, ""
    if needs & {"embeddings", "probabilities"} and not why:
        assert cache is not None
        from components.embeddings import embedded, encoder_for

        made_by = encoder_for(table, encoder)
        embeddings, why = embedded(table, there.data, made_by, cache=cache, num_threads=num_threads, progress=progress)
        key = made_by.key
    paths = {file.name: file.place for file in there.files}
    pairs = duplicates.pairs(
        table,
        read=lambda name: decode(paths[name].read_bytes()),
        embeddings=embeddings,
        embeddings_key=key,
        cache=cache,
        progress=progress,
    )
    absent = {"embeddings": why, "probabilities": why}
    probabilities = None
    keep: Keep = compute_anew
    if embeddings is not None and cache is not None:
        from components.embeddings import believed, keeping

        keep = keeping(cache, key)
    if embeddings is not None and "probabilities" in needs:
        clusters = duplicates.clusters_of(pairs, dict(zip(table["path"], table["picture"], strict=True)))
        probabilities, absent["probabilities"] = believed(embeddings, table, clusters, cache=cache, made_by=key)
    classes = tuple(sorted({*table["label"]}))
    known = Known(table, refused, tuple(pairs), embeddings, probabilities, classes, keep)
    issues, looked = look(known, asked, absent=absent)
    of_small = duplicates.told_of_small(table)
    return Examined(known, tuple(issues), looked, (of_small,) if of_small else ())
