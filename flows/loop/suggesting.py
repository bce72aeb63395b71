"""`data suggest`: the smallest useful batch to label, out of a folder of unlabelled pictures or of those that a server kept.

The champion answers all of them (resumable, as `predict` does); those worth a person's look are copied into a folder with a
manifest to fill in, a sheet to look at, and tasks for Label Studio. What the model is sure of may become pseudo-labels,
which train and never judge.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import shutil
import uuid
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

import numpy as np

from components.clusters import Clusters
from components.companions import TEST_LEDGER
from components.contracts.errors import ConfigError, DataError, UndecodableImage, WorkspaceBusy
from components.contracts.progress import Progress, silent
from components.contracts.records import sha256_text
from components.contracts.wording import for_spreadsheets
from components.formats import suffix_of
from components.images import decode, pixel_digest
from components.releases import REFERENCE
from components.splitting import TestLedger
from components.store import write_atomically
from components.suggestions import Suggestion, suggest
from components.tables import read_frame
from flows.loop.captures import captures_of, local_copies
from flows.loop.labels import known_predictions
from flows.loop.serving import Batch, open_batch, predict
from flows.loop.windows import open_loop
from flows.pages.figures import environment, thumbnail
from flows.workspace.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd

MANIFEST, PSEUDO, TASKS, LABELING, SHEET = (
    "suggestions.csv",
    "pseudo-labels.csv",
    "label-studio-tasks.json",
    "label-studio-labeling.xml",
    "suggestions.html",
)
_IMAGES = "images"
_PSEUDO_IMAGES = "pseudo"


@dataclass(frozen=True)
class Chosen:
    """One picture that was suggested."""

    path: str
    """Relative to the folder that was written."""
    found_as: str
    """Its name in the source."""
    proposal: str
    """What the champion takes it for."""
    confidence: float
    unsure: bool
    gain: float
    """What it added when it was chosen, as a share of what the first one did."""
    unlike: float
    """Distance to the nearest picture of the champion's reference sample, in times of the usual one."""
    why: str


@dataclass(frozen=True)
class Suggested:
    """What was written."""

    out: Path
    model: str
    version: str
    num_pool: int
    """Pictures that were answered."""
    num_known: int
    """Of them, those that the data holds already, as far as they were looked at."""
    errors: int
    """Files that got no answer."""
    chosen: tuple[Chosen, ...]
    num_pseudo: int
    """Pictures that got the champion's answer as a pseudo-label."""


def suggest_labels(
    workspace: Workspace,
    model: str,
    source: Path | None,
    *,
    out: Path,
    most: int,
    pseudo_labels: float | None = None,
    progress: Progress = silent,
) -> Suggested:
    """Write the pictures of `source` that are worth a label into the new folder `out`, all or nothing.

    Without a source the pool is what servers of this workspace were asked of the model and kept, and nobody labelled.
    With `pseudo_labels`, every other picture that is answered with at least this confidence comes with the answer as its
    label. Raises ConfigError for a source without images, a folder that is taken or a model without a champion, DataError
    where no picture was answered.
    """
    if source is not None and not source.is_dir():
        raise ConfigError(f"{source} is not a folder of pictures")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already; name a new folder with --out")
    with contextlib.nullcontext((source, source)) if source is not None else _captures(workspace, model) as (folder, inputs):
        return _suggest(workspace, model, folder, inputs, out, most, pseudo_labels, progress)


def _suggest(
    workspace: Workspace,
    model: str,
    folder: Path,
    inputs: Path,
    out: Path,
    most: int,
    pseudo_labels: float | None,
    progress: Progress,
) -> Suggested:
    batch = open_batch(workspace, model, str(inputs), shard_size=2000, embeddings=True)
    answers = (
        workspace.cache / "suggestions" / sha256_text(f"{batch.release.record.digest()} {batch.inputs.fingerprint}")[:32]
    )
    done = predict(batch, str(answers), progress=progress)
    table = _answered(answers)
    if table.empty:
        raise DataError(f"no picture of {inputs} could be answered; see `visionloop predict {inputs}` for the reasons")
    pool = _Pool(folder, table, batch, Clusters.read(workspace.root).files)
    ledger = workspace.root / TEST_LEDGER
    members = TestLedger.read(ledger).members if ledger.exists() else {}
    chosen = pool.choose(members, most)
    written = workspace.state / "tmp" / f"suggest-{uuid.uuid4().hex}"
    try:
        _write(written, pool, chosen, model=model, version=batch.route.version)
        num_pseudo = _write_pseudo(written, pool, chosen, members, pseudo_labels) if pseudo_labels is not None else 0
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            out.rmdir()
        shutil.move(written, out)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    shutil.rmtree(answers, ignore_errors=True)
    return Suggested(
        out, model, batch.route.version, len(table), pool.num_known, done.errors, tuple(chosen.values()), num_pseudo
    )


