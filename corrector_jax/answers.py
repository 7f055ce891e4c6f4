"""What a reader answered: exact match and F1; and whether the passages found hold an answer.

Answers are compared as SQuAD does (Rajpurkar et al. 2016): in lower case, without punctuation and
articles, blanks alike. Whether a passage holds one is decided as DPR does (Karpukhin et al. 2020):
the words of an answer stand in it one after another, whatever blanks are between them.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from corrector_jax.ranking import Measured, Ranking

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A run of letters, digits and marks is a word; so is any other sign that is seen.
_WORDS = Split(Regex(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]"), behavior="removed", invert=True)
_BETWEEN = "\n"  # no word holds it


def normalize(answer: str) -> str:
    """An answer as SQuAD compares it.

    Example:
      >>> normalize("The  Beatles'  <a> Day!")
      'beatles day'
    """
    bare = answer.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1 where a prediction is one of the answers, 0 elsewhere, both as `normalize` leaves them."""
    return float(normalize(prediction) in {normalize(answer) for answer in answers})


def f1(prediction: str, answers: Iterable[str]) -> float:
    """Harmonic mean of precision and recall over words, of the answer it is highest for.

    Where nothing is left of a prediction or of an answer, it is 1 if nothing is left of both.

    Example:
      >>> f1("the red brick house", ["a red house", "blue"])
      0.8
    """
    return max(
        (_overlap(normalize(prediction), normalize(answer)) for answer in answers), default=0.0
    )


def measure(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> Measured:
    """Exact match and F1 of many questions.

    Args:
      predictions: Q texts.
      answers: Q lists of what is right; where a list is empty, nothing is.

    Returns:
      Under "em" and "f1", means and values per question, [Q] float64.

    Raises:
      ValueError: the two differ in Q, or hold no question.
    """
    if len(predictions) != len(answers) or not predictions:
        raise ValueError(f"{len(predictions)} predictions cannot answer {len(answers)} questions.")
    pairs = list(zip(predictions, answers, strict=True))
    return _measured(
        {
            "em": np.array([exact_match(*pair) for pair in pairs]),
            "f1": np.array([f1(*pair) for pair in pairs]),
        }
    )


def has_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether a text holds the words of an answer one after another; case does not matter.

    Both are decomposed first (NFD), so that accents may be written either way. An answer without a
    word is held by nothing.

    Example:
      >>> has_answer("It rained in Łódź-Fabryczna.", ["łódź - fabryczna"])
      True
    """
    return _holds(_words(text), [_words(answer) for answer in answers])


def answer_recall(
    ranking: Ranking,
    target_texts: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    cutoffs: Sequence[int] = (1, 5, 20, 100),
) -> Measured:
    """For how many questions one of the best targets holds an answer.

    Args:
      ranking: [Q, k] targets, best first.
      target_texts: N texts by row; only those found are looked at.
      answers: Q lists of answers.
      cutoffs: how many of the best targets are looked at; more than k are k.

    Returns:
      Under "answer_recall@CUTOFF", means and values per question, [Q] float64.

    Raises:
      ValueError: the ranking and the answers differ in Q, or hold no question.
    """
    if len(ranking.rows) != len(answers) or not len(answers):
        raise ValueError(f"The ranking holds {len(ranking.rows)} questions, not {len(answers)}.")
    # Questions share targets; a text is split into words once.
    texts = {int(row): _words(target_texts[row]) for row in np.unique(ranking.rows) if row >= 0}
    hits = np.zeros((len(answers), max(cutoffs)), bool)
    for found, rows, accepted in zip(hits, ranking.rows.tolist(), answers, strict=True):
        wanted = [_words(answer) for answer in accepted]
        for rank, row in enumerate(rows[: len(found)]):
            found[rank] = row >= 0 and _holds(texts[row], wanted)
    held = np.maximum.accumulate(hits, axis=1).astype(np.float64)
    return _measured({f"answer_recall@{k}": held[:, k - 1] for k in cutoffs})


def _measured(per_question: dict[str, np.ndarray]) -> Measured:
    return Measured({name: float(x.mean()) for name, x in per_question.items()}, per_question)


def _overlap(prediction: str, answer: str) -> float:
    ours, theirs = Counter(prediction.split()), Counter(answer.split())
    words = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / words if words else 1.0


def _words(text: str) -> str:
    """Its words in lower case, each between two separators; empty where there is none."""
    pieces = _WORDS.pre_tokenize_str(unicodedata.normalize("NFD", text))
    return "".join(f"{word.lower()}{_BETWEEN}" for word, _ in pieces)


def _holds(text: str, answers: Iterable[str]) -> bool:
    return any(answer and _BETWEEN + answer in _BETWEEN + text for answer in answers)
