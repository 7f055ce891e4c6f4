"""Task-loss estimators against the loss over all targets, and the drift losses.

Whether an estimator is unbiased is decided exactly, not by sampling: the problem is so small that
every outcome of the draws is visited and weighted with its probability.
"""

from __future__ import annotations

import doctest
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corrector_jax import losses
from corrector_jax.losses import ESTIMATORS, Pool
from corrector_jax.types import Draws
from tests import oracle

OWN = ["truncated", "single", "weighted"]
SHARED = ["truncated", "balanced"]
EVERY = [(name, False) for name in OWN] + [(name, True) for name in SHARED]
FORMS = pytest.mark.parametrize(("name", "shared"), EVERY)


def drawn_like(log_z, draws):
    """What the estimators read of the draws themselves: log Z and how many they are."""
    nothing = jnp.zeros((len(log_z), draws))
    return Draws(nothing.astype(int), nothing, nothing == 0, log_z)


@functools.partial(oracle.jit, static_argnums=(0, 4))
def evaluate(name, positive, pool, log_z, draws):
    """Losses [B], and the gradients of their sum in the fresh scores and in everything else."""

    def total(fresh, rest):
        positive, scores = fresh
        log_prob, log_z = rest
        drawn = drawn_like(log_z, draws)
        each = ESTIMATORS[name](positive, pool._replace(scores=scores, log_prob=log_prob), drawn)
        return each.sum(), each

    (of_fresh, of_rest), each = jax.grad(total, (0, 1), has_aux=True)(
        (positive, pool.scores), (pool.log_prob, log_z)
    )
    return each, of_fresh, of_rest


def example(shared, *, batch=3, draws=4, size=30, seed=0):
    """A pool as the step makes it: scores at random, log_prob a true softmax without K_i."""
    rng = np.random.default_rng(seed)
    known = rng.permutation(size)[: 2 * batch].reshape(batch, 2)
    logits = rng.normal(0, 2, (batch, size))
    scores = logits + rng.normal(0, 0.5, (batch, size))
    mask = oracle.is_known(known, size)
    masked = np.where(mask, -np.inf, logits)
    log_z = oracle.log_sum_exp(masked)
    log_prob = masked - log_z[:, None]
    ids = np.stack([rng.choice(size, draws, p=np.exp(p)) for p in log_prob])
    ids[:, 1] = ids[:, 0]  # a draw that came twice
    ids = ids.reshape(-1) if shared else ids
    at = np.broadcast_to(ids, (batch, ids.shape[-1]))
    own = [np.take_along_axis(x, at, axis=1) for x in (scores, log_prob, ~mask)]
    positive = scores[np.arange(batch), known[:, 0]]
    pool = Pool(ids.astype(np.int32), own[0].astype(np.float32), own[1].astype(np.float32), own[2])
    return positive.astype(np.float32), pool, log_z.astype(np.float32)


def by_definition(name, positive, pool, log_z, draws):
    """docs/method.md, 4, one query and one candidate at a time."""
    found = []
    for i, s_plus in enumerate(oracle.f64(positive)):
        ids = np.broadcast_to(pool.ids, pool.scores.shape)[i]
        there = [j for j in range(len(ids)) if pool.valid[i, j]]
        if name == "single":
            found.append(np.logaddexp(0, log_z[i] - s_plus) if there else 0.0)
            continue
        if name == "truncated":
            there = [j for n, j in enumerate(there) if ids[j] not in ids[there[:n]]]
        total = math.exp(s_plus)
        for j in there:
            p = oracle.f64(pool.log_prob)
            count = {
                "truncated": 1.0,
                "weighted": draws * math.exp(p[i, j]),
                "balanced": draws * np.exp(p[:, j]).sum(),
            }[name]
            total += math.exp(float(pool.scores[i, j])) / count
        found.append(math.log(total) - s_plus)
    return np.array(found)


