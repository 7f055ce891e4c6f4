"""The published data sets, made from their publishers' files in small."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import resource
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

import pytest

from corrector_jax.data import builders, published
from corrector_jax.data.layouts.tfds import Tfds
from corrector_jax.data.rows import Rows
from corrector_jax.types import UserError
from tests import published_files

NAMES = ("nq", "triviaqa", "msmarco", "hotpotqa")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """All four, prepared."""
    root = tmp_path_factory.mktemp("published")
    for name in NAMES:
        published_files.write(name, root)
        builders.prepare(name, root, verify=False)
    return root


@pytest.fixture(autouse=True)
def no_network(monkeypatch) -> None:
    def refuse(url, **_):
        raise OSError(f"no route to {url}")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def reader(root: Path, name: str) -> Tfds:
    path = root / "retrieval_queries" / name
    assert Tfds.found_in(path)
    return Tfds(path)


@pytest.mark.parametrize("name", NAMES)
def test_passages_come_back_in_order_and_unchanged(root, name):
    rows = Rows()
    found = list(reader(root, name).targets(rows))
    made = published_files.passages()
    assert rows.total == len(found) == len(made)
    first, step = {"msmarco": (0, 1), "hotpotqa": (0, 7)}.get(name, (1, 1))
    assert [target.id for target in found] == [str(first + step * row) for row in range(len(made))]
    if name == "msmarco":  # which has no titles
        wanted = [("", f"{p.title.replace(chr(9), ' ')} {p.text}") for p in made]
    else:
        wanted = [(p.title, p.text) for p in made]
    assert [(target.title, target.text) for target in found] == wanted
    assert any("\t" in title and '"' in title for title, _ in wanted) or name == "msmarco"


@pytest.mark.parametrize("name", NAMES)
def test_questions_name_their_passages(root, name):
    opened = reader(root, name)
    rows = {target.id: row for row, target in enumerate(opened.targets(Rows()))}
    has_test = name == "hotpotqa"
    assert opened.splits == (("train", "dev", "test") if has_test else ("train", "dev"))
    for split in opened.splits:
        found = list(opened.queries(split, Rows()))
        made = [one for one in published_files.questions()[split] if one.positives]
        assert [query.text for query in found] == [one.text for one in made]
        for query, one in zip(found, made, strict=True):
            assert sorted(rows[judged.id] for judged in query.positives) == sorted(one.positives)
            assert all(judged.grade == 1 for judged in query.positives)
            if name in ("nq", "triviaqa"):
                assert list(query.answers) == one.answers
                assert len(query.negatives) == 5
                assert {judged.id for judged in query.negatives} <= set(rows)


@pytest.mark.parametrize("name", ["nq", "triviaqa"])
def test_questions_with_answers_alone_are_kept_apart(root, name):
    import tensorflow_datasets as tfds

    path = root / "retrieval_queries" / name / "1.0.0"
    for split in ("dev", "test"):
        source = tfds.builder_from_directory(path).as_data_source(f"{split}_answers")
        made = published_files.questions()[split]
        assert [source[i]["text"].decode() for i in range(len(source))] == [q.text for q in made]
        assert [a.decode() for a in source[2]["answers"]] == made[2].answers
        assert len(source[2]["positives"]) == 0


def test_two_questions_of_one_publisher_share_the_corpus(root):
    found = sorted(path.name for path in (root / "retrieval_corpus").glob("[!.]*"))
    assert found == ["hotpotqa", "msmarco", "wikipedia"]


def test_shards_are_read_as_one_by_random_access(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(builders, "SHARD", 10)
    published_files.write("nq", tmp_path)
    builders.prepare("nq", tmp_path, verify=False)
    path = tmp_path / "retrieval_corpus" / "wikipedia" / "1.0.0"
    assert len(list(path.glob("*.array_record-*"))) == 7
    source = tfds.builder_from_directory(path).as_data_source("targets")
    assert len(source) == published_files.PASSAGES
    for row in (66, 9, 10, 0, 59):
        assert source[row]["id"] == str(row + 1).encode()
    files = Tfds(tmp_path / "retrieval_queries" / "nq").files
    assert len(files) == 7 + 4 + 2  # of 67 passages, 32 and 12 questions


def test_no_tensorflow_is_imported(root):
    code = (
        "import sys; from pathlib import Path; from corrector_jax.data.layouts.tfds import Tfds; "
        "from corrector_jax.data.rows import Rows; from corrector_jax.data import builders; "
        f"t = Tfds(Path({str(root / 'retrieval_queries' / 'nq')!r})); list(t.targets(Rows())); "
        "assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_what_is_prepared_is_not_made_again(root):
    before = {path: path.stat().st_mtime_ns for path in root.glob("retrieval_*/*/*/*")}
    builders.prepare("nq", root, verify=False)
    assert {path: path.stat().st_mtime_ns for path in root.glob("retrieval_*/*/*/*")} == before


def test_unpacked_files_are_taken_too(tmp_path):
    published_files.write("nq", tmp_path)
    for packed in (tmp_path / "published").rglob("*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    builders.prepare("nq", tmp_path, verify=False)
    opened = reader(tmp_path, "nq")
    assert sum(1 for _ in opened.targets(Rows())) == published_files.PASSAGES


def refusal(root: Path, name: str, **more) -> str:
    with pytest.raises(UserError) as error:
        builders.prepare(name, root, **more)
    assert "\n" not in str(error.value)
    assert not list(root.glob("retrieval_*/*/*/dataset_info.json"))
    assert not list(root.glob("retrieval_*/*/incomplete*"))
    return str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_network_it_is_said_what_to_put_where(tmp_path, name):
    message = refusal(tmp_path, name)
    queries = published.QUERIES[name]
    (file,) = published.CORPORA[queries.corpus].files
    assert f"{file.name} cannot be downloaded (no route to {file.urls[-1]})" in message
    assert f"put {file.name} (from {file.urls[-1]})" in message
    assert f"into {tmp_path / 'published' / queries.corpus}," in message


def test_a_download_is_kept_where_a_file_put_by_hand_would_be(tmp_path, monkeypatch):
    import requests

    published_files.write("nq", tmp_path / "there")
    wanted = {path.name: path for path in (tmp_path / "there").rglob("*") if path.is_file()}

    class Response(requests.Response):
        def __init__(self, url):
            super().__init__()
            self.url, self.status_code = url, 200
            self.raw = io.BytesIO(wanted[url.rsplit("/", 1)[-1]].read_bytes())

    asked = []

    def get(self, url, **_):
        asked.append(url)
        return Response(url)

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, **_: io.BytesIO())
    monkeypatch.setattr(requests.Session, "get", get)
    root = tmp_path / "root"
    builders.prepare("nq", root, verify=False)
    assert sum(1 for _ in reader(root, "nq").targets(Rows())) == published_files.PASSAGES
    assert {url.rsplit("/", 1)[-1] for url in asked} == set(wanted)
    for path in (root / "published").rglob("*.*"):
        assert path.read_bytes() == wanted[path.name].read_bytes()
    for record in (root / "downloads").rglob("*.INFO"):
        held = json.loads(record.read_text())
        (url,) = held["urls"]
        content = wanted[url.rsplit("/", 1)[-1]].read_bytes()
        assert held["url_info"]["checksum"] == hashlib.sha256(content).hexdigest()
        asked = [one for one in asked if one != url]
    assert asked == []


def test_another_file_than_the_published_one_is_refused(tmp_path):
    published_files.write("nq", tmp_path)
    message = refusal(tmp_path, "nq")
    assert "psgs_w100.tsv.gz is not the published file" in message
    assert "612fe66e0b6b41ee28f806140226c563" in message
    assert "--config.data.verify=False" in message
    packed = tmp_path / "published" / "wikipedia" / "psgs_w100.tsv.gz"
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert "holds 67 passages where 21,015,324 were published" in refusal(tmp_path, "nq")


def change(path: Path, old: str, new: str) -> None:
    content = gzip.decompress(path.read_bytes()).decode()
    assert old in content
    path.write_bytes(gzip.compress(content.replace(old, new, 1).encode()))


PSGS = "wikipedia/psgs_w100.tsv.gz"
TITLE = published_files.passages()[1].title  # of a text in quotes
BIENCODER = "nq/biencoder-nq-train.json.gz"


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (PSGS, "id\ttext", "id,text", "psgs_w100.tsv.gz:1: the header is 'id,text"),
        (PSGS, "\n9\t", "\n9 ", "psgs_w100.tsv.gz:10: 2 column(s) instead of 3"),
        (PSGS, "\n9\t", "\n9\t\rx", "psgs_w100.tsv.gz:10: new-line character"),
        (PSGS, f'"\t{TITLE}\n', f"\t{TITLE}\n", "psgs_w100.tsv.gz:3: unexpected end of data"),
        (BIENCODER, '"question": "train1', '"question": 1, "x": "', "json.gz:"),
        (BIENCODER, '"passage_id"', '"passage"', "a passage has no passage_id"),
        (BIENCODER, '"answers": [', '"answers": ["', "the JSON breaks"),
    ],
)  # fmt: skip
def test_a_malformed_file_stops_before_anything_is_written(tmp_path, file, old, new, said):
    published_files.write("nq", tmp_path)
    if file == BIENCODER:  # only the queries then
        builders_of_queries(tmp_path, file, old, new, said)
        return
    change(tmp_path / "published" / file, old, new)
    assert said in refusal(tmp_path, "nq", verify=False)


def builders_of_queries(root: Path, file: str, old: str, new: str, said: str) -> None:
    change(root / "published" / file, old, new)
    with pytest.raises(UserError, match=said) as error:
        builders.prepare("nq", root, verify=False)
    assert "biencoder-nq-train.json.gz:" in str(error.value)
    assert not list((root / "retrieval_queries").glob("nq/*"))
    assert (root / "retrieval_corpus" / "wikipedia" / "1.0.0" / "dataset_info.json").exists()


def test_answers_must_be_a_list_and_are_never_run(tmp_path):
    published_files.write("nq", tmp_path)
    path = tmp_path / "published" / "nq" / "nq-test.qa.csv"
    path.write_text("who\t__import__('os').abort()\n")
    with pytest.raises(UserError, match=r"nq-test\.qa\.csv:1: the answers are .*write a list"):
        builders.prepare("nq", tmp_path, verify=False)


@pytest.mark.parametrize("name", ["msmarco", "hotpotqa"])
def test_a_damaged_archive_is_named(tmp_path, name):
    published_files.write(name, tmp_path)
    (path,) = (tmp_path / "published" / name).iterdir()
    path.write_bytes(path.read_bytes()[:-300])
    assert f"{path} " in refusal(tmp_path, name, verify=False)
    assert not list(path.parent.rglob("*.part"))


def test_bad_rows_may_be_skipped(tmp_path):
    published_files.write("nq", tmp_path)
    change(tmp_path / "published" / PSGS, "\n9\t", "\n9 ")
    builders.prepare("nq", tmp_path, verify=False, max_bad_rows=1)
    found = [target.id for target in reader(tmp_path, "nq").targets(Rows())]
    assert found == [str(n) for n in range(1, published_files.PASSAGES + 1) if n != 9]
    with pytest.raises(UserError, match=r"1\.0\.0 was made without 1 bad row.*remove that folder"):
        builders.prepare("nq", tmp_path, verify=False)


def test_records_made_with_less_care_or_of_other_files_are_not_taken(tmp_path):
    published_files.write("nq", tmp_path)
    builders.prepare("nq", tmp_path, verify=False)
    corpus = tmp_path / "retrieval_corpus" / "wikipedia" / "1.0.0"
    with pytest.raises(UserError, match=rf"{corpus} was made without config\.data\.verify"):
        builders.prepare("nq", tmp_path)
    change(tmp_path / "published" / BIENCODER, '"question": "train1', '"question": "another')
    with pytest.raises(UserError, match=r"nq/1\.0\.0 was made of another biencoder-nq-train"):
        builders.prepare("nq", tmp_path, verify=False)
    (tmp_path / "published" / BIENCODER).unlink()  # to have its disk back
    builders.prepare("nq", tmp_path, verify=False)


def test_a_full_disk_is_said_and_leaves_nothing_half(tmp_path):
    published_files.write("msmarco", tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
        message = refusal(tmp_path, "msmarco", verify=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"{tmp_path} cannot be written (write() failed: File too large" in message
    builders.prepare("msmarco", tmp_path, verify=False)
    assert sum(1 for _ in reader(tmp_path, "msmarco").targets(Rows())) == published_files.PASSAGES


def test_what_a_killed_process_left_is_removed_and_its_downloads_are_kept(tmp_path):
    published_files.write("nq", tmp_path)
    left = tmp_path / "retrieval_corpus" / "wikipedia" / "incomplete.ABC_1.0.0"
    partial = tmp_path / "downloads" / "retrieval_corpus" / "psgs.tmp.123"
    for folder in (left, partial):
        folder.mkdir(parents=True)
        (folder / "file").write_text("half")
    builders.prepare("nq", tmp_path, verify=False)
    assert not left.exists()
    assert not partial.exists()
    assert (tmp_path / "published" / PSGS).exists()


def test_records_that_cannot_be_read_are_said_so(tmp_path):
    published_files.write("msmarco", tmp_path)
    builders.prepare("msmarco", tmp_path, verify=False)
    path = tmp_path / "retrieval_queries" / "msmarco"
    (file,) = (tmp_path / "retrieval_corpus").rglob("*.array_record-*")
    whole = file.read_bytes()
    for content in (whole[:-500], b"", whole[:3000] + b"?" + whole[3001:]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"_corpus/msmarco cannot be read .*again with"):
            list(Tfds(path).targets(Rows()))
    file.write_bytes(whole)
    information = next(path.rglob("dataset_info.json"))
    information.write_text("{")
    with pytest.raises(UserError, match=r"msmarco/1\.0\.0 cannot be read"):
        Tfds(path)
    information.unlink()
    with pytest.raises(UserError, match="holds no TFDS data: make it with --mode=prepare_data"):
        Tfds(path)
    assert not Tfds.found_in(path)


def _with_metadata(folder: Path) -> tuple[Path, Path]:
    """The queries of MS MARCO as TFDS data, and what they say of themselves."""
    published_files.write("msmarco", folder)
    builders.prepare("msmarco", folder, verify=False)
    path = folder / "retrieval_queries" / "msmarco"
    (metadata,) = path.rglob("metadata.json")
    return path, metadata


@pytest.mark.parametrize("content", ["{", '["corpus"]', "5"])
def test_metadata_that_are_none_are_refused(tmp_path, content):
    path, metadata = _with_metadata(tmp_path)
    metadata.write_text(content)
    with pytest.raises(UserError, match="msmarco cannot be read"):
        Tfds(path)


@pytest.mark.parametrize("corpus", ["../../elsewhere", "/etc", "", None, 5])
def test_a_corpus_is_beside_its_queries_and_nowhere_else(tmp_path, corpus):
    path, metadata = _with_metadata(tmp_path)
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"corpus": corpus}))
    with pytest.raises(UserError, match=r"msmarco cannot be read \(its corpus is "):
        Tfds(path)


def test_every_file_says_where_it_is_and_is_unique():
    for name, queries in published.QUERIES.items():
        corpus = published.CORPORA[queries.corpus]
        for file in (*corpus.files, *queries.files, *queries.answers.values()):
            assert file.urls, name
            assert all(url.startswith("https://") and url.endswith(file.name) for url in file.urls)
            assert not file.size or len(file.md5) == 32


def test_what_is_there_needs_no_disk(root, tmp_path):
    assert sum(builders.disk_needed("nq", root).values()) == 0
    needed = builders.disk_needed("msmarco", tmp_path)
    assert needed["downloads"] == 1_057_717_952  # once, though two builders read it
    assert 3e9 < needed["records"] < 4e9


def _msmarco(folder: Path, more: list[tarfile.TarInfo], members: dict[str, bytes]) -> Path:
    path = folder / "msmarco" / "collectionandqueries.tar.gz"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        for member in more:
            archive.addfile(member)
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def _unpack(path: Path) -> None:
    def none(url: str) -> Path:
        raise OSError("no network")

    published.fetch(published.CORPORA[path.parent.name].files, path.parent, none, verify=False)


def test_an_archive_writes_nothing_but_what_was_asked_for(tmp_path):
    names = published.CORPORA["msmarco"].files[0].members
    links = []
    for name, kind in ((names[0], tarfile.SYMTYPE), ("x", tarfile.LNKTYPE), ("y", tarfile.CHRTYPE)):
        link = tarfile.TarInfo(name)
        link.type, link.linkname = kind, "/nowhere/else"
        links.append(link)
    evil = {"../evil": b"evil", str(tmp_path / "evil"): b"evil", "more": b"more"}
    path = _msmarco(tmp_path / "a", links, evil | dict.fromkeys(names, b"1\ttext\n"))
    _unpack(path)
    there = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if not p.is_dir()}
    assert there == {f"a/msmarco/{name}" for name in (*names, path.name)}
    assert not any(p.is_symlink() for p in tmp_path.rglob("*"))


def test_a_file_that_unpacks_without_end_is_refused(tmp_path):
    names = published.CORPORA["msmarco"].files[0].members
    path = _msmarco(tmp_path / "a", [], {names[0]: bytes(2**26)})
    with pytest.raises(UserError, match=r"cannot be unpacked \(a file in it has more than"):
        _unpack(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(("at", "bit"), [(6, 1), (8, 64)])
def test_an_archive_that_is_encrypted_or_packed_as_nobody_knows_is_said(tmp_path, at, bit):
    published_files.write("hotpotqa", tmp_path)
    (path,) = (tmp_path / "published" / "hotpotqa").iterdir()
    content = bytearray(path.read_bytes())
    for mark, place in ((b"PK\3\4", at), (b"PK\1\2", at + 2)):
        start = content.find(mark)
        while start >= 0:
            content[start + place] ^= bit
            start = content.find(mark, start + 4)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"hotpotqa\.zip cannot be unpacked"):
        _unpack(path)
