"""Accuracy as the field reports it: Acc@t, its confidence interval, mean IoU, both by expression length."""

import math

# class: fewest and most words
LENGTHS = {"1-5 words": (1, 5), "6-7 words": (6, 7), "8-10 words": (8, 10), "11+ words": (11, 10**9)}


def accuracy(ious, threshold=0.5):
    """Share of the predictions with IoU >= threshold, in 0..1; nan for none."""
    return mean(iou >= threshold for iou in ious)


def mean(values):
    """nan for none."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def interval(p, n, z=1.96):
    """Wilson's 95 % interval (low, high) of a share p seen in n trials."""
    if not n:
        return math.nan, math.nan
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (centre - spread) / scale, (centre + spread) / scale


def by_length(expressions, ious):
    """{length class: (count, Acc@0.5, mean IoU)} for the classes of LENGTHS."""
    lengths = [len(text.split()) for text in expressions]
    rows = {}
    for name, (low, high) in LENGTHS.items():
        group = [iou for length, iou in zip(lengths, ious) if low <= length <= high]
        rows[name] = (len(group), accuracy(group), mean(group))
    return rows


def mcnemar(only_a, only_b):
    """McNemar's p for two predictors on the same samples, two-sided.

    only_a, only_b: how many samples only the first and only the second has right. Exact up to 1,000 such samples, above
    that by the normal approximation with continuity correction.
    """
    n = only_a + only_b
    if n > 1000:
        return math.erfc(max(0, abs(only_a - only_b) - 1) / math.sqrt(2 * n))
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def auroc(scores, right):
    """Area under the ROC curve: the probability that a right prediction scores higher than a wrong one, ties counting
    half. 0.5 = chance; nan where all are right or all wrong. Raises ValueError for a score that is nan."""
    order = sorted(zip(scores, right))
    if any(math.isnan(score) for score, _ in order):
        raise ValueError("a score is NaN; the weights are damaged")
    wrong = 0  # wrong predictions so far
    below = 0.0  # pairs so far in which the wrong one scores lower
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and order[end][0] == order[start][0]:
            end += 1
        tied_right = sum(is_right for _, is_right in order[start:end])
        tied_wrong = end - start - tied_right
        below += tied_right * (wrong + tied_wrong / 2)
        wrong += tied_wrong
        start = end
    n_right = len(order) - wrong
    return below / (n_right * wrong) if n_right and wrong else math.nan
