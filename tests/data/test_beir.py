from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from corrector_jax.data import beir
from corrector_jax.types import UserError

HEADER = "query-id\tcorpus-id\tscore"
CORPUS = [
    {"_id": "a", "title": "Ant", "text": "A small insect."},
    {"_id": "b", "title": "", "text": "A bird; größer."},
    {"_id": "c", "text": "A cat."},
]
QUERIES = [
    {"_id": "q1", "text": "insect?"},
    {"_id": "q2", "text": "pet?"},
    {"_id": "q3", "text": "-"},
]
QRELS = {"train": [HEADER, "q1\ta\t1"], "test": [HEADER, "q2\tc\t2", "q2\ta\t1", "q3\tb\t0"]}


def _write(folder: Path, corpus=CORPUS, queries=QUERIES, qrels=QRELS) -> Path:
    (folder / "qrels").mkdir(parents=True)
    for name, records in (("corpus", corpus), ("queries", queries)):
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, lines in qrels.items():
        (folder / "qrels" / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_reads_texts_splits_and_grades(tmp_path: Path):
    data = beir.read(str(_write(tmp_path / "toy")) + "/")
    assert data.name == "toy"
    assert data.target_ids == ["a", "b", "c"]
    assert data.target_texts == ["Ant A small insect.", "A bird; größer.", "A cat."]
    assert list(data.splits) == ["train", "test"]
    test = data.splits["test"]
    assert (test.query_ids, test.texts) == (["q2"], ["pet?"])  # q3 has no positive
    np.testing.assert_array_equal(test.positives, [[0, 2]])
    np.testing.assert_array_equal(test.grades, [[1, 2]])
    assert test.positives[0].dtype == test.grades[0].dtype == np.int32


def test_template_is_filled_in_and_stripped(tmp_path: Path):
    data = beir.read(str(_write(tmp_path / "toy")), target_template=" {title}: {text}\n")
    assert data.target_texts[0] == "Ant: A small insect."


def test_queries_come_in_the_order_of_their_judgements(tmp_path: Path):
    qrels = {"dev": [HEADER, "q3\ta\t0", "q2\tb\t1", "q1\tc\t1", "q3\tc\t1", "q2\ta\t1"]}
    split = beir.read(str(_write(tmp_path / "toy", qrels=qrels))).splits["dev"]
    assert split.query_ids == ["q3", "q2", "q1"]
    assert [rows.tolist() for rows in split.positives] == [[2], [0, 1], [2]]


def test_windows_line_ends_byte_order_marks_and_blank_lines_are_read(tmp_path: Path):
    folder = _write(tmp_path / "toy")
    plain = beir.read(str(folder))
    for path in folder.rglob("*.*"):
        content = path.read_bytes().replace(b"\n", b"\r\n")
        path.write_bytes(b"\xef\xbb\xbf" + content + b"\r\n")
    again = beir.read(str(folder))
    assert again.fingerprint() == plain.fingerprint()
    assert again.splits["test"].query_ids == plain.splits["test"].query_ids


@pytest.mark.parametrize(
    ("file", "changed", "where", "message"),
    [
        ("corpus", ['{"_id": "x", "text": "t"}', "{oops"], "corpus.jsonl:2", "not a JSON object"),
        ("corpus", ["", "[1]"], "corpus.jsonl:2", "not a JSON object"),
        ("corpus", ['{"_id": "x"}'], "corpus.jsonl:1", '"text" is missing'),
        ("corpus", ['{"text": "t"}'], "corpus.jsonl:1", '"_id" is missing'),
        ("corpus", ['{"_id": "x", "text": null}'], "corpus.jsonl:1", '"text" is null'),
        ("corpus", ['{"_id": "x", "text": "t", "title": 3}'], "corpus.jsonl:1", '"title" is 3'),
        ("corpus", ['{"_id": 7, "text": "t"}'], "corpus.jsonl:1", '"_id" is 7'),
        (
            "corpus",
            ['{"_id": "x y", "text": "t"}'],
            "corpus.jsonl:1",
            "'x y' is empty or has blanks",
        ),
        ("corpus", ['{"_id": "", "text": "t"}'], "corpus.jsonl:1", "'' is empty or has blanks"),
        ("corpus", ['{"_id": "x", "text": "\\ud800"}'], "corpus.jsonl:1", "surrogate"),
        ("corpus", [*CORPUS, CORPUS[1]], "corpus.jsonl:4", "'b' occurred before"),
        ("corpus", [""], "corpus.jsonl", "is empty"),
        ("queries", [QUERIES[0], QUERIES[0]], "queries.jsonl:2", "'q1' occurred before"),
        ("queries", ['{"_id": "q"}'], "queries.jsonl:1", '"text" is missing'),
        ("test", ["q1\ta\t1"], "test.tsv:1", "header is missing"),
        ("test", ["query-id corpus-id score"], "test.tsv:1", "header is missing"),
        ("test", [""], "test.tsv:1", "header is missing"),
        ("test", [HEADER, "q1\ta\t1", "q1\t0\ta\t1"], "test.tsv:3", "4 column"),
        ("test", [HEADER, "q9\ta\t1"], "test.tsv:2", "query 'q9' is not in queries.jsonl"),
        ("test", [HEADER, "q1\tz\t1"], "test.tsv:2", "target 'z' is not in corpus.jsonl"),
        ("test", [HEADER, "q1\ta\t0.5"], "test.tsv:2", "'0.5' is not an integer"),
        ("test", [HEADER, "q1\ta\t1", "q1\ta\t0"], "test.tsv:3", "another score above"),
        ("test", [HEADER], "test.tsv", "no positive"),
        ("test", [HEADER, "q1\ta\t0", "q1\tb\t-1"], "test.tsv", "no positive"),
    ],
)
def test_errors_name_file_line_and_cause(tmp_path: Path, file, changed, where, message):
    parts = {"qrels": QRELS | {"test": changed}} if file == "test" else {file: changed}
    folder = _write(tmp_path / "toy", **parts)
    with pytest.raises(UserError) as caught:
        beir.read(str(folder))
    text = str(caught.value)
    assert f"{where}:" in text or f"{where} " in text
    assert message in text
    assert "\n" not in text


def test_bytes_that_are_no_utf8_are_refused(tmp_path: Path):
    folder = _write(tmp_path / "toy")
    (folder / "queries.jsonl").write_bytes(
        b'{"_id": "q1", "text": "x"}\n{"_id": "q2", "text": "\xe9"}'
    )
    with pytest.raises(UserError, match=r"queries\.jsonl:2: not UTF-8"):
        beir.read(str(folder))


@pytest.mark.parametrize("missing", ["corpus.jsonl", "queries.jsonl"])
def test_missing_files_are_named(tmp_path: Path, missing: str):
    folder = _write(tmp_path / "toy")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=f"{missing} cannot be read"):
        beir.read(str(folder))


def test_missing_judgements_and_folders_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"at least one of train\.tsv, dev\.tsv and test\.tsv"):
        beir.read(str(_write(tmp_path / "toy", qrels={})))
    with pytest.raises(UserError, match="is not a folder"):
        beir.read(str(tmp_path / "nowhere"))


def test_real_data_with_several_positives(shared_data: Path):
    folder = shared_data / "medquad"
    data = beir.read(str(folder))
    assert len(data.target_ids) == 15_808
    for name, count, largest in (("train", 11_205, 19), ("dev", 1_454, None)):
        split = data.splits[name]
        lines = (folder / "qrels" / f"{name}.tsv").read_text().splitlines()[1:]
        pairs = {tuple(line.split("\t")[:2]) for line in lines}
        found = {
            (query, data.target_ids[row])
            for query, rows in zip(split.query_ids, split.positives, strict=True)
            for row in rows
        }
        assert found == pairs
        assert len(split.query_ids) == count
        known = data.known_positives(name)
        assert largest is None or known.shape == (count, largest)
        assert (known >= 0).sum() == len(pairs)
