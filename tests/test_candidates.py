"""Draws from candidates and a uniform sample: unbiased, masked, exact where nothing is missed."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corrector_jax.models.corrector import Linear, Mlp
from corrector_jax.negatives import BestCandidates, Candidates, Gated, Joined, Mined, Stale
from corrector_jax.sharding import make_placement
from corrector_jax.types import Batch
from tests import oracle

N, DIM, BETA, TAIL, DRAWS = 203, 8, 12.0, 24, 16
QUERIES, COPIES = 4, 64
ALPHA = 1e-6


@functools.cache
def problem():
    """Queries, rows, known positives, and candidates with copies, pads and known ones in them."""
    rng = np.random.default_rng(3)
    queries, rows = oracle.unit(rng, QUERIES, DIM), oracle.unit(rng, N, DIM)
    best = np.argsort(-(queries @ rows.T), axis=1)
    known = np.full((QUERIES, 5), -1, np.int32)
    known[0, :2] = best[0, 0], best[0, 150]  # one among the candidates, one not
    known[1, :5] = best[1, 30:35]
    candidates = best[:, :12].astype(np.int32)
    candidates[1, 3:6] = candidates[1, 2]  # copies
    candidates[2, 4:] = -1
    candidates[3] = -1  # nothing was found
    return queries, rows, known, candidates


def given(known, candidates) -> Batch:
    known = np.asarray(known, np.int32)
    tokens, all_of_them = np.zeros((len(known), 1), np.int32), np.ones(len(known), bool)
    return Batch(tokens, known[:, 0], known, all_of_them, candidates=candidates)


def psi_of(corrector):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda key: corrector.init(key, DIM), jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)
    return Gated(params, jnp.float32(1.0))


@functools.cache
def drawing(corrector, devices=1, tail=TAIL, draws=DRAWS, tile_rows=40):
    place = make_placement(devices)
    proposal = Candidates(draws, BETA, corrector, tail, N, tile_rows, place)
    cache = oracle.filled(problem()[1], place, block_rows=4)
    cache = oracle.with_lengths(cache, corrector, psi_of(corrector), place)
    return proposal, cache, oracle.jit(proposal.draw, heavy=True)


def drawn(corrector, known, candidates, seed=0, queries=None, **options):
    _, cache, step = drawing(corrector, **options)
    queries = problem()[0] if queries is None else queries
    batch = given(known, candidates)
    return jax.device_get(step(queries, psi_of(corrector), cache, batch, jax.random.key(seed)))


def dense(corrector):
    """Corrected logits [B, N]: the oracle's, not those of the proposal."""
    queries, rows, known, _ = problem()
    psi = psi_of(corrector)
    return oracle.proposal(queries, corrector.apply(psi.params, rows, 1.0), known, BETA)


def tail_rows(key_seed: int) -> np.ndarray:
    """The uniform sample that a key gives: [M]."""
    key = jax.random.split(jax.random.key(key_seed))[0]
    return np.asarray(jax.random.randint(key, (TAIL,), 0, N))


def weights(logits, known, candidates, tail) -> np.ndarray:
    """METHOD's Z_hat, target by target: [B, N] weights whose sum is the estimate."""
    found = np.zeros(logits.shape)
    for query, heads in enumerate(candidates):
        heads = set(heads[heads >= 0].tolist())
        banned = set(known[query].tolist())
        for y in heads - banned:
            found[query, y] = np.exp(logits[query, y])
        for y in tail.tolist():
            if y not in heads and y not in banned:
                found[query, y] += N / TAIL * np.exp(logits[query, y])
    return found


@pytest.mark.parametrize("corrector", [Linear(), Mlp()], ids=str)
def test_the_estimate_and_its_parts_are_those_of_the_formula(corrector):
    _, _, known, candidates = problem()
    logits = dense(corrector)[0]
    for seed in range(3):
        found = drawn(corrector, known, candidates, seed)
        expected = weights(logits, known, candidates, tail_rows(seed))
        np.testing.assert_allclose(found.log_z, np.log(expected.sum(axis=1)), atol=2e-5)
        np.testing.assert_allclose(
            found.log_prob,
            np.take_along_axis(logits, found.ids, axis=1) - found.log_z[:, None],
            atol=2e-5,
        )
        outside = expected.copy()
        for query, heads in enumerate(candidates):
            outside[query, heads[heads >= 0]] = 0
        share = outside.sum(axis=1) / expected.sum(axis=1)
        np.testing.assert_allclose(found.tail.share, share, atol=2e-5)
        assert found.valid.all()


def test_draws_follow_the_weights_of_candidates_and_sample():
    queries, _, known, candidates = problem()
    logits = dense(Linear())[0]
    many = (np.tile(x, (COPIES, 1)) for x in (known, candidates, queries))
    known_many, candidates_many, queries_many = many
    for seed in range(5):
        found = drawn(Linear(), known_many, candidates_many, seed, queries=queries_many)
        expected = weights(logits, known, candidates, tail_rows(seed))
        for query in range(QUERIES):
            counts = np.bincount(found.ids[query::QUERIES].ravel(), minlength=N)
            p = expected[query] / expected[query].sum()
            assert not counts[p == 0].any()
            assert oracle.chi_square(counts, p) > ALPHA


@functools.cache
def over_keys():
    _, _, known, candidates = problem()
    return [drawn(Linear(), known, candidates, seed) for seed in range(500)]


