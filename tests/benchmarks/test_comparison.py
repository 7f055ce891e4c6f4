"""Grids, and what records say together: made-up records, known answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import comparison, strategies
from benchmarks.grids import CELLS, GRIDS, Grid, config_of, settings_of
from corrector_jax import config as configs
from corrector_jax.types import UserError

QUERIES = 50
GRID = Grid(setting={}, cells=("uniform", "stale", "corrected", "refreshed-25"), seeds=(0, 1))


def record(
    cell: str, seed: int, mrr: float, *, kl: float = 0.3, refresh: int = 0
) -> dict[str, Any]:
    """A run whose MRR@10 is the same for every query."""
    cached = cell != "uniform"
    metrics = {"mrr@10": mrr, "recall@20": mrr, "ndcg@10": mrr}
    series = {}
    if cached:
        gate = 1.0 if cell == "corrected" else 0.0
        series = {
            "probe/kl_stale": [[3, 6], [0.5, 1.0]],
            "probe/kl_corrected": [[3, 6], [0.4, kl]],
            "probe/gate": [[3, 6], [0.0, gate]],
        }
    return {
        "cell": cell,
        "seed": seed,
        "settings": {"train.steps": 8, "strategy": cell, "seed": seed},
        "queries": "the same",
        "dataset": {"targets": 100},
        "encoder": {},
        "devices": "1 x cpu",
        "cores": 2,
        "jax": "0",
        "steps": 8,
        "eval": {"before": metrics, "after": metrics, "bm25": metrics},
        "distribution": dict.fromkeys(
            ("kl_stale", "kl_corrected", "drift", "corrected_error"), kl if cached else None
        ),
        "ledger": {
            "initial": 100 * cached,
            "refresh": refresh,
            "encoded_with_grad": 40,
            "encoded_without_grad": 5,
            "evaluation": 1000,
            "corpus_passes": 1.0,
        },
        "wall_seconds": 60.0,
        "series": series,
        "per_query": dict.fromkeys(("mrr@10", "recall@20"), [mrr] * QUERIES),
    }


def records(corrected: float, *, kl: float = 0.3) -> dict[str, list[dict[str, Any]]]:
    """Two seeds of each cell of `GRID`."""
    return {
        "uniform": [record("uniform", seed, 0.2) for seed in (0, 1)],
        "stale": [record("stale", seed, 0.25, kl=1.0) for seed in (0, 1)],
        "corrected": [record("corrected", seed, corrected, kl=kl) for seed in (0, 1)],
        "refreshed-25": [record("refreshed-25", seed, 0.3, refresh=700) for seed in (0, 1)],
    }


def met(found: Sequence[dict[str, Any]]) -> list[bool]:
    return [one["met"] for one in found if one["cell"] == "corrected"]


def test_goals_are_met_and_missed_where_they_should_be():
    # as good as refreshed, with four times fewer re-embedded; better than stale; KL
    assert met(comparison.goals(GRID, records(0.3, kl=0.05))) == [True, True, True, True]
    assert met(comparison.goals(GRID, records(0.291))) == [True, True, True, False]
    assert met(comparison.goals(GRID, records(0.289))) == [False, False, True, False]
    assert met(comparison.goals(GRID, records(0.2))) == [False, False, False, False]


def test_fewer_re_embeddings_alone_do_not_meet_the_goal():
    goal = comparison.goals(GRID, records(0.2))[1]
    assert goal["value"] == 8.0  # (100 + 700) / 100
    assert not goal["met"]


def test_a_summary_says_means_spreads_and_what_is_missing():
    some = records(0.3)
    some["corrected"] = [record("corrected", 0, 0.30), record("corrected", 1, 0.32)]
    some["stale"] = some["stale"][:1]
    del some["uniform"]
    summary = comparison.summarise(GRID, "made-up", some)
    assert summary["setting"] == {"train.steps": 8}
    assert summary["missing"] == ["uniform-0", "uniform-1", "stale-1"]
    assert summary["cells"]["corrected"]["mrr@10"] == {"mean": 0.31, "sd": 0.0141}
    assert summary["cells"]["stale"]["mrr@10"] == {"mean": 0.25, "sd": None}
    assert summary["cells"]["corrected"]["encoded"]["mean"] == 145  # evaluation left out
    by_seed = {
        (one["cell"], one["against"]): one["seeds"]
        for one in summary["differences"]
        if one["metric"] == "mrr@10"
    }
    assert by_seed["corrected", "stale"] == 1  # only what both have is compared
    assert by_seed["corrected", "refreshed-25"] == 2
    json.dumps(summary)


def test_a_grid_of_answers_is_judged_by_them_and_against_a_frozen_retriever():
    grid = Grid(
        setting={}, cells=("frozen", "stale", "corrected", "refreshed-25"), seeds=(0, 1),
        references=("frozen", "stale", "refreshed-25"), corrected=("corrected",),
        metrics=("em", "recall@20"),
    )  # fmt: skip
    some = {}
    for cell, em in (("frozen", 0.1), ("stale", 0.2), ("corrected", 0.3), ("refreshed-25", 0.3)):
        some[cell] = [record(cell, seed, 0.5) for seed in (0, 1)]
        for one in some[cell]:
            one["per_query"]["em"] = [em] * QUERIES
            one["eval"]["after"] = one["eval"]["after"] | {"em": em}
            one["read"] = {"known_positives": {"em": 0.8 + one["seed"] / 10, "f1": 0.9}}
    summary = comparison.summarise(grid, "made-up", some)
    goals = {one["goal"]: (one["value"], one["met"]) for one in summary["goals"]}
    assert goals["better than frozen: EM interval above 0"] == (0.2, True)
    assert goals["better than stale: EM interval above 0"] == (0.1, True)
    assert goals["as good as refreshed-25: EM interval above -0.01"] == (0.0, True)
    pairs = [
        (one["cell"], one["against"]) for one in summary["differences"] if one["metric"] == "em"
    ]
    assert pairs == [  # each once
        ("stale", "frozen"),
        ("corrected", "frozen"),
        ("refreshed-25", "frozen"),
        ("corrected", "stale"),
        ("refreshed-25", "stale"),
        ("corrected", "refreshed-25"),
    ]
    assert len(summary["differences"]) == 2 * len(pairs)
    table = comparison.tables(summary)
    assert "| strategy | EM | R@20 | KL at the end |" in table
    assert "| the reader reads known positives | 0.850 |  | | | | |" in table
    assert "| `corrected` | 0.300 ± 0.000 | 0.500 ± 0.000 | 0.300 ± 0.000 |" in table


def test_a_cell_of_two_grids_is_run_once(tmp_path: Path):
    for grid in GRIDS.values():
        if grid.shares:
            assert grid.setting == GRIDS[grid.shares].setting
            assert grid.targets == GRIDS[grid.shares].targets
    folder = tmp_path / "strategies" / "small"
    folder.mkdir(parents=True)
    for cell, of in records(0.3).items():
        for run in of:
            (folder / f"{cell}-{run['seed']}.json").write_text(json.dumps(run))
    comparison.write(GRIDS["alternatives"], "alternatives", tmp_path)
    summary = json.loads((tmp_path / "strategies_alternatives_summary.json").read_text())
    assert list(summary["cells"]) == ["stale", "corrected"]
    assert summary["goals"] == []
    assert "| goal |" not in comparison.tables(summary)


def test_what_selection_uses_is_stale_until_the_gate_opens():
    steps, values = comparison.in_use(record("corrected", 0, 0.3, kl=0.1))
    np.testing.assert_array_equal(steps, [3, 6])
    np.testing.assert_array_equal(values, [0.5, 0.1])
    assert comparison.in_use(record("uniform", 0, 0.3)) is None


def test_tables_and_plots_come_from_the_files(tmp_path: Path):
    folder = tmp_path / "strategies" / "made-up"
    folder.mkdir(parents=True)
    for cell, of in records(0.3).items():
        for one in of:
            (folder / f"{cell}-{one['seed']}.json").write_text(json.dumps(one))
    comparison.write(GRID, "made-up", tmp_path)
    for plot in ("recall", "kl"):
        png = (tmp_path / f"strategies_made-up_{plot}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) < 100_000
    page = tmp_path / "results.md"
    marked = "before\n<!-- strategies {} -->\nold\n<!-- end -->\nafter\n"
    page.write_text(marked.format("made-up") + marked.format("not-run"))
    comparison.fill_in(page, tmp_path)
    filled = page.read_text()
    assert (
        "| `corrected` | 0.300 ± 0.000 | 0.300 ± 0.000 | 0.300 ± 0.000 | 145 | 100 | 1.0 |"
        in filled
    )
    assert "| `corrected` - `stale` | +0.0500 (+0.0500 to +0.0500) |" in filled
    assert "(strategies_made-up_kl.png)" in filled.replace("./", "")
    columns = [line.count("|") for line in filled.splitlines() if line.startswith("|")]
    assert set(columns) == {8, 4, 5}  # no cell holds a bar of its own
    assert filled.endswith("before\n<!-- strategies not-run -->\n<!-- end -->\nafter\n")
    assert "old" not in filled
    comparison.fill_in(page, tmp_path)
    assert page.read_text() == filled


@pytest.mark.parametrize("other", [{"queries": "others"}, {"dataset": {"targets": 99}}])
def test_runs_on_different_data_are_not_compared(tmp_path: Path, other: dict[str, Any]):
    for seed, change in ((0, {}), (1, other)):
        one = record("stale", seed, 0.3) | change
        (tmp_path / f"stale-{seed}.json").write_text(json.dumps(one))
    with pytest.raises(UserError, match="different data"):
        comparison.read(GRID, tmp_path)


@pytest.mark.parametrize("name", list(GRIDS))
def test_cells_of_a_grid_differ_in_their_strategy_alone(name: str):
    grid = GRIDS[name]
    assert {*grid.references, *grid.corrected} <= set(grid.cells)
    assert grid.fresh in grid.references or not grid.corrected
    found = {cell: settings_of(config_of(grid.setting, cell, 1)) for cell in grid.cells}
    for cell, settings in found.items():
        own = {"strategy", *CELLS[cell], "seed"}
        if cell.startswith("refreshed"):
            own.add("corrector.probe_every")
        rest = {key: value for key, value in settings.items() if key not in own}
        assert rest == {k: v for k, v in grid.setting.items() if k not in own}


@pytest.mark.parametrize("cell", list(CELLS))
def test_every_cell_can_be_run_at_equal_encodes(cell: str):
    setting = {"train.batch_size": 8, "negatives.draws": 3, "corrector.probe_every": 20}
    config = config_of(setting, cell, 2)
    assert config.seed == 2
    drawn = 0 if config.strategy == "in_batch" else config.negatives.draws
    assert config.train.batch_size * (1 + drawn) == 32


def test_a_refresh_is_never_where_the_probe_is():
    for cell in ("refreshed-25", "refreshed-100"):
        config = config_of({"corrector.probe_every": 100}, cell, 0)
        assert 0 < config.corrector.probe_every < config.refresh.every


def test_changes_are_read_as_the_configuration_reads_them():
    said = ["--config.train.steps=9", "--config.eval.bm25=False", "--config.model.beta=5"]
    assert strategies.parse_changes(said) == {
        "train.steps": 9,
        "eval.bm25": False,
        "model.beta": 5.0,
    }
    for wrong in ("--config.train.step=9", "--stray", "--config.train.steps=many"):
        with pytest.raises(UserError, match=wrong):
            strategies.parse_changes([wrong])


def test_where_data_lies_is_no_part_of_a_setting():
    config = configs.default()
    config.data.path, config.train.steps = "/somewhere", 7
    assert settings_of(config) == {"train.steps": 7}
