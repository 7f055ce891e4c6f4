"""What the reader promises; that its numbers are those of transformers is for tests/parity."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corrector_jax.models.dual_encoder import rematerialised
from corrector_jax.models.pretrained import beside, params_from, reader_config, tensors_from
from corrector_jax.models.reader import Reader, ReaderConfig
from corrector_jax.models.t5 import T5Config, _buckets
from corrector_jax.sharding import make_placement, rules_of
from corrector_jax.types import UserError
from tests import oracle

SIZES = T5Config(40, 16, 2, 4, 6, 24, num_buckets=8, max_distance=12, max_positions=32)
GATED = dataclasses.replace(SIZES, gated=True, activation="gelu")
KINDS = {
    "1.0": ReaderConfig(SIZES, 3, start_id=0, end_id=5),
    "1.1": ReaderConfig(GATED, 1, tied=False, scaled=False, start_id=2, end_id=5),
}
UNREAD = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


@pytest.fixture(scope="module", params=KINDS)
def made(request):
    return make(request.param)


def make(kind):
    """A reader, and parameters large enough to tell texts apart."""
    reader = Reader(KINDS[kind])
    shapes = jax.eval_shape(reader.init, jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(x.dtype), shapes)
    return reader, params


@pytest.fixture(scope="module")
def tensors(made):
    reader, params = made
    return tensors_from(params, reader.config)


def texts(shape, lengths, seed=0):
    """[..., T] int32 random tokens, padded to T."""
    tokens = np.random.default_rng(seed).integers(6, SIZES.vocab_size, shape).astype(np.int32)
    return np.where(np.arange(shape[-1]) < np.array(lengths)[..., None], tokens, 0)


PASSAGES = texts((2, 3, 10), [[10, 4, 1], [7, 9, 2]])
ANSWERS = texts((2, 6), [6, 3], seed=1)


def everything(reader, params, tokens, answers):
    """Log-likelihoods fused [B, T] and each [B, K, T], and logits [B, T, V]."""
    passages = reader.encode(params, tokens)
    return (
        reader.fused(params, passages, answers),
        reader.each(params, passages, answers),
        reader.logits(params, passages, answers),
    )


read = oracle.jit(everything, static_argnums=0)


@pytest.mark.parametrize("name", KINDS)
def test_a_random_reader_puts_out_what_it_looks_at(name):
    """From the first step on; heads look at distances of their own."""
    reader = Reader(dataclasses.replace(KINDS[name], decoder_layers=2))
    params, again = (oracle.jit(reader.init)(jax.random.key(seed)) for seed in (0, 1))
    width, seen = SIZES.hidden_size, []
    for layer in ("layer_0", "layer_1"):
        cross = params["decoder"][layer]["cross"]
        value, output = (cross[part]["kernel"] for part in ("value", "output"))
        np.testing.assert_allclose(value @ output, np.eye(width), atol=1e-5)
        seen += [value, again["decoder"][layer]["cross"]["value"]["kernel"]]
    assert len({array.tobytes() for array in map(np.asarray, seen)}) == 4
    for half in ("encoder", "decoder"):
        assert np.std(params[half]["position_bias"]) > 1


def test_the_parameters_of_the_encoder_are_those_of_t5(made):
    reader, params = made
    config = reader.config.encoder
    wanted = jax.eval_shape(config.module(jnp.float32).init, jax.random.key(0), PASSAGES[0])
    assert jax.tree.map(np.shape, params["encoder"]) == jax.tree.map(
        lambda x: x.shape, wanted["params"]
    )
    assert params.keys() - {"head"} == {"encoder", "decoder"}
    assert ("head" in params) != reader.config.tied


def test_what_is_likely_is_what_the_logits_say(made):
    fused, _, logits = read(*made, PASSAGES, ANSWERS)
    assert fused.dtype == logits.dtype == jnp.float32
    each = oracle.f64(logits)
    each -= oracle.log_sum_exp(each)[..., None]
    wanted = np.take_along_axis(each, ANSWERS[:, :, None], axis=-1)[:, :, 0]
    np.testing.assert_allclose(fused, np.where(ANSWERS != 0, wanted, 0), atol=1e-4)
    assert not np.any(np.asarray(fused)[ANSWERS == 0])
    assert np.ptp(fused) > 0.5


def test_each_passage_is_read_as_if_it_were_alone(made):
    fused, each, _ = read(*made, PASSAGES, ANSWERS)
    for k in range(3):
        alone, also, _ = read(*made, PASSAGES[:, k : k + 1], ANSWERS)
        np.testing.assert_allclose(each[:, k], alone, atol=1e-4)
        np.testing.assert_allclose(also[:, 0], alone, atol=1e-4)
        assert np.abs(fused - alone).max() > 0.01
    assert not np.any(np.where((ANSWERS != 0)[:, None], 0, each))


def test_padding_changes_nothing(made):
    """Of a passage, of an answer, or a whole passage of it."""
    fused, each, _ = read(*made, PASSAGES, ANSWERS)
    wide = np.pad(PASSAGES, ((0, 0), (0, 2), (0, 5)))
    longer = np.pad(ANSWERS, ((0, 0), (0, 3)))
    found, also, _ = read(*made, wide, longer)
    np.testing.assert_allclose(found[:, :6], fused, atol=1e-4)
    np.testing.assert_allclose(also[:, :3, :6], each, atol=1e-4)
    assert not np.any(found[:, 6:])
    assert all(np.isfinite(x).all() for x in (found, also))
    nothing, _, logits = read(*made, 0 * PASSAGES, ANSWERS)
    assert all(np.isfinite(x).all() for x in (nothing, logits))


def test_the_order_of_passages_does_not_matter_to_the_fused(made):
    fused, each, _ = read(*made, PASSAGES, ANSWERS)
    order = np.array([2, 0, 1])
    found, also, _ = read(*made, PASSAGES[:, order], ANSWERS)
    np.testing.assert_allclose(found, fused, atol=1e-4)
    np.testing.assert_allclose(also, np.asarray(each)[:, order], atol=1e-4)


def test_a_token_depends_on_those_before_it_alone(made):
    _, _, logits = read(*made, PASSAGES, ANSWERS)
    changed = ANSWERS.copy()
    changed[:, 2] = 7 + changed[:, 2] % 9
    _, _, moved = read(*made, PASSAGES, changed)
    gap = np.abs(logits - moved).max(axis=(0, 2))
    assert gap[:3].max() < 1e-6
    assert (gap[3:] > 1e-3).all()


def test_gradients_reach_every_parameter(made):
    reader, params = made

    def likely(params, weight):
        fused, each, _ = everything(reader, params, PASSAGES, ANSWERS)
        return weight * fused.sum() + (1 - weight) * each.sum()

    gradient = oracle.jit(jax.grad(likely))
    for weight in (0.0, 1.0):
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params, weight)):
            assert np.isfinite(leaf).all()
            assert np.abs(leaf).max() > 1e-5, jax.tree_util.keystr(path)


@functools.partial(oracle.jit, static_argnums=(0, 3, 4))
def answer(reader, params, tokens, length, beams):
    return reader.answer(params, reader.encode(params, tokens), length=length, beams=beams)


def test_greedy_answers_are_what_teacher_forcing_prefers(made):
    """The cache of a token at a time gives what reading the whole answer gives."""
    reader, params = made
    tokens = texts((16, 3, 10), np.full((16, 3), 10), seed=3)
    found = np.asarray(answer(reader, params, tokens, 12, 1))
    assert (found.shape, found.dtype) == ((16, 12), np.int32)
    _, _, logits = read(reader, params, tokens, found)
    before = np.pad(found == reader.config.end_id, ((0, 0), (1, 0)))[:, :-1].cumsum(axis=1) > 0
    np.testing.assert_array_equal(found, np.where(before, 0, np.argmax(logits, axis=-1)))
    assert len(np.unique(found, axis=0)) > 4


def test_more_beams_find_likelier_answers(made):
    reader, params = made
    tokens = texts((16, 3, 10), np.full((16, 3), 10), seed=3)
    score = {}
    for beams in (1, 6):
        found = np.asarray(answer(reader, params, tokens, 6, beams))
        fused, _, _ = read(reader, params, tokens, found)
        score[beams] = np.asarray(fused).sum(axis=1) / np.maximum((found != 0).sum(axis=1), 1)
    assert score[6].mean() > score[1].mean() + 0.01


def test_bfloat16_is_close(made):
    reader, params = made
    low = dataclasses.replace(reader, dtype=jnp.bfloat16)
    assert low.encode(params, PASSAGES).states.dtype == jnp.bfloat16
    full, found = (read(r, params, PASSAGES, ANSWERS) for r in (reader, low))
    for a, b in zip(found, full, strict=True):
        assert a.dtype == jnp.float32
        assert np.abs(a - b).mean() < 0.1 * np.abs(b).mean()


@pytest.mark.slow  # a step of one on a mesh: steps/test_reader_step.py
def test_one_device_is_eight():
    """Parameters split by their axes, questions by example, and passages encoded in chunks."""
    reader, params = make("1.1")
    place = make_placement(8, fsdp=2, tensor=2, rules=rules_of(reader.config.axes()))
    split = dataclasses.replace(
        reader, wrap=lambda encode: place.in_chunks(rematerialised(encode), 4)
    )
    tokens = texts((4, 3, 10), np.full((4, 3), 10), seed=3)
    given = texts((4, 6), [6, 3, 1, 4], seed=4)

    def likely(reader, params, tokens, given):
        fused, each, _ = everything(reader, params, tokens, given)
        return fused.sum() + each.sum(), (fused, each)

    def all_of(reader, params, tokens, given):
        found = jax.value_and_grad(likely, 1, has_aux=True)(reader, params, tokens, given)
        return found, reader.answer(params, reader.encode(params, tokens), length=6, beams=3)

    run = oracle.jit(all_of, static_argnums=0)
    wanted = run(reader, params, tokens, given)
    sharded = jax.device_put(params, place.parameters(params))
    halves = [leaf for leaf in jax.tree.leaves(sharded) if not leaf.is_fully_replicated]
    assert {leaf.ndim for leaf in halves} == {2}
    assert len(halves) > len(jax.tree.leaves(params)) / 2
    examples = jax.device_put((tokens, given), place.examples)
    found = run(split, sharded, *examples)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(found[1], wanted[1])


def test_too_long_a_passage_is_refused(made):
    reader, params = made
    with pytest.raises(ValueError, match="33 tokens are longer than the 32"):
        reader.encode(params, np.ones((1, 1, 33), np.int32))


def test_causal_buckets():
    table = _buckets(T5Config(9, 4, 1, 1, 4, 4), 300, causal=True)
    assert not np.triu(table).any()  # what comes later is masked
    assert list(table[:17, 0]) == list(range(17))  # one by one
    assert table[299, 0] == 31  # beyond max_distance all share the last
    assert (np.diff(table[:, 0]) >= 0).all()


# Published weights.


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def published(config) -> dict:
    return {"model_type": "t5", **config.write()}


def test_every_parameter_has_one_published_place(made, tensors):
    reader, params = made
    assert len(tensors) == len(jax.tree.leaves(params))
    assert_same(params_from(tensors, reader.config), params)
    assert beside(tensors, reader.config) == {}
    assert "lm_head.weight" in tensors or reader.config.tied


def test_a_config_is_what_its_file_says(made, tensors):
    config = dataclasses.replace(
        made[0].config, encoder=dataclasses.replace(made[0].config.encoder, max_positions=4096)
    )
    found = reader_config(published(config), tensors)
    assert found == config
    # As transformers writes it from version 5 on, whatever the head.
    new = published(config) | {"tie_word_embeddings": True}
    assert reader_config(new, tensors) == config
    # And before: 1.0 leaves out what is not otherwise.
    old = {k: v for k, v in published(config).items() if k != "scale_decoder_outputs"}
    assert reader_config(old, tensors) == config


def test_defaults_of_the_format():
    keys = ("num_decoder_layers", "decoder_start_token_id", "eos_token_id", "scale_decoder_outputs")
    config = published(KINDS["1.0"])
    found = reader_config({k: v for k, v in config.items() if k not in keys}, {})
    assert (found.decoder_layers, found.start_id, found.end_id) == (2, 0, 1)
    assert found.tied
    assert found.scaled


def test_names_stay_those_they_came_with(made, tensors):
    reader, params = made
    words = tensors["shared.weight"]
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    names += ["lm_head.weight"] * reader.config.tied
    copied = tensors | dict.fromkeys(names, words) | {UNREAD: np.ones((8, 4), np.float32)}
    assert reader_config(published(reader.config), copied).tied == reader.config.tied
    assert_same(params_from(copied, reader.config), params)
    rest = beside(copied, reader.config)
    assert list(rest) == [UNREAD]
    back = tensors_from(params, reader.config, like=copied) | rest
    assert back.keys() == copied.keys()
    assert_same(back, copied)


def test_copies_that_differ_are_refused(made, tensors):
    name = "decoder.embed_tokens.weight"
    with pytest.raises(UserError, match=rf"shared.weight and {name} differ"):
        params_from(tensors | {name: tensors["shared.weight"] + 1}, made[0].config)


def test_tensors_that_do_not_fit_are_named(made, tensors):
    config = made[0].config
    name = "decoder.block.0.layer.1.EncDecAttention.k.weight"
    less = {key: tensor for key, tensor in tensors.items() if key != name}
    with pytest.raises(UserError, match=f"lack the tensor {name}; give"):
        params_from(less, config)
    half = {key: tensor for key, tensor in tensors.items() if not key.startswith("decoder.")}
    with pytest.raises(
        UserError, match=r"lack the tensor decoder\.block\.0\..* and \d+ more; give"
    ):
        params_from(half, config)
    with pytest.raises(UserError, match=rf"{name} has shape \(16, 24\), .* asks for \(24, 16\)"):
        params_from(tensors | {name: tensors[name].T}, config)
    other = name.replace("block.0", "block.7")
    with pytest.raises(UserError, match=f"hold the tensor {other}, for which"):
        beside(tensors | {other: tensors[name]}, config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bert"}, "model_type 'bert', but only 't5'"),
        ({"model_type": None}, "model_type None"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder False, but only True"),
        ({"feed_forward_proj": "swish"}, "feed_forward_proj 'swish'"),
        ({"num_decoder_layers": 0}, "decoder_layers is 0; it must be positive"),
        ({"eos_token_id": [1, 2]}, r"\[1, 2\] for eos_token_id"),
        ({"d_kv": None}, "None for d_kv"),
    ],
)
def test_what_is_not_supported_is_named(change, words):
    with pytest.raises(UserError, match=words):
        reader_config(published(KINDS["1.0"]) | change, {})


@pytest.mark.parametrize("token", [{"start_id": -1}, {"end_id": 10**6}])
def test_answers_begin_and_end_with_tokens_that_are_there(token):
    """Beyond the table of words another row would be read, silently."""
    with pytest.raises(UserError, match="begins or ends answers with token"):
        ReaderConfig(SIZES, 3, **token)