def test_dense_is_section_1():
    rng = np.random.default_rng(0)
    scores, known = rng.normal(0, 3, (4, 50)).astype(np.float32), rng.random((4, 50)) < 0.1
    known[:, 7] = True
    known[3] = True
    found = losses.dense(scores[:, 7], scores, known)
    np.testing.assert_allclose(found, oracle.dense_loss(scores[:, 7], scores, known), atol=1e-5)
    assert found[3] == 0


@FORMS
def test_by_definition(name, shared):
    positive, pool, log_z = example(shared)
    each, _, _ = evaluate(name, positive, pool, log_z, 4)
    np.testing.assert_allclose(each, by_definition(name, positive, pool, log_z, 4), atol=1e-5)


@FORMS
def test_only_fresh_scores_carry_gradient(name, shared):
    positive, pool, log_z = example(shared)
    _, of_fresh, of_rest = evaluate(name, positive, pool, log_z, 4)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in of_fresh)
    assert not any(np.any(leaf) for leaf in of_rest)


@FORMS
def test_pulls_the_positive_up_and_candidates_down_by_the_same_amount(name, shared):
    """A loss of differences s_iy - s_i+: a shift common to all scores of a query does nothing."""
    positive, pool, log_z = example(shared)
    _, (of_positive, of_scores), _ = evaluate(name, positive, pool, log_z, 4)
    np.testing.assert_allclose(of_positive, -of_scores.sum(axis=1), atol=1e-6)
    assert (np.asarray(of_positive) < 0).all()
    assert (np.asarray(of_scores) >= 0).all()


@FORMS
def test_the_order_of_candidates_does_not_matter(name, shared):
    positive, pool, log_z = example(shared)
    each, (_, of_scores), _ = evaluate(name, positive, pool, log_z, 4)
    order = np.random.default_rng(1).permutation(pool.ids.shape[-1])
    shuffled = Pool(*(x[..., order] for x in pool))
    moved, (_, of_moved), _ = evaluate(name, positive, shuffled, log_z, 4)
    np.testing.assert_allclose(moved, each, atol=1e-6)
    if name != "truncated":  # which of two equal candidates stands for both is open there
        np.testing.assert_allclose(of_moved, of_scores[:, order], atol=1e-6)


@FORMS
def test_the_order_of_queries_does_not_matter(name, shared):
    positive, pool, log_z = example(shared)
    each, _, _ = evaluate(name, positive, pool, log_z, 4)
    order = np.array([2, 0, 1])
    moved = Pool(pool.ids if shared else pool.ids[order], *(x[order] for x in pool[1:]))
    found, _, _ = evaluate(name, positive[order], moved, log_z[order], 4)
    np.testing.assert_allclose(found, each[order], atol=1e-6)


@pytest.mark.parametrize("name", OWN)
def test_own_pools_are_queries_on_their_own(name):
    positive, pool, log_z = example(False)
    each, _, _ = evaluate(name, positive, pool, log_z, 4)
    for i in range(3):
        one, _, _ = evaluate(
            name, positive[i : i + 1], Pool(*(x[i : i + 1] for x in pool)), log_z[i : i + 1], 4
        )
        np.testing.assert_allclose(one[0], each[i], atol=1e-6)


@FORMS
def test_what_is_not_valid_does_not_count(name, shared):
    positive, pool, log_z = example(shared)
    each, _, _ = evaluate(name, positive, pool, log_z, 4)
    wide = [np.concatenate([x, x[..., :2]], axis=-1) for x in pool]
    wide[1][:, -2:] = np.float32(1e4)
    wide[2][:, -2:] = -np.inf
    wide[3][:, -2:] = False
    found, (_, of_scores), _ = evaluate(name, positive, Pool(*wide), log_z, 4)
    np.testing.assert_allclose(found, each, atol=1e-6)
    assert not np.any(of_scores[:, -2:])


