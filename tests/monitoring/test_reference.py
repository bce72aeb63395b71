"""A reference that is not the release's own, whole and finite, is refused: production is compared with nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from watched import TASK, reference_file, release, sample

from components.contracts.errors import MonitoringError, ReferenceUnavailable
from components.contracts.records import Stored
from components.contracts.releases import Release
from components.tasks.classification import Task
from monitoring.reference import load_reference


def with_reference(mine: Stored[Release], **changes: object) -> Stored[Release]:
    """The release with another reference sample, and the digest to it."""
    given = dataclasses.replace(sample(1000, 0), **changes)  # type: ignore[arg-type]
    file = reference_file(mine.folder / "reference.parquet", given)
    return Stored(mine.record.model_copy(update={"reference": file}), mine.folder)


def test_a_reference_comes_back(tmp_path: Path) -> None:
    found = load_reference(release(tmp_path / "r"), TASK)
    assert len(found) == 1000
    assert found.embeddings.shape == (1000, 16)
    np.testing.assert_allclose(found.statistics, sample(1000, 0).statistics, atol=1e-6)


def test_a_missing_reference_is_refused(tmp_path: Path) -> None:
    mine = release(tmp_path / "r")
    (mine.folder / "reference.parquet").unlink()
    with pytest.raises(ReferenceUnavailable, match="is missing; publish the release again"):
        load_reference(mine, TASK)


def test_a_changed_reference_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    mine = release(tmp_path / "r")
    path = mine.folder / "reference.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ReferenceUnavailable, match="not the reference sample of its release"):
        load_reference(mine, TASK)


def test_another_encoders_reference_is_refused(tmp_path: Path) -> None:
    mine = release(tmp_path / "r", sample(1000, 0, dim=8), dim=16)
    with pytest.raises(ReferenceUnavailable, match="embeddings of 8 numbers, the engine gives 16"):
        load_reference(mine, TASK)


def test_what_is_no_reference_is_refused(tmp_path: Path) -> None:
    mine = release(tmp_path / "r")
    broken = sample(1000, 0).embeddings.copy()
    broken[3, 4] = np.nan
    with pytest.raises(ReferenceUnavailable, match="not finite"):
        load_reference(with_reference(mine, embeddings=broken), TASK)
    small = release(tmp_path / "small", sample(20, 0))
    with pytest.raises(ReferenceUnavailable, match="holds 20 images"):
        load_reference(small, TASK)
    import pandas as pd

    from components.store import describe

    pd.DataFrame({"x": [1]}).to_parquet(mine.folder / "reference.parquet")
    file = describe(mine.folder / "reference.parquet", within=mine.folder)
    with pytest.raises(ReferenceUnavailable, match="is no reference sample"):
        load_reference(Stored(mine.record.model_copy(update={"reference": file}), mine.folder), TASK)


def test_a_task_that_does_not_read_the_reference_is_refused(tmp_path: Path) -> None:
    class Wide(Task):
        def width(self, classes: Sequence[str]) -> int:
            return len(classes) + 1

    class Silent(Task):
        def drift_columns(self, probabilities: Any, classes: Sequence[str]) -> dict[str, Any]:
            return {"confidence": probabilities.max(axis=1)}

    mine = release(tmp_path / "r")
    with pytest.raises(ReferenceUnavailable, match="answers of 10 probabilities, its task 'classification' reads 11"):
        load_reference(mine, Wide())
    with pytest.raises(MonitoringError, match="no values of 'predicted' for 1000 answers"):
        load_reference(mine, Silent())
