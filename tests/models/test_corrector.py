"""Correctors: the identity at the start, their formulas, what folds, and that they learn."""

from __future__ import annotations

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from corrector_jax import losses
from corrector_jax.models import corrector as correctors
from corrector_jax.models.corrector import Identity, Linear, Mlp, Nystrom
from corrector_jax.optimizer import corrector_optimizer
from tests import oracle

DIM = 8
LEARNING = [Linear(), Linear(normalize=False), Mlp(), Mlp(normalize=False), Mlp(hidden=5)]
EVERY = [Identity(), *LEARNING, Nystrom(6), Nystrom(6, normalize=False)]
QUERIES = np.random.default_rng(1).normal(size=(4, DIM)).astype(np.float32)


# Compiling takes nearly all of the time, so all tests share these.
@functools.partial(oracle.jit, static_argnums=0)
def apply(corrector, params, rows, gate):
    return corrector.apply(params, rows, gate)


@functools.partial(oracle.jit, static_argnums=0)
def fold_and_lift(corrector, params, queries, rows, beta, gate):
    folded = corrector.fold(params, queries, beta, gate)
    return folded, corrector.lift(params, rows, gate), corrector.length(params, rows, gate)


def random_params(corrector, *, seed=3, scale=0.4):
    """Parameters that are zero nowhere."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: corrector.init(key, DIM), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, scale, x.shape), x.dtype), shapes)


def reference(corrector, params, rows):
    rows = oracle.f64(rows)
    if isinstance(corrector, Linear):
        return oracle.linear(params, rows, normalize=corrector.normalize)
    if isinstance(corrector, Mlp):
        return oracle.mlp(params, rows, normalize=corrector.normalize)
    if isinstance(corrector, Nystrom):
        return oracle.nystrom(params, rows, normalize=corrector.normalize)
    return rows


@pytest.fixture
def rows():
    return oracle.unit(np.random.default_rng(0), 50, DIM)


@pytest.mark.parametrize("corrector", EVERY, ids=str)
def test_starts_as_the_identity(corrector, rows):
    params = corrector.init(jax.random.key(1), DIM)
    assert np.array_equal(apply(corrector, params, rows, 0.0), rows)
    np.testing.assert_allclose(apply(corrector, params, rows, 1.0), rows, atol=1e-6)


@pytest.mark.parametrize("corrector", EVERY, ids=str)
def test_a_closed_gate_is_the_identity_bit_for_bit(corrector, rows):
    params = random_params(corrector)
    for stored in (rows, np.asarray(jnp.asarray(rows, jnp.bfloat16).astype(jnp.float32)), 3 * rows):
        assert np.array_equal(apply(corrector, params, stored, 0.0), stored)
        folded, lifted, lengths = fold_and_lift(corrector, params, QUERIES, stored, 20.0, 0.0)
        assert np.array_equal(lifted, stored)
        assert (np.asarray(lengths) == 1).all()
        assert np.array_equal(folded.queries, 20 * QUERIES)
        assert not np.any(folded.offset)


@pytest.mark.parametrize("corrector", EVERY, ids=str)
def test_the_formula(corrector, rows):
    params = random_params(corrector)
    # The package may take the fast gelu, which is within 5e-4 of the exact one.
    np.testing.assert_allclose(
        apply(corrector, params, rows, 1.0), reference(corrector, params, rows), atol=2e-3
    )


@pytest.mark.parametrize("kind", [Linear, Mlp])
def test_a_corrector_normalises_iff_asked(kind, rows):
    params = random_params(kind())
    length = np.linalg.norm(apply(kind(), params, 3 * rows, 1.0), axis=1)
    np.testing.assert_allclose(length, 1, atol=1e-6)
    free = np.linalg.norm(apply(kind(normalize=False), params, 3 * rows, 1.0), axis=1)
    assert np.abs(free - 1).min() > 0.1


@pytest.mark.parametrize("gate", [0.0, 1.0])
@pytest.mark.parametrize("corrector", EVERY, ids=str)
def test_folding_changes_no_logit(corrector, gate, rows):
    params, beta = random_params(corrector), 20.0
    folded, lifted, lengths = fold_and_lift(corrector, params, QUERIES, rows, beta, gate)
    assert corrector.has_lengths or (np.asarray(lengths) == 1).all()
    logits = oracle.f64(folded.queries) @ oracle.f64(lifted).T + oracle.f64(folded.offset)[:, None]
    logits /= oracle.f64(lengths)
    wanted = beta * oracle.f64(QUERIES) @ oracle.f64(apply(corrector, params, rows, gate)).T
    np.testing.assert_allclose(logits, wanted, atol=5e-4, rtol=1e-5)


def test_the_linear_corrector_leaves_nothing_to_do_per_row(rows):
    assert np.array_equal(Linear().lift(random_params(Linear()), rows, 1.0), rows)


@pytest.mark.parametrize("corrector", EVERY, ids=str)
def test_rows_may_have_any_leading_dimensions(corrector, rows):
    params = random_params(corrector)
    flat = np.asarray(apply(corrector, params, rows, 1.0))
    deep = rows.reshape(5, 2, 5, DIM)
    _, lifted, lengths = fold_and_lift(corrector, params, QUERIES, rows, 20.0, 1.0)
    _, deeply, of_deep = fold_and_lift(corrector, params, QUERIES, deep, 20.0, 1.0)
    np.testing.assert_allclose(deeply, np.reshape(lifted, deep.shape), atol=1e-6)
    np.testing.assert_allclose(of_deep, np.reshape(lengths, deep.shape[:-1]), atol=1e-6)
    np.testing.assert_allclose(
        apply(corrector, params, deep, 1.0), flat.reshape(deep.shape), atol=1e-6
    )


@pytest.mark.parametrize("corrector", LEARNING, ids=str)
def test_a_gradient_reaches_the_parameters_at_the_start(corrector, rows):
    params = corrector.init(jax.random.key(1), DIM)
    stale = np.concatenate([rows, np.zeros((1, DIM), np.float32)])  # a zero row harms nothing
    fresh = np.roll(stale, 1, axis=1)

    @oracle.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(params, stale):
        return losses.drift_mse(corrector.apply(params, stale, 1.0), fresh, jnp.ones(len(stale)))

    of_params, of_rows = gradients(params, stale)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((of_params, of_rows)))
    last = of_params["outer"] if isinstance(corrector, Mlp) else of_params
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(last))


def drifted(rows):
    """A smooth drift of unit rows."""
    moved = rows + 0.3 * np.sin(3 * np.roll(rows, 1, axis=1))
    return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)


def test_nystrom_is_kernel_ridge_regression(rows):
    """Against NumPy: the width is the median distance, the weights solve the ridge system."""
    fresh = drifted(rows)
    params = Nystrom(50, ridge=0.05).fit(jnp.asarray(rows), jnp.asarray(fresh))
    square = np.square(oracle.f64(rows)[:, None] - oracle.f64(rows)[None]).sum(axis=-1)
    width = np.sqrt(np.median(square[~np.eye(50, dtype=bool)]))
    assert float(params["width"]) == pytest.approx(width, rel=1e-5)
    kernel = np.exp(-square / (2 * width**2))
    weights = np.linalg.solve(kernel + 0.05 * np.eye(50), oracle.f64(fresh) - rows)
    np.testing.assert_allclose(params["weights"], weights, atol=2e-4)
    assert np.array_equal(params["landmarks"], rows)


def test_nystrom_mends_targets_that_are_no_landmarks():
    rng = np.random.default_rng(7)
    landmarks, others = oracle.unit(rng, 400, DIM), oracle.unit(rng, 100, DIM)
    corrector = Nystrom(400)
    params = corrector.fit(jnp.asarray(landmarks), jnp.asarray(drifted(landmarks)))
    found = apply(corrector, params, others, 1.0)
    left = np.square(found - drifted(others)).sum() / np.square(others - drifted(others)).sum()
    assert left < 0.05


def test_nystrom_takes_landmarks_that_coincide(rows):
    same = np.repeat(rows[:1], 5, axis=0)
    params = Nystrom(5).fit(jnp.asarray(same), jnp.asarray(drifted(same)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    found = apply(Nystrom(5), params, same, 1.0)
    np.testing.assert_allclose(found, drifted(same), atol=1e-2)


@pytest.mark.parametrize("corrector", LEARNING, ids=str)
def test_learns_a_fixed_rotation(corrector):
    rng = np.random.default_rng(5)
    turn, _ = np.linalg.qr(np.eye(DIM) + 0.2 * rng.normal(size=(DIM, DIM)))
    turn = turn * np.sign(np.diag(turn))  # QR leaves the signs open; this one is near the identity
    stale = oracle.unit(rng, 20_000, DIM)
    fresh = (stale @ turn).astype(np.float32)
    held, held_fresh = stale[:500], fresh[:500]
    tx = corrector_optimizer(peak=3e-3, warmup=50)

    def loss(params, stale, fresh):
        estimate = corrector.apply(params, stale, 1.0)
        return losses.drift_mse(estimate, fresh, jnp.ones(len(stale)))

    def update(carry, pairs):
        params, opt_state = carry
        updates, opt_state = tx.update(jax.grad(loss)(params, *pairs), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    @oracle.jit
    def losses_before_and_after(params, pairs):
        (learned, _), _ = jax.lax.scan(update, (params, tx.init(params)), pairs)
        return loss(params, held, held_fresh), loss(learned, held, held_fresh)

    pairs = tuple(x[500:].reshape(300, 65, DIM) for x in (stale, fresh))
    before, after = losses_before_and_after(corrector.init(jax.random.key(1), DIM), pairs)
    assert after < 0.1 * before


def test_words_make_correctors():
    assert correctors.make("identity") == Identity()
    assert correctors.make("linear") == Linear()
    assert correctors.make("linear", normalize=False) == Linear(False)
    assert [c.has_lengths for c in (Linear(), Linear(False), Mlp(), Identity())] == [
        True, False, False, False,
    ]  # fmt: skip
    assert correctors.make("mlp", hidden=7, normalize=False) == Mlp(7, False)
    assert [c.learns for c in (Identity(), Linear(), Mlp())] == [False, True, True]


def test_examples_in_docstrings():
    found = doctest.testmod(correctors)
    assert found.attempted
    assert not found.failed
