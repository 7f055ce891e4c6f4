"""What the tests hold the package against: docs/method.md, 1 to 5 written down in NumPy float64.

Nothing here looks at how the package computes. Below the formulas stand `Free`, the smallest dual
encoder (its embeddings are its parameters), and `jit`, for programs that are not tiny.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats
from scipy.special import erf

from corrector_jax.cache import TargetCache, TargetTokens
from corrector_jax.types import Array, Batch


def jit(function, *, heavy=False, **options):
    """`jax.jit`; `heavy` compiles a program that runs for long better than conftest.py asks for."""
    level = {"xla_backend_optimization_level": 1} if heavy else None
    return jax.jit(function, compiler_options=level, **options)


def f64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def log_sum_exp(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """-inf where there is nothing."""
    top = np.max(x, axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - top).sum(axis=axis)) + np.squeeze(top, axis)


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Unit vectors [*shape] float32."""
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def is_known(known: np.ndarray, size: int) -> np.ndarray:
    """[B, K] rows padded with -1 -> [B, N] bool, y in K_i."""
    mask = np.zeros((len(known), size), bool)
    for query, rows in enumerate(known):
        mask[query, rows[rows >= 0]] = True
    return mask


def linear(params, rows: np.ndarray, *, normalize: bool) -> np.ndarray:
    """c + W c + b of docs/method.md, 5, W = kernel^T."""
    out = rows + rows @ f64(params["kernel"]) + f64(params["bias"])
    return out / np.linalg.norm(out, axis=-1, keepdims=True) if normalize else out


def mlp(params, rows: np.ndarray, *, normalize: bool) -> np.ndarray:
    """c + W2 gelu(W1 c + b1) + b2 of docs/method.md, 5."""
    inner, outer = params["inner"], params["outer"]
    x = rows @ f64(inner["kernel"]) + f64(inner["bias"])
    x = 0.5 * x * (1 + erf(x / np.sqrt(2)))
    out = rows + x @ f64(outer["kernel"]) + f64(outer["bias"])
    return out / np.linalg.norm(out, axis=-1, keepdims=True) if normalize else out


def nystrom(params, rows: np.ndarray, *, normalize: bool) -> np.ndarray:
    """c + k(c, C_m) weights, k = exp(-|c - c'|^2 / (2 width^2)); in float64."""
    centers, weights = f64(params["landmarks"]), f64(params["weights"])
    square = np.square(rows[:, None] - centers[None]).sum(axis=-1)
    corrected = rows + np.exp(-square / (2 * float(params["width"]) ** 2)) @ weights
    return corrected / np.linalg.norm(corrected, axis=1, keepdims=True) if normalize else corrected


