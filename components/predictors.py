"""Engines of any target, loaded to answer prepared pictures."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from components import plugins
from components.contracts.errors import ConfigError, EngineUnavailable
from components.contracts.families import Predictor
from components.contracts.models import Engine
from components.contracts.records import Stored


def load(engine: Stored[Engine], num_threads: int) -> Predictor:
    """Raises EngineUnavailable where this machine cannot execute it."""
    try:
        target = plugins.load("targets", engine.record.target, engine.record.settings)
    except ConfigError as error:
        # An older engine, whose plug-in was removed since or takes other settings now.
        raise EngineUnavailable(str(error)) from error
    predictor: Predictor = target.load(engine, num_threads=num_threads)
    return predictor


def check_shapes(engine: Engine, n: int, logits: npt.NDArray[Any], embedding: npt.NDArray[Any]) -> None:
    """Raise EngineUnavailable for answers to n images that are not of this engine's label space."""
    expected = ((n, len(engine.classes)), (n, engine.embedding_dim))
    if (logits.shape, embedding.shape) != expected:
        raise EngineUnavailable(
            f"{engine.name} answered logits {logits.shape} and embedding {embedding.shape}, expected {expected[0]} and "
            f"{expected[1]}; the file does not belong to this label space"
        )
