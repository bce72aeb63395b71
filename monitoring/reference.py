"""The reference sample of a release: what production is compared with. It came with the release and was approved with it."""

from __future__ import annotations

import numpy as np

from components.contracts.errors import ReferenceUnavailable
from components.contracts.families import Task
from components.contracts.records import Stored
from components.contracts.releases import Release
from components.contracts.wording import counted
from components.images import STATISTICS
from components.store import sha256_file
from components.tables import read_frame
from monitoring.verdicts import Sample, columns_of

MIN_IMAGES = 50
"""With fewer, no threshold that is resampled from them is worth anything."""


def load_reference(release: Stored[Release], task: Task) -> Sample:
    """The reference sample of a release, read by its task.

    Raises ReferenceUnavailable unless it is whole and the serving engine's own.
    """
    file = release.record.reference
    path = release.folder / file.name
    remedy = "publish the release again (visionloop reconcile --repair)"
    if not path.is_file():
        raise ReferenceUnavailable(f"{path} is missing; {remedy}")
    if sha256_file(path) != file.sha256:
        raise ReferenceUnavailable(f"{path} is not the reference sample of its release; {remedy}")
    try:
        frame = read_frame(path)
        embeddings = np.stack([np.asarray(row, dtype=np.float32) for row in frame["embedding"]])
        probabilities = np.stack([np.asarray(row, dtype=np.float64) for row in frame["probabilities"]])
        statistics = frame[list(STATISTICS)].to_numpy(dtype=np.float64)
    except (KeyError, ValueError, OSError) as error:
        raise ReferenceUnavailable(f"{path} is no reference sample ({type(error).__name__}: {error}); {remedy}") from error
    classes = release.record.engine.classes
    if probabilities.shape[1] != task.width(classes):
        raise ReferenceUnavailable(
            f"the reference sample has answers of {probabilities.shape[1]} probabilities, its task "
            f"{release.record.task!r} reads {task.width(classes)}: it is another task's. Train and promote anew"
        )
    if embeddings.shape[1] != release.record.engine.embedding_dim:
        raise ReferenceUnavailable(
            f"the reference sample has embeddings of {embeddings.shape[1]} numbers, the engine gives "
            f"{release.record.engine.embedding_dim}: it is another encoder's. Train and promote anew"
        )
    if not all(np.isfinite(numbers).all() for numbers in (embeddings, probabilities, statistics)):
        raise ReferenceUnavailable(f"{path} holds numbers that are not finite; train and promote anew")
    num_images = len(embeddings)
    if num_images < MIN_IMAGES:
        raise ReferenceUnavailable(
            f"the reference sample holds {counted(num_images, 'image')}, {MIN_IMAGES} are needed: add images and train anew"
        )
    return Sample(statistics, columns_of(task, probabilities, classes), embeddings, classes)
