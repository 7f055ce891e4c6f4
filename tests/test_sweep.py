"""Exact two-level draws: the same on every mesh, exact log Z and log p, masks that hold.

That the draws follow the softmax is shown in test_negatives.py, with the correctors.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corrector_jax import sweep
from corrector_jax.cache import TargetCache
from corrector_jax.models.corrector import Folded, Identity, Linear, Mlp
from corrector_jax.negatives import Gated, TwoLevel
from corrector_jax.sharding import make_placement
from corrector_jax.sweep import draw_two_level
from corrector_jax.types import Batch
from tests import oracle

N, DIM, BATCH = 1009, 12, 6


@functools.cache
def compiled(devices, draws, block_rows, tile_rows):
    place = make_placement(devices)

    def draw(folded, shift, cache, known, key):
        # The least lift that shows whether it is used: it adds `shift` to each row.
        return draw_two_level(
            folded,
            lambda shift, rows: rows + shift,
            shift,
            cache,
            known,
            key,
            draws=draws,
            block_rows=block_rows,
            tile_rows=tile_rows,
            place=place,
        )

    return oracle.jit(draw), place


def draw(
    queries,
    rows,
    known,
    *,
    beta=1.0,
    offset=0.0,
    shift=0.0,
    seed=0,
    devices=1,
    draws=16,
    block_rows=16,
    tile_rows=2048,
    dtype="float32",
):
    step, place = compiled(devices, draws, block_rows, tile_rows)
    cache = oracle.filled(rows, place, block_rows=block_rows, dtype=dtype)
    folded = Folded(beta * jnp.asarray(queries), jnp.full(len(queries), offset))
    key = jax.random.key(seed)
    drawn = jax.device_get(step(folded, jnp.float32(shift), cache, jnp.asarray(known), key))
    assert drawn.ids.dtype == np.int32
    assert drawn.log_prob.dtype == drawn.log_z.dtype == np.float32
    return drawn


@pytest.fixture(scope="module")
def problem():
    """Unit queries, unit rows, and up to three known positives of each query."""
    rng = np.random.default_rng(0)
    known = rng.permutation(N)[: 3 * BATCH].reshape(BATCH, 3).astype(np.int32)
    known[1:3, 1:] = -1
    known[3] = -1
    return oracle.unit(rng, BATCH, DIM), oracle.unit(rng, N, DIM), known


@pytest.mark.parametrize("beta", [1.0, 20.0, 100.0])
def test_log_z_and_log_prob_are_those_of_the_dense_softmax(problem, beta):
    queries, rows, known = problem
    drawn = draw(queries, rows, known, beta=beta, offset=3.0, tile_rows=208)
    _, log_z, log_prob = oracle.proposal(queries, rows, known, beta)
    np.testing.assert_allclose(drawn.log_z, log_z + 3, rtol=1e-5)
    np.testing.assert_allclose(
        drawn.log_prob, np.take_along_axis(log_prob, drawn.ids, axis=1), atol=1e-4
    )
    assert drawn.valid.all()


@pytest.mark.parametrize(("devices", "tile_rows"), [(1, 208), (3, 80), (8, 2048), (8, 48)])
def test_the_same_draws_on_every_mesh_and_for_every_tile(problem, devices, tile_rows):
    queries, rows, known = problem
    one = draw(queries, rows, known, beta=20)
    other = draw(queries, rows, known, beta=20, devices=devices, tile_rows=tile_rows)
    assert np.array_equal(one.ids, other.ids)
    assert len(np.unique(one.ids)) > 30
    np.testing.assert_allclose(one.log_prob, other.log_prob, atol=2e-5)
    np.testing.assert_allclose(one.log_z, other.log_z, rtol=1e-6)


def test_blocks_change_the_draws_and_nothing_else(problem):
    queries, rows, known = problem
    _, log_z, log_prob = oracle.proposal(queries, rows, known, 20)
    seen = []
    for block_rows in (1, 16, 1024):
        drawn = draw(queries, rows, known, beta=20, block_rows=block_rows)
        np.testing.assert_allclose(drawn.log_z, log_z, rtol=1e-5)
        np.testing.assert_allclose(
            drawn.log_prob, np.take_along_axis(log_prob, drawn.ids, axis=1), atol=3e-5
        )
        seen.append(drawn.ids)
    assert (seen[0] != seen[1]).mean() > 0.5
    assert (seen[1] != seen[2]).mean() > 0.5


def test_each_row_is_lifted(problem):
    queries, rows, known = problem
    drawn = draw(queries, rows, known, beta=20, shift=0.1, tile_rows=208)
    _, log_z, log_prob = oracle.proposal(queries, rows + np.float32(0.1), known, 20)
    np.testing.assert_allclose(drawn.log_z, log_z, rtol=1e-5)
    np.testing.assert_allclose(
        drawn.log_prob, np.take_along_axis(log_prob, drawn.ids, axis=1), atol=3e-5
    )


def test_bfloat16_rows_are_the_rounded_rows_in_float32(problem):
    queries, rows, known = problem
    drawn = draw(queries, rows, known, beta=100, dtype="bfloat16", tile_rows=208)
    rounded = np.asarray(jnp.asarray(rows, jnp.bfloat16).astype(jnp.float32))
    assert not np.array_equal(rounded, rows)
    _, log_z, log_prob = oracle.proposal(queries, rounded, known, 100)
    np.testing.assert_allclose(drawn.log_z, log_z, rtol=1e-5)
    np.testing.assert_allclose(
        drawn.log_prob, np.take_along_axis(log_prob, drawn.ids, axis=1), atol=1e-4
    )


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_masks_hold_for_blocks_devices_and_everything(devices):
    size, block = 41, 4
    share = make_placement(devices).pad(size, block) // devices
    rng = np.random.default_rng(1)
    queries, rows = oracle.unit(rng, 7, DIM), oracle.unit(rng, size, DIM)
    masked = [
        range(4, 8),  # one whole block
        [*range(4, 12), 20, 33],  # two neighbours and some others
        range(share, min(2 * share, size)) if devices > 1 else [0],  # the second device's share
        range(share if devices > 1 else 1),  # the first device's
        range(size),  # everything
        [y for y in range(size) if y != 39],  # all but one
        [],
    ]
    known = np.full((7, size), -1, np.int32)
    for query, ids in enumerate(masked):
        known[query, : len(ids)] = rng.permutation(np.array(ids, np.int32))
    drawn = draw(
        queries, rows, known, beta=20, devices=devices, draws=64, block_rows=block, tile_rows=8
    )
    assert all(np.isfinite(drawn.log_prob).ravel())
    assert not np.isnan(drawn.log_z).any()
    for query, ids in enumerate(masked):
        if len(ids) < size:
            assert drawn.valid[query].all()
            assert not set(drawn.ids[query]) & set(ids)
    _, log_z, log_prob = oracle.proposal(queries, rows, known, 20)
    np.testing.assert_allclose(drawn.log_z, log_z, rtol=1e-5)
    own = np.where(drawn.valid, np.take_along_axis(log_prob, drawn.ids, axis=1), 0)
    np.testing.assert_allclose(drawn.log_prob, own, atol=3e-5)
    assert not drawn.valid[4].any()
    assert not drawn.ids[4].any()
    assert not drawn.log_prob[4].any()
    assert drawn.log_z[4] == -np.inf
    assert (drawn.ids[5] == 39).all()
    np.testing.assert_allclose(drawn.log_prob[5], 0, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
def test_padding_is_never_drawn_nor_counted(devices):
    # Every real logit is near -100 and every padding row's is above 0.
    rng = np.random.default_rng(2)
    rows = 1 + 0.01 * rng.normal(size=(37, DIM)).astype(np.float32)
    queries = np.full((2, DIM), -100 / DIM, np.float32)
    place = make_placement(devices)
    step, _ = compiled(devices, 64, 4, 8)
    cache = oracle.filled(rows, place, block_rows=4, pad=-1.0)
    known = jnp.full((2, 1), -1, jnp.int32)
    folded = Folded(jnp.asarray(queries), jnp.zeros(2))
    drawn = jax.device_get(step(folded, jnp.float32(0), cache, known, jax.random.key(0)))
    assert drawn.ids.max() < 37
    _, log_z, _ = oracle.proposal(queries, rows, known, 1.0)
    np.testing.assert_allclose(drawn.log_z, log_z, rtol=1e-5)


def test_far_ends_of_the_range(problem):
    queries, rows, known = problem
    drawn = draw(queries, rows, known, beta=1e4)  # logits to +-1e4: all mass on one row
    logits, log_z, _ = oracle.proposal(queries, rows, known, 1e4)
    np.testing.assert_allclose(drawn.log_z, log_z, rtol=1e-5)
    best = np.where(oracle.is_known(known, N), -np.inf, logits).argmax(axis=1)
    assert (drawn.ids == best[:, None]).mean() > 0.9
    assert np.isfinite(drawn.log_prob).all()


def test_draws_are_independent():
    """One query 16 times over: any two of its draws are equal as often as independent ones."""
    rng = np.random.default_rng(3)
    copies, draws, keys = 32, 8, 60
    queries = np.repeat(oracle.unit(rng, 1, DIM), copies, axis=0)
    rows, known = oracle.unit(rng, 61, DIM), np.full((copies, 1), -1, np.int32)
    ids = np.stack(
        [
            draw(queries, rows, known, beta=5, seed=seed, draws=draws, block_rows=8).ids
            for seed in range(keys)
        ]
    )  # [keys, copies, draws]
    p = np.exp(oracle.proposal(queries[:1], rows, known[:1], 5)[2][0])
    equal = (p**2).sum()
    by_block = np.add.reduceat(p, np.arange(0, 61, 8))

    def meet(a, b):
        """Share of equal ids, and of equal blocks, in standard errors from independence."""
        found = []
        for same, chance in (((a == b), equal), ((a // 8 == b // 8), (by_block**2).sum())):
            found.append((same.mean() - chance) / np.sqrt(chance * (1 - chance) / same.size))
        return np.abs(found).max()

    half = draws // 2
    assert meet(ids[:, :, :half], ids[:, :, half:]) < 4  # other draws of the same query
    assert meet(ids[:, : copies // 2], ids[:, copies // 2 :]) < 4  # the same draw of others
    assert meet(ids[: keys // 2], ids[keys // 2 :]) < 4  # the same place under other keys
    # Noise that blocks and rows shared would show where draw, block and row have one number.
    same, chance = ids == 9 * np.arange(draws), np.append(p, np.zeros(3))[9 * np.arange(draws)]
    spread = np.sqrt((chance * (1 - chance)).sum() / (keys * copies))
    assert abs((same.mean(axis=(0, 1)) - chance).sum()) < 4 * spread
    # Within a draw, the row says nothing about the block.
    block, row = ids.ravel() // 8, ids.ravel() % 8
    for b in range(7):
        counts = np.bincount(row[block == b], minlength=8)
        within = p[8 * b : 8 * b + 8]
        assert oracle.chi_square(counts, within / within.sum()) > 1e-6


# What a device holds at once.


@pytest.mark.parametrize(
    ("batch", "dim", "hidden", "draws", "block_rows"),
    [(512, 64, 0, 8, 64), (64, 64, 96, 4, 32), (8, 32, 0, 32, 4)],
)
def test_temporaries_stay_within_the_budget(batch, dim, hidden, draws, block_rows):
    place, corrector = make_placement(1), Mlp(hidden) if hidden else Identity()

    def temporaries(tile_rows):
        proposal = TwoLevel(draws, 5.0, corrector, block_rows, tile_rows, place)

        def shapes():
            psi = Gated(corrector.init(jax.random.key(0), dim), jnp.float32(1))
            rows = jnp.zeros((place.pad(20_000, block_rows), dim))
            cache = TargetCache(rows, None, jnp.zeros(len(rows), jnp.int32), 20_000)
            known = jnp.zeros((batch, 4), jnp.int32)
            queries = Batch(known, known[:, 0], known, known[:, 0] == 0)
            return jnp.zeros((batch, dim)), psi, cache, queries, jax.random.key(0)

        compiled = oracle.jit(proposal.draw).lower(*jax.eval_shape(shapes)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    least = temporaries(block_rows)
    assert least < 1 << 20
    for budget in (1 << 20, 4 << 20):
        rows = sweep.tile_rows(
            budget, batch=batch, dim=dim, hidden=hidden, draws=draws, block_rows=block_rows
        )
        assert rows % block_rows == 0
        assert budget / 8 < temporaries(rows) <= budget + least


def test_a_budget_too_small_is_one_block():
    assert sweep.tile_rows(1, batch=512, dim=768, hidden=768, draws=8, block_rows=64) == 64


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("tile_rows", [5, 48, 10_000])
def test_lengths_are_measured_of_every_row_and_of_nothing_else(devices, tile_rows, problem):
    rows = problem[1]
    place, corrector = make_placement(devices), Linear()
    rng = np.random.default_rng(4)
    params = {
        "kernel": jnp.asarray(rng.normal(0, 0.3, (DIM, DIM)), jnp.float32),
        "bias": jnp.asarray(rng.normal(0, 0.3, DIM), jnp.float32),
    }
    before = oracle.filled(rows, place, block_rows=16)
    before = dataclasses.replace(
        before, lengths=place.put_rows(np.full(len(before.written_at), 9.0, np.float32))
    )

    @oracle.jit
    def measured(psi, cache):
        return sweep.measure_lengths(
            lambda psi, rows: corrector.length(psi.params, rows, psi.gate),
            psi, cache, tile_rows=tile_rows, place=place,
        )  # fmt: skip

    found = measured(Gated(params, jnp.float32(1)), before)
    wanted = np.linalg.norm(oracle.linear(params, rows, normalize=False), axis=1)
    np.testing.assert_allclose(found.lengths[:N], wanted, rtol=1e-5)
    assert np.array_equal(found.embeddings, before.embeddings)
    assert found.lengths.sharding.is_equivalent_to(before.lengths.sharding, 1)
    closed = measured(Gated(params, jnp.float32(0)), before)
    assert (np.asarray(closed.lengths) == 1).all()


def test_any_number_of_known_positives_is_masked_exactly(problem):
    """Far more in a tile than are masked in one go; one known to all; all known to one."""
    queries, rows, _ = problem
    rng = np.random.default_rng(5)
    masked = [
        rng.permutation(N)[:700],
        np.arange(16, 16 + 512),
        np.array([], int),
        np.arange(N),
        np.delete(rng.permutation(N), 5),
        np.array([7]),
    ]
    known = np.full((BATCH, N), -1, np.int32)
    for query, ids in enumerate(masked):
        ids = np.union1d(ids, [100])
        known[query, rng.permutation(N)[: len(ids)]] = ids  # -1 anywhere between them
    _, log_z, log_prob = oracle.proposal(queries, rows, known, 5)
    for devices, tile_rows in ((1, 2048), (1, 304), (8, 2048)):
        drawn = draw(queries, rows, known, beta=5, devices=devices, tile_rows=tile_rows, draws=64)
        np.testing.assert_allclose(drawn.log_z, log_z, rtol=1e-5)
        left = np.isfinite(log_z)
        assert left.tolist() == [True, True, True, False, True, True]
        assert np.array_equal(drawn.valid, np.repeat(left[:, None], 64, axis=1))
        own = np.take_along_axis(log_prob, drawn.ids, axis=1)
        np.testing.assert_allclose(drawn.log_prob[left], own[left], atol=3e-5)


@pytest.mark.parametrize("where", ["first", "last", "one block"])
def test_winners_on_one_device_alone(problem, where):
    """Then it draws all rows, in many turns, while the others do nothing."""
    queries, rows, known = problem
    size = 9 * 16 * 8 - 3  # the last device of three and of eight holds padding too
    rows = oracle.unit(np.random.default_rng(6), size, DIM)
    chosen = {"first": slice(0, 100), "last": slice(size - 100, size), "one block": slice(32, 48)}
    rows[chosen[where]] += 20  # its logits alone count
    queries = np.abs(queries)
    one = draw(queries, rows, known, draws=64)
    assert set(one.ids.ravel()) <= set(range(size)[chosen[where]])
    _, log_z, log_prob = oracle.proposal(queries, rows, known, 1.0)
    np.testing.assert_allclose(one.log_z, log_z, rtol=1e-5)
    np.testing.assert_allclose(
        one.log_prob, np.take_along_axis(log_prob, one.ids, axis=1), atol=2e-4
    )
    for devices, tile_rows in ((3, 2048), (8, 16)):
        other = draw(queries, rows, known, draws=64, devices=devices, tile_rows=tile_rows)
        assert np.array_equal(one.ids, other.ids)
        np.testing.assert_allclose(one.log_prob, other.log_prob, atol=1e-4)
