"""Data commands: bring images into a workspace, pin them as a version, and get them back."""

from __future__ import annotations

import functools
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import attributes, data_folder, dataversions, history, transfers
from components.attributes import Attributes
from components.clusters import Clusters
from components.companions import TEST_LEDGER
from components.contracts.data import DataVersion
from components.contracts.errors import DataDiffers, DataError, UndecodableImage
from components.contracts.progress import Progress, silent
from components.contracts.wording import counted
from components.facts import File, facts
from components.formats import PINNED, Accepted, check_size
from components.images import check, in_threads
from components.samples import alike
from components.splitting import TestLedger
from components.store import explained, sha256_file
from flows.workspace.differences import notes_on_labels
from flows.workspace.incoming import Incoming, LeftOut, SplitsUndecided, incoming
from flows.workspace.near_duplicates import MAX_CLUSTER_SHARE, Handling, Looked, look_for
from flows.workspace.sides import frozen_sides
from flows.workspace.sources import Staged, staged
from flows.workspace.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd

_PSEUDO = "labelled by a model, and its picture is frozen as test"
_BY_SETTING = "VISIONLOOP_FORMATS, VISIONLOOP_MAX_PIXELS or VISIONLOOP_MAX_IMAGE_MB, which serving needs too"


@dataclass(frozen=True)
class Added:
    """What `data add` did. Of a folder or a source, found = copied + there already + left out."""

    version: DataVersion
    num_found: int
    num_copied: int
    num_already_there: int
    left_out: tuple[LeftOut, ...]
    num_new_test: int
    undecodable: tuple[str, ...]
    refused: dict[str, str]
    """Files that serving would refuse and why, by their name in the folder: not copied, and named in `left_out`, too."""
    class_counts: dict[str, int]
    sides: Sides
    test_counts: dict[str, int]
    """Test images of each class."""
    test_share: float
    num_with_attributes: int = 0
    """Files that the source said something of beside their class."""
    new_classes: tuple[str, ...] = ()
    """Classes that were not there before, of data that was."""
    changed_attributes: tuple[str, ...] = ()
    """What was known of files and is said to be something else, a sentence each."""
    looked: Looked | None = None
    """What was found of near-duplicates."""
    num_only_split: int = 0
    """Pictures whose side was known only by what a run here had split; see `flows.workspace.sides`."""


@dataclass(frozen=True)
class Sides:
    """Files of predefined splits that are not on the side of the folder they came from, each in one list."""

    leaked: tuple[str, ...] = ()
    """Of train/ or val/, and the same pictures are in test/, so these are test."""
    stay_test: tuple[str, ...] = ()
    """Of train/ or val/, frozen as test by an earlier add."""
    stay_rest: tuple[str, ...] = ()
    """Of test/, frozen as no test pictures by an earlier add."""


