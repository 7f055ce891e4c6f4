"""What every family promises; that its numbers are the published ones is for tests/parity."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corrector_jax.models.bert import BertConfig
from corrector_jax.models.dual_encoder import Encoder, Projection
from corrector_jax.models.modernbert import ModernBertConfig
from corrector_jax.models.pretrained import (
    beside,
    encoder_config,
    params_from,
    replace,
    tensors_from,
)
from corrector_jax.models.t5 import T5Config, _buckets
from corrector_jax.types import UserError

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_layers": 1, "num_heads": 4}
FAMILIES = {
    "roberta": BertConfig(
        **SIZES, intermediate_size=24, max_positions=64, pad_id=1, position_offset=2
    ),
    "t5": T5Config(**SIZES, head_size=6, intermediate_size=24, max_positions=64),
    "t5-gated": T5Config(
        **SIZES, head_size=6, intermediate_size=24, gated=True, activation="gelu", max_positions=64
    ),
    "modernbert": ModernBertConfig(
        **SIZES,
        intermediate_size=24,
        max_positions=64,
        local=(True,),
        window=3,
        pad_id=0,
    ),
}


@functools.partial(jax.jit, static_argnums=0)
def states(config, params, tokens):
    return config.module(jnp.float32).apply({"params": params}, tokens)


@pytest.fixture(scope="module", params=FAMILIES)
def made(request):
    """A family's config, and parameters large enough to tell texts apart."""
    config = FAMILIES[request.param]
    init = config.module(jnp.float32).init
    shapes = jax.eval_shape(init, jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    rng = np.random.default_rng(1)
    return config, jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)


def tokens_of(config, width: int = 24) -> np.ndarray:
    """[3, width] int32: 14 random tokens, then padding."""
    tokens = np.random.default_rng(0).integers(2, config.vocab_size, (3, width)).astype(np.int32)
    tokens[:, 14:] = config.pad_id
    return tokens


def test_a_text_does_not_depend_on_its_padding_or_on_other_texts(made):
    config, params = made
    tokens = tokens_of(config)
    wide = np.pad(tokens, ((0, 0), (0, 8)), constant_values=config.pad_id)
    wide[1:, :20] = 7
    got = states(config, params, wide)[0, :14]
    np.testing.assert_allclose(got, states(config, params, tokens)[0, :14], atol=1e-5)


def test_every_parameter_has_one_published_place(made):
    config, params = made
    tensors = tensors_from(params, config)
    again = params_from(tensors, config)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert {x.dtype for x in tensors.values()} == {np.dtype(np.float32)}
    assert beside(tensors, config) == {}


def test_names_stay_those_they_came_with(made):
    config, params = made
    usual = tensors_from(params, config)
    places = {place.name: place.alias for place in config.places() if place.alias}
    like = {f"model.{places.get(name, name)}": tensor for name, tensor in usual.items()}
    assert (like.keys() != {f"model.{name}" for name in usual}) == bool(places)
    back = tensors_from(params_from(like, config), config, like=like)
    assert back.keys() == like.keys()
    for name, tensor in like.items():
        np.testing.assert_array_equal(back[name], tensor)


def test_tensors_without_a_place_are_kept_or_refused(made):
    config, params = made
    tensors = tensors_from(params, config)
    pooler = {"pooler.dense.bias": np.ones(3), "embeddings.position_ids": np.arange(4)}
    assert beside(tensors | pooler, config) == pooler
    assert beside(tensors | {"decoder.block.0.weight": np.ones(2)}, config) == {}
    some = next(name for name in tensors if ".0." in name)
    other = some.replace(".0.", ".7.")
    with pytest.raises(UserError, match=rf"hold the tensor {other}, for which"):
        beside(tensors | {other: tensors[some]}, config)


def test_a_config_is_what_its_file_says(made):
    config, _ = made
    kinds = {BertConfig: "roberta", T5Config: "t5", ModernBertConfig: "modernbert"}
    published = {"model_type": kinds[type(config)], **config.write()}
    assert replace(encoder_config(published), max_positions=64) == config
    both = {"num_layers": 2, **({"local": (True, False)} if hasattr(config, "local") else {})}
    first = encoder_config({**published, **replace(config, **both).write()}, layers=1)
    assert first.num_layers == 1
    assert first.write() == config.write()


def test_bfloat16_is_close(made):
    config, params = made
    low = jax.jit(config.module(jnp.bfloat16).apply)({"params": params}, tokens_of(config))
    assert low.dtype == jnp.bfloat16
    full = states(config, params, tokens_of(config))
    scale = np.abs(full[:, :14]).mean()
    assert np.abs(low.astype(jnp.float32) - full)[:, :14].mean() < 0.1 * scale


def test_too_long_a_text_is_refused(made):
    config, params = made
    with pytest.raises(ValueError, match="65 tokens are longer than the 64 positions"):
        config.module(jnp.float32).apply({"params": params}, np.ones((1, 65), np.int32))


