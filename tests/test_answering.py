"""Whole small runs that learn from answers: what they leave, that they resume, what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import faults
from corrector_jax import answering, answers, weights
from corrector_jax import config as configs
from corrector_jax.checkpoint import Checkpoints
from corrector_jax.job import make_job
from corrector_jax.models import pretrained
from corrector_jax.models.reader import Reader
from corrector_jax.preemption import PreemptedError
from corrector_jax.ranking import read_trec
from corrector_jax.reading import GIVEN
from corrector_jax.train import train
from corrector_jax.types import UserError
from tests import stopping, tiny

MEASURES = {"em", "f1", *(f"answer_recall@{k}" for k in (1, 5, 20, 100))}


def run(config, workdir: Path) -> dict:
    train(config, workdir, started=time.monotonic())
    return json.loads((workdir / "results.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def config(folder):
    changes = {"eval__every": 4, "eval__corpus": "corrected", "log__report": True}
    return tiny.config(folder, reader=True, **changes)


@pytest.fixture(scope="module")
def workdir(config, folder) -> Path:
    """A finished run, the words of its report without the pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corrector_jax.report.parts.drawn", lambda *_: (b"", b""))
        run(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def saved(config, workdir):
    """The job, and its last state."""
    job = make_job(config)
    with Checkpoints.readable(workdir) as checkpoints:
        state, _, position = checkpoints.resume(
            job.init_state(), job.empty_cache(), data=job.fingerprint, made_by=job.made_by
        )
    return job, state, position


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_was_promised(workdir):
    results = json.loads((workdir / "results.json").read_text())
    assert results["eval"]["after"].keys() - results["eval"]["before"].keys() == set()
    assert results["eval"]["after"].keys() >= MEASURES
    assert results["comparison"].keys() >= MEASURES
    assert set(results["reader"]["read"]) == {"known_positives", "no_passage", "any_passages"}
    page = (workdir / "report.html").read_text()
    for words in ("Answered before", "Exact match of the answers", "reads known positives"):
        assert words in page
    examples = json.loads((workdir / "examples.json").read_text())
    assert all(set(one["answers"]) == {"right", "before", "after"} for one in examples)


def test_the_ledger_counts_given_steps_as_steps_without_targets(workdir):
    ledger = json.loads((workdir / "results.json").read_text())["ledger"]
    assert ledger == {
        "initial": tiny.TARGETS,
        "refresh": 0,
        "encoded_with_grad": 8 * 8 * 3,  # 10 steps, of which 2 are given, K = 3
        "encoded_without_grad": 3 * 32,  # the probes before steps 3, 6 and 9
        "evaluation": tiny.TARGETS,
        "corpus_passes": 1.0,
    }


def test_the_encoders_optimizer_begins_behind_the_given_steps(saved):
    _, state, _ = saved
    counts = {
        name: {int(leaf) for path, leaf in jax.tree.leaves_with_path(inner) if "count" in str(path)}
        for name, inner in state.opt_state.inner_states.items()
    }
    assert counts["encoders"] == {8}
    assert counts["reader"] == {10}


def test_metrics_of_given_steps_and_of_others_do_not_mix(workdir):
    found = [row for row in rows(workdir) if "train/loss" in row]
    assert ["train/drift" in row for row in found] == [False] * 2 + [True] * 8
    assert ["train/retriever_loss" in row for row in found] == [False] * 2 + [True] * 8
    assert [row["train/learning_rate"] for row in found][:2] == [0.0, 0.0]
    during = [row["step"] for row in rows(workdir) if "eval/questions-dev/em" in row]
    assert during == [0, 4, 8, 10]


def test_what_was_answered_is_what_is_measured(workdir, saved):
    job, state, _ = saved
    record = json.loads((workdir / "eval" / "after.json").read_text())
    split = job.data.splits["test"]
    found = read_trec(workdir / "runs" / "after.trec", split, job.data.target_ids)
    texts = answering.read(job, state.params, "test", found.rows[:, :3], found.rows[:, :3] >= 0)
    assert texts == record["answers"]
    pairs = zip(texts, split.answers, strict=True)
    assert record["metrics"]["em"] == np.mean([answers.exact_match(*pair) for pair in pairs])
    held = [
        any(answers.has_answer(job.data.target_texts[row], accepted) for row in best[:5])
        for best, accepted in zip(found.rows, split.answers, strict=True)
    ]
    assert record["metrics"]["answer_recall@5"] == np.mean(held)


def test_reading_can_be_stopped_between_two_blocks(saved):
    job, state, _ = saved

    def stop() -> None:
        raise PreemptedError("the test")

    rows = np.zeros((tiny.HELD_OUT, 3), np.int32)
    with pytest.raises(PreemptedError):
        answering.read(job, state.params, "test", rows, rows >= 0, beat=stop)


def test_the_exported_reader_answers_as_the_trained_one(workdir, saved):
    job, state, _ = saved
    files = weights.find_reader(str(workdir / "final" / "reader"))
    exported = pretrained.reader_config(files.config, files.tensors)
    assert exported == job.questions.loaded.reader.config
    params = pretrained.params_from(files.tensors, exported)
    leaves = zip(*map(jax.tree.leaves, (params, jax.device_get(state.params["reader"]))),
                 strict=True)  # fmt: skip
    assert all(np.array_equal(one, other) for one, other in leaves)
    assert isinstance(Reader(exported), Reader)
    assert files.tokenizer_json == job.origin.tokenizer_json
    # The encoders' folder holds them alone.
    encoders = weights.find(str(workdir / "final"))
    assert not [name for name in encoders.tensors if "decoder" in name]


def test_questions_that_are_given_passages_are_never_asked_again(saved):
    job, *_ = saved
    given, asked = (job.data.splits[name].query_ids for name in (GIVEN, "train"))
    assert set(given).isdisjoint(asked)
    assert len(given) + len(asked) == tiny.TRAIN
    assert [job.queries_of(step)[0] for step in range(4)] == [GIVEN, GIVEN, "train", "train"]


def test_a_batch_that_asks_knows_no_positives(saved):
    job, *_ = saved
    given, asked = job.batch(1), job.batch(2)
    split, numbers = job.queries_of(1)
    known = job.data.splits[split].positives
    assert all(y in known[row] for y, row in zip(given.positive, numbers, strict=True))
    assert set(np.ravel(asked.positive)) == set(np.ravel(asked.known)) == {-1}
    _, numbers = job.queries_of(2)
    end = job.questions.loaded.reader.config.end_id
    for row, answer, question in zip(numbers, *asked.asked[::-1], strict=True):
        accepted = job.data.splits["train"].answers[row]
        assert job.questions.text(answer) in accepted
        assert (answer == end).sum() == 1
        assert job.questions.text(question) == job.data.splits["train"].texts[row]
    again = job.batch(2)
    assert all(map(np.array_equal, asked.asked, again.asked))


@pytest.mark.slow
def test_asked_to_stop_again_and_again_it_ends_as_if_nothing_had_happened(
    config, folder, workdir, monkeypatch
):
    """Before the first step, in given steps, in others, and while evaluating."""
    assert stopping.to_its_end(lambda: run(config, folder / "stopped"), monkeypatch) >= 4
    expected, found = faults.outcome(workdir), faults.outcome(folder / "stopped")
    assert [key for key in expected if expected[key] != found[key]] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "stale", "reader__loss": "emdr2", "negatives__proposal": "gumbel_topk"},
        {"strategy": "refreshed", "refresh__every": 4, "reader__loss": "marginal"},
        {"reader__moves": "query", "model__shared_towers": False, "reader__beams": 2},
        {"reader__rerank": 6, "train__accumulate": 2, "reader__passage_max_len": 20},
        {"corrector__loss": "both", "corrector__kl_weight": 0.1, "corrector__updates": 1},
        {"strategy": "rolling", "refresh__rows": 20, "reader__moves": "none"},
        {"reader__loss": "marginal", "reader__learns": False, "reader__warmup": 1},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_other_words_of_the_configuration_train_too(folder, tmp_path, changes):
    results = run(tiny.config(folder, reader=True, **changes), tmp_path / "run")
    assert np.isfinite(results["distribution"]["kl_corrected"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strategy": "in_batch"}, "strategy 'in_batch' has no cache to find passages in"),
        ({"negatives__proposal": "two_level"}, "'two_level', which may draw a passage twice"),
        ({"loss__estimator": "truncated"}, "config.loss.estimator is 'truncated', which only"),
        ({"negatives__mined": 2}, "config.negatives.mined is 2, which only"),
        ({"reader__rerank": 3}, "config.reader.rerank chooses 3 passages among 3"),
        ({"reader__moves": "query"}, "write --config.model.shared_towers=False"),
        ({"reader__given_share": 0.0}, "given_steps is 2 and config.reader.given_share 0.0"),
        ({"reader__given_share": 1.0}, "leaves no question to retrieve for"),
        ({"reader__given_steps": 9}, "write more config.train.steps"),
        ({"reader__warmup": 10}, "write more config.train.steps"),
        ({"reader__given_steps": 3, "train__accumulate": 2}, "not a multiple of"),
        ({"reader__heads": 3}, "config.reader.heads is 3, which does not divide"),
        ({"reader__learns": False}, "config.reader.warmup is 2 of the 2 steps in which"),
        (
            {"reader__learns": False, "reader__given_steps": 0, "reader__given_share": 0.0},
            "a reader that would never learn to read: write config.reader.given_steps",
        ),
        ({"reader__loss": "kl"}, "config.reader.loss is 'kl': write one of pdist"),
        (
            {"negatives__proposal": "scann", "negatives__candidates": 2},
            "config.negatives.candidates is 2 but 3 passages are wanted",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(folder, changes, said):
    with pytest.raises(UserError) as caught:
        tiny.config(folder, reader=True, **changes)
    assert said in str(caught.value)


def test_data_without_answers_are_refused(folder):
    keys = tiny.overrides(folder) | {"reader.weights": "random"}
    config = configs.default()
    config.update_from_flattened_dict(keys | {"train.warmup": 2, "reader.warmup": 2})
    with pytest.raises(UserError, match="have no answers, which config"):
        make_job(config)


def test_answers_that_are_too_long_are_left_out(folder, capsys):
    job = make_job(tiny.config(folder, reader=True, reader__answer_max_len=2))
    assert all(len(one) == 1 for lists in job.questions.answers.values() for one in lists)
    assert "left out" not in capsys.readouterr().out
    with pytest.raises(UserError, match="no train question of questions is left"):
        make_job(tiny.config(folder, reader=True, reader__given_share=0.999999))
