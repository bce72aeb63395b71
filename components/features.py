"""Embeddings of images by a frozen backbone: computed once, cached by what they depend on.

One pass through OpenVINO replaces a forward pass per epoch. The key of a feature is (picture, encoder), the encoder
being the digest of weights, architecture, its source and the preprocessing; appended images cost only themselves.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from components import plugins
from components.contracts.errors import DataDiffers
from components.contracts.families import Backbone
from components.contracts.progress import Progress, silent
from components.contracts.records import canonical_json
from components.images import decode, in_threads, pixel_digest, prepare, stacked
from components.store import fsync_folder, sha256_file, write_atomically

if TYPE_CHECKING:
    import torch

_BATCH = 16
_CHUNK = 4096
"""Images per cache segment: what a kill can cost."""


def encoder_digest(name: str, backbone: Backbone, state: dict[str, torch.Tensor]) -> str:
    """sha256 of all that a feature depends on besides the picture."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].detach().cpu().contiguous().numpy().tobytes())
    facts = [
        backbone.preprocessing.to_json(),
        plugins.member_digest("backbones", name),
        # Decoder, preprocessing and encoder are ours; a changed line of them makes other features.
        plugins.source_digest(Path(__file__)),
        {library: metadata.version(library) for library in ("numpy", "openvino", "pillow", "timm", "torch")},
    ]
    digest.update(canonical_json(facts).encode())
    return digest.hexdigest()


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
    digest = encoder_digest(name, backbone, state)
    folder = cache / "features" / digest[:32]
    folder.mkdir(parents=True, exist_ok=True)
    known = _read(folder)
    missing = [i for i, picture in enumerate(pictures) if picture not in known]
    if missing:
        model = _encoder(backbone, state, cache / "encoders" / f"{digest[:32]}.onnx", num_threads)
        for start in range(0, len(missing), _CHUNK):
            chunk = missing[start : start + _CHUNK]
            found = _run(model, [(paths[i], pictures[i]) for i in chunk], backbone, progress)
            names = [pictures[i] for i in chunk]
            _write(folder, names, found)
            known |= dict(zip(names, found, strict=True))
    return np.stack([known[picture] for picture in pictures])


def _run(model: Any, members: list[tuple[Path, str]], backbone: Backbone, progress: Progress) -> npt.NDArray[np.float32]:
    from components.targets.openvino import stream

    def load(member: tuple[Path, str]) -> npt.NDArray[np.uint8]:
        path, expected = member
        picture = decode(path.read_bytes())
        if pixel_digest(picture)[:32] != expected:
            raise DataDiffers(f"{path} was changed while the run read it; restore it, or `visionloop data add`")
        return prepare(picture, backbone.preprocessing)

    images = stacked(in_threads(load, members, progress=progress), _BATCH)
    return np.concatenate(list(stream(model, images, "embedding")))


def _encoder(backbone: Backbone, state: dict[str, torch.Tensor], path: Path, num_threads: int) -> Any:
    from torch import nn

    from components.checkpoints import ImageModel
    from components.graphs import to_onnx
    from components.targets.openvino import compiled

    sidecar = path.with_suffix(".sha256")
    if not (path.exists() and sidecar.exists() and sha256_file(path) == sidecar.read_text()):
        path.parent.mkdir(parents=True, exist_ok=True)
        module = backbone.build()
        module.load_state_dict(state)
        scratch = path.with_name(f".{uuid.uuid4().hex}.onnx")
        to_onnx(ImageModel(module, nn.Identity(), backbone.preprocessing).eval(), backbone.preprocessing, scratch)
        write_atomically(path, scratch.read_bytes())
        scratch.unlink()
        write_atomically(sidecar, sha256_file(path).encode())
    return compiled(path, hint="THROUGHPUT", num_threads=num_threads)


def _write(folder: Path, pictures: list[str], features: npt.NDArray[np.float32]) -> None:
    from safetensors.numpy import save

    names = np.frombuffer(bytes.fromhex("".join(pictures)), dtype=np.uint8).reshape(len(pictures), -1)
    data = save({"features": np.ascontiguousarray(features, dtype=np.float32), "pictures": names})
    write_atomically(folder / f"{hashlib.sha256(data).hexdigest()}.safetensors", data)
    fsync_folder(folder)


def _read(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    from safetensors.numpy import load

    known: dict[str, npt.NDArray[np.float32]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != path.stem:
            # A cache may be lost, never believed: what does not verify is computed again.
            path.unlink()
            continue
        segment = load(data)
        names = [row.tobytes().hex() for row in segment["pictures"]]
        known |= dict(zip(names, segment["features"], strict=True))
    return known