@FORMS
def test_nothing_left_to_draw(name, shared):
    positive, pool, log_z = example(shared)
    valid, log_prob, log_z = pool.valid.copy(), pool.log_prob.copy(), log_z.copy()
    valid[1], log_prob[1], log_z[1] = False, -np.inf, -np.inf
    each, grads, rest = evaluate(
        name, positive, pool._replace(valid=valid, log_prob=log_prob), log_z, 4
    )
    assert all(np.isfinite(leaf).all() for leaf in (each, *grads, *rest))
    assert each[1] == 0
    assert not any(np.any(leaf[1]) for leaf in grads)
    nobody = pool._replace(valid=np.zeros_like(valid), log_prob=np.full_like(log_prob, -np.inf))
    each, grads, rest = evaluate(name, positive, nobody, np.full_like(log_z, -np.inf), 4)
    assert all(np.isfinite(leaf).all() for leaf in rest)
    assert not any(np.any(leaf) for leaf in (each, *grads))


@FORMS
@pytest.mark.parametrize("sign", [1, -1])
def test_far_ends_of_the_range(name, shared, sign):
    positive, pool, log_z = example(shared)
    up = np.float32(sign * 1e4)
    extreme = pool._replace(scores=pool.scores + up)
    each, grads, _ = evaluate(name, positive, extreme, log_z + up, 4)
    assert all(np.isfinite(leaf).all() for leaf in (each, *grads))
    assert (np.asarray(each) > 9e3).all() if sign > 0 else (np.asarray(each) < 1e-6).all()


@pytest.mark.parametrize("shared", [False, True])
def test_truncated_counts_a_duplicate_once(shared):
    positive, pool, log_z = example(shared)
    each, _, _ = evaluate("truncated", positive, pool, log_z, 4)
    twice = Pool(*(np.concatenate([x, x], axis=-1) for x in pool))
    again, _, _ = evaluate("truncated", positive, twice, log_z, 4)
    np.testing.assert_allclose(again, each, atol=1e-6)


# Every outcome of the draws. Two queries, six targets of which two are known to both queries (so
# four can be drawn), m draws each: a query's outcome is how often each of the four came.

SIZE, BETA = 6, 3.0
KNOWN = np.array([[0, 1], [1, 0]], np.int32)
DRAWN = np.arange(2, SIZE)


@functools.cache
def outcomes(draws):
    """Drawn rows of one query [O, m], logs of the multinomial coefficients [O], counts [O, 4]."""
    rows = np.array(list(itertools.combinations_with_replacement(DRAWN, draws)))
    counts = (rows[:, :, None] == DRAWN).sum(axis=1)
    lgamma = np.vectorize(math.lgamma)
    return rows, math.lgamma(draws + 1) - lgamma(counts + 1.0).sum(axis=1), counts


@functools.cache
def world():
    """Embeddings of queries and targets; the cache is fresh, so the proposal is exact."""
    rng = np.random.default_rng(0)
    return {"queries": oracle.unit(rng, 2, 3), "targets": oracle.unit(rng, SIZE, 3)}


@functools.partial(oracle.jit, static_argnums=(0, 1))
def over_outcomes(name, draws, params, log_prob, log_z, ids):
    """Per outcome [O, 2, m] of both queries' draws: the mean loss, its gradient, losses [O, 2]."""

    def loss(params, ids):
        shared = name == "balanced"
        logits = BETA * params["queries"] @ params["targets"].T
        if shared:
            pool_ids = ids.reshape(-1)
            scores, given = logits[:, pool_ids], log_prob[:, pool_ids]
        else:
            pool_ids = ids
            scores = jnp.take_along_axis(logits, ids, axis=1)
            given = jnp.take_along_axis(log_prob, ids, axis=1)
        pool = Pool(pool_ids, scores, given, jnp.ones_like(scores, bool))
        positive = logits[jnp.arange(2), KNOWN[:, 0]]
        each = ESTIMATORS[name](positive, pool, drawn_like(log_z, ids.shape[1]))
        return each.mean(), each

    grad = jax.value_and_grad(loss, has_aux=True)
    (_, each), grads = jax.lax.map(lambda ids: grad(params, ids), ids, batch_size=512)
    return each, grads


