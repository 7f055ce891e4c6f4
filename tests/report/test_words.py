"""Right words for every outcome."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest

from corrector_jax.report.page import write_report
from corrector_jax.report.parts import figure
from corrector_jax.report.words import finite, made_by_a_run, read_metrics, summary_table
from corrector_jax.types import UserError
from tests.report.made_up import METRICS, write


def outcome(run, before, after, low, high):
    """The run with another recall@20."""
    results = copy.deepcopy(run["results.json"])
    results["eval"]["before"]["recall@20"], results["eval"]["after"]["recall@20"] = before, after
    difference = {"difference": after - before, "low": low, "high": high}
    results["comparison"]["recall@20"] = difference
    return {**run, "results.json": results}


@pytest.mark.parametrize(
    ("case", "said", "unsaid"),
    [
        ((0.4, 0.5, 0.08, 0.12), "rose from 0.400 to 0.500 (+0.100, 95 % interval +0.080", "fell"),
        (
            (0.5, 0.4, -0.12, -0.08),
            "fell from 0.500 to 0.400 (-0.100, 95 % interval -0.120",
            "rose",
        ),
        ((0.4, 0.41, -0.01, 0.03), "cannot tell the difference from none (+0.010", "rose"),
        ((0.4, 0.39, -0.03, 0.01), "cannot tell the difference from none (-0.010", "fell"),
        ((0.4, 0.41, 0.0, 0.02), "cannot tell the difference from none", "rose"),
        ((0.4, 0.4, 0.0, 0.0), "cannot tell the difference from none", "rose"),
        ((0.4, 0.5, None, None), "without an interval that is no evidence of a change", "rose"),
    ],
)
def test_a_change_is_claimed_only_beyond_its_interval(run, page, case, said, unsaid):
    changed = outcome(run, *case)
    for words in (page(changed).words, summary_table(changed["results.json"]).replace("\n ", "")):
        assert said in words
        assert unsaid not in words


@pytest.mark.parametrize(
    ("stale", "corrected", "said"),
    [
        (1.43, 0.152, "is 1.430 nats (KL) from the fresh one, 0.152 nats once corrected: the "
         "corrector removed 89 % of the KL."),
        (0.5, 0.9, "0.900 nats once corrected: the corrector made it worse."),
        (0.5, 0.5, "0.500 nats (KL) from the fresh one, with the corrector and without it."),
        (0.5, 0.4999, "removed less than 1 % of the KL"),
        (0.5, 1e-5, "removed more than 99 % of the KL"),
        (0.5, None, "no corrected figure was recorded"),
        (0.0, 0.0, "0.000 nats (KL) from the fresh one, with the corrector and without it."),
        (0.0, 0.1, "the corrector made it worse"),
    ],
)  # fmt: skip
def test_the_corrector_gets_its_due(run, page, stale, corrected, said):
    run["results.json"]["distribution"] |= {"kl_stale": stale, "kl_corrected": corrected}
    assert said in page(run).words


def test_refreshes_are_told(run, page):
    assert "never refreshed: 0 targets were re-embedded after the first" in page(run).words
    run["results.json"]["ledger"]["refresh"] = 26793
    words = page(run).words
    assert "was refreshed: 26,793 targets were re-embedded, 3.0 times the corpus." in words
    assert "never refreshed" not in words


def test_a_run_without_a_cache(run, page):
    run["results.json"]["distribution"] = dict.fromkeys(run["results.json"]["distribution"])
    run["metrics.jsonl"] = [
        {key: value for key, value in row.items() if "probe" not in key and "drift" not in key}
        for row in run["metrics.jsonl"]
    ]
    words = page(run).words
    assert "No negatives came from a cache" in words
    assert "never refreshed" not in words
    assert "nats" not in summary_table(run["results.json"])


def test_half_a_line_is_left_out(tmp_path, run, page):
    path = write(tmp_path, run) / "metrics.jsonl"
    whole, unreadable = read_metrics(path)
    assert unreadable == 0
    assert "Unreadable" not in page(run).words
    with open(path, "a") as file:
        file.write('{"step": 400, "train/loss": 99')
    series, unreadable = read_metrics(path)
    assert unreadable == 1
    np.testing.assert_equal(series, whole)
    assert "Unreadable lines of metrics.jsonl left out: 1." in write_report(tmp_path).read_text()


def test_the_terminal_table_is_narrow_and_complete(run):
    run["results.json"]["ledger"] = dict.fromkeys(run["results.json"]["ledger"], 21_015_324)
    table = summary_table(run["results.json"])
    lines = table.splitlines()
    assert max(map(len, lines)) <= 80
    assert table.isascii()
    assert lines[0].split() == list(METRICS)
    ends = [match.end() for match in re.finditer(r"\S+", lines[0])]
    columns = [[line[end - 6 : end] for end in ends] for line in lines[1:6]]
    assert [row[1] for row in columns] == [" 0.442", " 0.552", " 0.401", " 0.578", "+0.177"]
    assert [row[4] for row in columns] == [" 0.339", " 0.410", " 0.301", " 0.429", "+0.177"]
    assert "removed 89 %" in " ".join(table.split())
    assert "21,015,324 with gradient" in " ".join(table.split())


def test_the_terminal_table_takes_what_there_is():
    assert "Recall@20 was not measured" in summary_table({})


def test_numbers_that_no_float_holds_are_none(tmp_path):
    huge = 10**400
    assert finite({"a": huge}, "a") is None
    assert finite({"a": 10**300}, "a") == 10**300
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": huge, "x": 1}, {"step": 2, "x": huge}, {"step": 3, "x": 4.5}]
    lines = [*map(json.dumps, rows), '{"step": Infinity}', "[" * 100_000]
    path.write_text("\n".join(lines))
    series, unreadable = read_metrics(path)
    assert {name: [a.tolist() for a in arrays] for name, arrays in series.items()} == {
        "x": [[3], [4.5]]
    }
    assert unreadable == 3


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("results.json", []),
        ("results.json", {"eval": {"before": 3}}),
        ("results.json", {"encoder": "text"}),
        ("examples.json", {"a": 1}),
        ("examples.json", [1]),
        ("profile.json", {"steps": 5}),
        ("softmax.json", [1]),
    ],
)
def test_a_report_of_files_that_no_run_wrote_says_so(tmp_path, run, monkeypatch, file, content):
    monkeypatch.setattr("corrector_jax.report.page.figure", lambda *_, **__: "")
    folder = write(tmp_path, run)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match="not as a run writes it") as error:
        write_report(folder)
    assert str(folder) in str(error.value)


def test_a_picture_that_cannot_be_drawn_is_no_fault_of_a_file(tmp_path):
    def draw(theme):
        raise ValueError("a mistake")

    with (
        pytest.raises(RuntimeError, match="the picture 'Loss' cannot be drawn") as error,
        made_by_a_run(tmp_path),
    ):
        figure(tmp_path, "loss", "Loss", "", draw)
    assert isinstance(error.value.__cause__, ValueError)
