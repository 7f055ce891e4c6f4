"""Strategies: one word for how negatives are chosen and how the cache lives (docs/method.md, 8).

A strategy is a value that sets defaults. To add one, add a line to `STRATEGIES`; only a new
proposal, corrector or refresh policy needs code, in `negatives`, `models/corrector` or `refresh`.
"""

from __future__ import annotations

from typing import NamedTuple


class Strategy(NamedTuple):
    """What a strategy word stands for.

    Attributes:
      proposal: "two_level", "uniform" or "in_batch".
      correctors: config words allowed for the corrector; the first is the default.
      refreshes: config words allowed for refresh; the first is the default.
      estimators: config words allowed for the task loss; the first is the default.
    """

    proposal: str
    correctors: tuple[str, ...]
    refreshes: tuple[str, ...]
    estimators: tuple[str, ...]

    @property
    def uses_cache(self) -> bool:
        """Whether the proposal reads cached embeddings."""
        return self.proposal == "two_level"


_SAMPLED = ("balanced", "truncated", "single", "weighted")

STRATEGIES: dict[str, Strategy] = {
    "in_batch": Strategy("in_batch", ("identity",), ("never",), ("truncated",)),
    "uniform": Strategy(
        "uniform", ("identity",), ("never",), ("weighted", "balanced", "truncated")
    ),
    "stale": Strategy("two_level", ("identity",), ("never",), _SAMPLED),
    "corrected": Strategy("two_level", ("mlp", "linear"), ("never", "every"), _SAMPLED),
    "refreshed": Strategy("two_level", ("identity",), ("every",), _SAMPLED),
}
