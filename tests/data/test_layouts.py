"""The same corpus in every layout is the same data."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from corrector_jax import config as configs
from corrector_jax.data import sources
from corrector_jax.data.dataset import RetrievalData
from corrector_jax.data.tokenize import TextTokenizer
from corrector_jax.ranking import Ranking, measure
from corrector_jax.types import UserError
from tests import tiny
from tests.data import written


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t")
    return TextTokenizer((folder / "tokenizer.json").read_text())


def load(folder: Path, **arguments) -> RetrievalData:
    return sources.load(str(folder), cache_dir=str(folder.parent / "cache"), **arguments)


def token_rows(data: RetrievalData, tokenizer: TextTokenizer) -> Counter:
    tokens = tokenizer.encode(data.target_texts, max_len=12)
    return Counter(map(bytes, tokens))


def by_content(data: RetrievalData, field: str) -> dict[str, dict[str, frozenset[str]]]:
    """Split -> query's text -> texts of its positives or negatives."""
    return {
        name: {
            text: frozenset(data.target_texts[row] for row in rows)
            for text, rows in zip(split.texts, getattr(split, field), strict=True)
        }
        for name, split in data.splits.items()
    }


def metrics(data: RetrievalData, tokenizer: TextTokenizer) -> dict[str, dict[str, float]]:
    """Of a fixed random embedding of every token."""
    vectors = np.random.default_rng(0).normal(size=(tokenizer.vocab_size, 16))

    def embed(texts) -> np.ndarray:
        return vectors[tokenizer.encode(texts, max_len=12)].sum(1)

    targets, found = embed(data.target_texts), {}
    for name, split in data.splits.items():
        scores = embed(split.texts) @ targets.T
        rows = np.argsort(-scores, axis=1)[:, :10].astype(np.int32)
        ranking = Ranking(rows, np.take_along_axis(scores, rows, 1).astype(np.float32))
        found[name] = measure(split, ranking, data.target_ids).metrics
    return found


@pytest.mark.parametrize(
    ("name", "titled"),
    [*((name, False) for name in written.ALL), *((name, True) for name in written.TITLED)],
)
def test_every_layout_gives_the_same_data(tmp_path: Path, tokenizer, name: str, titled: bool):
    arguments = {"titled": True} if titled else {}
    data = load(written.ALL[name](tmp_path / "tiny", **arguments))
    assert data.reading is not None
    assert data.reading.layout == written.layout(name)
    assert data.reading.refused == ()
    texts = [f"{written.title(r, titled)} {written.text(r)}".strip() for r in range(written.SIZE)]
    assert token_rows(data, tokenizer) == Counter(map(bytes, tokenizer.encode(texts, max_len=12)))
    for field, number in (("positives", 1), ("negatives", 2)):
        assert by_content(data, field) == {
            split: {q[0]: frozenset(texts[r] for r in q[number]) for q in written.queries(split)}
            for split in written.SPLITS
        }, field
    assert len(set(data.target_ids)) == len(data.target_ids)
    other = load(written.beir(tmp_path / "beir", titled))
    mine = metrics(data, tokenizer)
    assert 0 < mine["train"]["mrr@10"] < 1
    assert mine == metrics(other, tokenizer)


@pytest.mark.parametrize("end", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["beir", "dpr_with_corpus", "columns", "msmarco", "text_files"])
def test_compressed_files_are_read_as_they_are(tmp_path: Path, name: str, end: str):
    plain = load(written.ALL[name](tmp_path / "plain"))
    folder = written.ALL[name](tmp_path / "packed")
    written.compress(folder, end)
    packed = load(folder)
    assert packed.fingerprint() == plain.fingerprint()
    assert by_content(packed, "positives") == by_content(plain, "positives")


def test_cells_hold_what_csv_lets_them_hold(tmp_path: Path):
    (tmp_path / "train.csv").write_text(
        '\ufeffanchor,positive,negative\n\n"one, two","a ""b""\n\nc",\nthree,d,e\n',
        encoding="utf-8",
    )
    data = load(tmp_path / "train.csv")
    assert list(data.splits["train"].texts) == ["one, two", "three"]
    assert list(data.target_texts) == ['a "b"\n\nc', "d", "e"]
    assert [rows.tolist() for rows in data.splits["train"].negatives] == [[], [2]]


def test_a_single_file_is_the_train_split(tmp_path: Path):
    folder = written.tevatron(tmp_path / "tiny")
    (folder / "train.jsonl").rename(tmp_path / "pairs.jsonl")
    data = load(tmp_path / "pairs.jsonl")
    assert data.name == "pairs"
    assert list(data.splits) == ["train"]
    assert len(data.splits["train"].texts) == len(written.SPLITS["train"])


