"""The reader: T5 that answers a question from K passages (docs/method.md, 9).

Passages are encoded one by one. Fused in the decoder (Izacard and Grave 2021), it looks at all of
them at once; each on its own, it says how likely the answer is given that passage alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from corrector_jax.models import decoding
from corrector_jax.models.dual_encoder import Encode
from corrector_jax.models.family import Axes, Place, check_sizes, number, only
from corrector_jax.models.t5 import T5, Memory, T5Config, T5Decoder
from corrector_jax.types import Array, ArrayLike, PyTree, UserError

_BIAS = 2.0
"""Standard deviation of the first position biases: a head gives most of its weight to a few."""


@dataclass(frozen=True)
class ReaderConfig:
    """The sizes of a T5 with both halves.

    Attributes:
      encoder: the sizes of the encoder, and of the decoder but for its number of layers.
      decoder_layers: how many layers the decoder has.
      tied: whether the table of words is the head too (1.0), or the head is its own (1.1).
      scaled: whether states are multiplied by D^-1/2 before the head (1.0), or not (1.1).
      start_id: the token an answer is read to begin with.
      end_id: the token that ends an answer.

    Raises:
      UserError: a size is not positive, or a token is none of the vocabulary's.
    """

    encoder: T5Config
    decoder_layers: int
    tied: bool = True
    scaled: bool = True
    start_id: int = 0
    end_id: int = 1

    def __post_init__(self) -> None:
        check_sizes(self, heads=False)
        for name, token in (("start", self.start_id), ("end", self.end_id)):
            if not 0 <= token < self.encoder.vocab_size:
                raise UserError(
                    f"The reader's config.json begins or ends answers with token {token} ({name}), "
                    f"but it has {self.encoder.vocab_size}; give config and weights of one model."
                )

    @property
    def num_layers(self) -> int:
        """How many layers, of both halves."""
        return self.encoder.num_layers + self.decoder_layers

    @classmethod
    def read(cls, published: Mapping[str, Any], *, tied: bool) -> Self:
        """The sizes in a `config.json` of model_type t5.

        Args:
          published: the content of `config.json`.
          tied: whether the published weights have no head of their own, which the file leaves open.

        Raises:
          UserError: it is of an encoder alone, or of another form than ours, or a key is no number.
        """
        only(published, "is_encoder_decoder", True, default=True)
        encoder = T5Config.read(published)
        # Files that do not say scale where the head is tied, whatever the weights are.
        scaled = published.get("tie_word_embeddings", True) is not False
        return cls(
            encoder=encoder,
            decoder_layers=number(published, "num_decoder_layers", default=encoder.num_layers),
            tied=tied,
            scaled=published.get("scale_decoder_outputs", scaled) is not False,
            start_id=number(published, "decoder_start_token_id", default=encoder.pad_id),
            end_id=number(published, "eos_token_id", default=1),
        )

    def write(self) -> dict[str, Any]:
        """The keys of `config.json`; its model_type is the caller's."""
        return {
            **self.encoder.write(),
            "is_encoder_decoder": True,
            "num_decoder_layers": self.decoder_layers,
            "tie_word_embeddings": self.tied,
            "scale_decoder_outputs": self.scaled,
            "decoder_start_token_id": self.start_id,
            "eos_token_id": self.end_id,
        }

    def axes(self) -> Axes:
        """What the axes of the large parameters are, of both halves."""
        head: Axes = {} if self.tied else {"head": (None, "width")}
        return {**self.encoder.axes(), **head}

    def places(self) -> Iterator[Place]:
        """Every parameter of a `Reader`."""
        # Some conversions publish the table of words once for each of its uses.
        copies = ("decoder.embed_tokens.weight", *["lm_head.weight"] * self.tied)
        for place in self.encoder.places():
            path = ("encoder", *place.path)
            more = copies if place.path == ("word",) else ()
            yield dataclasses.replace(place, path=path, copies=more)
        for place in self.encoder.decoder_places(self.decoder_layers):
            yield dataclasses.replace(place, path=("decoder", *place.path))
        if not self.tied:
            shape = (self.encoder.vocab_size, self.encoder.hidden_size)
            yield Place(("head",), "lm_head.weight", shape)


