"""What is kept for the pictures is what the run had, and costs no encoding."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corrector_jax import snapshot, staleness
from corrector_jax.evaluate import restored
from corrector_jax.report.staleness import read_samples
from corrector_jax.staleness import HEAVIEST, KEPT, QUERIES, is_kept
from corrector_jax.steps.probe_step import sampled


@pytest.fixture(scope="module")
def run(finished):
    return restored(finished, step=None, with_cache=True)


@pytest.fixture(scope="module")
def rows(finished, run):
    """Model -> [N, D] of all targets at the end, and the final split's queries [Q, D]."""
    job, state, cache, _ = run
    fresh = np.zeros((job.size, job.model.dim), np.float32)
    for ids, block in job.embedder.blocks(state.params, np.arange(job.size)):
        held = np.asarray(ids) >= 0
        fresh[np.asarray(ids)[held]] = np.asarray(block)[held]
    stale = np.asarray(cache.embeddings)[: job.size]
    corrector = state.corrector
    corrected = job.method.corrector.apply(corrector.params, stale, 1.0)
    tokens = job.query_tokens[job.final_split]
    queries = np.asarray(job.embedder.queries(state.params, tokens))[: len(tokens)]
    return {"fresh": fresh, "stale": stale, "corrected": np.asarray(corrected)}, queries


def test_samples_are_of_the_same_targets_at_several_steps(finished, run, rows):
    job, _, _, position = run
    samples = read_samples(finished)
    assert [sample.step for sample in samples] == [3, 6, position.step]
    ids = np.asarray(sampled(job.probe_ids))
    for name, table in rows[0].items():
        np.testing.assert_allclose(getattr(samples[-1], name), table[ids], atol=1e-5)
    for sample in samples:  # the cache is never refreshed
        np.testing.assert_array_equal(sample.stale, samples[-1].stale)
    assert not np.allclose(samples[0].fresh, samples[1].fresh)


def test_what_the_softmax_misses_is_half_the_distance_over_all_targets(finished, run, rows):
    job, state, _, position = run
    record = json.loads((finished / "softmax.json").read_text())
    assert (record["step"], record["targets"]) == (position.step, job.size)
    assert len(record["queries"]) == QUERIES
    tables, queries = rows
    if not float(state.corrector.gate):
        tables = tables | {"corrected": tables["stale"]}  # what selection uses
    texts = job.data.splits[job.final_split].texts
    for entry in record["queries"]:
        query = queries[texts.index(entry["query"])].astype(np.float64)
        softmax = {}
        for name, table in tables.items():
            weights = np.exp(job.method.beta * (table @ query))
            softmax[name] = weights / weights.sum()
        for name in ("stale", "corrected"):
            distance = np.abs(softmax["fresh"] - softmax[name]).sum() / 2
            assert entry["missed"][name] == pytest.approx(distance, abs=1e-4)
        best = np.argsort(-softmax["fresh"])[:HEAVIEST]
        assert [heavy["target"] for heavy in entry["heaviest"]] == [
            job.data.target_ids[row] for row in best
        ]
        for heavy, row in zip(entry["heaviest"], best, strict=True):
            assert heavy["stale"] == pytest.approx(softmax["stale"][row], rel=1e-3)


def test_keeping_them_encodes_nothing(finished):
    ledger = json.loads((finished / "results.json").read_text())["ledger"]
    assert ledger["encoded_without_grad"] == 2 * 32  # the two probes
    assert ledger["evaluation"] == ledger["initial"]  # the last evaluation


def test_of_a_large_corpus_the_softmaxes_are_left_out(finished, run, monkeypatch, tmp_path):
    job, state, cache, position = run
    monkeypatch.setattr(staleness, "_MOST", job.size - 1)
    staleness.Watched(job, state).write(tmp_path, position.step, state, cache)
    assert [path.name for path in tmp_path.iterdir()] == ["drift"]


@given(every=st.integers(1, 60), probes=st.integers(1, 60), rest=st.integers(0, 59))
def test_few_probes_are_kept_and_they_are_spread_over_the_run(every, probes, rest):
    steps = every * probes + min(rest, every - 1) + 1
    kept = [s for s in range(every, steps, every) if is_kept(s, every=every, steps=steps)]
    assert len(kept) <= KEPT
    if probes >= KEPT:
        assert len(kept) >= KEPT - 1
        assert max(np.diff([0, *kept, steps])) <= 2 * math.ceil(steps / KEPT) + every


def test_the_first_snapshot_is_what_stale_rows_are(finished, rows):
    folder = finished / "cache" / "0"
    assert snapshot.read_manifest(folder)["step"] == 0
    assert np.square(rows[0]["stale"] - rows[0]["fresh"]).sum() > 0