@contextlib.contextmanager
def _captures(workspace: Workspace, model: str) -> Iterator[tuple[Path, Path]]:
    """`_captured`, for one command at a time: its copies have the same place, by which a command that was killed goes on."""
    with (workspace.state / f"suggest-{model}.lock").open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkspaceBusy(
                f"another `data suggest --captured` of {model} is running in {workspace.root}; wait for it to end, or stop "
                f"it. Nothing was changed"
            ) from None
        with _captured(workspace, model) as found:
            yield found


@contextlib.contextmanager
def _captured(workspace: Workspace, model: str) -> Iterator[tuple[Path, Path]]:
    """A folder of captures, and a table of those that the model was asked and nobody labelled.

    What is kept elsewhere is copied for as long as the context lasts. Raises DataError where there are none.
    """
    import pandas as pd

    loop = open_loop(workspace.root, model)
    kept, labelled = captures_of(workspace, loop.settings), loop.labels.latest(loop.model).keys()
    asked = sorted(kept.among(known_predictions(loop).images - labelled))
    if not asked:
        raise DataError(
            f"no image that {model} was asked in production is captured and unlabelled ({len(kept.names())} captured, "
            f"{len(labelled)} labelled); serve with --capture-share, or name a folder of pictures"
        )
    copies = workspace.state / "tmp" / f"captured-{model}"
    shutil.rmtree(copies, ignore_errors=True)  # of a command that was killed
    try:
        paths = list(local_copies(loop, asked, copies).values())
        if not paths:
            raise DataError(f"every image that {model} was asked in production and is captured is damaged by now")
        folder = paths[0].parents[1]
        names = [path.relative_to(folder).as_posix() for path in paths]
        data = io.BytesIO()
        pd.DataFrame({"name": names, "path": list(map(str, paths))}).to_parquet(data, index=False)
        listed = workspace.cache / "suggestions" / f"captured-{model}.parquet"
        listed.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(listed, data.getvalue())
        yield folder, listed
    finally:
        shutil.rmtree(copies, ignore_errors=True)


def _answered(answers: Path) -> pd.DataFrame:
    """Name, answer and embedding of each picture that got one, the same picture once."""
    import pandas as pd

    columns = ["name", "predicted", "confidence", "unsure", "embedding", "image_sha256", "error"]
    table = pd.concat([read_frame(path, columns) for path in sorted(answers.glob("*.parquet"))], ignore_index=True)
    return table[table["error"].isna()].drop_duplicates("image_sha256", ignore_index=True)


class _Pool:
    """The pictures of a source with what the champion makes of them."""

    def __init__(self, source: Path, table: pd.DataFrame, batch: Batch, files: Container[str]) -> None:
        """`files` are those that the data has seen, by the first 32 digits of their sha256."""
        self.source, self.table = source, table
        self._known_files = {row for row, sha256 in enumerate(table["image_sha256"]) if sha256[:32] in files}
        self.num_known = 0
        self.classes = batch.release.record.engine.classes
        self._embeddings = np.stack(list(table["embedding"])).astype(np.float32)
        self._confidence = table["confidence"].to_numpy(np.float32)
        reference = read_frame(batch.release.folder / REFERENCE, ["embedding"])
        self._known = np.stack(list(reference["embedding"])).astype(np.float32)

    def path(self, row: int) -> Path:
        return self.source / str(self.table["name"].iloc[row])

    def choose(self, members: Mapping[str, bool], most: int) -> dict[int, Chosen]:
        """What to label, by row, best first; `num_known` tells then how many pictures the data was found to hold already."""
        left = np.setdiff1d(np.arange(len(self.table)), list(self._known_files))
        looked: dict[int, bool] = {}
        while True:
            found = suggest(self._embeddings[left], self._confidence[left], self._known, most=most)
            rows = {int(left[each.row]): each for each in found}
            looked |= {row: self._is_known(row, members) for row in rows if row not in looked}
            known = [row for row in rows if looked[row]]
            if not known:
                break
            left = np.setdiff1d(left, known)
        self.num_known = len(self._known_files) + sum(looked.values())
        return {row: self._chosen(row, number, each) for number, (row, each) in enumerate(rows.items(), 1)}

    def _is_known(self, row: int, members: Mapping[str, bool]) -> bool:
        """By its pixels, whatever file they are stored in."""
        return bool(members) and _digest_of(self.path(row)) in members

    def _chosen(self, row: int, number: int, each: Suggestion) -> Chosen:
        entry = self.table.iloc[row]
        reasons = [f"unsure ({entry['confidence']:.2f})"] if entry["unsure"] else []
        if each.is_unlike:
            reasons.append(f"unlike what the model knows ({each.unlike:.1f} times the usual distance)")
        return Chosen(
            path=f"{_IMAGES}/{number:05d}{suffix_of(self.path(row))}",
            found_as=str(entry["name"]),
            proposal=str(entry["predicted"]),
            confidence=float(entry["confidence"]),
            unsure=bool(entry["unsure"]),
            gain=each.gain,
            unlike=each.unlike,
            why="; ".join(reasons) or f"answered with {entry['confidence']:.2f}, and unlike the others of the batch",
        )

    def sure(self, least: float, but: Mapping[int, Chosen]) -> Iterator[int]:
        """Rows that are answered with at least this confidence and are not suggested."""
        for row in np.flatnonzero((self._confidence >= least) & ~self.table["unsure"].to_numpy(bool)):
            if int(row) not in but and int(row) not in self._known_files:
                yield int(row)


