"""What `--mode=check_data` finds, and what it calls wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from corrector_jax.check_data import check_data
from tests import tiny
from tests.data import written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.overrides(tmp_path)  # the tokenizer
    return written.beir(tmp_path / "mine", titled=True)


def check(folder: Path, **changes: object) -> tuple[bool, dict, dict[str, dict]]:
    """Whether it is right, the whole record, and its findings by name."""
    keys = {"data__path": str(folder), "data__target_max_len": 8, **changes}
    config = tiny.config(folder.parent, **keys)
    right = check_data(config, folder.parent / "run")
    record = json.loads((folder.parent / "run" / "check_data.json").read_text())
    assert record["right"] == right
    return right, record, {finding["what"]: finding for finding in record["findings"]}


def append(path: Path, *lines: str) -> None:
    with path.open("a") as file:
        file.write("".join(line + "\n" for line in lines))


def test_good_data_are_right_and_counted(folder: Path, capsys):
    right, record, findings = check(folder)
    assert right
    assert record["layout"] == "beir"
    assert record["targets"] == 24
    assert record["queries"]["train"] == {
        "queries": 12,
        "positives": 16,
        "most_positives": 2,
        "hard_negatives": 24,
    }
    tokens = [4 + 1 + 2 + row % 4 for row in range(24)]  # [CLS], [SEP], title; the text
    assert record["lengths"]["targets"] == {
        "measured": 24,
        "mean": sum(tokens) / 24,
        "p95": 10,
        "longest": 10,
        "limit": 8,
        "truncated": 0.5,
    }
    assert not any(finding["count"] for finding in findings.values())
    out = capsys.readouterr().out
    assert "nothing is wrong" in out
    assert "50.0%" in out


@pytest.mark.parametrize(
    ("file", "line", "kind"),
    [
        ("qrels/train.tsv", "train0\tnix\t1", "missing target"),
        ("qrels/train.tsv", "train0\tt1\tx", "malformed row"),
        ("corpus.jsonl", '{"_id": "t1", "text": "again"}', "duplicate id"),
        ("corpus.jsonl", '{"_id": "t99", "text": ""}', "empty text"),
    ],
)
def test_refused_rows_are_wrong_unless_they_are_allowed(
    folder: Path, file: str, line: str, kind: str
):
    append(folder / file, line, line.replace("train0", "train1"))
    right, _, findings = check(folder)
    assert not right
    finding = findings[f"rows refused: {kind}"]
    assert finding["count"] == 2
    assert file in finding["examples"][0]
    assert check(folder, data__max_bad_rows=2)[0]


def test_queries_without_positives_are_counted(folder: Path):
    append(folder / "queries.jsonl", '{"_id": "lonely", "text": "who?"}')
    append(folder / "qrels" / "train.tsv", "lonely\tt1\t0")
    right, _, findings = check(folder)
    assert right
    assert findings["train queries without a positive, left out"]["count"] == 1


def test_queries_in_two_splits_are_leakage(folder: Path):
    text = written.queries("train")[0][0]
    append(folder / "queries.jsonl", json.dumps({"_id": "leak", "text": f" {text.upper()}"}))
    append(folder / "qrels" / "test.tsv", "leak\tt0\t1")
    right, _, findings = check(folder)
    assert not right
    assert findings["test queries that are train queries too"]["count"] == 1
    assert findings["dev queries that are train queries too"]["count"] == 0


def test_a_twin_of_a_positive_is_a_false_negative(folder: Path):
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    append(folder / "corpus.jsonl", json.dumps(json.loads(lines[5]) | {"_id": "twin"}))
    right, _, findings = check(folder)
    assert not right
    assert findings["targets whose text another target has"]["count"] == 1
    found = findings["train queries with a false negative, the text of a positive"]
    assert (found["count"], found["of"]) == (1, 12)
    append(folder / "qrels" / "train.tsv", "train5\ttwin\t1")  # now it is known
    right, _, findings = check(folder)
    assert right


def test_missing_splits_are_wrong(folder: Path):
    for name in ("dev", "test"):
        (folder / "qrels" / f"{name}.tsv").unlink()
    right, _, findings = check(folder)
    assert not right
    assert findings["splits missing"]["examples"] == ["dev or test"]
