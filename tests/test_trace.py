"""Where a step's time goes: by its parts, each instruction counted once."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corrector_jax import config as configs
from corrector_jax.trace import OTHER, PARTS, Event, Trace, own_times, summary
from corrector_jax.types import UserError

PROGRAM = """HloModule jit_train_step, is_scheduled=true
  %dot.1 = f32[2] dot(...), metadata={op_name="jit(train_step)/jvp(sweep)/dot_general"}
  %while.2 = (f32[2]) while(...), metadata={op_name="jit(train_step)/while"}
  ROOT %dot.3 = f32[2] dot(...), metadata={op_name="jit(step)/transpose(jvp(encode_targets))/dot"}
  sweeping.4 = f32[2] add(...), metadata={op_name="jit(step)/sweeping/add"}
"""


def test_time_is_told_apart_by_scope_and_what_lies_inside_counts_once():
    line = [
        Event("while.2", 0, 100),
        Event("dot.1", 10, 30),
        Event("dot.1", 50, 20),
        Event("dot.3", 200, 60),
        Event("sweeping.4", 300, 8),
        Event("of.another.program", 400, 1000),
    ]
    found = summary([line, line], PROGRAM, steps=2)
    assert found == pytest.approx(
        {PARTS["sweep"]: 50e-9, PARTS["encode_targets"]: 60e-9, OTHER: 58e-9}, abs=1e-6
    )
    scaled = [
        event._replace(start=1e6 * event.start, duration=1e6 * event.duration) for event in line
    ]
    assert summary([scaled], PROGRAM, steps=1) == {
        PARTS["sweep"]: 0.05, PARTS["encode_targets"]: 0.06, OTHER: 0.058,
    }  # fmt: skip


def test_what_begins_where_another_ends_is_not_inside_of_it():
    """Picoseconds: as floats, 1.1 + 2.2 lies behind 3.3."""
    line = [Event("a", 1.1, 2.2), Event("b", 3.3, 1.0)]
    assert {event.name: own for event, own in own_times(line)} == {"a": 2.2, "b": 1.0}


@given(st.recursive(st.integers(0, 5), lambda inside: st.lists(inside, max_size=4), max_leaves=12))
def test_own_times_add_up_to_the_time_something_ran(tree):
    events, clock = [], 0

    def run(node):
        nonlocal clock
        start = clock
        if isinstance(node, int):
            clock += node
        else:
            for child in node:
                run(child)
                clock += 1
        events.append(Event("x", start, clock - start))

    run(tree)
    assert sum(own for _, own in own_times(events)) == clock
    assert all(own >= 0 for _, own in own_times(events))


def test_a_trace_that_is_cut_short_leaves_nothing(tmp_path):
    with Trace(tmp_path, range(0, 5)) as trace:
        trace.begin(0)
    assert list(tmp_path.iterdir()) == []
    with Trace(tmp_path, range(0)) as trace:
        trace.begin(0)
        assert not trace.is_last(0)


def test_a_run_says_where_its_time_went(finished):
    record = json.loads((finished / "profile.json").read_text())
    assert record["steps"] == [5, 7]
    assert {PARTS["sweep"]} <= set(record["seconds_per_step"]) <= {*PARTS.values(), OTHER}
    assert list(finished.glob("profile/plugins/profile/*/*.xplane.pb"))
    assert (finished / "plots" / "step.png").exists()
    results = json.loads((finished / "results.json").read_text())
    times = results["times"]
    assert set(times) == {"evaluate", "save", "probe", "wait for the batch", "step"}
    assert all(spent >= 0 for spent in times.values())
    assert 0 < sum(times.values()) < results["wall_seconds"]


@pytest.mark.parametrize("steps", ["5", "9:9", "20:10", "a:b", "0:1001", "-1:5", "1:2:3"])
def test_steps_that_cannot_be_traced_are_refused(steps):
    config = configs.default()
    config.profile.steps = steps
    with pytest.raises(UserError, match=r"config\.profile\.steps is .* as 20:25"):
        configs.validate(config)
    config.profile.steps = "990:1000"
    configs.validate(config)
    assert configs.profiled(config) == range(990, 1000)


def test_steps_of_two_kinds_are_not_traced_as_one():
    config = configs.default()
    config.reader.weights, config.reader.given_steps = "random", 100
    for steps in ("90:100", "100:110"):
        config.profile.steps = steps
        assert len(configs.profiled(config)) == 10
    config.profile.steps = "95:105"
    with pytest.raises(UserError, match="steps of two kinds: end at step 100"):
        configs.profiled(config)
