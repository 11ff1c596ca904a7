"""The intervals of differences: paired, over seeds and images, wide enough."""

import numpy as np
import pytest

from hivg.ablate import statistics
from hivg.ablate.statistics import differences, drawn_images, of_seeds


def answers(seeds, images, p, rng, spread=0.0):
    """(seeds, 4 images) bool, right with probability p, which differs by `spread` from seed to seed."""
    of_seed = p + spread * rng.normal(size=(seeds, 1))
    return rng.random((seeds, 4 * images)) < of_seed


def difference(right, other, rows=4, comparisons=1):
    """The first of as many equal comparisons."""
    return differences([(right, other)] * comparisons, rows)[0]


def width(d):
    return d.high - d.low


def test_the_difference_is_that_of_the_means_in_points():
    rng = np.random.default_rng(0)
    right = answers(3, 200, 0.7, rng)
    other = answers(3, 200, 0.5, rng)
    d = difference(right, other)
    assert d.points == pytest.approx(100 * (right.mean() - other.mean()))
    assert d.low < d.points < d.high and d.seeds == 3
    assert d.visible == max(d.points - d.low, d.high - d.points)
    mirrored = difference(other, right)
    assert (mirrored.low, mirrored.high) == pytest.approx((-d.high, -d.low), rel=0.1)


def test_expressions_that_do_not_count_leave_the_mean_as_it_is():
    rng = np.random.default_rng(0)
    right, other = answers(3, 200, 0.7, rng), answers(3, 200, 0.5, rng)
    whole = difference(right, other)
    nothing = np.zeros((3, 4 * 100), bool)  # wrong in both
    padded = np.concatenate((right, nothing), 1), np.concatenate((other, nothing), 1)
    assert differences([padded], 4, counted=2 / 3)[0].points == pytest.approx(whole.points)


def test_equal_answers_differ_by_exactly_nothing():
    right = answers(3, 50, 0.7, np.random.default_rng(0))
    d = difference(right, right)
    assert (d.points, d.low, d.high, d.verdict) == (0, 0, 0, "undecided")


def test_seeds_that_disagree_widen_the_interval_and_more_comparisons_too():
    rng = np.random.default_rng(1)
    other = np.zeros((3, 400), bool)
    same = np.repeat(answers(1, 100, 0.5, rng), 3, 0)
    differing = same.copy()
    differing[0] = False  # this seed learned nothing
    assert width(difference(differing, other)) > 3 * width(difference(same, other))
    assert width(difference(same, other, comparisons=25)) > 1.3 * width(difference(same, other))


def test_a_group_of_a_larger_table_has_wider_intervals_and_a_spread_of_its_own():
    rng = np.random.default_rng(3)
    pair = answers(3, 100, 0.6, rng, 0.02), answers(3, 100, 0.6, rng, 0.02)
    wild = answers(3, 100, 0.6, rng, 0.3), answers(3, 100, 0.6, rng, 0.3)
    alone = differences([pair, pair], 4)[0]
    beside = differences([pair, wild], 4)[0]
    assert beside.own == alone.own and beside.low < beside.own[0] < beside.own[1] < beside.high
    of_many = differences([pair, pair], 4, 25)[0]
    assert of_many.points == alone.points and width(of_many) > 1.3 * width(alone)
    assert width(differences([pair, wild], 4, 25)[0]) > 2 * width(of_many)


def test_three_seeds_that_differ_prove_nothing():
    """Gains of 5, 10 and 15 points: by Student's t with two degrees of freedom 10 +- 12 points, and the expressions'
    share besides."""
    other = np.zeros((3, 4000), bool)
    right = other.copy()
    for seed, share in enumerate((5, 10, 15)):
        right[seed, : 40 * share] = True
    rng = np.random.default_rng(0)
    right = right[:, rng.permutation(4000)]
    d = difference(right, other)
    assert d.points == pytest.approx(10) and d.verdict == "undecided"
    assert 24 < width(d) < 32


def test_one_seed_borrows_the_spread_of_the_others_in_the_table():
    rng = np.random.default_rng(2)
    three = answers(3, 500, 0.6, rng, 0.05), answers(3, 500, 0.6, rng, 0.05)
    one = three[0][:1], three[1][:1]
    alone = differences([one], 4)[0]
    with_others = differences([one, three], 4)[0]
    assert width(with_others) > 2 * width(alone)


def test_expressions_of_an_image_stand_together():
    rng = np.random.default_rng(2)
    together = np.repeat(rng.random((1, 100)) < 0.5, 4, 1)  # all four of an image are right, or none
    apart = rng.permutation(together.ravel())[None]
    other = np.zeros_like(together)
    assert width(difference(together, other)) > 1.6 * width(difference(apart, other))  # twice, but for chance


def test_one_seed_alone_gives_the_interval_of_the_expressions():
    rng = np.random.default_rng(3)
    right = rng.random((1, 400)) < 0.5
    d = difference(right, np.zeros_like(right), rows=1)
    assert width(d) == pytest.approx(2 * 1.96 * 100 * (0.25 / 400) ** 0.5, rel=0.05)


def of_few_seeds(freedom):
    """A fifth of the draws, for many tables: still 100 beyond each end of an interval."""
    return of_seeds(freedom)[:4]


def pairs_of_their_own(rng, seeds, comparisons):
    return [(answers(seeds, 100, 0.6, rng, 0.03), answers(seeds, 100, 0.6, rng, 0.03)) for _ in range(comparisons)]


def all_against_one(rng):
    """One of the others varies more."""
    base = answers(5, 100, 0.6, rng, 0.02)
    return [(answers(3, 100, 0.6, rng, spread), base[:3]) for spread in [0.02] * 9 + [0.1]]


@pytest.mark.slow
@pytest.mark.parametrize("make_pairs, arguments, seed", [
    (pairs_of_their_own, (3, 1), 4), (pairs_of_their_own, (5, 1), 4), (pairs_of_their_own, (3, 10), 4),
    (all_against_one, (), 5)])
def test_false_verdicts_are_as_rare_as_they_say(monkeypatch, make_pairs, arguments, seed):
    """Tables of equal arms whose seeds differ: in one of twenty tables some arm may look different."""
    monkeypatch.setattr(statistics, "of_seeds", of_few_seeds)
    rng = np.random.default_rng(seed)
    false = 0
    for _ in range(100):
        false += any(d.verdict != "undecided" for d in differences(make_pairs(rng, *arguments), 4))
    assert false / 100 <= 0.10


def test_draws_of_images_are_shares():
    draws = drawn_images(30)
    assert np.allclose(draws.sum(1), 1) and (draws >= 0).all()
    assert draws.mean(0) == pytest.approx(1 / 30, rel=0.05)
