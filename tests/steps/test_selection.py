"""What the steps share: drawing and encoding, pools, the drift loss, the corrector's update."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from corrector_jax import losses
from corrector_jax.metrics import means
from corrector_jax.models.corrector import Mlp
from corrector_jax.negatives import Gated, InBatch, TwoLevel
from corrector_jax.optimizer import corrector_optimizer
from corrector_jax.sharding import make_placement
from corrector_jax.state import Pairs, init_corrector
from corrector_jax.steps import selection
from tests import oracle

SIZE, DIM, DRAWS, BETA = 29, 6, 5, 6.0
KNOWN = [[0, 1], [5], [28, 3, 0], [6]]
VALID = [True, True, True, False]
CORRECTOR = Mlp()
PLACE = make_placement(3)
PROPOSAL = TwoLevel(DRAWS, BETA, CORRECTOR, block_rows=4, tile_rows=8, place=PLACE)
BATCH = oracle.batch_of(KNOWN, valid=VALID)


@functools.cache
def world():
    rng = np.random.default_rng(0)
    stale = oracle.unit(rng, SIZE, DIM)
    fresh = stale + 0.2 * rng.normal(size=stale.shape).astype(np.float32)
    shapes = jax.eval_shape(lambda key: CORRECTOR.init(key, DIM), jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), shapes)
    return {
        "params": {"queries": oracle.unit(rng, len(KNOWN), DIM), "targets": fresh},
        "psi": Gated(params, jnp.float32(1)),
        "cache": oracle.filled(stale, PLACE, block_rows=4),
        "tokens": oracle.row_numbers(SIZE, PLACE, block_rows=4),
        "stale": stale,
    }


def choose(params, psi, cache, tokens, proposal=PROPOSAL):
    queries = params["queries"]
    return selection.select(
        params, queries, psi, cache, tokens, BATCH, jax.random.key(4),
        model=oracle.Free(), proposal=proposal, place=PLACE,
    )  # fmt: skip


def pool_of(kind, queries, chosen, psi):
    if kind in ("own", "joined"):
        own = selection.own_pool(queries, chosen, beta=BETA)
        more = functools.partial(selection.with_positives, beta=BETA)
        return own if kind == "own" else more(own, queries, chosen, BATCH)
    return selection.shared_pool(
        queries, chosen, psi, BATCH,
        beta=BETA, proposal=PROPOSAL, positives=kind == "positives",
    )  # fmt: skip


@functools.cache
def chosen():
    """One selection, with its three pools."""

    @oracle.jit
    def run(params, psi, cache, tokens):
        found = choose(params, psi, cache, tokens)
        pools = {k: pool_of(k, params["queries"], found, psi) for k in KINDS}
        return found, pools

    w = world()
    return jax.device_get(run(w["params"], w["psi"], w["cache"], w["tokens"]))


KINDS = ["own", "shared", "positives", "joined"]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def test_selects_the_positive_then_the_draws_stale_and_fresh():
    found, _ = chosen()
    w = world()
    assert np.array_equal(found.ids[:, 0], BATCH.positive)
    assert np.array_equal(found.ids[:, 1:], found.draws.ids)
    assert np.array_equal(found.fresh, w["params"]["targets"][found.ids])
    assert np.array_equal(found.stale, w["stale"][found.ids])
    assert found.there.tolist() == [[valid] * (1 + DRAWS) for valid in VALID]


def test_a_strategy_without_a_cache_has_no_stale_rows():
    w = world()
    run = oracle.jit(lambda params, tokens: choose(params, w["psi"], None, tokens, InBatch()))
    found = run(w["params"], w["tokens"])
    assert found.stale is None
    assert np.array_equal(found.ids[:, 0], BATCH.positive)
    assert found.fresh.shape == (4, 1, DIM)


def test_an_own_pool_is_the_draws():
    found, pools = chosen()
    w = world()
    wanted = BETA * np.einsum("bd,bmd->bm", w["params"]["queries"], found.fresh[:, 1:])
    assert np.array_equal(pools["own"].ids, found.draws.ids)
    np.testing.assert_allclose(pools["own"].scores, wanted, atol=1e-5)
    assert np.array_equal(pools["own"].log_prob, found.draws.log_prob)
    assert pools["own"].valid.tolist() == [[valid] * DRAWS for valid in VALID]


@pytest.mark.parametrize("kind", ["shared", "positives"])
def test_a_shared_pool_meets_every_query_but_those_that_know_it(kind):
    found, pools = chosen()
    w, pool = world(), pools[kind]
    first = 0 if kind == "positives" else 1
    ids = found.ids[:, first:].reshape(-1)
    assert np.array_equal(pool.ids, ids)
    wanted = BETA * w["params"]["queries"] @ w["params"]["targets"][ids].T
    np.testing.assert_allclose(pool.scores, wanted, atol=1e-5)
    known = oracle.is_known(BATCH.known, SIZE)[:, ids]
    padded = np.repeat(np.array(VALID), DRAWS + 1 - first)
    assert np.array_equal(pool.valid, ~known & padded[None, :] & np.array(VALID)[:, None])
    assert known[:3][:, padded].any()  # some candidate is another query's positive


def test_a_shared_pool_knows_how_likely_every_query_was_to_draw_each_candidate():
    _, pools = chosen()
    w = world()
    corrected = CORRECTOR.apply(w["psi"].params, jnp.asarray(w["stale"]), 1.0)
    _, _, log_prob = oracle.proposal(w["params"]["queries"], corrected, BATCH.known, BETA)
    log_prob[3] = -np.inf  # a padded query draws nothing
    np.testing.assert_allclose(
        pools["shared"].log_prob, log_prob[:, pools["shared"].ids], atol=2e-5
    )


def test_other_queries_positives_join_the_draws():
    _, pools = chosen()
    queries, targets = world()["params"]["queries"], world()["params"]["targets"]
    pool = pools["joined"]
    for part, own in zip(pool, pools["own"], strict=True):
        np.testing.assert_allclose(part[:, :DRAWS], own, rtol=1e-6)
    assert pool.ids[:, DRAWS:].tolist() == [BATCH.positive.tolist()] * 4
    wanted = BETA * queries @ targets[BATCH.positive].T
    np.testing.assert_allclose(pool.scores[:, DRAWS:], wanted, atol=1e-5)
    assert not np.any(pool.log_prob[:, DRAWS:])
    # 0, 5, 28, 6 are the positives; the third query knows 0 too; the fourth is padded.
    assert pool.valid[:, DRAWS:].tolist() == [
        [False, True, True, False],
        [True, False, True, False],
        [False, True, False, False],
        [False, False, False, False],
    ]


@pytest.mark.parametrize("share", [0.0, 0.9, 1.0])
def test_the_loss_over_draws_and_positives_is_that_of_section_1_over_their_union(share):
    """In NumPy, query by query: each target once, none known, none too close to the positive."""
    found, pools = chosen()
    queries, targets = world()["params"]["queries"], world()["params"]["targets"]
    pool = pools["joined"]
    scores = oracle.f64(BETA * queries @ targets.T)
    positive = scores[np.arange(4), BATCH.positive]
    measured = {}
    if share:
        pool, measured = selection.without_probable_positives(
            pool, jnp.asarray(positive, jnp.float32), share
        )
    loss = losses.truncated(jnp.asarray(positive, jnp.float32), pool, found.draws)
    dropped = candidates = 0
    for query in range(3):
        everything = [*found.draws.ids[query].tolist(), *BATCH.positive[:3].tolist()]
        taken = [y for y in everything if y not in KNOWN[query]]
        candidates += len(taken)
        if share:
            kept = [y for y in taken if scores[query, y] <= share * positive[query]]
            dropped, taken = dropped + len(taken) - len(kept), kept
        terms = [positive[query], *(scores[query, y] for y in set(taken))]
        assert loss[query] == pytest.approx(
            oracle.log_sum_exp(np.array(terms)) - terms[0], abs=1e-4
        )
    assert loss[3] == pytest.approx(0, abs=1e-6)
    if share:
        assert (positive[:3] > 0).all()
        assert 0 < dropped < candidates
        assert means(measured)["dropped_share"] == pytest.approx(dropped / candidates)


def test_of_a_positive_below_zero_nothing_above_it_is_kept():
    scores = jnp.array([[-0.9, -1.0, -1.04, -1.2]])
    pool = losses.Pool(jnp.arange(4)[None], scores, jnp.zeros((1, 4)), jnp.ones((1, 4), bool))
    for share, kept in (
        (0.9, [3]),
        (0.95, [3]),
        (0.97, [2, 3]),
        (1.0, [1, 2, 3]),
        (1.2, [0, 1, 2, 3]),
    ):
        left, _ = selection.without_probable_positives(pool, jnp.array([-1.0]), share)
        assert np.flatnonzero(left.valid[0]).tolist() == kept


def test_dropping_candidates_moves_the_positive_by_its_own_loss_alone():
    """The limit is a threshold, not a term: no gradient reaches the positive through it."""
    pool = losses.Pool(
        jnp.arange(3)[None],
        jnp.array([[0.2, 0.5, 0.99]]),
        jnp.zeros((1, 3)),
        jnp.ones((1, 3), bool),
    )

    def loss(positive, share):
        left = selection.without_probable_positives(pool, positive, share)[0] if share else pool
        return losses.truncated(positive, left, None)[0]

    of_two = pool._replace(valid=pool.valid.at[0, 2].set(False))
    wanted = jax.grad(lambda s: losses.truncated(s, of_two, None)[0])(jnp.ones(1))
    assert jax.grad(loss)(jnp.ones(1), 0.9) == pytest.approx(wanted)
    assert jax.grad(loss)(jnp.ones(1), 0.0) != pytest.approx(wanted)


def test_pairs_keep_duplicates_and_weigh_what_is_there():
    found, _ = chosen()
    pairs = selection.pairs_of(found)
    w = world()
    ids = found.ids.reshape(-1)
    assert np.array_equal(pairs.stale, w["stale"][ids])
    assert np.array_equal(pairs.fresh, w["params"]["targets"][ids])
    assert pairs.weight.tolist() == np.repeat(np.float32(VALID), 1 + DRAWS).tolist()


@functools.cache
def drift_gradients(kind, mse, kl):
    """The drift loss and its gradients in the encoders' parameters, in Psi, and in the cache."""
    w = world()

    @oracle.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def loss(params, psi, embeddings):
        cache = w["cache"].replace(embeddings=embeddings)
        gated = Gated(jax.lax.stop_gradient(psi), jnp.float32(1))  # as the task loss sees it
        found = choose(params, gated, cache, w["tokens"])
        pool = pool_of(kind, params["queries"], found, gated)
        drift = selection.drift_loss(
            params["queries"], found, pool,
            corrector=CORRECTOR, beta=BETA, mse_weight=mse, kl_weight=kl,
        )  # fmt: skip
        return drift(psi, selection.pairs_of(found)), (found, pool)

    return jax.device_get(loss(w["params"], w["psi"].params, w["cache"].embeddings))


