"""What was prepared is used again, after a crash too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from corrector_jax.data import prepared, sources
from corrector_jax.data.dataset import RetrievalData
from corrector_jax.types import UserError
from tests import tiny
from tests.data import written

ROOT = Path(__file__).resolve().parents[2]

# Arguments: source, cache, tokenizer, and what to do to the process once data and token table
# have written `sys.argv[5]` shards.
CHILD = """
import os, resource, signal, sys
from pathlib import Path
from corrector_jax import paths
from corrector_jax.data import prepared, sources, token_table
from corrector_jax.data.tokenize import TextTokenizer
from corrector_jax.types import UserError

source, cache, tokenizer, what, count = sys.argv[1:]
prepared.SHARD = token_table.SHARD = 5
left, write = int(count), paths.write
def counted(path, content):
    global left
    write(path, content)
    left -= Path(path).name == "progress.json"
    if not left and what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
paths.write = counted
if what == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(count), int(count)))
try:
    data = sources.load(source, cache_dir=cache)
    token_table.token_table(
        data.target_texts, TextTokenizer(Path(tokenizer).read_bytes()), name=data.name,
        content_fingerprint=data.fingerprint(), template="", prefix="", max_len=99,
        folder=Path(cache) / "tokens",
    )
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def child(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def load(folder: Path, **arguments) -> RetrievalData:
    return sources.load(str(folder), cache_dir=str(folder.parent / "cache"), **arguments)


def tables(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".data", ".ends", ".npy")
    }


def test_a_source_is_read_once_and_again_when_its_content_changes(tmp_path: Path, monkeypatch):
    folder = written.beir(tmp_path / "tiny")
    first = load(folder)
    os.utime(folder / "corpus.jsonl")

    def never(*arguments: object) -> None:
        raise AssertionError("it is read again")

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_build", never)
        assert load(folder).fingerprint() == first.fingerprint()
        for change in ({"target_template": "{text}"}, {"layout": "msmarco"}):
            with pytest.raises((AssertionError, UserError)):
                load(folder, **change)
    for path in (folder / "corpus.jsonl", *folder.glob("qrels/*")):
        path.write_text(path.read_text().replace("t23", "t-23"))
    assert load(folder).fingerprint() != first.fingerprint()


def test_shards_change_nothing(tmp_path: Path, monkeypatch):
    for name in ("beir", "dpr_with_corpus", "flag_embedding"):
        folder = written.ALL[name](tmp_path / name)
        whole = load(folder)
        with monkeypatch.context() as patch:
            patch.setattr(prepared, "SHARD", 3)
            cut = sources.load(str(folder), cache_dir=str(tmp_path / "other"))
        assert cut.fingerprint() == whole.fingerprint()
        for split in written.SPLITS:
            for field in ("positives", "negatives", "grades"):
                for one, other in zip(
                    getattr(cut.splits[split], field),
                    getattr(whole.splits[split], field),
                    strict=True,
                ):
                    np.testing.assert_array_equal(one, other)


def test_an_id_that_occurs_again_shards_later_is_refused_where_it_stands(
    tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(prepared, "SHARD", 3)
    folder = written.beir(tmp_path / "tiny")
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "t1", "text": "again"}) + "\n")
    with pytest.raises(UserError, match=r"corpus\.jsonl:25: the id 't1' occurred before"):
        load(folder)
    data = load(folder, max_bad_rows=1)
    assert len(data.target_ids) == 24


def test_a_killed_process_loses_at_most_one_shard(tmp_path: Path):
    folder = written.beir(tmp_path / "tiny")
    tokenizer = tiny.write_tokenizer(tmp_path / "tokenizer") / "tokenizer.json"
    whole = child(folder, tmp_path / "whole", tokenizer, "nothing", 0)
    assert whole.returncode == 0, whole.stderr

    # 24 targets in shards of 5: the corpus writes 5, the tokens 5 more.
    killed = child(folder, tmp_path / "cache", tokenizer, "kill", 3)
    assert killed.returncode == -signal.SIGKILL
    (state,) = (tmp_path / "cache").rglob("progress.json")
    assert json.loads(state.read_text())["size"] == 15
    with next((tmp_path / "cache").rglob("target_texts.data")).open("ab") as file:
        file.write(b"half a sha")  # what a kill in the middle of a shard leaves

    killed = child(folder, tmp_path / "cache", tokenizer, "kill", 2 + 2)
    assert killed.returncode == -signal.SIGKILL
    assert "15 targets were read before" in killed.stdout
    (state,) = (tmp_path / "cache" / "tokens").rglob("progress.json")
    assert json.loads(state.read_text()) == {"done": 10}
    with next((tmp_path / "cache").rglob("ids.npy")).open("ab") as file:
        file.write(b"half a sha")

    done = child(folder, tmp_path / "cache", tokenizer, "kill", 3 + 1)  # 3 shards are left
    assert done.returncode == 0, done.stderr
    assert tables(tmp_path / "cache") == tables(tmp_path / "whole")


def test_a_full_disk_is_said_and_nothing_whole_is_lost(tmp_path: Path):
    folder = written.beir(tmp_path / "tiny")
    tokenizer = tiny.write_tokenizer(tmp_path / "tokenizer") / "tokenizer.json"
    load(folder)
    before = tables(tmp_path / "cache")
    for cache, limit in (("small", 500), ("cache", 1200)):  # texts do not fit; tokens do not
        full = child(folder, tmp_path / cache, tokenizer, "limit", limit)
        assert full.returncode == 2, full.stderr
        (said,) = full.stderr.strip().splitlines()[-1:]
        assert "cannot be written (File too large): free some of that disk" in said
        assert "config.data.cache_dir" in said
        assert "Traceback" not in full.stderr
    assert {k: v for k, v in tables(tmp_path / "cache").items() if k in before} == before
    done = child(folder, tmp_path / "small", tokenizer, "nothing", 0)
    assert done.returncode == 0, done.stderr


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch
):
    folder = written.beir(tmp_path / "tiny")
    monkeypatch.setattr(prepared.paths, "free_bytes", lambda path: 10)
    with pytest.raises(UserError, match=r"the texts need .* GB but the disk has .* GB left"):
        load(folder)
    assert tables(tmp_path / "cache") == {}


