"""What is compared: strategies by name, and the settings they are compared in.

A cell is a strategy with what it overrides; a grid holds a setting and the cells worth their time
in it. A new one of either is an entry here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import rlm_quickstart
from corrector_jax import config as configs

_LINEAR = {"strategy": "corrected", "corrector.kind": "linear"}

CELLS: dict[str, dict[str, Any]] = {
    "in_batch": {"strategy": "in_batch"},
    "uniform": {"strategy": "uniform"},
    "mined": {"strategy": "mined"},
    "stale": {"strategy": "stale"},
    "corrected": {"strategy": "corrected"},
    "corrected-linear": _LINEAR,
    "corrected-500": {"strategy": "corrected", "refresh.every": 500},
    "linear-truncated": {**_LINEAR, "loss.estimator": "truncated"},
    "linear-single": {**_LINEAR, "loss.estimator": "single"},
    "linear-weighted": {**_LINEAR, "loss.estimator": "weighted"},
    "linear-kool": {**_LINEAR, "negatives.proposal": "gumbel_topk"},
    "nystrom": {"strategy": "nystrom", "corrector.fit_every": 40},
    "refreshed-25": {"strategy": "refreshed", "refresh.every": 25},
    "refreshed-100": {"strategy": "refreshed", "refresh.every": 100},
    "refreshed-500": {"strategy": "refreshed", "refresh.every": 500},
    "oracle": {"strategy": "oracle"},  # for `ORACLE` targets or less
    "streaming": {"strategy": "streaming"},
    "rolling": {"strategy": "rolling", "refresh.rows": 32},
    "frozen": {"strategy": "stale", "reader.moves": "none"},
    "refreshed-answers": {"strategy": "refreshed", "refresh.schedule": "525-end:25"},
}
"""Name -> what differs from the grid's setting."""

ORACLE = 2000
"""Targets that may all be embedded at every step."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """A setting, and what is compared in it.

    Attributes:
      setting: dotted keys of the configuration, the same for all cells.
      cells: names of `CELLS`, in the order of the table.
      seeds: of every cell.
      targets: the data is cut to so many, all that dev judges among them; 0 = all.
      references: the cells that all others are held against.
      corrected: the cells whose goals are decided: as good as `fresh`, better than the other
        references.
      fresh: the reference that refreshes.
      metrics: what cells are compared by; the goals are of the first.
      own_data: the data are the embedded default ones, whole, and no --data is read.
      shares: the grid of the same setting whose runs and results these are too, so that a cell of
        both is run once; empty = its own.
    """

    setting: Mapping[str, Any]
    cells: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    targets: int = 0
    references: tuple[str, ...] = ("stale", "refreshed-25")
    corrected: tuple[str, ...] = ("corrected", "corrected-linear")
    fresh: str = "refreshed-25"
    metrics: tuple[str, ...] = ("mrr@10", "recall@20")
    own_data: bool = False
    shares: str = ""

    def folder(self, name: str) -> str:
        """The name of the folders that hold its runs and their results.

        Args:
          name: of the results.
        """
        return self.shares or name


def settings_of(config: ConfigDict) -> dict[str, Any]:
    """The keys that differ from the default, but for where the data lies: {dotted key: value}."""
    default = dict(configs.flat(configs.default()))
    return {
        key: value
        for key, value in configs.flat(config)
        if value != default[key] and key not in ("data.path", "data.cache_dir", "negatives.path")
    }


_SMALL = {
    "data.query_max_len": 24,
    "data.target_max_len": 24,
    "model.layers": 2,
    "train.steps": 160,
    "train.warmup": 20,
    "train.learning_rate": 1e-4,
    "negatives.draws": 4,
    "corrector.updates": 4,
    "corrector.probe_every": 20,
    "corrector.probe_targets": 512,
    "log.tensorboard": False,
    "checkpoint.every": 50,
    "checkpoint.keep": 1,
}

GRIDS: dict[str, Grid] = {
    # Two cores, 90 minutes: docs/results.md says how it was chosen.
    "small": Grid(
        setting=_SMALL,
        cells=("uniform", "stale", "corrected", "corrected-linear", "refreshed-25"),
        targets=20_000,
    ),
    # What else keeps a cache near the encoder, at about as many encodes as the correctors' probes.
    "alternatives": Grid(
        setting=_SMALL,
        cells=("stale", "corrected", "corrected-linear", "nystrom", "rolling", "streaming"),
        references=("stale", "corrected-linear"),
        corrected=(),
        targets=20_000,
        shares="small",
    ),
    # Which estimator trains the best retriever; corrected-linear has the default one, balanced.
    "estimators": Grid(
        setting=_SMALL,
        cells=(
            "corrected-linear",
            "linear-truncated",
            "linear-single",
            "linear-weighted",
            "linear-kool",
        ),
        references=("corrected-linear",),
        corrected=(),
        targets=20_000,
        shares="small",
    ),
    # All of the data that small is cut from: five times as many targets in the same steps.
    "full": Grid(
        setting=_SMALL,
        cells=("stale", "corrected-linear", "refreshed-25"),
        corrected=("corrected-linear",),
    ),
    # Other data, the same setting but for longer targets: nothing was chosen on them.
    "sentences": Grid(
        setting={**_SMALL, "data.target_max_len": 40},
        cells=("stale", "corrected-linear", "refreshed-25"),
        corrected=("corrected-linear",),
    ),
    # Data that the encoder was trained on, where metrics have little room: the loss has more.
    "questions": Grid(
        setting={**_SMALL, "data.target_max_len": 40},
        cells=("stale", "corrected-linear", "refreshed-25"),
        corrected=("corrected-linear",),
        metrics=("mrr@10", "recall@20", "exact_loss"),
    ),
    # Retrieval learned through answers alone.
    "answers": Grid(
        setting=settings_of(rlm_quickstart.get_config()),
        cells=("frozen", "stale", "corrected", "refreshed-answers"),
        references=("frozen", "stale", "refreshed-answers"),
        corrected=("corrected",),
        fresh="refreshed-answers",  # every 25 steps, once passages are no longer given
        metrics=("em", "recall@20", "mrr@10"),
        own_data=True,
    ),
}


def config_of(setting: Mapping[str, Any], cell: str, seed: int) -> ConfigDict:
    """The configuration of one run, but for its data.

    Every cell encodes equally many targets with gradient at a step. in_batch draws nothing and
    spends its share on further queries with their positives: B (1 + m) of them.

    Args:
      setting: of the grid.
      cell: a name of `CELLS`.
      seed: of the run.

    Returns:
      A configuration that is valid.

    Raises:
      UserError: the setting and the cell do not fit together.
    """
    config = configs.default()
    config.update_from_flattened_dict({**setting, **CELLS[cell], "seed": seed})
    if config.strategy == "in_batch":
        config.train.batch_size *= 1 + config.negatives.draws
    refresh = configs.refresh_policy_of(config).shortest(config.train.steps)
    if config.strategy == "refreshed" and refresh <= config.corrector.probe_every:
        # A probe that falls on a refresh is left out: look before it, where the cache is oldest.
        config.corrector.probe_every = refresh - 1
    configs.validate(config)
    return config
