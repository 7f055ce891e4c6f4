"""What long work says of itself."""

from __future__ import annotations

import pytest

from corrector_jax import writer


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(writer.time, "monotonic", lambda: now[0])
    return now


def said(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_the_first_one_compiles_and_does_not_count(clock, capsys):
    with writer.progress("training", 100, "steps") as advance:
        clock[0] = 90.0
        advance(1)
        assert said(capsys) == ["training: 1/100 steps in 1:30"]
        for _ in range(10):
            clock[0] += 2.0
            advance(1, "loss 3")
        assert said(capsys)[-1] == "training: 11/100 steps, 2.0 s each, 2:58 left  loss 3"


def test_work_that_goes_on_counts_what_is_new_alone(clock, capsys):
    with writer.progress("embedding", 1000, "targets", done=500) as advance:
        clock[0] = 1.0
        advance(100)
        clock[0] = 11.0
        advance(200)
        assert said(capsys) == ["embedding: 800/1,000 targets, 20.0/s, 0:10 left"]
        clock[0] = 12.0
        advance(200)
        assert said(capsys) == ["embedding: 1,000/1,000 targets, 36.4/s, 0:00 left"]


def test_hours_are_hours():
    assert writer._clock(59) == "0:59"
    assert writer._clock(3 * 3600 + 61) == "3:01:01"
