"""Runs side by side: the right intervals, and no comparison of different queries."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from corrector_jax.compare import compare
from corrector_jax.ranking import paired_bootstrap
from corrector_jax.types import UserError
from tests.report.conftest import Page

FILES = ("config.json", "results.json", "metrics.jsonl", "eval/after.json", "runs/after.trec")


@pytest.fixture
def copied(finished, tmp_path):
    """A function that copies what is compared of the finished run, and edits its files."""

    def copy(name, **edits):
        folder = tmp_path / name
        for file in FILES:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(finished / file, folder / file)
        for file, edit in edits.items():
            path = folder / {"results": "results.json", "after": "eval/after.json"}[file]
            content = json.loads(path.read_text())
            edit(content)
            path.write_text(json.dumps(content))
        return folder

    return copy


def worse(record):
    values = record["per_query"]["mrr@10"]
    record["per_query"]["mrr@10"] = [max(0.0, value - 0.3) for value in values]


def test_differences_are_paired_by_query_and_said_in_words(copied, tmp_path, capsys):
    runs = [copied("one"), copied("other", after=worse)]
    page = Page(compare(runs, tmp_path / "compare.html").read_text())
    values = [
        np.array(json.loads((run / "eval" / "after.json").read_text())["per_query"]["mrr@10"])
        for run in runs
    ]
    gain = paired_bootstrap(*values)
    assert gain.high < 0
    said = f"MRR@10 of other minus one: {gain.difference:.3f} (95 % interval {gain.low:.3f}"
    assert said in page.words
    assert "one is better on these queries" in page.words
    assert f"{gain.difference:.3f}" in page.texts["td"]
    assert f"{gain.low:.3f} to {gain.high:.3f}" in page.texts["small"]
    assert said in capsys.readouterr().out
    assert all(address.startswith("data:image/png") for address in page.addresses)
    assert len(page.addresses) == 4


def test_equal_runs_cannot_be_told_apart(copied, tmp_path):
    runs = [copied(name) for name in ("a", "b", "c/b")]
    page = Page(compare(runs, tmp_path / "compare.html").read_text())
    assert page.words.count("these queries cannot tell them apart") == 2
    assert "c/b" in page.words  # a label no other run has


def test_a_hostile_name_is_text(copied, tmp_path):
    page = Page(compare([copied("one"), copied("<script>x")], tmp_path / "c.html").read_text())
    assert "script" not in page.tags
    assert "<script>x" in page.words


def test_other_data_other_queries_and_unfinished_runs_are_refused(copied, tmp_path):
    one = copied("one")

    def refused(match, *others):
        with pytest.raises(UserError, match=match) as error:
            compare([one, *others], tmp_path / "c.html")
        assert "\n" not in str(error.value)

    refused("two or more folders")
    refused("all different", one)
    refused("holds no results", tmp_path)
    for key, value in (("targets", 5), ("eval_split", "dev"), ("corpus", "0" * 64)):
        other = copied(key, results=lambda content, key=key, value=value: content["dataset"].update(
            {key: value}))  # fmt: skip
        refused(rf"different data \({key}", other)
    other = copied("queries")
    path = other / "runs" / "after.trec"
    path.write_text("".join(f"x{line}" for line in path.read_text().splitlines(keepends=True)))
    refused("one and queries were evaluated on different queries", other)
    older = copied("older", results=lambda content: content["dataset"].pop("corpus"))
    assert compare([one, older], tmp_path / "c.html").exists()


def test_files_that_no_run_wrote_are_named_in_a_sentence(copied, tmp_path):
    one = copied("one")

    def refused(match, other):
        with pytest.raises(UserError, match=match) as error:
            compare([one, other], tmp_path / "c.html")
        assert "\n" not in str(error.value)

    refused("b: not as a run writes it", copied("b", results=lambda r: r.update(ledger=5)))
    refused(r"c/eval/after\.json: not as a run", copied("c", after=lambda r: r.clear()))
    for number, values in enumerate(([1.0], ["x"], None, [[1.0]], [0.5] * 3)):
        other = copied(f"d{number}", after=lambda r, v=values: r["per_query"].update({"mrr@10": v}))
        refused(rf"d{number}/eval/after\.json: not as a run", other)
    other = copied("e")
    (other / "results.json").write_text("[" * 100_000)
    refused(r"e/results\.json is not JSON \(it is nested", other)
    (other / "results.json").write_text("[]")
    refused("holds no results", other)
    other = copied("f")
    (other / "runs" / "after.trec").write_bytes(b"\xff Q0 t0 1 1 x\n")
    refused(r"f/runs/after\.trec cannot be read", other)
    (other / "runs" / "after.trec").unlink()
    refused(r"f/runs/after\.trec cannot be read", other)
