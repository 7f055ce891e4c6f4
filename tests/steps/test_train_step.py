"""The training step: what it estimates, what it leaves alone, and that the mesh does not matter."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from corrector_jax import cache as caches
from corrector_jax import losses, metrics, optimizer
from corrector_jax.losses import ESTIMATORS
from corrector_jax.models.bert import BertConfig
from corrector_jax.models.corrector import Identity, Mlp
from corrector_jax.models.dual_encoder import DualEncoder, Encoder
from corrector_jax.negatives import Gated, InBatch, TwoLevel, Uniform
from corrector_jax.sharding import make_placement
from corrector_jax.state import init_corrector, init_state
from corrector_jax.steps.train_step import Method, task_loss, train_step
from corrector_jax.types import Batch, Draws
from tests import oracle

OWN = ["truncated", "single", "weighted"]


def partition(positive, pool, drawn):
    """Z_hat_i^- of `balanced`, told from its loss: log(exp s_i+ + Z_hat_i^-) - s_i+."""
    return jnp.expm1(losses.balanced(positive, pool, drawn)) * jnp.exp(positive)


FORMS = {**ESTIMATORS, "partition": partition}


def one_of(names, which):
    """The estimator of that number, so that one compilation serves them all."""

    def estimator(positive, pool, drawn):
        return jax.lax.switch(which, [FORMS[name] for name in names], positive, pool, drawn)

    return estimator


def random_like(tree, seed, scale):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, scale, x.shape), x.dtype), tree)


# The loss and its gradients, on a dual encoder whose embeddings are its parameters.

SIZE, DIM, DRAWS, BETA = 23, 4, 4, 4.0
KNOWN = [[0, 1], [5], [22, 3, 0], [6]]
FREE = oracle.Free()


def free_world(*, corrected, seed=0):
    """Parameters, Psi with the gate open, and a cache whose corrected rows are the fresh ones.

    With `corrected` False the corrector is exact no longer.
    """
    rng = np.random.default_rng(seed)
    stale = oracle.unit(rng, SIZE, DIM)
    psi = Gated(random_like(Mlp().init(jax.random.key(0), DIM), 1, 0.4), jnp.float32(1))
    fresh = Mlp().apply(psi.params, jnp.asarray(stale), 1.0)
    if not corrected:
        fresh = fresh + 0.3 * rng.normal(size=fresh.shape).astype(np.float32)
    params = {"queries": jnp.asarray(oracle.unit(rng, len(KNOWN), DIM)), "targets": fresh}
    place = make_placement(1)
    cache = oracle.filled(stale, place, block_rows=4)
    return params, psi, cache, oracle.row_numbers(SIZE, place, block_rows=4)


def free_method(estimator, *, shared=False, positives=False):
    place = make_placement(1)
    proposal = TwoLevel(DRAWS, BETA, Mlp(), block_rows=4, tile_rows=8, place=place)
    return Method(BETA, proposal, estimator, shared, positives, Mlp())


@functools.cache
def free_gradients(shared):
    """(which, params, psi, embeddings, cache, tokens, batch, key) -> loss, three gradients, ids."""
    names = ["truncated", "balanced", "partition"] if shared else OWN

    @functools.partial(jax.value_and_grad, argnums=(1, 2, 3), has_aux=True)
    def loss(which, params, psi, embeddings, cache, tokens, batch, key):
        cache = cache.replace(embeddings=embeddings)
        method = free_method(one_of(names, which), shared=shared)
        value, (chosen, *_) = task_loss(
            params, psi, cache, tokens, batch, key,
            model=FREE, method=method, place=make_placement(1),
        )  # fmt: skip
        return value, chosen.ids

    def many(which, params, psi, cache, tokens, batch, keys):
        def once(key):
            (value, ids), grads = loss(
                which, params, psi, cache.embeddings, cache, tokens, batch, key
            )
            return value, ids, grads

        return jax.lax.map(once, keys, batch_size=256)

    return oracle.jit(many, heavy=True), names


def evaluate(name, world, *, keys=256, shared=None, known=KNOWN, valid=None):
    """Over many keys: losses [keys], ids [keys, B, 1 + m], gradients by argument."""
    run, names = free_gradients(name in ("balanced", "partition") if shared is None else shared)
    # One width and two numbers of keys: each other shape would be compiled anew.
    batch = oracle.batch_of(known, width=SIZE, valid=valid)
    split = jax.random.split(jax.random.key(7), keys)
    return jax.device_get(run(names.index(name), *world, batch, split))


EVERY = [("truncated", False), ("single", False), ("weighted", False), ("truncated", True),
         ("balanced", True)]  # fmt: skip


@pytest.mark.parametrize(("name", "shared"), EVERY)
def test_the_task_loss_reaches_the_encoders_and_nothing_else(name, shared):
    world = free_world(corrected=False)
    _, _, (of_params, of_psi, of_cache) = evaluate(name, world, shared=shared)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(of_params))
    assert len(jax.tree.leaves(of_psi)) == 5  # the gate among them
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_psi))
    assert of_cache.shape == (256, SIZE + 1, DIM)
    assert not np.any(of_cache)


@functools.cache
def many_keys(name, corrected=True, keys=4096):
    world = free_world(corrected=corrected)
    values, ids, (grads, _, _) = evaluate(name, world, keys=keys)
    known = np.stack([np.array(rows + [-1] * (3 - len(rows))) for rows in KNOWN])
    params = jax.device_get(world[0])
    exact = oracle.dense_gradient(params["queries"], params["targets"], known[:, 0], known, BETA)
    return oracle.f64(values), ids, jax.tree.map(oracle.f64, grads), exact, (params, known)


def in_standard_errors(samples, exact):
    """|mean - exact| in standard errors, where the samples vary; elsewhere they must agree."""
    spread = samples.std(axis=0) / np.sqrt(len(samples))
    gap = np.abs(samples.mean(axis=0) - exact)
    assert (gap[spread < 1e-7] < 1e-5).all()
    return np.atleast_1d(gap / np.maximum(spread, 1e-7))[np.atleast_1d(spread) >= 1e-7]


@pytest.mark.parametrize("name", ["single", "weighted"])
def test_with_an_exact_corrector_the_gradient_is_unbiased(name):
    _, _, grads, exact, _ = many_keys(name)
    for leaf in ("queries", "targets"):
        assert in_standard_errors(grads[leaf], exact[leaf]).max() < 4


def test_with_an_exact_corrector_weighted_is_single_draw_for_draw():
    single, weighted = many_keys("single"), many_keys("weighted")
    assert np.array_equal(single[1], weighted[1])
    np.testing.assert_allclose(weighted[0], single[0], atol=1e-4)
    for leaf in ("queries", "targets"):
        np.testing.assert_allclose(weighted[2][leaf], single[2][leaf], atol=1e-4)


@pytest.mark.parametrize("corrected", [True, False])
def test_the_partition_function_of_balanced_is_unbiased(corrected):
    """Even where the corrector errs: the weights are those of what is drawn from."""
    values, _, _, _, (params, known) = many_keys("partition", corrected)
    _, log_z, _ = oracle.proposal(params["queries"], params["targets"], known, BETA)
    assert in_standard_errors(values, np.exp(log_z).mean())[0] < 4
    assert values.std() > 0.01 * np.exp(log_z).mean()


def size(gradients):
    return np.sqrt(sum((leaf**2).sum() for leaf in gradients.values()))


def bias(name, corrected=True):
    _, _, grads, exact, _ = many_keys(name, corrected)
    return size({leaf: grads[leaf].mean(axis=0) - exact[leaf] for leaf in exact}) / size(exact)


def test_balanced_is_nearly_unbiased_and_truncated_is_not():
    assert bias("balanced") < 0.02
    assert bias("truncated") > 0.1
    values, _, _, _, (params, known) = many_keys("truncated")
    scores = BETA * params["queries"] @ params["targets"].T
    positive = scores[np.arange(len(KNOWN)), known[:, 0]]
    wanted = oracle.dense_loss(positive, scores, oracle.is_known(known, SIZE)).mean()
    assert values.max() < wanted


def test_balanced_forgives_the_most_where_the_corrector_errs():
    assert bias("balanced", False) < 0.7 * bias("weighted", False)
    assert bias("weighted", False) < bias("single", False)


@pytest.mark.parametrize(("name", "shared"), EVERY)
def test_known_positives_are_in_neither_term(name, shared):
    world = free_world(corrected=False)
    _, ids, _ = evaluate(name, world, shared=shared)
    for query, rows in enumerate(KNOWN):
        assert not np.isin(ids[:, query, 1:], rows).any()
    _, _, (grads, _, _) = evaluate(name, world, shared=shared, known=[[0, 1, 3]] * 4)
    assert not np.any(grads["targets"][:, [1, 3]])
    assert np.abs(grads["targets"][:, 0]).max() > 1e-3


@pytest.mark.parametrize(("name", "shared"), EVERY)
def test_a_query_that_knows_every_target_weighs_nothing(name, shared):
    world = free_world(corrected=False)
    known = [list(range(SIZE)), [5], [22, 3, 0], [6]]
    value, ids, (grads, _, _) = evaluate(name, world, shared=shared, known=known)
    assert np.isfinite(value).all()
    assert not ids[:, 0].any()  # its labelled positive is 0, and so is what stands for no draw
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert not np.any(grads["queries"][:, 0])
    assert np.abs(grads["queries"][:, 1:]).max() > 1e-3
    everyone = [list(range(SIZE))] * 4
    value, _, (grads, _, _) = evaluate(name, world, shared=shared, known=everyone)
    assert not np.any(value)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A proposal whose draws are known beforehand: by query, the number of its row."""

    draws: ClassVar[int] = DRAWS
    independent: ClassVar[int] = DRAWS
    reads_cache: ClassVar[bool] = True
    drawn: Draws
    matrix: np.ndarray  # [B, N] log p_iy

    def draw(self, queries, psi, cache, batch, key):
        return jax.tree.map(lambda x: jnp.asarray(x)[: len(queries)], self.drawn)

    def log_prob(self, queries, psi, stale, drawn):
        return jnp.asarray(self.matrix)[: len(queries), jnp.asarray(self.drawn.ids).ravel()][
            :, : queries.shape[0] * DRAWS
        ]


