"""Exact match, F1 and answer recall, on cases worked out by hand."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from corrector_jax import answers
from corrector_jax.answers import answer_recall, exact_match, f1, has_answer, measure, normalize
from corrector_jax.ranking import Ranking


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The Beatles", "beatles"),
        ("  an\tapple \n a day ", "apple day"),
        ("Theory of a theatre", "theory of theatre"),  # articles are words
        ("U.S.A.", "usa"),
        ("don't (stop)", "dont stop"),
        ("a-b", "ab"),  # the sign goes first, and what it parted is no article then
        ("«Ça», naïve – 50 %", "«ça» naïve – 50"),  # punctuation is that of ASCII
        ("ÉTÉ", "été"),
        ("the a an", ""),
        ("!?", ""),
    ],
)
def test_normalize(text, wanted):
    assert normalize(text) == wanted


@pytest.mark.parametrize(
    ("prediction", "accepted", "wanted"),
    [
        ("the Eiffel Tower!", ["Eiffel tower"], 1),
        ("Eiffel tower in Paris", ["Eiffel tower"], 0),
        ("two", ["2", "Two."], 1),
        ("2", [], 0),
        ("the", ["A"], 1),  # nothing is left of either
        ("", ["x"], 0),
        ("cafe\u0301", ["café"], 0),  # SQuAD does not compose
    ],
)
def test_exact_match(prediction, accepted, wanted):
    assert exact_match(prediction, accepted) == wanted


@pytest.mark.parametrize(
    ("prediction", "accepted", "wanted"),
    [
        ("The Eiffel tower", ["eiffel tower"], 1),
        ("tower", ["eiffel tower"], 2 / 3),  # precision 1, recall 1/2
        ("tower bridge of London", ["eiffel tower"], 1 / 3),  # precision 1/4, recall 1/2
        ("tower bridge", ["eiffel tower", "tower bridge, London", "bridge"], 0.8),
        ("no no no", ["no"], 0.5),  # a word counts as often as it stands in both
        ("no no", ["no no no"], 0.8),
        ("x", ["y"], 0),
        ("x", [], 0),
        ("the", ["a"], 1),
        ("the", ["x"], 0),
        ("x", ["the"], 0),
    ],
)
def test_f1(prediction, accepted, wanted):
    assert f1(prediction, accepted) == pytest.approx(wanted)


def test_measure():
    found = measure(["the cat", "a dog here", "?"], [["Cat", "x"], ["dog"], ["y"]])
    np.testing.assert_array_equal(found.per_query["em"], [1, 0, 0])
    np.testing.assert_allclose(found.per_query["f1"], [1, 2 / 3, 0])
    assert found.metrics == pytest.approx({"em": 1 / 3, "f1": 5 / 9})
    with pytest.raises(ValueError, match="2 predictions cannot answer 1"):
        measure(["x", "y"], [["x"]])
    with pytest.raises(ValueError, match="0 predictions"):
        measure([], [])


@pytest.mark.parametrize(
    ("text", "accepted", "wanted"),
    [
        ("Paris is in France", ["in France"], True),
        ("Paris is in France", ["paris IS"], True),
        ("Paris is in France", ["is France"], False),  # one after another
        ("Parisians", ["Paris"], False),  # whole words
        ("comparison", ["paris", "son"], False),
        ("he said:in   \t\n1999,", ["in 1999"], True),
        ("in 1999.5", ["1999"], True),
        ("the U.S. army", ["U.S."], True),  # letters and full stops are words of their own
        ("the US army", ["U.S."], False),
        ("the U. S. army", ["U.S."], True),
        ("well-known", ["well - known"], True),
        ("well known", ["well-known"], False),
        ("a caf\u00e9 there", ["cafe\u0301"], True),  # accents either way
        ("a cafe there", ["caf\u00e9"], False),
        ("a caf\u00e9 there", ["cafe"], False),  # an accent is of its word
        ("ГОРОД МОСКВА", ["москва"], True),
        ("東京都庁", ["東京"], False),  # one word: nothing stands between its letters
        ("zero\u200bwidth and soft\u00adhyphen", ["zero width"], True),  # signs nobody sees part
        ("€5 or 5€", ["€ 5"], True),
        ("हिन्दी भाषा", ["हिन्दी"], True),  # vowel signs are marks
        ("The man", ["the"], True),  # articles stay
        ("anything", ["nothing", "Anything"], True),
        ("anything", [], False),
        ("anything", [""], False),
        ("anything", [" \u200b"], False),
        ("", ["x"], False),
        ("x", ["x y"], False),
    ],
)
def test_has_answer(text, accepted, wanted):
    assert has_answer(text, accepted) is wanted


TEXTS = ["no", "it is Rome", "Rome, or Milan", "Oslo", "in Bergen."]


def test_answer_recall():
    rows = np.array([[0, 3, 1, 2], [4, 3, 0, -1], [0, 1, -1, -1]], np.int32)
    ranking = Ranking(rows, np.zeros(rows.shape, np.float32))
    found = answer_recall(
        ranking, TEXTS, [["Milan", "rome"], ["bergen"], ["Bergen", "Oslo"]], cutoffs=(1, 2, 3, 9)
    )
    wanted = {1: [0, 1, 0], 2: [0, 1, 0], 3: [1, 1, 0], 9: [1, 1, 0]}
    assert found.per_query.keys() == {f"answer_recall@{k}" for k in wanted}
    for k, hits in wanted.items():
        np.testing.assert_array_equal(found.per_query[f"answer_recall@{k}"], hits)
        assert found.metrics[f"answer_recall@{k}"] == pytest.approx(sum(hits) / 3)


def test_only_targets_that_were_found_are_looked_at():
    class Texts(list):
        def __getitem__(self, row):
            asked.append(row)
            return super().__getitem__(row)

    asked = []
    rows = np.array([[1, 3], [3, -1]], np.int32)
    ranking = Ranking(rows, np.zeros(rows.shape, np.float32))
    answer_recall(ranking, Texts(TEXTS), [["Rome"], ["Rome"]], cutoffs=(2,))
    assert sorted(asked) == [1, 3]


def test_answers_of_another_ranking_are_refused():
    ranking = Ranking(np.zeros((2, 1), np.int32), np.zeros((2, 1), np.float32))
    with pytest.raises(ValueError, match="holds 2 questions, not 1"):
        answer_recall(ranking, TEXTS, [["x"]])
    empty = Ranking(np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float32))
    with pytest.raises(ValueError, match="holds 0 questions"):
        answer_recall(empty, TEXTS, [])


def test_examples_in_docstrings():
    found = doctest.testmod(answers)
    assert found.attempted == 3
    assert not found.failed
