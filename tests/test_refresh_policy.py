"""When a refresh is due, and which schedules are refused."""

from __future__ import annotations

import pytest

from corrector_jax.refresh_policy import Adaptive, Never, every, parse
from corrector_jax.types import UserError


def due(policy, steps):
    return [step for step in range(steps) if policy.is_due(step, None)]


def test_every_so_many_steps_but_not_before_the_first():
    assert due(every(3), 10) == [3, 6, 9]
    assert due(every(1), 4) == [1, 2, 3]
    assert due(Never(), 10) == []


def test_a_schedule_counts_from_the_start_of_each_stretch():
    assert due(parse("0-5:2,5-end:4"), 15) == [2, 4, 5, 9, 13]
    assert due(parse("10-20:5"), 40) == [10, 15]  # Atlas: (t - a) mod R = 0, t = a included
    assert due(parse(" 0-4:2 , 8-12:1 "), 20) == [2, 8, 9, 10, 11]


def test_the_fewest_steps_between_two_snapshots():
    assert every(3).shortest(10) == 3
    assert every(3).shortest(3) == 3
    assert every(10).shortest(7) == 7
    assert parse("0-1000:500,1000-end:2000").shortest(4000) == 500
    assert Never().shortest(7) == 7
    assert Adaptive(0.1, 100).shortest(1000) == 101


def test_adaptive_heeds_the_newest_probe():
    policy = Adaptive(0.1, 100)
    assert [policy.is_due(5, error) for error in (None, 0.05, 0.1, 0.2)] == [
        False, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "0-5",
        "0-5:0",
        "0-end:3,5-9:1",
        "4-4:1",
        "5-3:1",
        "0-9:2,5-end:1",
        "0-9:2,",
        "a-b:c",
    ],
)
def test_a_schedule_that_cannot_be_read_is_refused(text):
    with pytest.raises(UserError, match=r"config\.refresh\.schedule.*such as 0-1000:500"):
        parse(text)
