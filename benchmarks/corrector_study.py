"""What can mend a cache? Many correctors fitted to the record of one training run.

    python -m benchmarks.corrector_study --data=DIR_OR_FILE

trains once in the setting of the grid `small` (benchmarks/grids.py), with a seed that is not of the
grid, and records what a corrector is given: the pairs of every step. At every probe it embeds a
sample of targets and the probe's queries. Then each corrector below learns from the record, step by
step as in training, in seconds: pairs, encoder and sample are the same for all of them. What this
leaves out is that a better corrector would have drawn other pairs.

Beside them stands what any function of a stale row could do: regressions solved exactly, on the
last steps' pairs, and on fresh embeddings of uniform targets, which no strategy could afford.

Prints a table and writes benchmarks/results/corrector_study.json; the record stays in
runs/corrector_study and is used again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import grid_data
from benchmarks.grids import GRIDS, config_of
from corrector_jax import cache as caches
from corrector_jax import chips, losses, paths, rng
from corrector_jax.cache import TargetCache
from corrector_jax.embed import go_over
from corrector_jax.job import Job, make_job
from corrector_jax.metrics import Divergence
from corrector_jax.models.corrector import Corrector, Linear, Mlp, Nystrom, PerRow
from corrector_jax.optimizer import corrector_optimizer
from corrector_jax.refresh import CacheWriter
from corrector_jax.state import CorrectorState, Pairs, TrainState, init_corrector
from corrector_jax.steps import selection
from corrector_jax.train import place_batch
from corrector_jax.types import Array, PyTree, UserError

ROOT = Path(__file__).resolve().parents[1]
SEED = 100
"""Not one of the grid's: what is chosen here is judged there."""
SAMPLE, TRAINED_ON = 4096, 3072
"""Uniform targets; regressions on uniform targets are fitted to the first so many of them."""
OLD = (0, 10, 20, 40)
"""Steps since lengths were measured."""