def test_answers_are_kept(tmp_path: Path):
    split = load(written.dpr(tmp_path / "tiny")).splits["dev"]
    assert list(split.answers[0]) == [tiny.WORDS[12], tiny.WORDS[13]]


def test_what_was_read_is_said_and_ambiguity_is_refused(tmp_path: Path, capsys):
    folder = written.beir(tmp_path / "tiny")
    load(folder)
    assert f"{folder} is read as beir" in capsys.readouterr().out
    (folder / "a.txt").write_text("a text")
    (folder / "train.jsonl").write_text('{"query": "q", "pos": ["p"]}\n')
    load(folder)  # qrels/ leaves no doubt
    (folder / "collection.tsv").write_text("1\tx\n")
    (folder / "qrels.dev.tsv").write_text("1\t0\t1\t1\n")
    with pytest.raises(UserError, match=r"as beir and as msmarco: .* config\.data\.layout"):
        load(folder)
    load(folder, layout="beir")


def test_every_layout_is_a_word_of_the_configuration():
    assert set(configs.WORDS["data.layout"]) == {"", *sources.LAYOUTS}


def test_templates_are_filled_in_and_stripped(tmp_path: Path):
    data = load(written.beir(tmp_path / "tiny", titled=True), target_template=" {title}: {text}\n")
    assert data.target_texts[3] == f"{written.title(3, True)}: {written.text(3)}"


def test_queries_come_in_the_order_of_their_judgements_with_their_grades(tmp_path: Path):
    folder = written.beir(tmp_path / "tiny")
    lines = ["query-id\tcorpus-id\tscore", "dev3\tt0\t0", "dev2\tt9\t1", "dev1\tt3\t1"]
    lines += ["dev3\tt2\t2", "dev2\tt1\t3"]
    (folder / "qrels" / "dev.tsv").write_text("\n".join(lines))
    split = load(folder).splits["dev"]
    assert list(split.query_ids) == ["dev3", "dev2", "dev1"]
    assert [rows.tolist() for rows in split.positives] == [[2], [1, 9], [3]]
    assert [grades.tolist() for grades in split.grades] == [[2], [3, 1], [1]]
    assert [rows.tolist() for rows in split.negatives] == [[0], [], []]


@pytest.mark.parametrize(
    ("answers", "text", "holds"),
    [
        (["Zürich"], "the city of zurich, where", True),
        (["art"], "a party", False),
        (["U.S."], "in the U S of then", True),
        ([""], "anything", False),
        (["東京"], "東京は日本の首都です", False),  # words are found, not parts of them
        (["no", "new york"], "the New-York Times", True),
    ],
)
def test_a_passage_is_positive_if_it_holds_the_words_of_an_answer(
    tmp_path: Path, answers: list[str], text: str, holds: bool
):
    row = {"question": "q", "answers": answers, "ctxs": [{"title": "", "text": text}]}
    sure = {"title": "", "text": "certainly", "has_answer": True}
    (tmp_path / "train.jsonl").write_text(json.dumps(row | {"ctxs": [*row["ctxs"], sure]}))
    split = load(tmp_path).splits["train"]
    assert len(split.positives[0]) == 1 + holds


def test_real_data_with_several_positives(shared_data: Path, tmp_path: Path):
    folder = shared_data / "medquad"
    data = sources.load(str(folder), cache_dir=str(tmp_path))
    assert len(data.target_ids) == 15_808
    for name, count, largest in (("train", 11_205, 19), ("dev", 1_454, 7)):
        split = data.splits[name]
        lines = (folder / "qrels" / f"{name}.tsv").read_text().splitlines()[1:]
        found = {
            (query, data.target_ids[row])
            for query, rows in zip(split.query_ids, split.positives, strict=True)
            for row in rows
        }
        assert found == {tuple(line.split("\t")[:2]) for line in lines}
        assert len(split.query_ids) == count
        known = data.known_positives(name)
        assert known.shape == (count, largest)
        assert (known >= 0).sum() == len(lines)


def test_the_answer_in_a_query_s_metadata_is_read(tmp_path: Path):
    """HotpotQA's; what other data sets put there is none."""
    folder = tmp_path / "data"
    folder.mkdir()
    written.beir(folder)
    path = folder / "queries.jsonl"
    more = [{"answer": "yes"}, {"answer": ["a"]}, {"answer": " "}, {}, None, "text"]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for number, record in enumerate(records):
        record["metadata"] = more[number % len(more)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = load(folder)
    expected = {
        record["text"]: ["yes"] if record["metadata"] == more[0] else [] for record in records
    }
    for split in data.splits.values():
        for text, answers in zip(split.texts, split.answers, strict=True):
            assert answers == expected[text]
    assert sum(map(len, expected.values())) > 1
