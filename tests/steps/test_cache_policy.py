"""What a step writes into the cache: which rows, and that they are the fresh ones."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corrector_jax.sharding import make_placement
from corrector_jax.steps.cache_policy import Keep, Rolling, WriteBack
from corrector_jax.steps.selection import Selected
from corrector_jax.types import Draws
from tests import oracle

SIZE, DIM, BATCH, DRAWS = 67, 8, 4, 3
MESHES = pytest.mark.parametrize("devices", [1, 8])


@functools.cache
def world():
    """Stale and fresh rows; one fresh row is not finite."""
    rng = np.random.default_rng(0)
    fresh = oracle.unit(rng, SIZE, DIM)
    fresh[50] = np.nan
    return oracle.unit(rng, SIZE, DIM), fresh


def chosen():
    """Positives first; targets that come twice, a draw that is not valid, a padded query."""
    ids = np.array([[5, 9, 9, 66], [9, 0, 50, 1], [2, 3, 4, 60], [7, 8, 11, 12]], np.int32)
    there = np.ones(ids.shape, bool)
    there[2, 3] = False
    there[3] = False
    draws = Draws(ids[:, 1:], np.zeros((BATCH, DRAWS)), there[:, 1:], np.zeros(BATCH))
    return Selected(draws, ids, jnp.asarray(world()[1][ids]), None, None, jnp.asarray(there))


def updated(policy, place, step, taken=True):
    """The cache [N, D] and when its rows were written, after a step."""
    stale, fresh = world()
    cache = oracle.jit(policy.update)(
        oracle.filled(stale, place, block_rows=4),
        {"queries": stale[:1], "targets": jnp.asarray(fresh)},
        oracle.row_numbers(SIZE, place, block_rows=4),
        jax.tree.map(jnp.asarray, chosen()),
        jnp.int32(step),
        jnp.bool_(taken),
    )
    assert np.all(np.asarray(cache.written_at)[SIZE:] == -1)
    return np.asarray(cache.embeddings)[:SIZE], np.asarray(cache.written_at)[:SIZE]


def assert_written(found, rows, step):
    stale, fresh = world()
    embeddings, written_at = found
    mask = np.isin(np.arange(SIZE), rows)
    np.testing.assert_allclose(embeddings, np.where(mask[:, None], fresh, stale), atol=1e-7)
    assert np.array_equal(written_at, np.where(mask, step, 0))


@MESHES
def test_positives_and_draws_go_to_their_own_rows(devices):
    place = make_placement(devices)
    found = updated(WriteBack(place), place, 7)
    assert_written(found, [5, 9, 66, 0, 1, 2, 3, 4], 7)  # row 50 is not finite, 60 was not drawn


@MESHES
@pytest.mark.parametrize(
    ("step", "first", "stop"), [(0, 0, 25), (1, 25, 50), (2, 50, 67), (4, 25, 50)]
)
def test_slices_go_round(devices, step, first, stop):
    """The number of rows is no multiple of the devices, and the last slice is cut."""
    place = make_placement(devices)
    found = updated(Rolling(25, oracle.Free(), place), place, step)
    assert_written(found, [row for row in range(first, stop) if row != 50], step)


def test_a_slice_may_be_the_whole_corpus():
    place = make_placement(1)
    found = updated(Rolling(SIZE, oracle.Free(), place), place, 3)
    assert_written(found, [row for row in range(SIZE) if row != 50], 3)


@pytest.mark.parametrize("kind", ["write_back", "rolling"])
def test_a_step_that_is_skipped_writes_nothing(kind):
    place = make_placement(1)
    policy = WriteBack(place) if kind == "write_back" else Rolling(25, oracle.Free(), place)
    assert_written(updated(policy, place, 7, taken=False), [], 7)


def test_a_cache_that_is_kept_stays():
    assert_written(updated(Keep(), make_placement(1), 7), [], 7)
    assert (Keep().rewrites, Keep().rows) == (False, 0)


def test_no_gradient_reaches_parameters_through_what_is_written():
    place, (stale, fresh) = make_placement(1), world()
    cache = oracle.filled(stale, place, block_rows=4)
    tokens = oracle.row_numbers(SIZE, place, block_rows=4)

    def total(targets):
        params = {"queries": stale, "targets": targets}
        policy = Rolling(25, oracle.Free(), place)
        step, taken = jnp.int32(0), jnp.bool_(True)
        return policy.update(cache, params, tokens, chosen(), step, taken).embeddings.sum()

    assert not np.any(oracle.jit(jax.grad(total))(jnp.asarray(np.nan_to_num(fresh))))
