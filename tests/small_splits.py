"""A split data set that a training takes a second for: 36 pictures of three shapes, and weights to start from."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file
from shapes import KINDS, write_pictures

from components import plugins
from components.contracts.data import DataVersion, Splits
from components.contracts.records import Stored
from components.images import decode, pixel_digest
from components.store import describe

NETWORK = {"image_size": 16, "width": 4, "embedding_dim": 8}
"""Settings of the backbone small_cnn that the weights fit."""


def write_small_splits(root: Path, per_class: int = 12) -> Stored[Splits]:
    """Write data/, splits.parquet and start.safetensors into `root`: two thirds of the images train, every third is valid."""
    write_pictures(root / "data", per_class)
    members = []
    for index, path in enumerate(sorted((root / "data").rglob("*.png"))):
        picture = pixel_digest(decode(path.read_bytes()))[:32]
        split = ("train", "valid")[index % 3 == 0]
        members.append((path.relative_to(root / "data").as_posix(), path.parent.name, picture, split))
    pd.DataFrame(members, columns=["path", "label", "picture", "split"]).to_parquet(root / "splits.parquet")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        save_file(plugins.load("backbones", "small_cnn", NETWORK).build().state_dict(), root / "start.safetensors")
    record = Splits(
        data=DataVersion(dvc_hash="a", num_files=len(members), bytes=1, ledger_sha256="b"),
        table=describe(root / "splits.parquet", within=root),
        classes=KINDS,
        counts={"train": 2 * per_class, "valid": per_class},
        class_counts={},
        num_duplicate_groups=0,
        test_digest="c",
    )
    return Stored(record, root)


def write_splits_without_test_pictures(root: Path, per_class: int = 12) -> Stored[Splits]:
    """The same, with pictures of test and calibration in the table whose files are not there: nobody may look at them."""
    splits = write_small_splits(root, per_class)
    table = pd.read_parquet(root / "splits.parquet")
    unseen = table.iloc[:6].assign(split=["test", "calibration"] * 3, path=[f"gone/{i}.png" for i in range(6)])
    pd.concat([table, unseen.assign(picture=[f"{i:032d}" for i in range(6)])]).to_parquet(root / "splits.parquet")
    return Stored(splits.record.model_copy(update={"table": describe(root / "splits.parquet", within=root)}), root)