def expected(name, draws):
    """Over all outcomes: losses [O, 2], gradients, and the probability [O] of each outcome."""
    params = world()
    _, log_z, log_prob = oracle.proposal(params["queries"], params["targets"], KNOWN, BETA)
    rows, coefficient, counts = outcomes(draws)
    of_query = np.exp(coefficient[:, None] + counts @ log_prob[:, DRAWN].T)
    first, second = np.divmod(np.arange(len(rows) ** 2), len(rows))
    ids = np.stack([rows[first], rows[second]], axis=1).astype(np.int32)
    probability = of_query[first, 0] * of_query[second, 1]
    assert abs(probability.sum() - 1) < 1e-9
    each, grads = over_outcomes(
        name, draws, params, log_prob.astype(np.float32), log_z.astype(np.float32), ids
    )
    return oracle.f64(each), jax.tree.map(oracle.f64, grads), probability


def mean_gradient(name, draws):
    _, grads, probability = expected(name, draws)
    return jax.tree.map(lambda g: np.tensordot(probability, g, 1), grads)


def dense():
    params = world()
    return oracle.dense_gradient(params["queries"], params["targets"], KNOWN[:, 0], KNOWN, BETA)


def distance(a, b):
    """|a - b| / |b| over all leaves."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    gap = sum(((x - y) ** 2).sum() for x, y in pairs)
    return float(np.sqrt(gap / sum((y**2).sum() for _, y in pairs)))


def partitions(name, draws):
    """Z_hat_i^- of every outcome [O, 2], the true Z_i^- [2], and the outcomes' probabilities."""
    params = world()
    each, _, probability = expected(name, draws)
    logits, log_z, _ = oracle.proposal(params["queries"], params["targets"], KNOWN, BETA)
    positive = np.exp(logits[np.arange(2), KNOWN[:, 0]])
    return positive * (np.exp(each) - 1), np.exp(log_z), probability


@pytest.mark.parametrize("name", ["single", "weighted"])
@pytest.mark.parametrize("draws", [1, 3])
def test_the_expected_gradient_is_the_dense_one(name, draws):
    assert distance(mean_gradient(name, draws), dense()) < 1e-5


def test_weighted_is_single_draw_for_draw():
    single, of_single, _ = expected("single", 3)
    weighted, of_weighted, _ = expected("weighted", 3)
    np.testing.assert_allclose(weighted, single, atol=1e-5)
    for a, b in zip(jax.tree.leaves(of_weighted), jax.tree.leaves(of_single), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["weighted", "balanced"])
def test_the_expected_partition_function_is_the_true_one(name):
    found, wanted, probability = partitions(name, 3)
    np.testing.assert_allclose(probability @ found, wanted, rtol=1e-5)


def test_balanced_loses_its_bias_with_the_number_of_draws():
    bias = [distance(mean_gradient("balanced", draws), dense()) for draws in (1, 2, 4, 8)]
    assert bias[0] > 1e-3  # there is something to lose
    assert all(a > 1.7 * b for a, b in itertools.pairwise(bias)), bias


def test_balanced_varies_less_than_weighted_where_the_corrector_errs():
    """Its reason to be. Here the proposal is uniform over what may be drawn, so far from exact."""
    params = world()
    log_prob = np.where(oracle.is_known(KNOWN, SIZE), -np.inf, -np.log(4)).astype(np.float32)
    log_prob[1, 2:] = np.log([0.1, 0.2, 0.3, 0.4])
    rng = np.random.default_rng(0)
    ids = np.stack(
        [rng.choice(SIZE, (4000, 4), p=np.exp(oracle.f64(p)) / np.exp(oracle.f64(p)).sum())
         for p in log_prob], axis=1,
    ).astype(np.int32)  # fmt: skip
    spread = {}
    for name in ("weighted", "balanced"):
        _, grads = over_outcomes(name, 4, params, log_prob, np.zeros(2, np.float32), ids)
        spread[name] = sum(leaf.var(axis=0).sum() for leaf in jax.tree.leaves(grads))
    assert spread["balanced"] < 0.8 * spread["weighted"]


