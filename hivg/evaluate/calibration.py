"""The score as the probability of being right: Platt scaling, fitted on a split and stored with the weights."""

import math

import numpy as np

from hivg.evaluate.metrics import mean
from hivg.utils.messages import quoted, shown

EDGE = 2**-25  # scores are kept this far from 0 and 1: half the spacing of float32 just below 1
MAX_CALIBRATION = 1e6  # bound of a and b; those of a trained model are below 10


def calibrated(score, a, b):
    """A score in 0..1 -> the probability that the box is right, sigmoid(a logit(score) + b). As a > 0 it rises with the
    score, so the AUROC stays the same."""
    return float(_sigmoid(a * _logit(score) + b))


def fit_calibration(scores, right):
    """Platt scaling (Platt 1999): the a and b of `calibrated` that maximise the likelihood.

    scores: n numbers in 0..1; right: n bools. Logistic regression by Newton's method, on targets smoothed as if one
    more right and one more wrong prediction had been seen. Raises ValueError unless the score rises with accuracy.
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
        while _cross_entropy(x @ (ab - step), targets) > loss:  # a full step can overshoot
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
    """The a and b of `calibrated` in a weights file's `info`, or None. Raises ValueError for anything but two finite
    numbers, the first above 0."""
    ab = info.get("score_calibration")
    if ab is None:
        return None
    is_pair = isinstance(ab, list) and len(ab) == 2 and all(type(value) in (int, float) for value in ab)
    if not is_pair or not all(abs(value) < MAX_CALIBRATION for value in ab) or ab[0] <= 0:
        raise ValueError(f"{shown(path)}: its score calibration {quoted(ab)} is not two finite numbers, the first "
                         "above 0; calibrate it again (python -m hivg.evaluate --calibrate)")
    return float(ab[0]), float(ab[1])


def reliability(scores, right):
    """Reliability diagram -> rows (low, high, count, mean score, accuracy) of ten equal bins of the score, nan where
    empty, and the expected calibration error: |mean score - accuracy| of the bins, weighted by their counts."""
    groups = [[] for _ in range(10)]
    for score, is_right in zip(scores, right):
        groups[min(int(10 * score), 9)].append((score, is_right))
    rows = []
    error = 0.0
    for i, group in enumerate(groups):
        mean_score = mean(score for score, _ in group)
        share_right = mean(is_right for _, is_right in group)
        rows.append((i / 10, (i + 1) / 10, len(group), mean_score, share_right))
        if group:
            error += len(group) * abs(mean_score - share_right)
    return rows, error / max(len(scores), 1)


def reliability_lines(scores, right):
    """`reliability` as lines of text."""
    tenths, error = reliability(scores, right)
    lines = [f"score as the probability of being right: expected calibration error {error:.4f}"]
    for low, high, count, mean_score, share_right in tenths:
        means = f", mean score {mean_score:.3f}, Acc@0.5 {share_right:.3f}" if count else ""
        lines.append(f"  {low:.1f} to {high:.1f}    {count:>6} expressions{means}")
    return lines


def _logit(scores):
    """Of scores kept from 0 and 1 by EDGE."""
    scores = np.clip(np.asarray(scores, dtype=np.float64), EDGE, 1 - EDGE)
    return np.log(scores / (1 - scores))


def _sigmoid(z):
    return 0.5 + 0.5 * np.tanh(z / 2)  # no overflow, whatever z is


def _cross_entropy(z, targets):
    """Of sigmoid(z) against the targets, summed."""
    return (np.logaddexp(0, z) - targets * z).sum()
