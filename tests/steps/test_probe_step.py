"""The probe: what it measures on its sample, and the warm-up gate."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from corrector_jax.metrics import means
from corrector_jax.models.corrector import Identity, Linear
from corrector_jax.sharding import make_placement
from corrector_jax.state import init_corrector, init_state
from corrector_jax.steps.probe_step import probe_step
from tests import oracle

SIZE, DIM, QUERIES, BETA = 67, 8, 16, 10.0
IDS = np.sort(np.random.default_rng(9).permutation(SIZE)[:40]).astype(np.int32)
TX = optax.sgd(0.1)
LINEAR = Linear(normalize=False)
MESHES = pytest.mark.parametrize("devices", [1, 8])


@functools.cache
def world():
    """Fresh rows are a linear map of the stale ones, so that `Linear` can be exact."""
    rng = np.random.default_rng(0)
    stale = oracle.unit(rng, SIZE, DIM)
    kernel = 0.2 * rng.normal(size=(DIM, DIM)).astype(np.float32)
    exact = {"kernel": kernel, "bias": np.full(DIM, 0.1, np.float32)}
    fresh = oracle.linear(exact, stale, normalize=False).astype(np.float32)
    return stale, fresh, exact, oracle.unit(rng, QUERIES, DIM)


@functools.cache
def step(devices, corrector):
    place = make_placement(devices)

    def run(state, cache, tokens):
        return probe_step(
            state, cache, tokens, jnp.arange(QUERIES)[:, None], IDS,
            beta=BETA, model=oracle.Free(), corrector=corrector, place=place,
        )  # fmt: skip

    return oracle.jit(run), place


def probe(psi, *, gate=0.0, devices=1, corrector=LINEAR):
    stale, fresh, _, queries = world()
    run, place = step(devices, corrector)
    state = init_corrector(jax.random.key(0), corrector=corrector, tx=TX, dim=DIM)
    state = state.replace(params=psi, gate=jnp.float32(gate))
    state = init_state({"queries": queries, "targets": fresh}, state, tx=TX)
    cache = oracle.filled(stale, place, block_rows=4)
    after, measured, sample = run(state, cache, oracle.row_numbers(SIZE, place, block_rows=4))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    unchanged = after.replace(corrector=after.corrector.replace(gate=state.corrector.gate))
    for a, b in zip(jax.tree.leaves(unchanged), jax.tree.leaves(state), strict=True):
        assert np.array_equal(a, b)
    for rows, table in ((sample.stale, stale), (sample.fresh, fresh)):
        np.testing.assert_allclose(rows, table[np.asarray(IDS)[: len(rows)]], rtol=1e-6)
    assert sample.corrected.shape == sample.stale.shape
    measured = means(measured)
    assert measured["gate"] == after.corrector.gate
    return measured


def mixed(share):
    """Psi this far on the way from the identity (0) to exact (1), or beyond."""
    return jax.tree.map(lambda leaf: np.float32(share) * leaf, world()[2])


@MESHES
def test_measures_what_section_7_names(devices):
    stale, fresh, _, queries = world()
    psi = mixed(0.7)
    measured = probe(psi, devices=devices)
    corrected = oracle.linear(psi, oracle.f64(stale), normalize=False)
    fresh64, stale64 = oracle.f64(fresh)[IDS], oracle.f64(stale)[IDS]
    scores = BETA * oracle.f64(queries) @ fresh64.T

    def top(logits):
        return [set(row) for row in np.argsort(-logits, axis=1)[:, :10]]

    for name, error, rows in (
        ("stale", "drift", stale64),
        ("corrected", "corrected_error", corrected[IDS]),
    ):
        logits = BETA * oracle.f64(queries) @ rows.T
        relative = ((rows - fresh64) ** 2).sum() / (fresh64**2).sum()
        overlap = np.mean([len(a & b) / 10 for a, b in zip(top(scores), top(logits), strict=True)])
        assert measured[error] == pytest.approx(relative, rel=1e-4)
        assert measured[f"kl_{name}"] == pytest.approx(oracle.kl(scores, logits).mean(), rel=1e-3)
        assert measured[f"overlap_{name}"] == pytest.approx(overlap)
        assert measured[f"delta_{name}"] == pytest.approx(np.abs(scores - logits).max(), rel=1e-4)
        assert 0 < overlap < 1
    assert measured["kl_corrected"] < measured["kl_stale"]


def test_the_gate_opens_once_the_corrector_beats_the_identity():
    assert probe(mixed(0.0))["gate"] == 0  # the identity does not beat itself
    assert probe(mixed(-0.1))["gate"] == 0
    assert probe(mixed(3.0))["gate"] == 0  # the right direction, far too much of it
    assert probe(mixed(0.1))["gate"] == 1
    assert probe(mixed(1.0))["gate"] == 1


def test_an_open_gate_stays_open():
    assert probe(mixed(-0.1), gate=1.0)["gate"] == 1


def test_a_closed_gate_does_not_hide_what_the_corrector_could_do():
    assert probe(mixed(1.0))["corrected_error"] < 1e-6 < probe(mixed(1.0))["drift"]


def test_the_identity_never_opens_it():
    measured = probe({}, corrector=Identity())
    assert measured["gate"] == 0
    assert measured["corrected_error"] == measured["drift"] > 0