@dataclasses.dataclass(frozen=True)
class LinearAndMlp(PerRow):
    """h(c) = c + W c + W2 gelu(sqrt(D) W1 c + b1) + b2, normalised: inputs that the gelu bends.

    A unit row has numbers of about D^-1/2, on which a gelu is all but linear.

    Attributes:
      hidden: width of the mlp's hidden layer; 0 = D.
    """

    hidden: int = 0

    def init(self, key: Array, dim: int) -> PyTree:
        """The identity."""
        return {"linear": self.linear.init(key, dim), "mlp": self.mlp.init(key, dim)}

    @property
    def linear(self) -> Linear:
        """Of the two paths, the first."""
        return Linear(normalize=False)

    @property
    def mlp(self) -> Mlp:
        """Of the two paths, the second."""
        return Mlp(self.hidden, normalize=False)

    def apply(self, params: PyTree, rows: Array, gate: Array | float) -> Array:
        """[n, D] -> [n, D]."""
        scaled = rows * rows.shape[-1] ** 0.5
        bent = self.mlp.apply(params["mlp"], scaled, 1.0) - scaled
        moved = self.linear.apply(params["linear"], rows, 1.0) + bent
        return moved / jnp.linalg.norm(moved, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Learner:
    """A corrector and how it learns.

    Attributes:
      corrector: h.
      updates: per step, the others on the last steps' pairs.
      learning_rate: Adam's, after a ramp of 100 updates.
    """

    corrector: Corrector | LinearAndMlp
    updates: int = 4
    learning_rate: float = 1e-3

    @property
    def name(self) -> str:
        """In the table."""
        corrector = self.corrector
        if isinstance(corrector, Linear):
            kind = "linear" if corrector.normalize else "linear, not divided by its lengths"
        elif isinstance(corrector, LinearAndMlp):
            kind = f"linear + mlp, H = {corrector.hidden or 'D'}, of rows times sqrt(D)"
        else:
            assert isinstance(corrector, Mlp)
            kind = f"mlp, H = {corrector.hidden or 'D'}"
        return f"{kind}; {self.updates} updates of {self.learning_rate:g}"


LEARNERS = (
    *(Learner(Mlp(), updates) for updates in (1, 4, 8)),
    *(Learner(Mlp(hidden)) for hidden in (64, 128, 1024)),
    *(Learner(Mlp(), learning_rate=rate) for rate in (5e-4, 2e-3)),
    *(Learner(Linear(), updates) for updates in (1, 4, 8)),
    Learner(Linear(normalize=False)),
    *(Learner(LinearAndMlp(hidden), 8) for hidden in (32, 64, 128, 0)),
    Learner(LinearAndMlp(), 4),
)


class Probe(NamedTuple):
    """The sample after some steps.

    Attributes:
      stale: [U, D] float32.
      fresh: [U, D] float32.
      queries: [Q, D] float32, never trained on.
    """

    stale: Array
    fresh: Array
    queries: Array


def training(job: Job) -> Iterator[tuple[TrainState, TargetCache]]:
    """Trains as `corrector_jax.train` does: the state and the cache before and after every step."""
    state = job.init_state()
    filled = CacheWriter(job.empty_cache(), step=0, place=job.place)
    go_over(job.embedder, state.params, np.arange(job.size), [filled])
    cache, step_fn, probe_fn = filled.cache, job.train_step(), job.probe_step()
    yield state, cache
    steps = job.config.train.steps
    for step in range(steps):
        key = job.place.put_everywhere(rng.key(job.config.seed, "step", step))
        state, cache, measured = step_fn(state, cache, job.tokens, place_batch(job, step), key)
        loss = measured["loss"]
        print(f"\rstep {step + 1} of {steps}, loss {loss.total / loss.weight:.3f}", end="")
        if (step + 1) % job.config.corrector.probe_every == 0:
            state, *_ = probe_fn(state, cache, job.tokens, job.probe_queries, job.probe_ids)
        yield state, cache
    print()


def embedded(
    job: Job,
    embed: Callable[[PyTree, Array], Array],
    params: PyTree,
    cache: TargetCache,
    ids: np.ndarray,
) -> dict[str, Any]:
    """Targets as the cache has them, and as the encoder has them now, [n, D] each."""
    found: dict[str, list[Array]] = {"stale": [], "fresh": []}
    for at in range(0, len(ids), 512):
        rows = jnp.asarray(ids[at : at + 512], jnp.int32)
        found["stale"].append(caches.take(cache, rows, job.place))
        found["fresh"].append(embed(params, caches.take_tokens(job.tokens, rows, job.place)))
    return {name: np.concatenate(blocks) for name, blocks in found.items()}


def record(config: ConfigDict, path: Path) -> None:
    """Trains, and keeps pairs and probes."""
    job = make_job(config)
    ids = np.sort(np.random.default_rng(5).choice(job.size, SAMPLE, replace=False))
    embed, ask = jax.jit(job.model.encode_targets), jax.jit(job.model.encode_queries)
    kept: dict[str, Any] = {}
    pairs: list[Pairs] = []
    for step, (state, cache) in enumerate(training(job)):
        if not step:
            continue
        pairs.append(jax.tree.map(lambda x: np.array(x[-1]), jax.device_get(state.corrector.ring)))
        if step % config.corrector.probe_every == 0:
            found = embedded(job, embed, state.params, cache, ids)
            found["queries"] = np.asarray(ask(state.params, job.probe_queries))
            kept |= {f"{step}/{name}": x for name, x in found.items()}
    for name in ("stale", "fresh"):
        kept[name] = np.stack([getattr(one, name) for one in pairs])
    paths.write(path.with_suffix(".json"), json.dumps(describe(job)) + "\n")
    np.savez(path, **kept)


def describe(job: Job) -> dict[str, Any]:
    """What was recorded, in the result."""
    return {
        "targets": job.size,
        "dim": job.model.dim,
        "seed": job.config.seed,
        "steps": job.config.train.steps,
        "pairs_per_step": job.encoded_per_step,
        "sample": SAMPLE,
    }


def learn(learner: Learner, stale: Array, fresh: Array) -> Iterator[PyTree]:
    """The corrector's parameters after each step's pairs, [T, P, D] each."""
    tx = corrector_optimizer(peak=learner.learning_rate, warmup=100)
    _, rows, dim = stale.shape
    state = init_corrector(
        jax.random.key(0), corrector=learner.corrector, tx=tx, dim=dim,
        ring=learner.updates - 1, rows=rows,
    )  # fmt: skip

    def loss(psi: PyTree, pairs: Pairs) -> Array:
        estimate = learner.corrector.apply(psi, pairs.stale, 1.0)
        return losses.drift_mse(estimate, pairs.fresh, pairs.weight)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: CorrectorState, pairs: Pairs) -> CorrectorState:
        return selection.update_corrector(state, pairs, tx=tx, loss=loss)

    for one, other in zip(stale, fresh, strict=True):
        state = update(state, Pairs(one, other, jnp.ones(rows)))
        yield jax.tree.map(jnp.copy, state.params)