@pytest.mark.parametrize(("name", "shared", "positives"),
    [(*form, form == ("truncated", True)) for form in EVERY])  # fmt: skip
def test_a_padded_query_changes_nothing(name, shared, positives):
    """A batch of four whose last query is padding, against the batch of three."""
    params, psi, cache, tokens = free_world(corrected=False)
    rng = np.random.default_rng(3)
    batch = oracle.batch_of(KNOWN, valid=[True, True, True, False])
    _logits, log_z, log_prob = oracle.proposal(
        params["queries"], params["targets"], batch.known, BETA
    )
    ids = np.stack([rng.choice(SIZE, DRAWS, p=np.exp(p)) for p in log_prob]).astype(np.int32)
    drawn = Draws(
        ids,
        np.take_along_axis(log_prob, ids, axis=1).astype(np.float32),
        np.ones(ids.shape, bool),
        log_z.astype(np.float32),
    )
    method = Method(
        BETA, Fixed(drawn, log_prob.astype(np.float32)), ESTIMATORS[name], shared, positives, Mlp()
    )

    @oracle.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, batch):
        value, (chosen, pool, *_) = task_loss(
            params, psi, cache, tokens, batch, jax.random.key(0),
            model=FREE, method=method, place=make_placement(1),
        )  # fmt: skip
        return value, (chosen.there, pool.valid)

    (padded, (there, valid)), of_padded = loss(params, batch)
    (short, _), of_short = loss(params, jax.tree.map(lambda x: x[:3], batch))
    assert not np.any(there[3])
    assert not np.any(valid[3])
    np.testing.assert_allclose(padded, short, rtol=1e-6)
    for leaf in ("queries", "targets"):
        np.testing.assert_allclose(of_padded[leaf], of_short[leaf], atol=1e-6)
    assert not np.any(of_padded["queries"][3])


