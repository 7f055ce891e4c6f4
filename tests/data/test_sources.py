from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from corrector_jax.data import code_search, prepared, sources
from corrector_jax.data.dataset import RetrievalData, Split
from corrector_jax.types import UserError
from tests.data import written


@pytest.fixture
def _two_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded data are two targets and a test query for each."""

    def build(*, target_template: str) -> RetrievalData:
        rows = [np.array([row], np.int32) for row in range(2)]
        grades = [np.ones(1, np.int32)] * 2
        test = Split(query_ids=["p", "q"], texts=["one?", "two?"], positives=rows, grades=grades)
        return RetrievalData(
            name=f"embedded, {target_template}",
            target_ids=["a", "b"],
            target_texts=["one", "two"],
            splits={"test": test},
        )

    monkeypatch.setattr(code_search, "build", build)


@pytest.mark.usefixtures("_two_targets")
def test_without_a_path_the_embedded_data_are_made():
    assert sources.load("", target_template="{text}!").name == "embedded, {text}!"


@pytest.mark.usefixtures("_two_targets")
@pytest.mark.parametrize("embedded", [True, False])
def test_what_was_read_is_cut(tmp_path: Path, embedded: bool):
    path = ""
    if not embedded:
        (tmp_path / "test.jsonl").write_text(
            "".join(json.dumps({"query": q, "pos": [q[:-1]]}) + "\n" for q in ("one?", "two?"))
        )
        path = str(tmp_path / "test.jsonl")

    def sizes(**cut: int) -> tuple[int, int]:
        data = sources.load(path, cache_dir=str(tmp_path / "cache"), **cut)
        return len(data.target_ids), len(data.splits["test"].texts)

    assert sizes() == sizes(max_targets=5) == (2, 2)
    assert sizes(max_targets=1) == (1, 1)
    assert sizes(max_queries=1) == (2, 1)


def test_one_file_is_enough_where_queries_are_held_out(tmp_path: Path, capsys):
    rows = "".join(json.dumps({"query": f"{i}?", "pos": [str(i)]}) + "\n" for i in range(10))
    (tmp_path / "pairs.jsonl").write_text(rows)
    data = sources.load(
        str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path / "cache"), holdout=0.3
    )
    assert {name: len(split.texts) for name, split in data.splits.items()} == {"train": 7, "dev": 3}
    assert len(data.target_ids) == 10  # what they are to find stays among the targets
    assert "3 of 10 train queries are held out as dev" in capsys.readouterr().out


def test_a_cut_keeps_hard_negatives_and_answers_with_their_queries(tmp_path: Path):
    folder = written.dpr(tmp_path / "tiny")
    whole = sources.load(str(folder), cache_dir=str(tmp_path / "cache"))
    small = sources.load(str(folder), cache_dir=str(tmp_path / "cache"), max_targets=20)
    kept = set(small.target_texts)
    for name, split in small.splits.items():
        before = whole.splits[name]
        for i, text in enumerate(split.texts):
            j = list(before.texts).index(text)
            assert split.answers[i] == before.answers[j]
            left = [whole.target_texts[row] for row in before.negatives[j]]
            assert [small.target_texts[row] for row in split.negatives[i]] == [
                text for text in left if text in kept
            ]


@pytest.mark.parametrize("template", ["{titel} {text}", "{}", "{text", "{text[a]}", "passage:"])
def test_templates_that_cannot_work_are_refused(template: str):
    with pytest.raises(UserError, match=r"data\.target_template="):
        sources.load("", target_template=template)


def targets(path: Path) -> list[tuple[str, str]]:
    return list(sources.targets(str(path), target_template="{text}"))


def test_targets_are_those_of_a_corpus_and_never_none(tmp_path: Path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"query": "q", "pos": ["p"]}\n')
    with pytest.raises(UserError, match=r"rows holds no corpus, only queries"):
        targets(folder)
    (folder / "corpus.jsonl").write_text('{"id": "a", "text": "one"}\n')  # not BEIR's _id
    assert targets(folder) == [("a", "one")]


def test_targets_are_not_empty_and_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    corpus = tmp_path / "corpus.jsonl"

    def write(*pairs: tuple[str, str]) -> None:
        corpus.write_text("".join(json.dumps({"_id": i, "text": t}) + "\n" for i, t in pairs))

    write(("a", "one"), ("b", "two"), ("c", " "))
    with pytest.raises(UserError, match=r"corpus\.jsonl:3: the target has no text"):
        targets(tmp_path)
    for shard in (2, 9):
        monkeypatch.setattr(prepared, "SHARD", shard)
        write(("a", "one"), ("b", "two"), ("a", "three"))
        with pytest.raises(UserError, match=r"corpus\.jsonl:3: the id 'a' occurred before"):
            targets(tmp_path)
        write(("a", "one"), ("b", "two"), ("c", "one"))
        assert targets(tmp_path) == [("a", "one"), ("b", "two"), ("c", "one")]
