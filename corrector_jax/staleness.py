"""What is kept of a run so that its staleness can be looked at: a few rows, and a few softmaxes.

    drift/STEP.safetensors   "stale", "corrected", "fresh" [S, D] float32 of the same S targets
    softmax.json             of a few held-out queries: where their fresh softmax lies at the end,
                             and how much of it the stale and the corrected one miss

Both are by-products: rows of the probe, and of the last evaluation, which encode them anyway. A
file is a function of the step, so that a run that was stopped leaves the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from corrector_jax import distributed, paths
from corrector_jax.cache import TargetCache
from corrector_jax.embed import cached_blocks
from corrector_jax.job import Job
from corrector_jax.models.corrector import Corrector, Identity
from corrector_jax.negatives import Gated
from corrector_jax.paths import AnyPath
from corrector_jax.state import TrainState
from corrector_jax.steps.probe_step import Sample, sampled
from corrector_jax.types import Array

KEPT = 5
"""Probes whose sample is kept, spread over the run; the end is kept beside them."""

QUERIES = 6
"""Held-out queries whose softmax is kept, spread evenly over the final split."""

HEAVIEST = 12
"""Targets of each that are named."""

_MOST = 2**21
"""Targets of a corpus whose logits a host holds for this; of larger ones no softmax is kept."""

_ROWS_AT_ONCE = 8192


def is_kept(step: int, *, every: int, steps: int) -> bool:
    """Whether the probe before `step` is the first one in its part of the run."""
    return step * KEPT // steps > (step - every) * KEPT // steps


def keep_sample(workdir: AnyPath, step: int, sample: Sample) -> None:
    """Writes a sample of the probe; of several processes the first one does.

    Args:
      workdir: the run's folder.
      step: steps done.
      sample: [S, D] each, on the host.
    """
    if distributed.is_lead():
        rows = {name: np.ascontiguousarray(array) for name, array in sample._asdict().items()}
        paths.write(workdir / "drift" / f"{step}.safetensors", safetensors.numpy.save(rows))


class Watched:
    """Takes part in the last evaluation, and keeps what it sees of a few targets and queries."""

    def __init__(self, job: Job, state: TrainState) -> None:
        """Starts with nothing seen.

        Args:
          job: the job, of a strategy with a cache.
          state: the trained state.
        """
        self._job = job
        split = job.data.splits[job.final_split]
        chosen = np.unique(np.linspace(0, len(split.texts) - 1, QUERIES).astype(int))
        self._texts = [split.texts[i] for i in chosen]
        tokens = job.query_tokens[job.final_split][chosen]
        queries = job.place.fetch(job.embedder.queries(state.params, tokens))
        self._queries = job.method.beta * queries[: len(chosen)]
        self._ids = np.asarray(job.place.fetch(sampled(job.probe_ids)))
        self._fresh = np.zeros((len(self._ids), job.model.dim), np.float32)
        self._logits = self._empty()

    def add(self, ids: Array, fresh: Array) -> None:
        """Takes one block: ids [b] int32 (-1 = empty place), fresh embeddings [b, D] float32."""
        held, rows = jax.device_get((ids, fresh))
        held, rows = held[held >= 0], rows[held >= 0]
        _, here, there = np.intersect1d(held, self._ids, return_indices=True)
        self._fresh[there] = rows[here]
        if self._logits is not None:
            self._logits[:, held] = self._queries @ rows.T

    def write(self, workdir: AnyPath, step: int, state: TrainState, cache: TargetCache) -> None:
        """Writes the sample at the end, and the softmaxes unless there are too many targets.

        Args:
          workdir: the run's folder.
          step: steps done.
          state: the trained state.
          cache: the cache.
        """
        # As the probe does, whether or not the gate is open.
        psi = Gated(state.corrector.params, self._job.place.put_everywhere(np.float32(1.0)))
        corrector = self._job.method.corrector
        of_sample = [
            np.concatenate([rows for _, rows in self._rows(cache, psi, h, self._ids)])
            for h in (Identity(), corrector)
        ]
        keep_sample(workdir, step, Sample(of_sample[0], of_sample[1], self._fresh))
        if self._logits is None:
            return
        everything = np.arange(self._job.size)
        softmaxes = {"fresh": _softmax(self._logits)}
        for name, h, gated in (
            ("stale", Identity(), psi),
            ("corrected", corrector, state.corrector.gated),
        ):
            for ids, rows in self._rows(cache, gated, h, everything):
                self._logits[:, ids] = self._queries @ rows.T
            softmaxes[name] = _softmax(self._logits)
        if distributed.is_lead():
            record = {
                "step": step,
                "targets": self._job.size,
                "queries": self._described(softmaxes),
            }
            paths.write(workdir / "softmax.json", json.dumps(record) + "\n")

    def _described(self, softmaxes: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        fresh = softmaxes["fresh"]
        heaviest = np.argsort(-fresh, axis=1, kind="stable")[:, :HEAVIEST]
        return [
            {
                "query": text,
                # Half the distance of the two: the share of draws that go elsewhere.
                "missed": {
                    name: _short(np.maximum(fresh[i] - softmaxes[name][i], 0.0).sum())
                    for name in ("stale", "corrected")
                },
                "heaviest": [
                    {"target": self._job.data.target_ids[row]}
                    | {name: _short(softmax[i, row]) for name, softmax in softmaxes.items()}
                    for row in heaviest[i]
                ],
            }
            for i, text in enumerate(self._texts)
        ]

    def _empty(self) -> np.ndarray | None:
        shape = (len(self._texts), self._job.size)
        return np.zeros(shape, np.float32) if self._job.size <= _MOST else None

    def _rows(
        self, cache: TargetCache, psi: Gated, h: Corrector, ids: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids [n], h(C) of them [n, D]) on the host, block by block."""
        block = min(_ROWS_AT_ONCE, len(ids))
        place = self._job.place
        for held, rows in cached_blocks(cache, psi, ids, corrector=h, block=block, place=place):
            held, rows = jax.device_get((held, rows))
            yield held[held >= 0], rows[held >= 0]


def _softmax(logits: np.ndarray) -> np.ndarray:
    """[Q, N] -> [Q, N] float64."""
    logits = logits.astype(np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _short(value: float) -> float:
    return float(f"{value:.6g}")
