"""The share of a mixed example that its own picture keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def drawn(alpha: float, generator: torch.Generator) -> float:
    """A draw of Beta(alpha, alpha), from a generator of torch, which has no Beta of its own."""
    import torch

    seed = int(torch.randint(2**62, (1,), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))
