"""The interval of a difference: paired, over seeds and images, wide enough."""

import numpy as np
import pytest

from hivg.ablate.statistics import difference, drawn_images


def answers(seeds, images, p, rng, spread=0.0):
    """(seeds, 4 images) bool, right with probability p, which differs by `spread` from seed to seed."""
    of_seed = p + spread * rng.normal(size=(seeds, 1))
    return rng.random((seeds, 4 * images)) < of_seed


def test_the_difference_is_that_of_the_means_in_points():
    rng = np.random.default_rng(0)
    right = answers(3, 50, 0.7, rng)
    other = answers(3, 50, 0.5, rng)
    d = difference(right, other, 4)
    assert d.points == pytest.approx(100 * (right.mean() - other.mean()))
    assert d.low < d.points < d.high and d.seeds == 3
    mirrored = difference(other, right, 4)
    assert (mirrored.low, mirrored.high) == pytest.approx((-d.high, -d.low))


def test_equal_answers_differ_by_exactly_nothing():
    right = answers(3, 50, 0.7, np.random.default_rng(0))
    d = difference(right, right, 4)
    assert (d.points, d.low, d.high, d.verdict) == (0, 0, 0, "undecided")


def test_seeds_that_disagree_widen_the_interval_and_more_comparisons_too():
    rng = np.random.default_rng(1)
    other = np.zeros((3, 400), bool)
    same = np.repeat(answers(1, 100, 0.5, rng), 3, 0)
    differing = same.copy()
    differing[0] = False  # this seed learned nothing
    assert width(difference(differing, other, 4)) > 1.5 * width(difference(same, other, 4))
    assert width(difference(same, other, 4, comparisons=25)) > 1.3 * width(difference(same, other, 4))


def width(d):
    return d.high - d.low


def test_expressions_of_an_image_stand_together():
    rng = np.random.default_rng(2)
    together = np.repeat(rng.random((1, 100)) < 0.5, 4, 1)  # all four of an image are right, or none
    apart = rng.permutation(together.ravel())[None]
    other = np.zeros_like(together)
    assert width(difference(together, other, 4)) > 1.6 * width(difference(apart, other, 4))  # twice, but for chance


def test_one_seed_gives_the_interval_of_the_expressions():
    rng = np.random.default_rng(3)
    right = rng.random((1, 400)) < 0.5
    d = difference(right, np.zeros_like(right), 1)
    assert width(d) == pytest.approx(2 * 1.96 * 100 * (0.25 / 400) ** 0.5, rel=0.05)


@pytest.mark.slow
def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Five seeds that differ as much as seeds do; a percentile interval of so few is somewhat too narrow still."""
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(200):
        d = difference(answers(5, 100, 0.6, rng, 0.05), answers(5, 100, 0.6, rng, 0.05), 4)
        held += d.low <= 0 <= d.high
    assert 0.86 <= held / 200 <= 0.99


def test_draws_of_images_are_shares():
    draws = drawn_images(30)
    assert np.allclose(draws.sum(1), 1) and (draws >= 0).all()
    assert draws.mean(0) == pytest.approx(1 / 30, rel=0.05)
