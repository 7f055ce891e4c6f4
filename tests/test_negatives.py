"""Proposals: draws follow the distribution they claim, and never hit a known positive."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corrector_jax.models.corrector import Identity, Linear, Mlp
from corrector_jax.negatives import Gated, InBatch, TwoLevel, Uniform
from corrector_jax.sharding import make_placement
from corrector_jax.types import Draws
from tests import oracle

N, DIM, BETA = 503, 8, 12.0
QUERIES, COPIES, DRAWS = 4, 64, 32
GATED = pytest.mark.parametrize(
    ("corrector", "gate"),
    [(Identity(), 1.0), (Linear(), 0.0), (Linear(), 1.0), (Mlp(), 0.0), (Mlp(), 1.0)],
    ids=str,
)
ALPHA = 1e-6


@functools.cache
def problem():
    """Four queries, each several times in the batch; rows, one of them often drawn; K_i."""
    rng = np.random.default_rng(0)
    queries, rows = oracle.unit(rng, QUERIES, DIM), oracle.unit(rng, N, DIM)
    best = (queries @ rows.T).argmax(axis=1)
    known = np.full((QUERIES, 20), -1, np.int32)
    known[0, :2] = best[0], 300  # what would be drawn most
    known[1, :20] = np.arange(160, 180)  # a whole block of 16, and more
    known[2, :1] = N - 1
    return queries, rows, known


def psi_of(corrector, gate):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda key: corrector.init(key, DIM), jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)
    return Gated(params, jnp.float32(gate))


@functools.cache
def two_level(corrector, devices=1):
    """The proposal, the cache, and the compiled draw with the corrector's rows h(C)."""
    place = make_placement(devices)
    proposal = TwoLevel(DRAWS, BETA, corrector, block_rows=16, tile_rows=256, place=place)
    cache = oracle.filled(problem()[1], place, block_rows=16)
    return proposal, cache, oracle.jit(proposal.draw, heavy=True)


def corrected_rows(corrector, psi):
    return corrector.apply(psi.params, jnp.asarray(problem()[1]), psi.gate)


@GATED
def test_two_level_draws_follow_the_corrected_softmax(corrector, gate):
    queries, _, known = problem()
    psi = psi_of(corrector, gate)
    _, log_z, log_prob = oracle.proposal(queries, corrected_rows(corrector, psi), known, BETA)
    _, cache, step = two_level(corrector)
    counts = np.zeros((QUERIES, N), int)
    batch, table = np.tile(queries, (COPIES, 1)), jnp.asarray(np.tile(known, (COPIES, 1)))
    for seed in range(13):
        drawn = jax.device_get(step(batch, psi, cache, table, jax.random.key(seed)))
        np.testing.assert_allclose(drawn.log_z, np.tile(log_z, COPIES), rtol=1e-5)
        for query in range(QUERIES):
            counts[query] += np.bincount(drawn.ids[query::QUERIES].ravel(), minlength=N)
    assert counts.sum() > 100_000
    assert not counts[oracle.is_known(known, N)].any()
    for query in range(QUERIES):
        assert oracle.chi_square(counts[query], np.exp(log_prob[query])) > ALPHA


def test_the_gate_and_the_parameters_matter():
    """Without this the test above could pass with a proposal that ignores them."""
    queries, rows, known = problem()
    stale = oracle.proposal(queries, rows, known, BETA)[1]
    for corrector in (Linear(), Mlp()):
        rows_h = corrected_rows(corrector, psi_of(corrector, 1.0))
        assert np.abs(oracle.proposal(queries, rows_h, known, BETA)[1] - stale).min() > 0.01


