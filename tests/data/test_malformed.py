"""What is wrong is said in one sentence with file and line; nothing is lost silently."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corrector_jax.data import rows, sources
from corrector_jax.data.dataset import RetrievalData
from corrector_jax.data.rows import Rows
from corrector_jax.types import UserError, brief
from tests.data import written

Edit = Callable[[bytes], bytes]


def line(number: int, new: str | bytes) -> Edit:
    """Replaces a line, counted from 1."""
    content = new.encode() if isinstance(new, str) else new

    def edit(old: bytes) -> bytes:
        lines = old.split(b"\n")
        lines[number - 1] = content
        return b"\n".join(lines)

    return edit


def row(number: int, **changes: object) -> Edit:
    """Changes keys of the JSON object in a line; None removes one."""

    def edit(old: bytes) -> bytes:
        lines = old.split(b"\n")
        record = json.loads(lines[number - 1]) | changes
        record = {key: value for key, value in record.items() if value is not REMOVED}
        lines[number - 1] = json.dumps(record).encode()
        return b"\n".join(lines)

    return edit


REMOVED = object()
PAIR = {"title": "", "text": "a passage"}

# layout, file, edit, where (as the message has it), what is said
BAD_ROWS: list[tuple[str, str, Edit, str, str]] = [
    ("beir", "corpus.jsonl", line(3, '{"_id": "t2", '), "corpus.jsonl:3", "not a JSON object"),
    ("beir", "corpus.jsonl", line(3, "[1, 2]"), "corpus.jsonl:3", "not a JSON object"),
    ("beir", "corpus.jsonl", line(3, "9" * 5000), "corpus.jsonl:3", "not a JSON object"),
    ("beir", "corpus.jsonl", line(3, "[" * 90000), "corpus.jsonl:3", "not a JSON object"),
    ("beir", "corpus.jsonl", row(3, text=REMOVED), "corpus.jsonl:3", '"text" is missing'),
    ("beir", "corpus.jsonl", row(3, _id=REMOVED), "corpus.jsonl:3", '"_id" is missing'),
    ("beir", "corpus.jsonl", row(3, text=None), "corpus.jsonl:3", '"text" is null'),
    ("beir", "corpus.jsonl", row(3, title=3), "corpus.jsonl:3", '"title" is 3'),
    ("beir", "corpus.jsonl", row(3, _id=[7]), "corpus.jsonl:3", '"_id" is [7]'),
    ("beir", "corpus.jsonl", row(3, _id="t 2"), "corpus.jsonl:3", "'t 2' is empty or has blanks"),
    ("beir", "corpus.jsonl", row(3, _id=""), "corpus.jsonl:3", "'' is empty or has blanks"),
    ("beir", "corpus.jsonl", row(3, text="\ud800"), "corpus.jsonl:3", "surrogate"),
    ("beir", "corpus.jsonl", row(3, text=" "), "corpus.jsonl:3", "the target has no text"),
    ("beir", "corpus.jsonl", row(3, _id="t0"), "corpus.jsonl:3", "'t0' occurred before"),
    ("beir", "corpus.jsonl", line(3, b'{"_id": "\xff"}'), "corpus.jsonl:3", "not UTF-8"),
    ("beir", "corpus.jsonl", line(3, b"x" * 10**7), "corpus.jsonl:3", "longer than 8 MiB"),
    ("beir", "queries.jsonl", row(2, _id="train0"), "queries.jsonl:2", "occurred before"),
    ("beir", "queries.jsonl", row(2, text=REMOVED), "queries.jsonl:2", '"text" is missing'),
    ("beir", "queries.jsonl", row(2, text="\t"), "queries.jsonl:2", "the query is empty"),
    ("beir", "qrels/dev.tsv", line(3, "dev0\tt13"), "dev.tsv:3", "2 column(s) instead of 3"),
    ("beir", "qrels/dev.tsv", line(3, "nix\tt13\t1"), "dev.tsv:3", "query 'nix' is not in"),
    ("beir", "qrels/dev.tsv", line(3, "dev0\tnix\t1"), "dev.tsv:3", "target 'nix' is not in"),
    ("beir", "qrels/dev.tsv", line(3, "dev0\tt13\t0.5"), "dev.tsv:3", "'0.5' is not an integer"),
    ("beir", "qrels/dev.tsv", line(3, "dev0\tt13\t-1"), "dev.tsv:3", "-1 is negative"),
    ("beir", "qrels/dev.tsv", line(3, "dev0\tt12\t2"), "dev.tsv:3", "another score above"),
    (
        "msmarco",
        "collection.tsv",
        line(5, "no tab"),
        "collection.tsv:5",
        "1 column(s) instead of 2",
    ),
    ("msmarco", "collection.tsv", line(5, "0\ttwice"), "collection.tsv:5", "'0' occurred before"),
    ("msmarco", "collection.tsv", line(5, "4\t"), "collection.tsv:5", "the target has no text"),
    ("msmarco", "queries.train.tsv", line(2, "1\t"), "queries.train.tsv:2", "the query is empty"),
    ("msmarco", "qrels.train.tsv", line(2, "0\t0\t99\t1"), "qrels.train.tsv:2", "'99' is not in"),
    ("msmarco", "qrels.train.tsv", line(2, "0 0 1"), "qrels.train.tsv:2", "3 column(s) instead"),
    ("tevatron", "train.jsonl", row(2, query_id=REMOVED), "train.jsonl:2", '"query_id" is missing'),
    ("tevatron", "train.jsonl", row(2, query_id="train0"), "train.jsonl:2", "occurred before"),
    ("tevatron", "train.jsonl", row(2, query=""), "train.jsonl:2", "the query is empty"),
    (
        "tevatron",
        "train.jsonl",
        row(2, positive_passages=PAIR),
        "train.jsonl:2",
        "in square brackets",
    ),
    ("tevatron", "train.jsonl", row(2, positive_passages=["p"]), "train.jsonl:2", "no object"),
    (
        "tevatron",
        "train.jsonl",
        row(2, positive_passages=[PAIR | {"docid": "t0"}]),
        "train.jsonl:2",
        "'t0' had another text above",
    ),
    ("flag_embedding", "dev.jsonl", row(2, pos="p"), "dev.jsonl:2", '"pos" is "p"'),
    ("flag_embedding", "dev.jsonl", row(2, neg=[1]), "dev.jsonl:2", '"neg" is 1'),
    ("flag_embedding", "dev.jsonl", row(2, pos=[""]), "dev.jsonl:2", "the target has no text"),
    ("columns", "dev.jsonl", row(2, positive=REMOVED), "dev.jsonl:2", "name the query's anchor"),
    ("columns", "dev.jsonl", row(2, positive=4), "dev.jsonl:2", '"positive" is 4'),
    ("columns_csv", "dev.csv", line(2, "why,because,2\r"), "dev.csv:2", "the label is '2'"),
    ("columns_csv", "dev.csv", line(2, "why\r"), "dev.csv:2", "1 cell(s) under 3 columns"),
    (
        "columns_csv",
        "dev.csv",
        line(2, "why,,1\r"),
        "dev.csv:2",
        '"sentence2" is null',
    ),
    ("columns_csv", "dev.csv", line(2, "why,because,\r"), "dev.csv:2", "the label is None"),
    ("columns_labels", "dev.jsonl", row(2, label=0.7), "dev.jsonl:2", "the label is 0.7"),
    ("columns_labels", "dev.jsonl", row(2, label="yes"), "dev.jsonl:2", "the label is 'yes'"),
    (
        "text_files",
        "queries.jsonl",
        row(2, positives=["no.txt"]),
        "queries.jsonl:2",
        "target 'no.txt' is not in the corpus",
    ),
    ("text_files", "queries.jsonl", row(2, split="eval"), "queries.jsonl:2", "train, dev or test"),
    (
        "text_files",
        "part 0/t0.txt",
        lambda old: b"a\nb\xff",
        "part 0/t0.txt:2",
        "not UTF-8",
    ),
    (
        "dpr_with_corpus",
        "psgs_w100.tsv",
        line(3, "t1\tno title"),
        "psgs_w100.tsv:3",
        "2 column(s) instead of 3",
    ),
    (
        "dpr_with_corpus",
        "psgs_w100.tsv",
        line(3, 't1\t"Yes" is what she said\ttitle'),  # would lose its quotes
        "psgs_w100.tsv:3",
        "every quote inside of a column in quotes twice",
    ),
]


def _gz(content: bytes) -> bytes:
    return gzip.compress(content)[:-20]


def _damaged(content: bytes) -> bytes:
    packed = bytearray(gzip.compress(content))
    packed[40:60] = bytes(20)
    return bytes(packed)


# layout, file, new name, edit, where, what is said
BAD_FILES: list[tuple[str, str, str, Edit, str, str]] = [
    ("beir", "corpus.jsonl", "corpus.jsonl.gz", _gz, r"corpus.jsonl.gz:\d+", "cut short"),
    ("beir", "corpus.jsonl", "corpus.jsonl.gz", _damaged, r"corpus.jsonl.gz:\d+", "cut short"),
    ("beir", "corpus.jsonl", "corpus.jsonl.gz", lambda b: b, r"corpus.jsonl.gz:1", "damaged"),
    ("beir", "corpus.jsonl", "corpus.jsonl.zst", lambda b: b, r"corpus.jsonl.zst:1", "damaged"),
    ("beir", "corpus.jsonl", "corpus.jsonl", lambda b: b"\n \n", "corpus.jsonl", "is empty"),
    ("beir", "corpus.jsonl", "corpus.json", lambda b: b, "corpus.jsonl", "is missing"),
    (
        "beir",
        "qrels/dev.tsv",
        "qrels/dev.tsv",
        line(1, "dev0\tt1\t1"),
        "dev.tsv:1",
        r"the header is 'dev0\tt1\t1': write query-id",
    ),
    ("beir", "qrels/dev.tsv", "qrels/dev.tsv", lambda b: b"", "dev.tsv:1", "the header is ''"),
    (
        "beir",
        "qrels/dev.tsv",
        "qrels/dev.tsv",
        lambda b: b.replace(b"\t1\n", b"\t0\n"),
        "the dev split",
        "holds no positive",
    ),
    ("msmarco", "queries.train.tsv", "q.tsv", lambda b: b, "queries.train.tsv", "is missing"),
    ("dpr", "tiny-dev.json", "tiny-dev.json", lambda b: b[:-30], r"tiny-dev.json:\d+", "breaks"),
    (
        "dpr",
        "tiny-dev.json",
        "tiny-dev.json",
        lambda b: b.replace(b'"dataset": "tiny",', b'"dataset": tiny,'),
        "tiny-dev.json:2",
        "breaks in the row that begins here",
    ),
    ("dpr", "tiny-dev.json", "tiny-dev.json", lambda b: b + b"[]", r"tiny-dev.json:\d+", "follows"),
    ("dpr", "tiny-dev.json", "tiny-dev.json", lambda b: b"[]", "tiny-dev.json", "is empty"),
    ("columns", "dev.jsonl", "dev.parquet", lambda b: b, "dev.parquet:1", "not a whole parquet"),
    ("columns_csv", "dev.csv", "dev.csv", line(3, 'a "b,"c" d,1'), "dev.csv:3", "breaks"),
    ("columns_csv", "dev.csv", "dev.csv", line(3, 'a,"b'), "dev.csv:3", "breaks"),
    ("columns_csv", "dev.csv", "dev.csv", line(3, b"\xff"), "dev.csv:3", "not UTF-8"),
    (
        "columns_csv",
        "dev.csv",
        "dev.csv",
        lambda b: b.rstrip() + b"\xc3",
        r"dev.csv:\d+",
        "not UTF-8",
    ),
    (
        "columns_csv",
        "dev.csv",
        "dev.csv",
        line(1, "a,b,b\r"),
        "dev.csv:1",
        "a, b, b: write each once",
    ),
    (
        "columns_csv",
        "dev.csv",
        "dev.csv",
        lambda b: line(3, '"' + ("a" * 999 + "\n") * 9000)(b),  # not made before it is asked for
        "dev.csv:3",
        "longer than 8 MiB",
    ),
    (
        "columns_csv",
        "dev.csv",
        "dev.csv",
        line(3, "\n" * 2**17),
        r"dev.csv:\d+",
        "blank rows stand",
    ),
    ("columns_csv", "dev.csv", "dev.csv", lambda b: b.split(b"\r")[0], "dev.csv", "is empty"),
    (
        "dpr_with_corpus",
        "psgs_w100.tsv",
        "psgs_w100.tsv",
        line(1, "id\ttitle\ttext"),
        "psgs_w100.tsv:1",
        r"the header is 'id\ttitle\ttext': write id, text, title",
    ),
]


def load(folder: Path, **arguments) -> RetrievalData:
    return sources.load(str(folder), cache_dir=str(folder.parent / "cache"), **arguments)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def one_sentence(error: UserError, where: str, said: str) -> None:
    text = str(error)
    assert "\n" not in text
    assert re.search(rf"{where}[: ]", text), text
    assert said in text, text
    assert len(text) < 400


@pytest.mark.parametrize(
    ("layout", "file", "edit", "where", "said"),
    BAD_ROWS,
    ids=[f"{case[0]}-{case[3].replace('/', '_')}-{i}" for i, case in enumerate(BAD_ROWS)],
)
def test_a_bad_row_stops_or_is_skipped_and_counted(
    tmp_path: Path, layout: str, file: str, edit: Edit, where: str, said: str
):
    folder = written.ALL[layout](tmp_path / "tiny")
    good = load(folder)
    before = contents(tmp_path / "cache")
    path = folder / file
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        load(folder)
    one_sentence(caught.value, re.escape(where), said)
    after = contents(tmp_path / "cache")
    assert {name: after[name] for name in before} == before

    # A target that is skipped takes its judgements with it.
    data = load(folder, max_bad_rows=20)
    assert good.reading is not None
    assert data.reading is not None
    assert said in data.reading.refused[0].message
    assert data.reading.rows == good.reading.rows
    kept = sum(len(split.texts) for split in data.splits.values())
    assert kept >= sum(len(split.texts) for split in good.splits.values()) - 3
    with pytest.raises(UserError) as caught:
        load(folder)  # prepared by now, and still too bad
    one_sentence(caught.value, re.escape(where), said)


@pytest.mark.parametrize(
    ("layout", "file", "renamed", "edit", "where", "said"),
    BAD_FILES,
    ids=[f"{case[0]}-{case[2].replace('/', '_')}-{i}" for i, case in enumerate(BAD_FILES)],
)
def test_a_bad_file_always_stops(
    tmp_path: Path, layout: str, file: str, renamed: str, edit: Edit, where: str, said: str
):
    folder = written.ALL[layout](tmp_path / "tiny")
    content = edit((folder / file).read_bytes())
    (folder / file).unlink()
    (folder / renamed).write_bytes(content)
    for allowed in (0, 50):
        with pytest.raises(UserError) as caught:
            load(folder, max_bad_rows=allowed)
        one_sentence(caught.value, where, said)


def test_folders_where_files_should_be_and_nothing_at_all(tmp_path: Path):
    folder = written.beir(tmp_path / "tiny")
    (folder / "corpus.jsonl").unlink()
    (folder / "corpus.jsonl").mkdir()
    with pytest.raises(UserError, match=r"corpus\.jsonl cannot be read \(Is a dir"):
        load(folder)
    with pytest.raises(UserError, match="is not a folder or a file"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"in none of the layouts .*tfds: .* config\.data\.layout"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match=r"holds no queries: write train\.jsonl"):
        load(tmp_path / "empty", layout="columns")
    with pytest.raises(UserError, match="is not known here"):
        sources.load("ftpx://somewhere/data")


def test_a_source_of_no_layout_is_described(tmp_path: Path):
    rows = [{"anchor": f"question {i}", "postive": f"answer {i}"} for i in range(3)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"\(the rows of train\.jsonl have anchor, postive\)"):
        load(tmp_path)
    with pytest.raises(
        UserError, match=r"no row of the train .* first: .*train\.jsonl:1: .*postive"
    ):
        load(tmp_path, layout="columns", max_bad_rows=9)
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.csv").write_text("anchor,positive,negative\na,b\n")
    with pytest.raises(UserError, match=r"layouts .*train\.csv:2: 2 cell\(s\) under 3 columns"):
        load(tmp_path)
    table = tmp_path / "rows.xlsx"
    table.write_text("anchor,positive\na,b\n")
    with pytest.raises(UserError, match=r"\(it is not one of \.jsonl, \.json, \.parquet and \.csv"):
        load(table)
    with pytest.raises(UserError, match=r"rows\.xlsx is not read: write it as one of \.jsonl"):
        load(table, layout="columns")


def test_a_split_without_rows_is_not_blamed_on_rows_of_others(tmp_path: Path):
    folder = written.beir(tmp_path / "tiny")
    corpus = folder / "corpus.jsonl"
    corpus.write_bytes(corpus.read_bytes() + corpus.read_bytes().split(b"\n")[0] + b"\n")
    header = (folder / "qrels" / "dev.tsv").read_bytes().split(b"\n")[0]
    (folder / "qrels" / "dev.tsv").write_bytes(header + b"\n")
    with pytest.raises(UserError, match=r"dev split of .* holds no positive"):
        load(folder, max_bad_rows=5)


def test_files_that_are_there_twice_are_named(tmp_path: Path):
    folder = written.beir(tmp_path / "tiny")
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(UserError, match=r"corpus\.jsonl and corpus\.jsonl\.gz are both there"):
        load(folder)
    folder = written.tevatron(tmp_path / "two")
    (folder / "my-dev.jsonl").write_bytes((folder / "dev.jsonl").read_bytes())
    with pytest.raises(UserError, match="both of the dev split"):
        load(folder)


def test_windows_line_ends_byte_order_marks_and_blank_lines_are_no_mistakes(tmp_path: Path):
    for name in ("beir", "msmarco", "flag_embedding", "dpr", "text_files"):
        folder = written.ALL[name](tmp_path / name)
        plain = load(folder)
        for path in folder.rglob("*.*"):
            content = path.read_bytes().replace(b"\n", b"\r\n")
            path.write_bytes(b"\xef\xbb\xbf" + content + b"\r\n")
        again = load(folder)
        assert again.fingerprint() == plain.fingerprint(), name
        for split in written.SPLITS:
            assert list(again.splits[split].texts) == list(plain.splits[split].texts)


def test_one_more_bad_row_than_allowed_is_an_error_that_says_so(tmp_path: Path):
    folder = written.beir(tmp_path / "tiny")
    path = folder / "qrels" / "train.tsv"
    path.write_text(path.read_text() + "x\ty\n" * 3)
    with pytest.raises(UserError, match=r"2 bad row.*config\.data\.max_bad_rows"):
        load(folder, max_bad_rows=2)
    data = load(folder, max_bad_rows=3)
    assert data.reading is not None
    assert len(data.reading.refused) == 3


LINES = st.one_of(
    st.binary(max_size=30),
    st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.dictionaries(
        st.sampled_from(["_id", "query", "pos", "neg", "question", "text", "ctxs", "anchor"]),
        st.one_of(st.text(string.printable, max_size=5), st.lists(st.text(max_size=4)), st.none()),
        max_size=4,
    ).map(lambda record: json.dumps(record).encode()),
    st.sampled_from([b"a\tb", b"a\tb\tc", b"1\t0\t2\t1", b"\xef\xbb\xbf{}", b"", b" \t "]),
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lines=st.lists(LINES, max_size=8), end=st.sampled_from([b"\n", b"\r\n"]))
def test_rows_read_and_rows_refused_are_the_rows_of_the_file(tmp_path: Path, lines, end):
    lines = [part for line in lines for part in line.split(b"\n")]
    path = tmp_path / "train.jsonl"
    path.write_bytes(end.join(lines))
    expected = [i for i, line in enumerate(lines, 1) if is_row(line, first=i == 1)]
    for kind in sources.LAYOUTS.values():
        if not hasattr(kind, "parse"):
            continue
        counter = Rows(max_bad=100)
        if not expected:
            with pytest.raises(UserError, match="is empty"):
                list(kind(path).queries("train", counter))
            continue
        found = [query.where for query in kind(path).queries("train", counter)]
        numbers = sorted(int(where.rsplit(":")[-1]) for where in [*found, *counter.refused])
        assert numbers == expected
        assert counter.total == len(expected)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lines=st.lists(LINES, max_size=8))
def test_lines_of_corpora_and_judgements_are_all_counted(tmp_path: Path, lines):
    lines = [part for line in [b"1\tfirst", *lines] for part in line.split(b"\n")]
    expected = [i for i, line in enumerate(lines, 1) if is_row(line, first=i == 1)]
    (tmp_path / "collection.tsv").write_bytes(b"\n".join(lines))
    (tmp_path / "queries.train.tsv").write_bytes(b"1\tq\na\tb")
    (tmp_path / "qrels.train.tsv").write_bytes(b"\n".join(lines))
    reader = sources.LAYOUTS["msmarco"](tmp_path)
    counter = Rows(max_bad=100)
    found = [target.where for target in reader.targets(counter)]
    assert sorted(int(where.rsplit(":")[-1]) for where in [*found, *counter.refused]) == expected
    counter = Rows(max_bad=100)
    judged = [one for query in reader.queries("train", counter) for one in query.positives]
    assert counter.total == 2 + len(expected)
    if len(set(lines)) == len(lines):  # a judgement that stands twice is one
        assert len(judged) + len(counter.refused) == len(expected)


def is_row(content: bytes, *, first: bool) -> bool:
    try:
        return bool(content.decode("utf-8-sig" if first else "utf-8").strip())
    except UnicodeDecodeError:
        return True


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    items=st.lists(
        st.recursive(
            st.one_of(st.none(), st.integers(), st.text(max_size=8)),
            lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=4,
        ),
        max_size=12,
    ),
    indent=st.sampled_from([None, 0, 2]),
    window=st.sampled_from([1, 7, 2**16]),
)
def test_arrays_are_read_item_by_item_as_json_reads_them(tmp_path: Path, items, indent, window):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(items, indent=indent, ensure_ascii=False), encoding="utf-8")
    counter = Rows(max_bad=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "WINDOW", window)
        if not items:
            with pytest.raises(UserError, match="is empty"):
                list(counter.records(path))
            return
        found = [record for _, record in counter.records(path)]
    assert found == [item for item in items if isinstance(item, dict)]
    assert counter.total == len(items)
    assert len(counter.refused) == len(items) - len(found)  # on one line or on many


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.binary(max_size=200),
    name=st.sampled_from(
        ["train.json", "train.parquet", "train.jsonl.gz", "train.jsonl.zst", "train.jsonl"]
    ),
)
def test_no_bytes_end_in_anything_but_a_user_error(tmp_path: Path, content: bytes, name: str):
    for path in tmp_path.glob("train*"):
        path.unlink()
    (tmp_path / name).write_bytes(content)
    for prefix in (b"", b"[", b'[{"query": "q", "pos": ["p"]},'):
        (tmp_path / name).write_bytes(prefix + content)
        with pytest.raises(UserError):
            sources.load(str(tmp_path / name), cache_dir=str(tmp_path / "cache"))


def test_a_refused_row_leaves_nothing_of_itself(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    one, two = {"docid": "a", "text": "a"}, {"docid": "b", "text": "b"}
    for bad in (
        {"query": "q", "pos": ["a"], "neg": ["b", " "]},
        {"query_id": "1", "query": "q", "positive_passages": [one, two, {**two, "text": "c"}]},
    ):
        good = (
            {"query": "r", "pos": ["c"]}
            if "pos" in bad
            else {"query_id": "2", "query": "r", "positive_passages": [{"docid": "c", "text": "c"}]}
        )
        path.write_text(f"{json.dumps(bad)}\n{json.dumps(good)}\n")
        data = sources.load(str(path), cache_dir=str(tmp_path / "cache"), max_bad_rows=1)
        assert list(data.target_texts) == ["c"]
        assert list(data.splits["train"].texts) == ["r"]
        assert data.reading is not None
        assert data.reading.without_positives == {"train": 0}


def test_a_corpus_of_rows_has_ids(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text('{"query": "q", "pos": ["p"]}\n')
    (tmp_path / "corpus.jsonl").write_text('{"id": "", "text": "one"}\n')
    with pytest.raises(UserError, match=r"corpus\.jsonl:1: the id '' is empty or has blanks"):
        sources.load(str(tmp_path), cache_dir=str(tmp_path / "cache"))


def test_parquet_that_is_no_utf8_is_one_sentence(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.array([b"q", b"\xff"]).view(pyarrow.string())
    table = pyarrow.table({"anchor": texts, "positive": texts})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(UserError) as caught:
        sources.load(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    one_sentence(caught.value, r"train\.parquet:1", "not UTF-8")


def test_files_that_name_no_split_are_said(tmp_path: Path, capsys):
    folder = written.ALL["flag_embedding"](tmp_path / "tiny")
    load(folder)
    assert "passed over" not in capsys.readouterr().out
    (folder / "hard.jsonl").write_text((folder / "train.jsonl").read_text())
    load(folder)
    assert "passed over hard.jsonl: no name of a split" in capsys.readouterr().out


def test_a_parquet_of_values_that_python_has_not_is_one_sentence(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    times = pyarrow.array([2**62], pyarrow.int64()).cast(pyarrow.timestamp("us"), safe=False)
    table = pyarrow.table({"anchor": ["q"], "positive": ["p"], "asked": times})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(UserError) as caught:
        sources.load(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    one_sentence(caught.value, r"train\.parquet:1", "not a whole parquet file")


def test_what_is_said_of_a_long_value_is_short(tmp_path: Path):
    long = "x" * 100_000
    folder = written.beir(tmp_path / "tiny")
    with (folder / "qrels" / "dev.tsv").open("a") as file:
        file.write(f"{long}\tt1\t1\n")
    with pytest.raises(UserError) as caught:
        load(folder)
    one_sentence(caught.value, r"dev\.tsv:\d+", "xxx' is not in queries.jsonl")


def test_a_bomb_is_refused_at_its_first_line_and_not_unpacked(tmp_path: Path, monkeypatch):
    folder = written.beir(tmp_path / "tiny")
    (folder / "corpus.jsonl").unlink()
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(bytes(2**24)) * 64)
    read, asked = rows._read, []

    def counted(*arguments, **keys) -> bytes:
        found = read(*arguments, **keys)
        asked.append(len(found))
        return found

    monkeypatch.setattr(rows, "_read", counted)
    with pytest.raises(UserError, match=r"corpus\.jsonl\.gz:1: the line is longer than 8 MiB"):
        load(folder)
    assert sum(asked) < 3 * rows.MAX_ROW


@pytest.mark.parametrize("name", ["corpus.jsonl.gz", "qrels/dev.tsv"])
def test_blank_lines_do_not_go_on_for_ever(tmp_path: Path, name):
    folder = written.beir(tmp_path / "tiny")
    plain = folder / name.removesuffix(".gz")
    content = plain.read_bytes() + b"\n" * (rows.MAX_BLANK + 1)
    plain.unlink()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    line = content.count(b"\n")
    with pytest.raises(UserError, match=rf"{name}:{line}: 65,536 blank lines stand before this"):
        load(folder)


def test_what_a_library_says_is_one_printable_line():
    assert brief(ValueError("no such\n type: \x0b\x00\x1b[31m" + "x" * 500), 30) == (
        "no such type: ??[31m" + "x" * 10
    )
