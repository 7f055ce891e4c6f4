"""Retrieval measures against plain NumPy, TREC files there and back, BM25, paired intervals."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from corrector_jax.ranking import (
    METRICS,
    Ranking,
    bm25,
    measure,
    paired_bootstrap,
    read_trec,
    write_trec,
)
from corrector_jax.types import UserError


def judged(positives, grades=None, names=None):
    """A split as far as measuring is concerned."""
    grades = grades or [[1] * len(rows) for rows in positives]
    return SimpleNamespace(
        query_ids=names or [f"q{i}" for i in range(len(positives))],
        positives=[np.array(rows, np.int32) for rows in positives],
        grades=[np.array(grade, np.int32) for grade in grades],
    )


def ranking(rows, scores=None):
    rows = np.array(rows, np.int32)
    if scores is None:
        scores = np.where(rows >= 0, -np.arange(rows.shape[1]), 0)
    return Ranking(rows, np.array(scores, np.float32))


def oracle(rows, positives, grades):
    """The measures of one query from their definitions."""
    rows = [row for row in rows if row >= 0]
    gain = dict(zip(positives, grades, strict=True))
    relevant = {row for row, grade in gain.items() if grade > 0}
    values = {f"recall@{k}": len(relevant & set(rows[:k])) / len(relevant) for k in (1, 20, 100)}
    first = [1 / rank for rank, row in enumerate(rows[:10], start=1) if row in relevant]
    discount = 1 / np.log2(np.arange(2, 12))
    gained = np.array([gain.get(row, 0) for row in rows[:10]])
    best = np.array(sorted(grades, reverse=True)[:10])
    values["mrr@10"] = max(first, default=0)
    values["ndcg@10"] = gained @ discount[: len(gained)] / (best @ discount[: len(best)])
    return values


@pytest.fixture(scope="module")
def random_case():
    """60 queries with 1 to 12 graded positives; some rankings are short, one is empty."""
    rng = np.random.default_rng(0)
    targets, width = 300, 120
    positives = [rng.choice(targets, rng.integers(1, 13), replace=False) for _ in range(60)]
    grades = [rng.integers(1, 4, len(rows)) for rows in positives]
    grades[7] = np.r_[0, grades[7][1:]] if len(grades[7]) > 1 else grades[7]
    rows = np.stack([rng.permutation(targets)[:width] for _ in positives])
    for i in range(0, 60, 3):  # good rankings too: the positives near the top
        rest = rows[i][~np.isin(rows[i], positives[i])]
        rows[i] = np.insert(rest, i // 6, positives[i])[:width]
    rows[5, 4:] = rows[9, 40:] = rows[11] = -1
    ids = [f"t{i}" for i in rng.permutation(targets)]
    return judged([p.tolist() for p in positives], [g.tolist() for g in grades]), rows, ids


def test_measures_are_those_of_the_definitions(random_case):
    split, rows, ids = random_case
    measured = measure(split, ranking(rows), ids)
    expected = [
        oracle(r.tolist(), p.tolist(), g.tolist())
        for r, p, g in zip(rows, split.positives, split.grades, strict=True)
    ]
    assert tuple(measured.metrics) == tuple(measured.per_query) == METRICS
    for metric in METRICS:
        values = np.array([query[metric] for query in expected])
        np.testing.assert_allclose(measured.per_query[metric], values, atol=1e-12)
        assert measured.metrics[metric] == pytest.approx(values.mean(), abs=1e-12)
        assert 0 < measured.metrics[metric] < 1


def test_equal_scores_do_not_reorder(random_case):
    split, rows, ids = random_case
    tied = measure(split, ranking(rows, np.zeros(rows.shape)), ids)
    renamed = measure(split, ranking(rows, np.zeros(rows.shape)), ids[::-1])
    plain = measure(split, ranking(rows), ids)
    assert tied.metrics == renamed.metrics == plain.metrics


def test_grades_order_ndcg():
    split = judged([[0, 1]], [[3, 1]])
    better = measure(split, ranking([[0, 1]]), ["a", "b"]).metrics["ndcg@10"]
    worse = measure(split, ranking([[1, 0]]), ["a", "b"]).metrics["ndcg@10"]
    assert better == 1
    assert worse < 1


def test_measure_refuses_what_it_cannot_judge():
    ids = ["a", "b"]
    with pytest.raises(ValueError, match="2 queries, the split 1"):
        measure(judged([[0]]), ranking([[0], [1]]), ids)
    with pytest.raises(ValueError, match="'q1' has no known positive"):
        measure(judged([[0], []]), ranking([[0], [1]]), ids)
    with pytest.raises(ValueError, match="'q0' was given the same target twice"):
        measure(judged([[0]]), ranking([[1, 1]]), ids)


def test_trec_gives_back_rows_and_exact_scores(tmp_path, random_case):
    split, rows, ids = random_case
    rng = np.random.default_rng(1)
    scores = -np.sort(-rng.normal(size=rows.shape).astype(np.float32) * 1e-3, axis=1)
    given = ranking(rows, np.where(rows >= 0, scores, 0))
    write_trec(tmp_path / "run.trec", split, given, ids, "corrected")
    back = read_trec(tmp_path / "run.trec", split, ids)
    np.testing.assert_array_equal(back.rows, given.rows)
    np.testing.assert_array_equal(back.scores, given.scores)
    assert back.rows.dtype == np.int32
    assert back.scores.dtype == np.float32
    line = (tmp_path / "run.trec").read_text().splitlines()[0]
    query, q0, target, rank, score, tag = line.split(" ")
    assert (query, q0, target, rank, tag) == ("q0", "Q0", ids[rows[0, 0]], "1", "corrected")
    assert np.float32(score) == given.scores[0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.trec"]


def test_trec_goes_by_rank_not_by_place(tmp_path):
    path = tmp_path / "run.trec"
    path.write_text("q0 Q0 b 2 0.5 x\nq1 Q0 a 1 0.1 x\nq0 Q0 a 1 0.5 x\n")
    back = read_trec(path, judged([[0], [0], [0]]), ["a", "b"])
    assert back.rows.tolist() == [[0, 1], [0, -1], [-1, -1]]


def test_a_target_that_stands_twice_counts_once_with_its_better_rank(tmp_path):
    path = tmp_path / "run.trec"
    path.write_text("q0 Q0 a 7 0.5 x\nq0 Q0 b 3 0.75 x\nq0 Q0 a 1 1.5 x\n")
    back = read_trec(path, judged([[0]]), ["a", "b"])
    assert back.rows.tolist() == [[0, 1]]
    assert back.scores.tolist() == [[1.5, 0.75]]


def test_an_empty_trec_file_finds_nothing(tmp_path):
    (tmp_path / "run.trec").write_text("")
    assert read_trec(tmp_path / "run.trec", judged([[0], [1]]), ["a", "b"]).rows.shape == (2, 0)


def test_names_with_blanks_stay_one_field(tmp_path):
    ids = ["a b\tc", "x%20y", "zero\0 line\nend", "half \ud800"]
    split = judged([[0], [1]], names=["who is\u2003it", "q%"])
    given = ranking([[0, 1], [2, 3]])
    write_trec(tmp_path / "run.trec", split, given, ids, "my run")
    text = (tmp_path / "run.trec").read_text(encoding="utf-8")
    assert [len(line.split()) for line in text.splitlines()] == [6] * 4
    assert "a%20b%09c" in text
    assert "x%20y" in text
    assert "q% " in text
    np.testing.assert_array_equal(read_trec(tmp_path / "run.trec", split, ids).rows, given.rows)
    assert measure(split, given, ids).metrics["recall@1"] == 0.5


def test_names_that_cannot_be_told_apart_are_refused(tmp_path):
    split, path = judged([[0]]), tmp_path / "run.trec"
    with pytest.raises(UserError, match=r"'a b' and 'a%20b' would both be written 'a%20b'"):
        write_trec(path, split, ranking([[0, 1]]), ["a b", "a%20b"], "x")
    with pytest.raises(UserError, match="empty id"):
        write_trec(path, split, ranking([[0]]), [""], "x")
    assert not path.exists()
    write_trec(path, split, ranking([[0]]), ["a b", "a%20b"], "x")  # only one of them is written


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.trec"
    split = judged([[0], [0]])
    write_trec(path, split, ranking([[0], [1]]), ["a", "b"], "first")
    old = path.read_text()
    broken = Ranking(np.array([[0], [1]], np.int32), np.zeros((1, 1), np.float32))
    with pytest.raises(ValueError, match="shorter"):
        write_trec(path, split, broken, ["a", "b"], "second")
    assert path.read_text() == old


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q0 Q0 a 1 0.5", "run.trec:2 is not a TREC line"),
        ("q0 Q0 a one 0.5 x", "run.trec:2 is not a TREC line"),
        ("q0 Q0 a 1 1e300 x", "run.trec:2 is not a TREC line"),  # no float32 holds it
        ("q0 Q0 a 1 inf x", "run.trec:2 is not a TREC line"),
        ("q9 Q0 a 1 0.5 x", "run.trec:2 names query 'q9'"),
        ("q0 Q0 c 1 0.5 x", "run.trec:2 names target 'c'"),
    ],
)
def test_a_bad_trec_line_is_named(tmp_path, line, message):
    path = tmp_path / "run.trec"
    path.write_text(f"q0 Q0 a 1 0.5 x\n{line}\n")
    with pytest.raises(UserError, match=message):
        read_trec(path, judged([[0]]), ["a", "b"])


def lucene(targets, query, k1=1.5, b=0.75):
    """BM25 from its formula, over texts that are already words."""
    docs = [text.split() for text in targets]
    mean = np.mean([len(words) for words in docs])
    total = np.zeros(len(docs))
    for word in query.split():
        frequency = np.array([words.count(word) for words in docs])
        holders = (frequency > 0).sum()
        idf = np.log(1 + (len(docs) - holders + 0.5) / (holders + 0.5))
        length = np.array([len(words) for words in docs]) / mean
        total += idf * frequency / (frequency + k1 * (1 - b + b * length))
    return total


def test_bm25_is_its_formula():
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(30)])
    targets = [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(200)]
    queries = [" ".join(rng.choice(words, 3)) for _ in range(20)]
    found = bm25(targets, queries, 50)
    for query, rows, scores in zip(queries, found.rows, found.scores, strict=True):
        expected = lucene(targets, query)
        order = np.argsort(-expected, kind="stable")[:50]
        kept = expected[order] > 0
        np.testing.assert_allclose(scores, expected[order], atol=1e-5)
        np.testing.assert_allclose(expected[rows[rows >= 0]], expected[order][kept], atol=1e-5)
        assert (np.diff(scores) <= 0).all()


def test_bm25_keeps_the_lower_rows_of_a_tie():
    found = bm25(["cat"] * 7 + ["dog cat"], ["cat"], 3)
    assert found.rows.tolist() == [[0, 1, 2]]


def test_bm25_leaves_out_what_shares_no_word():
    found = bm25(["the cat sat", "a dog", ""], ["", "the", "zebra", "Cat dog"], 9)
    assert found.rows.tolist() == [[-1, -1, -1]] * 3 + [[1, 0, -1]]
    assert (found.scores[:3] == 0).all()
    assert found.scores[3, 2] == 0
    assert bm25(["", "the"], ["cat"], 1).rows.tolist() == [[-1]]
    assert bm25([], ["cat"], 5).rows.shape == (1, 0)
    assert bm25(["cat"], [], 5).rows.shape == (0, 1)


def test_bm25_can_be_imported_under_a_transfer_guard():
    # In a process of its own: the package may be in memory already.
    code = (
        "import jax; jax.config.update('jax_transfer_guard', 'disallow')\n"
        "from corrector_jax.ranking import bm25\n"
        "assert bm25(['cat', 'dog'], ['dog'], 1).rows.tolist() == [[1]]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    queries, truth, inside = 200, 0.1, 0
    for seed in range(1000):
        before = rng.normal(size=queries)
        after = before + truth + rng.normal(scale=0.5, size=queries)
        interval = paired_bootstrap(before, after, samples=500, seed=seed)
        inside += interval.low <= truth <= interval.high
    assert 0.92 <= inside / 1000 <= 0.97  # sd 0.007


def test_interval_has_the_width_of_the_normal_law():
    gain = np.random.default_rng(1).normal(size=4000)
    interval = paired_bootstrap(np.zeros(4000), gain)
    error = gain.std() / np.sqrt(4000)
    assert interval.difference == pytest.approx(gain.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.06)
    narrow = paired_bootstrap(np.zeros(4000), gain, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.674 * error, rel=0.08)


def test_pairing_counts():
    rng = np.random.default_rng(2)
    before = rng.normal(size=500)
    after = before + 0.05
    paired = paired_bootstrap(before, after)
    assert paired.high - paired.low < 1e-9 < paired.low  # the same gain for every query
    shuffled = paired_bootstrap(before, rng.permutation(after))
    assert shuffled.difference == pytest.approx(paired.difference)
    assert shuffled.low < 0 < shuffled.high


def test_interval_is_a_function_of_its_arguments():
    before, after = np.random.default_rng(3).random((2, 3000))
    first = paired_bootstrap(before, after, seed=4)
    assert first == paired_bootstrap(before, after, seed=4)
    assert first != paired_bootstrap(before, after, seed=5)
    back = paired_bootstrap(after, before, seed=4)
    assert back.low == pytest.approx(-first.high)
    assert back.high == pytest.approx(-first.low)
    with pytest.raises(ValueError, match="one value per query"):
        paired_bootstrap(before, after[:-1])
    with pytest.raises(ValueError, match="one value per query"):
        paired_bootstrap(before[:0], after[:0])