def pack(question: ArrayLike, passages: ArrayLike, *, pad_id: int) -> Array:
    """Question and passage as one text each, without padding in between.

    Positions are relative: padding between the two would put a passage further away the shorter
    the question is.

    Args:
      question: [B, T] of any integer dtype, padded.
      passages: [B, K, T'] likewise.
      pad_id: what fills rows up.

    Returns:
      [B, K, T + T'] int32: the question's tokens, the passage's, padding.

    Example:
      >>> pack(jnp.array([[7, 8, 0]]), jnp.array([[[5, 6], [4, 0]]]), pad_id=0).tolist()
      [[[7, 8, 5, 6, 0], [7, 8, 4, 0, 0]]]
    """
    question, passages = (jnp.asarray(x, jnp.int32) for x in (question, passages))
    width, more = question.shape[1], passages.shape[2]
    asked = (question != pad_id).sum(axis=1)[:, None, None]
    place = jnp.arange(width + more)[None, None, :]
    first = jnp.pad(question, ((0, 0), (0, more)), constant_values=pad_id)[:, None, :]
    at = jnp.broadcast_to(place - asked, (*passages.shape[:2], width + more))
    second = jnp.take_along_axis(passages, jnp.clip(at, 0, more - 1), axis=2)
    return jnp.where(place < asked, first, jnp.where(at < more, second, pad_id))


class Passages(NamedTuple):
    """Passages as the encoder leaves them.

    Attributes:
      states: [B, K, S, D] in the reader's dtype.
      here: [B, K, S] bool, False for padding; a passage without a token takes no part.
    """

    states: Array
    here: Array


@dataclass(frozen=True)
class Reader:
    """Parameters go in and likelihoods or answers come out; nothing is held here.

    There is no dropout: what is read with passages fused and each on its own may share one
    `encode`.

    Attributes:
      config: the sizes.
      dtype: what dense layers and attention compute in; parameters, softmax, norms, the residual
        sum and likelihoods are float32 always.
      wrap: what encoding, (parameters, tokens [n, S]) -> states [n, S, D], is put through before it
        is applied, as for `DualEncoder`: memory and placement, never results.
    """

    config: ReaderConfig
    dtype: DTypeLike = jnp.float32
    wrap: Callable[[Encode], Encode] = lambda encode: encode

    def init(self, key: Array) -> PyTree:
        """Random parameters, float32: `encoder`, those of `T5`, `decoder`, and `head` if untied.

        Two things differ from T5's own start. Attention to passages puts out what it takes in: its
        output is the transpose of its value, which is orthogonal (after Trockman and Kolter 2023).
        And position biases are large, so that every head looks at distances of its own. With both
        a reader learns within some hundred steps to copy an answer out of a passage; with one of
        them it does not (`python -m benchmarks.reader_start`).
        """
        tokens = jnp.zeros((1, 1), jnp.int32)
        params: PyTree = self._module().init(key, tokens, tokens)["params"]
        keys = iter(jax.random.split(jax.random.fold_in(key, 1), 2 + self.config.decoder_layers))
        for half in ("encoder", "decoder"):
            table = params[half]["position_bias"]
            params[half]["position_bias"] = _BIAS * jax.random.normal(next(keys), table.shape)
        for layer in range(self.config.decoder_layers):
            cross = params["decoder"][f"layer_{layer}"]["cross"]
            value = nn.initializers.orthogonal()(next(keys), cross["value"]["kernel"].shape)
            cross["value"]["kernel"], cross["output"]["kernel"] = value, value.T
        return params

    def encode(self, params: PyTree, tokens: ArrayLike) -> Passages:
        """Encodes passages, each by itself.

        Args:
          params: the tree of `init`.
          tokens: [B, K, S] of any integer dtype, padded: the question and a passage, as one text.

        Returns:
          Their states, for the other methods.

        Raises:
          ValueError: S is larger than the `max_positions` of the encoder.
        """
        tokens = jnp.asarray(tokens)
        encode = self.wrap(functools.partial(self._call, "encode"))
        states = encode(params, tokens.reshape(-1, tokens.shape[-1]))
        here = tokens != self.config.encoder.pad_id
        return Passages(states.reshape(*tokens.shape, -1), here)

    def logits(self, params: PyTree, passages: Passages, answers: ArrayLike) -> Array:
        """Of every word at every place of an answer, all passages fused.

        Args:
          params: the tree of `init`.
          passages: K passages of each of B questions.
          answers: [B, T] of any integer dtype: an answer, its end token, padding.

        Returns:
          [B, T, V] float32; place t has read the answer's tokens before t.
        """
        return self._call("logits", params, *_fuse(passages), answers)

    def fused(self, params: PyTree, passages: Passages, answers: ArrayLike) -> Array:
        """Log-likelihood of each token of the answers, given all passages at once.

        Args:
          params: the tree of `init`.
          passages: K passages of each of B questions.
          answers: [B, T] of any integer dtype: an answer, its end token, padding.

        Returns:
          [B, T] float32 log P(o_t given o_<t, x, y_1..y_K); 0 at padding.
        """
        return self._log_likelihood(params, *_fuse(passages), jnp.asarray(answers))

    def each(self, params: PyTree, passages: Passages, answers: ArrayLike) -> Array:
        """Log-likelihood of each token of the answers, given each passage alone.

        Args:
          params: the tree of `init`.
          passages: K passages of each of B questions.
          answers: [B, T] of any integer dtype: an answer, its end token, padding.

        Returns:
          [B, K, T] float32 log P(o_t given o_<t, x, y_k); 0 at padding, without meaning for a
          passage that takes no part.
        """
        states, here = passages
        batch, count, length = here.shape
        found = self._log_likelihood(
            params,
            states.reshape(batch * count, length, -1),
            here.reshape(batch * count, length),
            jnp.repeat(jnp.asarray(answers), count, axis=0),
        )
        return found.reshape(batch, count, -1)

    def answer(self, params: PyTree, passages: Passages, *, length: int, beams: int = 1) -> Array:
        """Answers questions, all passages fused: by beam search, or greedily with one beam.

        Args:
          params: the tree of `init`.
          passages: K passages of each of B questions.
          length: T, how many tokens an answer may have, its end included.
          beams: how many answers are followed at once; 1 is greedy.

        Returns:
          [B, T] int32: an answer, its end token where it came to one, padding.
        """
        c = self.config
        states, here = _fuse(passages)
        memories = self._call("memories", params, states)
        past = self._call("start", params, here.shape[0], beams, length)

        def step(tokens: Array, past: PyTree, place: Array) -> tuple[Array, PyTree]:
            found: tuple[Array, PyTree] = self._call(
                "step", params, tokens, past, memories, here, place
            )
            return found

        symbols = decoding.Symbols(c.start_id, c.end_id, c.encoder.pad_id)
        search = functools.partial(decoding.beam, beams=beams) if beams > 1 else decoding.greedy
        return search(step, past, batch=here.shape[0], length=length, symbols=symbols)

    def _log_likelihood(self, params: PyTree, states: Array, here: Array, answers: Array) -> Array:
        """[B, S, D], [B, S], [B, T] -> [B, T]."""
        logits = self._call("logits", params, states, here, answers)
        chosen = jnp.take_along_axis(logits, answers[:, :, None], axis=-1)[:, :, 0]
        found = chosen - jax.nn.logsumexp(logits, axis=-1)
        return jnp.where(answers != self.config.encoder.pad_id, found, 0.0)

    def _call(self, method: str, params: PyTree, *arguments: Any) -> Any:
        return self._module().apply({"params": params}, *arguments, method=method)

    def _module(self) -> _Module:
        return _Module(self.config, self.dtype)


