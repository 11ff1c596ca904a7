"""The uncertainty of a difference between two arms: over seeds and over test expressions, for many comparisons."""

from dataclasses import dataclass
from functools import cache

import numpy as np

DRAWS = 10_000


@dataclass(frozen=True)
class Difference:
    """Accuracy of an arm minus that of another, in points (1 = 0.01)."""

    points: float
    low: float  # of the interval
    high: float
    seeds: int

    @property
    def visible(self):
        """How large a difference, in points, would have been told from none: the wider half of the interval."""
        return max(self.points - self.low, self.high - self.points)

    @property
    def verdict(self):
        if self.low > 0:
            return "better"
        if self.high < 0:
            return "worse"
        return "undecided"


def difference(right, other, rows, comparisons=1):
    """The difference of two arms, paired by seed and expression.

    right, other: (S, n) bool, whether the arms are right with seed s about expression i; both with the same seeds.
    rows: expressions of an image, which stand together and are drawn together. comparisons: of a table: the intervals
    hold for all of them at once with 95 % (Bonferroni).

    A hierarchical bootstrap: S seeds are drawn with replacement, and images with replacement, the same for all seeds.
    Drawn seeds vary less than seeds do, by (S - 1) / S; their deviations from the mean are widened by as much.
    With one seed the interval is of the expressions alone.
    """
    S, n = right.shape
    per_image = (right.astype(float) - other).reshape(S, n // rows, rows).mean(2)  # (S, images)
    of_seeds = drawn_images(per_image.shape[1]) @ per_image.T  # (DRAWS, S): the means over each draw's images
    centre = of_seeds.mean(1)  # (DRAWS,)
    seeds = np.random.default_rng(1).integers(S, size=(DRAWS, S))
    drawn = np.take_along_axis(of_seeds, seeds, 1).mean(1)  # (DRAWS,)
    widen = (S / (S - 1)) ** 0.5 if S > 1 else 0.0
    draws = centre + widen * (drawn - centre)
    tail = 100 * 0.05 / comparisons / 2
    low, high = np.percentile(draws, (tail, 100 - tail))
    return Difference(100 * per_image.mean(), 100 * low, 100 * high, S)


@cache  # every comparison draws the same images
def drawn_images(n):
    """(DRAWS, n): how often each of n images is in a draw of n with replacement, as a share of the draw."""
    images = np.random.default_rng(0).integers(n, size=(DRAWS, n))
    images += n * np.arange(DRAWS)[:, None]  # each draw counts in a row of its own
    times = np.bincount(images.ravel(), minlength=n * DRAWS).reshape(DRAWS, n)
    return times / n
