"""Embeddings: is there a way at all to tell production from the reference?

Statistic: squared maximum mean discrepancy with a Gaussian kernel (Gretton et al., "A Kernel Two-Sample Test", 2012) on
whitened principal components of both samples together; its threshold is a permutation's, which is exact at any size.
Effect: how well the kernel's witness function, made on one half, tells the other half's images apart (area under the ROC
curve): 0.5 when nothing can be told, 1.0 when every image can.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from components.contracts import Sample, Shift, ShiftStatus
from monitoring import calibration

Floats = npt.NDArray[np.float32]


class Detector(BaseModel):
    """Alarms when images of production can materially be told from the reference's by their embeddings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    material: float = Field(default=0.65, gt=0.5, le=1)
    """Smallest area under the ROC curve that matters."""
    components: int = Field(default=32, ge=1, le=256)
    """Most principal components."""
    most_images: int = Field(default=1500, ge=100, le=5000)
    """Of each side; a quadratic number of pairs is compared."""
    permutations: int = Field(default=2000, ge=200)

    @property
    def columns(self) -> Mapping[str, str]:
        return {}

    def detect(self, reference: Sample, window: Sample, measured: Mapping[str, float], *, alpha: float, seed: int) -> Shift:
        """Raises ValueError for embeddings of different lengths."""
        if reference.embeddings.shape[1] != window.embeddings.shape[1]:
            raise ValueError(
                f"embeddings of {window.embeddings.shape[1]} numbers cannot be compared with the reference's "
                f"{reference.embeddings.shape[1]}"
            )
        rng = np.random.default_rng(seed)
        ours = _drawn(reference.embeddings, self.most_images, rng)
        theirs = _drawn(window.embeddings, self.most_images, rng)
        m, n = len(ours), len(theirs)
        kernel = _kernel(_whitened(np.concatenate([ours, theirs]), self.components))
        value, null = _mmd(kernel, m, n, self.permutations, rng)
        threshold = calibration.exceeded(null, alpha)
        effect = _witness_auc(kernel, m, n, rng)
        smallest = _smallest_auc(m // 2, n // 2, alpha)
        status: ShiftStatus
        if value > threshold and effect >= self.material:
            status = "drift"
            message = f"production can be told from the reference by its embeddings (AUC {effect:.3f})"
        elif smallest > self.material:
            status = "inconclusive"
            message = (
                f"no shift is shown, but one below AUC {smallest:.3f} could not be, and {self.material:g} matters; "
                f"{n} images are too few"
            )
        else:
            status = "pass"
            message = f"production can hardly be told from the reference by its embeddings (AUC {effect:.3f})"
        return Shift(
            detector="embeddings",
            status=status,
            message=message,
            statistic="mmd2",
            value=value,
            threshold=threshold,
            p_value=calibration.p_value(null, value),
            effect=effect,
            effect_unit="AUC",
            material_effect=self.material,
            smallest_shown=smallest,
            n=n,
        )


def _drawn(embeddings: Floats, most: int, rng: np.random.Generator) -> Floats:
    if len(embeddings) <= most:
        return embeddings
    picks: npt.NDArray[np.int64] = np.sort(rng.choice(len(embeddings), size=most, replace=False))
    return embeddings[picks]


def _whitened(embeddings: Floats, most: int) -> Floats:
    """Principal components of unit variance, fitted on both samples together: fitted on one, it would look tighter there."""
    centred = embeddings.astype(np.float64) - embeddings.mean(axis=0, dtype=np.float64)
    covariance = centred.T @ centred / max(1, len(centred) - 1)
    values, vectors = np.linalg.eigh(covariance)
    # Directions of next to no variance are rounding (float16), not content.
    kept = np.flatnonzero(values > max(values[-1], 1e-12) * 1e-4)[::-1][:most]
    found: Floats = (centred @ vectors[:, kept] / np.sqrt(np.maximum(values[kept], 1e-12))).astype(np.float32)
    return found


def _kernel(points: Floats) -> Floats:
    """Gaussian kernel with the median distance for its width; float32 (m + n, m + n)."""
    squares = (points**2).sum(axis=1)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * points @ points.T, 0)
    # Every 7th row is enough for a median.
    width = float(np.median(distances[::7]))
    found: Floats = np.exp(distances * np.float32(-1 / max(width, 1e-12)))
    return found


def _mmd(
    kernel: Floats, m: int, n: int, permutations: int, rng: np.random.Generator
) -> tuple[float, npt.NDArray[np.float64]]:
    """Unbiased squared MMD of the first m against the other n, and of random divisions into m and n."""
    total = m + n
    side = np.zeros((permutations + 1, total), dtype=np.float32)
    side[0, :m] = 1
    for row in range(1, permutations + 1):
        side[row, rng.permutation(total)[:m]] = 1
    diagonal = np.diag(kernel).astype(np.float64)
    whole, trace = float(kernel.sum(dtype=np.float64)), float(diagonal.sum())
    found = np.empty(permutations + 1)
    for start in range(0, permutations + 1, 500):
        part = side[start : start + 500]
        product = part @ kernel
        within = (product * part).sum(axis=1, dtype=np.float64)  # pairs inside the first, diagonal included
        touching = product.sum(axis=1, dtype=np.float64)  # pairs that begin in the first
        across = touching - within
        other = whole - within - 2 * across
        own = part @ diagonal
        found[start : start + 500] = (
            (within - own) / (m * (m - 1)) + (other - (trace - own)) / (n * (n - 1)) - 2 * across / (m * n)
        )
    return float(found[0]), found[1:]


def _witness_auc(kernel: Floats, m: int, n: int, rng: np.random.Generator) -> float:
    """How well the witness of one half tells the images of the other half; mean of both directions."""
    ours, theirs = rng.permutation(m), m + rng.permutation(n)
    halves = [(ours[: m // 2], theirs[: n // 2]), (ours[m // 2 :], theirs[n // 2 :])]
    scores = []
    for made, asked in (halves, halves[::-1]):
        witness = kernel[:, made[1]].mean(axis=1) - kernel[:, made[0]].mean(axis=1)
        scores.append(_auc(witness[asked[1]], witness[asked[0]]))
    return float(np.mean(scores))


def _auc(positive: Floats, negative: Floats) -> float:
    """Area under the ROC curve by ranks; ties count half."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([positive, negative]))
    num = len(positive)
    return float((ranks[:num].sum() - num * (num + 1) / 2) / (num * len(negative)))


def _smallest_auc(m: int, n: int, alpha: float) -> float:
    """The area that a rank test of two halves would show in 80 % of the cases: what the whole shows is smaller."""
    from scipy.stats import norm

    deviation = float(np.sqrt((m + n + 1) / (12 * m * n)))
    return min(1.0, 0.5 + float(norm.ppf(1 - alpha) + norm.ppf(calibration.POWER)) * deviation)
