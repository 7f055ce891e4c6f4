"""Metrics are sums that merge in any order."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corrector_jax.metrics import Divergence, mean, means, relative_error
from tests import oracle

QUERIES, N, WIDTH = 5, 200, 16


@oracle.jit
def over_blocks(parts):
    """(scores, other [blocks, Q, n], valid [blocks, n]) merged block by block."""

    def add(total, part):
        return total.merge(Divergence.of(*part)), None

    return jax.lax.scan(add, Divergence.empty(QUERIES), parts)[0]


def in_blocks(scores, other, order, rng):
    """Targets in this order, cut into blocks at random places; what fills a block is not valid."""
    parts = []
    while len(order):
        take, order = np.split(order, [rng.integers(0, WIDTH)])
        fill = np.full(WIDTH, np.float32(300))
        x, y = (
            np.concatenate([s[:, take], np.tile(fill, (QUERIES, 1))], axis=1)[:, :WIDTH]
            for s in (scores, other)
        )
        parts.append((x, y, np.arange(WIDTH) < len(take)))
    empty = (np.zeros((QUERIES, WIDTH), np.float32),) * 2 + (np.zeros(WIDTH, bool),)
    parts += [empty] * (60 - len(parts))
    return tuple(np.stack(x) for x in zip(*parts, strict=True))


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_divergence_merged_over_random_blocks_in_any_order_is_the_dense_one(scale):
    rng = np.random.default_rng(0)
    scores = rng.normal(0, scale, (QUERIES, N)).astype(np.float32)
    other = (scores + rng.normal(0, 1, scores.shape)).astype(np.float32)
    wanted = oracle.kl(scores, other)
    for _ in range(3):
        total = over_blocks(in_blocks(scores, other, rng.permutation(N), rng))
        np.testing.assert_allclose(total.kl(), wanted, atol=1e-4)
        np.testing.assert_allclose(total.log_z, oracle.log_sum_exp(oracle.f64(scores)), rtol=1e-5)
    assert wanted.mean() > 0.05


def test_merging_is_the_same_from_either_side_and_with_nothing():
    rng = np.random.default_rng(1)
    blocks = rng.normal(0, 5, (2, 2, QUERIES, 7)).astype(np.float32)
    a, b = (Divergence.of(*block, jnp.ones(7, bool)) for block in blocks)
    empty = Divergence.empty(QUERIES)
    for left, right in ((a.merge(b), b.merge(a)), (a.merge(empty), a), (empty.merge(a), a)):
        for x, y in zip(left, right, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5)
    assert not np.isnan(empty.merge(empty).gap).any()


def test_divergence_of_equal_softmaxes_is_zero_and_a_shift_does_not_count():
    rng = np.random.default_rng(2)
    scores = rng.normal(0, 5, (QUERIES, 9)).astype(np.float32)
    there = jnp.ones(9, bool)
    np.testing.assert_allclose(Divergence.of(scores, scores, there).kl(), 0, atol=1e-5)
    np.testing.assert_allclose(Divergence.of(scores, scores + 50, there).kl(), 0, atol=1e-4)


def test_relative_error_is_a_ratio_of_sums():
    rng = np.random.default_rng(3)
    estimate, fresh = rng.normal(size=(2, 9, 5)).astype(np.float32)
    weight = np.array([1, 0, 1, 1, 0, 1, 1, 1, 1], np.float32)
    there = weight > 0
    wanted = ((estimate - fresh) ** 2)[there].sum() / (fresh**2)[there].sum()
    found = means({"error": relative_error(estimate, fresh, weight)})["error"]
    assert found == pytest.approx(wanted, rel=1e-5)
    # Sums of parts are the sum of the whole, which means of ratios would not be.
    parts = [relative_error(estimate[s], fresh[s], weight[s]) for s in (slice(4), slice(4, 9))]
    total, count = (sum(x) for x in zip(*parts, strict=True))
    assert total / count == pytest.approx(wanted, rel=1e-5)


def test_mean_ignores_what_has_no_weight():
    values = jnp.array([1.0, jnp.nan, 3.0])
    weight = jnp.array([True, False, True])
    assert means({"a": mean(values, weight), "b": mean(values[:1])}) == {"a": 2.0, "b": 1.0}
    assert means({"a": mean(values, jnp.array([3.0, 0.0, 1.0]))}) == {"a": 1.5}


def test_a_mean_of_nothing_is_not_a_number():
    assert math.isnan(means({"a": mean(jnp.ones(2), jnp.zeros(2))})["a"])
