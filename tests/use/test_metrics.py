"""Accuracy, intervals and tests of significance against values worked out by hand."""

import math

import pytest
import torch

from hivg.evaluate.metrics import accuracy, auroc, by_length, interval, mcnemar, mean


def test_accuracy_and_mean():
    assert accuracy([0.5, 0.49, 0.9, 0.0]) == 0.5  # 0.5 itself is right
    assert accuracy([0.5, 0.49, 0.9, 0.0], threshold=0.9) == 0.25
    assert accuracy(iter([1.0])) == 1
    assert mean([0.5, 0.25]) == 0.375
    assert math.isnan(accuracy([])) and math.isnan(mean([]))


@pytest.mark.parametrize("k, n, low, high", [  # Newcombe 1998, table I, method 3
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_interval(k, n, low, high):
    assert interval(k / n, n) == pytest.approx((low, high), abs=1e-4)
    assert interval(1 - k / n, n) == pytest.approx((1 - high, 1 - low), abs=1e-4)


def test_interval_of_nothing():
    assert all(math.isnan(x) for x in interval(math.nan, 0))


def test_by_length():
    texts = ["w " * n for n in (1, 5, 6, 7, 8, 10, 11, 20)]
    rows = by_length(texts, [1.0, 0.0, 0.6, 0.8, 0.4, 0.2, 0.5, 0.7])
    assert list(rows) == ["1-5 words", "6-7 words", "8-10 words", "11+ words"]
    assert [count for count, _, _ in rows.values()] == [2, 2, 2, 2]
    assert [acc for _, acc, _ in rows.values()] == [0.5, 1.0, 0.0, 1.0]
    assert [average for _, _, average in rows.values()] == pytest.approx([0.5, 0.7, 0.3, 0.6])
    count, acc, average = by_length(["one word"], [1.0])["11+ words"]
    assert count == 0 and math.isnan(acc) and math.isnan(average)


def test_auroc_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 8, (60,), generator=generator)  # many ties
    right = torch.rand(60, generator=generator) < 0.4
    above = scores[right][:, None] - scores[~right]  # (right, wrong)
    expected = ((above > 0) + 0.5 * (above == 0)).mean().item()
    assert auroc(scores.tolist(), right.tolist()) == pytest.approx(expected)
    assert math.isnan(auroc([1, 2], [True, True])) and math.isnan(auroc([1, 2], [False, False]))


def test_auroc_of_nan():
    with pytest.raises(ValueError, match="NaN"):
        auroc([0.1, math.nan, 0.2], [True, False, True])


@pytest.mark.parametrize("a, b, p", [
    (0, 0, 1.0), (5, 0, 2 / 32), (1, 3, 2 * 5 / 16), (3, 3, 1.0), (10, 2, 2 * (1 + 12 + 66) / 4096)])
def test_mcnemar_by_hand(a, b, p):
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(p)


def test_mcnemar_of_many_is_near_the_exact_one():
    exact = 2 * sum(math.comb(1001, k) for k in range(461)) / 2**1001
    assert mcnemar(460, 541) == pytest.approx(exact, rel=0.02)
