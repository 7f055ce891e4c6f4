"""Memory traded for work, and numbers for bytes: what the switches of train.* and model.* change.

Chunks and rematerialisation change no result; bfloat16 changes it a little, int8 rows likewise.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corrector_jax import cache as caches
from corrector_jax import config as configs
from corrector_jax.models.bert import BertConfig
from corrector_jax.models.dual_encoder import DualEncoder, Encoder, rematerialised
from corrector_jax.negatives import Gated
from corrector_jax.program import make_program
from corrector_jax.sharding import make_placement
from corrector_jax.steps.train_step import task_loss
from corrector_jax.types import Batch, UserError
from tests import oracle

N, DRAWS, BLOCK = 53, 3, 4


def bert(layers=1, width=16):
    return BertConfig(
        vocab_size=97,
        hidden_size=width,
        num_layers=layers,
        num_heads=2,
        intermediate_size=2 * width,
        max_positions=32,
    )


def config_of(strategy="stale", **changes):
    config = configs.default()
    keys = {
        "strategy": strategy,
        "model.weights": "random",
        "model.beta": 5.0,
        "negatives.draws": DRAWS,
        "negatives.block_rows": BLOCK,
        "cache.tile_rows": 2 * BLOCK,
        "train.batch_size": 8,
        "train.warmup": 2,
    }
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict(keys | changes)
    configs.validate(config)
    return config


def program_of(config, place, layers=1):
    return make_program(config, Encoder(bert(layers), dtype=config.model.dtype), N, place)


def numbers_like(tree, seed=0, scale=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, scale, x.shape).astype(x.dtype), tree)


@functools.cache
def texts(count, length=6):
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 97, (count, length))
    there = np.arange(length) < rng.integers(2, length + 1, (count, 1))
    return np.where(there, tokens, 0).astype(np.int32)


def assert_close(tree, other, **tolerance):
    flat, its = (jax.tree_util.tree_leaves_with_path(t) for t in (tree, other))
    for (path, x), (_, y) in zip(flat, its, strict=True):
        np.testing.assert_allclose(x, y, **tolerance, err_msg=jax.tree_util.keystr(path))


def cosine(tree, other):
    x, y = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(t)]).astype(np.float64)
        for t in (tree, other)
    )
    return x @ y / np.linalg.norm(x) / np.linalg.norm(y)


# Chunks.


@pytest.mark.parametrize(
    ("mesh", "count", "size", "seen"),
    [
        ((1, 1, 1), 10, 5, 5),
        ((1, 1, 1), 10, 4, 4),  # does not divide
        ((1, 1, 1), 11, 1, 1),
        ((1, 1, 1), 10, 10, 10),
        ((1, 1, 1), 10, 64, 10),
        ((8, 1, 1), 40, 16, 16),  # five for each device, two at a time
        ((8, 1, 1), 24, 8, 8),
        ((8, 1, 1), 20, 8, 20),  # devices do not divide them
        ((8, 2, 2), 24, 8, 8),  # over four shares
        ((8, 4, 1), 8, 16, 8),
    ],
)
def test_chunks_are_the_function_and_its_gradient(mesh, count, size, seen):
    devices, fsdp, tensor = mesh
    place = make_placement(devices, fsdp=fsdp, tensor=tensor)
    shapes = set()

    def function(params, x):
        shapes.add(x.shape[0])
        return jnp.tanh(x @ params["w"]) * (x * x).sum(axis=1, keepdims=True)

    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 5)).astype(np.float32)}
    x = rng.normal(size=(count, 3)).astype(np.float32)
    direction = rng.normal(size=(count, 5)).astype(np.float32)

    def both(function):
        def loss(params, x):
            y = function(params, x)
            return (y * direction).sum(), y

        grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return oracle.jit(grads)(params, place.put_everywhere(x))

    plain = both(function)
    shapes.clear()
    chunked = both(place.in_chunks(function, size))
    assert shapes == {seen}
    assert_close(plain, chunked, rtol=2e-5, atol=1e-5)


def test_chunks_of_a_mesh_stay_where_they_are():
    """Each device goes over its own examples: no text and no embedding crosses the network."""
    place = make_placement(8)
    encode = place.in_chunks(lambda params, x: jnp.tanh(x * params), 16)
    x = place.put_rows(np.ones((80, 4), np.float32))
    compiled = oracle.jit(encode).lower(place.put_everywhere(np.float32(2)), x).compile()
    program = compiled.as_text()
    assert " while(" in program
    for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert word not in program
    y = compiled(place.put_everywhere(np.float32(2)), x)
    assert y.sharding.is_equivalent_to(place.rows, 2)


WAYS = {
    "remat": {"train__remat": True},
    "both": {"train__chunk": 16, "train__remat": True},
}


@functools.cache
def of_encoders(devices, way, shared):
    """Embeddings and gradients of both towers, 24 targets and 8 queries."""
    place = make_placement(devices, fsdp=2 if devices > 1 else 1)
    config = config_of(model__shared_towers=shared, **WAYS.get(way, {}))
    model = program_of(config, place).model
    params = model.from_encoder_params(
        numbers_like(jax.eval_shape(model.init, jax.random.key(0)))["shared" if shared else "query"]
    )
    if not shared:
        params["target"] = numbers_like(params["target"], seed=5)
    along = np.random.default_rng(3).normal(size=(32, 16)).astype(np.float32)

    def loss(params):
        queries = model.encode_queries(params, texts(32)[:8])
        targets = model.encode_targets(params, texts(32)[8:])
        found = jnp.concatenate([queries, targets])
        return (found * along).sum(), found

    return jax.device_get(oracle.jit(jax.value_and_grad(loss, has_aux=True))(params))


@pytest.mark.parametrize(
    ("devices", "way", "shared"),
    [
        pytest.param(1, "remat", True, marks=pytest.mark.slow),
        pytest.param(1, "both", False, marks=pytest.mark.slow),
        (8, "both", False),
    ],
)
def test_chunks_and_remat_change_neither_embeddings_nor_gradients(devices, way, shared):
    ((_, plain), gradient) = of_encoders(1, "plain", shared)
    ((_, found), its) = of_encoders(devices, way, shared)
    np.testing.assert_allclose(plain, found, atol=2e-6)
    top = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    assert_close(gradient, its, rtol=1e-4, atol=2e-5 * top)
    if not shared:
        assert all(
            np.any(leaf) for tower in its.values() for leaf in tower["layer_0"]["up"].values()
        )


def gradient_of(wrap):
    """Of a deeper encoder: its shapes, and the encoding as a function of parameters and texts."""
    model = DualEncoder(Encoder(bert(layers=3, width=32)), wrap=wrap)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return model.encode_targets, params, jax.ShapeDtypeStruct((64, 32), jnp.int32)


def test_the_smaller_the_chunk_the_less_is_held_at_once():
    def held(size):
        encode, *shapes = gradient_of(lambda e: make_placement(1).in_chunks(e, size))
        gradient = oracle.jit(jax.grad(lambda params, x: encode(params, x).sum()))
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    whole, half, eighth = (held(size) for size in (64, 32, 8))
    assert half < 0.7 * whole
    assert eighth < 0.4 * half


def test_remat_keeps_less_for_the_way_back():
    # Of the traced program: XLA for CPU computes nothing twice, whatever it is asked.
    def kept(wrap):
        encode, *shapes = gradient_of(wrap)
        back = jax.eval_shape(lambda p, x: jax.vjp(lambda p: encode(p, x), p)[1], *shapes)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(back))

    plain, remat = kept(lambda encode: encode), kept(rematerialised)
    assert remat < 0.5 * plain
    # A chunk keeps its texts alone.
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(np.zeros((64, 32), np.int32)))
    chunks = kept(lambda encode: make_placement(1).in_chunks(rematerialised(encode), 8))
    of_params = sum(x.size * 4 for x in jax.tree.leaves(gradient_of(rematerialised)[1]))
    assert chunks <= of_params + whole


def test_fsdp_splits_examples_as_data_does():
    """It gathers the parameters: what a device holds of the examples is as little as by `data`."""

    def held(fsdp):
        program = program_of(config_of(), make_placement(8, fsdp=fsdp), layers=2)
        place, model = program.place, program.model
        params = jax.eval_shape(model.init, jax.random.key(0))
        shardings = place.parameters(params)
        params = jax.tree.map(
            lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), params, shardings
        )
        x = jax.ShapeDtypeStruct((128, 32), jnp.int32, sharding=place.examples)
        gradient = oracle.jit(
            jax.grad(lambda params, x: model.encode_targets(params, x).sum()),
            out_shardings=shardings,
        )
        return gradient.lower(params, x).compile().memory_analysis().temp_size_in_bytes

    assert held(8) < 1.5 * held(1)


@pytest.mark.parametrize("key", ["batch_size", "chunk"])
def test_examples_that_shares_do_not_divide_are_refused(key):
    place = make_placement(8, tensor=2)  # four shares
    with pytest.raises(UserError, match=rf"config.train.{key} is 10, .* write a multiple of 4"):
        program_of(config_of(**{f"train__{key}": 10}), place).require_shares()
    program_of(config_of(**{f"train__{key}": 12}), place).require_shares()


# Fewer bytes for a number.


def world(program):
    """The arguments of `task_loss` but for parameters and key."""
    place = program.place
    tokens = caches.create_tokens(
        texts(N).astype(np.uint16), fingerprint="", pad_id=0, block_rows=BLOCK, place=place
    )
    known = np.arange(8, dtype=np.int32)[:, None]
    batch = Batch(texts(N)[:8, ::-1].copy(), known[:, 0].copy(), known, np.ones(8, bool))
    cache = None
    if program.uses_cache:
        ids = np.arange(N, dtype=np.int32)
        rows = oracle.unit(np.random.default_rng(7), N, 16)
        write = oracle.jit(functools.partial(caches.write, place=place))
        cache = write(program.empty_cache(), ids, rows, np.int32(0))
    return cache, tokens, place.put(batch, place.examples)


@functools.cache
def of_task(strategy, layers=1, **changes):
    program = program_of(config_of(strategy, **changes), make_placement(1), layers)
    params = numbers_like(jax.eval_shape(program.model.init, jax.random.key(0)))
    psi = jax.eval_shape(lambda: program.init_corrector(0).params)
    psi = Gated(numbers_like(psi, scale=0.1), jnp.float32(1))
    loss = functools.partial(
        task_loss, model=program.model, method=program.method, place=program.place
    )
    cache, tokens, batch = world(program)
    found = oracle.jit(jax.value_and_grad(loss, has_aux=True))(
        params, psi, cache, tokens, batch, jax.random.key(4)
    )
    (value, (chosen, *_)), gradient = jax.device_get(found)
    return value, chosen, gradient


def test_bfloat16_is_close_to_float32():
    value, chosen, gradient = of_task("uniform", layers=2)
    rounded, its, its_gradient = of_task("uniform", layers=2, model__dtype="bfloat16")
    assert np.array_equal(chosen.ids, its.ids)
    assert rounded != value
    assert rounded == pytest.approx(value, rel=0.01)
    assert cosine(gradient, its_gradient) >= 0.99
    # Parameters, their gradients and embeddings are float32 nevertheless.
    assert {leaf.dtype for leaf in jax.tree.leaves(its_gradient)} == {np.dtype(np.float32)}
    assert its.fresh.dtype == np.float32


@pytest.mark.parametrize("strategy", [pytest.param("stale", marks=pytest.mark.slow), "corrected"])
def test_int8_rows_are_close_to_float32(strategy):
    value, chosen, gradient = of_task(strategy)
    rounded, its, its_gradient = of_task(strategy, cache__dtype="int8")
    assert np.array_equal(chosen.ids, its.ids)  # no draw was so close
    bound = np.abs(chosen.stale).max(axis=-1, keepdims=True) / 254
    assert (np.abs(chosen.stale - its.stale) <= bound * 1.001).all()
    assert np.any(chosen.stale != its.stale)
    np.testing.assert_allclose(chosen.draws.log_z, its.draws.log_z, atol=0.02)
    np.testing.assert_allclose(chosen.draws.log_prob, its.draws.log_prob, atol=0.05)
    assert rounded == pytest.approx(value, rel=0.01)
    assert cosine(gradient, its_gradient) >= 0.999
