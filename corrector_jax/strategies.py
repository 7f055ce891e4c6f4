"""Strategies: one word for how negatives are chosen and how the cache lives (docs/method.md, 8).

A strategy is a value that sets defaults and says what may be changed. To add one, add a line to
`STRATEGIES`; only a new proposal, corrector, cache policy or refresh policy needs code, in
`negatives`, `models/corrector`, `steps/cache_policy` or `refresh_policy`.
"""

from __future__ import annotations

from typing import NamedTuple

SAMPLED = ("balanced", "truncated", "single", "weighted", "kool")
"""Task losses for draws from a softmax over all targets."""

CACHED = ("two_level", "gumbel_topk", "topk")
"""Proposals that sweep the cache."""

INDEXED = (*CACHED, "scann")
"""And the one that searches an index of it: for a cache that changes with whole snapshots alone."""


class Strategy(NamedTuple):
    """What a strategy word stands for.

    Attributes:
      proposals: config words allowed for the proposal; the first is the default, as below.
      correctors: for the corrector.
      refreshes: for the refresh policy.
      estimators: for the task loss.
      cache: what a step does to the cache: "keep", "write_back" or "rolling".
    """

    proposals: tuple[str, ...]
    correctors: tuple[str, ...] = ("identity",)
    refreshes: tuple[str, ...] = ("never",)
    estimators: tuple[str, ...] = SAMPLED
    cache: str = "keep"

    @property
    def uses_cache(self) -> bool:
        """Whether the proposal reads cached embeddings."""
        return self.proposals[0] in CACHED


STRATEGIES: dict[str, Strategy] = {
    "in_batch": Strategy(("in_batch",), estimators=("truncated",)),
    "uniform": Strategy(("uniform",), estimators=("weighted", "balanced", "truncated")),
    "mined": Strategy(("mined",), estimators=("truncated",)),
    "stale": Strategy(INDEXED),
    "corrected": Strategy(
        INDEXED,
        correctors=("mlp", "linear"),
        refreshes=("never", "every", "schedule", "adaptive"),
    ),
    "nystrom": Strategy(CACHED, correctors=("nystrom",)),
    "refreshed": Strategy(INDEXED, refreshes=("every", "schedule", "adaptive")),
    "oracle": Strategy(CACHED, refreshes=("always",)),
    "streaming": Strategy(CACHED, cache="write_back"),
    "rolling": Strategy(CACHED, cache="rolling"),
}
