import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rl.advantage import TermWeight, advantages, best_and_worst, normalise, permuted

FLOOR = 0.01
groups = arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 9)),
                elements=st.integers(0, 1000).map(lambda n: n / 1000))  # fmt: skip
seeds = st.integers(0, 2**31)
thorough = settings(max_examples=100, deadline=None, derandomize=True)


@thorough
@given(groups, st.floats(-5, 5), st.floats(0.5, 20))
def test_neither_the_zero_nor_the_unit_of_a_score_matters(scores, offset, scale):
    a = normalise(scores, FLOOR)
    np.testing.assert_allclose(normalise(scores + offset, FLOOR), a, atol=1e-9)
    np.testing.assert_allclose(normalise(scores * scale, FLOOR * scale), a, atol=1e-9)


@thorough
@given(groups)
def test_members_are_compared_with_their_own_group_alone(scores):
    a = normalise(scores, FLOOR)
    assert np.abs(a.sum(-1)).max() < 1e-6 and np.abs(a.std(-1)).max() <= 1 + 1e-9
    for i, row in enumerate(scores):
        np.testing.assert_array_equal(normalise(row, FLOOR), a[i])
    np.testing.assert_array_equal(normalise(scores[None, ::-1], FLOOR)[0, ::-1], a)


@thorough
@given(groups, seeds)
def test_the_order_of_the_members_does_not_matter(scores, seed):
    order = np.random.default_rng(seed).permutation(scores.shape[-1])
    np.testing.assert_allclose(normalise(scores[..., order], FLOOR), normalise(scores, FLOOR)[..., order], atol=1e-9)


@thorough
@given(groups, st.data())
def test_a_missing_score_changes_nobody_elses_advantage(scores, data):
    size = scores.shape[-1]
    gone = data.draw(st.sets(st.integers(0, size - 1), min_size=1))
    kept = [i for i in range(size) if i not in gone]
    for nothing in (np.nan, np.inf, -np.inf):
        masked = scores.copy()
        masked[..., list(gone)] = nothing
        a = normalise(masked, FLOOR)
        assert not a[..., list(gone)].any()
        if kept:
            np.testing.assert_allclose(a[..., kept], normalise(scores[..., kept], FLOOR), atol=1e-9)


def test_a_score_of_zero_is_not_a_missing_score():
    scores = np.array([0.5, 0.6, 0.7, 0.0])
    assert np.abs(normalise(scores, FLOOR)[:3] - normalise(np.array([0.5, 0.6, 0.7]), FLOOR)).min() > 0.1


@thorough
@given(st.floats(-1e6, 1e6), st.integers(1, 9), st.integers(0, 3))
def test_a_group_without_spread_gets_exactly_zero(score, size, missing):
    scores = np.append(np.full(size, score), np.full(missing, np.nan))
    assert not normalise(scores, FLOOR).any()


def test_a_single_score_and_no_score_get_exactly_zero():
    assert not normalise(np.array([np.nan, 0.7, np.nan]), FLOOR).any()
    assert not normalise(np.full((2, 4), np.nan), FLOOR).any()
    assert normalise(np.array([np.nan, 0.7, 0.6]), FLOOR).any()


def test_a_spread_below_the_floor_counts_for_less():
    np.testing.assert_allclose(normalise(np.array([0.0, 2.0]), FLOOR), [-1, 1])
    np.testing.assert_allclose(normalise(np.array([0.0, 0.002]), FLOOR), [-0.1, 0.1])


@thorough
@given(groups, seeds)
def test_terms_are_normalised_before_they_are_added(scores, seed):
    other = np.random.default_rng(seed).random(scores.shape)
    terms = {"a": TermWeight(1.0, FLOOR), "b": TermWeight(0.5, 0.02)}
    total = advantages({"a": scores, "b": other, "unused": other}, terms, clip=5.0)
    expected = np.clip(normalise(scores, FLOOR) + 0.5 * normalise(other, 0.02), -5, 5)
    assert total.dtype == np.float32
    np.testing.assert_allclose(total, expected, atol=1e-6)
    terms["a"] = TermWeight(1.0, 100 * FLOOR)
    np.testing.assert_allclose(advantages({"a": 100 * scores, "b": other}, terms, clip=5.0), total, atol=1e-5)


