from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from corrector_jax import weights
from corrector_jax.data.tokenize import TextTokenizer
from corrector_jax.models.bert import Bert, BertConfig
from corrector_jax.models.dual_encoder import Encoder
from corrector_jax.models.pretrained import encoder_config, params_from
from corrector_jax.types import UserError

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "minilm_vectors.npz"
HF_CONFIG = {
    "model_type": "bert",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 7,
}


def published(prefix: str = "") -> dict[str, np.ndarray]:
    """Tensors as a checkpoint of `HF_CONFIG` names and shapes them, all different."""
    shapes = {
        "embeddings.word_embeddings.weight": (11, 8),
        "embeddings.position_embeddings.weight": (7, 8),
        "embeddings.token_type_embeddings.weight": (2, 8),
        "embeddings.LayerNorm.weight": (8,),
        "embeddings.LayerNorm.bias": (8,),
        "embeddings.position_ids": (1, 7),
        "pooler.dense.weight": (8, 8),
        "pooler.dense.bias": (8,),
    }
    for i in range(3):
        for name, (out, inner) in {
            "attention.self.query": (8, 8),
            "attention.self.key": (8, 8),
            "attention.self.value": (8, 8),
            "attention.output.dense": (8, 8),
            "intermediate.dense": (12, 8),
            "output.dense": (8, 12),
        }.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = (out, inner)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (out,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{i}.{name}.weight"] = (8,)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (8,)
    rng = np.random.default_rng(0)
    return {
        prefix + name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def minilm():
    return weights.find("all-MiniLM-L6-v2")


@pytest.mark.parametrize("layers", [6, 3])
def test_embeddings_equal_those_of_sentence_transformers(minilm, layers):
    with np.load(REFERENCE, allow_pickle=False) as reference:
        texts = json.loads(reference["texts"].tobytes())
        expected = reference[f"layers_{layers}"]
        max_len = int(reference["max_len"])
    config = encoder_config(minilm.config, layers=layers)
    tokens = TextTokenizer(minilm.tokenizer_json).encode(texts, max_len=max_len)
    encoder = Encoder(config, minilm.pooling, minilm.normalize)
    params = params_from(minilm.tensors, config)
    # The two long texts apart: the others need no more than 64 tokens.
    used = (tokens != config.pad_id).sum(axis=1)
    assert used.max() > 128
    encode = jax.jit(encoder.apply)
    variables = jax.device_put({"params": params})
    for rows, length in ((used <= 64, 64), (used > 64, max_len)):
        embeddings = encode(variables, tokens[rows, :length])
        assert embeddings.dtype == np.float32
        np.testing.assert_allclose(embeddings, expected[rows], rtol=0, atol=1e-5)


def test_the_parameters_are_those_of_bert():
    config = encoder_config(HF_CONFIG)
    params = params_from(published(), config)
    wanted = jax.eval_shape(Bert(config).init, jax.random.key(0), np.zeros((1, 1), np.int32))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), wanted["params"]
    )
    assert all(x.flags.c_contiguous for x in jax.tree.leaves(params))


def test_the_first_layers_are_a_slice_of_all():
    every = params_from(published(), encoder_config(HF_CONFIG))
    first = encoder_config(HF_CONFIG, layers=2)
    assert first.num_layers == 2
    del every["layer_2"]
    assert_same(params_from(published(), first), every)


@pytest.mark.parametrize("prefix", ["bert.", "model."])
def test_names_may_have_a_prefix(prefix):
    config = encoder_config(HF_CONFIG)
    tensors = published(prefix) | {"cls.predictions.bias": np.zeros(11)}
    assert_same(params_from(tensors, config), params_from(published(), config))


def test_layer_norms_may_have_their_first_names():
    def old(name):
        return name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")

    config = encoder_config(HF_CONFIG)
    tensors = {old(name): tensor for name, tensor in published().items()}
    assert tensors.keys() != published().keys()
    assert_same(params_from(tensors, config), params_from(published(), config))


def test_halves_are_widened():
    config = encoder_config(HF_CONFIG)
    tensors = {name: tensor.astype(np.float16) for name, tensor in published().items()}
    assert {x.dtype for x in jax.tree.leaves(params_from(tensors, config))} == {np.dtype("f4")}


def test_a_missing_tensor_is_named():
    tensors = published("bert.")
    del tensors["bert.encoder.layer.1.output.dense.bias"]
    with pytest.raises(UserError, match=r"lack the tensor bert\.encoder\.layer\.1\.output\.dense"):
        params_from(tensors, encoder_config(HF_CONFIG))
    params_from(tensors, encoder_config(HF_CONFIG, layers=1))
    with pytest.raises(UserError, match=r"embeddings\.word_embeddings\.weight and 52 more"):
        params_from({}, encoder_config(HF_CONFIG))


def test_a_wrong_shape_is_named():
    tensors = published()
    name = "encoder.layer.0.intermediate.dense.weight"
    tensors[name] = tensors[name].T
    with pytest.raises(UserError, match=rf"{name} has shape \(8, 12\), .* asks for \(12, 8\)"):
        params_from(tensors, encoder_config(HF_CONFIG))


def test_a_config_is_read_with_the_defaults_of_the_format():
    assert encoder_config(HF_CONFIG) == BertConfig(11, 8, 3, 2, 12, 7, 2, 1e-12, 0)
    given = {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 3}
    assert encoder_config(HF_CONFIG | given) == BertConfig(11, 8, 3, 2, 12, 7, 1, 1e-5, 3)
    assert encoder_config(HF_CONFIG | {"pad_token_id": None}).pad_id == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2', but only 'bert'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new'"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"hidden_size": None}, "None for hidden_size"),
        ({"hidden_size": "8"}, "'8' for hidden_size"),
        ({"vocab_size": 11.5}, "11.5 for vocab_size"),
        ({"layer_norm_eps": "small"}, "'small' for layer_norm_eps"),
        ({"num_attention_heads": 3}, "3 heads"),
    ],
)
def test_other_encoders_are_refused_by_name(change, words):
    with pytest.raises(UserError, match=words):
        encoder_config(HF_CONFIG | change)


@pytest.mark.parametrize("layers", [4, -1])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(UserError, match=f"has 3 layers, so its first {layers} cannot"):
        encoder_config(HF_CONFIG, layers=layers)


@pytest.mark.parametrize("kind", ["bert", "modernbert", "t5"])
def test_a_number_of_layers_that_no_model_has_is_refused_at_once(kind):
    """Places are gone over one layer at a time: two thousand millions would fill the memory."""
    key = "num_layers" if kind == "t5" else "num_hidden_layers"
    with pytest.raises(UserError, match=f"2147483648 for {key}"):
        encoder_config(HF_CONFIG | {"model_type": kind, "d_model": 8, key: 2**31})
