"""Schedules, the two optimizers, and accumulation as an average."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from corrector_jax import optimizer
from tests import oracle

KINDS = ["linear", "cosine", "constant"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_schedules_rise_and_fall(kind, warmup):
    rate = optimizer.schedule(kind, peak=0.5, warmup=warmup, steps=100)
    rates = np.asarray(jax.vmap(rate)(jnp.arange(101)))
    top = max(warmup - 1, 0)
    assert rates[0] > 0  # the first update already moves
    assert rates[top] == pytest.approx(0.5)
    assert rates.max() == pytest.approx(0.5)
    assert (np.diff(rates[: top + 1]) > 0).all()
    if kind == "constant":
        np.testing.assert_allclose(rates[top:], 0.5)
    else:
        assert (np.diff(rates[max(warmup, 1) :]) < 0).all()
        assert rates[100] == pytest.approx(0, abs=1e-7)


PARAMS = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}


def run(tx, gradients, params=PARAMS):
    """Parameters after each of the gradients."""

    @oracle.jit
    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, found = tx.init(params), []
    for grads in gradients:
        params, state = update(params, state, grads)
        found.append(params)
    return found


def gradients(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)
        for _ in range(count)
    ]


def task(**options):
    given = {"clip": 0.0, "weight_decay": 0.0, "accumulate": 1} | options
    return optimizer.task_optimizer(optax.constant_schedule(0.1), **given)


def norm(grads):
    return float(np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(grads))))


def close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def test_accumulated_steps_are_one_step_on_the_average():
    given = gradients(2)
    given += [jax.tree.map(lambda g: 0.2 * g, grads) for grads in gradients(2, seed=1)]
    halves = [jax.tree.map(lambda a, b: (a + b) / 2, *given[i : i + 2]) for i in (0, 2)]
    # A clip that the sum of the first two would meet and their average does not: Adam alone could
    # not tell the one from the other.
    clip = 1.2 * norm(halves[0])
    small = run(task(accumulate=2, clip=clip, weight_decay=0.1), given)
    large = run(task(clip=clip, weight_decay=0.1), halves)
    close(small[0], PARAMS)  # nothing moves before the second
    close(small[2], small[1])
    close(small[1], large[0], rtol=1e-6)
    close(small[3], large[1], rtol=1e-6)


def test_the_schedule_counts_updates_not_accumulated_steps():
    rate = optimizer.schedule("linear", peak=0.1, warmup=0, steps=3)
    tx = optimizer.task_optimizer(rate, clip=0.0, weight_decay=0.0, accumulate=2)
    plain = optimizer.task_optimizer(rate, clip=0.0, weight_decay=0.0, accumulate=1)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    close(run(tx, [ones] * 6)[-1], run(plain, [ones] * 3)[-1], rtol=1e-6)


def test_only_matrices_decay():
    nothing = jax.tree.map(jnp.zeros_like, PARAMS)
    (after,) = run(task(weight_decay=0.5), [nothing])
    np.testing.assert_allclose(after["kernel"], 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(after["bias"], 1)


def test_the_clip_is_of_the_global_norm():
    # Two gradients, for the size of the first alone leaves no trace in Adam's update.
    small, large = gradients(2, seed=1)
    small = jax.tree.map(lambda g: 0.01 * g, small)
    clipped = run(task(clip=1.0), [small, jax.tree.map(lambda g: 100 * g, large)])
    scale = 1 / norm(large)
    by_hand = run(task(), [small, jax.tree.map(lambda g: scale * g, large)])
    free = run(task(), [small, jax.tree.map(lambda g: 100 * g, large)])
    close(clipped[-1], by_hand[-1], rtol=1e-5)
    assert np.abs(clipped[-1]["kernel"] - free[-1]["kernel"]).max() > 1e-3


def test_a_learned_beta_neither_shrinks_the_weights_update_nor_is_clipped():
    given = gradients(2)
    with_beta = [
        {**grads, "beta": jnp.float32(size)} for grads, size in zip(given, (1.0, 1e4), strict=True)
    ]
    params = {**PARAMS, "beta": jnp.float32(0.0)}
    after = run(task(clip=1.0), with_beta, params)[-1]
    beta = after.pop("beta")
    close(after, run(task(clip=1.0), given)[-1], rtol=1e-6)
    np.testing.assert_allclose(beta, run(task(), with_beta, params)[-1]["beta"], rtol=1e-6)


def test_the_corrector_ramps_up_after_the_start_and_after_every_reset():
    tx = optimizer.corrector_optimizer(peak=1e-2, warmup=10)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    # Adam moves by the learning rate under a constant gradient.
    moves = -np.diff([1.0] + [float(p["bias"][0]) for p in run(tx, [ones] * 30)])
    assert 0 < moves[0] <= 1.01e-3
    assert (np.diff(moves[:10]) > 5e-4).all()
    np.testing.assert_allclose(moves[10:], 1e-2, rtol=1e-3)
    again = -np.diff([1.0] + [float(p["bias"][0]) for p in run(tx, [ones] * 2)])
    np.testing.assert_allclose(again, moves[:2])


def test_encoders_that_are_held_begin_as_if_nothing_had_been_before():
    """Adam's bias correction counts updates: those in which nothing moved are none."""
    params = {"query": PARAMS, "reader": PARAMS}
    held = optimizer.beside_reader(optimizer.held(task()), task())
    whole = optimizer.beside_reader(task(), task())
    first, then = gradients(30), gradients(6, seed=1)

    def both(grads):
        return {"query": jax.tree.map(jnp.zeros_like, PARAMS), "reader": grads}

    state = held.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(whole.init(params))
    for grads in first:
        updates, state = oracle.jit(held.update)(both(grads), state, params)
        params = optax.apply_updates(params, updates)
    close(params["query"], PARAMS, rtol=0)
    close(params["reader"], run(task(), first)[-1], rtol=1e-6)
    for grads in then:
        updates, state = oracle.jit(whole.update)({"query": grads, "reader": grads}, state, params)
        params = optax.apply_updates(params, updates)
    close(params["query"], run(task(), then)[-1], rtol=1e-6)
    close(params["reader"], run(task(), [*first, *then])[-1], rtol=1e-6)


def test_a_delayed_schedule_is_the_same_later():
    rate = optimizer.schedule("linear", peak=0.5, warmup=3, steps=10)
    later = jax.vmap(optimizer.delayed(rate, 4))(jnp.arange(14))
    np.testing.assert_allclose(later, [0] * 4 + [float(rate(n)) for n in range(10)], atol=1e-7)
    assert optimizer.delayed(rate, 0) is rate


def test_a_reader_beside_the_encoders_has_an_optimizer_and_a_clip_of_its_own():
    """A gradient as large as this one clips its own side alone; what is frozen does not decay."""
    params = {name: {"kernel": jnp.ones((2, 2))} for name in ("query", "target", "reader")}
    scale = {"query": 0.1, "target": 0.1, "reader": 100.0}
    gradients = {name: {"kernel": scale[name] * jnp.ones((2, 2))} for name in params}

    def made(rate):
        return optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.1),
                           optax.sgd(rate))  # fmt: skip

    tx = optimizer.beside_reader(made(1.0), made(2.0), frozen=("target",))
    after = optax.apply_updates(params, tx.update(gradients, tx.init(params), params)[0])
    after = {name: float(tree["kernel"][0, 0]) for name, tree in after.items()}
    # Without the frozen tower, the norm of 0.1 in four places is 0.2: nothing to clip.
    assert after == pytest.approx({"query": 0.8, "target": 1.0, "reader": 1 - 2 * 0.6})
