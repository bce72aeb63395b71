"""What the frozen part of a network makes of pictures: computed once, cached by what it depends on.

One pass through OpenVINO replaces a forward pass per epoch. The key of a row is (picture, frozen part, view): the part being
the digest of its weights, architecture, source and preprocessing, so weights above the cut may train without making it anew;
appended images cost only themselves, and whatever the number of images, no more than a segment of them is in memory.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from components import plugins
from components.contracts.errors import ConfigError
from components.contracts.families import Backbone
from components.contracts.progress import Progress, silent
from components.contracts.records import canonical_json
from components.images import stacked
from components.pictures import load_all
from components.segments import Kept, Segments, kept_file, used
from components.store import sha256_file

if TYPE_CHECKING:
    import torch
    from torch import nn

_BATCH = 16


@dataclass(frozen=True)
class Frozen:
    """The part of a backbone with these weights that does not train: all but its last `num_blocks` blocks."""

    name: str
    backbone: Backbone
    state: dict[str, torch.Tensor]
    num_blocks: int = 0
    embedding_dim: int = 0
    """Of features where a pass took channels away; else the backbone's own."""


@dataclass(frozen=True)
class View:
    """One way to look at a picture."""

    name: str
    """A digest of what `change` does, by which its rows are cached; a folder's name."""
    change: Callable[[npt.NDArray[np.uint8], Sequence[str]], npt.NDArray[np.uint8]]
    """Images uint8 (n, h, w, c) and their picture digests to images of the same shape."""


AS_IT_IS = View("as-it-is", lambda images, _: images)
"""The view that nothing changes: the first one of every training, and the one that is evaluated."""


def embed(
    pictures: Sequence[str],
    paths: Sequence[Path],
    name: str,
    backbone: Backbone,
    state: dict[str, torch.Tensor],
    *,
    cache: Path,
    num_threads: int = 2,
    progress: Progress = silent,
) -> npt.NDArray[np.float32]:
    """Features (n, embedding_dim) of the images at `paths`, whose picture digests are `pictures`."""
    import torch

    arguments: dict[str, Any] = {"cache": cache, "num_threads": num_threads, "progress": progress}
    kept = maps(pictures, paths, Frozen(name, backbone, state), **arguments)
    features: npt.NDArray[np.float32] = kept.take(torch.arange(len(kept)), None).numpy()
    return features


def maps(
    pictures: Sequence[str],
    paths: Sequence[Path],
    frozen: Frozen,
    views: Sequence[View] = (AS_IT_IS,),
    *,
    cache: Path,
    num_threads: int = 2,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda _: None,
) -> Kept:
    """What comes out of the frozen part for the images at `paths`, in every view; computed where it is not cached.

    Maps (c, h, w), or whatever the first block that trains takes, in 16 bits; features (embedding_dim,) in 32 where no block
    trains. `say` is told once when the disk does not take them. Raises DataDiffers, UndecodableImage, ConfigError.
    """
    part = functools.cache(lambda: _part(frozen))
    folder = folder_of(frozen, cache, part)
    shape, dtype = row_of(frozen, part)
    once = functools.cache(lambda line: say(line))
    caches = [Segments(folder / view.name, dtype, shape, say=once) for view in views]

    model = functools.cache(lambda: engine(frozen, cache / "encoders" / folder.name, num_threads=num_threads, part=part))

    def compute(rows: Sequence[int], chosen: Sequence[int], tell: Progress = silent) -> list[npt.NDArray[Any]]:
        members = [(paths[row], pictures[row]) for row in rows]
        return rows_of(model(), members, frozen, [views[view] for view in chosen], tell)

    # Views are made together, from one decoding; a picture may lack only some of them.
    lacking: dict[tuple[int, ...], list[int]] = {}
    for row in {picture: row for row, picture in enumerate(pictures)}.values():
        absent = tuple(view for view, segments in enumerate(caches) if pictures[row] not in segments.known)
        if absent:
            lacking.setdefault(absent, []).append(row)
    done, total = 0, sum(map(len, lacking.values()))
    for absent, missing in sorted(lacking.items()):
        for start in range(0, len(missing), caches[0].chunk):
            if any(caches[view].full for view in absent):
                break
            chunk = missing[start : start + caches[0].chunk]
            found = compute(chunk, absent, functools.partial(_of_all, progress, done, total))
            for view, rows in zip(absent, found, strict=True):
                caches[view].append([pictures[row] for row in chunk], rows)
            done += len(chunk)
    return Kept(pictures, caches, lambda rows, view: compute(rows, [view])[0])


def folder_of(frozen: Frozen, cache: Path, part: Callable[[], nn.Module] | None = None) -> Path:
    """Where a cache keeps what comes out of the frozen part, in a folder for each view; its name is the part's digest.

    `part`, here and below, is the part's module where there is one already.
    """
    digest = _digest(frozen, part or functools.partial(_part, frozen))[:32]
    return cache / ("maps" if frozen.num_blocks else "features") / digest


