"""What the configuration leaves open is as the weights say."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest

from corrector_jax import model_folder
from corrector_jax.job import load_encoder
from corrector_jax.models.bert import BertConfig
from corrector_jax.models.dual_encoder import Encoder, Projection
from corrector_jax.types import UserError
from tests import tiny

ENCODER = Encoder(
    BertConfig(
        vocab_size=4 + len(tiny.WORDS),
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        intermediate_size=12,
        max_positions=40,
    ),
    pooling="last",
    normalize=False,
    dtype="float32",
    project=Projection(6, activation="tanh"),
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder of a published encoder, with a prefix for queries and a length of 30."""
    folder = tmp_path_factory.mktemp("published")
    tokenizer = tiny.write_tokenizer(folder / "words") / "tokenizer.json"
    shapes = jax.eval_shape(ENCODER.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    model_folder.write(
        folder / "model",
        {"shared": jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)},
        encoder=ENCODER,
        clothes=model_folder.Clothes(
            config={},
            names=frozenset(),
            beside={"pooler.dense.bias": np.ones(8, np.float32)},
            tokenizer_json=tokenizer.read_text(),
            tokenizer_files={},
            pad_token="[PAD]",
            query_prefix="ba ",
            target_prefix="",
        ),
        max_len={"shared": 30},
        card="",
    )
    return folder / "model"


def config_of(folder, published, **changes):
    return tiny.config(folder, model__weights=str(published), **{"model__layers": 0, **changes})


def test_the_weights_decide_where_nothing_is_written(tmp_path, published, capsys):
    config = config_of(tmp_path, published, data__query_max_len=0, data__target_max_len=0)
    tokenization, encoder, params, origin = load_encoder(config)
    assert encoder == ENCODER
    assert params["projection"]["kernel"].shape == (8, 6)
    assert (tokenization.query_prefix, tokenization.target_prefix) == ("ba ", "")
    assert (tokenization.query_max_len, tokenization.target_max_len) == (30, 30)
    assert set(origin.beside) == {"pooler.dense.bias"}
    said = capsys.readouterr().out
    assert "every query is read after 'ba '" in said
    assert "--config.data.query_prefix=none" in said
    assert "every target" not in said


@pytest.mark.parametrize(("written", "used"), [("none", ""), ("bu ", "bu ")])
def test_what_is_written_decides(tmp_path, published, capsys, written, used):
    config = config_of(
        tmp_path,
        published,
        data__query_prefix=written,
        model__pooling="cls",
        model__normalize="yes",
        model__layers=1,
        model__projection=5,
    )
    tokenization, encoder, params, _ = load_encoder(config)
    assert tokenization.query_prefix == used
    assert (tokenization.query_max_len, tokenization.target_max_len) == (8, 16)
    assert (encoder.pooling, encoder.normalize, encoder.config.num_layers) == ("cls", True, 1)
    assert encoder.project == Projection(5, bias=False)
    assert params["projection"].keys() == {"kernel"}
    assert params["projection"]["kernel"].shape == (8, 5)
    assert "is read after" not in capsys.readouterr().out


def test_published_lengths_without_room_are_refused(tmp_path, published):
    folder = shutil.copytree(published, tmp_path / "model")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 2}')
    with pytest.raises(UserError, match=f"the length of {folder} is 2 tokens, which hold no text"):
        load_encoder(config_of(tmp_path, folder, data__query_max_len=0))


def test_a_text_longer_than_the_positions_is_refused(tmp_path, published):
    with pytest.raises(UserError, match="target_max_len is 41 but the encoder reads at most 40"):
        load_encoder(config_of(tmp_path, published, data__target_max_len=41))
    with pytest.raises(UserError, match="query_max_len is 2: write 3 or more, or 0"):
        config_of(tmp_path, published, data__query_max_len=2)
