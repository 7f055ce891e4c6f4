"""Candidates of the next batch: found during this step, saved with it, and without ScaNN too."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from corrector_jax import index
from corrector_jax.checkpoint import Checkpoints
from corrector_jax.evaluate import evaluate_run
from corrector_jax.inspection import inspect_run
from corrector_jax.job import make_job
from corrector_jax.lookahead import Nothing, make_lookahead
from corrector_jax.train import place_batch, train
from corrector_jax.types import UserError
from tests import oracle, stopping, tiny

CHANGES = {
    "negatives__proposal": "scann", "negatives__candidates": 12, "negatives__tail": 8,
    "index__leaves": 4, "index__searched": 2, "corrector__kind": "linear",
    "eval__bm25": False, "refresh__every": 4, "train__steps": 7, "checkpoint__every": 3,
    "corrector__probe_every": 1, "train__schedule": "constant",
}  # fmt: skip


def run(config, workdir: Path) -> None:
    train(config, workdir, started=time.monotonic())


def saved(config, workdir: Path):
    job = make_job(config)
    with Checkpoints.readable(workdir) as checkpoints:
        return checkpoints.resume(
            job.init_state(), job.empty_cache(), data=job.fingerprint, made_by=job.made_by
        )


def outcome(config, workdir: Path) -> dict[str, object]:
    state, cache, position = saved(config, workdir)
    leaves, _ = jax.tree_util.tree_flatten_with_path((state, cache))
    found: dict[str, object] = {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves
    }
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    found["losses"] = [row["train/loss"] for row in rows if "train/loss" in row]
    found["candidates"] = position.candidates
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    """A run that nothing happened to."""
    run(tiny.config(folder, **CHANGES), folder / "alone")
    return folder / "alone"


def test_candidates_of_the_next_batch_are_saved_and_not_those_of_any_other(folder, alone):
    config = tiny.config(folder, **CHANGES)
    _, _, position = saved(config, alone)
    assert np.shape(position.candidates) == (8, 12)
    assert np.min(position.candidates) >= 0
    assert np.max(position.candidates) < tiny.TARGETS
    rows = list(map(json.loads, (alone / "metrics.jsonl").read_text().splitlines()))
    assert all(0 <= row["train/tail_share"] <= 1 for row in rows if "train/loss" in row)
    assert {path.name for path in (alone / "cache" / "4").glob("index*")} == {"index-0-of-1"}


def test_inspecting_a_run_looks_at_its_index_too(alone, tmp_path, capsys):
    assert inspect_run(alone)
    assert re.search(r"index-0-of-1  \S+ \wB  good", capsys.readouterr().out)
    workdir = shutil.copytree(alone, tmp_path / "run")
    path = workdir / "cache" / "4" / "index-0-of-1" / "hashed_dataset.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not inspect_run(workdir)
    assert "index-0-of-1  DAMAGED, a resumed run makes it anew" in capsys.readouterr().out


def test_stopped_again_and_again_it_ends_as_if_nothing_had_happened(folder, alone, monkeypatch):
    config = tiny.config(folder, **CHANGES)
    assert stopping.to_its_end(lambda: run(config, folder / "stopped"), monkeypatch) >= 3
    expected, found = outcome(config, alone), outcome(config, folder / "stopped")
    assert [key for key in expected if expected[key] != found[key]] == []


def test_prolonged_without_its_index_a_run_is_the_one_that_was_that_long_at_once(
    folder, alone, capsys
):
    """Candidates of the batch after the last are kept, and an index is made anew as it was."""
    shorter = tiny.config(folder, **CHANGES | {"train__steps": 6})
    run(shorter, folder / "prolonged")
    shutil.rmtree(folder / "prolonged" / "cache" / "4" / "index-0-of-1")
    capsys.readouterr()
    config = tiny.config(folder, **CHANGES)
    run(config, folder / "prolonged")
    assert "the index over the cache is made anew" in capsys.readouterr().out
    expected, found = outcome(config, alone), outcome(config, folder / "prolonged")
    assert [key for key in expected if expected[key] != found[key]] == []


def test_evaluating_by_index_says_what_it_misses(folder, alone, monkeypatch):
    exact = json.loads(evaluate_run(alone).read_text())
    found = json.loads(evaluate_run(alone, search="scann").read_text())
    assert found["name"] == f"{exact['name']}-scann"
    assert found["search"]["leaves"] == 4  # of the run's configuration
    missed = found["search"]["recall_of_exact"]
    assert 0.3 < missed < 1.0  # two of four leaves
    assert found["metrics"]["recall@100"] <= exact["metrics"]["recall@100"]
    assert found["distribution"] == pytest.approx(exact["distribution"])
    with pytest.raises(UserError, match="'faiss': write exact or scann"):
        evaluate_run(alone, search="faiss")
    monkeypatch.setattr(index, "why_not", lambda: "ImportError: no scann")
    with pytest.raises(UserError, match=r"no scann.*write --config\.eval\.search=exact"):
        evaluate_run(alone, search="scann")


def test_without_scann_the_device_finds_the_best_and_it_is_said_once(folder, monkeypatch, capsys):
    config = tiny.config(folder, **CHANGES | {"index__leaves": 1, "corrector__kind": "mlp"})
    job = make_job(config)
    state, batch = job.init_state(), place_batch(job, 0)
    rows = oracle.unit(np.random.default_rng(0), tiny.TARGETS, job.model.dim)
    cache = oracle.filled(rows, job.place, block_rows=4)
    there = make_lookahead(job)
    there.renew(cache, folder / "unused", {"sha256": ""})
    monkeypatch.setattr(index, "why_not", lambda: "ImportError: no scann")
    capsys.readouterr()
    missing = make_lookahead(job)
    missing.renew(cache, folder / "unused", {"sha256": ""})
    said = capsys.readouterr().out
    assert "ScaNN cannot be imported (ImportError: no scann)" in said
    assert len(said.splitlines()) == 1
    assert missing.candidates() is None
    with jax.transfer_guard_device_to_host("disallow"):
        exact, found = (
            np.asarray(jax.device_get(one.join(batch, state, cache).candidates))
            for one in (there, missing)
        )
    queries = jax.device_get(job.model.encode_queries(state.params, batch.query_tokens))
    known = jax.device_get(batch.known)
    scores = queries @ rows.T
    np.testing.assert_array_equal(exact, np.argsort(-scores, axis=1)[:, :12])
    scores[oracle.is_known(known, tiny.TARGETS)] = -np.inf  # a sweep leaves them out
    np.testing.assert_array_equal(found, np.argsort(-scores, axis=1)[:, :12])
    there.close()
    missing.close()


def test_what_failed_while_searching_is_raised_where_it_is_waited_for(folder, monkeypatch):
    job = make_job(tiny.config(folder, **CHANGES))
    lookahead = make_lookahead(job)
    cache = oracle.filled(np.eye(tiny.TARGETS, 16, dtype=np.float32), job.place, block_rows=4)
    lookahead.renew(cache, folder / "unused", {"sha256": ""})

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(index.Index, "search", broken)
    lookahead.start(place_batch(job, 0), job.init_state(), cache)
    with pytest.raises(RuntimeError, match="out of memory"):
        lookahead.candidates()
    lookahead.close()


def test_strategies_without_candidates_look_for_none(folder):
    job = make_job(tiny.config(folder))
    assert isinstance(make_lookahead(job), Nothing)
    assert place_batch(job, 0).candidates is None