def test_a_batch_of_padding_alone_is_harmless():
    value, _, (grads, _, _) = evaluate("balanced", free_world(corrected=True), valid=[False] * 4)
    assert not np.any(value)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_in_batch_is_the_softmax_over_the_batch_s_positives():
    """Without duplicates, and without the query's other known positives."""
    params, psi, _, tokens = free_world(corrected=False)
    known = [[0, 5], [5], [22, 3, 0], [5]]
    batch = oracle.batch_of(known)
    method = Method(BETA, InBatch(), losses.truncated, True, True, Identity())
    value, _ = oracle.jit(
        functools.partial(task_loss, model=FREE, method=method, place=make_placement(1))
    )(params, psi, None, tokens, batch, jax.random.key(0))
    scores = BETA * oracle.f64(params["queries"]) @ oracle.f64(params["targets"]).T
    others = [[22], [0, 22], [5], [0, 22]]
    wanted = [
        np.logaddexp(scores[i, rows[0]], oracle.log_sum_exp(scores[i, other])) - scores[i, rows[0]]
        for i, (rows, other) in enumerate(zip(known, others, strict=True))
    ]
    np.testing.assert_allclose(value, np.mean(wanted), rtol=1e-5)


# The whole step, on a BERT of one layer. One compilation for each strategy and mesh.