def judge(rows: Array, probe: Probe, beta: float) -> dict[str, float]:
    """Corrected error and KL(P || P_h) of corrected rows [U, D] over the sample."""
    there = jnp.ones(len(rows), bool)
    scores, other = (beta * probe.queries @ x.T for x in (probe.fresh, rows))
    return {
        "error": float(jnp.mean(jnp.sum(jnp.square(rows - probe.fresh), axis=1))),
        "kl": float(jnp.mean(Divergence.of(scores, other, there).kl())),
    }


def ridge(stale: Array, fresh: Array, strength: float = 0.1) -> PyTree:
    """The parameters of `Linear` that are best for pairs [n, D], up to the ridge."""
    rows = jnp.concatenate([stale, jnp.ones((len(stale), 1))], axis=1)
    square = rows.T @ rows + strength * jnp.eye(rows.shape[1])
    found = jnp.linalg.solve(square, rows.T @ (fresh - stale))
    return {"kernel": found[:-1], "bias": found[-1]}


def study(path: Path, beta: float) -> dict[str, Any]:
    """Fits and judges everything on a record."""
    with np.load(path) as kept:
        stale, fresh = jnp.asarray(kept["stale"]), jnp.asarray(kept["fresh"])
        marks = sorted({int(name.split("/")[0]) for name in kept if "/" in name})
        probes = {
            mark: Probe(*(jnp.asarray(kept[f"{mark}/{name}"]) for name in Probe._fields))
            for mark in marks
        }
    last, end = probes[marks[-1]], marks[-1]
    found: dict[str, Any] = {
        "stale": {mark: judge(probe.stale, probe, beta) for mark, probe in probes.items()},
        "learned": {},
    }
    for learner in LEARNERS:
        by_step = list(learn(learner, stale, fresh))
        correct = jax.jit(functools.partial(learner.corrector.apply, gate=1.0))
        found["learned"][learner.name] = {
            mark: judge(correct(by_step[mark - 1], probe.stale), probe, beta)
            for mark, probe in probes.items()
        }
        if learner == Learner(Linear()):
            moved = Linear(normalize=False).apply(by_step[end - 1], last.stale, 1.0)
            found["lengths of so many steps ago"] = {}
            for steps in OLD:
                length = Linear().length(by_step[end - 1 - steps], last.stale, 1.0)
                found["lengths of so many steps ago"][steps] = judge(
                    moved / length[:, None], last, beta
                )
        print(f"{learner.name:>62}  {found['learned'][learner.name][end]}", flush=True)
    found["solved"] = solved(stale, fresh, last, beta)
    return found


def solved(stale: Array, fresh: Array, last: Probe, beta: float) -> dict[str, Any]:
    """What exact regressions reach at the end, on the targets that none of them was fitted to."""
    rest = Probe(last.stale[TRAINED_ON:], last.fresh[TRAINED_ON:], last.queries)
    found = {"stale": judge(rest.stale, rest, beta)}
    for steps in (10, 40, 80):
        pairs = (x[-steps:].reshape(-1, x.shape[-1]) for x in (stale, fresh))
        rows = Linear().apply(ridge(*pairs), rest.stale, 1.0)
        found[f"ridge, pairs of the last {steps} steps"] = judge(rows, rest, beta)
    for count in (1024, TRAINED_ON):
        pair = last.stale[:count], last.fresh[:count]
        rows = Linear().apply(ridge(*pair), rest.stale, 1.0)
        found[f"ridge, {count} uniform targets embedded anew"] = judge(rows, rest, beta)
        kernel = Nystrom(count, ridge=0.1)
        rows = kernel.apply(kernel.fit(*pair), rest.stale, 1.0)
        found[f"kernel ridge, {count} uniform targets embedded anew"] = judge(rows, rest, beta)
    return found


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a data set in any layout of docs/data.md")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "corrector_study")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    chips.find_devices()
    grid = GRIDS["small"]
    runs = arguments.runs.resolve()
    try:
        data = grid_data.write(arguments.data, runs / "data", targets=grid.targets)
        config = config_of(grid.setting, "corrected", SEED)
        config.data.path = str(data)
        path = runs / "record.npz"
        if not path.exists():
            record(config, path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = {
        "command": "python -m benchmarks.corrector_study --data=DIR_OR_FILE",
        **json.loads(path.with_suffix(".json").read_text()),
        **study(path, config.model.beta),
    }
    result = arguments.results / "corrector_study.json"
    paths.write(result, json.dumps(found, indent=1) + "\n")
    for name, value in found["solved"].items():
        print(f"{name:>62}  {value}")
    print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
