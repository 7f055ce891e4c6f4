"""Whole runs, small: what is left in the workdir, resuming, refreshing, refusing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from corrector_jax.checkpoint import Checkpoints
from corrector_jax.job import make_job
from corrector_jax.train import make_batch, train
from corrector_jax.types import UserError
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]


def run(config, workdir: Path) -> dict:
    train(config, workdir, started=time.monotonic())
    return json.loads((workdir / "results.json").read_text())


def final_state(config, workdir: Path) -> dict[str, bytes]:
    """Every leaf of the last checkpoint and its cache, as bytes."""
    job = make_job(config)
    checkpoints = Checkpoints(workdir)
    step = checkpoints.latest()
    cache = job.empty_cache() if job.uses_cache else None
    state, cache, _ = checkpoints.resume(job.init_state(), cache, step=step)
    leaves, _ = jax.tree_util.tree_flatten_with_path((state, cache))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# The runs of one module share their data, and so the programs that are compiled for it.
@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def corrected(folder) -> Path:
    """A finished run of the method itself."""
    workdir = folder / "corrected"
    run(tiny.config(folder), workdir)
    return workdir


def test_a_run_leaves_what_was_promised(corrected):
    for name in (
        "config.json", "metrics.jsonl", "results.json", "report.html", "examples.json",
        "runs/before.trec", "runs/after.trec", "runs/bm25.trec", "eval/after.json",
        "final/modules.json", "final/model.safetensors", "plots/loss.png", "plots/drift.png",
        "plots/kl.png", "plots/recall.png",
    ):  # fmt: skip
        assert (corrected / name).stat().st_size > 0, name
    results = json.loads((corrected / "results.json").read_text())
    measures = {"recall@1", "recall@20", "recall@100", "mrr@10", "ndcg@10"}
    assert set(results["eval"]) == {"before", "after", "bm25"}
    assert all(set(values) == measures for values in results["eval"].values())
    assert set(results["distribution"]) == {
        "kl_stale", "kl_corrected", "drift", "corrected_error",
    }  # fmt: skip
    assert results["steps"] == 8
    assert results["wall_seconds"] > 0
    assert results["examples_per_second"] > 0


def test_the_card_of_the_encoders_has_the_figures_of_the_run(corrected):
    card = (corrected / "final" / "README.md").read_text()
    results = json.loads((corrected / "results.json").read_text())
    for name in ("before", "after", "bm25"):
        for value in results["eval"][name].values():
            assert f"{value:.4f}" in card
    assert f"encoded with grad: {results['ledger']['encoded_with_grad']:,}" in card


def test_the_ledger_counts_every_target_encoded(corrected):
    ledger = json.loads((corrected / "results.json").read_text())["ledger"]
    assert ledger == {
        "initial": tiny.TARGETS,  # shared with the first evaluation
        "refresh": 0,
        "encoded_with_grad": 8 * 8 * (1 + 3),
        "encoded_without_grad": 2 * 32,  # the probes before steps 3 and 6
        "evaluation": tiny.TARGETS,
        "corpus_passes": 1.0,
    }


def test_the_first_evaluation_is_of_the_untouched_encoder_and_training_moves_it(corrected):
    scores = [
        (corrected / "runs" / f"{name}.trec").read_text().splitlines()[0].split()[4]
        for name in ("before", "after")
    ]
    assert scores[0] != scores[1]
    assert all(abs(float(score)) <= 1.0001 for score in scores)  # unit vectors


@pytest.mark.parametrize(
    ("strategy", "passes", "changes"),
    [
        ("in_batch", 0.0, {}),
        pytest.param("uniform", 0.0, {}, marks=pytest.mark.slow),
        pytest.param("stale", 1.0, {}, marks=pytest.mark.slow),
        pytest.param("refreshed", 3.0, {"refresh__every": 3}, marks=pytest.mark.slow),
    ],
)
def test_every_strategy_runs_and_says_what_it_cost(folder, strategy, passes, changes):
    config = tiny.config(folder, strategy=strategy, eval__bm25=False, **changes)
    results = run(config, folder / strategy)
    assert results["ledger"]["corpus_passes"] == passes
    distribution = results["distribution"]
    assert (distribution["kl_stale"] is None) == (passes == 0.0)
    if strategy == "stale":  # the same code with h the identity
        assert distribution["kl_stale"] == pytest.approx(distribution["kl_corrected"], rel=1e-4)
        assert distribution["drift"] > 0


def test_a_refresh_makes_the_cache_fresh_and_resets_the_corrector(folder):
    config = tiny.config(folder, refresh__every=4, train__steps=5, checkpoint__every=5)
    run(config, folder / "reset")
    job = make_job(config)
    checkpoints = Checkpoints(folder / "reset")
    state, cache, position = checkpoints.resume(job.init_state(), job.empty_cache(), step=5)
    assert position.cache["step"] == 4
    assert set(np.asarray(cache.written_at)[: cache.size]) == {4}
    assert float(state.corrector.gate) == 0.0
    # One step after the reset: one update of Adam, the first of a new ramp.
    assert int(state.corrector.opt_state[0].count) == 1


def test_probes_are_counted_from_the_snapshot(folder):
    """A refresh that falls on a probe must not keep the gate closed for good."""
    config = tiny.config(folder, refresh__every=4, corrector__probe_every=2, eval__bm25=False)
    run(config, folder / "probes")
    probed = [row["step"] for row in rows(folder / "probes") if "probe/gate" in row]
    assert probed == [2, 6]


def test_a_snapshot_is_kept_as_long_as_a_checkpoint_refers_to_it(folder):
    config = tiny.config(
        folder, refresh__every=4, train__steps=8, checkpoint__every=4, checkpoint__keep=1
    )
    run(config, folder / "kept")
    job = make_job(config)
    with Checkpoints(folder / "kept") as checkpoints:
        _, _, position = checkpoints.resume(job.init_state(), job.empty_cache(), step=8)
    assert position.cache["step"] == 4  # a refresh before step 8 would come after its checkpoint


def test_four_steps_killed_and_resumed_equal_eight_bit_for_bit(folder, corrected):
    config, workdir = tiny.config(folder), folder / "killed"
    script = f"""
