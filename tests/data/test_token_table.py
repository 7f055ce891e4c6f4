from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from corrector_jax.data import token_table
from corrector_jax.data.dataset import RetrievalData
from corrector_jax.data.token_table import TokenTable
from corrector_jax.data.tokenize import TextTokenizer, lengths
from corrector_jax.types import UserError
from tests import tiny

TEXTS = [" ".join(tiny.WORDS[i : i + 1 + i % 7]) for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t")
    return TextTokenizer((folder / "tokenizer.json").read_bytes())


def make(folder: Path, tokenizer: TextTokenizer, texts=TEXTS, **changes) -> TokenTable:
    ids = [str(i) for i in range(len(texts))]
    keys = {"name": "tiny", "template": "{text}", "prefix": "", "max_len": 6} | changes
    content = RetrievalData("tiny", ids, texts, {}).fingerprint()
    return token_table.token_table(
        texts, tokenizer, content_fingerprint=content, folder=folder, **keys
    )


@pytest.mark.parametrize("shard", [7, 40, 1000])
def test_the_table_holds_what_the_tokenizer_gives(tmp_path, tokenizer, monkeypatch, shard: int):
    monkeypatch.setattr(token_table, "SHARD", shard)
    table = make(tmp_path, tokenizer, prefix="ba ")
    tokens = tokenizer.encode(TEXTS, max_len=6, prefix="ba ")
    np.testing.assert_array_equal(table.ids, tokens)
    assert table.ids.dtype == np.uint16
    np.testing.assert_array_equal(table.lengths, lengths(tokens, tokenizer.pad_id))
    assert table.lengths.dtype == np.int32


def test_a_table_is_used_again_and_what_changed_is_named(tmp_path, tokenizer, monkeypatch, capsys):
    first = make(tmp_path, tokenizer)
    assert "anew" not in capsys.readouterr().out  # nothing to compare with

    def never(*arguments: object, **keys: object) -> None:
        raise AssertionError("it is tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr(token_table, "_write", never)
        again = make(tmp_path, tokenizer)
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.ids, first.ids)
    content = json.loads((tiny.write_tokenizer(tmp_path / "t") / "tokenizer.json").read_text())
    content["model"]["vocab"]["another"] = len(content["model"]["vocab"])
    other = TextTokenizer(json.dumps(content))
    capsys.readouterr()
    for arguments, said in (
        ({"max_len": 5}, "tiny is tokenized anew: config.data.target_max_len was 6 and is 5"),
        ({"prefix": "p: "}, "anew: config.data.target_prefix was '' and is 'p: '"),
        ({"texts": TEXTS[1:]}, "anew: the corpus changed"),
        (
            {"texts": TEXTS[2:], "template": "{title}"},
            "anew: config.data.target_template was '{text}' and is '{title}'",
        ),
    ):
        assert make(tmp_path, tokenizer, **arguments).fingerprint != first.fingerprint
        (line,) = capsys.readouterr().out.strip().splitlines()
        assert line.endswith(said)
    assert make(tmp_path, other).fingerprint != first.fingerprint
    assert "anew: the tokenizer changed" in capsys.readouterr().out


def test_a_reader_s_table_is_compared_with_a_reader_s(tmp_path, tokenizer, capsys):
    make(tmp_path, tokenizer)
    make(tmp_path, tokenizer, max_len=8, keys="reader.passage")
    assert "anew" not in capsys.readouterr().out
    make(tmp_path, tokenizer, max_len=9, keys="reader.passage")
    (line,) = capsys.readouterr().out.strip().splitlines()
    assert line.endswith("anew: config.reader.passage_max_len was 8 and is 9")
    make(tmp_path, tokenizer, max_len=7)
    assert "config.data.target_max_len was 6 and is 7" in capsys.readouterr().out


def test_a_whole_table_is_read_where_nothing_can_be_written(tmp_path, tokenizer, monkeypatch):
    first = make(tmp_path, tokenizer)

    def never(place: Path) -> None:
        raise UserError("a disk that is only read")

    monkeypatch.setattr(token_table, "writing", never)
    np.testing.assert_array_equal(make(tmp_path, tokenizer).ids, first.ids)


def test_a_table_killed_before_its_manifest_is_not_made_again(tmp_path, tokenizer, monkeypatch):
    write = token_table.paths.write

    def killed(path: Path, content: str) -> None:
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(token_table.paths, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, tokenizer)
    (state,) = tmp_path.rglob("progress.json")
    assert json.loads(state.read_text()) == {"done": len(TEXTS)}
    table = make(tmp_path, tokenizer)
    np.testing.assert_array_equal(table.ids, tokenizer.encode(TEXTS, max_len=6))
    assert not state.exists()


def test_a_damaged_table_is_named(tmp_path, tokenizer):
    make(tmp_path, tokenizer)
    with next(tmp_path.rglob("ids.npy")).open("ab") as file:
        file.truncate(200)
    with pytest.raises(UserError, match=r"ids\.npy is damaged: remove the folder"):
        make(tmp_path, tokenizer)


def test_lengths_without_room_are_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="2 tokens holds no text"):
        make(tmp_path, tokenizer, max_len=2)


def test_texts_are_counted_uncut(tokenizer):
    counts = tokenizer.count(["", "ba", "ba be bi", " ".join(tiny.WORDS)], prefix="bo ")
    np.testing.assert_array_equal(counts, [3, 4, 6, 3 + len(tiny.WORDS)])
    assert tokenizer.encode(["ba " * 9], max_len=4).shape == (1, 4)  # still cuts after a count


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("ids.npy", np.zeros((40, 7), np.uint16)),
        ("ids.npy", np.zeros((40, 6), np.int64)),
        ("lengths.npy", np.zeros(39, np.int32)),
        ("lengths.npy", np.full(40, 7, np.int32)),
        ("lengths.npy", np.zeros(40, np.float32)),
    ],
)
def test_a_table_of_another_shape_or_kind_is_damage(tmp_path, tokenizer, name, array):
    make(tmp_path, tokenizer)
    np.save(next(tmp_path.rglob(name)), array)
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        make(tmp_path, tokenizer)


def test_an_archive_is_no_table_and_a_missing_one_is_damage(tmp_path, tokenizer):
    make(tmp_path, tokenizer)
    path = next(tmp_path.rglob("ids.npy"))
    with path.open("wb") as file:
        np.savez(file, ids=np.zeros(3))
    with pytest.raises(UserError, match=r"ids\.npy is damaged"):
        make(tmp_path, tokenizer)
    path.unlink()
    with pytest.raises(UserError, match=r"ids\.npy is damaged"):
        make(tmp_path, tokenizer)


def test_another_table_that_is_damaged_is_in_nobodys_way(tmp_path, tokenizer):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text("[" * 100_000)
    make(tmp_path, tokenizer)


@pytest.mark.parametrize("content", ["{", "[]", '{"done": -1}', '{"done": 41}', '{"done": 30}'])
def test_progress_that_nobody_made_is_damage(tmp_path, tokenizer, monkeypatch, content):
    make(tmp_path, tokenizer)
    manifest = next(tmp_path.rglob("manifest.json"))
    manifest.unlink()
    (manifest.parent / "progress.json").write_text(content)
    with (manifest.parent / "ids.npy").open("ab") as file:
        file.truncate(200)
    with pytest.raises(UserError, match=r"progress\.json is damaged"):
        make(tmp_path, tokenizer)
