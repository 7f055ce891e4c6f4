"""The cache and the token table: what is written is what is read, on any number of devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corrector_jax import cache as caches
from corrector_jax.sharding import make_placement
from tests import oracle

N, DIM, BLOCK = 45, 6, 4
MESHES = pytest.mark.parametrize("devices", [1, 3, 8])
STORED = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])


@functools.cache
def functions(devices):
    """Placement, take and write, compiled; write donates the cache as the refresh does."""
    place = make_placement(devices)
    write = place.jit_step(functools.partial(caches.write, place=place), place.rows, (0,))
    return place, oracle.jit(functools.partial(caches.take, place=place)), write


def create(place, dtype="float32"):
    return caches.create(N, DIM, dtype=dtype, block_rows=BLOCK, place=place)


def stored(rows, dtype):
    if dtype == "int8":
        scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
        return np.round(rows / scale) * scale
    return np.asarray(jnp.asarray(rows, dtype).astype(jnp.float32))


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(size=(N, DIM)).astype(np.float32)


@MESHES
def test_an_empty_cache_holds_whole_blocks_of_zeros(devices):
    place, take, _ = functions(devices)
    cache = create(place)
    assert cache.size == N
    assert cache.embeddings.shape[0] % (devices * BLOCK) == 0
    assert cache.embeddings.shape[0] >= N
    assert cache.embeddings.sharding.is_equivalent_to(place.rows, 2)
    assert cache.written_at.sharding.is_equivalent_to(place.rows, 1)
    assert (np.asarray(cache.written_at) == -1).all()
    assert not np.any(take(cache, np.arange(N)))


@MESHES
@STORED
def test_what_is_written_is_read(devices, dtype, rows):
    place, take, write = functions(devices)
    order = np.random.default_rng(1).permutation(N).astype(np.int32)
    cache = create(place, dtype)
    first, second = order[:20], order[20:30]
    fill = np.full(10, -1, np.int32)  # a block that is not full
    cache = write(cache, first, rows[first], np.int32(3))
    cache = write(
        cache,
        np.concatenate([fill, second]),
        np.concatenate([rows[:10], rows[second]]),
        np.int32(5),
    )
    assert cache.embeddings.dtype == dtype
    wanted, at = np.zeros((N, DIM), np.float32), np.full(cache.written_at.shape, -1)
    wanted[order[:30]] = stored(rows[order[:30]], dtype)
    at[first], at[second] = 3, 5
    got = take(cache, np.arange(N))
    assert got.dtype == jnp.float32
    assert np.array_equal(got, wanted)
    assert np.array_equal(cache.written_at, at)
    assert not np.any(np.asarray(cache.embeddings)[N:])  # padding stays as it was
    ids = np.array([order[0], -1, 10_000, order[0], order[25]], np.int32)
    inside = np.array([1, 0, 0, 1, 1], np.float32)[:, None]
    assert np.array_equal(take(cache, ids), wanted[ids.clip(0, N - 1)] * inside)
    # Mean age of the rows that were written.
    np.testing.assert_allclose(caches.age(cache, 11), (20 * 8 + 10 * 6) / 30, rtol=1e-6)


def test_a_row_is_replaced(rows):
    place, take, write = functions(3)
    ids = np.arange(20, dtype=np.int32)
    cache = write(create(place), ids, rows[:20], np.int32(1))
    cache = write(cache, ids, -rows[:20], np.int32(2))
    assert np.array_equal(take(cache, ids), -rows[:20])
    assert (np.asarray(cache.written_at)[:20] == 2).all()


def test_nothing_written_has_no_age():
    assert caches.age(create(make_placement(8)), 100) == 0


@MESHES
@STORED
def test_writing_copies_no_cache(devices, dtype, rows):
    place, _, write = functions(devices)
    cache = create(place, dtype)
    compiled = write.lower(cache, np.arange(20, dtype=np.int32), rows[:20], np.int32(1)).compile()
    share = sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) // devices
    assert compiled.memory_analysis().alias_size_in_bytes == share
    old = cache.embeddings
    write(cache, np.arange(20, dtype=np.int32), rows[:20], np.int32(1))
    assert old.is_deleted()


def test_reading_is_cut_off_from_differentiation(rows):
    place, _, _ = functions(3)
    cache = oracle.filled(rows, place, block_rows=BLOCK)

    @oracle.jit
    @jax.grad
    def gradient(embeddings):
        held = cache.replace(embeddings=embeddings)
        taken = caches.take(held, jnp.arange(7), place)
        return (taken**2).sum() + (caches.read(embeddings, None) ** 2).sum()

    assert not np.any(gradient(cache.embeddings))


def test_a_scale_is_multiplied_in():
    scale = jnp.array([2.0, 0.5])
    assert np.array_equal(
        caches.read(jnp.ones((2, 3), jnp.bfloat16), scale), [[2.0] * 3, [0.5] * 3]
    )


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e6])
def test_int8_rows_are_off_by_no_more_than_half_a_step_of_their_own(size):
    rng = np.random.default_rng(0)
    rows = rng.normal(0, size, (200, 33)) * rng.lognormal(0, 3, (200, 1))
    rows = rows.astype(np.float32)
    rows[7], rows[8, 1:] = 0, 0
    held, scale = oracle.jit(functools.partial(caches.stored, dtype=jnp.int8))(rows)
    assert (held.dtype, held.shape, scale.dtype, scale.shape) == (np.int8, (200, 33), "f4", (200,))
    assert np.abs(held).max() == 127
    read = caches.read(held, scale)
    assert read.dtype == np.float32
    largest = np.abs(rows).max(axis=1, keepdims=True)
    assert (np.abs(read - rows) <= largest / 254 * (1 + 1e-4)).all()
    assert not np.any(read[7])
    np.testing.assert_allclose(read[8], rows[8], rtol=1e-6)
    again = caches.read(*caches.stored(read, jnp.dtype("int8")))
    np.testing.assert_allclose(again, read, rtol=1e-6)  # rounding once is all


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_floats_have_no_scale(rows, dtype):
    held, scale = caches.stored(rows, jnp.dtype(dtype))
    assert scale is None
    assert held.dtype == dtype
    assert np.array_equal(caches.read(held, None), stored(rows, dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_not_read_as_if_it_were(rows, dtype, wrong):
    rows[3, 2] = wrong
    read = caches.read(*caches.stored(rows, jnp.dtype(dtype)))
    assert np.isfinite(read).all(axis=1).tolist() == [row != 3 for row in range(N)]


@MESHES
def test_rows_of_a_share(devices, rows):
    """`read_slice` and `read_at` count within a device's own share."""
    place, _, _ = functions(devices)
    cache = oracle.filled(rows, place, block_rows=BLOCK)

    def local(cache):
        sliced = caches.read_slice(cache, 1, 2)
        return sliced, caches.read_at(cache, jnp.array([[2, 1]]))[0]

    specs = jax.sharding.PartitionSpec("data")
    sliced, at = oracle.jit(place.per_device(local, (specs,), (specs, specs)))(cache)
    held = np.asarray(cache.embeddings).reshape(devices, -1, DIM)
    assert np.array_equal(np.reshape(sliced, (devices, 2, DIM)), held[:, 1:3])
    assert np.array_equal(np.reshape(at, (devices, 2, DIM)), held[:, 2:0:-1])


@MESHES
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_tokens_are_taken_as_they_were_given(devices, dtype):
    place, _, _ = functions(devices)
    table = np.random.default_rng(0).integers(1, 60_000, (N, 5)).astype(dtype)
    tokens = caches.create_tokens(table, fingerprint="abc", pad_id=9, block_rows=BLOCK, place=place)
    assert (tokens.size, tokens.fingerprint, tokens.ids.dtype) == (N, "abc", dtype)
    assert tokens.ids.shape[0] == create(place).embeddings.shape[0]
    assert tokens.ids.sharding.is_equivalent_to(place.rows, 2)
    assert np.array_equal(np.asarray(tokens.ids)[:N], table)
    assert (np.asarray(tokens.ids)[N:] == 9).all()
    ids = np.array([44, 0, 17, -1, 10_000, 17], np.int32)
    taken = oracle.jit(functools.partial(caches.take_tokens, place=place))(tokens, ids)
    assert taken.dtype == jnp.int32
    inside = np.array([1, 1, 1, 0, 0, 1])[:, None]
    assert np.array_equal(taken, table[ids.clip(0, N - 1)] * inside)
