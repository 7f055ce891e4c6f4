"""Proposals: draws follow the distribution they claim, and never hit a known positive."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corrector_jax import losses
from corrector_jax.losses import Pool
from corrector_jax.models.corrector import Identity, Linear, Mlp
from corrector_jax.negatives import (
    Gated,
    GumbelTopK,
    InBatch,
    Joined,
    Mined,
    Stale,
    TopK,
    TwoLevel,
    Uniform,
)
from corrector_jax.sharding import make_placement
from corrector_jax.types import Batch, Draws
from tests import oracle

N, DIM, BETA = 503, 8, 12.0
QUERIES, COPIES, DRAWS = 4, 64, 32
GATED = pytest.mark.parametrize(
    ("corrector", "gate"),
    [
        (Identity(), 1.0),
        (Linear(), 0.0),
        (Linear(), 1.0),
        (Mlp(), 0.0),
        (Mlp(), 1.0),
    ],
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


def given(known, mined=None):
    """A batch of which proposals read the known positives and the mined negatives."""
    known = np.asarray(known, np.int32)
    tokens, all_of_them = np.zeros((len(known), 1), np.int32), np.ones(len(known), bool)
    return Batch(tokens, known[:, 0], known, all_of_them, mined)


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
    proposal, cache, step = two_level(corrector)
    cache = oracle.with_lengths(cache, corrector, psi, proposal.place)
    counts = np.zeros((QUERIES, N), int)
    many, batch = np.tile(queries, (COPIES, 1)), given(np.tile(known, (COPIES, 1)))
    for seed in range(13):
        drawn = jax.device_get(step(many, psi, cache, batch, jax.random.key(seed)))
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
    cache = oracle.with_lengths(two_level(corrector)[1], corrector, psi, proposal.place)
    lengths = None if cache.lengths is None else np.asarray(cache.lengths)[candidates]
    stale = Stale(rows[candidates], lengths)
    found = oracle.jit(proposal.log_prob)(queries, psi, stale, drawn)
    meets = ~oracle.is_known(known, N)[:3, candidates]  # what a known positive gets is not said
    np.testing.assert_allclose(
        np.asarray(found)[:3][meets], log_prob[:3][:, candidates][meets], atol=2e-5
    )
    assert (np.asarray(found)[3] == -np.inf).all()


def test_lengths_of_an_older_corrector_give_exact_draws_of_their_own_softmax():
    """Between two measurements h divides by lengths of then: log Z and log p agree on that."""
    queries, rows, known = problem()
    psi, older = psi_of(Linear(), 1.0), psi_of(Linear(), 1.0)
    older = older._replace(params=jax.tree.map(lambda leaf: 0.8 * leaf, older.params))
    proposal, cache, step = two_level(Linear())
    cache = oracle.with_lengths(cache, Linear(), older, proposal.place)
    lengths = np.asarray(cache.lengths)
    moved = oracle.linear(psi.params, rows, normalize=False) / oracle.f64(lengths[:N, None])
    logits, log_z, _ = oracle.proposal(queries, moved, known, BETA)
    drawn = jax.device_get(step(queries, psi, cache, given(known), jax.random.key(0)))
    np.testing.assert_allclose(drawn.log_z, log_z, rtol=1e-5)
    expected = np.take_along_axis(logits, drawn.ids, axis=1) - log_z[:, None]
    np.testing.assert_allclose(drawn.log_prob, expected, atol=3e-5)
    stale = Stale(rows[drawn.ids[0]], lengths[drawn.ids[0]])
    pooled = oracle.jit(proposal.log_prob)(queries, psi, stale, drawn)
    np.testing.assert_allclose(np.asarray(pooled)[0], expected[0], atol=3e-5)


def test_two_level_needs_a_cache():
    proposal, _, _ = two_level(Identity())
    queries, _, known = problem()
    with pytest.raises(ValueError, match="cache"):
        proposal.draw(queries, psi_of(Identity(), 1.0), None, given(known), jax.random.key(0))


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
        step(jnp.zeros((5, DIM)), Gated({}, 1.0), None, given(UNIFORM_KNOWN), jax.random.key(0))
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
    drawn = proposal.draw(queries, Gated({}, 1.0), None, given(np.zeros((3, 1))), jax.random.key(0))
    assert drawn.ids.shape == drawn.log_prob.shape == drawn.valid.shape == (3, 0)
    assert not drawn.log_z.any()
    assert not proposal.log_prob(queries, Gated({}, 1.0), None, drawn).any()


MINED_KNOWN = [[4, -1], [9, 2], [7, -1]]
MINED = np.array([[1, 4, 6, -1], [9, 2, -1, -1], [3, 8, 0, 5]], np.int32)


def test_mined_negatives_are_those_of_the_batch_without_known_positives():
    proposal, queries = Mined(4), jnp.zeros((3, DIM))
    batch = given(MINED_KNOWN, MINED)
    drawn = proposal.draw(queries, Gated({}, 1.0), None, batch, jax.random.key(0))
    assert np.where(drawn.valid, drawn.ids, -1).tolist() == [
        [1, -1, 6, -1],
        [-1, -1, -1, -1],
        [3, 8, 0, 5],
    ]
    assert not drawn.ids[~np.asarray(drawn.valid)].any()


@pytest.mark.parametrize("mined", [None, MINED[:, :2]])
def test_mined_negatives_that_are_not_there_are_missed(mined):
    batch = given(MINED_KNOWN, mined)
    with pytest.raises(ValueError, match="4 a query"):
        Mined(4).draw(jnp.zeros((3, DIM)), Gated({}, 1.0), None, batch, jax.random.key(0))


def test_joined_draws_are_those_of_each_proposal():
    """The first with the key it would have alone: mined negatives change no draw."""
    psi, key, queries = Gated({}, 1.0), jax.random.key(3), jnp.zeros((3, DIM))
    batch = given(MINED_KNOWN, MINED)
    joined = Joined(Uniform(5, N), Mined(4))
    drawn = joined.draw(queries, psi, None, batch, key)
    one = Uniform(5, N).draw(queries, psi, None, batch, key)
    two = Mined(4).draw(queries, psi, None, batch, key)
    assert joined.draws == 9 == drawn.ids.shape[1]
    for name in ("ids", "valid", "log_prob"):
        whole = np.concatenate([getattr(one, name), getattr(two, name)], axis=1)
        assert np.array_equal(getattr(drawn, name), whole)
    assert (joined.reads_cache, joined.independent) == (False, 0)


@functools.cache
def top(kind, corrector, draws=3, devices=1):
    place = make_placement(devices)
    proposal = kind(draws, BETA, corrector, block_rows=16, tile_rows=64, place=place)
    cache = oracle.filled(problem()[1], place, block_rows=16)
    return cache, oracle.jit(proposal.draw, heavy=True)


@GATED
def test_top_k_is_a_sort_of_the_corrected_logits(corrector, gate):
    queries, _, known = problem()
    psi = psi_of(corrector, gate)
    cache, step = top(TopK, corrector, draws=20, devices=4)
    cache = oracle.with_lengths(cache, corrector, psi, make_placement(4))
    drawn = jax.device_get(step(queries, psi, cache, given(known), jax.random.key(0)))
    logits, log_z, log_prob = oracle.proposal(queries, corrected_rows(corrector, psi), known, BETA)
    order = np.argsort(-np.where(oracle.is_known(known, N), -np.inf, logits), axis=1)[:, :20]
    assert np.array_equal(drawn.ids, order)
    np.testing.assert_allclose(
        drawn.log_prob, np.take_along_axis(log_prob, order, axis=1), atol=3e-5
    )
    np.testing.assert_allclose(drawn.log_z, log_z, rtol=1e-5)
    assert drawn.kappa is None


@pytest.mark.parametrize(
    "corrector", [pytest.param(Identity(), marks=pytest.mark.slow), Mlp()], ids=str
)
def test_gumbel_top_k_draws_follow_the_softmax_without_replacement(corrector):
    """The first is a draw from P; the second, given the first, from P without it."""
    queries, _, known = problem()
    psi = psi_of(corrector, 1.0)
    _, _, log_prob = oracle.proposal(queries, corrected_rows(corrector, psi), known, BETA)
    cache, step = top(GumbelTopK, corrector)
    many, batch = np.tile(queries, (500, 1)), given(np.tile(known, (500, 1)))
    found = []
    for seed in range(40):
        drawn = jax.device_get(step(many, psi, cache, batch, jax.random.key(seed)))
        assert drawn.valid.all()
        found.append(drawn.ids.reshape(500, QUERIES, 3))
    ids = np.concatenate(found)
    assert (np.diff(np.sort(ids, axis=2), axis=2) > 0).all()
    for query in range(QUERIES):
        p = np.exp(log_prob[query])
        first, second = ids[:, query, 0], ids[:, query, 1]
        assert oracle.chi_square(np.bincount(first, minlength=N), p) > ALPHA
        # P(second = y) = p_y (sum over x of p_x / (1 - p_x) - p_y / (1 - p_y)), by Plackett-Luce.
        odds = p / (1 - p)
        assert oracle.chi_square(np.bincount(second, minlength=N), p * (odds.sum() - odds)) > ALPHA


def test_gumbel_top_k_is_the_same_on_every_mesh_and_changes_with_the_key():
    queries, _, known = problem()
    psi, found = psi_of(Mlp(), 1.0), []
    for devices in (1, 3, 8):
        cache, step = top(GumbelTopK, Mlp(), draws=12, devices=devices)
        found.append(jax.device_get(step(queries, psi, cache, given(known), jax.random.key(5))))
    other = step(queries, psi, cache, given(known), jax.random.key(6))
    for drawn in found[1:]:
        assert np.array_equal(drawn.ids, found[0].ids)
        np.testing.assert_allclose(drawn.kappa, found[0].kappa, atol=1e-4)
        np.testing.assert_allclose(drawn.log_prob, found[0].log_prob, atol=3e-5)
    assert (np.asarray(other.ids) != found[0].ids).mean() > 0.5


def test_kool_weights_make_the_partition_function_unbiased():
    """Mean over keys of the sum of exp(l) / c against Z, by its own standard error."""
    queries, rows, known = problem()
    logits, log_z, _ = oracle.proposal(queries, rows, known, BETA)
    cache, step = top(GumbelTopK, Identity(), draws=8)
    many, batch = np.tile(queries, (500, 1)), given(np.tile(known, (500, 1)))
    ratios = []
    for seed in range(20):
        drawn = jax.device_get(
            step(many, psi_of(Identity(), 1.0), cache, batch, jax.random.key(seed))
        )
        positive = jnp.zeros(len(many))
        at = np.take_along_axis(np.tile(logits, (500, 1)), drawn.ids, axis=1).astype(np.float32)
        pool = Pool(drawn.ids, at, drawn.log_prob, drawn.valid)
        loss = np.asarray(losses.kool(positive, pool, drawn), np.float64)  # log(1 + Z_hat)
        ratios.append((np.expm1(loss) / np.exp(np.tile(log_z, 500))).reshape(500, QUERIES))
    ratios = np.concatenate(ratios)
    error = ratios.std(axis=0) / np.sqrt(len(ratios))
    assert (error < 0.02).all()
    assert (np.abs(ratios.mean(axis=0) - 1) < 4 * error).all()


def test_gumbel_top_k_with_fewer_targets_than_draws():
    """All that is left is drawn, with kappa of -inf: nothing else could have been."""
    queries, _, known = problem()
    known = np.tile(np.arange(N, dtype=np.int32), (QUERIES, 1))
    known[0, 100:103] = -1
    known[1, 200:211] = -1
    cache, step = top(GumbelTopK, Identity(), draws=8, devices=3)
    drawn = jax.device_get(
        step(queries, psi_of(Identity(), 1.0), cache, given(known), jax.random.key(0))
    )
    assert drawn.valid.sum(axis=1).tolist() == [3, 8, 0, 0]
    assert sorted(drawn.ids[0, :3]) == [100, 101, 102]
    assert set(drawn.ids[1]) <= set(range(200, 211))
    assert drawn.kappa[0] == -np.inf
    assert drawn.kappa[1] > -np.inf
    assert not np.isnan(drawn.log_prob).any()
    assert drawn.log_z[2] == -np.inf
    pool = Pool(drawn.ids, np.zeros((QUERIES, 8), np.float32), drawn.log_prob, drawn.valid)
    loss = losses.kool(jnp.zeros(QUERIES), pool, drawn)
    np.testing.assert_allclose(loss[:1], np.log(1 + 3), rtol=1e-6)
    assert np.array_equal(loss[2:], [0, 0])
