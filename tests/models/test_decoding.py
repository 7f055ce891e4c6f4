"""Both searches against ones in plain Python that keep whole texts, over random tables."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from corrector_jax.models import decoding
from tests import oracle

WORDS, LENGTH, BATCH = 9, 6, 200
SYMBOLS = decoding.Symbols(start=3, end=1, pad=0)


def table(seed: int, end: float) -> np.ndarray:
    """[B, T, V, V, V] float32 log P of the next word given the two before it, which end or not."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(BATCH, LENGTH, WORDS, WORDS, WORDS))
    # Surer at the beginning: a text that ends there may be better than all that go on.
    logits *= np.linspace(3, 0.3, LENGTH)[:, None, None, None]
    logits[..., SYMBOLS.end] += end
    return (logits - oracle.log_sum_exp(logits, axis=-1)[..., None]).astype(np.float32)


def step_of(logits):
    """A step whose past is the word before: what comes out shows whose past it was.

    Its logits are no log-probabilities: they are off by what differs from text to text.
    """

    def step(tokens, past, place):
        rows = jnp.arange(BATCH)[:, None]
        found = jnp.asarray(logits)[rows, place, past, tokens]
        return found + tokens[:, :, None].astype(jnp.float32), tokens

    return step


def next_words(logits, text):
    """[V] log P of what comes after a text."""
    before = (SYMBOLS.start, SYMBOLS.start, *text)[-2:]
    return logits[(len(text), *before)]


def padded(texts):
    return [[*text, *[SYMBOLS.pad] * (LENGTH - len(text))] for text in texts]


def greedily(logits):
    text = []
    while len(text) < LENGTH and SYMBOLS.end not in text:
        text.append(int(next_words(logits, text).argmax()))
    return text


def with_beams(logits, beams):
    """The search transformers does by default, one question and one text at a time."""
    running, ended = [(0.0, ())], []
    while running:
        following = [
            (score + float(p), (*text, word))
            for score, text in running
            for word, p in enumerate(next_words(logits, text))
        ]
        following = sorted(following, reverse=True)[: 2 * beams]

        def over(text):
            return text[-1] == SYMBOLS.end or len(text) == LENGTH

        ended += [(s / len(text), text) for s, text in following[:beams] if over(text)]
        ended = sorted(ended, reverse=True)[:beams]
        running = [(s, text) for s, text in following if not over(text)][:beams]
        if len(ended) == beams and running:
            best, text = running[0]
            if best / len(text) <= ended[-1][0]:
                break
    return ended[0][1]


def start(beams):
    return jnp.full((BATCH, beams), SYMBOLS.start, jnp.int32)


@pytest.mark.parametrize("end", [-1.0, 2.0])
def test_greedy(end):
    logits = table(0, end)
    found = oracle.jit(
        lambda: decoding.greedy(
            step_of(logits), start(1), batch=BATCH, length=LENGTH, symbols=SYMBOLS
        )
    )()
    assert found.dtype == jnp.int32
    texts = [greedily(each) for each in logits]
    assert len({len(text) for text in texts}) > 2
    assert found.tolist() == padded(texts)


def search(logits, beams):
    return oracle.jit(
        lambda: decoding.beam(
            step_of(logits), start(beams), batch=BATCH, beams=beams, length=LENGTH, symbols=SYMBOLS
        )
    )()


@pytest.mark.parametrize(("beams", "end"), [*itertools.product([2, 3, 4], [-1.0, 1.0, 3.0])])
def test_beam(beams, end):
    logits = table(beams, end)
    texts = [with_beams(each, beams) for each in logits]
    assert len({len(text) for text in texts}) > 2
    assert search(logits, beams).tolist() == padded(texts)
    assert any(list(text) != greedily(each) for text, each in zip(texts, logits, strict=True))


def test_a_question_does_not_depend_on_the_others():
    """Nor on how long they take: the loop goes on until the last of them is over."""
    logits = table(0, 2.0)
    alone = search(logits, 3)
    mixed = logits.copy()
    mixed[1:] = table(5, -9.0)[1:]
    np.testing.assert_array_equal(search(mixed, 3)[0], alone[0])