import os, pathlib, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from corrector_jax import train
from tests import tiny
made = train.make_batch
def make_batch(job, step):
    if step == 6:
        while not any(pathlib.Path({str(workdir)!r}, "checkpoints").glob("4")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    return made(job, step)
train.make_batch = make_batch
train.train(tiny.config(pathlib.Path({str(folder)!r})), pathlib.Path({str(workdir)!r}), started=0.0)
"""
    process = subprocess.run(
        [sys.executable, "-c", script], env=os.environ, capture_output=True, timeout=300
    )
    assert process.returncode == -9, process.stderr.decode()
    assert not (workdir / "results.json").exists()
    assert Checkpoints(workdir).latest() == 4
    run(config, workdir)
    assert final_state(config, workdir) == final_state(config, corrected)
    for name in ("before", "after"):
        runs = [(where / "runs" / f"{name}.trec").read_text() for where in (workdir, corrected)]
        assert runs[0] == runs[1]
    losses = [
        [row["train/loss"] for row in rows(where) if "train/loss" in row]
        for where in (workdir, corrected)
    ]
    assert len(losses[0]) == 8
    assert losses[0] == losses[1]
    kinds = [
        [(row["step"], *sorted(set(row) - {"seconds"})) for row in rows(where)]
        for where in (workdir, corrected)
    ]
    assert kinds[0] == kinds[1]  # no row is lost, none is there twice
    ledgers = [
        json.loads((where / "results.json").read_text())["ledger"] for where in (workdir, corrected)
    ]
    assert ledgers[0] == ledgers[1]


def test_a_finished_run_is_not_trained_again(folder, corrected):
    before = final_state(tiny.config(folder), corrected)
    written = len(rows(corrected))
    results = run(tiny.config(folder), corrected)
    assert results["steps"] == 8
    assert results["ledger"]["encoded_with_grad"] == 8 * 8 * 4
    assert final_state(tiny.config(folder), corrected) == before
    assert len(rows(corrected)) == written


def test_another_configuration_is_refused_and_nothing_is_lost(folder, corrected):
    kept = {path: path.read_bytes() for path in corrected.glob("*.json*")}
    for key, value in (("train__learning_rate", 0.5), ("negatives__draws", 2), ("seed", 1)):
        with pytest.raises(UserError, match=key.replace("__", ".")):
            run(tiny.config(folder, **{key: value}), corrected)
    assert {path: path.read_bytes() for path in corrected.glob("*.json*")} == kept


def test_a_first_wrong_try_does_not_lock_the_workdir(folder):
    wrong = tiny.config(folder, data__path=str(folder / "typo"))
    with pytest.raises(UserError, match="typo"):
        run(wrong, folder / "retried")
    config = tiny.config(folder, train__steps=4, eval__bm25=False)
    assert run(config, folder / "retried")["steps"] == 4


def test_data_that_changed_is_refused(folder, tmp_path):
    data = tiny.write_data(tmp_path / "data")
    config = tiny.config(folder, data__path=str(data), train__steps=4, eval__bm25=False)
    run(config, tmp_path / "run")
    corpus = (data / "corpus.jsonl").read_text().splitlines(keepends=True)
    corpus[3] = corpus[4].replace('"t4"', '"t3"')
    (data / "corpus.jsonl").write_text("".join(corpus))
    with pytest.raises(UserError, match="other data"):
        run(config, tmp_path / "run")


def test_what_does_not_shape_the_state_may_differ_and_steps_may_grow(folder):
    changes = {"train__schedule": "constant", "eval__bm25": False}
    run(tiny.config(folder, train__steps=4, **changes), folder / "grown")
    longer = tiny.config(folder, log__every=2, eval__every=2, eval__corpus="sample", **changes)
    assert run(longer, folder / "grown")["steps"] == 8
    straight = tiny.config(folder, **changes)
    run(straight, folder / "straight")
    assert final_state(longer, folder / "grown") == final_state(straight, folder / "straight")


def test_a_missing_or_damaged_cache_snapshot_is_refused(folder):
    workdir = folder / "damaged"
    run(tiny.config(folder, eval__bm25=False), workdir)
    (workdir / "cache" / "0").rename(workdir / "cache" / "gone")
    with pytest.raises(UserError, match=r"cache.0 is missing"):
        run(tiny.config(folder), workdir)
    job = make_job(tiny.config(folder))
    other = Checkpoints(workdir)
    other.save_cache(job.empty_cache(), step=0)
    with pytest.raises(UserError, match="digest"):
        run(tiny.config(folder), workdir)


def test_evaluation_during_training_ranks_what_it_was_told_to(folder):
    for corpus, encoded in (("full", tiny.TARGETS), ("corrected", 0)):
        config = tiny.config(
            folder, eval__every=4, eval__corpus=corpus, eval__bm25=False, train__steps=6
        )
        results = run(config, folder / f"eval-{corpus}")
        assert results["ledger"]["evaluation"] == tiny.TARGETS + encoded
        during = [row for row in rows(folder / f"eval-{corpus}") if row["step"] == 4]
        assert any("eval/data-dev/recall@20" in row for row in during)


def test_batches_are_a_function_of_the_step_and_hold_every_known_positive(folder):
    job = make_job(tiny.config(folder))
    first, again = make_batch(job, 5), make_batch(job, 5)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (first.known == first.positive[:, None]).any(axis=1).all()
    assert not np.array_equal(first.query_tokens, make_batch(job, 6).query_tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"model__shared_towers": False, "corrector__kind": "linear"},
        {"corrector__loss": "both", "corrector__kl_weight": 0.1, "corrector__updates": 1},
        {"corrector__uniform_rows": 4, "loss__estimator": "single"},
        {"cache__dtype": "bfloat16", "loss__estimator": "weighted"},
        {"loss__estimator": "truncated", "loss__shared": True},
        {"train__accumulate": 2},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_other_words_of_the_configuration_train_too(folder, tmp_path, changes):
    config = tiny.config(folder, eval__bm25=False, train__steps=4, **changes)
    results = run(config, tmp_path / "run")
    assert np.isfinite(results["distribution"]["kl_corrected"])
