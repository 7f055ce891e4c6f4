"""Losses of retrieval-augmented answering against docs/method.md, 9, written down in NumPy."""

from __future__ import annotations

import doctest
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corrector_jax import reader_losses
from corrector_jax.reader_losses import RETRIEVER_LOSSES, Reading, fused
from tests import oracle

FORMS = [("pdist", "token"), *itertools.product(("emdr2", "marginal"), ("token", "sequence"))]
EVERY = pytest.mark.parametrize(("name", "unit"), FORMS)
TAUS = {"retriever_temperature": 1.7, "reader_temperature": 0.4}


@functools.partial(oracle.jit, static_argnums=(0, 1))
def evaluate(name, unit, scores, reading):
    """Losses [B], and the gradients of their sum in scores and likelihoods."""

    def total(scores, likelihood):
        given = reading._replace(log_likelihood=likelihood)
        each = RETRIEVER_LOSSES[name](scores, given, unit=unit, **TAUS)
        return each.sum(), each

    gradients, each = jax.grad(total, (0, 1), has_aux=True)(scores, reading.log_likelihood)
    return each, *gradients


def example(*, batch=4, passages=5, length=6, seed=0):
    """Scores and likelihoods at random; lengths differ, and the second query lacks two passages."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 2, (batch, passages)).astype(np.float32)
    likelihood = -rng.exponential(1.5, (batch, passages, length)).astype(np.float32)
    there = np.ones((batch, passages), bool)
    there[1, 1 : passages - 2] = False
    tokens = np.arange(length)[None] < rng.integers(1, length + 1, (batch, 1))
    return scores, Reading(likelihood, there, tokens)


def by_definition(name, unit, scores, reading):
    """docs/method.md, 9, one query at a time."""
    found = []
    for s, a, there, tokens in zip(scores, *reading, strict=True):
        s, a = oracle.f64(s)[there] / TAUS["retriever_temperature"], oracle.f64(a)[there][:, tokens]
        prior = np.exp(s) / np.exp(s).sum()
        length = a.shape[1]
        if name == "pdist":
            liking = np.exp(a.mean(axis=1) / TAUS["reader_temperature"])
            liking /= liking.sum()
            found.append(sum(p * math.log(p / q) for p, q in zip(liking, prior, strict=True)))
        elif unit == "sequence":
            found.append(
                -math.log(sum(p * math.exp(x.sum()) for p, x in zip(prior, a, strict=True)))
            )
        else:
            each = [math.log((prior * np.exp(a[:, t])).sum()) for t in range(length)]
            found.append(-sum(each) / length)
    return np.array(found)


@EVERY
def test_by_definition(name, unit):
    scores, reading = example()
    each, _, _ = evaluate(name, unit, scores, reading)
    np.testing.assert_allclose(each, by_definition(name, unit, scores, reading), rtol=1e-5)


@EVERY
def test_gradients_are_those_of_the_definition(name, unit):
    scores, reading = example()
    _, of_scores, of_reader = evaluate(name, unit, scores, reading)
    step = 1e-5
    for index in [(0, 0), (0, 3), (1, 0), (1, 4), (3, 2)]:
        ends = [oracle.f64(scores) for _ in range(2)]
        for sign, moved in zip((1, -1), ends, strict=True):
            moved[index] += sign * step
        up, down = (by_definition(name, unit, moved, reading).sum() for moved in ends)
        assert of_scores[index] == pytest.approx((up - down) / (2 * step), abs=1e-4)
        if name == "marginal":
            ends = [oracle.f64(reading.log_likelihood) for _ in range(2)]
            for sign, moved in zip((1, -1), ends, strict=True):
                moved[(*index, 0)] += sign * step
            up, down = (
                by_definition(name, unit, scores, reading._replace(log_likelihood=moved)).sum()
                for moved in ends
            )
            assert of_reader[(*index, 0)] == pytest.approx((up - down) / (2 * step), abs=1e-4)


@EVERY
def test_who_is_moved(name, unit):
    """The table at the head of the module."""
    scores, reading = example()
    _, of_scores, of_reader = evaluate(name, unit, scores, reading)
    assert (np.abs(of_scores).max(axis=1) > 1e-3).all()
    if name == "marginal":
        counts = reading.passages[:, :, None] & reading.tokens[:, None, :]
        assert (np.asarray(of_reader)[counts] < 0).all()
        assert not np.any(np.asarray(of_reader)[~counts])
    else:
        assert not np.any(of_reader)


@EVERY
def test_a_shift_common_to_all_scores_does_nothing(name, unit):
    scores, reading = example()
    each, of_scores, _ = evaluate(name, unit, scores, reading)
    np.testing.assert_allclose(np.asarray(of_scores).sum(axis=1), 0, atol=1e-6)
    moved, _, _ = evaluate(name, unit, scores + np.float32(3), reading)
    np.testing.assert_allclose(moved, each, rtol=1e-4, atol=1e-5)


@EVERY
def test_the_order_of_passages_and_of_queries_does_not_matter(name, unit):
    scores, reading = example()
    each, of_scores, _ = evaluate(name, unit, scores, reading)
    order = np.array([3, 0, 4, 1, 2])
    shuffled = Reading(reading.log_likelihood[:, order], reading.passages[:, order], reading.tokens)
    moved, of_moved, _ = evaluate(name, unit, scores[:, order], shuffled)
    np.testing.assert_allclose(moved, each, rtol=1e-5)
    np.testing.assert_allclose(of_moved, np.asarray(of_scores)[:, order], atol=1e-6)
    order = np.array([2, 3, 0, 1])
    moved, _, _ = evaluate(name, unit, scores[order], Reading(*(x[order] for x in reading)))
    np.testing.assert_allclose(moved, np.asarray(each)[order], rtol=1e-6)


@EVERY
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_what_is_masked_is_not_read(name, unit, junk):
    scores, reading = example()
    wanted = evaluate(name, unit, scores, reading)
    counts = reading.passages[:, :, None] & reading.tokens[:, None, :]
    soiled = reading._replace(
        log_likelihood=np.where(counts, reading.log_likelihood, junk).astype(np.float32)
    )
    found = evaluate(name, unit, np.where(reading.passages, scores, junk).astype("f"), soiled)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@EVERY
@pytest.mark.parametrize("mask", ["passages", "tokens"])
def test_all_masked(name, unit, mask):
    """A query without a passage, or without an answer, costs nothing and moves nothing."""
    scores, reading = example()
    getattr(reading, mask)[2] = False
    each, *gradients = evaluate(name, unit, scores, reading)
    assert each[2] == 0
    assert not any(np.any(np.asarray(gradient)[2]) for gradient in gradients)
    assert all(np.isfinite(x).all() for x in (each, *gradients))
    assert np.abs(np.asarray(each)[[0, 1, 3]]).min() > 0.01


@EVERY
def test_one_passage_leaves_nothing_to_choose(name, unit):
    scores, reading = example(passages=1)
    reading.passages[:] = True
    each, of_scores, of_reader = evaluate(name, unit, scores, reading)
    assert not np.any(of_scores)
    sums = np.where(reading.tokens, reading.log_likelihood[:, 0], 0).sum(axis=1)
    length = reading.tokens.sum(axis=1) if unit == "token" else 1
    wanted = 0 * sums if name == "pdist" else -sums / length
    np.testing.assert_allclose(each, wanted, rtol=1e-6)
    if name == "marginal":
        per_token = np.where(reading.tokens, -1 / np.broadcast_to(length, 4)[:, None], 0)
        np.testing.assert_allclose(of_reader[:, 0], per_token, rtol=1e-6)


@EVERY
def test_extreme_inputs(name, unit):
    scores, reading = example()
    for shift in (1e2, 1e4):
        wide = scores * np.float32(shift)
        low = reading._replace(log_likelihood=reading.log_likelihood * np.float32(1e4))
        for s, r in itertools.product((scores, wide), (reading, low)):
            assert all(np.isfinite(x).all() for x in evaluate(name, unit, s, r))


@EVERY
def test_falls_when_followed(name, unit):
    scores, reading = example()
    first, of_scores, of_reader = evaluate(name, unit, scores, reading)
    step = np.float32(0.05)
    moved = reading._replace(log_likelihood=reading.log_likelihood - step * of_reader)
    then, _, _ = evaluate(name, unit, scores - step * of_scores, moved)
    assert (np.asarray(then) < first).all()


def test_emdr2_is_marginal_but_for_the_stop_gradient():
    scores, reading = example()
    for unit in ("token", "sequence"):
        cut, both = (evaluate(name, unit, scores, reading) for name in ("emdr2", "marginal"))
        np.testing.assert_array_equal(cut[0], both[0])
        np.testing.assert_allclose(cut[1], both[1], rtol=1e-6)


def test_one_token_has_one_marginal():
    scores, reading = example(length=1)
    token = evaluate("marginal", "token", scores, reading)
    sequence = evaluate("marginal", "sequence", scores, reading)
    for a, b in zip(token, sequence, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_the_two_marginals_can_differ_in_sign():
    """A passage that tells all tokens but one helps every token, and not the answer."""
    likelihood = np.log([[[0.9, 0.9, 0.9, 1e-4], [0.3, 0.3, 0.3, 0.3]]]).astype(np.float32)
    reading = Reading(likelihood, np.ones((1, 2), bool), np.ones((1, 4), bool))
    scores = np.zeros((1, 2), np.float32)
    _, of_token, _ = evaluate("emdr2", "token", scores, reading)
    _, of_sequence, _ = evaluate("emdr2", "sequence", scores, reading)
    assert of_token[0, 0] < -0.03
    assert of_sequence[0, 0] > 0.25


def test_marginal_over_everything_is_the_marginal():
    """S(x) = all passages: P(o given x) by going through every passage and every answer."""
    rng = np.random.default_rng(0)
    vocabulary, passages, length = 3, 4, 2
    logits = rng.normal(size=(passages, vocabulary, vocabulary + 1))
    logits -= oracle.log_sum_exp(logits, axis=-1)[..., None]  # log P(next given previous, y)
    scores = rng.normal(size=passages)
    prior = np.exp(scores / 1.7 - oracle.log_sum_exp(scores / 1.7))
    total = 0.0
    for answer in itertools.product(range(vocabulary), repeat=length):
        before = (0, *answer[:-1])
        each = logits[:, before, answer]  # [K, T]
        wanted = (prior * np.exp(each.sum(axis=1))).sum()
        reading = Reading(
            each[None].astype(np.float32), np.ones((1, passages), bool), np.ones((1, length), bool)
        )
        loss, _, _ = evaluate("marginal", "sequence", scores[None].astype(np.float32), reading)
        assert loss[0] == pytest.approx(-math.log(wanted), rel=1e-5)
        total += math.exp(-loss[0])
    assert total < 1  # what is missing ends before it has `length` words


def test_fused():
    rng = np.random.default_rng(0)
    likelihood = -rng.exponential(size=(4, 5)).astype(np.float32)
    tokens = np.arange(5)[None] < np.array([[5], [2], [0], [1]])
    soiled = np.where(tokens, likelihood, np.nan).astype(np.float32)
    found, back = jax.vjp(lambda x: fused(x, jnp.asarray(tokens)), soiled)
    wanted = [
        -row[there].mean() if there.any() else 0
        for row, there in zip(likelihood, tokens, strict=True)
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    (gradient,) = back(jnp.ones(4))
    length = np.maximum(tokens.sum(axis=1, keepdims=True), 1)
    np.testing.assert_allclose(gradient, np.where(tokens, -1 / length, 0), rtol=1e-6)


def test_examples_in_docstrings():
    found = doctest.testmod(reader_losses)
    assert found.attempted >= 8
    assert not found.failed
