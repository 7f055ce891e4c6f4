"""Files of mined negatives: what is read, what is left out, what is refused."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow
import pytest

from corrector_jax.data import mined
from corrector_jax.data.dataset import Split
from corrector_jax.ranking import Ranking, write_trec
from corrector_jax.types import UserError

TARGETS = [f"t{row}" for row in range(8)] + ["a blank"]


def split_of(*positives: list[int]) -> Split:
    return Split(
        query_ids=[f"q{i}" for i in range(len(positives))],
        texts=["?"] * len(positives),
        positives=[np.array(rows, np.int32) for rows in positives],
        grades=[np.ones(len(rows), np.int32) for rows in positives],
    )


SPLIT = split_of([0], [5, 1], [2])
TREC = """q1 Q0 t1 1 9.5 x
q0 Q0 t4 2 3 x
q1 Q0 t7 2 9.25 x

q0 Q0 t3 1 4e0 x
q1 Q0 t3 3 1 x
q1 Q0 t7 9 0 x
q1 Q0 a%20blank 5 -2 x
"""
JSONL = """{"query_id": "q1", "negatives": ["t1", "t7", "t3", "t7", "a blank"]}
{"query_id": "q0", "negatives": ["t3", "t4"]}
"""
WANTED = [[3, 4], [7, 3, 8], []]
"""By rank; t1 is a known positive of q1, and t7 stands there twice."""


def read(path, split=SPLIT, **arguments):
    return mined.read(path, split, TARGETS, **arguments)


def packed(path, text: str) -> None:
    content = text.encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
        return
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bm25.trec", TREC),
        ("run.txt.gz", TREC),
        ("run.zst", TREC),
        ("negatives.jsonl", JSONL),
        ("negatives.jsonl.gz", JSONL),
        ("negatives.json", json.dumps([json.loads(line) for line in JSONL.splitlines()])),
    ],
)
def test_every_format_gives_rows_the_best_first_without_known_positives(tmp_path, name, text):
    packed(tmp_path / name, text)
    found, rows = read(tmp_path / name)
    assert [one.tolist() for one in found] == WANTED
    assert {one.dtype for one in found} == {np.dtype(np.int32)}
    assert not rows.refused


def test_numbers_are_ids_too(tmp_path):
    (tmp_path / "n.jsonl").write_text('{"query_id": 7, "negatives": [12, "13"]}')
    split = split_of([0])._replace(query_ids=["7"])
    found, _ = mined.read(tmp_path / "n.jsonl", split, ["11", "12", "13"])
    assert found[0].tolist() == [1, 2]


def test_a_run_s_own_file_is_read_back(tmp_path):
    rng = np.random.default_rng(0)
    targets = [f"d{row}" for row in range(50)]
    rows = np.stack([rng.permutation(50)[:20] for _ in range(30)]).astype(np.int32)
    rows[4, 3:] = rows[9] = -1
    split = split_of(*(sorted(rng.choice(50, 1 + i % 3, replace=False)) for i in range(30)))
    write_trec(tmp_path / "a.trec", split, Ranking(rows, np.zeros(rows.shape)), targets, "x")
    found, _ = mined.read(tmp_path / "a.trec", split, targets)
    for row, known, negatives in zip(rows.tolist(), split.positives, found, strict=True):
        assert negatives.tolist() == [r for r in row if r >= 0 and r not in known.tolist()]


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("n.trec", "q0 Q0 t1 1 0.5", "n.trec:2 is not a TREC line"),
        ("n.trec", "q0 Q0 t1 best 0.5 x", "n.trec:2 is not a TREC line"),
        ("n.trec", "q0 Q0 t1 1 nan x", "n.trec:2 is not a TREC line"),
        ("n.trec", f"q0 Q0 t1 {10**30} 1 x", "n.trec:2 is not a TREC line"),
        ("n.trec", "dev7 Q0 t1 1 0.5 x", "n.trec:2 names query 'dev7'"),
        ("n.trec", "q0 Q0 t99 1 0.5 x", "n.trec:2 names target 't99'"),
        ("n.jsonl", '{"negatives": ["t1"]}', 'n.jsonl:2: the key "query_id" is missing'),
        ("n.jsonl", '{"query_id": "q0"}', 'n.jsonl:2: the key "negatives" is missing'),
        ("n.jsonl", '{"query_id": "q0", "negatives": "t1"}', "n.jsonl:2: .*square brackets"),
        ("n.jsonl", '{"query_id": "q0", "negatives": [[1]]}', "n.jsonl:2: .*in quotes"),
        ("n.jsonl", '{"query_id": "q0", "negatives": [""]}', "n.jsonl:2: an id .* is empty"),
        ("n.jsonl", '{"query_id": "q9", "negatives": ["t1"]}', "n.jsonl:2 names query 'q9'"),
        ("n.jsonl", '{"query_id": "q0", "negatives": ["zz"]}', "n.jsonl:2 names target 'zz'"),
        ("n.jsonl", "q0 t1", "n.jsonl:2: not a JSON object"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line_or_skipped_and_counted(tmp_path, name, line, said):
    good = "q0 Q0 t3 1 2 x" if name == "n.trec" else '{"query_id": "q0", "negatives": ["t3"]}'
    (tmp_path / name).write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=said) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)
    found, rows = read(tmp_path / name, max_bad_rows=1)
    assert [one.tolist() for one in found] == [[3], [], []]
    assert list(rows.refused) == [f"{tmp_path / name}:2"]


def test_a_file_cut_short_is_refused(tmp_path):
    (tmp_path / "n.trec.gz").write_bytes(gzip.compress(TREC.encode() * 900)[:-40])
    with pytest.raises(UserError, match="cut short"):
        read(tmp_path / "n.trec.gz", max_bad_rows=9)


def test_two_ids_that_are_written_alike_are_refused(tmp_path):
    (tmp_path / "n.trec").write_text("q0 Q0 a%20b 1 1 x\n")
    with pytest.raises(UserError, match="'a b' and 'a%20b' would both be written 'a%20b'"):
        mined.read(tmp_path / "n.trec", SPLIT, ["a b", "t1", "a%20b"])
