"""Whole runs, small: what is left in the workdir, resuming, refreshing, refusing."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import faults
from corrector_jax.checkpoint import Checkpoints
from corrector_jax.job import make_job
from corrector_jax.lock import Lock
from corrector_jax.train import make_batch, train
from corrector_jax.types import UserError
from tests import stopping, tiny


def run(config, workdir: Path) -> dict:
    train(config, workdir, started=time.monotonic())
    return json.loads((workdir / "results.json").read_text())


def final_state(config, workdir: Path) -> dict[str, bytes]:
    """Every leaf of the last checkpoint and its cache, as bytes."""
    state, cache, _ = saved(config, workdir)
    leaves, _ = jax.tree_util.tree_flatten_with_path((state, cache))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def saved(config, workdir: Path):
    """State, cache and position of the last checkpoint."""
    job = make_job(config)
    cache = job.empty_cache() if job.uses_cache else None
    with Checkpoints.readable(workdir) as checkpoints:
        return checkpoints.resume(
            job.init_state(), cache, data=job.fingerprint, made_by=job.made_by
        )


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# The runs of one module share their data, and so the programs that are compiled for it.
@pytest.fixture(scope="module")
def folder(folder_of_finished) -> Path:
    return folder_of_finished


@pytest.fixture(scope="module")
def corrected(folder) -> Path:
    """A finished run of the method itself."""
    return shutil.copytree(folder / "run", folder / "corrected")


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
    assert set(results["eval"]["bm25"]) == measures  # words have no softmax
    for name in ("before", "after"):
        assert set(results["eval"][name]) == measures | {"exact_loss"}
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
    config = tiny.config(folder, refresh__every=7)
    run(config, folder / "reset")
    state, cache, position = saved(config, folder / "reset")
    assert position.cache["step"] == 7
    assert set(np.asarray(cache.written_at)[: cache.size]) == {7}
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
    _, _, position = saved(config, folder / "kept")
    assert position.cache["step"] == 4  # a refresh before step 8 would come after its checkpoint


def losses(workdir: Path) -> list[float]:
    return [row["train/loss"] for row in rows(workdir) if "train/loss" in row]


def test_killed_it_ends_as_if_nothing_had_happened(tmp_path):
    """While it saves; at other moments, again and again: benchmarks/faults.py.

    Terminated from outside: test_distributed.py.
    """
    done = faults.campaign(tmp_path, kills=1, terms=0, moments=["saving"], say=lambda line: None)
    assert done.different == []
    assert done.exits == {("SIGKILL saving", -signal.SIGKILL): 1}


def assert_stopping_changes_nothing(config, folder, monkeypatch):
    """The same run alone, and one that is asked to stop again and again."""
    run(config, folder / "alone")
    assert stopping.to_its_end(lambda: run(config, folder / "stopped"), monkeypatch) >= 3
    expected, found = faults.outcome(folder / "alone"), faults.outcome(folder / "stopped")
    assert [key for key in expected if expected[key] != found[key]] == []


def test_asked_to_stop_again_and_again_it_ends_as_if_nothing_had_happened(folder, monkeypatch):
    """In the middle of embedding, refreshing, evaluating, and between steps."""
    keys = {key.replace(".", "__"): value for key, value in faults.RUN.items()}
    config = tiny.config(folder, **keys)
    assert_stopping_changes_nothing(config, folder / "faults", monkeypatch)


REWRITING = {
    "streaming": {"negatives__proposal": "gumbel_topk"},
    "rolling": {"refresh__rows": 20},
    "nystrom": {"corrector__landmarks": 12, "corrector__fit_every": 2},
    "corrected": {"refresh__threshold": 1e-6, "corrector__probe_every": 2},
    # Measured at 0, and after the probes at 3, 6 and 9: in between steps divide by older lengths.
    "corrected, linear": {
        "corrector__kind": "linear",
        "corrector__lengths_every": 100,
        "train__steps": 12,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["corrected", "corrected, linear", "rolling", "streaming", "nystrom"]
)
def test_what_a_strategy_changes_on_the_way_is_resumed(folder, monkeypatch, case):
    """Rows written within steps, landmarks, lengths, and refreshes that a probe asked for."""
    strategy, name = case.split(",")[0], case.replace(", ", "-")
    changes = {"eval__bm25": False, "train__steps": 7, "checkpoint__every": 3}
    config = tiny.config(folder, strategy=strategy, **(changes | REWRITING[case]))
    assert_stopping_changes_nothing(config, folder / name, monkeypatch)
    state, cache, position = saved(config, folder / name / "alone")
    ledger, written = position.ledger, np.asarray(cache.written_at)[: cache.size]
    if strategy == "streaming":
        assert set(written) == set(range(7))
        assert ledger["refresh"] == 0
    if strategy == "rolling":
        # Four slices are a pass: three of them are of the second pass, one of the first is left.
        assert np.bincount(written, minlength=7).tolist() == [0, 0, 0, 7, 20, 20, 20]
        assert ledger["refresh"] == 7 * 20
    if strategy == "nystrom":
        assert set(written) == {0}
        assert ledger["encoded_without_grad"] == 3 * 12 + 2 * 32  # at steps 2, 4, 6; probed at 3, 6
    if case == "corrected, linear":
        assert set(written) == {0}
        assert state.corrector.measured.gate == 1  # opened at 3, measured at 9
        psi, then = state.corrector.params, state.corrector.measured.params
        assert not np.array_equal(psi["kernel"], then["kernel"])
    if case == "corrected":
        assert set(written) == {6}  # probed at 2 and heeded at 3; probed at 5
        assert ledger["refresh"] == 2 * cache.size


def test_a_cache_of_mixed_age_is_no_first_snapshot(folder):
    changes = {"eval__bm25": False, "train__steps": 4}
    config = tiny.config(folder, strategy="streaming", **changes)
    run(config, folder / "mixed")
    path = str(folder / "mixed" / "cache" / "4")
    config = tiny.config(folder, cache__path=path, **changes)
    with pytest.raises(UserError, match=r"made with weights 'those of several steps'"):
        run(config, folder / "not-mixed")


def test_refreshes_leave_no_snapshot_behind_that_nothing_refers_to(folder, monkeypatch):
    config = tiny.config(folder, strategy="oracle", eval__bm25=False, checkpoint__every=8)
    most, save_cache = [], Checkpoints.save_cache

    def counted(self, *arguments, **more):
        saved = save_cache(self, *arguments, **more)
        most.append(len(list((folder / "oracle" / "cache").iterdir())))
        return saved

    monkeypatch.setattr(Checkpoints, "save_cache", counted)
    run(config, folder / "oracle")
    assert len(most) == 8  # the first, and one before each step but the first
    assert max(most) == 2


def test_a_schedule_refreshes_when_it_says(folder):
    config = tiny.config(
        folder, strategy="refreshed", refresh__schedule="0-4:2,4-end:3", eval__bm25=False
    )
    results = run(config, folder / "schedule")
    assert results["ledger"]["refresh"] == 3 * tiny.TARGETS  # before steps 2, 4 and 7
    assert set(np.asarray(saved(config, folder / "schedule")[1].written_at)[: tiny.TARGETS]) == {7}


def test_steps_that_are_not_finite_are_skipped_kept_and_in_the_end_refused(folder, capsys):
    changes = {
        "train__learning_rate": 1e30, "train__clip": 0.0, "eval__bm25": False,
        "train__schedule": "constant", "train__warmup": 0, "checkpoint__every": 2,
    }  # fmt: skip
    config = tiny.config(folder, train__max_skipped=2, **changes)
    with pytest.raises(UserError, match=r"not finite at 3 steps.*max_skipped=2.*learning_rate"):
        run(config, folder / "overflow")
    kept = sorted((folder / "overflow" / "skipped").iterdir())
    assert len(kept) == 3
    record = json.loads(kept[0].read_text())
    job = make_job(config)
    batch = make_batch(job, record["step"] - 1)
    assert record["positives"] == [job.data.target_ids[row] for row in batch.positive]
    assert "was skipped" in capsys.readouterr().out
    with Checkpoints.readable(folder / "overflow") as checkpoints:
        position, _ = checkpoints.read(checkpoints.steps()[-1])
    assert len(position.skipped) == 1  # of the two steps saved so far the second
    skips = [row["train/skipped"] for row in rows(folder / "overflow") if "train/skipped" in row]
    assert skips[:2] == [0.0, 1.0]


@pytest.mark.slow
def test_fewer_devices_and_a_smaller_cache_go_on_with_the_run(folder):
    """8 -> 4 -> 1 devices is the same run but for rounding; a bfloat16 cache trains on."""
    changes = {
        "train__schedule": "constant", "train__warmup": 1, "train__learning_rate": 1e-4,
        "eval__bm25": False, "checkpoint__every": 2,
    }  # fmt: skip
    for steps, devices in ((4, 8), (6, 4), (8, 1)):
        config = tiny.config(folder, train__steps=steps, mesh__devices=devices, **changes)
        run(config, folder / "shrinking")
    straight = tiny.config(folder, train__steps=8, mesh__devices=1, **changes)
    run(straight, folder / "one-device")
    np.testing.assert_allclose(
        losses(folder / "shrinking"), losses(folder / "one-device"), rtol=1e-3
    )
    smaller = tiny.config(folder, train__steps=10, cache__dtype="bfloat16", **changes)
    assert run(smaller, folder / "shrinking")["steps"] == 10
    assert saved(smaller, folder / "shrinking")[1].embeddings.dtype == "bfloat16"
    assert np.isfinite(losses(folder / "shrinking")).all()


def test_a_snapshot_of_another_run_saves_the_first_pass(folder, corrected):
    config = tiny.config(folder, cache__path=str(corrected / "cache" / "0"), train__steps=8)
    results = run(config, folder / "reused")
    assert results["ledger"]["initial"] == 0
    assert losses(folder / "reused") == losses(corrected)
    before = [(where / "eval" / "before.json") for where in (folder / "reused", corrected)]
    metrics = [json.loads(path.read_text())["metrics"] for path in before]
    del metrics[1]["exact_loss"]  # of rows that a pass embedded; the other ranks a cache
    assert metrics[0] == pytest.approx(metrics[1])


def test_a_snapshot_of_another_encoder_is_refused_by_field(folder, corrected):
    path = str(corrected / "cache" / "0")
    for field, changes in (
        ("weights", {"seed": 1}),
        ("pooling", {"model__pooling": "cls"}),
        ("length", {"data__target_max_len": 12}),
        ("prefix", {"data__target_prefix": "ba "}),
    ):
        config = tiny.config(folder, cache__path=path, eval__bm25=False, **changes)
        with pytest.raises(UserError, match=rf"made with {field} .* drop --config\.cache\.path"):
            run(config, folder / f"refused-{field}")
    config = tiny.config(folder, cache__path=str(folder / "nowhere"), eval__bm25=False)
    with pytest.raises(UserError, match=r"cache\.path is not a snapshot"):
        run(config, folder / "refused-nowhere")


def test_results_without_checkpoints_are_not_overwritten(folder, tmp_path, corrected):
    shutil.copytree(corrected, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    kept = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="holds the results of a run but none of its checkpoints"):
        run(tiny.config(folder), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == kept


def test_the_probe_is_the_same_on_any_number_of_devices(folder):
    probes = [make_job(tiny.config(folder, mesh__devices=devices)) for devices in (1, 8)]
    for name in ("probe_queries", "probe_ids"):
        one, other = (np.asarray(getattr(job, name)) for job in probes)
        np.testing.assert_array_equal(one, other)


def test_two_jobs_do_not_share_a_workdir(folder):
    with Lock(folder / "shared"), pytest.raises(UserError, match="in use by process"):
        run(tiny.config(folder), folder / "shared")


def test_a_finished_run_is_not_trained_again(folder, corrected):
    before = final_state(tiny.config(folder), corrected)
    written = len(rows(corrected))
    results = run(tiny.config(folder), corrected)
    assert results["steps"] == 8
    assert results["ledger"]["encoded_with_grad"] == 8 * 8 * 4
    assert final_state(tiny.config(folder), corrected) == before
    assert len(rows(corrected)) == written


def test_a_report_that_was_left_out_is_drawn_by_the_same_command_with_it(
    folder, corrected, tmp_path, monkeypatch, capsys
):
    workdir = shutil.copytree(corrected, tmp_path / "run")
    page = workdir / "report.html"
    page.unlink()
    monkeypatch.setattr("corrector_jax.report.parts.drawn", lambda *_: (b"", b""))
    for report, last in ((False, f"encoders: {workdir / 'final'}"), (True, f"report: {page}")):
        run(tiny.config(folder, log__report=report), workdir)
        assert page.exists() == report
        assert capsys.readouterr().out.splitlines()[-1] == last


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
    config = tiny.config(folder, eval__bm25=False)
    assert run(config, folder / "retried")["steps"] == 8


def test_data_that_changed_is_refused(folder, tmp_path):
    data = tiny.write_data(tmp_path / "data")
    config = tiny.config(folder, data__path=str(data), eval__bm25=False)
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
    (workdir / "cache" / "0").rename(workdir / "gone")
    with pytest.raises(UserError, match=r"cache.0.manifest.json cannot be read"):
        run(tiny.config(folder), workdir)
    job = make_job(tiny.config(folder))
    with Checkpoints.writable(workdir) as other:
        other.save_cache(job.empty_cache(), step=0, made_by=job.made_by)
    with pytest.raises(UserError, match="not the one its checkpoint was saved with"):
        run(tiny.config(folder), workdir)
    shutil.rmtree(workdir / "cache" / "0")
    (workdir / "gone").rename(workdir / "cache" / "0")  # nothing was thrown away meanwhile
    assert run(tiny.config(folder), workdir)["steps"] == 8


def test_evaluation_during_training_ranks_what_it_was_told_to(folder):
    for corpus, encoded in (("full", tiny.TARGETS), ("corrected", 0)):
        config = tiny.config(folder, eval__every=4, eval__corpus=corpus, eval__bm25=False)
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


def test_no_secret_of_the_environment_is_in_any_file_of_a_run(finished):
    """Traces and event files among them, which others write."""
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert {"config.json", "results.json", "README.md", "profile.json"} <= {p.name for p in files}
    for path in files:
        content = path.read_bytes()
        for name, value in tiny.SECRETS.items():
            assert value.encode() not in content, f"{name} is in {path.name}"