def test_the_estimate_is_unbiased_over_keys():
    log_z = dense(Linear())[1]
    ratios = np.stack([np.exp(found.log_z - log_z) for found in over_keys()])
    error = ratios.std(axis=0) / np.sqrt(len(ratios))
    assert (np.abs(ratios.mean(axis=0) - 1) < 4 * error).all()
    assert (error < 0.07).all()  # the test would notice a bias


def test_the_spread_that_is_logged_is_the_spread_of_the_estimate():
    z = np.exp(np.stack([found.log_z for found in over_keys()]))
    said = np.stack([found.tail.spread * np.exp(found.log_z) for found in over_keys()])
    ratio = np.sqrt((said**2).mean(axis=0)) / z.std(axis=0)
    np.testing.assert_allclose(ratio, 1.0, atol=0.25)


@pytest.mark.parametrize(("corrector", "tail"), [(Linear(), 1), (Mlp(), TAIL)], ids=str)
def test_it_is_the_softmax_over_all_targets_where_every_target_is_a_candidate(corrector, tail):
    _, _, known, _ = problem()
    everything = np.tile(np.random.default_rng(0).permutation(N).astype(np.int32), (QUERIES, 1))
    _, log_z, log_prob = dense(corrector)
    found = drawn(corrector, known, everything, tail=tail)
    np.testing.assert_allclose(found.log_z, log_z, atol=2e-5)
    np.testing.assert_allclose(
        found.log_prob, np.take_along_axis(log_prob, found.ids, axis=1), atol=2e-5
    )
    assert not found.tail.share.any()
    assert not found.tail.spread.any()


def test_eight_devices_that_hold_few_rows_at_once_draw_what_one_does():
    _, _, known, candidates = problem()
    one = drawn(Mlp(), known, candidates)
    eight = drawn(Mlp(), known, candidates, devices=8, tile_rows=3)
    np.testing.assert_array_equal(one.ids, eight.ids)
    np.testing.assert_allclose(one.log_prob, eight.log_prob, atol=1e-5)


def test_a_query_with_nothing_left_draws_nothing():
    _, _, known, candidates = problem()
    everything = np.full((QUERIES, N), -1, np.int32)
    everything[:, :5] = known
    everything[2] = np.arange(N)
    found = drawn(Linear(), everything, candidates)
    assert found.log_z[2] == -np.inf
    assert not found.valid[2].any()
    assert not found.ids[2].any()
    assert not found.log_prob[2].any()
    assert found.valid[[0, 1, 3]].all()


def test_a_shared_pool_is_weighed_by_the_same_probabilities():
    queries, rows, known, candidates = problem()
    proposal, cache, _ = drawing(Linear())
    found = drawn(Linear(), known, candidates)
    pool = np.array([3, 100, 202, 7])
    given_to_each = oracle.jit(proposal.log_prob)(
        queries, psi_of(Linear()), Stale(rows[pool], np.asarray(cache.lengths)[pool]), found
    )  # fmt: skip
    expected = dense(Linear())[0][:, pool] - found.log_z[:, None]
    np.testing.assert_allclose(given_to_each, expected, atol=2e-5)


def test_joined_with_mined_negatives_the_sample_is_still_reported():
    queries, _, known, candidates = problem()
    alone = drawn(Linear(), known, candidates)
    batch = given(known, candidates)._replace(mined=np.full((QUERIES, 2), 9, np.int32))
    joined = Joined(SimpleNamespace(draw=lambda *_: alone), Mined(2))
    found = joined.draw(queries, psi_of(Linear()), None, batch, jax.random.key(0))
    assert found.ids.shape == (QUERIES, DRAWS + 2)
    assert found.tail is alone.tail


def test_candidates_and_a_cache_are_needed():
    queries, _, known, candidates = problem()
    proposal, cache, _ = drawing(Linear())
    psi, key = psi_of(Linear()), jax.random.key(0)
    with pytest.raises(ValueError, match="candidates"):
        proposal.draw(queries, psi, cache, given(known, None), key)
    with pytest.raises(ValueError, match="cache"):
        proposal.draw(queries, psi, None, given(known, candidates), key)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_best_candidates_are_distinct_and_in_order(devices):
    """No sample: known positives, copies and what is not there are left out."""
    queries, rows, known, candidates = problem()
    corrector, place = Mlp(), make_placement(devices)
    proposal = BestCandidates(5, BETA, corrector, tile_rows=40, place=place)
    cache = oracle.filled(rows, place, block_rows=4)
    found = jax.device_get(
        oracle.jit(proposal.draw)(
            queries, psi_of(corrector), cache, given(known, candidates), jax.random.key(0)
        )
    )
    logits = dense(corrector)[0]
    for query, heads in enumerate(candidates):
        able = set(heads[heads >= 0].tolist()) - set(known[query].tolist())
        wanted = sorted(able, key=lambda y: -logits[query, y])[:5]
        assert found.ids[query][found.valid[query]].tolist() == wanted
        assert found.valid[query].sum() == len(wanted)
        if wanted:
            z = oracle.log_sum_exp(logits[query, sorted(able)])
            np.testing.assert_allclose(found.log_z[query], z, atol=2e-5)
            np.testing.assert_allclose(
                found.log_prob[query, : len(wanted)], logits[query, wanted] - z, atol=5e-5
            )
    assert found.valid.sum(axis=1).tolist()[2:] == [4, 0]
    assert np.isfinite(found.log_prob).all()
