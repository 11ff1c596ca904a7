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
    own: tuple[float, float]  # the interval with the spread of this comparison's own seeds, unbounded for one seed

    @property
    def visible(self):
        """The smallest difference, in points, that would have been significant: the wider half of the interval."""
        return max(self.points - self.low, self.high - self.points)

    @property
    def verdict(self):
        return verdict(self.low, self.high)

    @property
    def own_verdict(self):
        return verdict(*self.own)


def verdict(low, high):
    if low > 0:
        return "better"
    return "worse" if high < 0 else "undecided"


def differences(pairs, rows, comparisons=None, counted=1.0):
    """The differences of a group of comparisons; their intervals hold for a whole table at once with 95 % (Bonferroni).

    pairs: for each comparison (right, other), both (S, n) bool: whether an arm, and the one it is compared with, are
    right with seed s about expression i of n. rows: expressions of an image, which stand together. comparisons: of the
    whole table, default: these. counted: the share of the expressions that count; right and other agree on the rest.

    Expressions: images are drawn with replacement, the same for all seeds. Seeds: a bootstrap of three seeds cannot
    reach further than they do, so their part is drawn from Student's t, with one variance of a seed's difference for
    the group, which has the degrees of freedom of all its comparisons. Where no comparison has two seeds, the intervals
    are of the expressions alone. `own` takes each comparison's own variance, which assumes nothing of the others and
    has few degrees of freedom.
    """
    per_image = []
    for right, other in pairs:
        gain = (right.astype(float) - other) / counted  # (S, n)
        per_image.append(gain.reshape(len(gain), -1, rows).mean(2))  # (S, images)
    freedom = sum(len(d) - 1 for d in per_image)
    squares = sum(((d.mean(1) - d.mean()) ** 2).sum() for d in per_image)
    sd = (squares / freedom) ** 0.5 if freedom else 0.0  # of a seed's difference
    tail = 100 * 0.05 / (comparisons or len(pairs)) / 2

    def interval(d, sd, freedom):
        """d (S, images), sd: of a seed's difference -> (low, high) in points."""
        draws = drawn_images(d.shape[1]) @ d.mean(0) + sd / len(d) ** 0.5 * of_seeds(freedom)  # (SEED_DRAWS, DRAWS)
        low, high = np.percentile(draws, (tail, 100 - tail))
        return 100 * low, 100 * high

    found = []
    for d in per_image:
        of_its_own = interval(d, d.mean(1).std(ddof=1), len(d) - 1) if len(d) > 1 else (-np.inf, np.inf)
        found.append(Difference(100 * d.mean(), *interval(d, sd, freedom), len(d), of_its_own))
    return found


@cache
def of_seeds(freedom):
    """(SEED_DRAWS, DRAWS) of Student's t; zeros without a degree of freedom."""
    return np.random.default_rng(1).standard_t(freedom, (SEED_DRAWS, DRAWS)) if freedom else np.zeros((1, DRAWS))


@cache  # every comparison draws the same images
def drawn_images(n):
    """(DRAWS, n): how often each of n images is in a draw of n with replacement, as a share of the draw."""
    images = np.random.default_rng(0).integers(n, size=(DRAWS, n))
    images += n * np.arange(DRAWS)[:, None]  # each draw counts in a row of its own
    times = np.bincount(images.ravel(), minlength=n * DRAWS).reshape(DRAWS, n)
    return times / n