@thorough
@given(groups, st.integers(1, 4))
def test_the_number_of_workers_that_scored_does_not_matter(scores, workers):
    terms = {"a": TermWeight(1.0, FLOOR)}
    parts = [advantages({"a": part}, terms, 5.0) for part in np.array_split(scores, workers) if len(part)]
    np.testing.assert_array_equal(np.concatenate(parts), advantages({"a": scores}, terms, 5.0))


def test_advantages_are_clipped():
    outlier = np.append(np.zeros(99), 1.0)
    assert normalise(outlier, FLOOR).max() > 9
    assert advantages({"a": outlier}, {"a": TermWeight(1.0, FLOOR)}, clip=5.0).max() == 5
    assert advantages({"a": -outlier}, {"a": TermWeight(1.0, FLOOR)}, clip=5.0).min() == -5


def test_a_term_that_nobody_scored_is_named():
    with pytest.raises(KeyError, match="quality"):
        advantages({"trajectory": np.zeros(4)}, {"quality": TermWeight(1.0, FLOOR)}, 5.0)


@thorough
@given(groups, seeds)
def test_permuted_advantages_stay_in_their_group(scores, seed):
    shuffled = permuted(scores, seed)
    np.testing.assert_array_equal(np.sort(shuffled, -1), np.sort(scores, -1))
    np.testing.assert_array_equal(shuffled, permuted(scores, seed))


def test_permuted_advantages_go_to_other_members():
    scores = np.arange(16.0).reshape(2, 8)
    assert (permuted(scores, 0) != scores).mean() > 0.5
    assert (permuted(scores, 0) != permuted(scores, 1)).any()


TWO = np.array([[0.0, 1.0, 2.0], [5.0, 5.1, 5.2]])


def test_the_spread_that_a_group_is_divided_by_is_its_own_the_batches_or_none():
    centred = TWO - TWO.mean(-1, keepdims=True)
    np.testing.assert_allclose(normalise(TWO, FLOOR, "group"), centred / TWO.std(-1, keepdims=True))
    np.testing.assert_allclose(normalise(TWO, FLOOR, "batch"), centred / TWO.std())
    np.testing.assert_allclose(normalise(TWO, FLOOR, "none"), centred)
    np.testing.assert_allclose(normalise(TWO, 4.0, "batch"), centred / 4)
    hidden = np.append(TWO, [[np.nan] * 3], 0)
    for std in ("group", "batch", "none"):
        np.testing.assert_array_equal(normalise(hidden, FLOOR, std)[:2], normalise(TWO, FLOOR, std))


def test_of_a_batch_the_group_that_hardly_differs_counts_for_less():
    lengths = {std: np.abs(normalise(TWO, FLOOR, std)).max(-1) for std in ("group", "batch", "none")}
    assert lengths["group"][0] == pytest.approx(lengths["group"][1])
    for std in ("batch", "none"):
        assert lengths[std][0] == pytest.approx(10 * lengths[std][1])


def test_the_best_and_the_worst_learn_as_a_smaller_group_would():
    advantage = np.float32([[0.3, -2, 1, 0.2, -0.5, 1], [0, 0, 0, 0, 0, 0]])
    kept = best_and_worst(advantage, 1)
    assert kept.dtype == np.float32
    np.testing.assert_array_equal(kept, [[0, -6, 0, 0, 0, 3], [0] * 6])
    np.testing.assert_array_equal(best_and_worst(advantage, 2), np.float32([[0, -3, 1.5, 0, -0.75, 1.5], [0] * 6]))
    np.testing.assert_array_equal(best_and_worst(advantage, 3), advantage)


@thorough
@given(groups.filter(lambda scores: scores.shape[-1] >= 4), seeds)
def test_who_is_best_and_worst_does_not_depend_on_the_order(scores, seed):
    advantage = normalise(scores + 1e-6 * np.arange(scores.shape[-1]), FLOOR)  # without ties
    order = np.random.default_rng(seed).permutation(scores.shape[-1])
    kept = best_and_worst(advantage, 2)
    np.testing.assert_array_equal(best_and_worst(advantage[..., order], 2), kept[..., order])
    assert ((kept != 0).sum(-1) <= 4).all() and (kept.max(-1) >= advantage.max(-1)).all()