@GATED
def test_two_level_gives_every_query_the_log_probability_of_every_candidate(corrector, gate):
    queries, rows, known = problem()
    known = known.copy()
    psi = psi_of(corrector, gate)
    _, log_z, log_prob = oracle.proposal(queries, corrected_rows(corrector, psi), known, BETA)
    proposal, _, _ = two_level(corrector)
    valid = np.ones((QUERIES, DRAWS), bool)
    valid[3] = False  # nothing was left for it
    log_z = np.where(valid[:, 0], log_z, -np.inf).astype(np.float32)
    drawn = Draws(np.zeros((QUERIES, DRAWS), np.int32), jnp.zeros(valid.shape), valid, log_z)
    candidates = np.array([3, 400, 400, 41, 502])
    found = oracle.jit(proposal.log_prob)(queries, psi, rows[candidates], drawn)
    meets = ~oracle.is_known(known, N)[:3, candidates]  # what a known positive gets is not said
    np.testing.assert_allclose(
        np.asarray(found)[:3][meets], log_prob[:3][:, candidates][meets], atol=2e-5
    )
    assert (np.asarray(found)[3] == -np.inf).all()


def test_two_level_needs_a_cache():
    proposal, _, _ = two_level(Identity())
    queries, _, known = problem()
    with pytest.raises(ValueError, match="cache"):
        proposal.draw(queries, psi_of(Identity(), 1.0), None, known, jax.random.key(0))


UNIFORM_N = 23
UNIFORM_KNOWN = np.full((5, UNIFORM_N), -1, np.int32)
UNIFORM_KNOWN[1, :1] = 0
UNIFORM_KNOWN[2, :4] = 22, 0, 7, 6  # both ends, neighbours, unsorted
UNIFORM_KNOWN[3, 1:] = np.arange(1, UNIFORM_N)  # one left, behind a pad
UNIFORM_KNOWN[4] = np.arange(UNIFORM_N)[::-1]  # everything


@functools.cache
def uniform_draws():
    step = oracle.jit(Uniform(20_000, UNIFORM_N).draw)
    return jax.device_get(
        step(jnp.zeros((5, DIM)), Gated({}, 1.0), None, UNIFORM_KNOWN, jax.random.key(0))
    )


def test_uniform_draws_are_uniform_over_all_that_is_not_known():
    drawn = uniform_draws()
    for query in range(4):
        left = np.setdiff1d(np.arange(UNIFORM_N), UNIFORM_KNOWN[query])
        counts = np.bincount(drawn.ids[query], minlength=UNIFORM_N)
        assert counts[left].sum() == 20_000
        if len(left) > 1:
            p = np.isin(np.arange(UNIFORM_N), left) / len(left)
            assert oracle.chi_square(counts, p) > ALPHA
        np.testing.assert_allclose(drawn.log_prob[query], -np.log(len(left)), atol=1e-6)
    assert drawn.valid[:4].all()
    assert not drawn.log_z.any()
    meet = (drawn.ids[0] == drawn.ids[1]).mean()  # two queries do not share their draws
    assert abs(meet - 1 / UNIFORM_N) < 4 * np.sqrt(1 / UNIFORM_N / 20_000)


def test_uniform_with_everything_known():
    drawn = uniform_draws()
    assert not drawn.valid[4].any()
    assert not drawn.ids[4].any()
    assert not drawn.log_prob[4].any()


def test_uniform_log_probability_of_a_pool():
    drawn = uniform_draws()
    found = Uniform(20_000, UNIFORM_N).log_prob(jnp.zeros((5, DIM)), Gated({}, 1.0), None, drawn)
    assert found.shape == (5, 1)
    np.testing.assert_allclose(found[:4, 0], -np.log([23, 22, 19, 1]), atol=1e-6)
    assert found[4, 0] == -np.inf


def test_in_batch_draws_nothing():
    proposal, queries = InBatch(), jnp.zeros((3, DIM))
    drawn = proposal.draw(queries, Gated({}, 1.0), None, jnp.zeros((3, 1), int), jax.random.key(0))
    assert drawn.ids.shape == drawn.log_prob.shape == drawn.valid.shape == (3, 0)
    assert not drawn.log_z.any()
    assert not proposal.log_prob(queries, Gated({}, 1.0), None, drawn).any()