def test_truncated_reads_low():
    params = world()
    each, _, probability = expected("truncated", 3)
    logits = BETA * params["queries"] @ params["targets"].T
    wanted = oracle.dense_loss(
        logits[np.arange(2), KNOWN[:, 0]], logits, oracle.is_known(KNOWN, SIZE)
    )
    assert (each <= wanted + 1e-5).all()
    assert (probability @ each < wanted - 0.05).all()
    assert distance(mean_gradient("truncated", 3), dense()) > 0.05


# Drift losses and the masks they share.


def test_drift_mse_is_a_mean_over_rows_of_a_sum():
    rng = np.random.default_rng(0)
    estimate, fresh = rng.normal(size=(2, 9, 5)).astype(np.float32)
    weight = np.array([1, 1, 0, 1, 0, 1, 1, 1, 1], np.float32)
    square = ((estimate - fresh) ** 2).sum(axis=1)
    np.testing.assert_allclose(
        losses.drift_mse(estimate, fresh, weight), square[weight > 0].mean(), rtol=1e-6
    )
    assert losses.drift_mse(estimate, fresh, 0 * weight) == 0


def test_drift_kl_is_a_mean_over_queries():
    rng = np.random.default_rng(0)
    estimate, scores = rng.normal(0, 4, (2, 5, 11)).astype(np.float32)
    valid = rng.random((5, 11)) < 0.7
    valid[2] = False
    masked = [np.where(valid, x, -np.inf) for x in (scores, estimate)]
    wanted = oracle.kl(*(x[[0, 1, 3, 4]] for x in masked)).mean()
    value, (of_estimate, of_scores) = jax.value_and_grad(losses.drift_kl, (0, 1))(
        estimate, scores, valid
    )
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert not np.any(of_scores)
    assert not np.any(np.where(valid, 0, of_estimate))
    p, q = (np.exp(x - oracle.log_sum_exp(x)[:, None]) for x in (m[0:1] for m in masked))
    np.testing.assert_allclose(of_estimate[:1], (q - p) / 4, atol=1e-6)
    shifted = estimate + rng.normal(0, 9, (5, 1)).astype(np.float32)
    np.testing.assert_allclose(losses.drift_kl(shifted, scores, valid), wanted, rtol=1e-4)
    assert losses.drift_kl(estimate, scores, np.zeros_like(valid)) == 0


def test_drift_losses_are_for_the_corrector_alone():
    rng = np.random.default_rng(0)
    estimate, fresh = rng.normal(size=(2, 4, 3)).astype(np.float32)
    grads = jax.grad(losses.drift_mse, (0, 1))(estimate, fresh, jnp.ones(4))
    np.testing.assert_allclose(grads[0], 2 * (estimate - fresh) / 4, rtol=1e-5)
    assert not np.any(grads[1])


def test_is_known():
    known = np.array([[3, 5, -1], [-1, -1, 7]], np.int32)
    assert losses.is_known(np.array([7, 3, 0]), known).tolist() == [
        [False, True, False],
        [True, False, False],
    ]
    own = np.array([[5, 4], [5, 7]])
    assert losses.is_known(own, known).tolist() == [[True, False], [False, True]]


def test_first_occurrence():
    rng = np.random.default_rng(0)
    ids, valid = rng.integers(0, 5, (6, 12)), rng.random((6, 12)) < 0.7
    kept = np.asarray(losses.first_occurrence(jnp.asarray(ids), jnp.asarray(valid)))
    for row, there, keep in zip(ids, valid, kept, strict=True):
        first = [there[j] and row[j] not in row[:j][there[:j]] for j in range(12)]
        assert keep.tolist() == first


def test_examples_in_docstrings():
    found = doctest.testmod(losses)
    assert found.attempted
    assert not found.failed