def test_a_local_layer_sees_only_its_neighbours():
    config = FAMILIES["modernbert"]
    shapes = jax.eval_shape(config.module(jnp.float32).init, jax.random.key(0), tokens_of(config))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes["params"])
    tokens = tokens_of(config)
    changed = tokens.copy()
    changed[0, 6] = tokens[0, 6] % 40 + 3
    moved = np.abs(states(config, params, tokens) - states(config, params, changed))[0].max(axis=1)
    assert (moved[3:10] > 1e-4).all()
    assert moved[:3].max() < 1e-6
    assert moved[10:14].max() < 1e-6


def test_position_buckets():
    table = _buckets(FAMILIES["t5"], 300)
    assert table.shape == (300, 300)
    assert table[0, 0] == 0
    assert list(table[:9, 0]) == [0, 1, 2, 3, 4, 5, 6, 7, 8]  # keys before the query, one by one
    assert list(table[0, 1:4]) == [17, 18, 19]  # keys after it
    assert table[299, 0] == 15  # beyond max_distance all share the last
    assert table[0, 299] == 31
    assert (np.diff(table[:, 0]) >= 0).all()


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("t5", {"feed_forward_proj": "swish"}, "feed_forward_proj 'swish'"),
        ("modernbert", {"norm_bias": True}, "norm_bias True, but only False"),
        ("modernbert", {"hidden_activation": "silu"}, "hidden_activation 'silu'"),
        ("modernbert", {"layer_types": ["full"]}, "layer_types that are not 1 words"),
        (
            "modernbert",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope_type 'yarn'",
        ),
        ("roberta", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("t5", {"d_kv": None}, "None for d_kv"),
        ("t5", {"d_kv": float("inf")}, "inf for d_kv"),
        ("t5", {"d_kv": float("nan")}, "nan for d_kv"),
        ("roberta", {"layer_norm_eps": float("inf")}, "inf for layer_norm_eps"),
        ("roberta", {"layer_norm_eps": 10**400}, "for layer_norm_eps"),
        ("roberta", {"model_type": []}, r"model_type \[\]"),
        ("modernbert", {"layer_types": 5}, "layer_types that are not 1 words"),
        ("modernbert", {"layer_types": [[]]}, "layer_types that are not 1 words"),
        ("modernbert", {"rope_parameters": [1]}, r"\[1\] for rope_parameters"),
        ("modernbert", {"rope_parameters": {"full_attention": 3}}, "3 for full_attention"),
        ("modernbert", {"global_attn_every_n_layers": 0}, "0 for global_attn_every_n_layers"),
    ],
)
def test_what_is_not_supported_is_named(kind, change, words):
    with pytest.raises(UserError, match=words):
        encoder_config({"model_type": kind, **FAMILIES[kind].write(), **change})


def test_older_files_of_modernbert_say_the_same():
    config = FAMILIES["modernbert"]
    new = {"model_type": "modernbert", **config.write(), "num_hidden_layers": 4}
    new["layer_types"] = ["full_attention", *["sliding_attention"] * 2, "full_attention"]
    new["rope_parameters"]["full_attention"]["rope_theta"] = 77.0
    old = {k: v for k, v in new.items() if k not in ("layer_types", "rope_parameters")}
    old |= {"global_attn_every_n_layers": 3, "global_rope_theta": 77.0}
    assert encoder_config(old) == encoder_config(new)
    assert encoder_config(old).global_theta == 77.0


def test_a_projection_stands_beside_the_family():
    config = FAMILIES["t5"]
    shapes = jax.eval_shape(config.module(jnp.float32).init, jax.random.key(0), tokens_of(config))
    params = jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), shapes["params"])
    rng = np.random.default_rng(2)
    kernel = rng.normal(size=(16, 6)).astype(np.float32)
    tokens = tokens_of(config)
    plain = Encoder(config, normalize=False).apply({"params": params}, tokens)
    for project, more in (
        (Projection(6, bias=False), {}),
        (Projection(6, activation="tanh"), {"bias": rng.normal(size=6).astype(np.float32)}),
    ):
        encoder = Encoder(config, normalize=False, project=project)
        assert encoder.dim == 6
        tree = {**params, "projection": {"kernel": kernel, **more}}
        wanted = plain @ kernel + more.get("bias", np.zeros(6, np.float32))[None]
        wanted = np.tanh(wanted) if project.activation == "tanh" else wanted
        np.testing.assert_allclose(encoder.apply({"params": tree}, tokens), wanted, atol=1e-4)


def test_the_last_token_is_the_last_that_is_no_padding(made):
    config, params = made
    got = Encoder(config, "last", normalize=False).apply({"params": params}, tokens_of(config))
    np.testing.assert_allclose(got, states(config, params, tokens_of(config))[:, 13], atol=1e-5)
