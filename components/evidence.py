"""Evidence: engines and champion -> what a person looks at before deciding. It decides nothing.

Which pictures the candidate gets wrong that the champion got right, and the other way round, with the training pictures
nearest to them and what the answer rests on; the errors it was surest of; slices; clusters with pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field

from components import plugins
from components.answer_tables import answers_of, slices_of
from components.contracts.data import Splits
from components.contracts.errors import VisionloopError
from components.contracts.evidence import CandidateEvidence, Cluster, Flips, Neighbour, Shown, ShownPicture
from components.contracts.families import Answers, Predictor, Slices, Task
from components.contracts.models import Checkpoint, Engine
from components.contracts.progress import Progress, silent
from components.contracts.records import Record, Stored
from components.contracts.verdicts import Evaluation, SliceTable, shared_classes
from components.contracts.wording import counted
from components.images import batches, decode, load_prepared
from components.intervals import paired_counts, paired_difference
from components.saliency import overlaid, saliency
from components.samples import rows
from components.slices import slice_figures
from components.store import describe
from components.tables import read_frame

if TYPE_CHECKING:
    import pandas as pd

FLIPS = "flips.parquet"
_NEIGHBOURS = 3
_OF_CLUSTER = 6
_THUMBNAIL = 160
_BATCH = 32


class EvidenceConfig(Record):
    """How much is shown; it decides nothing."""

    pictures: int = Field(default=12, ge=0, le=100)
    """Pictures of each kind at most: lost, won, surest errors, least sure."""
    training_pictures: int = Field(default=1000, ge=0)
    """Among how many training pictures the nearest ones are looked for, at most."""


@dataclass(frozen=True)
class Compared:
    """The champion's answers, over the classes that it shares with the data."""

    evaluation: Stored[Evaluation]
    classes: tuple[str, ...]
    """All that it knows, by their names of today."""


def collect(
    engine: Stored[Engine],
    evaluation: Stored[Evaluation],
    champion: Compared | None,
    slices: Stored[SliceTable] | None,
    splits: Stored[Splits],
    checkpoint: Stored[Checkpoint],
    data: Path,
    task: Task,
    config: EvidenceConfig,
    *,
    num_threads: int,
    out: Path,
    progress: Progress = silent,
) -> CandidateEvidence:
    """Draw the evidence of the engine that `evaluation` is of; writes flips.parquet, pictures/ and saliency/.

    What cannot be had is left out and said in `notes`: nothing here stops a run that was judged.
    """
    notes: list[str] = []
    answers = answers_of(evaluation, engine.record.classes, task)
    theirs = None
    if champion is not None:
        shared = shared_classes(engine.record.classes, champion.classes)
        theirs = answers_of(champion.evaluation, shared, task)
        if theirs is None:
            notes.append(f"the champion's answers are not there: {champion.evaluation.record.reason or 'it gave none'}")
    common: dict[str, Any] = {
        "engine": engine.record.name,
        "engine_digest": engine.record.digest(),
        "champion_digest": champion.evaluation.record.engine_digest if champion and theirs else "none",
        "test_digest": evaluation.record.test_digest,
    }
    if answers is None or evaluation.record.reason:
        notes.append(f"there is nothing to show of its answers: {evaluation.record.reason or evaluation.record.status}")
        return CandidateEvidence(**common, **_NOTHING, notes=tuple(notes))
    table = _answered(evaluation)
    flips, table = _flips(table, answers, theirs, champion, task, notes)
    table.drop(columns=["embedding", "number"]).to_parquet(out / FLIPS, index=False)
    figures = _figures(answers, theirs, slices_of(slices), notes)
    shown = _chosen(table, config.pictures)
    drawing = _Drawing(data, out, notes)
    near = _neighbours(
        engine,
        splits,
        data,
        shown,
        table,
        most=config.training_pictures,
        num_threads=num_threads,
        notes=notes,
        progress=progress,
    )
    maps, by = _saliency(checkpoint, engine.record, shown, drawing, notes)
    pictures = tuple(
        ShownPicture(
            why=why,
            sha256=row["sha256"],
            path=row["path"],
            label=row["label"],
            predicted=row["predicted"],
            confidence=float(row["confidence"]),
            champion_predicted=row["champion_predicted"],
            champion_confidence=None if np.isnan(row["champion_confidence"]) else float(row["champion_confidence"]),
            thumbnail=drawing.thumbnail(row["path"], row["sha256"]),
            saliency=maps.get(row["sha256"], ""),
            neighbours=tuple(
                Neighbour(path=path, label=label, similarity=similarity, thumbnail=drawing.thumbnail(path, sha256))
                for path, label, sha256, similarity in near.get(row["sha256"], ())
            ),
        )
        for why, row in shown
    )
    clusters = _clusters(table, slices_of(slices), drawing)
    drawing.conclude()
    files = [describe(path, within=out) for path in sorted(out.rglob("*")) if path.is_file()]
    return CandidateEvidence(
        **common,
        num_images=len(table),
        flips=flips,
        pictures=pictures,
        slices=tuple(figures),
        clusters=clusters,
        saliency_by=by,
        notes=tuple(notes),
        files=tuple(files),
    )