def _digest(frozen: Frozen, part: Callable[[], nn.Module]) -> str:
    """sha256 of all that a row depends on besides the picture and its view."""
    digest = hashlib.sha256()
    state = frozen.state if frozen.num_blocks == 0 else part().state_dict()
    for key in sorted(state):
        digest.update(key.encode() + state[key].detach().cpu().contiguous().numpy().tobytes())
    facts: list[Any] = [
        frozen.backbone.preprocessing.to_json(),
        plugins.member_digest("backbones", frozen.name),
        # Decoder, preprocessing and encoder are ours; a changed line of them makes other rows.
        plugins.source_digest(Path(__file__)),
        {library: metadata.version(library) for library in ("numpy", "openvino", "pillow", "timm", "torch")},
        frozen.num_blocks,
    ]
    digest.update(canonical_json(facts).encode())
    return digest.hexdigest()


def _part(frozen: Frozen) -> nn.Module:
    """The module of the part that does not train, in evaluation mode."""
    import torch
    from torch import nn

    from components.checkpoints import blocks, reshape, shapes_of

    with torch.random.fork_rng(devices=[]):
        # Weights that are drawn here are replaced at once, and must not move what is drawn later.
        module = frozen.backbone.build()
    whole = shapes_of(module.state_dict())
    reshape(module, {name: shape for name, shape in shapes_of(frozen.state).items() if whole.get(name, shape) != shape})
    module.load_state_dict(frozen.state)
    module.eval()
    if frozen.num_blocks == 0:
        return module
    found = blocks(frozen.name, frozen.backbone, module)
    if frozen.num_blocks >= len(found):
        raise ConfigError(
            f"the last {frozen.num_blocks} blocks of backbone {frozen.name!r} cannot train above a frozen part: it has "
            f"{len(found)} blocks; expected from 1 to {len(found) - 1}, or training all of it"
        )
    return nn.Sequential(*found[: len(found) - frozen.num_blocks]).eval()


def row_of(frozen: Frozen, part: Callable[[], nn.Module] | None = None) -> tuple[tuple[int, ...], npt.DTypeLike]:
    """Shape and dtype of one picture's row."""
    import torch

    if frozen.num_blocks == 0:
        return (frozen.embedding_dim or frozen.backbone.embedding_dim,), np.float32
    contract = frozen.backbone.preprocessing
    with torch.inference_mode():
        found = (part or functools.partial(_part, frozen))()(
            torch.zeros(1, contract.channels, contract.height, contract.width)
        )
    return tuple(found.shape[1:]), np.float16


def _of_all(progress: Progress, before: int, total: int, done: int, _: int, note: str = "") -> None:
    progress(before + done, total, note)


def rows_of(
    model: Any, members: Sequence[tuple[Path, str]], frozen: Frozen, views: Sequence[View], progress: Progress = silent
) -> list[npt.NDArray[Any]]:
    """The rows of every view of the images of these paths and picture digests.

    Each is decoded once, and all of them are streamed through the `engine` together.
    """
    from components.targets.openvino import stream

    images = stacked(load_all(members, frozen.backbone.preprocessing, progress=progress), _BATCH)

    def seen() -> Iterator[npt.NDArray[np.uint8]]:
        for number, batch in enumerate(images):
            names = [picture for _, picture in members[number * _BATCH : number * _BATCH + len(batch)]]
            for view in views:
                yield view.change(batch, names)

    found = [_narrowed(batch, frozen) for batch in stream(model, seen(), "embedding")]
    return [np.concatenate(found[view :: len(views)]) for view in range(len(views))]


def _narrowed(rows: npt.NDArray[np.float32], frozen: Frozen) -> npt.NDArray[Any]:
    if frozen.num_blocks == 0:
        return rows
    with np.errstate(over="ignore"):
        narrow = rows.astype(np.float16)
    if not np.isfinite(narrow).all():
        raise ConfigError(
            f"the maps of backbone {frozen.name!r} below its last {frozen.num_blocks} blocks reach "
            f"{np.abs(rows).max():.4g}; 16 bits, in which they are cached, hold at most 65504. Train `all`, or another "
            f"number of blocks"
        )
    return narrow


def engine(frozen: Frozen, folder: Path, *, num_threads: int, part: Callable[[], nn.Module] | None = None) -> Any:
    """The engine of a frozen part, from its graph in the folder, or from one that is made and kept there."""
    from torch import nn

    from components.checkpoints import ImageModel
    from components.graphs import to_onnx
    from components.targets.openvino import compiled

    path = folder / "encoder.onnx"
    used(folder)
    sidecar = path.with_suffix(".sha256")
    if path.exists() and sidecar.exists() and sha256_file(path) == sidecar.read_text():
        return compiled(path, hint="THROUGHPUT", num_threads=num_threads)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, path.name)
        module, preprocessing = (part or functools.partial(_part, frozen))(), frozen.backbone.preprocessing
        to_onnx(ImageModel(module, nn.Identity(), preprocessing).eval(), preprocessing, made)
        if kept_file(path, made.read_bytes()):
            kept_file(sidecar, sha256_file(made).encode())
        return compiled(made, hint="THROUGHPUT", num_threads=num_threads)
