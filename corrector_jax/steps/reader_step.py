"""Training a retriever through the answers of a reader (docs/method.md, 9).

`answer_step` is `train_step` where no positive is labelled: what is drawn is read, and how well
each passage explains the answer is what the retriever learns. `given_step` comes before it: a
reader learns to read on passages that are given to it, and nothing else moves. `read_step` answers.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from corrector_jax import cache as caches
from corrector_jax import reader_losses
from corrector_jax.cache import TargetCache, TargetTokens
from corrector_jax.losses import Pool
from corrector_jax.metrics import Mean, mean
from corrector_jax.models.dual_encoder import DualEncoder
from corrector_jax.models.reader import Passages, Reader, pack
from corrector_jax.negatives import Gated, Uniform
from corrector_jax.reader_losses import Reading, RetrieverLoss
from corrector_jax.sharding import Placement
from corrector_jax.state import TrainState
from corrector_jax.steps import selection
from corrector_jax.steps.method import Method, drift_pairs, learn_drift, settle
from corrector_jax.steps.selection import Selected
from corrector_jax.types import Array, ArrayLike, Batch, PyTree


class Tables(NamedTuple):
    """The corpus as tokens, twice where the two read different ones.

    Attributes:
      targets: as the encoders read it.
      passages: as the reader does.
    """

    targets: TargetTokens
    passages: TargetTokens


@dataclasses.dataclass(frozen=True)
class Answering:
    """How answers train: values and functions, as `Method`.

    Attributes:
      reader: the reader; its parameters are those of the state under "reader".
      loss: what the retriever learns by, one of `reader_losses.RETRIEVER_LOSSES`.
      fused: weight of the reader's own loss, all passages at once; 0 = none.
      passages: K, passages read for a question.
      passage_len: tokens read of a passage.
      given: passages a question is given before the retriever learns: a known positive, and for
        the rest uniform ones.
      learns: whether any loss moves the reader once passages are retrieved.
    """

    reader: Reader
    loss: RetrieverLoss
    fused: float
    passages: int
    passage_len: int
    given: int = 1
    learns: bool = True


def read(
    tree: PyTree,
    tables: Tables,
    question: ArrayLike,
    ids: Array,
    there: Array,
    *,
    answering: Answering,
    place: Placement,
) -> Passages:
    """Reads passages, each after the question.

    Args:
      tree: the reader's parameters.
      tables: the token tables.
      question: [B, T] int32.
      ids: [B, K] int32 rows; -1 reads the question alone.
      there: [B, K] bool, False for what is not read at all.
      answering: how.
      place: the mesh.

    Returns:
      The passages as the reader's encoder leaves them.
    """
    pad = answering.reader.config.encoder.pad_id
    rows = caches.take_tokens(tables.passages, ids.reshape(-1), place)
    text = rows[:, : answering.passage_len].reshape(*ids.shape, -1)
    text = pack(question, jnp.where((ids >= 0)[:, :, None], text, pad), pad_id=pad)
    text = place.split(jnp.where(there[:, :, None], text, pad))
    with jax.named_scope("reader"):
        return answering.reader.encode(tree, text)


def answer_loss(
    params: PyTree,
    psi: Gated,
    cache: TargetCache | None,
    tables: Tables,
    batch: Batch,
    key: Array,
    *,
    model: DualEncoder,
    answering: Answering,
    method: Method,
    place: Placement,
) -> tuple[Array, tuple[Selected, Pool, Array, dict[str, Mean]]]:
    """The loss of the answers: differentiable in `params`, constant in `psi` and `cache`.

    Args:
      params: the encoders' parameters, and the reader's under "reader".
      psi: the corrector as selection uses it.
      cache: the cache, or None.
      tables: the token tables.
      batch: the batch, with what is asked; its positives are not read.
      key: this step's key for drawing.
      model: the dual encoder.
      answering: how answers train.
      method: the strategy.
      place: the mesh.

    Returns:
      The mean over valid queries of the retriever's loss and the reader's (scalar, nats), and what
      it was made of: the passages, their pool, the queries [B, D], and metrics.
    """
    if batch.asked is None:
        raise ValueError("learning from answers needs a batch that asks for some")
    psi = jax.lax.stop_gradient(psi)
    queries = model.encode_queries(params, batch.query_tokens)
    chosen = selection.retrieve(
        params, queries, psi, cache, tables.targets, batch, key,
        model=model, proposal=method.proposal, count=answering.passages, place=place,
    )  # fmt: skip
    scores = method.beta * jnp.einsum(
        "bd,bkd->bk", queries, chosen.fresh, precision=jax.lax.Precision.HIGHEST
    )
    valid, answer = jnp.asarray(batch.valid), jnp.asarray(batch.asked.answer)
    here = (answer != answering.reader.config.encoder.pad_id) & valid[:, None]
    tree, reader = params["reader"], answering.reader
    if not answering.learns:
        tree = jax.lax.stop_gradient(tree)
    passages = read(
        tree, tables, batch.asked.question, chosen.ids, chosen.there,
        answering=answering, place=place,
    )  # fmt: skip
    with jax.named_scope("reader"):
        alone = reader.each(tree, passages, answer)
        together = reader.fused(tree, passages, answer) if answering.fused else None
    reading = Reading(alone, chosen.there, here)
    each = answering.loss(scores, reading)
    measured = {"retriever_loss": mean(each, valid), "agreement": _agreement(scores, reading)}
    if together is not None:
        of_reader = reader_losses.fused(together, here)
        measured["reader_loss"] = mean(of_reader, valid)
        each += answering.fused * of_reader
    loss = jnp.sum(jnp.where(valid, each, 0.0)) / jnp.maximum(valid.sum(), 1)
    pool = Pool(chosen.ids, scores, jnp.zeros_like(scores), chosen.there)
    return loss, (chosen, pool, queries, measured)


def answer_step(
    state: TrainState,
    cache: TargetCache | None,
    tables: Tables,
    batch: Batch,
    key: Array,
    *,
    model: DualEncoder,
    answering: Answering,
    method: Method,
    tx: optax.GradientTransformation,
    corrector_tx: optax.GradientTransformation,
    place: Placement,
) -> tuple[TrainState, TargetCache | None, dict[str, Mean]]:
    """One step of learning from answers.

    Args:
      state: the training state; donate it.
      cache: the cache, split by row; donate it. None for strategies without one.
      tables: the token tables, static.
      batch: queries [B, T] as the encoders and as the reader read them, and an answer each.
      key: this step's key.
      model: the dual encoder.
      answering: how answers train.
      method: the strategy.
      tx: the optimizer of the encoders and the reader.
      corrector_tx: the corrector's optimizer.
      place: the mesh.

    Returns:
      As `train_step`; among the metrics "retriever_loss" and, where the reader has a loss of its
      own, "reader_loss", the parts of the loss, and "agreement", how often the retriever's best
      passage is the one that explains the answer best.
    """
    draw_key, uniform_key = jax.random.split(key)
    (loss, made_of), grads = jax.value_and_grad(answer_loss, has_aux=True)(
        state.params, state.corrector.gated, cache, tables, batch, draw_key,
        model=model, answering=answering, method=method, place=place,
    )  # fmt: skip
    chosen, pool, queries, measured = made_of
    with jax.named_scope("update_encoders"):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    norms = _norms(grads)
    measured |= norms | {"loss": Mean(loss, jnp.float32(1.0))}
    if model.learn_beta:
        beta = method.beta * model.beta_ratio(state.params)
        measured["beta"] = Mean(beta, jnp.float32(1.0))
    corrector = state.corrector
    if cache is not None:
        pairs, of_drift = drift_pairs(
            state, cache, tables.targets, chosen, uniform_key,
            model=model, method=method, place=place,
        )  # fmt: skip
        measured |= of_drift
        corrector = learn_drift(
            corrector, queries, chosen, pool, pairs, method=method, tx=corrector_tx
        )
    new = TrainState(state.step, params, opt_state, corrector)
    kept, finite, measured["skipped"] = settle(new, state, loss + norms["grad_norm"].total)
    if cache is not None:
        cache = method.cache_policy.update(
            cache, state.params, tables.targets, chosen, state.step, finite
        )
    return kept, cache, measured


def given_loss(
    tree: PyTree,
    tables: Tables,
    batch: Batch,
    key: Array,
    *,
    answering: Answering,
    place: Placement,
) -> Array:
    """The reader's own loss on passages that are given to it.

    Args:
      tree: the reader's parameters.
      tables: the token tables.
      batch: the batch, with known positives and what is asked.
      key: for the uniform passages beside the positive.
      answering: how answers train.
      place: the mesh.

    Returns:
      The mean over valid queries, scalar, in nats per token.
    """
    if batch.asked is None:
        raise ValueError("learning to answer needs a batch that asks")
    others = Uniform(answering.given - 1, tables.targets.size)
    unused = Gated({}, jnp.float32(0.0))
    drawn = others.draw(jnp.asarray(batch.query_tokens), unused, None, batch, key)
    positive, valid = jnp.asarray(batch.positive)[:, None], jnp.asarray(batch.valid)
    ids = jnp.concatenate([positive, drawn.ids], axis=1)
    there = jnp.concatenate([jnp.ones_like(positive, bool), drawn.valid], axis=1)
    passages = read(
        tree, tables, batch.asked.question, ids, there & valid[:, None],
        answering=answering, place=place,
    )  # fmt: skip
    answer = jnp.asarray(batch.asked.answer)
    here = (answer != answering.reader.config.encoder.pad_id) & valid[:, None]
    with jax.named_scope("reader"):
        together = answering.reader.fused(tree, passages, answer)
    each = reader_losses.fused(together, here)
    return jnp.sum(jnp.where(valid, each, 0.0)) / jnp.maximum(valid.sum(), 1)


def given_step(
    state: TrainState,
    cache: TargetCache | None,
    tables: Tables,
    batch: Batch,
    key: Array,
    *,
    answering: Answering,
    tx: optax.GradientTransformation,
    place: Placement,
) -> tuple[TrainState, TargetCache | None, dict[str, Mean]]:
    """One step of learning to read: nothing is retrieved, and only the reader moves.

    Args:
      state: the training state; donate it.
      cache: the cache, or None; it is returned as it is.
      tables: the token tables, static.
      batch: queries [B, T], their positives [B], and an answer each.
      key: this step's key.
      answering: how answers train.
      tx: the optimizer, which holds the encoders as they are.
      place: the mesh.

    Returns:
      As `answer_step`.
    """

    def loss_of(params: PyTree) -> Array:
        return given_loss(params["reader"], tables, batch, key, answering=answering, place=place)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    with jax.named_scope("update_encoders"):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    norms, one = _norms(grads), jnp.float32(1.0)
    measured = norms | {"loss": Mean(loss, one), "reader_loss": Mean(loss, one)}
    new = TrainState(state.step, params, opt_state, state.corrector)
    kept, _, measured["skipped"] = settle(new, state, loss + norms["grad_norm"].total)
    return kept, cache, measured


def read_step(
    tree: PyTree,
    tables: Tables,
    question: Array,
    ids: Array,
    there: Array,
    *,
    answering: Answering,
    length: int,
    beams: int,
    place: Placement,
) -> Array:
    """Answers questions.

    Args:
      tree: the reader's parameters.
      tables: the token tables.
      question: [b, T] int32.
      ids: [b, K] int32 rows of passages; -1 reads the question alone.
      there: [b, K] bool, False for what is not read at all.
      answering: how.
      length: tokens of an answer, its end included.
      beams: how many answers are followed at once; 1 is greedy.
      place: the mesh.

    Returns:
      [b, length] int32: an answer, its end where it came to one, padding.
    """
    passages = read(tree, tables, question, ids, there, answering=answering, place=place)
    return answering.reader.answer(tree, passages, length=length, beams=beams)


def _norms(grads: PyTree) -> dict[str, Mean]:
    one = jnp.float32(1.0)
    norms = {"grad_norm": grads, "reader_grad_norm": grads["reader"]}
    return {name: Mean(optax.tree.norm(tree), one) for name, tree in norms.items()}


def _agreement(scores: Array, reading: Reading) -> Mean:
    """How often the passage of the best score is the one that explains the answer best."""
    liking = jnp.where(reading.tokens[:, None, :], reading.log_likelihood, 0.0).sum(axis=2)
    best, liked = (
        jnp.argmax(jnp.where(reading.passages, x, -jnp.inf), axis=1) for x in (scores, liking)
    )
    asked = reading.passages.any(axis=1) & reading.tokens.any(axis=1)
    return mean((best == liked).astype(jnp.float32), asked)
