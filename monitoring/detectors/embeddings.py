"""Embeddings: is there a way at all to tell production from the reference?

Statistic: squared maximum mean discrepancy with a Gaussian kernel (Gretton et al., "A Kernel Two-Sample Test", 2012) on
whitened principal components of both samples together; its threshold is a permutation's, which is exact at any size.
Effect: the area under the ROC curve with which the best rule would tell an image of production from one of the reference,
if all that differed were a shift of the mean that has this discrepancy: 0.5 when nothing can be told, 1.0 when every image
can. For whitened components with a Gaussian kernel of width w a shift of d standard deviations has the squared discrepancy
2 A (1 - exp(-d^2 / (w + 4))), where A is the mean of the kernel inside a sample, and the area Phi(d / sqrt(2)). The estimate
of the discrepancy is unbiased, so the size of the window does not shrink the effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from scipy.stats import norm

from monitoring import calibration
from monitoring.verdicts import Sample, Shift, ShiftStatus

Floats = npt.NDArray[np.float32]


class Detector(BaseModel):
    """Alarms when images of production can materially be told from the reference's by their embeddings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    material: float = Field(default=0.7, gt=0.5, lt=1)
    """Area under the ROC curve that matters; less than half of the way to it never alarms."""
    components: int = Field(default=32, ge=1, le=256)
    """Most principal components."""
    most_images: int = Field(default=1500, ge=100, le=5000)
    """Of each side; a quadratic number of pairs is compared."""
    permutations: int = Field(default=2000, ge=200)

    @property
    def draws(self) -> int:
        return self.permutations

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
        kernel, width = _kernel(_whitened(np.concatenate([ours, theirs]), self.components))
        value, null = _mmd(kernel, m, n, self.permutations, rng)
        threshold = calibration.exceeded(null, alpha)
        scale = _Scale(_inside(kernel, m, n), width, m * n / (m + n) ** 2)
        trivial = calibration.trivial(self.material, 0.5)
        effect = scale.auc(value)
        least = max(threshold, scale.mmd(trivial))
        smallest = scale.auc(scale.shown(least, float(null.var()), 1 / m + 1 / n))
        status: ShiftStatus
        if value > threshold and effect >= trivial:
            status = "drift"
            message = f"production can be told from the reference by its embeddings (AUC {effect:.3f})"
        elif smallest > self.material:
            status = "inconclusive"
            message = calibration.undecided(
                f"AUC {smallest:.3f}", f"{self.material:g}", smallest - 0.5, self.material - 0.5, m, n
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


def _kernel(points: Floats) -> tuple[Floats, float]:
    """Gaussian kernel exp(-squared distance / width), the width its median; float32 (m + n, m + n)."""
    squares = (points**2).sum(axis=1)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * points @ points.T, 0)
    # Every 7th row is enough for a median.
    width = max(float(np.median(distances[::7])), 1e-12)
    found: Floats = np.exp(distances * np.float32(-1 / width))
    return found, width


def _inside(kernel: Floats, m: int, n: int) -> float:
    """Mean of the kernel between different images of one sample."""
    ours, theirs = kernel[:m, :m], kernel[m:, m:]
    total = float(ours.sum(dtype=np.float64) - np.trace(ours)) + float(theirs.sum(dtype=np.float64) - np.trace(theirs))
    return total / (m * (m - 1) + n * (n - 1))


@dataclass(frozen=True)
class _Scale:
    """From the squared discrepancy to the area under the ROC curve of the shift that has it, and back."""

    inside: float
    width: float
    between: float
    """Share of the one sample times share of the other: the components are fitted on both, so a shift of d in units of one
    sample's deviation is d / sqrt(1 + between d^2) in theirs."""

    def auc(self, mmd: float) -> float:
        share = min(max(mmd, 0.0) / (2 * self.inside), 1 - 1e-12)
        square = -(self.width + 4) * float(np.log1p(-share))
        square /= max(1 - self.between * square, 1e-6)
        return float(norm.cdf(np.sqrt(square / 2)))

    def shown(self, least: float, variance: float, share: float) -> float:
        """The squared discrepancy of which the estimate exceeds `least` in 80 % of the windows.

        To the `variance` without a shift comes that of the witness function, which grows with the shift: about
        2 MMD^2 / (w + 2) an image, four times that in the estimate (Gretton et al., 2012, section 5); `share` is 1/m + 1/n.
        """
        found = least
        for _ in range(60):
            noise = float(np.sqrt(variance + 8 * found / (self.width + 2) * share))
            found = least + float(norm.ppf(calibration.POWER)) * noise
        return found

    def mmd(self, auc: float) -> float:
        square = 2 * float(norm.ppf(auc)) ** 2
        square /= 1 + self.between * square
        return 2 * self.inside * float(-np.expm1(-square / (self.width + 4)))


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
