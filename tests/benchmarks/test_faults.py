"""Campaigns of faults: what is killed can be run, and what was done is not done again."""

from __future__ import annotations

import signal

import pytest
from absl import flags
from ml_collections import config_flags

from benchmarks import faults
from corrector_jax import config as configs
from corrector_jax.strategies import STRATEGIES


@pytest.mark.parametrize("kind", faults.KINDS)
def test_every_kind_has_a_configuration_that_can_be(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(faults, "_LARGE", 100)
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values)
    values(["test", f"--config={faults.write_config(tmp_path, kind)}"])
    configs.validate(config.value)
    assert not faults.KINDS[kind].needs or faults.KINDS[kind].needs in faults.KINDS


def test_every_strategy_is_killed_and_so_is_a_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "_LARGE", 100)
    said = [faults.write_config(tmp_path, kind).read_text() for kind in faults.KINDS]
    for strategy in STRATEGIES:
        default = strategy == configs.default().strategy
        assert default or any(f"'strategy': '{strategy}'" in text for text in said), strategy
    assert any("'reader.weights': 'random'" in text for text in said)
    kinds = faults.KINDS.values()
    assert sum(kind.kills for kind in kinds) >= 100
    assert sum(kind.terms for kind in kinds) >= 30
    assert sum(kind.kills for kind in kinds if kind.processes == 2) >= 20


def test_a_campaign_goes_on_behind_the_last_run_that_was_compared(tmp_path, monkeypatch):
    asked = []

    def campaign(folder, *, kills, terms, note, **_):
        asked.append((kills, terms))
        for number in range(kills if len(asked) > 1 else 2):
            note({"signal": "SIGKILL", "moment": "any", "exit": -9, "counts": True})
            if number == 0:
                note({"compared": 0, "different": []})
        if len(asked) == 1:
            raise KeyboardInterrupt
        for _ in range(terms):
            note({"signal": "SIGTERM", "moment": "any", "exit": 75, "counts": True})
        note({"compared": 1, "different": ["run 1: state"]})
        return faults.Campaign(different=["run 1: state"])

    monkeypatch.setattr(faults, "campaign", campaign)
    path = tmp_path / "log" / "faults.jsonl"

    def go() -> dict:
        return faults.whole_campaign(faults.Log(path), kinds=["stale"], kills=8, terms=3, seed=0)

    with pytest.raises(KeyboardInterrupt):
        go()
    assert faults.Log(path).done("stale", signal.SIGKILL) == 1  # the other was never compared
    found = go()["stale"]
    assert asked == [(8, 3), (7, 3)]
    assert (found["SIGKILL"], found["SIGTERM"], found["runs_compared"]) == (8, 3, 3)
    assert found["different"] == ["run 1: state"]
    go()
    assert len(asked) == 2


def test_of_several_processes_the_one_that_was_killed_counts(tmp_path):
    job = faults.Job.__new__(faults.Job)

    class Ended:
        def __init__(self, code: int) -> None:
            self.returncode = code

        def communicate(self, timeout: int) -> tuple[bytes, bytes]:
            return b"", b"said"

    for codes, expected in (
        ((-9, 76), -9),
        ((-9, 1), 1),
        ((75, 75), 75),
        ((0, 0), 0),
        ((0, 75), 75),
        ((76, 76), 76),
    ):
        job._processes = [Ended(code) for code in codes]
        assert job.end() == (expected, "said\nsaid")