def test_queries_of_one_text_are_one_query_and_positives_are_no_negatives(tmp_path: Path):
    rows = [
        {"query": "q", "pos": ["a"], "neg": ["b", "c"]},
        {"query": "r", "pos": ["c"], "neg": ["c", "a"]},
        {"query": "q", "pos": ["b"], "neg": ["c", "d"]},
        {"query": "s", "pos": [], "neg": ["d"]},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = sources.load(str(path), cache_dir=str(tmp_path / "cache"))
    split = data.splits["train"]

    def texts(found) -> list[list[str]]:
        return [[data.target_texts[row] for row in rows] for rows in found]

    assert list(split.texts) == ["q", "r"]
    assert texts(split.positives) == [["a", "b"], ["c"]]
    assert texts(split.negatives) == [["c", "d"], ["a"]]
    assert data.reading is not None
    assert data.reading.without_positives == {"train": 1}


def test_the_cache_is_on_a_local_disk(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sources.cache_folder("") == tmp_path / "corrector_jax"
    assert sources.cache_folder(str(tmp_path / "x")) == tmp_path / "x"
    with pytest.raises(UserError, match="is not a local folder"):
        sources.cache_folder("memory://cache")


def test_a_damaged_cache_is_named(tmp_path: Path):
    folder = written.beir(tmp_path / "tiny")
    load(folder)
    with next((tmp_path / "cache").rglob("target_texts.data")).open("ab") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"target_texts\.data is damaged: remove the folder"):
        load(folder)


def test_a_whole_cache_is_read_where_nothing_can_be_written(tmp_path: Path, monkeypatch):
    folder = written.beir(tmp_path / "tiny")
    first = load(folder)

    def never(place: Path) -> None:
        raise UserError("a disk that is only read")

    monkeypatch.setattr(prepared, "writing", never)
    assert load(folder).fingerprint() == first.fingerprint()


def test_what_a_killed_process_left_needs_no_disk_again(tmp_path: Path, monkeypatch):
    (tmp_path / "table").write_bytes(bytes(60))
    monkeypatch.setattr(prepared.paths, "free_bytes", lambda path: 50)
    prepared.enough_disk(tmp_path, 110, "the texts")
    with pytest.raises(UserError, match="the texts need"):
        prepared.enough_disk(tmp_path, 111, "the texts")


def test_packed_files_need_more_than_their_size(tmp_path: Path, monkeypatch):
    asked = []
    monkeypatch.setattr(prepared, "enough_disk", lambda place, needed, what: asked.append(needed))
    folder = written.flag_embedding(tmp_path / "tiny")
    written.compress(folder, ".gz")
    load(folder)
    assert asked == [3 * sum(path.stat().st_size for path in folder.iterdir())]


def _changed(**changes):
    def change(content: bytes) -> bytes:
        return json.dumps(json.loads(content) | changes).encode()

    return change


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("manifest.json", lambda content: content[:-9]),
        ("manifest.json", lambda content: b"[" * 100_000),
        ("manifest.json", _changed(queries={"../../x": 3})),
        ("manifest.json", _changed(queries={"train": 3})),
        ("manifest.json", _changed(refused=[1])),
        ("manifest.json", _changed(digests={"target_ids": "xyz", "target_texts": ""})),
        ("target_ids.ends", lambda content: content[:-8]),
        ("train_positives.data", lambda content: b"\xff\xff\xff\x7f" + content[4:]),
        ("train_grades.ends", lambda content: content[:-8]),
        ("train_answers.data", lambda content: b"{" + content[1:]),
        ("dev_texts.data", None),
    ],
)
def test_whatever_is_damaged_in_the_cache_is_named(tmp_path: Path, file: str, change):
    folder = written.fid(tmp_path / "tiny")
    load(folder)
    (path,) = (tmp_path / "cache").rglob(file)
    if change:
        path.write_bytes(change(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(UserError, match="is damaged: remove the folder") as caught:
        load(folder)
    assert str(path.parent) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: b"{}}",
        _changed(size=-1),
        _changed(size=1),
        _changed(target_texts=[10**9, 8]),
        _changed(target_ids="x"),
        _changed(refused={"file:1": ["kind"]}),
        _changed(whole="yes"),
        _changed(taken=5000),  # so many targets would be passed over
        _changed(taken=1),
    ],
)
def test_progress_that_nobody_wrote_is_damage(tmp_path: Path, change):
    folder = written.beir(tmp_path / "tiny")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nno\tt1\t1\n")
    with pytest.raises(UserError, match="'no' is not in"):
        load(folder)
    (path,) = (tmp_path / "cache").rglob("progress.json")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match="is damaged: remove the folder"):
        load(folder)


def test_a_flipped_bit_in_the_keys_of_a_killed_process_is_damage(tmp_path: Path):
    folder = written.beir(tmp_path / "tiny")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nno\tt1\t1\n")
    with pytest.raises(UserError, match="'no' is not in"):
        load(folder)
    (path,) = (tmp_path / "cache").rglob("target_keys.data")
    content = bytearray(path.read_bytes())
    content[3] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"target_keys\.data is damaged: remove the folder"):
        load(folder)