_NOTHING: dict[str, Any] = {
    "num_images": 0,
    "flips": None,
    "pictures": (),
    "slices": (),
    "clusters": (),
    "saliency_by": "",
    "files": (),
}


def _answered(evaluation: Stored[Evaluation]) -> pd.DataFrame:
    """A row a test picture, in the order of the answers, `number` is its place."""
    assert evaluation.record.predictions is not None
    columns = ["sha256", "path", "label", "predicted", "confidence", "right", "embedding"]
    table = read_frame(evaluation.folder / evaluation.record.predictions.name, columns)
    return table.assign(number=np.arange(len(table)), champion_predicted="", champion_confidence=np.nan, flip="")


def _flips(
    table: pd.DataFrame,
    answers: Answers,
    theirs: Answers | None,
    champion: Compared | None,
    task: Task,
    notes: list[str],
) -> tuple[Flips | None, pd.DataFrame]:
    """What changes beside the champion, and the table with its answers and `flip`: won, lost or nothing."""
    if theirs is None or champion is None:
        return None, table
    mine = answers if answers.classes == theirs.classes else answers.among(theirs.classes)
    if problem := mine.unlike(theirs):
        notes.append(f"{problem}, so nothing is said of what changes")
        return None, table
    right, champion_right = mine.right, theirs.right
    predicted = read_frame(
        champion.evaluation.folder
        / str(champion.evaluation.record.predictions and champion.evaluation.record.predictions.name),
        ["predicted", "confidence"],
    )
    places = np.flatnonzero(task.concerns(list(table["label"]), theirs.classes))
    table = table.copy()
    table.loc[table.index[places], "champion_predicted"] = predicted["predicted"].to_numpy()
    table.loc[table.index[places], "champion_confidence"] = predicted["confidence"].to_numpy(dtype=np.float64)
    flip = np.where(right & ~champion_right, "won", np.where(champion_right & ~right, "lost", ""))
    table.loc[table.index[places], "flip"] = flip
    both, won, lost, neither = paired_counts(right, champion_right)
    if len(places) < len(table):
        notes.append(
            f"champion and candidate are compared on the {len(places)} of {counted(len(table), 'test image')} whose classes "
            f"both know"
        )
    counts = {"both": both, "won": won, "lost": lost, "neither": neither}
    return Flips(**counts, difference=paired_difference(right, champion_right)), table


def _figures(answers: Answers, theirs: Answers | None, slices: Slices | None, notes: list[str]) -> list[Any]:
    if slices is None:
        notes.append("no slices were made of the test images")
        return []
    notes.extend(f"no slices by {note}" for note in slices.notes)
    if theirs is not None and answers.classes != theirs.classes:
        answers = answers.among(theirs.classes)
    champion = theirs.right if theirs is not None and not answers.unlike(theirs) else None
    return slice_figures(answers.right, champion, answers.image_ids, slices)


def _chosen(table: pd.DataFrame, most: int) -> list[tuple[Shown, dict[str, Any]]]:
    """The pictures that are shown, with the reason: what was lost and won, surest first; one is shown once."""
    order = table.sort_values("confidence", ascending=False, kind="stable")
    wrong, right = order[~order["right"]], order[order["right"]]
    groups: list[tuple[Shown, pd.DataFrame]] = [
        ("lost", order[order["flip"] == "lost"]),
        ("won", order[order["flip"] == "won"]),
        ("surest errors", wrong),
        ("least sure", right.iloc[::-1]),
    ]
    found: list[tuple[Shown, dict[str, Any]]] = []
    taken: set[str] = set()
    for why, group in groups:
        fresh = group[~group["sha256"].isin(taken)].drop_duplicates("sha256").head(most)
        taken.update(fresh["sha256"])
        found += [(why, {str(name): value for name, value in row.items()}) for row in fresh.to_dict("records")]
    return found


class _Drawing:
    """The picture files of the evidence, each written once."""

    def __init__(self, data: Path, out: Path, notes: list[str]) -> None:
        self.data, self.out, self.notes = data, out, notes
        self.missing: list[str] = []
        (out / "pictures").mkdir()

    def thumbnail(self, path: str, sha256: str) -> str:
        """The name of a picture's thumbnail; empty where it is not there any more."""
        name = f"pictures/{sha256[:24]}.png"
        if (self.out / name).exists():
            return name
        try:
            image = decode((self.data / path).read_bytes()).srgb().copy()
        except (OSError, VisionloopError):
            self.missing.append(path)
            return ""
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        image.save(self.out / name, format="PNG")
        return name

    def conclude(self) -> None:
        """Say which pictures could not be drawn."""
        if self.missing:
            some = ", ".join(sorted(set(self.missing))[:3])
            number = counted(len(set(self.missing)), "picture")
            self.notes.append(f"{number} cannot be shown: not there any more, or not to be read ({some})")


