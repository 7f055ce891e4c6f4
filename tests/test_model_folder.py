"""The folder that is written is the folder that is read; torch reads it in tests/parity."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from corrector_jax import config as configs
from corrector_jax import model_folder, reading, weights
from corrector_jax.models.bert import BertConfig
from corrector_jax.models.dual_encoder import DualEncoder, Encoder, Projection
from corrector_jax.models.pretrained import encoder_config, params_from, reader_config
from corrector_jax.models.reader import Reader, ReaderConfig
from corrector_jax.models.t5 import T5Config
from corrector_jax.types import UserError
from tests import tiny

CONFIG = BertConfig(
    vocab_size=10,
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    intermediate_size=12,
    max_positions=16,
)
POOLER = {"pooler.dense.bias": np.arange(8, dtype=np.float16)}


def write(folder, *, shared: bool, encoder: Encoder, **changes) -> dict:
    dual = DualEncoder(encoder, shared=shared)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(dual.init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
    clothes = {
        "config": {},
        "names": frozenset(),
        "beside": POOLER,
        "tokenizer_json": (tiny.write_tokenizer(folder / "t") / "tokenizer.json").read_text(),
        "tokenizer_files": {},
        "pad_token": "[PAD]",
        "query_prefix": "q: ",
        "target_prefix": "",
    }
    model_folder.write(
        folder / "out",
        dual.towers(params),
        encoder=encoder,
        clothes=model_folder.Clothes(**{**clothes, **changes}),
        max_len={"shared": 12, "query": 6, "target": 12},
        card="# A card\n",
    )
    return params


def assert_read_back(folder, tree, encoder: Encoder, max_len: int) -> None:
    files = weights.find(str(folder))
    config = encoder_config(files.config)
    assert config == encoder.config
    found = params_from(files.tensors, config)
    if encoder.project:
        assert files.dense.project == encoder.project
        bias = {} if files.dense.bias is None else {"bias": files.dense.bias}
        found["projection"] = {"kernel": files.dense.kernel, **bias}
    jax.tree.map(np.testing.assert_array_equal, found, tree)
    assert (files.pooling, files.normalize) == (encoder.pooling, encoder.normalize)
    assert (files.query_prefix, files.target_prefix, files.max_len) == ("q: ", "", max_len)
    np.testing.assert_array_equal(files.tensors["pooler.dense.bias"], POOLER["pooler.dense.bias"])


@pytest.mark.parametrize(
    "encoder",
    [
        Encoder(CONFIG),
        Encoder(CONFIG, "cls", normalize=False, project=Projection(6, False)),
        Encoder(CONFIG, "last", project=Projection(6, activation="tanh")),
    ],
    ids=["plain", "dense", "tanh"],
)
def test_what_is_written_is_read(tmp_path, encoder):
    params = write(tmp_path, shared=True, encoder=encoder)
    assert_read_back(tmp_path / "out", params["shared"], encoder, 12)
    assert (tmp_path / "out" / "README.md").read_text() == "# A card\n"


def test_two_towers_are_two_folders_and_a_router(tmp_path):
    encoder = Encoder(CONFIG, project=Projection(6))
    params = write(tmp_path, shared=False, encoder=encoder)
    out = tmp_path / "out"
    for tower, max_len in (("query", 6), ("target", 12)):
        assert_read_back(out / tower, params[tower], encoder, max_len)
    router = json.loads((out / "router_config.json").read_text())
    assert set(router["structure"]) == {"query", "document"}
    for names in router["structure"].values():
        assert [router["types"][name].rpartition(".")[2] for name in names] == [
            "Transformer", "Pooling", "Dense", "Normalize",
        ]  # fmt: skip
        assert all((out / name).is_dir() for name in names[:-1])
    assert router["structure"]["document"][0] == "target"


def test_it_keeps_what_it_came_with(tmp_path):
    published = {"architectures": ["BertForMaskedLM"], "torch_dtype": "float16"}
    write(
        tmp_path,
        shared=True,
        encoder=Encoder(CONFIG),
        config={"model_type": "bert", **published},
        names=frozenset({"bert.embeddings.word_embeddings.weight", "x"}),
        tokenizer_files={"tokenizer_config.json": '{"model_max_length": 512, "unk": 1}'},
    )
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]
    assert config["torch_dtype"] == "float32"
    assert "bert.embeddings.LayerNorm.weight" in weights.find(str(out)).tensors
    assert json.loads((out / "tokenizer_config.json").read_text()) == {
        "model_max_length": 12, "unk": 1,
    }  # fmt: skip


READERS = {
    "tied": ReaderConfig(T5Config(10, 8, 1, 2, 4, 12), 2, end_id=3),
    "untied": ReaderConfig(
        T5Config(10, 8, 1, 2, 4, 12, gated=True, activation="gelu"), 1, tied=False, scaled=False
    ),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("config", [{}, {"model_type": "t5", "n_positions": 512, "dtype": "x"}])
def test_a_reader(tmp_path, kind, config):
    sizes = READERS[kind]
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Reader(sizes).init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    clothes = model_folder.Clothes(
        config=config,
        names=frozenset(["shared.weight", "decoder.embed_tokens.weight"]),
        beside={unread: np.ones((32, 2), np.float32)},
        tokenizer_json=(tiny.write_tokenizer(tmp_path / "t") / "tokenizer.json").read_text(),
        tokenizer_files={"tokenizer_config.json": '{"eos_token": "[SEP]"}'},
        pad_token="[PAD]",
    )
    out = tmp_path / "out"
    model_folder.write_reader(out, params, config=sizes, clothes=clothes, card="# A card\n")
    files = weights.find_reader(str(out))
    assert reader_config(files.config, files.tensors) == sizes
    jax.tree.map(np.testing.assert_array_equal, params_from(files.tensors, sizes), params)
    assert {unread, "decoder.embed_tokens.weight"} < files.tensors.keys()
    assert files.config["architectures"] == ["T5ForConditionalGeneration"]
    assert files.config.get("n_positions") == config.get("n_positions")
    assert files.config.get("dtype", "float32") == "float32"
    assert files.tokenizer_json == clothes.tokenizer_json
    assert json.loads(files.tokenizer_files["tokenizer_config.json"]) == {"eos_token": "[SEP]"}
    assert json.loads((out / "generation_config.json").read_text()) == {
        "decoder_start_token_id": 0,
        "eos_token_id": sizes.end_id,
        "pad_token_id": 0,
    }
    assert (out / "README.md").read_text() == "# A card\n"


@pytest.mark.parametrize(("end_id", "fits"), [(3, True), (1, False)])
def test_a_reader_ends_answers_as_its_tokenizer_ends_texts(tmp_path, end_id, fits):
    sizes = ReaderConfig(T5Config(120, 8, 1, 2, 4, 12), 1, end_id=end_id)
    shapes = jax.eval_shape(Reader(sizes).init, jax.random.key(0))
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    text = (tiny.write_tokenizer(tmp_path / "t") / "tokenizer.json").read_text()
    clothes = model_folder.Clothes({}, frozenset(), {}, text, {}, "[PAD]")
    model_folder.write_reader(tmp_path / "out", params, config=sizes, clothes=clothes, card="")
    config = configs.default()
    config.reader.weights = str(tmp_path / "out")
    if fits:
        assert reading.load_reader(config, "").reader.config == sizes
    else:
        with pytest.raises(UserError, match="ends a text with 3 but the reader an answer with 1"):
            reading.load_reader(config, "")
