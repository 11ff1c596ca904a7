"""Accuracy as the field reports it (Acc@t with a confidence interval, mean IoU, both by expression length), and two
statistics: McNemar's test and AUROC."""

import math

import numpy as np

# class -> fewest and most words
LENGTHS = {"1-5 words": (1, 5), "6-7 words": (6, 7), "8-10 words": (8, 10), "11+ words": (11, 10**9)}


def accuracy(ious, threshold=0.5):
    """Acc@threshold: the share of predictions with IoU >= threshold, in 0..1; nan for none."""
    return mean(iou >= threshold for iou in ious)


def present(rows):
    """Of the rows of `predict` those whose expression is true of something: all but some of the wider drawn world."""
    return [row for row in rows if row.get("target", ()) is not None]


def mean(values):
    """nan for none."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def interval(p, n, z=1.96):
    """Wilson score interval (low, high) of a proportion p of n trials, 95 % for z = 1.96."""
    if not n:
        return math.nan, math.nan
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def by_length(expressions, ious):
    """{length class: (count, Acc@0.5, mean IoU)} for the classes of LENGTHS."""
    lengths = [len(text.split()) for text in expressions]
    rows = {}
    for name, (low, high) in LENGTHS.items():
        group = [iou for length, iou in zip(lengths, ious) if low <= length <= high]
        rows[name] = (len(group), accuracy(group), mean(group))
    return rows


def mcnemar(only_a, only_b):
    """McNemar's test of two predictors on the same samples -> the two-sided p-value.

    only_a, only_b: the discordant pairs, samples that only the first or only the second predictor gets right. Exact
    binomial test up to 1,000 of them, above that the normal approximation with continuity correction.
    """
    n = only_a + only_b
    if n > 1000:
        return math.erfc(max(0, abs(only_a - only_b) - 1) / math.sqrt(2 * n))
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def auroc(scores, right):
    """Area under the ROC curve: the probability that a right prediction scores higher than a wrong one, ties counting
    half. 0.5 is chance; nan where all are right or all wrong. Raises ValueError for a NaN score."""
    scores = np.asarray(scores, dtype=np.float64)  # (n,)
    right = np.asarray(right, dtype=bool)
    if np.isnan(scores).any():
        raise ValueError("a score is NaN; the weights file is damaged")
    wrong = np.sort(scores[~right])
    below = np.searchsorted(wrong, scores[right], "left")  # (n right,) wrong ones that score less than each right one
    below_or_equal = np.searchsorted(wrong, scores[right], "right")
    pairs = len(wrong) * len(below)
    return float((below + below_or_equal).sum() / 2 / pairs) if pairs else math.nan