def _neighbours(
    engine: Stored[Engine],
    splits: Stored[Splits],
    data: Path,
    shown: Sequence[tuple[Shown, dict[str, Any]]],
    table: pd.DataFrame,
    *,
    most: int,
    num_threads: int,
    notes: list[str],
    progress: Progress,
) -> dict[str, list[tuple[str, str, str, float]]]:
    """The nearest training pictures of each shown one: path, label, sha256, cosine; of the classes that are in question."""
    wanted = {row[name] for _, row in shown for name in ("label", "predicted", "champion_predicted")} - {""}
    train = rows(splits, "train")
    train = train[train["label"].isin(wanted)]
    if not shown or not len(train) or not most:
        return {}
    if len(train) > most:
        # By digest within each label: the same pictures however the table is ordered.
        turn = train.sort_values("sha256").groupby("label").cumcount()
        train = train.assign(turn=turn).sort_values(["turn", "label"], kind="stable").head(most)
        notes.append(
            f"nearest training pictures are looked for among {most} of {counted(len(rows(splits, 'train')), 'picture')}"
        )
    train = train[[(data / path).is_file() for path in train["path"]]]
    try:
        predictor: Predictor = plugins.load("targets", engine.record.target, engine.record.settings).load(
            engine, num_threads=num_threads
        )
        paths = [data / path for path in train["path"]]
        found = [
            predictor.predict(batch)[1]
            for batch in batches(paths, engine.record.preprocessing, batch_size=_BATCH, progress=progress)
        ]
    except (VisionloopError, OSError) as error:
        notes.append(f"the nearest training pictures are not known: {error}")
        return {}
    theirs = _directions(np.concatenate(found))
    mine = _directions(np.stack([table["embedding"].iloc[row["number"]] for _, row in shown]))
    cosine = mine @ theirs.T
    best = np.argsort(-cosine, axis=1, kind="stable")[:, :_NEIGHBOURS]
    paths_, labels, digests = (train[name].tolist() for name in ("path", "label", "sha256"))
    return {
        row["sha256"]: [
            (paths_[place], labels[place], digests[place], float(cosine[number, place])) for place in best[number]
        ]
        for number, (_, row) in enumerate(shown)
    }


def _directions(embedding: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    vectors = embedding.astype(np.float64)
    directions: npt.NDArray[np.float64] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return directions


def _saliency(
    checkpoint: Stored[Checkpoint],
    engine: Engine,
    shown: Sequence[tuple[Shown, dict[str, Any]]],
    drawing: _Drawing,
    notes: list[str],
) -> tuple[dict[str, str], str]:
    """File names of saliency maps by sha256, and what made them."""
    from components.checkpoints import restore

    images, digests = [], []
    for _, row in shown:
        try:
            images.append(load_prepared(drawing.data / row["path"], engine.preprocessing))
            digests.append(row["sha256"])
        except (OSError, VisionloopError):
            continue  # the thumbnail says so
    if not images:
        return {}, ""
    try:
        maps, method = saliency(restore(checkpoint), np.stack(images))
    except (RuntimeError, NotImplementedError, AssertionError, ValueError) as error:
        # A backbone of somebody's own may do what Captum's hooks cannot follow.
        notes.append(f"there are no saliency maps: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return {}, ""
    (drawing.out / "saliency").mkdir()
    names = {}
    for digest, image, strength in zip(digests, images, maps, strict=True):
        names[digest] = f"saliency/{digest[:24]}.png"
        drawn = Image.fromarray(overlaid(image, strength))
        if max(drawn.size) < _THUMBNAIL:
            scale = _THUMBNAIL // max(drawn.size)
            drawn = drawn.resize((drawn.width * scale, drawn.height * scale), Image.Resampling.NEAREST)
        drawn.thumbnail((_THUMBNAIL, _THUMBNAIL))
        drawn.save(drawing.out / names[digest], format="PNG")
    return names, f"{method} of the torch network, for {engine.name} gives no gradients"


def _clusters(table: pd.DataFrame, slices: Slices | None, drawing: _Drawing) -> tuple[Cluster, ...]:
    if slices is None or "cluster" not in slices.names:
        return ()
    of = dict(zip(slices.image_ids, slices.names["cluster"], strict=True))
    names = np.array([of.get(sha256, "") for sha256 in table["sha256"]], dtype=object)
    directions = _directions(np.stack(list(table["embedding"])))
    found = []
    for name in sorted(set(names) - {""}):
        inside = np.flatnonzero(names == name)
        middle = directions[inside].mean(axis=0)
        nearest = inside[np.argsort(-(directions[inside] @ middle), kind="stable")[:_OF_CLUSTER]]
        pictures = [(table["path"].iloc[place], table["sha256"].iloc[place]) for place in nearest]
        found.append(
            Cluster(
                name=name,
                pictures=tuple(path for path, _ in pictures),
                thumbnails=tuple(drawing.thumbnail(path, sha256) for path, sha256 in pictures),
            )
        )
    return tuple(found)
