"""Accuracy as the field reports it: Acc@t, its confidence interval, mean IoU, both by expression length."""

import math

LENGTHS = {"1-5 words": (1, 5), "6-7 words": (6, 7), "8-10 words": (8, 10), "11+ words": (11, 10**9)}


def accuracy(ious, threshold=0.5):
    """Share of the predictions with IoU >= threshold, in 0..1; nan for none."""
    ious = list(ious)
    return sum(iou >= threshold for iou in ious) / len(ious) if ious else math.nan


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def interval(p, n, z=1.96):
    """Wilson's 95 % interval (low, high) of a share p seen in n trials."""
    if not n:
        return math.nan, math.nan
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def by_length(expressions, ious):
    """{length class: (count, Acc@0.5, mean IoU)} for the classes of LENGTHS."""
    rows = {}
    for name, (low, high) in LENGTHS.items():
        group = [iou for text, iou in zip(expressions, ious) if low <= len(text.split()) <= high]
        rows[name] = (len(group), accuracy(group), mean(group))
    return rows


def mcnemar(only_a, only_b):
    """Two predictors right on the same samples but for only_a, where the first alone is, and only_b: the chance of a
    difference as large if neither were better (two-sided; exact up to 1,000 such samples, above by the normal
    distribution with a continuity correction)."""
    n, low = only_a + only_b, min(only_a, only_b)
    if n <= 1000:
        return min(1.0, 2 * sum(math.comb(n, k) for k in range(low + 1)) / 2**n)
    return math.erfc(max(0, abs(only_a - only_b) - 1) / math.sqrt(2 * n))


def auroc(scores, right):
    """How well a score tells right from wrong: the chance that a right prediction scores higher than a wrong one (ties
    count half); 0.5 = not at all; nan where all are right or all wrong."""
    order = sorted(zip(scores, right))
    wrong, below, i = 0, 0.0, 0
    while i < len(order):
        j = i
        while j < len(order) and order[j][0] == order[i][0]:
            j += 1
        n_right = sum(r for _, r in order[i:j])
        n_wrong = j - i - n_right
        below += n_right * (wrong + n_wrong / 2)
        wrong, i = wrong + n_wrong, j
    n_right = len(order) - wrong
    return below / (n_right * wrong) if n_right and wrong else math.nan