BERT = BertConfig(
    vocab_size=97, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_positions=8
)
MODEL = DualEncoder(Encoder(BERT))
N, BATCH, BLOCK, RING, EXTRA = 2003, 32, 8, 4, 8
SCALE = 8.0
STEPS = 80  # of the run that is to learn


@functools.cache
def corpus():
    """Token rows [N, 4] uint16 of two to four tokens, no two of them equal."""
    rng = np.random.default_rng(0)
    table = rng.integers(1, BERT.vocab_size, (N, 4))
    table[:, 0], table[:, 1] = 1 + np.arange(N) % 96, 1 + np.arange(N) // 96
    return np.where(np.arange(4) < rng.integers(2, 5, (N, 1)), table, 0).astype(np.uint16)


@functools.cache
def encoder_params():
    return random_like(jax.eval_shape(MODEL.init, jax.random.key(0)), 1, 0.3)


@functools.cache
def snapshots():
    """What the cache may start from: stale and fresh embeddings [N, 16]."""
    earlier = jax.tree.map(jnp.add, encoder_params(), random_like(encoder_params(), 2, 0.03))
    encode = oracle.jit(MODEL.encode_targets)
    return {
        "stale": np.asarray(encode(earlier, corpus())),
        "fresh": np.asarray(encode(encoder_params(), corpus())),
    }


def method_of(name, place, which):
    two_level = TwoLevel(DRAWS, SCALE, Mlp(), BLOCK, 256, place)
    return {
        "own": lambda: Method(SCALE, two_level, one_of(OWN, which), False, False, Mlp()),
        "balanced": lambda: Method(
            SCALE, two_level, losses.balanced, True, False, Mlp(), EXTRA, 1.0, 0.1
        ),
        "in_batch": lambda: Method(SCALE, InBatch(), losses.truncated, True, True, Identity()),
        "uniform": lambda: Method(
            SCALE, Uniform(DRAWS, N), losses.weighted, False, False, Identity()
        ),
    }[name]()


# Learning rates sit in the states, so that a test may change them without compiling again. Plain
# descent shows gradients as they are; Adam would blow up what is zero but for rounding.
TX = optax.inject_hyperparams(optax.sgd)(learning_rate=0.02)
CORRECTOR_TX = optax.inject_hyperparams(optax.adam)(learning_rate=3e-3)


