"""Landmarks of a kernel corrector: uniform, encoded fresh, and nothing else changes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from corrector_jax.models.corrector import Nystrom
from corrector_jax.sharding import make_placement
from corrector_jax.state import init_corrector, init_state
from corrector_jax.steps.fit_step import fit_step
from tests import oracle

SIZE, DIM, LANDMARKS = 67, 8, 24
TX = optax.sgd(0.1)
CORRECTOR = Nystrom(LANDMARKS)


@functools.cache
def fitted(devices, seed):
    """The state before and after, and which targets became landmarks."""
    rng = np.random.default_rng(0)
    stale, fresh = oracle.unit(rng, SIZE, DIM), oracle.unit(rng, SIZE, DIM)
    place = make_placement(devices)
    corrector = init_corrector(jax.random.key(0), corrector=CORRECTOR, tx=TX, dim=DIM)
    state = init_state({"queries": stale[:2], "targets": jnp.asarray(fresh)}, corrector, tx=TX)
    after = oracle.jit(
        functools.partial(fit_step, model=oracle.Free(), corrector=CORRECTOR, place=place)
    )(
        state,
        oracle.filled(stale, place, block_rows=4),
        oracle.row_numbers(SIZE, place, block_rows=4),
        jax.random.key(seed),
    )
    landmarks = np.asarray(after.corrector.params["landmarks"])
    ids = np.square(landmarks[:, None] - stale[None]).sum(axis=-1).argmin(axis=1)
    np.testing.assert_allclose(landmarks, stale[ids], atol=1e-7)
    return state, after, ids, fresh


@pytest.mark.parametrize("devices", [1, 8])
def test_landmarks_are_mapped_to_their_fresh_embeddings(devices):
    _, after, ids, fresh = fitted(devices, 0)
    params, gate = after.corrector.gated
    assert gate == 1.0
    wanted = CORRECTOR.fit(params["landmarks"], jnp.asarray(fresh[ids]))
    np.testing.assert_allclose(params["weights"], wanted["weights"], rtol=1e-4, atol=5e-4)
    assert len(np.unique(ids)) > LANDMARKS / 2


def test_nothing_but_the_corrector_changes():
    state, after, _, _ = fitted(1, 0)
    unchanged = after.replace(corrector=state.corrector)
    for a, b in zip(jax.tree.leaves(unchanged), jax.tree.leaves(state), strict=True):
        assert np.array_equal(a, b)


def test_landmarks_depend_on_the_key_and_on_no_mesh():
    assert np.array_equal(fitted(1, 0)[2], fitted(8, 0)[2])
    assert (fitted(1, 0)[2] != fitted(1, 1)[2]).mean() > 0.5
