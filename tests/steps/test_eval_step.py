"""Exact search and exact divergences, over blocks that arrive in any order."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from corrector_jax import losses
from corrector_jax.metrics import means
from corrector_jax.models.corrector import Mlp
from corrector_jax.negatives import Gated
from corrector_jax.sharding import make_placement
from corrector_jax.steps.eval_step import (
    Best,
    Gap,
    Softmax,
    gap_step,
    search_step,
    softmax_step,
)
from tests import oracle

SIZE, DIM, QUERIES, BLOCK = 71, 8, 5, 16
MESHES = pytest.mark.parametrize("devices", [1, 8])


def blocks(order, rng):
    """Ids in this order, in blocks that are not full, with the empty places anywhere."""
    found = []
    while len(order):
        take, order = np.split(order, [rng.integers(0, BLOCK + 1)])
        ids = np.full(BLOCK, -1, np.int32)
        ids[rng.permutation(BLOCK)[: len(take)]] = take
        found.append(ids)
    return [*found, np.full(BLOCK, -1, np.int32)]


@functools.cache
def world():
    rng = np.random.default_rng(0)
    stale = oracle.unit(rng, SIZE, DIM)
    fresh = (stale + 0.3 * rng.normal(size=stale.shape)).astype(np.float32)
    return stale, fresh, oracle.unit(rng, QUERIES, DIM)


search = oracle.jit(search_step)


@pytest.mark.parametrize("k", [1, 10, SIZE, 100])
def test_search_is_exact_in_any_order_of_blocks(k):
    _, fresh, queries = world()
    scores = oracle.f64(queries) @ oracle.f64(fresh).T
    wanted = np.argsort(-scores, axis=1)[:, :k]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        best = Best.empty(QUERIES, k)
        for ids in blocks(rng.permutation(SIZE), rng):
            # What stands in an empty place would win if it were looked at.
            rows = np.where(ids[:, None] >= 0, fresh[ids.clip(0)], 100 * queries[:1])
            best = search(best, queries, rows, ids)
        found = min(k, SIZE)
        assert best.ids.shape == best.scores.shape == (QUERIES, k)
        assert np.array_equal(best.ids[:, :found], wanted)
        np.testing.assert_allclose(
            best.scores[:, :found], np.take_along_axis(scores, wanted, axis=1), atol=1e-6
        )
        assert (np.asarray(best.ids)[:, found:] == -1).all()
        assert (np.asarray(best.scores)[:, found:] == -np.inf).all()


def test_scores_below_zero_are_results_too():
    rows = -np.abs(np.random.default_rng(0).normal(size=(BLOCK, DIM))).astype(np.float32)
    ids = np.where(np.arange(BLOCK) < 3, np.arange(BLOCK), -1).astype(np.int32)
    best = search(Best.empty(1, 4), np.ones((1, DIM), np.float32), rows, ids)
    assert set(best.ids[0, :3].tolist()) == {0, 1, 2}
    assert best.ids[0, 3] == -1


def test_the_loss_is_exact_over_all_targets_in_any_order():
    _, fresh, queries = world()
    known = np.array([[3, -1, -1], [70, 0, 9], [5, 5, -1], [8, 1, -1], [-1, -1, -1]], np.int32)
    beta = 12.0
    step = oracle.jit(functools.partial(softmax_step, beta=beta))
    rng = np.random.default_rng(2)
    seen = Softmax.empty(QUERIES, known.shape[1])
    assert not np.asarray(seen.loss()).any()
    for ids in blocks(rng.permutation(SIZE), rng):
        rows = np.where(ids[:, None] >= 0, fresh[ids.clip(0)], np.float32(9))
        seen = step(seen, queries, known, rows, ids)
    scores = beta * oracle.f64(queries) @ oracle.f64(fresh).T
    mask = oracle.is_known(known, SIZE)
    wanted = []
    for query, rows in enumerate(known):
        others = np.exp(scores[query][~mask[query]]).sum()
        positive = scores[query][rows[rows >= 0]]
        each = np.log(np.exp(positive) + others) - positive
        wanted.append(each.mean() if len(each) else 0.0)
    np.testing.assert_allclose(seen.loss(), wanted, rtol=1e-5)
    # The reference of every estimator says the same.
    dense = losses.dense(
        jnp.asarray(scores[:1, 3], jnp.float32),
        jnp.asarray(scores[:1], jnp.float32),
        jnp.asarray(mask[:1]),
    )
    np.testing.assert_allclose(seen.loss()[:1], dense, rtol=1e-5)


@MESHES
@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_the_gap_is_exact_over_all_targets_in_any_order(devices, gate):
    stale, fresh, queries = world()
    place, beta = make_placement(devices), 12.0
    rng = np.random.default_rng(1)
    psi = Gated(
        {
            "inner": {"kernel": jnp.asarray(rng.normal(size=(DIM, DIM)), jnp.float32),
                      "bias": jnp.zeros(DIM)},
            "outer": {"kernel": jnp.asarray(0.3 * rng.normal(size=(DIM, DIM)), jnp.float32),
                      "bias": jnp.zeros(DIM)},
        },
        jnp.float32(gate),
    )  # fmt: skip
    cache = oracle.filled(stale, place, block_rows=4)
    step = compiled(devices, beta)
    gap = Gap.empty(QUERIES)
    for ids in blocks(rng.permutation(SIZE), rng):
        rows = np.where(ids[:, None] >= 0, fresh[ids.clip(0)], np.float32(9))
        gap = step(gap, queries, rows, ids, cache, psi)
    corrected = oracle.f64(Mlp().apply(psi.params, jnp.asarray(stale), gate))
    scores = beta * oracle.f64(queries) @ oracle.f64(fresh).T
    measured = means({"drift": gap.drift, "error": gap.corrected_error})
    for found, error, rows in (
        (gap.stale, "drift", oracle.f64(stale)),
        (gap.corrected, "error", corrected),
    ):
        logits = beta * oracle.f64(queries) @ rows.T
        np.testing.assert_allclose(found.kl(), oracle.kl(scores, logits), rtol=1e-3, atol=1e-5)
        relative = ((rows - fresh) ** 2).sum() / (oracle.f64(fresh) ** 2).sum()
        assert measured[error] == pytest.approx(relative, rel=1e-4)
    same = np.array_equal(gap.stale.kl(), gap.corrected.kl())
    assert same == (gate == 0)


@functools.cache
def compiled(devices, beta):
    place = make_placement(devices)
    return oracle.jit(functools.partial(gap_step, beta=beta, corrector=Mlp(), place=place))