class Step:
    """A strategy's compiled step on a mesh, and what it starts from."""

    def __init__(self, name, devices):
        self.place = make_placement(devices)
        self.uses_cache = name in ("own", "balanced")
        self.name = name

        def step(state, cache, tokens, batch, key, which):
            return train_step(
                state, cache, tokens, batch, key, model=MODEL,
                method=method_of(name, self.place, which),
                tx=TX, corrector_tx=CORRECTOR_TX, place=self.place,
            )  # fmt: skip

        everywhere, rows = self.place.everywhere, self.place.rows
        jitted = self.place.jit_step(step, (everywhere, rows, everywhere), donate=(0, 1))
        self.tokens = self.place_tokens()
        arguments = (*self.start(), self.tokens, self.batch(0), self.key(0), self.number(0))
        self.compiled = jitted.lower(*arguments).compile()

    def place_tokens(self):
        return caches.create_tokens(
            corpus(), fingerprint="", pad_id=0, block_rows=BLOCK, place=self.place
        )

    def start(self, *, psi=None, gate=0.0, rate=0.02, corrector_rate=3e-3, rows="stale"):
        corrector = Mlp() if self.uses_cache else Identity()
        extra = EXTRA if self.name == "balanced" else 0
        of_corrector = init_corrector(
            jax.random.key(1), corrector=corrector, tx=CORRECTOR_TX, dim=16,
            ring=RING if self.uses_cache else 0, rows=BATCH * (1 + DRAWS) + extra,
        ).replace(gate=jnp.float32(gate))  # fmt: skip
        if psi is not None:
            of_corrector = of_corrector.replace(params=random_like(of_corrector.params, psi, 0.2))
        of_corrector.opt_state.hyperparams["learning_rate"] = jnp.float32(corrector_rate)
        state = init_state(encoder_params(), of_corrector, tx=TX)
        state.opt_state.hyperparams["learning_rate"] = jnp.float32(rate)
        # Copied, for the step donates what it is given.
        state = self.place.put_everywhere(jax.tree.map(np.array, state))
        cache = None
        if self.uses_cache:
            cache = oracle.filled(snapshots()[rows], self.place, block_rows=BLOCK, pad=0.0)
        return state, cache

    def batch(self, number):
        rng = np.random.default_rng(100 + number)
        known = np.stack([rng.choice(N, 3, replace=False) for _ in range(BATCH)]).astype(np.int32)
        known[::2, 1:] = -1
        queries = corpus()[known[:, 0], ::-1].astype(np.int32)
        valid = np.arange(BATCH) < BATCH - 3
        return self.place.put_rows(Batch(queries, known[:, 0].copy(), known, valid))

    def key(self, number):
        return self.place.put_everywhere(jax.random.key(number))

    def number(self, which):
        return self.place.put_everywhere(np.int32(which))

    def run(self, steps=5, which=0, **start):
        state, cache = self.start(**start)
        measured = []
        for number in range(steps):
            state, cache, of_step = self.compiled(
                state, cache, self.tokens, self.batch(number), self.key(number), self.number(which)
            )
            measured.append(metrics.means(of_step))
        return state, cache, measured


step_of = functools.cache(Step)
# test_mesh.py runs every strategy on eight devices, those that are slow here among them.
ON_EIGHT = [
    *[("own", 0), ("own", 1), ("own", 2)],
    *[
        pytest.param(name, 0, marks=pytest.mark.slow)
        for name in ("balanced", "in_batch", "uniform")
    ],
]
OWN_AND_BALANCED = ["own", pytest.param("balanced", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("name", "which"), ON_EIGHT)
def test_five_steps_are_the_same_on_one_and_on_eight_devices(name, which):
    state, cache, measured = jax.device_get(step_of(name, 1).run(which=which))
    other, _, others = jax.device_get(step_of(name, 8).run(which=which))
    if cache is not None:
        # What was drawn: a stale row is read from its own place, bit for bit.
        assert np.array_equal(state.corrector.ring.stale, other.corrector.ring.stale)
        assert len(np.unique(state.corrector.ring.stale, axis=1)[0]) > 50
    for mine, its in zip(measured, others, strict=True):
        assert mine.keys() == its.keys()
        for metric in mine:
            assert mine[metric] == pytest.approx(its[metric], rel=2e-4, abs=1e-5), metric
    assert state.step == other.step == 5
    flat, flat_other = (jax.tree_util.tree_leaves_with_path(s) for s in (state, other))
    for (path, mine), (_, its) in zip(flat, flat_other, strict=True):
        np.testing.assert_allclose(
            mine, its, rtol=1e-3, atol=2e-5, err_msg=jax.tree_util.keystr(path)
        )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, encoder_params())
    assert max(jax.tree.leaves(moved)) > 5e-3


