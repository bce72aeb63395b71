from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shapes import write_pictures

from components import images, pictures, segments
from components.contracts.errors import DataDiffers, UndecodableImage
from components.contracts.models import Preprocessing
from components.images import decode, load_prepared, pixel_digest
from components.pictures import prepared
from components.segments import Kept

CONTRACT = Preprocessing(
    channels=3, height=24, width=16, resize_shortest=30, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    write_pictures(tmp_path / "data", 5)
    return sorted((tmp_path / "data").rglob("*.png"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was decoded."""
    found: list[bytes] = []

    def counted(data: bytes, *rest: Any) -> images.Picture:
        found.append(data)
        return decode(data, *rest)

    monkeypatch.setattr(pictures, "decode", counted)
    return found


def digests(paths: Sequence[Path]) -> list[str]:
    return [pixel_digest(decode(path.read_bytes()))[:32] for path in paths]


def inputs_of(paths: list[Path], cache: Path, **settings: Any) -> Kept:
    return prepared(digests(paths), paths, settings.pop("contract", CONTRACT), cache=cache, **settings)


def test_a_kept_picture_is_bit_for_bit_what_serving_decodes(paths: list[Path], tmp_path: Path, decoded: list[bytes]) -> None:
    chosen = torch.tensor([3, 0, 3, 14])
    expected = np.stack([load_prepared(paths[row], CONTRACT) for row in chosen])
    told: list[tuple[int, int]] = []
    for _ in range(2):
        inputs = inputs_of(paths, tmp_path, progress=lambda done, total, note="": told.append((done, total)))
        assert len(inputs) == len(paths)
        found = inputs.take(chosen, torch.Generator().manual_seed(0))
        assert found.dtype == torch.uint8
        assert np.array_equal(found.numpy(), expected)
    assert len(decoded) == len(paths)
    assert told == [(15, 15)]


def test_appended_pictures_cost_only_themselves_and_another_contract_all_of_them(
    paths: list[Path], tmp_path: Path, decoded: list[bytes]
) -> None:
    inputs_of(paths[:10], tmp_path)
    inputs_of(paths[::-1], tmp_path)
    assert len(decoded) == 15
    inputs = inputs_of(paths, tmp_path, contract=CONTRACT.model_copy(update={"interpolation": "bilinear"}))
    assert len(decoded) == 30
    assert not np.array_equal(inputs.take(torch.arange(15), None), inputs_of(paths, tmp_path).take(torch.arange(15), None))


def test_a_picture_that_changes_during_the_run_does_not_enter_the_cache(paths: list[Path], tmp_path: Path) -> None:
    names = digests(paths)
    paths[3].write_bytes(paths[12].read_bytes())
    with pytest.raises(DataDiffers, match=r"was changed while the run read it; restore it"):
        prepared(names, paths, CONTRACT, cache=tmp_path)
    paths[3].write_bytes(b"none")
    with pytest.raises(UndecodableImage, match=paths[3].name):
        prepared(names, paths, CONTRACT, cache=tmp_path)
    assert list((tmp_path / "pictures").rglob("*.safetensors")) == []


def test_a_full_disk_slows_and_does_not_fail(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[bytes]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    expected = inputs_of(paths, tmp_path / "whole").take(torch.arange(15), None)
    monkeypatch.setattr(segments, "write_atomically", refuse)
    monkeypatch.setattr(segments, "_CHUNK_ROWS", 4)
    decoded.clear()
    told: list[str] = []
    inputs = inputs_of(paths, tmp_path / "full", say=told.append)
    assert len(told) == 1
    # Nothing more is decoded in advance for a disk that takes nothing.
    assert len(decoded) == 4
    for _ in range(2):
        assert torch.equal(inputs.take(torch.arange(15), None), expected)
    assert len(decoded) == 34
