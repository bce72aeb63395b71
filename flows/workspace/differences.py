"""`data diff` and `data log`: what differs between versions of the data, and which versions there were."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from components import history, stored_files
from components.contracts.errors import DataError, UndecodableImage
from components.contracts.progress import Progress, silent
from components.contracts.wording import counted
from components.data_folder import DATA
from components.differences import Difference, Moved, TestChanges, class_counts, difference
from components.formats import PINNED
from components.history import Compared, Version
from components.images import decode, in_threads, pixel_digest
from flows.workspace.workspace import Workspace

NOW = "now"
PINNED_VERSION = "pinned"
Read = Callable[[str, str], "bytes | str"]
"""The bytes of a file, by its path in `data/` and their hash; a sentence where they are not here."""


def compare(
    workspace: Workspace,
    before: str,
    after: str,
    *,
    look: Callable[[Compared, Read], None] | None = None,
    progress: Progress = silent,
) -> Compared:
    """Compare two versions: `pinned`, `now` for what lies in data/, a git revision, or a data version's hash.

    Only files that differ are read. `look` is given the result and a reader of those files while they can be read.
    """
    root = workspace.root
    with stored_files.objects(root) as objects:

        @functools.cache
        def lies_there() -> tuple[str, int, dict[str, str]]:
            if not workspace.data.is_dir():
                raise DataError(f"{workspace.data} is not there; `visionloop data pull` brings the pinned version")
            return objects.now()

        def resolved(given: str) -> Version:
            if given == PINNED_VERSION:
                return history.pinned(root)
            if given != NOW:
                return history.find(root, given)
            dvc_hash, size, files = lies_there()
            here = history.pinned(root)
            return dataclasses.replace(here, given=NOW, dvc_hash=dvc_hash, hash_name="md5", num_files=len(files), bytes=size)

        def listed(version: Version) -> stored_files.Listed:
            if version.given == NOW:
                return stored_files.Listed(lies_there()[2])
            return objects.listed(version.dvc_hash, version.hash_name)

        first, second = resolved(before), resolved(after)
        files, others = listed(first), listed(second)
        hash_names = {first.hash_name, second.hash_name}
        found, problem = None, files.why_not or others.why_not
        if files.files is not None and others.files is not None and len(hash_names) == 1:
            found = difference(files.files, others.files, _on_the_way(first, second))
        elif len(hash_names) > 1:
            problem = "one of the versions was made by an old DVC, whose hashes are not comparable with today's"

        def read(path: str, oid: str) -> bytes | str:
            return objects.read(path, oid, second.hash_name)

        not_here: dict[str, str] = {}
        test = _test_changes(workspace, first, second, found, read, not_here, progress)
        compared = Compared(first, second, found, problem, test, not_here)
        if look is not None:
            look(compared, read)
        return compared


def _on_the_way(before: Version, after: Version) -> tuple[tuple[str, str], ...]:
    """Classes that were renamed between two versions; backwards where the first one is the newer."""
    old, new = before.renamed, after.renamed
    if old[: len(new)] == new:
        return tuple((name, was) for was, name in reversed(old[len(new) :]))
    same = next((at for at, (one, other) in enumerate(zip(old, new, strict=False)) if one != other), len(old))
    return new[same:]


def _test_changes(
    workspace: Workspace,
    before: Version,
    after: Version,
    found: Difference | None,
    read: Read,
    not_here: dict[str, str],
    progress: Progress,
) -> TestChanges:
    then = history.sides(workspace.root, before)
    now = then if before.ledger_sha256 == after.ledger_sha256 else history.sides(workspace.root, after)
    if then is None or now is None:
        lacking = before.given if then is None else after.given
        return TestChanges(problem=f"the test ledger of {lacking} is not the one that its data.dvc names")
    rewritten = sum(then[picture] != now[picture] for picture in then.keys() & now.keys())
    if found is None:
        return TestChanges(rewritten=rewritten, problem="which files differ is not known")
    wanted = {
        **{("added", path): (path, oid) for path, oid in found.added.items()},
        **{("removed", path): (path, oid) for path, oid in found.removed.items()},
        **{("relabelled", one.after): (one.after, one.oid) for one in found.relabelled},
        **{("changed", path): (path, oids[0]) for path, oids in found.changed.items()},
        **{("changed to", path): (path, oids[1]) for path, oids in found.changed.items()},
    }
    named: dict[str, set[str]] = {kind: set() for kind in ("added", "removed", "relabelled", "changed", "undecided")}
    digests = in_threads(lambda entry: _picture(*entry, read), list(wanted.values()), progress=progress)
    for (kind, path), (picture, why) in zip(wanted, digests, strict=True):
        if why:
            not_here[path] = why
        if picture is None:
            continue
        side = (then if kind in ("removed", "changed") else now).get(picture)
        if side is None:
            named["undecided"].add(path)
        elif side:
            named[kind.removesuffix(" to")].add(path)
    return TestChanges(
        joined=tuple(sorted(named["added"])),
        left=tuple(sorted(named["removed"])),
        relabelled=tuple(sorted(named["relabelled"])),
        changed=tuple(sorted(named["changed"])),
        undecided=tuple(sorted(named["undecided"])),
        rewritten=rewritten,
    )


def _picture(path: str, oid: str, read: Read) -> tuple[str | None, str]:
    """The ledger's name of a file's picture, None of what is none; and why its bytes could not be read."""
    content = read(path, oid)
    if isinstance(content, str):
        return None, content
    try:
        return pixel_digest(decode(content, PINNED))[:32], ""
    except UndecodableImage:
        return None, ""


def pinned_so_far(workspace: Workspace) -> Version | None:
    """What is pinned; None where nothing is yet."""
    try:
        return history.pinned(workspace.root)
    except DataError:
        return None


def notes_on_labels(workspace: Workspace, before: Version | None, after: Version | None = None) -> list[str]:
    """What a person has to know of labels that changed from one version to a later one, or to what lies in data/.

    None are known where the list of files of one of them is not here.
    """
    if before is None or before.hash_name != "md5" or (after is not None and after.dvc_hash == before.dvc_hash):
        return []
    with stored_files.objects(workspace.root) as objects:
        files = objects.listed(before.dvc_hash, before.hash_name).files
        others = objects.listed(after.dvc_hash, after.hash_name).files if after is not None else objects.now()[2]
        if files is None or others is None:
            return []
        found = difference(files, others, _on_the_way(before, after) if after is not None else ())
        known = history.sides(workspace.root, history.pinned(workspace.root)) if found.relabelled else {}

        def is_test(one: Moved) -> bool:
            picture, _ = _picture(one.after, one.oid, lambda path, oid: objects.read(path, oid, before.hash_name))
            return picture is not None and bool(known and known.get(picture))

        in_test = list(in_threads(is_test, found.relabelled))
    notes = []
    if any(in_test):
        shown = [
            f"{DATA}/{one.before} -> {DATA}/{one.after}" for one, test in zip(found.relabelled, in_test, strict=True) if test
        ]
        notes.append(
            f"{counted(len(shown), 'frozen test picture')} relabelled: champion and candidate are judged by the new label "
            f"({', '.join(shown[:5])}{', ...' if len(shown) > 5 else ''})"
        )
    undone = "" if after is None else "move the folder back, pin that by `visionloop data add`, and then "
    notes += [
        f"class {one.old!r} is gone and {one.new!r} has its images: a champion that knows {one.old!r} is not compared on "
        f"it. If it is the same class, {undone}say so by `visionloop data rename-class {one.old} {one.new}`"
        for one in found.renamed_classes
        if not one.recorded
    ]
    return notes


@dataclass(frozen=True)
class LoggedVersion:
    """A version, and how it differs from the one before it."""

    version: Version
    classes: tuple[str, ...] | None
    """None where the list of its files is not here."""
    counts: dict[str, int] | None
    """Files by kind of difference; None for the first one, and where a list of files is not here."""
    problem: str


def log(workspace: Workspace, most: int) -> Iterator[LoggedVersion]:
    """Versions of this branch, newest first, beginning with what is pinned and not committed yet."""
    versions = history.log(workspace.root, most + 1)
    with stored_files.objects(workspace.root) as objects:

        def listed(version: Version) -> stored_files.Listed:
            if version.problem:
                return stored_files.Listed(None, version.problem)
            return objects.listed(version.dvc_hash, version.hash_name)

        here = listed(versions[0]) if versions else stored_files.Listed(None)
        for version, earlier in itertools.zip_longest(versions[:most], versions[1:]):
            if version is None:
                return
            before = listed(earlier) if earlier is not None else stored_files.Listed(None)
            counts, problem = None, here.why_not or before.why_not
            if here.files is not None and before.files is not None and earlier.hash_name == version.hash_name:
                counts = difference(before.files, here.files, _on_the_way(earlier, version)).counts
            classes = None if here.files is None else tuple(class_counts(here.files))
            yield LoggedVersion(version, classes, counts, problem)
            here = before