def proposal(queries, corrected, known, beta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Section 1: logits l_iy [B, N], log Z_i^- [B], log p_iy [B, N] (-inf where y in K_i)."""
    logits = beta * f64(queries) @ f64(corrected).T
    masked = np.where(is_known(np.asarray(known), logits.shape[1]), -np.inf, logits)
    log_z = log_sum_exp(masked)
    with np.errstate(invalid="ignore"):
        return logits, log_z, np.where(np.isfinite(masked), masked - log_z[:, None], -np.inf)


def dense_loss(positive: np.ndarray, scores: np.ndarray, known: np.ndarray) -> np.ndarray:
    """L_i of section 1: [B], [B, N], [B, N] bool -> [B]."""
    terms = np.where(known, -np.inf, f64(scores))
    return np.logaddexp(f64(positive), log_sum_exp(terms)) - f64(positive)


def dense_gradient(queries, targets, positive, known, beta: float) -> dict[str, np.ndarray]:
    """The gradient of mean_i L_i in the embeddings of queries [B, D] and targets [N, D]."""
    queries, targets = f64(queries), f64(targets)
    batch, size = len(queries), len(targets)
    labelled = np.zeros((batch, size), bool)
    labelled[np.arange(batch), positive] = True
    terms = beta * queries @ targets.T
    terms = np.where(is_known(np.asarray(known), size) & ~labelled, -np.inf, terms)
    by_score = (np.exp(terms - log_sum_exp(terms)[:, None]) - labelled) / batch
    return {"queries": beta * by_score @ targets, "targets": beta * by_score.T @ queries}


def kl(logits: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(softmax(logits) || softmax(other)) over the last axis, in nats; -inf is not there."""
    log_p = f64(logits) - log_sum_exp(f64(logits))[..., None]
    log_q = f64(other) - log_sum_exp(f64(other))[..., None]
    p = np.exp(log_p)
    return np.where(p > 0, p * (np.where(p > 0, log_p, 0) - np.where(p > 0, log_q, 0)), 0).sum(-1)


def chi_square(counts: np.ndarray, probability: np.ndarray) -> float:
    """The p-value of counts [n] under probabilities [n]; rare outcomes are pooled."""
    expected = probability * counts.sum()
    seen, hoped = [0.0], [0.0]
    for outcome in np.argsort(expected):
        if hoped[-1] >= 10:
            seen, hoped = [*seen, 0.0], [*hoped, 0.0]
        seen[-1] += counts[outcome]
        hoped[-1] += expected[outcome]
    observed, awaited = np.array(seen), np.array(hoped)
    return float(stats.chi2.sf(((observed - awaited) ** 2 / awaited).sum(), len(awaited) - 1))


@dataclasses.dataclass(frozen=True)
class Free:
    """A dual encoder whose embeddings are its parameters: a text is the number of its row.

    Parameters are {"queries": [_, D], "targets": [N, D]}; tokens are [_, 1].
    """

    learn_beta = False

    def encode_queries(self, params, tokens: Array) -> Array:
        return params["queries"][jnp.asarray(tokens)[:, 0].astype(jnp.int32)]

    def encode_targets(self, params, tokens: Array) -> Array:
        return params["targets"][jnp.asarray(tokens)[:, 0].astype(jnp.int32)]


def filled(rows: np.ndarray, place, *, block_rows: int, dtype="float32", pad=7.0) -> TargetCache:
    """A cache that holds these rows [N, D], padded with rows of `pad`."""
    size, dim = rows.shape
    held = np.full((place.pad(size, block_rows), dim), pad, np.float32)
    held[:size] = rows
    written = np.where(np.arange(len(held)) < size, 0, -1).astype(np.int32)
    return TargetCache(
        embeddings=place.put_rows(np.asarray(jnp.asarray(held, dtype))),
        scale=None,
        written_at=place.put_rows(written),
        size=size,
    )


def with_lengths(cache: TargetCache, corrector, psi, place) -> TargetCache:
    """The cache with the lengths of a linear corrector as NumPy finds them, if it has any."""
    if not corrector.has_lengths:
        return cache
    rows = f64(jax.device_get(cache.embeddings))
    moved = np.linalg.norm(linear(psi.params, rows, normalize=False), axis=1)
    lengths = np.where(float(psi.gate) > 0, moved, 1.0).astype(np.float32)
    return dataclasses.replace(cache, lengths=place.put_rows(lengths))


def row_numbers(size: int, place, *, block_rows: int) -> TargetTokens:
    """The token table of `Free`: row y holds y."""
    rows = place.pad(size, block_rows)
    ids = np.where(np.arange(rows) < size, np.arange(rows), 0).astype(np.uint16)
    return TargetTokens(ids=place.put_rows(ids[:, None]), size=size, fingerprint="")


def batch_of(known: list[list[int]], *, width: int = 3, valid: list[bool] | None = None) -> Batch:
    """A batch of the queries 0, 1, ... of `Free`; the first known positive is the labelled one."""
    table = np.array([rows + [-1] * (width - len(rows)) for rows in known], np.int32)
    number = np.arange(len(known), dtype=np.int32)
    there = np.ones(len(known), bool) if valid is None else np.array(valid)
    return Batch(number[:, None], table[:, 0].copy(), table, there)
