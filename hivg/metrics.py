"""Accuracy as the field reports it: Acc@t, its confidence interval, mean IoU, both by expression length; and the score
as a chance of being right."""

import math

import numpy as np

from hivg.utils.quote import quoted, shown

# class -> fewest and most words
LENGTHS = {"1-5 words": (1, 5), "6-7 words": (6, 7), "8-10 words": (8, 10), "11+ words": (11, 10**9)}

EDGE = 2**-25  # scores are calibrated as if they were at least so far from 0 and 1
MAX_CALIBRATION = 1e6  # of its two numbers; those of a trained model are below 10


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
    """McNemar's test of two predictors on the same samples -> p, the chance of a difference as large if neither were
    better.

    only_a, only_b: how many samples the first alone and the second alone has right. Two-sided; exact up to 1,000 such
    samples, above by the normal distribution with a continuity correction.
    """
    n = only_a + only_b
    if n > 1000:
        return math.erfc(max(0, abs(only_a - only_b) - 1) / math.sqrt(2 * n))
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def auroc(scores, right):
    """How well a score tells right from wrong: the chance that a right prediction scores higher than a wrong one, ties
    counting half. 0.5 = not at all; nan where all are right or all wrong. Raises ValueError for a score that is nan."""
    order = sorted(zip(scores, right))
    if any(math.isnan(score) for score, _ in order):
        raise ValueError("a score is not a number (NaN); the weights that gave it are damaged")
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


# ---- the score as a chance: Platt's scaling

def calibrated(score, a, b):
    """A score in 0..1 -> the chance that the box is right, sigmoid(a logit(score) + b); it rises with the score as a
    is above 0, so that it tells right from wrong as well as before."""
    return float(_sigmoid(a * _logit(score) + b))


def fit_calibration(scores, right):
    """Platt's scaling: the a and b whose `calibrated` scores say best how often predictions are right.

    scores: n numbers in 0..1; right: n bools. Platt 1999: logistic regression by Newton's method on targets drawn in
    from 0 and 1 as if one more right and one more wrong prediction had been seen. Raises ValueError where the score
    does not rise with the chance of being right.
    """
    right = np.array(right, dtype=bool)  # (n,)
    x = np.stack([_logit(scores), np.ones(len(right))], 1)  # (n, 2)
    n_right = right.sum()
    n_wrong = len(right) - n_right
    targets = np.where(right, (n_right + 1) / (n_right + 2), 1 / (n_wrong + 2))  # (n,)
    ab = np.array([0.0, np.log((n_right + 1) / (n_wrong + 1))])
    loss = _cross_entropy(x @ ab, targets)
    for _ in range(100):
        p = _sigmoid(x @ ab)  # (n,)
        gradient = x.T @ (p - targets)  # (2,)
        hessian = (x.T * (p * (1 - p))) @ x + 1e-9 * np.eye(2)  # (2, 2)
        step = np.linalg.solve(hessian, gradient)
        while _cross_entropy(x @ (ab - step), targets) > loss:  # far from the minimum a whole step can be too long
            step = step / 2
        ab = ab - step
        loss = _cross_entropy(x @ ab, targets)
        if np.abs(step).max() < 1e-9:
            break
    a, b = ab.tolist()
    if not (n_right and n_wrong and math.isfinite(b) and 0 < a < MAX_CALIBRATION):
        raise ValueError(f"the score cannot be calibrated on {n_right} right and {n_wrong} wrong boxes: it does not "
                         "tell them apart; train longer, or take a larger split")
    return a, b


def calibration_of(info, path="the weights"):
    """The a and b of `calibrated` that stand in a weights file's `info`, None if there are none. Raises ValueError for
    anything but two finite numbers, the first above 0."""
    ab = info.get("score_calibration")
    if ab is None:
        return None
    is_pair = isinstance(ab, list) and len(ab) == 2 and all(type(value) in (int, float) for value in ab)
    # as large as a float can be is finite, and yet no sensible number
    if not is_pair or not all(abs(value) < MAX_CALIBRATION for value in ab) or ab[0] <= 0:
        raise ValueError(f"{shown(path)}: its score calibration {quoted(ab)} is not two finite numbers, the first "
                         "above 0; calibrate it again (python -m hivg.evaluate --calibrate)")
    return float(ab[0]), float(ab[1])


def reliability(scores, right):
    """How far a score is the chance of being right -> rows (low, high, count, mean score, accuracy) of the tenths of
    0..1, and the expected calibration error: the mean of |mean score - accuracy| over all predictions' tenths. Empty
    tenths have nan."""
    groups = [[] for _ in range(10)]
    for score, is_right in zip(scores, right):
        groups[min(int(10 * score), 9)].append((score, is_right))
    rows = []
    error = 0.0
    for i, group in enumerate(groups):
        said = mean(score for score, _ in group)
        true = mean(is_right for _, is_right in group)
        rows.append((i / 10, (i + 1) / 10, len(group), said, true))
        if group:
            error += len(group) * abs(said - true)
    return rows, error / max(len(scores), 1)


def reliability_lines(scores, right):
    """The table of `reliability` as lines of text."""
    tenths, error = reliability(scores, right)
    lines = [f"score as the chance of being right: expected calibration error {error:.4f}"]
    for low, high, count, said, true in tenths:
        means = f", mean score {said:.3f}, Acc@0.5 {true:.3f}" if count else ""
        lines.append(f"  {low:.1f} to {high:.1f}    {count:>6} expressions{means}")
    return lines


def _logit(scores):
    """As far from 0 and 1 as the next number in float32 below 1, which is what a score of 1 may be."""
    scores = np.clip(np.asarray(scores, dtype=np.float64), EDGE, 1 - EDGE)
    return np.log(scores / (1 - scores))


def _sigmoid(z):
    return 0.5 + 0.5 * np.tanh(z / 2)  # no overflow, whatever z is


def _cross_entropy(z, targets):
    """Of sigmoid(z) against the targets, summed."""
    return (np.logaddexp(0, z) - targets * z).sum()