def _digest_of(path: Path) -> str:
    """The key of a picture in the test ledger; empty for one that cannot be decoded."""
    try:
        return pixel_digest(decode(path.read_bytes()))[:32]
    except (OSError, UndecodableImage):
        return ""


def _write(folder: Path, pool: _Pool, chosen: Mapping[int, Chosen], *, model: str, version: str) -> None:
    (folder / _IMAGES).mkdir(parents=True)
    for row, one in chosen.items():
        shutil.copyfile(pool.path(row), folder / one.path)
    columns = ["path", "label", "proposal", "confidence", "why", "found_as"]
    lines = [
        {
            **{name: getattr(one, name, "") for name in columns},
            "confidence": f"{one.confidence:.4f}",
            "proposal": for_spreadsheets(one.proposal),
            "found_as": for_spreadsheets(one.found_as),
        }
        for one in chosen.values()
    ]
    # With a byte order mark, by which spreadsheets know that it is UTF-8.
    _write_table(folder / MANIFEST, columns, lines, encoding="utf-8-sig")
    classes = sorted({*pool.classes, *(one.proposal for one in chosen.values())})
    tasks = [_task(one, f"{model} version {version}") for one in chosen.values()]
    (folder / TASKS).write_text(json.dumps(tasks, indent=1, ensure_ascii=False))
    choices = "".join(f"    <Choice value={quoteattr(name)}/>\n" for name in classes)
    (folder / LABELING).write_text(
        '<View>\n  <Image name="image" value="$image"/>\n  <Choices name="label" toName="image" choice="single">\n'
        f"{choices}  </Choices>\n</View>\n"
    )
    shown = [asdict(one) | {"image": thumbnail(folder / one.path)} for one in chosen.values()]
    page = (
        environment()
        .get_template("suggestions.html")
        .render(model=model, version=version, chosen=shown, num_pool=len(pool.table), manifest=MANIFEST)
    )
    (folder / SHEET).write_text(page)


def _write_table(path: Path, columns: list[str], rows: list[dict[str, Any]], *, encoding: str = "utf-8") -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding=encoding)


def _task(one: Chosen, by: str) -> dict[str, Any]:
    """A task of Label Studio with the champion's answer as its prediction."""
    result = {"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": [one.proposal]}}
    return {
        "data": {"image": f"/data/local-files/?d={one.path}", "file": one.path},
        "predictions": [{"model_version": by, "score": round(one.confidence, 4), "result": [result]}],
    }


def _write_pseudo(folder: Path, pool: _Pool, chosen: Mapping[int, Chosen], members: Mapping[str, bool], least: float) -> int:
    """A manifest of pictures whose label is the champion's answer; those that the data holds already are left out."""
    (folder / _PSEUDO_IMAGES).mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for row in pool.sure(least, chosen):
        source = pool.path(row)
        if members and _digest_of(source) in members:
            continue
        path = f"{_PSEUDO_IMAGES}/{len(rows) + 1:06d}{suffix_of(source)}"
        shutil.copyfile(source, folder / path)
        entry = pool.table.iloc[row]
        rows.append(
            {"path": path, "label": entry["predicted"], "label_source": "model", "confidence": f"{entry['confidence']:.4f}"}
        )
    _write_table(folder / PSEUDO, ["path", "label", "label_source", "confidence"], rows)
    return len(rows)