def _fuse(passages: Passages) -> tuple[Array, Array]:
    """[B, K, S, D], [B, K, S] -> [B, K * S, D], [B, K * S]: one after another."""
    states, here = passages
    batch, count, length = here.shape
    return states.reshape(batch, count * length, -1), here.reshape(batch, count * length)


class _Module(nn.Module):
    """Both halves of T5 and its head; what `Reader` is made of."""

    config: ReaderConfig
    dtype: DTypeLike

    def setup(self) -> None:
        c = self.config
        width = c.encoder.hidden_size
        self.encoder = T5(c.encoder, self.dtype)
        self.decoder = T5Decoder(c.encoder, c.decoder_layers, self.dtype)
        if not c.tied:
            start = nn.initializers.normal(width**-0.5)
            self.head = self.param("head", start, (c.encoder.vocab_size, width))

    def __call__(self, tokens: Array, answers: Array) -> Array:
        return self.logits(self.encode(tokens), tokens != self.config.encoder.pad_id, answers)

    def encode(self, tokens: Array) -> Array:
        return self.encoder(tokens)

    def memories(self, states: Array) -> list[Memory]:
        return self.decoder.memories(states)

    def start(self, batch: int, beams: int, length: int) -> list[Memory]:
        return self.decoder.start(batch, beams, length)

    def logits(self, states: Array, here: Array, answers: ArrayLike) -> Array:
        # Each place reads the token before it.
        answers = jnp.asarray(answers)
        first = jnp.full_like(answers[:, :1], self.config.start_id)
        x = self._embed(jnp.concatenate([first, answers[:, :-1]], axis=1))
        return self._head(self.decoder(x, self.memories(states), here))

    def step(
        self, tokens: Array, past: list[Memory], memories: list[Memory], here: Array, place: Array
    ) -> tuple[Array, list[Memory]]:
        x, past = self.decoder.step(self._embed(tokens), past, memories, here, place)
        return self._head(x), past

    def _embed(self, tokens: Array) -> Array:
        return jnp.take(self.encoder.word, tokens, axis=0)

    def _head(self, x: Array) -> Array:
        """[B, T, D] float32 -> logits [B, T, V] float32."""
        table = self.encoder.word if self.config.tied else self.head
        if self.config.scaled:
            x = x * x.shape[-1] ** -0.5
        flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        logits = jax.lax.dot_general(
            flat,
            table.astype(self.dtype),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return logits.reshape(*x.shape[:-1], -1)
