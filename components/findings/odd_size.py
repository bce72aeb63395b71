"""Pictures that are much smaller, larger, longer or wider than the others: icons, banners, strips, scans of whole pages."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Known
from components.contracts.issues import Issue, Need
from components.findings._unusual import MIN_FILES, middle_and_spread

NAME = "odd_size"
_SPREADS = 5.0
_LEAST_SPREAD = 0.2


class Finding(BaseModel):
    """The score is how many times its size or its shape is off the usual one, as a fraction: 0.1 for ten times."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    times_size: float = Field(default=4.0, gt=1)
    """A side may be this many times shorter or longer than the median, or more where sizes vary; the mean of both sides."""
    times_shape: float = Field(default=2.5, gt=1)
    """Width over height may be this many times the median or the median this many times it, or more where shapes vary."""
    longest: float = Field(default=10.0, gt=1)
    """Long over short side from which a picture is an issue in any data set."""

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing but the facts."""
        return frozenset()

    def look(self, known: Known) -> list[Issue]:
        """Every such picture, the oddest first; one issue for a picture that is odd in several ways."""
        table = known.table.sort_values(["sha256", "label"])
        if not len(table):
            return []
        width, height = table["width"].to_numpy(float), table["height"].to_numpy(float)
        ways = [
            (np.abs(np.log2(width / height)), np.log2(self.longest), "its sides are 1:{:.0f}, which cuts or squeezes it")
        ]
        if len(table) >= MIN_FILES:
            size, least_size = _off(np.log2(width * height) / 2, self.times_size)
            shape, least_shape = _off(np.log2(width / height), self.times_shape)
            ways += [
                (np.maximum(size, 0), least_size, "it is {:.1f} times as large as the others"),
                (np.maximum(-size, 0), least_size, "it is {:.1f} times smaller than the others"),
                (np.abs(shape), least_shape, "its shape is {:.1f} times longer or wider than that of the others"),
            ]
        issues = []
        for row, facts in enumerate(table.to_dict("records")):
            found = [(off[row] / least, off[row], least, text) for off, least, text in ways if off[row] >= least]
            if found:
                _, off, least, text = max(found)
                issues.append(
                    known.issue(
                        NAME,
                        [facts["path"]],
                        severity="warning",
                        score=2.0**-off,
                        threshold=2.0**-least,
                        detail=f"{facts['width']}x{facts['height']} pixels: {text.format(2.0**off)}",
                        action="look whether it belongs here; cut it to what it shows, or remove it",
                    )
                )
        return sorted(issues, key=lambda issue: (issue.score, issue.id))


def _off(logarithms: npt.NDArray[np.float64], times: float) -> tuple[npt.NDArray[np.float64], float]:
    """How far each is from the median, and from where on that is odd, in powers of two."""
    middle, spread = middle_and_spread(logarithms)
    return logarithms - middle, max(float(np.log2(times)), _SPREADS * max(spread, _LEAST_SPREAD))