LOSSES = pytest.mark.parametrize(
    ("kind", "mse", "kl"),
    [
        ("own", 1.0, 0.0),
        ("own", 0.0, 1.0),
        ("shared", 0.0, 2.0),
        ("positives", 3.0, 0.5),
        ("joined", 0.0, 1.5),
    ],
)


@LOSSES
def test_the_drift_loss_reaches_psi_and_nothing_else(kind, mse, kl):
    _, (of_params, of_psi, of_cache) = drift_gradients(kind, mse, kl)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(of_psi))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_params))
    assert not np.any(of_cache)


@LOSSES
def test_the_drift_loss_is_that_of_section_5(kind, mse, kl):
    (value, (found, pool)), _ = drift_gradients(kind, mse, kl)
    w = world()
    h = oracle.f64(CORRECTOR.apply(w["psi"].params, jnp.asarray(w["stale"]), 1.0))
    fresh, queries = oracle.f64(w["params"]["targets"]), oracle.f64(w["params"]["queries"])
    ids = found.ids[:3].reshape(-1)
    wanted = mse * ((h[ids] - fresh[ids]) ** 2).sum(axis=1).mean()
    divergences = []
    for query in range(3):
        own = pool.ids if pool.ids.ndim == 1 else pool.ids[query]
        own = own[pool.valid[query]]
        divergences.append(
            oracle.kl(BETA * fresh[own] @ queries[query], BETA * h[own] @ queries[query])
        )
    wanted += kl * np.mean(divergences)
    assert value == pytest.approx(wanted, rel=1e-4)


