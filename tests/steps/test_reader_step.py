"""Learning from answers: who is moved, what is read, and that the mesh does not matter.

docs/reader.md has the table of gradients that is asserted here.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from corrector_jax import cache as caches
from corrector_jax import config as configs
from corrector_jax import metrics, rng
from corrector_jax.models.bert import BertConfig
from corrector_jax.models.corrector import Mlp
from corrector_jax.models.dual_encoder import Encoder
from corrector_jax.models.reader import Reader, ReaderConfig, pack
from corrector_jax.models.t5 import T5Config
from corrector_jax.negatives import Gated, TopK
from corrector_jax.program import make_program
from corrector_jax.reader_losses import RETRIEVER_LOSSES
from corrector_jax.sharding import make_placement
from corrector_jax.steps import selection
from corrector_jax.steps.method import Method
from corrector_jax.steps.reader_step import Answering, Tables, answer_loss, given_loss
from corrector_jax.types import Asked, Batch, Draws
from tests import oracle

SIZE, DIM, BETA, BATCH = 9, 4, 4.0, 4
SIZES = T5Config(40, 16, 1, 2, 8, 24, num_buckets=8, max_distance=12, max_positions=32)
READER = Reader(ReaderConfig(SIZES, 1, start_id=0, end_id=5))
FREE, PLACE = oracle.Free(), make_placement(1)
VALID = [True, True, True, False]
KINDS = {
    name: functools.partial(RETRIEVER_LOSSES[name.split(",")[0]], unit=name.split(",")[1])
    for name in ("pdist,token", "emdr2,token", "marginal,token", "marginal,sequence")
}


def random_like(tree, seed, scale):
    numbers = np.random.default_rng(seed)
    return jax.tree.map(lambda x: numbers.normal(0, scale, x.shape).astype(x.dtype), tree)


def texts(shape, least, seed):
    """Random tokens [*shape, T] above the end token, of `least` tokens or more, padded."""
    numbers = np.random.default_rng(seed)
    tokens = numbers.integers(6, SIZES.vocab_size, shape).astype(np.int32)
    return np.where(
        np.arange(shape[-1]) < numbers.integers(least, shape[-1] + 1, (*shape[:-1], 1)), tokens, 0
    )


PASSAGES, QUESTIONS = texts((SIZE, 6), 2, 0), texts((BATCH, 5), 1, 1)
ANSWERS = np.array([[7, 8, 5], [9, 5, 0], [11, 12, 5], [7, 5, 0]], np.int32)


@functools.cache
def world():
    """Parameters, Psi with the gate open, a cache that is off, and tables."""
    numbers = np.random.default_rng(3)
    stale = oracle.unit(numbers, SIZE, DIM)
    psi = Gated(random_like(Mlp().init(jax.random.key(0), DIM), 1, 0.4), jnp.float32(1))
    reader = random_like(jax.eval_shape(READER.init, jax.random.key(0)), 2, 0.4)
    fresh = stale + 0.3 * numbers.normal(size=stale.shape).astype(np.float32)
    params = {"queries": oracle.unit(numbers, BATCH, DIM), "targets": fresh, "reader": reader}
    tables = Tables(
        oracle.row_numbers(SIZE, PLACE, block_rows=4),
        caches.create_tokens(PASSAGES, fingerprint="", pad_id=0, block_rows=4, place=PLACE),
    )
    return params, psi, oracle.filled(stale, PLACE, block_rows=4), tables


def batch_of(valid=VALID, known=()):
    batch = oracle.batch_of([list(rows) for rows in known] or [[]] * BATCH, valid=valid)
    return batch._replace(asked=Asked(QUESTIONS, ANSWERS))


@functools.cache
def compiled():
    """(which, params, psi, embeddings, cache, tables, batch, key) -> all that the tests look at.

    Passages read are all there are, K = N. The gradients are of the retriever's part of the loss
    and of the reader's: each program takes long to compile, and so this is the only one.
    """

    def loss(params, psi, embeddings, which, cache, tables, batch, key):
        def of(scores, reading):
            return jax.lax.switch(which, list(KINDS.values()), scores, reading)

        value, (chosen, pool, _, measured) = answer_loss(
            params, psi, cache.replace(embeddings=embeddings), tables, batch, key,
            model=FREE, answering=Answering(READER, of, 1.0, SIZE, passage_len=6), method=METHOD,
            place=PLACE,
        )  # fmt: skip
        parts = [measured[name].total for name in ("retriever_loss", "reader_loss")]
        return jnp.stack(parts), (value, chosen, pool, measured)

    def everything(which, params, psi, cache, tables, batch, key):
        given = (params, psi, cache.embeddings)
        _, back, made = jax.vjp(
            lambda *moved: loss(*moved, which, cache, tables, batch, key), *given, has_aux=True
        )
        return made, [back(jnp.eye(2)[part]) for part in range(2)]

    return oracle.jit(everything)


METHOD = Method(
    BETA, TopK(SIZE, BETA, Mlp(), 4, 8, PLACE), RETRIEVER_LOSSES["pdist"], False, False, Mlp()
)


def run(name, batch=None):
    """The loss and what it was made of; gradients by part, in params, psi and embeddings."""
    params, psi, cache, tables = world()
    which = list(KINDS).index(name)
    batch = batch_of() if batch is None else batch
    key = jax.random.key(4)
    return jax.device_get(compiled()(which, params, psi, cache, tables, batch, key))


def largest(tree):
    return max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))


def moves(tree):
    return all(np.any(leaf) for leaf in jax.tree.leaves(tree))


# Who is moved.


@pytest.mark.parametrize("name", KINDS)
def test_gradients_reach_exactly_whom_they_should(name):
    """The table of docs/reader.md."""
    _, (of_retriever, of_reader) = run(name)
    params, psi, cache = of_retriever
    assert np.abs(params["queries"][:3]).max(axis=1).min() > 1e-5
    assert np.abs(params["targets"]).max(axis=1).min() > 1e-7
    assert moves(params["reader"]) == (largest(params["reader"]) > 0) == ("marginal" in name)
    assert largest(psi) == 0.0
    assert cache.shape == (12, DIM)
    assert not np.any(cache)
    params, psi, cache = of_reader
    assert moves(params["reader"])
    assert largest((params["queries"], params["targets"], psi, cache)) == 0.0


def test_no_gradient_reaches_a_reader_that_does_not_learn():
    params, psi, cache, tables = world()
    answering = Answering(READER, KINDS["marginal,token"], 0.0, SIZE, passage_len=6, learns=False)

    def loss(params):
        return answer_loss(
            params, psi, cache, tables, batch_of(), jax.random.key(4),
            model=FREE, answering=answering, method=METHOD, place=PLACE,
        )[0]  # fmt: skip

    found = jax.device_get(oracle.jit(jax.grad(loss))(params))
    (_, (of_retriever, _)) = run("marginal,token")
    assert largest(found["reader"]) == 0.0
    wanted = of_retriever[0]["queries"] / 3  # of the sum over three valid queries
    np.testing.assert_allclose(found["queries"], wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("key", ["reader__learns", "reader__moves"])
def test_what_does_not_learn_from_answers_stays_where_it_is(key):
    """A reader moves in given steps all the same; a frozen retriever never."""
    word = {"reader__learns": False, "reader__moves": "none"}[key]
    config = config_of(**{key: word}, train__weight_decay=0.1)
    program = make_program(config, Encoder(BERT), N, PLACE, READER)
    state = started(program)
    grads = jax.tree.map(jnp.ones_like, state.params)
    moved = {}
    for name in ("given_tx", "tx"):
        updates, kept = getattr(program, name).update(grads, state.opt_state, state.params)
        assert jax.tree.structure(kept) == jax.tree.structure(state.opt_state)
        moved[name] = {top: largest(tree) > 0 for top, tree in updates.items()}
    towers = moved["tx"].keys() - {"reader"}
    assert moved["given_tx"] == dict.fromkeys(towers, False) | {"reader": True}
    of_reader = key == "reader__moves"
    assert moved["tx"] == dict.fromkeys(towers, not of_reader) | {"reader": of_reader}


def test_the_reader_s_own_loss_is_that_of_all_passages_at_once():
    (value, chosen, _, measured), _ = run("pdist,token")
    params, *_ = world()
    text = np.stack([[packed(q, PASSAGES[y]) for y in rows]
                     for q, rows in zip(QUESTIONS, chosen.ids, strict=True)])  # fmt: skip
    found = oracle.f64(fuse(READER, params["reader"], text, ANSWERS))
    wanted = -(found.sum(axis=1) / (ANSWERS != 0).sum(axis=1))[:3]
    measured = metrics.means(measured)
    np.testing.assert_allclose(measured["reader_loss"], wanted.mean(), rtol=1e-5)
    total = measured["reader_loss"] + measured["retriever_loss"]
    np.testing.assert_allclose(value, total, rtol=1e-5)


def test_what_is_no_part_of_the_loss_is_not_logged():
    def logged(weight, *given):
        answering = Answering(READER, RETRIEVER_LOSSES["pdist"], weight, SIZE, passage_len=6)
        return answer_loss(
            *given, model=FREE, answering=answering, method=METHOD, place=PLACE
        )[1][3]  # fmt: skip

    given = (*world(), batch_of(), jax.random.key(4))
    without, of_both = (
        jax.eval_shape(functools.partial(logged, weight), *given) for weight in (0.0, 1.0)
    )
    assert of_both.keys() - without.keys() == {"reader_loss"}


@functools.partial(oracle.jit, static_argnums=0)
def fuse(reader, tree, text, answer):
    return reader.fused(tree, reader.encode(tree, text), answer)


def packed(question, passage):
    """Question and passage one after another, in plain words."""
    tokens = [int(t) for t in [*question, *passage] if t]
    return np.array(tokens + [0] * (len(question) + len(passage) - len(tokens)), np.int32)


def test_packing_leaves_no_padding_in_between():
    passages = np.repeat(PASSAGES[None, :4], BATCH, axis=0)
    found = np.asarray(oracle.jit(functools.partial(pack, pad_id=0))(QUESTIONS, passages))
    for i, question in enumerate(QUESTIONS):
        for j in range(4):
            assert found[i, j].tolist() == packed(question, PASSAGES[j]).tolist()


@functools.partial(oracle.jit, static_argnums=0)
def alone(reader, tree, text, answer):
    return reader.each(tree, reader.encode(tree, text[:, None]), answer)[:, 0]


@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_marginal_over_everything_is_the_sum_over_all_passages(unit):
    """S(x) = all N: -log sum_y P(y given x) P(o given x, y), one passage at a time."""
    (_, chosen, _, measured), _ = run(f"marginal,{unit}")
    assert all(sorted(rows) == list(range(SIZE)) for rows in chosen.ids.tolist())
    params, *_ = world()
    each = []
    for query in range(3):
        text = np.stack([packed(QUESTIONS[query], passage) for passage in PASSAGES])
        answer = np.repeat(ANSWERS[query : query + 1], SIZE, axis=0)
        likelihood = oracle.f64(alone(READER, params["reader"], text, answer))
        likelihood = likelihood[:, ANSWERS[query] != 0]
        scores = BETA * oracle.f64(params["targets"]) @ oracle.f64(params["queries"][query])
        prior = np.exp(scores - oracle.log_sum_exp(scores))
        if unit == "sequence":
            each.append(-np.log((prior * np.exp(likelihood.sum(axis=1))).sum()))
        else:
            each.append(-np.log((prior[:, None] * np.exp(likelihood)).sum(axis=0)).mean())
    found = metrics.means(measured)["retriever_loss"]
    np.testing.assert_allclose(found, np.mean(each), rtol=1e-4)


# What is read.


def test_the_best_by_corrected_score_are_read():
    (_, chosen, pool, measured), _ = run("pdist,token")
    params, psi, cache, _ = world()
    corrected = oracle.mlp(psi.params, oracle.f64(cache.embeddings[:SIZE]), normalize=True)
    scores = oracle.f64(params["queries"]) @ corrected.T
    assert chosen.ids.tolist() == np.argsort(-scores, axis=1).tolist()
    fresh = BETA * oracle.f64(params["queries"]) @ oracle.f64(params["targets"]).T
    np.testing.assert_allclose(pool.scores, np.take_along_axis(fresh, chosen.ids, 1), rtol=1e-4)
    assert chosen.there.tolist() == [[valid] * SIZE for valid in VALID]
    assert measured["agreement"].weight == 3


@pytest.mark.parametrize("name", ["pdist,token", "marginal,sequence"])
def test_what_stands_in_a_padded_query_changes_nothing(name):
    (value, *_), grads = run(name)
    batch = batch_of()
    tokens = np.array([[0], [1], [2], [0]], np.int32)
    other = np.array([[8, 5, 0]], np.int32)
    batch = batch._replace(
        query_tokens=tokens,
        asked=Asked(np.roll(QUESTIONS, 1, 0)[[1, 2, 3, 1]], np.concatenate([ANSWERS[:3], other])),
    )
    (same, *_), of_same = run(name, batch)
    assert value == same != 0
    for part, its in zip(grads, of_same, strict=True):
        assert equal(part, its)
        assert not np.any(part[0]["queries"][3])


def test_a_batch_of_padding_alone_is_harmless():
    (value, *_), grads = run("pdist,token", batch_of(valid=[False] * BATCH))
    assert value == 0.0
    assert largest(grads) == 0.0


def test_positives_are_not_looked_at():
    """Retrieval is learned through answers alone."""
    (blind, *_), of_blind = run("pdist,token")
    knowing = batch_of()._replace(positive=np.array([3, 5, 2, 0], np.int32))
    (value, *_), grads = run("pdist,token", knowing)
    assert value == blind
    assert equal(grads, of_blind)


def test_given_passages_are_the_positive_and_others_that_are_not():
    params, _, _, tables = world()
    batch = batch_of(known=[[3, 5], [0], [8, 1], [6]])
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Watching:
        config = READER.config

        def encode(self, tree, text):
            seen.append(text)

        def fused(self, tree, passages, answer):
            return -jnp.ones(answer.shape)

    answering = Answering(Watching(), None, 1.0, SIZE, passage_len=6, given=3)
    value = given_loss(
        params["reader"], tables, batch, jax.random.key(1), answering=answering, place=PLACE
    )
    (text,) = map(np.asarray, seen)
    for query, known in enumerate([[3, 5], [0], [8, 1]]):
        rows = [
            [y for y in range(SIZE) if np.array_equal(packed(QUESTIONS[query], PASSAGES[y]), one)]
            for one in text[query]
        ]
        assert rows[0] == [known[0]]
        assert all(len(found) == 1 and found[0] not in known for found in rows[1:])
    assert not np.any(text[3])  # padding
    assert value == 1.0


def test_of_more_the_best_by_fresh_score_are_kept():
    params, _, _, tables = world()
    ids = np.array([[4, 0, 7, 8, 1]] * BATCH, np.int32)
    valid = np.array([[True, False, True, True, True]] * BATCH)
    zeros = np.zeros(ids.shape, np.float32)
    draws = Draws(ids, zeros, valid, zeros[:, 0])
    fresh = oracle.f64(params["queries"]) @ oracle.f64(params["targets"]).T
    for count in (2, 5):
        found = selection.rerank(
            params, jnp.asarray(params["queries"]), draws, tables.targets,
            count=count, model=FREE, place=PLACE,
        )  # fmt: skip
        assert np.asarray(found.valid).tolist() == [[place < 4 for place in range(count)]] * BATCH
        for query, rows in enumerate(np.asarray(found.ids)):
            wanted = sorted([4, 7, 8, 1], key=lambda y: -fresh[query, y])
            assert rows[:4].tolist() == wanted[:count]


# The whole step of a configuration, on meshes.

N, BLOCK, ROWS = 61, 4, 8
BERT = BertConfig(
    vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_positions=8
)
MESHES = {"1x1x1": (1, 1, 1), "8x1x1": (8, 1, 1), "2x2x2": (8, 2, 2)}


def config_of(**changes):
    config = configs.default()
    keys = {
        "model.weights": "random",
        "model.beta": 6.0,
        "cache.tile_rows": 16,
        "corrector.probe_every": 1,
        "corrector.warmup": 2,
        "negatives.block_rows": BLOCK,
        "reader.weights": "random",
        "reader.passages": 3,
        "reader.rerank": 5,
        "reader.given_steps": 2,
        "reader.given_share": 0.5,
        "reader.given": 2,
        "reader.learning_rate": 3e-3,
        "reader.warmup": 1,
        "reader.passage_max_len": 6,
        "train.batch_size": ROWS,
        "train.steps": 20,
        "train.warmup": 2,
        "train.learning_rate": 3e-3,
    }
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict(keys)
    configs.validate(config)
    return config


def started(program):
    """Step 0 from parameters large enough to tell texts apart."""
    shapes = jax.eval_shape(Encoder(BERT).init, jax.random.key(0), np.zeros((1, 1), np.int32))
    reader = random_like(jax.eval_shape(READER.init, jax.random.key(0)), 7, 0.3)
    return program.start(random_like(shapes["params"], 6, 0.3), reader)


@functools.cache
def steps_of(mesh):
    """States after each of two given steps and two that answer, and their metrics."""
    devices, fsdp, tensor = MESHES[mesh]
    place = make_placement(devices, fsdp=fsdp, tensor=tensor)
    program = make_program(config_of(), Encoder(BERT), N, place, READER)
    # Plain descent shows gradients as they are, and its state is the gradient itself.
    tx = optax.chain(optax.trace(0.0), optax.sgd(0.05))
    program = dataclasses.replace(program, tx=tx, given_tx=tx)
    place = program.place
    numbers = np.random.default_rng(5)
    corpus = numbers.integers(6, 40, (N, 6)).astype(np.uint16)

    def table(rows):
        return caches.create_tokens(rows, fingerprint="", pad_id=0, block_rows=BLOCK, place=place)

    tables = Tables(table(corpus[:, :4]), table(corpus))
    state = started(program)
    cache = oracle.filled(oracle.unit(numbers, N, 16), place, block_rows=BLOCK)
    seen, measured = [place.fetch(state)], []
    stages = program.stages()
    first, second = (
        stage.step.lower(state, cache, tables, *given(place, 0)).compile() for stage in stages
    )
    for number in range(4):
        step = first if number < stages[1].start else second
        state, cache, of_step = step(state, cache, tables, *given(place, number))
        seen.append(place.fetch(state))
        measured.append(metrics.means(jax.device_get(of_step)))
    return seen, measured, stages


def given(place, number):
    numbers = np.random.default_rng(20 + number)
    positive = numbers.integers(0, N, ROWS).astype(np.int32)
    batch = Batch(
        query_tokens=numbers.integers(6, 40, (ROWS, 4)).astype(np.int32),
        positive=positive,
        known=positive[:, None],
        valid=np.arange(ROWS) < ROWS - 1,
        asked=Asked(
            numbers.integers(6, 40, (ROWS, 4)).astype(np.int32),
            np.concatenate(
                [numbers.integers(6, 40, (ROWS, 2)), np.full((ROWS, 1), 5)], axis=1
            ).astype(np.int32),
        ),
    )
    key = place.put_everywhere(rng.key(0, "step", number))
    return place.put(batch, place.examples), key


def towers(state):
    return {name: tree for name, tree in state.params.items() if name != "reader"}


def equal(tree, other):
    return all(map(np.array_equal, *map(jax.tree.leaves, (tree, other))))


@pytest.mark.parametrize("mesh", [pytest.param("8x1x1", marks=pytest.mark.slow), "2x2x2"])
def test_the_steps_are_the_same_on_every_mesh(mesh):
    (one, measured, _), (other, its, _) = steps_of("1x1x1"), steps_of(mesh)
    for mine, theirs in zip(measured, its, strict=True):
        assert mine.keys() == theirs.keys()
        assert mine["skipped"] == 0
        for metric in mine:
            assert mine[metric] == pytest.approx(theirs[metric], rel=5e-4, abs=2e-5), metric
    for state, its_state in zip(one[1:], other[1:], strict=True):
        gradient, its_gradient = (s.opt_state[0].trace for s in (state, its_state))
        for part in gradient:
            top = largest(gradient[part])
            flat = jax.tree_util.tree_leaves_with_path(gradient[part])
            for (path, x), y in zip(flat, jax.tree.leaves(its_gradient[part]), strict=True):
                np.testing.assert_allclose(
                    x, y, rtol=1e-3, atol=1e-4 * top + 1e-12, err_msg=f"{part} {path}"
                )
    assert largest(one[-1].opt_state[0].trace["reader"]) > 1e-3


def test_given_steps_move_the_reader_alone_and_the_others_both():
    states, measured, _ = steps_of("1x1x1")
    for before, after in ((0, 1), (1, 2)):
        assert equal(towers(states[before]), towers(states[after]))
        assert equal(states[before].corrector, states[after].corrector)
        assert not equal(states[before].params["reader"], states[after].params["reader"])
    for before, after in ((2, 3), (3, 4)):
        assert not equal(towers(states[before]), towers(states[after]))
        assert not equal(states[before].params["reader"], states[after].params["reader"])
        assert not equal(states[before].corrector.params, states[after].corrector.params)
    assert "drift" not in measured[0]
    assert measured[2]["drift"] > measured[2]["corrected_error"] * 0.5 > 0


def test_the_ledger_of_a_step_counts_what_is_encoded():
    *_, stages = steps_of("1x1x1")
    assert [stage[2:] for stage in stages] == [(0, 0, 0), (ROWS * 3, ROWS * 5, 0)]
