from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest

from corrector_jax.data import order
from corrector_jax.data.order import batch_rows, choose_mined, choose_positive, make_batch


@pytest.mark.parametrize(
    ("num_queries", "batch_size"), [(13, 4), (12, 4), (5, 16), (1, 3), (64, 64)]
)
def test_every_query_comes_once_per_epoch(num_queries: int, batch_size: int):
    epochs = 6
    steps = -(-epochs * num_queries // batch_size)
    batches = [
        batch_rows(step, num_queries=num_queries, batch_size=batch_size, seed=3)
        for step in range(steps)
    ]
    assert all(rows.shape == (batch_size,) and rows.dtype == np.int64 for rows in batches)
    stream = np.concatenate(batches)[: epochs * num_queries].reshape(epochs, num_queries)
    np.testing.assert_array_equal(np.sort(stream), np.tile(np.arange(num_queries), (epochs, 1)))


def test_epochs_and_seeds_differ():
    def epoch(number: int, seed: int) -> tuple[int, ...]:
        return tuple(batch_rows(number, num_queries=50, batch_size=50, seed=seed).tolist())

    orders = [epoch(number, seed) for number in range(3) for seed in (0, 1, 2**40)]
    assert len(set(orders)) == len(orders)
    assert tuple(range(50)) not in orders


def test_any_step_can_be_asked_for_first():
    ask = {"num_queries": 11, "batch_size": 4, "seed": 5}
    forwards = [batch_rows(step, **ask).tolist() for step in range(40)]
    order._permutation.cache_clear()
    backwards = [batch_rows(step, **ask).tolist() for step in reversed(range(40))]
    assert backwards[::-1] == forwards


def test_order_is_uniform():
    first = [batch_rows(step, num_queries=5, batch_size=5, seed=0)[0] for step in range(2000)]
    counts = np.bincount(first, minlength=5)
    assert ((counts - 400) ** 2 / 400).sum() < 18.5  # chi-square, 4 degrees, 0.1 %


def test_callers_cannot_spoil_the_kept_order():
    ask = {"num_queries": 8, "batch_size": 8, "seed": 0}
    rows = batch_rows(0, **ask)
    before = rows.copy()
    rows[:] = 0
    np.testing.assert_array_equal(batch_rows(0, **ask), before)


def test_each_known_positive_is_chosen_equally_often():
    positives = [np.array([7], np.int32), np.array([2, 5, 9], np.int32)]
    rows = np.array([0, 1, 1, 0])
    chosen = np.array([choose_positive(rows, positives, seed=1, step=t) for t in range(3000)])
    assert chosen.dtype == np.int32
    assert (chosen[:, [0, 3]] == 7).all()
    for column in (chosen[:, 1], chosen[:, 2]):
        counts = np.array([(column == target).sum() for target in positives[1]])
        assert counts.sum() == 3000
        assert ((counts - 1000) ** 2 / 1000).sum() < 13.8  # chi-square, 2 degrees, 0.1 %
    assert 800 < (chosen[:, 1] == chosen[:, 2]).sum() < 1200  # places of a batch are independent


def test_choice_is_a_function_of_seed_and_step():
    positives = [np.arange(100, dtype=np.int32)] * 8
    rows = np.arange(8)

    def chosen(seed: int, step: int) -> tuple[int, ...]:
        return tuple(choose_positive(rows, positives, seed=seed, step=step).tolist())

    assert chosen(1, 2) == chosen(1, 2)
    assert len({chosen(seed, step) for seed in range(4) for step in range(4)}) == 16


MINED = [np.arange(100, 106, dtype=np.int32), np.array([7, 3], np.int32), np.zeros(0, np.int32)]


def test_every_set_of_mined_negatives_is_chosen_equally_often():
    """Two of six: fifteen sets, and each of the two places holds each of the six equally often."""
    rows, steps = np.array([0, 0]), 3000
    chosen = np.stack(
        [choose_mined(rows, MINED, count=2, seed=1, step=step) for step in range(steps)]
    )
    assert chosen.dtype == np.int32
    assert chosen.min() >= 100
    assert (chosen[..., 0] != chosen[..., 1]).all()
    sets = np.sort(chosen[:, 0], axis=1) - 100
    counts = np.bincount(sets[:, 0] * 6 + sets[:, 1])
    counts = counts[counts > 0]
    assert len(counts) == 15
    assert ((counts - steps / 15) ** 2 / (steps / 15)).sum() < 36.1  # 14 degrees, 0.1 %
    for place in range(2):
        counts = np.bincount(chosen[:, 1, place] - 100, minlength=6)
        assert ((counts - steps / 6) ** 2 / (steps / 6)).sum() < 20.5  # 5 degrees, 0.1 %
    same = (np.sort(chosen[:, 0], axis=1) == np.sort(chosen[:, 1], axis=1)).all(axis=1).sum()
    assert 140 < same < 260  # places of a batch are independent: 1 of 15


def test_a_short_list_of_mined_negatives_is_taken_whole_and_padded():
    rows = np.array([1, 2, 0, 1])
    for step in range(20):
        chosen = choose_mined(rows, MINED, count=4, seed=0, step=step)
        assert chosen.shape == (4, 4)
        assert sorted(chosen[0].tolist()) == sorted(chosen[3].tolist()) == [-1, -1, 3, 7]
        assert chosen[0, 2:].tolist() == [-1, -1]
        assert chosen[1].tolist() == [-1] * 4
        assert len(set(chosen[2].tolist())) == 4


def test_mined_negatives_are_a_function_of_seed_and_step():
    lists = [np.arange(100, dtype=np.int32)] * 8
    rows = np.arange(8)

    def chosen(seed: int, step: int) -> tuple[int, ...]:
        return tuple(choose_mined(rows, lists, count=1, seed=seed, step=step)[:, 0].tolist())

    assert chosen(1, 2) == chosen(1, 2)
    assert len({chosen(seed, step) for seed in range(4) for step in range(4)}) == 16


def test_a_batch_holds_the_mined_negatives_of_its_own_queries():
    tokens = np.arange(9, dtype=np.uint16)[:, None]
    lists = [np.array([10 * i, 10 * i + 1, 10 * i + 2], np.int32) for i in range(9)]
    ask = {
        "query_tokens": tokens, "positives": lists, "known": np.zeros((9, 1), np.int32),
        "batch_size": 4, "seed": 0, "mined": lists,
    }  # fmt: skip
    for step in range(4):
        batch = make_batch(step, num_mined=2, **ask)
        assert np.array_equal(batch.mined // 10, np.tile(batch.query_tokens, (1, 2)))
    assert make_batch(0, **ask).mined is None


def test_batches_hold_what_belongs_together():
    rng = np.random.default_rng(0)
    query_tokens = rng.integers(0, 60_000, (9, 5)).astype(np.uint16)
    positives = [
        np.sort(rng.choice(30, 1 + i % 3, replace=False)).astype(np.int32) for i in range(9)
    ]
    known = np.full((9, 3), -1, np.int32)
    for row, targets in enumerate(positives):
        known[row, : len(targets)] = targets
    ask = {"query_tokens": query_tokens, "positives": positives, "known": known, "seed": 2}
    batches = [make_batch(step, batch_size=4, **ask) for step in range(9)]
    for step, batch in enumerate(batches):
        rows = batch_rows(step, num_queries=9, batch_size=4, seed=2)
        np.testing.assert_array_equal(batch.query_tokens, query_tokens[rows])
        np.testing.assert_array_equal(batch.known, known[rows])
        assert [p in k for p, k in zip(batch.positive, batch.known, strict=True)] == [True] * 4
        assert batch.positive.min() >= 0
        dtypes = [leaf.dtype for leaf in batch[:4]]
        assert dtypes == [np.int32, np.int32, np.int32, np.bool_]
        assert batch.valid.all()
        assert all(isinstance(leaf, np.ndarray) for leaf in batch[:4])
    assert any((a.positive != b.positive).any() for a, b in pairwise(batches))


def test_batches_are_cut_to_the_first_width_that_holds_them():
    rng = np.random.default_rng(0)
    lengths = np.where(rng.random(200) < 0.02, 12, rng.integers(3, 9, 200)).astype(np.int32)
    widths = order.bucket_widths(lengths, batch_size=8, multiple=8)
    assert widths == (8, 16)
    table = np.where(np.arange(16) < lengths[:, None], 7, 0).astype(np.uint16)
    arguments = {
        "query_tokens": table,
        "positives": [np.array([0], np.int32)] * 200,
        "known": np.zeros((200, 1), np.int32),
        "batch_size": 8,
        "seed": 0,
    }
    seen = set()
    for step in range(40):
        whole = make_batch(step, **arguments)
        cut = make_batch(step, **arguments, lengths=lengths, widths=widths)
        width = cut.query_tokens.shape[1]
        seen.add(width)
        np.testing.assert_array_equal(cut.query_tokens, whole.query_tokens[:, :width])
        assert not whole.query_tokens[:, width:].any()
        np.testing.assert_array_equal(cut.positive, whole.positive)
    assert seen == {8, 16}


def test_widths_are_those_of_the_median_batch_and_of_the_longest_query():
    assert order.bucket_widths(np.full(9, 5), batch_size=4, multiple=8) == (8,)
    lengths = np.concatenate([np.full(900, 10), np.full(100, 60)])
    assert order.bucket_widths(lengths, batch_size=2, multiple=8) == (16, 64)  # .9 ** 2 > .5
    assert order.bucket_widths(lengths, batch_size=32, multiple=8) == (64,)


def test_work_ahead_is_in_order_bounded_and_ends_with_its_reader():
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    found = order.ahead(make, range(3, 9), depth=2)
    assert next(found) == 9
    time.sleep(0.1)  # all that was asked for is made
    found.close()
    assert made == [3, 4, 5]
    made.clear()
    assert list(order.ahead(make, range(3, 9), depth=2)) == [9, 16, 25, 36, 49, 64]
    assert made == list(range(3, 9))
    assert list(order.ahead(make, range(5, 5))) == []


def test_an_error_in_work_ahead_comes_where_its_result_would():
    def make(step: int) -> int:
        if step == 2:
            raise RuntimeError("broken")
        return step

    found = order.ahead(make, range(9))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(RuntimeError, match="broken"):
        next(found)
