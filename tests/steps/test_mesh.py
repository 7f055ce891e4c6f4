"""A strategy is the same on every mesh of data x fsdp x tensor: the program of the configuration.

The same drawn ids first, then losses, gradients, parameters and cache within float tolerance.
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
from corrector_jax.models.dual_encoder import Encoder
from corrector_jax.program import make_program
from corrector_jax.sharding import make_placement
from corrector_jax.strategies import STRATEGIES
from corrector_jax.types import Batch
from tests import oracle

N, BATCH, DRAWS, BLOCK, STEPS, REFRESH = 211, 16, 4, 8, 4, 2
BERT = BertConfig(
    vocab_size=97, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_positions=8
)
ENCODER = Encoder(BERT)

MESHES = {"1x1x1": (1, 1, 1), "8x1x1": (8, 1, 1), "2x4x1": (8, 4, 1), "2x2x2": (8, 2, 2)}
"""data x fsdp x tensor -> devices, fsdp, tensor."""

CASES = {
    "in_batch": {},
    "uniform": {"model.shared_towers": False},
    "stale": {"loss.estimator": "single"},
    # The program is that of `stale`; the cache is written anew between two steps.
    "refreshed": {"loss.estimator": "single", "refresh.every": REFRESH},
    "corrected": {"corrector.uniform_rows": 8, "corrector.updates": 2},
    "corrected, linear": {
        "corrector.kind": "linear",
        "loss.estimator": "truncated",
        "loss.shared": True,
        "model.learn_beta": True,
    },
    "stale, weighted": {"loss.estimator": "weighted", "train.accumulate": 2},
    "uniform, balanced": {"loss.estimator": "balanced", "train.chunk": 24, "train.remat": True},
    "corrected, kl": {"corrector.loss": "kl", "model.shared_towers": False},
    "mined": {"negatives.in_batch": True},
    "nystrom": {
        "corrector.landmarks": 40,
        "corrector.fit_every": 5,
        "negatives.proposal": "gumbel_topk",
    },
    # As `refreshed`, at every step.
    "oracle": {"loss.estimator": "single"},
    "streaming": {"negatives.proposal": "topk", "negatives.mined": 2},
    "rolling": {"refresh.rows": 30, "loss.estimator": "weighted"},
}
"""Strategy, and what else -> keys of the configuration."""

QUICK_CASES = [
    *[(name, "2x2x2") for name in ("corrected", "mined", "rolling")],
    ("in_batch", "2x4x1"),
]
"""What is not slow: twelve CPU seconds a program."""
PAIRS = [
    pytest.param(name, mesh, marks=() if (name, mesh) in QUICK_CASES else pytest.mark.slow)
    for name in CASES
    for mesh in ("8x1x1", "2x4x1", "2x2x2")
]


def config_of(name, **changes):
    config = configs.default()
    config.update_from_flattened_dict(
        {
            "strategy": name.split(",")[0],
            "model.weights": "random",
            "model.beta": 6.0,
            "cache.tile_rows": 16,
            "corrector.probe_every": 1,
            "corrector.warmup": 2,
            "negatives.draws": DRAWS,
            "negatives.block_rows": BLOCK,
            "train.batch_size": BATCH,
            "train.steps": 20,
            "train.warmup": 2,
            "train.learning_rate": 3e-3,
        }
        | CASES.get(name, {})
        | {key.replace("__", "."): value for key, value in changes.items()}
    )
    configs.validate(config)
    return config


def program_of(config, mesh, encoder=ENCODER):
    devices, fsdp, tensor = MESHES[mesh]
    return make_program(config, encoder, N, make_placement(devices, fsdp=fsdp, tensor=tensor))


def random_like(tree, seed, scale):
    numbers = np.random.default_rng(seed)
    return jax.tree.map(lambda x: numbers.normal(0, scale, x.shape).astype(x.dtype), tree)


@functools.cache
def encoder_params():
    shapes = jax.eval_shape(ENCODER.init, jax.random.key(0), np.zeros((1, 1), np.int32))
    return random_like(shapes["params"], 0, 0.3)


@functools.cache
def corpus():
    """Token rows [N, 4] uint16 of two to four tokens."""
    numbers = np.random.default_rng(1)
    table = numbers.integers(1, BERT.vocab_size, (N, 4))
    return np.where(np.arange(4) < numbers.integers(2, 5, (N, 1)), table, 0).astype(np.uint16)


@functools.cache
def cached():
    return oracle.unit(np.random.default_rng(2), N, BERT.hidden_size)


def batch_of(number, num_mined):
    numbers = np.random.default_rng(100 + number)
    known = np.stack([numbers.choice(N, 3, replace=False) for _ in range(BATCH)]).astype(np.int32)
    known[::2, 1:] = -1
    queries = corpus()[known[:, 0], ::-1].astype(np.int32)
    mined = numbers.integers(-1, N, (BATCH, num_mined)).astype(np.int32) if num_mined else None
    return Batch(queries, known[:, 0].copy(), known, np.arange(BATCH) < BATCH - 3, mined)


class Steps:
    """The program of a configuration on a mesh, compiled, and what it starts from."""

    def __init__(self, config, mesh):
        program = program_of(config, mesh)
        # Its state is the gradient itself, placed like any other of an optimizer.
        tx = optax.chain(optax.trace(0.0), program.tx)
        self.program = dataclasses.replace(program, tx=tx)
        self.place = self.program.place
        self.tokens = caches.create_tokens(
            corpus(), fingerprint="", pad_id=0, block_rows=BLOCK, place=self.place
        )
        self.write = oracle.jit(
            functools.partial(caches.write, place=self.place),
            out_shardings=self.place.rows,
            donate_argnums=0,
        )
        step = self.program.train_step()
        self.compiled = step.lower(*self.start(), self.tokens, *self.given(0)).compile()
        self.draw = oracle.jit(self._draw)
        self.embed = oracle.jit(self.program.model.encode_targets)
        nystrom = self.program.config.strategy == "nystrom"
        self.fit = self.program.fit_step() if nystrom else None

    def _draw(self, state, cache, batch, key):
        queries = self.program.model.encode_queries(state.params, batch.query_tokens)
        key, _ = jax.random.split(key)
        drawn = self.program.method.proposal.draw(queries, state.corrector.gated, cache, batch, key)
        return jnp.where(drawn.valid, drawn.ids, -1)

    def start(self):
        state = self.program.start(encoder_params())
        psi = state.corrector.params
        if self.program.method.corrector.learns:
            psi = random_like(psi, 3, 0.2)
        corrector = state.corrector.replace(params=psi, gate=np.float32(1))
        state = state.replace(corrector=self.place.put_everywhere(corrector))
        return state, self.written(cached(), 0) if self.program.uses_cache else None

    def written(self, rows, step, cache=None):
        cache = self.program.empty_cache() if cache is None else cache
        return self.write(cache, np.arange(N, dtype=np.int32), rows, np.int32(step))

    def given(self, number):
        batch = batch_of(number, self.program.num_mined)
        batch = self.place.put(batch, self.place.examples)
        return batch, self.place.put_everywhere(rng.key(0, "step", number))

    def run(self, steps=STEPS, refresh=0):
        """[(ids drawn, metrics, gradients, parameters and corrector)] by step, and the cache."""
        state, cache = self.start()
        seen = []
        for number in range(steps):
            if refresh and number and number % refresh == 0:
                rows = self.place.fetch(self.embed(state.params, corpus()))
                cache = self.written(rows, number, cache)
            batch, key = self.given(number)
            if self.fit:
                state = self.fit(state, cache, self.tokens, key)
            ids = self.place.fetch(self.draw(state, cache, batch, key))
            state, cache, measured = self.compiled(state, cache, self.tokens, batch, key)
            gradients = self.place.fetch(state.opt_state[0].trace)
            kept = {"params": state.params, "corrector": state.corrector}
            seen.append((ids, metrics.means(measured), gradients, self.place.fetch(kept)))
        return seen, self.place.fetch(cache)


@functools.cache
def _steps(settings, mesh):
    config = configs.default()
    config.update_from_flattened_dict(dict(settings))
    return Steps(config, mesh)


def steps_of(config, mesh):
    """Strategies that differ in what the loop does alone are one program."""
    keys = dict(configs.flat(config))
    if keys["strategy"] in ("refreshed", "oracle"):
        keys |= {"strategy": "stale", "refresh.every": 0}
    return _steps(tuple(sorted(keys.items())), mesh)


@functools.cache
def run_of(name, mesh):
    config = config_of(name)
    every = 1 if config.strategy == "oracle" else config.refresh.every
    return steps_of(config, mesh).run(refresh=every)


def test_every_strategy_is_among_the_cases():
    assert set(STRATEGIES) == {name.split(",")[0] for name in CASES}


@pytest.mark.parametrize(("name", "mesh"), PAIRS)
def test_several_steps_are_the_same_on_every_mesh(name, mesh):
    (one, cache), (other, other_cache) = run_of(name, "1x1x1"), run_of(name, mesh)
    for (ids, *_), (its, *_) in zip(one, other, strict=True):
        assert np.array_equal(ids, its)
    if not name.startswith("in_batch"):
        assert len(np.unique(one[0][0])) > DRAWS
        assert not np.array_equal(one[0][0], one[1][0])
    for (_, mine, gradient, _), (_, its, its_gradient, _) in zip(one, other, strict=True):
        assert mine.keys() == its.keys()
        assert not mine["skipped"]
        for metric in mine:
            assert mine[metric] == pytest.approx(its[metric], rel=5e-4, abs=2e-5), metric
        top = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
        assert top > 1e-3
        assert_close(gradient, its_gradient, rtol=1e-3, atol=1e-4 * top)
    assert_close(one[-1][3]["corrector"], other[-1][3]["corrector"], rtol=1e-3, atol=2e-4)
    # Adam blows up what is zero but for rounding: where gradients were not.
    firm = jax.tree.map(
        lambda *steps: np.all([np.abs(g) > 1e-2 * np.abs(g).max() for g in steps], axis=0),
        *[gradient for _, _, gradient, _ in one],
    )
    large = jax.tree.map(lambda leaf: np.abs(leaf).max() > 1e-4 * top, one[0][2])
    firm = jax.tree.map(np.logical_and, firm, large)
    assert sum(leaf.sum() for leaf in jax.tree.leaves(firm)) > 500
    params = [
        jax.tree.map(lambda x, where: np.where(where, x, 0), seen[-1][3]["params"], firm)
        for seen in (one, other)
    ]
    assert_close(*params, rtol=1e-3, atol=3e-4)
    moved = jax.tree.map(
        lambda last, first: np.abs(last - first).max(), one[-1][3]["params"], one[0][3]["params"]
    )
    assert max(jax.tree.leaves(moved)) > 3e-3
    if cache is not None:
        np.testing.assert_allclose(cache.embeddings[:N], other_cache.embeddings[:N], atol=2e-4)
        assert np.array_equal(cache.written_at[:N], other_cache.written_at[:N])
        always = ("oracle", "streaming", "rolling")
        newest = {"refreshed": REFRESH, **dict.fromkeys(always, STEPS - 1)}
        assert cache.written_at.max() == newest.get(name, 0)
        if name == "rolling":
            ages = np.bincount(cache.written_at[:N]).tolist()
            assert ages == [N - 3 * 30, 30, 30, 30]
        if name == "streaming":  # positives and draws of the last step, padded queries left out
            batch, drawn = batch_of(STEPS - 1, 2), one[-1][0]
            used = np.concatenate([batch.positive[:, None], drawn], axis=1)[batch.valid]
            wanted = np.setdiff1d(used, [-1])
            assert np.array_equal(np.nonzero(cache.written_at[:N] == STEPS - 1)[0], wanted)


def assert_close(tree, other, **tolerance):
    flat, its = (jax.tree_util.tree_leaves_with_path(t) for t in (tree, other))
    for (path, x), (_, y) in zip(flat, its, strict=True):
        np.testing.assert_allclose(x, y, **tolerance, err_msg=jax.tree_util.keystr(path))


# Where the state lives.

SHARES = {
    # leaf: axes split over fsdp and over tensor
    "embeddings/word": (1, None),
    "embeddings/position": (1, None),
    "layer_0/query/kernel": (0, 1),
    "layer_0/query/bias": (None, 0),
    "layer_0/output/kernel": (1, 0),
    "layer_0/output/bias": (None, None),
    "layer_0/up/kernel": (0, 1),
    "layer_0/down/kernel": (1, 0),
    "layer_0/norm/scale": (None, None),
}


def share_of(shape, name, fsdp, tensor):
    over_fsdp, over_tensor = SHARES[name]
    shape = list(shape)
    if over_fsdp is not None:
        shape[over_fsdp] //= fsdp
    if over_tensor is not None:
        shape[over_tensor] //= tensor
    return tuple(shape)


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh != "1x1x1"])
def test_parameters_and_optimizer_are_created_split_as_the_rules_say(mesh):
    _, fsdp, tensor = MESHES[mesh]
    program = program_of(config_of("corrected"), mesh)
    made = program.start(encoder_params())
    assert jax.tree.structure(made) == jax.tree.structure(program.state_sharding)
    assert_close(made.params["shared"], encoder_params(), rtol=0, atol=0)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path((made.params, made.opt_state)):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        for name in SHARES:
            if path.endswith(name):
                wanted = share_of(leaf.shape, name, fsdp, tensor)
                assert {s.data.shape for s in leaf.addressable_shards} == {wanted}, path
                found.setdefault(name, []).append(path)
    assert found.keys() == SHARES.keys()
    # The parameter, and Adam's two moments of it.
    assert {len(paths) for paths in found.values()} == {3}
    for leaf in jax.tree.leaves(made.corrector):
        assert leaf.sharding.is_equivalent_to(program.place.everywhere, leaf.ndim)
    cache = program.empty_cache()
    assert {s.data.shape[0] for s in cache.embeddings.addressable_shards} == {
        cache.embeddings.shape[0] // 8
    }


def test_random_parameters_do_not_depend_on_the_mesh():
    programs = [program_of(config_of("in_batch"), mesh) for mesh in ("1x1x1", "2x2x2")]
    states = [
        oracle.jit(lambda p=program: p.initial(None).params, out_shardings=sharding)()
        for program in programs
        for sharding in [program.state_sharding.params]
    ]
    assert_close(*[jax.device_get(state) for state in states], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mesh", ["1x1x1", "2x2x2"])
def test_the_state_is_updated_in_place_share_by_share(mesh):
    steps = steps_of(config_of("corrected"), mesh)
    state, cache = steps.start()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state, cache)))
    assert steps.compiled.memory_analysis().alias_size_in_bytes == held
    made, cache, _ = steps.compiled(state, cache, steps.tokens, *steps.given(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    same = jax.tree.map(
        lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim),
        made,
        steps.program.state_sharding,
    )
    assert all(jax.tree.leaves(same))
