"""Searching finds what the evaluation found, embeds once, and refuses what is no run."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from corrector_jax import checkpoint, prompt, search
from corrector_jax.evaluate import evaluate, restored
from corrector_jax.negatives import Gated
from corrector_jax.prompt import search_run
from corrector_jax.ranking import read_trec
from corrector_jax.search import DEPTH, Searcher
from corrector_jax.types import UserError


@pytest.fixture(scope="module")
def searcher(finished):
    return Searcher(finished)


def assert_same(found, expected):
    np.testing.assert_allclose(found.scores, expected.scores, atol=2e-6)
    apart = np.abs(np.diff(expected.scores, axis=1)) > 1e-5  # nearer ones may change places
    assert apart.mean() > 0.9
    settled = np.pad(apart, ((0, 0), (1, 0)), constant_values=True)
    settled &= np.pad(apart, ((0, 0), (0, 1)), constant_values=True)
    np.testing.assert_array_equal(found.rows[settled], expected.rows[settled])


def test_every_model_finds_what_the_evaluation_found(finished, searcher):
    job, state, cache, position = restored(finished, step=None, with_cache=True)
    split = job.data.splits[job.final_split]
    found = searcher.find(split.texts)
    assert tuple(found) == searcher.models == ("before", "stale", "corrected", "final")
    for model, name in (("before", "before"), ("final", "after")):
        path = finished / "runs" / f"{name}.trec"
        assert_same(found[model].ranking, read_trec(path, split, job.data.target_ids))
    closed = Gated(state.corrector.params, job.place.put_everywhere(np.float32(0)))
    for model, psi in (("stale", closed), ("corrected", state.corrector.gated)):
        result = evaluate(
            job, state.params, step=position.step, splits=[job.final_split], corpus="corrected",
            cache=cache, psi=psi,
        )  # fmt: skip
        assert_same(found[model].ranking, result.rankings[job.final_split])
    stale, corrected = (found[name].ranking.rows for name in ("stale", "corrected"))
    assert (stale != found["final"].ranking.rows).any()
    assert float(state.corrector.gate) == 0.0 or (stale != corrected).any()


def test_a_query_alone_is_answered_as_among_others(searcher):
    texts = searcher.examples(11)  # more than are ranked at once
    together = searcher.answers(texts, count=3)
    alone = searcher.answers(texts[-1:], count=3)[0]
    assert [hit.target for hit in together[-1].hits["final"]] == [
        hit.target for hit in alone.hits["final"]
    ]
    assert [hit.rank for hit in alone.hits["final"]] == [1, 2, 3]
    assert alone.hits["final"][0].ranks["final"] == 1


def test_known_positives_are_told_apart(searcher):
    split = searcher.job.data.splits["test"]
    (answer,) = searcher.answers(split.texts[:1], count=min(DEPTH, searcher.job.size))
    relevant = {hit.target for hit in answer.hits["before"] if hit.relevant}
    assert relevant == {searcher.job.data.target_ids[row] for row in split.positives[0]}


def test_known_positives_of_equal_queries_add_up_whatever_their_blanks(searcher, monkeypatch):
    split = searcher.job.data.splits["test"]
    texts = [f" {split.texts[0].replace(' ', '  ')} ", split.texts[0], *split.texts[2:]]
    known = [np.array([0]), np.array([5]), *split.positives[2:]]
    changed = split._replace(texts=texts, positives=known)
    monkeypatch.setitem(searcher.job.data.splits, "test", changed)
    monkeypatch.delitem(searcher.__dict__, "_known", raising=False)
    for text in texts[:2]:
        (answer,) = searcher.answers([text], count=min(DEPTH, searcher.job.size))
        relevant = {hit.target for hit in answer.hits["final"] if hit.relevant}
        assert relevant == {searcher.job.data.target_ids[row] for row in (0, 5)}
    del searcher.__dict__["_known"]


def test_half_a_character_is_a_question_mark():
    assert search.require_query("a \udcff  b") == "a ? b"


@pytest.mark.parametrize("width", [1, 4, 9])
def test_words_longer_than_a_line_go_on_in_the_next(width):
    pieces = [prompt.Piece("東京都の人口は", False), prompt.Piece("約千四百万人", True)]
    pieces.append(prompt.Piece("である and so on", False))
    lines = list(prompt._wrapped(pieces, width))
    assert all(sum(len(piece.text) for piece in line) <= width for line in lines)
    marked = "".join(piece.text for line in lines for piece in line if piece.marked)
    assert marked == "約千四百万人"
    said = "".join(piece.text for line in lines for piece in line)
    assert said.replace(" ", "") == "東京都の人口は約千四百万人であるandsoon"


def test_targets_are_embedded_once_for_each_weights(finished, searcher, tmp_path, monkeypatch):
    assert (finished / "search" / "final").exists()
    assert not (finished / "search" / "before").exists()  # the first snapshot serves
    passes, go_over = [], search.go_over
    monkeypatch.setattr(search, "go_over", lambda *args: passes.append(args) or go_over(*args))
    job = searcher.job
    folder, params = tmp_path / "rows", job.init_state().params

    def embedded():
        return np.asarray(search._embedded(job, params, 0, [folder]).embeddings)

    first = embedded()
    np.testing.assert_array_equal(embedded(), first)
    assert len(passes) == 1
    content = json.loads((folder / "manifest.json").read_text())
    content["made_by"]["weights"] = "others"
    (folder / "manifest.json").write_text(json.dumps(content))
    np.testing.assert_array_equal(embedded(), first)
    assert len(passes) == 2
    file = next(folder.glob("rows-*"))
    file.write_bytes(file.read_bytes()[:-1])
    np.testing.assert_array_equal(embedded(), first)
    assert len(passes) == 3


def test_a_strategy_without_a_cache_has_two_models(finished, monkeypatch):
    def without_cache(*args, **more):
        job, state, _, position = restored(*args, **more)
        return job, state, None, position

    made = []
    monkeypatch.setattr(search, "restored", without_cache)
    monkeypatch.setattr(
        prompt, "Searcher", lambda *a, **b: made.append(Searcher(*a, **b)) or made[0]
    )
    with pytest.raises(UserError, match="'stale' ranks a cache"):
        search_run(finished, query="ba", step=None, show="stale", count=5)
    assert made[0].models == ("before", "final")


def test_what_is_no_run_of_this_version_is_refused_in_one_sentence(finished, tmp_path, monkeypatch):
    def refused(workdir, match):
        with pytest.raises(UserError, match=match) as error:
            Searcher(workdir)
        assert "\n" not in str(error.value)

    refused(tmp_path, r"holds no config\.json")
    shutil.copy(finished / "config.json", tmp_path)
    refused(tmp_path, "holds no checkpoint")
    content = json.loads((finished / "config.json").read_text()) | {"newer": 1}
    (tmp_path / "config.json").write_text(json.dumps(content))
    refused(tmp_path, "'newer', which this version does not know")
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    refused(finished, "has format 1 and this version reads 2")


def test_lines_are_answered_until_quit_and_mistakes_do_not_end_it(finished, monkeypatch, capsys):
    lines = ["ba be", "", ":all", ":1", "bu", ":nonsense", ":200", "x" * 2000, ":q", "never"]
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.setattr(prompt.sys, "stdin", FakeInput(lines))
    search_run(finished, query="", step=None, show="both", count=2)
    said = capsys.readouterr().out
    titles = [line for line in said.splitlines() if line.startswith("BEFORE")]
    assert ["STALE" in title for title in titles] == [False, True]
    assert all("FINAL (" in title for title in titles)
    assert " 2. " in said.split(titles[1])[0]
    assert " 2. " not in said.split(titles[1])[1]
    assert "error: :200 is 200: write 1 to 100" in said
    assert "error: the query has 2,000 characters" in said
    assert "never" not in said


class FakeInput(list):
    """Lines that are piped in."""

    def isatty(self):
        return False


@pytest.mark.parametrize("width", [30, 100, 200])
def test_columns_are_straight_and_nothing_in_a_text_rules_the_terminal(searcher, width):
    hit = search.Hit(
        1, 0.5, "t\x1b]0;x", "bad \x1b[2J " + "long" * 40 + " word", True, {"final": 1}
    )
    answer = search.Answer("word", {"before": [hit], "final": [hit, hit]}, dict.fromkeys(
        ("before", "final"), 0.01))  # fmt: skip
    plain = prompt.page(answer, width=width, bold=False)
    assert "\x1b" not in plain
    assert all(len(line) <= width for line in plain.splitlines())
    if width >= 100:
        assert len({line.find(" | ") for line in plain.splitlines() if " | " in line}) == 1
    bold = prompt.page(answer, width=width, bold=True)
    assert "\x1b[1mword\x1b[0m" in bold
    assert bold.replace("\x1b[1m", "").replace("\x1b[0m", "") == plain


def test_an_impossible_word_or_number_is_refused_before_anything_is_loaded(tmp_path):
    for query, show, count, said in (
        ("", "sideways", 5, r"config\.search\.show is 'sideways'"),
        ("", "both", 0, r"config\.search\.count is 0: write 1 to 100"),
        (" ", "both", 5, "the query is empty"),
    ):
        with pytest.raises(UserError, match=said):
            search_run(tmp_path, query=query, step=None, show=show, count=count)