@pytest.mark.parametrize("name", OWN_AND_BALANCED)
@pytest.mark.parametrize("devices", [1, 8])
def test_state_and_cache_are_updated_in_place(name, devices):
    step = step_of(name, devices)
    state, cache = step.start()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    held += sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) // devices
    assert step.compiled.memory_analysis().alias_size_in_bytes == held
    step.compiled(state, cache, step.tokens, step.batch(0), step.key(0), step.number(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state, cache)))
    assert not step.tokens.ids.is_deleted()


def sizes(program):
    """Elements of every array in a compiled program."""
    shapes = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]", program)
    return {math.prod(int(n) for n in shape.split(",")) for shape in shapes}


@pytest.mark.parametrize("name", OWN_AND_BALANCED)
def test_nothing_of_size_queries_times_targets(name):
    whole = sizes(step_of(name, 1).compiled.as_text())
    assert N * 16 < max(whole) < BATCH * N  # the largest is the cache itself
    # On eight devices no device ever holds the cache of the others.
    assert max(sizes(step_of(name, 8).compiled.as_text())) < N * 16


@pytest.mark.parametrize("devices", [1, 8])
def test_no_round_trip_to_the_host(devices):
    program = step_of("balanced", devices).compiled.as_text().lower()
    assert "fusion" in program
    for word in ("callback", "infeed", "outfeed", " send(", " recv(", "send-done", "recv-done"):
        assert word not in program


def test_the_step_learns_and_measures():
    """The cache is never refreshed: drift grows, and the corrector takes most of it back."""
    state, _, measured = step_of("balanced", 1).run(steps=STEPS, rate=0.004, rows="fresh")
    first, last = measured[0], measured[-1]
    assert first["drift"] < 1e-9
    assert first["corrected_error"] < 1e-9
    assert last["drift"] > 0.01
    assert last["corrected_error"] < 0.3 * last["drift"]
    early = np.mean([m["loss"] for m in measured[:10]])
    assert np.mean([m["loss"] for m in measured[-10:]]) < 0.95 * early
    for number, of_step in enumerate(measured):
        assert of_step["known_share"] == 0
        assert of_step["cache_age"] == number  # written at step 0
        assert all(np.isfinite(list(of_step.values())))
        assert 0 <= of_step["accuracy"] <= 1
    assert last["kl_estimate"] > first["kl_estimate"]
    assert state.step == STEPS
    assert state.corrector.gate == 0  # opening it is the probe's business


def poisoned(tree):
    """The tree with one number that is none in its last leaf."""
    leaves, structure = jax.tree.flatten(jax.tree.map(np.array, tree))
    leaves[-1].flat[0] = np.nan
    return jax.tree.unflatten(structure, leaves)


@pytest.mark.parametrize("where", ["params", "corrector"])
@pytest.mark.parametrize("devices", [1, 8])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(where, devices):
    made = step_of("own", devices)
    state, cache = made.start(psi=3)
    corrector = state.corrector.replace(params=poisoned(state.corrector.params))
    state = {
        "params": state.replace(params=poisoned(state.params)),
        "corrector": state.replace(corrector=corrector),
    }[where]
    before = jax.tree.map(np.array, state)
    state, cache, measured = made.compiled(
        made.place.put_everywhere(before), cache,
        made.tokens, made.batch(0), made.key(0), made.number(0),
    )  # fmt: skip
    assert metrics.means(measured)["skipped"] == 1
    assert state.step == before.step + 1
    assert equal(state.replace(step=before.step), before)


