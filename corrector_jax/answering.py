"""Answers to the questions of a split, and how good they are beside what else could be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from corrector_jax import answers
from corrector_jax.job import Job
from corrector_jax.ranking import Measured, Ranking
from corrector_jax.reading import Questions
from corrector_jax.types import PyTree
from corrector_jax.writer import progress


class Answered(NamedTuple):
    """What a reader made of the passages that were found.

    Attributes:
      texts: Q answers.
      measured: "em", "f1" and "answer_recall@K".
    """

    texts: list[str]
    measured: Measured


def answer(
    job: Job, params: PyTree, split: str, found: Ranking, *, beat: Callable[[], None]
) -> Answered:
    """Answers the questions of a split from the best passages found.

    Args:
      job: the job, with a reader.
      params: the encoders' parameters, and the reader's.
      split: whose questions.
      found: [Q, k] passages, best first.
      beat: as `read` has it.

    Returns:
      The answers, and what they are worth.
    """
    rows = found.rows[:, : passages_read(job)]
    texts = read(job, params, split, rows, rows >= 0, beat=beat)
    accepted = job.data.splits[split].answers
    of_answers = answers.measure(texts, accepted)
    of_passages = answers.answer_recall(found, job.data.target_texts, accepted)
    return Answered(texts, of_answers.join(of_passages))


def compare(
    job: Job, params: PyTree, split: str, *, beat: Callable[[], None]
) -> dict[str, dict[str, float]]:
    """What the same reader answers from other passages than those found.

    Args:
      job: the job, with a reader.
      params: the encoders' parameters, and the reader's.
      split: whose questions.
      beat: as `read` has it.

    Returns:
      "em" and "f1" by what is read: "known_positives", "no_passage", the question alone, and
      "any_passages", as many uniform ones as are read otherwise.
    """
    queries, count = job.data.splits[split], passages_read(job)
    size = len(queries.texts)
    # One width, and so one program, for all of them.
    nothing = np.full((size, count), -1, np.int32)
    known = np.concatenate([job.data.known_positives(split), nothing], axis=1)[:, :count]
    drawn = np.random.default_rng([job.config.seed, 3]).integers(job.size, size=(size, count))
    read_by = {
        "known_positives": (known, known >= 0),
        "no_passage": (nothing, np.tile(np.arange(count) == 0, (size, 1))),
        "any_passages": (drawn.astype(np.int32), np.ones((size, count), bool)),
    }
    texts = {name: read(job, params, split, *rows, beat=beat) for name, rows in read_by.items()}
    return {name: answers.measure(found, queries.answers).metrics for name, found in texts.items()}


def passages_read(job: Job) -> int:
    """How many passages evaluations read for a question."""
    reader = job.config.reader
    return int(min(reader.read or reader.passages, job.size))


def read(
    job: Job,
    params: PyTree,
    split: str,
    rows: np.ndarray,
    there: np.ndarray,
    *,
    beat: Callable[[], None] = lambda: None,
) -> list[str]:
    """Answers the questions of a split from any passages.

    Args:
      job: the job, with a reader.
      params: the encoders' parameters, and the reader's.
      split: whose questions.
      rows: [Q, K] rows of passages; -1 reads the question alone.
      there: [Q, K] bool, False for what is not read at all.
      beat: called before each block of questions, by all processes equally often; what it raises
        ends the reading.

    Returns:
      Q answers.
    """
    questions = _questions(job)
    asked, place = questions.questions[split], job.place
    block = place.pad(max(1, job.config.eval.batch_size // rows.shape[1]))
    whole = (asked, rows.astype(np.int32), there)
    texts: list[str] = []
    with progress("answering", len(asked), "questions") as advance:
        for at in range(0, len(asked), block):
            beat()
            parts = [_filled(x[at : at + block], block) for x in whole]
            placed: Sequence[np.ndarray] = place.put(parts, place.examples)
            found = place.fetch(job.read_step(params["reader"], job.tables, *placed))
            some = found[: len(asked) - at]
            texts += [questions.text(row) for row in some]
            advance(len(some))
    return texts


def _questions(job: Job) -> Questions:
    if job.questions is None:
        raise ValueError("answering needs a job with a reader")
    return job.questions


def _filled(part: np.ndarray, count: int) -> np.ndarray:
    """The last block is filled up with copies of its last row."""
    return np.concatenate([part, np.repeat(part[-1:], count - len(part), axis=0)])
