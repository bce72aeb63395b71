"""Pretrained weights: foreign files become safetensors once, in a subprocess, after their sha256 is checked.

A `.pth` file is a pickle. `weights_only=True` narrows what it may do, it is not a boundary (CVE-2025-32434), so such a
file is only ever opened in a process of its own and only when its digest is the one this code names.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from components.contracts.errors import WeightsUnavailable
from components.store import sha256_file, write_atomically

if TYPE_CHECKING:
    import torch

MAX_DOWNLOAD_BYTES = 8 << 30
"""More than any weights that torchvision or timm names."""

_downloads: ContextVar[bool] = ContextVar("downloads", default=True)


class WeightsNotHere(WeightsUnavailable):
    """They would have to be downloaded, where nothing may be."""


@contextlib.contextmanager
def without_downloads() -> Iterator[None]:
    """Meanwhile what is not in the cache raises WeightsNotHere."""
    before = _downloads.set(False)
    try:
        yield
    finally:
        _downloads.reset(before)


_CONVERT = """
import sys, torch
from safetensors.torch import save_file
state = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
# safetensors sorts by name; the number keeps the order of the state dict.
save_file({f"{i:05d}:{name}": value.contiguous().clone() for i, (name, value) in enumerate(state.items())}, sys.argv[2])
"""


def from_pickle(path: Path, *, sha256: str, cache: Path) -> dict[str, torch.Tensor]:
    """State dict of a `.pth` file, in its own order; `sha256` is the whole digest or a prefix of it.

    Raises WeightsUnavailable when the file is not the expected one.
    """
    found = sha256_file(path)
    if not found.startswith(sha256):
        raise WeightsUnavailable(f"{path} has sha256 {found[:16]}..., expected {sha256[:16]}...; it was not opened")
    converted = cache / "weights" / f"{found}.safetensors"
    sidecar = converted.with_suffix(".sha256")
    if not (converted.exists() and sidecar.exists() and sha256_file(converted) == sidecar.read_text()):
        converted.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=converted.parent) as scratch:
            result = Path(scratch, "converted.safetensors")
            done = subprocess.run(
                [sys.executable, "-P", "-c", _CONVERT, str(path), str(result)],
                capture_output=True,
                text=True,
                check=False,
                process_group=0,  # Ctrl-C is the run's to answer
            )
            if done.returncode:
                raise WeightsUnavailable(f"{path} is not a plain state dict: {done.stderr.strip().splitlines()[-1]}")
            os.replace(result, converted)
        write_atomically(sidecar, sha256_file(converted).encode())
    return {name.split(":", 1)[1]: value for name, value in sorted(from_safetensors(converted).items())}


_SPARSE_FROM = 0.25
"""Share of zeros from which a tensor is packed: its values take less then than its zeros did, and one bit a place more."""
_LEAST = 1024
"""Numbers of a tensor that is worth it."""
_PARTS = ("shape", "places", "values")


def packed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict in which tensors of many zeros are their shape, one bit a place, and the values that are not zero.

    safetensors has no sparse tensors; `unpacked` gives the same bits again, but for the sign of a zero.
    """
    import numpy as np
    import torch

    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        zeros = int((value == 0).sum())
        if not value.is_floating_point() or value.numel() < _LEAST or zeros < _SPARSE_FROM * value.numel():
            found[name] = value
            continue
        places = np.packbits((value != 0).flatten().numpy())
        parts = (torch.tensor(value.shape), torch.from_numpy(places), value[value != 0])
        found |= {f"{name}#{part}": tensor for part, tensor in zip(_PARTS, parts, strict=True)}
    return found


def unpacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What was packed, whole; raises WeightsUnavailable where its parts do not fit each other."""
    import numpy as np
    import torch

    found = {name: value for name, value in tensors.items() if "#" not in name}
    for name in sorted({name.rpartition("#")[0] for name in tensors if "#" in name}):
        shape, places, values = (tensors.get(f"{name}#{part}") for part in _PARTS)
        if shape is None or places is None or values is None:
            raise WeightsUnavailable(f"{name} is packed, and a part of it is missing; expected {', '.join(_PARTS)}")
        kinds = (shape.dtype, places.dtype) == (torch.int64, torch.uint8)
        flat = (shape.ndim, places.ndim, values.ndim) == (1, 1, 1)
        if not kinds or not flat or bool((shape < 0).any()):
            raise WeightsUnavailable(
                f"{name} is packed by a shape of {shape.dtype} {shape.tolist()}, places of {places.dtype} in "
                f"{tuple(places.shape)} and values in {tuple(values.shape)}; expected int64 sizes of 0 and more, uint8, and "
                f"one dimension of each"
            )
        numel = math.prod(shape.tolist())
        if len(places) != -(-numel // 8):
            raise WeightsUnavailable(f"{name} is packed in {len(places)} bytes for the shape {tuple(shape.tolist())}")
        chosen = torch.from_numpy(np.unpackbits(places.numpy(), count=numel).astype(bool))
        if int(chosen.sum()) != len(values):
            raise WeightsUnavailable(f"{name} is packed with {len(values)} values for {int(chosen.sum())} places")
        whole = torch.zeros(numel, dtype=values.dtype)
        whole[chosen] = values
        found[name] = whole.reshape(shape.tolist())
    return found


def from_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, packed ones whole; raises WeightsUnavailable when it is not one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsUnavailable(f"{path} is not a readable safetensors file: {error}") from error
    return unpacked(tensors)


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors of a safetensors file, whose values are not read; raises WeightsUnavailable when it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise WeightsUnavailable(f"{path} is not a readable safetensors file: {error}") from error


def download(url: str, *, sha256: str, cache: Path, timeout_s: float = 60.0, max_bytes: int = MAX_DOWNLOAD_BYTES) -> Path:
    """Fetch `url` once into the cache, never more than `max_bytes` of it; `sha256` is a digest or a prefix of one.

    What arrives has its name in the cache only when it is whole and of that digest. Raises WeightsUnavailable when
    offline, when the file is longer than allowed, cut short, or another one.
    """
    path = cache / "downloads" / url.rsplit("/", 1)[-1]
    there = sha256_file(path) if path.exists() else None
    if there is not None and there.startswith(sha256):
        return path
    if not _downloads.get():
        raise WeightsNotHere(f"{url} is not downloaded yet")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        part = Path(scratch, "part")
        try:
            with urllib.request.urlopen(url, timeout=timeout_s) as response, part.open("wb") as file:  # noqa: S310  (addresses are the libraries' own)
                said = response.headers.get("Content-Length")
                length = 0
                while chunk := response.read(1 << 20):
                    length += len(chunk)
                    if length > max_bytes:
                        raise WeightsUnavailable(f"{url} is longer than {max_bytes:,} bytes; nothing of it was kept")
                    file.write(chunk)
        except (http.client.HTTPException, OSError) as error:
            besides = f", that of the file there with {there[:8]}" if there else ""
            told = f" (its sha256 begins with {sha256}{besides})" if sha256 else ""
            raise WeightsUnavailable(
                f"cannot download {url} ({error}). Without network, put the file at {path}{told}, or set "
                f"training.weights to a local .safetensors file"
            ) from error
        if said is not None and length != int(said):
            raise WeightsUnavailable(f"{url} ended after {length:,} of {said} bytes; try again")
        found = sha256_file(part)
        if not found.startswith(sha256):
            raise WeightsUnavailable(f"{url} has sha256 {found[:16]}..., expected {sha256[:16]}...; it was not kept")
        os.replace(part, path)
    return path


def in_order(state: dict[str, torch.Tensor], module: torch.nn.Module, *, source: str) -> dict[str, torch.Tensor]:
    """Rename a state dict by position onto `module`'s own names; raises WeightsUnavailable unless every shape agrees."""
    own = module.state_dict()
    given = list(state.values())[: len(own)]
    if len(given) != len(own) or any(a.shape != b.shape for a, b in zip(given, own.values(), strict=True)):
        raise WeightsUnavailable(f"{source} does not fit this backbone: its tensors differ in number or shape")
    return dict(zip(own, given, strict=True))