def test_a_step_that_is_finite_is_not_skipped():
    measured = step_of("own", 1).run(steps=2)[2]
    assert [of_step["skipped"] for of_step in measured] == [0, 0]


def equal(a, b):
    return all(_same(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def _same(x, y):
    return np.array_equal(x, y, equal_nan=jnp.issubdtype(x.dtype, jnp.inexact))


def test_the_two_updates_leave_each_other_alone():
    step = step_of("balanced", 1)
    state, _, _ = step.run(steps=1)
    frozen, _, _ = step.run(steps=1, rate=0.0)
    assert equal(frozen.params, encoder_params())
    assert not equal(state.params, frozen.params)
    assert equal(state.corrector, frozen.corrector)
    still, _, _ = step.run(steps=1, corrector_rate=0.0)
    assert not equal(state.corrector.params, still.corrector.params)
    assert equal(state.params, still.params)


def test_a_closed_gate_hides_psi_from_selection_and_an_open_one_does_not():
    step = step_of("balanced", 1)
    state, _, _ = step.run(steps=1)
    closed, _, _ = step.run(steps=1, psi=5, gate=0.0)
    opened, _, _ = step.run(steps=1, psi=5, gate=1.0)
    newest = [s.corrector.ring.stale[-1] for s in (state, closed, opened)]
    assert equal(newest[0], newest[1])
    assert equal(state.params, closed.params)
    assert not equal(newest[0], newest[2])
    assert not equal(state.params, opened.params)


def test_the_key_decides_what_is_drawn():
    step = step_of("balanced", 1)
    drawn = []
    for number in (0, 0, 1):
        state, cache = step.start()
        state, _, _ = step.compiled(
            state, cache, step.tokens, step.batch(0), step.key(number), step.number(0)
        )
        stale = np.asarray(state.corrector.ring.stale[-1])
        drawn.append((stale[:-EXTRA].reshape(BATCH, 1 + DRAWS, 16), stale[-EXTRA:]))
    for own, of_drift in (drawn[0], drawn[2]):
        assert np.array_equal(own[:, 0], snapshots()["stale"][step.batch(0).positive])
        assert len(np.unique(of_drift, axis=0)) > 1
    assert equal(drawn[0], drawn[1])
    assert (drawn[0][0][:, 1:] != drawn[2][0][:, 1:]).mean() > 0.5
    assert (drawn[0][1] != drawn[2][1]).mean() > 0.5


def test_the_cache_is_returned_as_it_was():
    """Fresh rows are not written back: h maps one snapshot to now."""
    step = step_of("balanced", 8)
    _, cache, _ = step.run(steps=2)
    _, before = step.start()
    assert equal(cache, before)


def test_the_optimizer_of_the_package_serves_the_step():
    """Two accumulated steps move the encoders once, the corrector twice."""
    tx = optimizer.task_optimizer(
        optax.constant_schedule(0.1), clip=1.0, weight_decay=0.0, accumulate=2
    )
    corrector_tx = optimizer.corrector_optimizer(peak=1e-2, warmup=2)
    params, _psi, cache, tokens = free_world(corrected=False)
    place, batch = make_placement(1), oracle.batch_of(KNOWN)
    method = free_method(losses.weighted)
    of_corrector = init_corrector(jax.random.key(0), corrector=Mlp(), tx=corrector_tx, dim=DIM)

    @oracle.jit
    def step(state, key):
        return train_step(
            state, cache, tokens, batch, key,
            model=FREE, method=method, tx=tx, corrector_tx=corrector_tx, place=place,
        )  # fmt: skip

    states = [init_state(params, of_corrector, tx=tx)]
    for number in range(4):
        states.append(step(states[-1], jax.random.key(number))[0])
    moves = [not equal(a.params, b.params) for a, b in itertools.pairwise(states)]
    assert moves == [False, True, False, True]
    of_psi = [s.corrector.params for s in states]
    assert not any(equal(a, b) for a, b in itertools.pairwise(of_psi))
