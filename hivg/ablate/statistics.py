"""The uncertainty of differences between arms: over seeds and over test expressions, for many comparisons at once."""

from dataclasses import dataclass
from functools import cache

import numpy as np

DRAWS = 10_000  # of the images
SEED_DRAWS = 20  # of the seeds, for each of those


@dataclass(frozen=True)
class Difference:
    """Accuracy of an arm minus that of another, in points (1 = 0.01)."""

    points: float
    low: float  # of the interval
    high: float
    seeds: int

    @property
    def visible(self):
        """The smallest difference, in points, that would have been significant: the wider half of the interval."""
        return max(self.points - self.low, self.high - self.points)

    @property
    def verdict(self):
        if self.low > 0:
            return "better"
        if self.high < 0:
            return "worse"
        return "undecided"


def differences(pairs, rows, comparisons=None):
    """The differences of a group of comparisons; their intervals hold for a whole table at once with 95 % (Bonferroni).

    pairs: for each comparison (right, other), both (S, n) bool: whether an arm, and the one it is compared with, are
    right with seed s about expression i of n. rows: expressions of an image, which stand together. comparisons: of the
    whole table, default: these.

    Expressions: images are drawn with replacement, the same for all seeds. Seeds: a bootstrap of three seeds cannot
    reach further than they do, so their part is drawn from Student's t, with one variance of a seed's difference for
    the group, which has the degrees of freedom of all its comparisons. Where no comparison has two seeds, the intervals
    are of the expressions alone.
    """
    per_image = [(right.astype(float) - other).reshape(len(right), -1, rows).mean(2) for right, other in pairs]
    freedom = sum(len(d) - 1 for d in per_image)
    squares = sum(((d.mean(1) - d.mean()) ** 2).sum() for d in per_image)
    sd = (squares / freedom) ** 0.5 if freedom else 0.0  # of a seed's difference
    t = np.random.default_rng(1).standard_t(freedom, (SEED_DRAWS, DRAWS)) if freedom else np.zeros((1, DRAWS))
    tail = 100 * 0.05 / (comparisons or len(pairs)) / 2
    found = []
    for d in per_image:  # (S, images)
        draws = drawn_images(d.shape[1]) @ d.mean(0) + sd / len(d) ** 0.5 * t  # (SEED_DRAWS, DRAWS)
        low, high = np.percentile(draws, (tail, 100 - tail))
        found.append(Difference(100 * d.mean(), 100 * low, 100 * high, len(d)))
    return found


@cache  # every comparison draws the same images
def drawn_images(n):
    """(DRAWS, n): how often each of n images is in a draw of n with replacement, as a share of the draw."""
    images = np.random.default_rng(0).integers(n, size=(DRAWS, n))
    images += n * np.arange(DRAWS)[:, None]  # each draw counts in a row of its own
    times = np.bincount(images.ravel(), minlength=n * DRAWS).reshape(DRAWS, n)
    return times / n
