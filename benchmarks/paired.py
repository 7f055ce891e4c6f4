"""Is one strategy better than another? Paired intervals over seeds and queries.

A difference d[s, q] is of two runs with the same seed on the same query. Another seed and another
query would both have given another difference, so both are drawn anew: the pigeonhole bootstrap
(Owen 2007, Annals of Applied Statistics 1(2)) draws S of the S seeds and, independently, Q of the
Q queries, each with replacement, and means over the table of the two; the interval holds the
middle 95 % of 2,000 such means. Queries alone would say too little: three other seeds may order
two strategies otherwise. The scheme is conservative where noise is within seed and query; where a
difference hangs on the seed far more than on the queries, three seeds are few for it
(`tests/benchmarks/test_paired.py` measures both).
"""

from __future__ import annotations

import numpy as np
import scipy.stats

from corrector_jax.ranking import Interval, paired_bootstrap

MARGIN = 0.01
"""MRR@10 that is given away for being called as good; decided before anything was run."""


def difference(
    one: np.ndarray,
    other: np.ndarray,
    *,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The mean of one - other, and its interval over seeds and queries.

    Args:
      one: [S, Q] a measure of every query under every seed; one seed gives an interval over the
        queries alone.
      other: [S, Q] of another strategy: the same seeds, the same queries.
      samples: how many tables are drawn.
      level: share of their means inside the interval.
      seed: of the draws; the interval is a function of the arguments alone.

    Raises:
      ValueError: the two differ in shape, or hold nothing.
    """
    if one.shape != other.shape or one.ndim != 2 or not one.size:
        raise ValueError(f"paired measures are [S, Q] twice, not {one.shape} and {other.shape}")
    if len(one) == 1:
        return paired_bootstrap(other[0], one[0], samples=samples, level=level, seed=seed)
    gain = one.astype(np.float64) - other

    def mean(seeds: np.ndarray, queries: np.ndarray, axis: int = -1) -> np.ndarray:
        return gain[seeds[..., :, None], queries[..., None, :]].mean(axis=(-2, -1))

    found = scipy.stats.bootstrap(
        tuple(np.arange(size) for size in gain.shape),
        mean,
        n_resamples=samples,
        batch=max(1, 2**20 // gain.size),
        vectorized=True,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(gain.mean()), float(found.low), float(found.high))


def is_non_inferior(found: Interval, margin: float = MARGIN) -> bool:
    """Whether the interval of (new - reference) excludes a loss of the margin or more."""
    return found.low > -margin


def is_superior(found: Interval) -> bool:
    """Whether the interval of (new - reference) lies above 0."""
    return found.low > 0
