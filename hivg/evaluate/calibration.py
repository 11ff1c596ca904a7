"""The score as the probability of being right: Platt scaling, fitted on a split and stored with the weights."""

import math

import numpy as np

from hivg.evaluate.metrics import mean
from hivg.utils.messages import quoted, shown

RECOMMENDED = 0.5  # the least score to trust: from here on a box is more likely right than wrong
EDGE = 2**-25  # scores are kept this far from 0 and 1, where logits are infinite: half of float32's step below 1
LARGEST = 1e6  # of a and b; a trained model's are below 10


def calibrated(score, a, b):
    """A score in 0..1 -> sigmoid(a logit(score) + b), the probability that the box is right. It rises with the score,
    as a > 0, so it discriminates as well as before."""
    return float(_sigmoid(a * _logit(score) + b))


def fit_calibration(scores, right):
    """Platt scaling: the (a, b) for which `calibrated` best predicts which predictions are right.

    scores: n numbers in 0..1; right: n bools. Platt 1999: logistic regression by Newton's method, its targets moved
    off 0 and 1 as if one more right and one more wrong prediction had been seen. Raises ValueError where higher scores
    are not more often right.
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
        while _cross_entropy(x @ (ab - step), targets) > loss:  # far from the minimum a full step can overshoot
            step = step / 2
        ab = ab - step
        loss = _cross_entropy(x @ ab, targets)
        if np.abs(step).max() < 1e-9:
            break
    a, b = ab.tolist()
    if not (n_right and n_wrong and np.ptp(scores) > 0 and math.isfinite(b) and 0 < a < LARGEST):
        raise ValueError(f"the score cannot be calibrated on {n_right} right and {n_wrong} wrong boxes: it does not "
                         "tell them apart; train longer, or use a larger split")
    return a, b


def calibration_of(info, path="the weights file"):
    """(a, b) of `calibrated` from the `info` of a weights file, or None if it has none. Raises ValueError unless they
    are two finite numbers, the first above 0."""
    ab = info.get("score_calibration")
    if ab is None:
        return None
    is_pair = isinstance(ab, list | tuple) and len(ab) == 2 and all(type(value) in (int, float) for value in ab)
    if not is_pair or not all(abs(value) < LARGEST for value in ab) or ab[0] <= 0:  # NaN is not < LARGEST
        raise ValueError(f"{shown(path)}: its score calibration {quoted(ab)} is not two finite numbers, the first "
                         "above 0; calibrate it again (python -m hivg.evaluate --calibrate)")
    return float(ab[0]), float(ab[1])


def reliability(scores, right):
    """How well scores predict the accuracy -> rows (low, high, count, mean score, accuracy) for each tenth of 0..1,
    nan where it is empty, and the expected calibration error: |mean score - accuracy| averaged over the predictions."""
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
    """The table of `reliability` as lines of text."""
    tenths, error = reliability(scores, right)
    lines = [f"score as the chance of being right: expected calibration error {error:.4f}"]
    for low, high, count, mean_score, share_right in tenths:
        means = f", mean score {mean_score:.3f}, Acc@0.5 {share_right:.3f}" if count else ""
        lines.append(f"  {low:.1f} to {high:.1f}    {count:>6} expressions{means}")
    return lines


def _logit(scores):
    scores = np.clip(np.asarray(scores, dtype=np.float64), EDGE, 1 - EDGE)
    return np.log(scores / (1 - scores))


def _sigmoid(z):
    return 0.5 + 0.5 * np.tanh(z / 2)  # never overflows


def _cross_entropy(z, targets):
    """Of sigmoid(z) against the targets, summed."""
    return (np.logaddexp(0, z) - targets * z).sum()