def test_uniform_pairs():
    w = world()

    @oracle.jit
    def run(params):
        def total(params):
            pairs = selection.uniform_pairs(
                params, w["cache"], w["tokens"], jax.random.key(0),
                count=2900, model=oracle.Free(), place=PLACE,
            )  # fmt: skip
            return pairs.fresh.sum(), pairs

        return jax.grad(total, has_aux=True)(params)

    grads, pairs = run(w["params"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert (np.asarray(pairs.weight) == 1).all()
    ids = (np.asarray(pairs.stale)[:, None, :] == w["stale"][None]).all(-1).argmax(1)
    assert np.array_equal(pairs.stale, w["stale"][ids])
    assert np.array_equal(pairs.fresh, w["params"]["targets"][ids])
    counts = np.bincount(ids, minlength=SIZE)
    assert oracle.chi_square(counts, np.full(SIZE, 1 / SIZE)) > 1e-6


def draw_metrics(found, independent=DRAWS):
    queries = world()["params"]["queries"]
    return selection.draw_metrics(queries, found, BATCH, beta=BETA, independent=independent)


def test_draws_that_are_no_sample_say_nothing_about_kl():
    """The mined ones come last, without a probability: only the first are read."""
    found, _ = chosen()
    log_prob = found.draws.log_prob.copy()
    log_prob[:, 2:] = 0
    mixed = found.replace(draws=found.draws._replace(log_prob=log_prob))
    two, several = means(draw_metrics(mixed, 2)), means(draw_metrics(found, 2))
    assert two["kl_estimate"] == several["kl_estimate"] != means(draw_metrics(mixed))["kl_estimate"]
    assert draw_metrics(mixed, 0).keys() == {"known_share"}


def test_metrics_of_the_draws():
    found, _ = chosen()
    w = world()
    measured = means(draw_metrics(found))
    corrected = oracle.f64(CORRECTOR.apply(w["psi"].params, jnp.asarray(w["stale"]), 1.0))
    logits, _, _ = oracle.proposal(w["params"]["queries"], corrected, BATCH.known, BETA)
    fresh = BETA * oracle.f64(w["params"]["queries"]) @ w["params"]["targets"].T
    gap = np.take_along_axis(fresh - logits, found.draws.ids, axis=1)[:3]
    assert measured["kl_estimate"] == pytest.approx(0.5 * gap.var(axis=1, ddof=1).mean(), rel=1e-4)
    assert measured["known_share"] == 0
    ids = found.draws.ids.copy()
    ids[0, 0], ids[3, 0] = 1, 6  # the second belongs to a padded query
    wrong = found.replace(draws=found.draws._replace(ids=ids))
    measured = means(draw_metrics(wrong))
    assert measured["known_share"] == pytest.approx(1 / (3 * DRAWS))


# The corrector's update.

TX = corrector_optimizer(peak=1e-2, warmup=3)
ROWS = 7


def some_pairs(seed):
    rng = np.random.default_rng(seed)
    stale, fresh = rng.normal(size=(2, ROWS, DIM)).astype(np.float32)
    return Pairs(jnp.asarray(stale), jnp.asarray(fresh), jnp.ones(ROWS))


def drift(psi, pairs):
    estimate = CORRECTOR.apply(psi, pairs.stale, 1.0)
    return (((estimate - pairs.fresh) ** 2).sum(axis=1) * pairs.weight).mean()


@oracle.jit
def update(state, pairs):
    return selection.update_corrector(state, pairs, tx=TX, loss=drift)


def start(ring):
    return init_corrector(
        jax.random.key(0), corrector=CORRECTOR, tx=TX, dim=DIM, ring=ring, rows=ROWS
    )


def by_hand(groups):
    """Plain updates on these pairs, one after the other."""

    @oracle.jit
    def once(params, opt_state, pairs):
        updates, opt_state = TX.update(jax.grad(drift)(params, pairs), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = start(0)
    params, opt_state = state.params, state.opt_state
    for pairs in groups:
        params, opt_state = once(params, opt_state, pairs)
    return params, opt_state


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_one_update_per_step_without_a_ring():
    state = start(0)
    for seed in range(3):
        state = update(state, some_pairs(seed))
    close((state.params, state.opt_state), by_hand([some_pairs(seed) for seed in range(3)]))
    assert state.ring is None
    assert state.gate == 0


def test_a_ring_is_gone_through_oldest_first_and_then_the_newest():
    state = start(2)
    a, b, c, d = (some_pairs(seed) for seed in range(4))
    for pairs in (a, b, c, d):
        state = update(state, pairs)
    # Empty places at the start count as no update, neither of Adam nor of the ramp.
    close((state.params, state.opt_state), by_hand([a, a, b, a, b, c, b, c, d]))
    for slot, pairs in zip((0, 1), (c, d), strict=True):
        close(jax.tree.map(lambda x, slot=slot: x[slot], state.ring), pairs)


def test_pairs_of_a_batch_of_padding_change_nothing():
    state = update(start(0), some_pairs(0))
    nothing = some_pairs(1).replace(weight=jnp.zeros(ROWS))
    after = update(state, nothing)
    close((after.params, after.opt_state), (state.params, state.opt_state))