def add(
    workspace: Workspace,
    folder: Path | None,
    *,
    test_share: float | None,
    keep_splits: bool | None = None,
    source: Staged | None = None,
    near_duplicates: Handling = "refuse",
    max_cluster_share: float = MAX_CLUSTER_SHARE,
    accepted: Accepted = PINNED,
    progress: Progress = silent,
) -> Added:
    """Copy `folder` (one sub-folder per class) into data/, freeze the side of every new picture, pin the version.

    A folder of train/, test/ and perhaps val/ is merged: with `keep_splits` the new pictures of test/ alone become test,
    with False a share of all as ever. In place of a folder, `source` is what a source wrote; what it knows of its files
    goes beside the version.

    Near-duplicates are looked for among all pictures, new and old, and fall on one side. Where new ones would poison the
    frozen test set, `near_duplicates` says what becomes of them; PoisonsTest where nobody did, and nothing is changed then.

    What serving would refuse by `accepted` is left out. Raises DataError when that is everything, or when it lies in data/
    and is not pinned yet.

    Without either, what lies in data/ is pinned as it is. Nothing is removed or overwritten; a run that is killed leaves
    the old version pinned, and running again completes it.
    """
    root = workspace.root
    frozen = frozen_sides(workspace, test_share)
    ledger = frozen.ledger
    clusters = Clusters.read(root)
    kept, sides = ledger, Sides()
    refused: dict[str, str] = {}
    copied = there = found = 0
    left_out: list[LeftOut] = []
    said: list[tuple[Path, Attributes]] = []
    changed: list[str] = []
    classes = {path.name for path in workspace.data.iterdir()} if workspace.data.is_dir() else set()
    look = functools.partial(
        look_for, workspace, clusters, handling=near_duplicates, max_cluster_share=max_cluster_share, progress=progress
    )
    if source is not None:
        folder = source.folder
    if folder is not None:
        given = (
            incoming(folder, workspace.data, keep_splits=keep_splits)
            if source is None
            else _given(source, workspace.data, keep_splits=keep_splits)
        )
        reasons = _refused(given.files, accepted)
        refused = {_within(folder, path): why for path, why in reasons.items()}
        taken = [(label, path) for label, path in given.files if path not in reasons]
        if given.test is not None:
            files = [path for _, path in taken]
            kept, sides = _keep_splits(files, given.test, folder, ledger, clusters, workspace.cache, progress)
        of_test: set[Path] = set()
        if source is not None:
            said = [(path, source.attributes.get(path.relative_to(folder).as_posix(), Attributes())) for _, path in taken]
            pseudo = [path for path, what in said if what.label_source == "model"]
            kept, of_test = _keep_outside(pseudo, given.test or frozenset(), kept, clusters, workspace.cache, progress)
            taken = [(label, path) for label, path in taken if path not in of_test]
            said = [(path, what) for path, what in said if any(what) and path not in of_test]
        groups = {path: what.group for path, what in said if what.group}
        looked = look(taken, folder, groups, ledger=kept, keep_splits=given.test is not None)
        plan, there = _plan(taken, workspace.data)
        # Before a file is copied: a run that is killed then leaves no picture in data/ whose side another would draw, and
        # none that nobody knows to be labelled by a model.
        if kept is not ledger:
            kept.write(root / TEST_LEDGER)
        changed = _learn(root, said, folder)
        copied, vanished = _copy(plan, workspace.data, folder, workspace.state / "tmp", link=source is not None)
        left_out = [
            *(source.left_out if source is not None else ()),
            *given.left_out,
            *(LeftOut(name, why) for name, why in refused.items()),
            *(LeftOut(name, _PSEUDO) for name in sorted(_within(folder, path) for path in of_test)),
            *vanished,
        ]
        found = copied + there + len(left_out)
    if not workspace.data.is_dir():
        raise DataError(f"{workspace.data} is not there; name a folder: `visionloop data add FOLDER`")
    lies_there = data_folder.listing(workspace.data)
    if folder is None:
        reason = "the workspace's .dvcignore leaves it out of versions"
        left_out = [LeftOut(data_folder.shown(path.relative_to(root)), reason) for path in lies_there.ignored]
        found = len(lies_there.files) + len(left_out)
        there = len(lies_there.files)
        looked = look([], root, {}, ledger=kept)
    usable, undecodable = _usable(workspace, lies_there, clusters, ledger, accepted, progress)
    pictures = list(zip(usable["picture"], usable["label"], strict=True))
    # Before the ledger changes: what can fail for want of space is done, and pin and ledger still agree if it does.
    dataversions.store(root)
    kept = kept.with_sides(dict.fromkeys(looked.not_test, False))
    clusters = looked.clusters.with_attributes_of(root).grown(
        [], dict(zip(usable["sha256"], usable["picture"], strict=True))
    )
    extended = kept.extended(pictures, together=clusters.together(usable), near=clusters.near)
    clusters.write(root)
    extended.write(root / TEST_LEDGER)
    version = dataversions.pin(root)
    empty = [path.name for path in workspace.data.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return Added(
        version=version,
        num_found=found,
        num_copied=copied,
        num_already_there=there,
        left_out=tuple(left_out),
        num_new_test=sum(extended.members.values()) - sum(ledger.members.values()),
        undecodable=tuple(sorted(undecodable)),
        refused=refused,
        # An empty folder is no part of a version, and surely not meant.
        class_counts={label: len(lies_there.classes.get(label, ())) for label in sorted({*empty, *lies_there.classes})},
        sides=sides,
        num_with_attributes=len(said),
        changed_attributes=tuple(changed),
        looked=looked,
        new_classes=tuple(sorted(lies_there.classes.keys() - classes)) if classes else (),
        test_counts=dict.fromkeys(lies_there.classes, 0)
        | Counter(label for picture, label in pictures if extended.members[picture]),
        test_share=extended.test_share,
        num_only_split=frozen.num_only_split,
    )


def _usable(
    workspace: Workspace,
    lies_there: data_folder.Listing,
    clusters: Clusters,
    ledger: TestLedger,
    accepted: Accepted,
    progress: Progress,
) -> tuple[pd.DataFrame, list[str]]:
    """Path, label, sha256 and picture of all in data/ that can be decoded, and what cannot be.

    Every picture is looked at, not only those DVC calls new: the ledger must not depend on what DVC's cache still holds.
    Raises DataError for a new one that serving would refuse.
    """
    root, data = workspace.root, workspace.data
    known = dataversions.hashes(root)
    touched = [
        File(path, name := path.relative_to(data).as_posix(), label, known.get(name, ""))
        for label, paths in lies_there.classes.items()
        for path in paths
    ]
    found = _readable(touched, facts(touched, cache=workspace.cache, accepted=accepted, progress=progress))
    usable = found[found["reason"] == ""]
    usable = usable.assign(picture=clusters.first_seen(usable, ledger.members))
    is_new = ~usable["picture"].isin(ledger.members.keys())
    refused = usable[is_new & (usable["not_served"] != "")]
    new_but_refused = [f"{name}: {why}" for name, why in zip(refused["path"], refused["not_served"], strict=True)]
    if new_but_refused:
        raise DataError(
            f"serving would refuse {counted(len(new_but_refused), 'new picture')} in {data} "
            f"({'; '.join(new_but_refused[:3])}); convert or remove them, or accept them by {_BY_SETTING}. "
            f"Nothing was pinned"
        )
    return usable[["path", "label", "sha256", "picture"]], list(found.loc[found["reason"] != "", "path"])


def _readable(files: Sequence[File], found: pd.DataFrame) -> pd.DataFrame:
    """The facts of files all of which could be read; raises DataError for one that could not."""
    unread = found.index[found["sha256"] == ""]
    if len(unread):
        place, why = files[unread[0]].place, found.loc[unread[0], "reason"]
        raise DataError(f"{place} {why}; mend it and run the command again")
    return found


def _shown_by(
    files: Sequence[Path], clusters: Clusters, ledger: TestLedger, cache: Path, progress: Progress
) -> list[tuple[Path, str]]:
    """(file, digest of its pixels when it was first seen) of those files that can be decoded."""
    looked = [File(path, path.name, "") for path in files]
    found = _readable(looked, facts(looked, cache=cache, progress=progress))
    pictures = clusters.first_seen(found, ledger.members)
    return [(path, picture) for path, picture in zip(files, pictures, strict=True) if picture]


def _keep_splits(
    files: list[Path],
    test: frozenset[Path],
    folder: Path,
    ledger: TestLedger,
    clusters: Clusters,
    cache: Path,
    progress: Progress,
) -> tuple[TestLedger, Sides]:
    """The ledger with new pictures on the side of their split, and what is on the other one; `test` are the files of test/.

    A file that cannot be decoded has no side: validation quarantines it.
    """
    pictures = _shown_by(files, clusters, ledger, cache, progress)
    in_test = {picture for path, picture in pictures if path in test}
    kept = ledger.with_sides({picture: picture in in_test for _, picture in pictures})
    moved = [(path, picture) for path, picture in pictures if kept.members[picture] != (path in test)]
    return kept, Sides(
        leaked=tuple(_within(folder, path) for path, picture in moved if path not in test and picture in in_test),
        stay_test=tuple(_within(folder, path) for path, picture in moved if path not in test and picture not in in_test),
        stay_rest=tuple(_within(folder, path) for path, _ in moved if path in test),
    )


def _keep_outside(
    pseudo: list[Path],
    test: frozenset[Path],
    ledger: TestLedger,
    clusters: Clusters,
    cache: Path,
    progress: Progress,
) -> tuple[TestLedger, set[Path]]:
    """The ledger with the pictures that a model labelled outside test, and the files whose pictures are test already.

    Raises DataError for those that a source puts into test/.
    """
    if in_test := sorted(path for path in pseudo if path in test):
        first = data_folder.shown(Path(in_test[0].name))
        raise DataError(
            f"{counted(len(in_test), 'file')} of test/ have label_source=model (first: {first}); "
            f"what a model labelled is never test: put them into train/, or have a person label them. Nothing was changed"
        )
    pictures = _shown_by(pseudo, clusters, ledger, cache, progress)
    kept = ledger.with_sides({picture: False for _, picture in pictures}) if pictures else ledger
    return kept, {path for path, picture in pictures if kept.members[picture]}


def _learn(root: Path, said: Iterable[tuple[Path, Attributes]], folder: Path) -> list[str]:
    """Write what a source knows of its files beside the version; returns what it says otherwise than was known."""
    names = {}
    rows = []
    for path, what in said:
        sha256 = sha256_file(path)
        names[sha256] = _within(folder, path)
        rows.append((sha256, what))
    if not rows:
        return []
    known, changed = attributes.learned(attributes.read(root), rows)
    attributes.write(root, known)
    return [
        f"{names[one.sha256]}: {one.column} was {one.known!r}, "
        + ("and stays so: a model's label replaces no person's" if one.is_kept else f"and is {one.said!r} now")
        for one in changed
    ]


def ensure(workspace: Workspace, source: str | None, settings: Mapping[str, Any] | None = None) -> DataVersion:
    """The verified pinned version; an empty workspace whose recipe names a source is filled from it first.

    Raises DataDiffers when the bytes are not the pinned ones; what was there before is untouched.
    """
    if source is not None and not workspace.data.exists():
        pinned = dataversions.pinned(workspace.root)
        with staged(workspace, source, settings) as made:
            merged = _merged(_given(made, workspace.data, keep_splits=False), made.folder)
            found = dataversions.hash_of(workspace.root, merged)
            if found != pinned.dvc_hash:
                raise DataDiffers(
                    f"{made.told} made other bytes than data.dvc pins ({pinned.dvc_hash}, not {found}); they were not "
                    f"kept. Install the locked versions (`make setup`)"
                )
            os.rename(merged, workspace.data)
        dataversions.keep(workspace.root)
        return pinned
    return dataversions.verify(workspace.root)


def _given(source: Staged, data: Path, *, keep_splits: bool | None) -> Incoming:
    try:
        given = incoming(source.folder, data, keep_splits=keep_splits)
    except SplitsUndecided:
        raise SplitsUndecided(
            f"{source.told} is already split. Keep its test images as the frozen test with --keep-splits, or let "
            f"visionloop choose the test images among all of it with --merge-splits"
        ) from None
    except DataError as error:
        raise DataError(f"{source.told} wrote no data set; nothing was kept. {error}") from error
    there = data.resolve()
    for label, path in given.files:
        # A list may name what lies in data/ and say more of it; under another class it would be there twice.
        lies = path.parent / path.readlink() if path.is_symlink() else path
        if lies.is_relative_to(there) and lies.relative_to(there).parts[0] != label:
            raise DataError(
                f"{data_folder.shown(lies)} lies in this workspace's data, and {source.told} says {label!r}; move the file "
                f"into that class, or relabel it with `visionloop data review`. Nothing was changed"
            )
    return given


def _merged(given: Incoming, written: Path) -> Path:
    """A folder of class folders with what a source wrote, brought there where it is split or holds links."""
    if all(path.parent.parent == written and not path.is_symlink() for _, path in given.files):
        return written
    merged = written.parent / "merged"
    shutil.rmtree(merged, ignore_errors=True)  # of a run that was killed
    for path, destination in _plan(given.files, merged)[0]:
        destination.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            shutil.copyfile(path, destination)
        else:
            os.rename(path, destination)
    return merged


def _plan(files: list[tuple[str, Path]], data: Path) -> tuple[list[tuple[Path, Path]], int]:
    """(file, where it goes) for what is to be copied, and how many files are there already, byte for byte.

    A name that is taken by other bytes, or by a name that another file system would not tell from it, gets a digest.
    Raises DataError for a name or path that would be too long.
    """
    plan: list[tuple[Path, Path]] = []
    there = 0
    taken: dict[tuple[str, str], Path] = {}
    known: set[str] = set()
    for label, path in files:
        folder = data / label
        if label not in known:
            known.add(label)
            taken |= {(label, alike(name)): folder / name for name in (os.listdir(folder) if folder.is_dir() else ())}
        destination = folder / path.name
        holder = destination if destination.exists() else taken.get((label, alike(path.name)))
        if holder is not None:
            digest = sha256_file(path)
            while holder is not None and sha256_file(holder) != digest:
                length = 12 if destination.name == path.name else 64
                destination = folder / f"{path.stem}-{digest[:length]}{path.suffix}"
                holder = destination if destination.exists() else taken.get((label, alike(destination.name)))
            if holder is not None:
                there += 1
                continue
        taken[label, alike(destination.name)] = path
        plan.append((path, destination))
    longest_name, longest_path = (os.pathconf(data.parent, limit) for limit in ("PC_NAME_MAX", "PC_PATH_MAX"))
    for path, destination in plan:
        if len(os.fsencode(destination.name)) > longest_name or len(os.fsencode(destination)) >= longest_path:
            raise DataError(
                f"{data_folder.shown(path)} would become {data_folder.shown(destination)}, which is too long for the "
                f"workspace's disk ({longest_name} bytes a name, {longest_path} a path); shorten it"
            )
    return plan, there


def _copy(
    plan: list[tuple[Path, Path]], data: Path, folder: Path, scratch: Path, *, link: bool
) -> tuple[int, list[LeftOut]]:
    """Bring files to their places, by a second name where they are ours to `link`: they are removed when all is done."""
    scratch.mkdir(parents=True, exist_ok=True)
    for stale in scratch.glob("copy-*"):
        stale.unlink()  # of a run that was killed: the workspace is held, so nobody else copies
    vanished: list[LeftOut] = []
    for path, destination in plan:
        # Not beside the destination: a kill must not leave a file that becomes part of the version.
        temporary = scratch / f"copy-{uuid.uuid4().hex}"
        try:
            with explained("copy into", data):
                if path.is_symlink() or not (link and transfers.linked(path, temporary)):
                    shutil.copyfile(path, temporary)
                destination.parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary, destination)
        except OSError as error:
            if not path.exists():
                vanished.append(LeftOut(_within(folder, path), "it vanished while it was copied"))
                continue
            raise DataError(
                f"cannot copy {data_folder.shown(path)}: {error.strerror}. The old version is still the pinned one; "
                f"mend it and run the command again, it goes on where it stopped"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
    return len(plan) - len(vanished), vanished


def _refused(files: list[tuple[str, Path]], accepted: Accepted) -> dict[Path, str]:
    """The files that serving would refuse and why; raises DataError when that is all of them."""

    def reason(path: Path) -> str:
        try:
            check_size(path.stat().st_size, accepted)  # before a film is read whole
            check(path.read_bytes(), accepted)
        except UndecodableImage as error:
            return str(error)
        except FileNotFoundError:
            return "it vanished while it was looked at"
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; mend it and run the command again") from error
        return ""

    reasons = list(in_threads(reason, [path for _, path in files]))
    if files and all(reasons):
        raise DataError(
            f"of {counted(len(files), 'file')} none is a picture that is accepted ({files[0][1]}: {reasons[0]}); "
            f"convert them, or accept them by {_BY_SETTING}. Nothing was changed"
        )
    return {path: why for (_, path), why in zip(files, reasons, strict=True) if why}


def _within(folder: Path, path: Path) -> str:
    """A file's name in its folder, as it can be printed anywhere."""
    return data_folder.shown(path.relative_to(folder))


@dataclass(frozen=True)
class DataStatus:
    """data/ beside the pinned version."""

    version: DataVersion
    changes: dict[str, list[str]]
    """Files by kind of change; none where data/ is exactly that version."""
    notes: tuple[str, ...] = ()
    """Sentences on labels that changed."""


def status(workspace: Workspace) -> DataStatus:
    """Compare data/ with the pinned version; raises DataError where nothing is pinned."""
    root = workspace.root
    version = dataversions.pinned(root)
    if not workspace.data.is_dir():
        return DataStatus(version, {"deleted": [f"{data_folder.DATA}/ (all of it)"]})
    changes = dataversions.changes(root)
    of_labels = changes.keys() & {"relabelled", "classes renamed"}
    return DataStatus(version, changes, tuple(notes_on_labels(workspace, history.pinned(root)) if of_labels else ()))


@dataclass(frozen=True)
class Pulled:
    """The pinned version, which lies in data/ now."""

    changed: int
    version: DataVersion


def pull(workspace: Workspace, *, force: bool) -> Pulled:
    """Bring the pinned version from the remote into data/, over local changes with `force`. Raises DataError."""
    with workspace.locked("visionloop data pull"):
        changed = transfers.pull(workspace.root, force=force)
        return Pulled(changed, dataversions.verify(workspace.root))
