"""What is compiled: all that follows from a configuration, an encoder and N, without data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.stages import Wrapped
from ml_collections import ConfigDict

from corrector_jax import cache as caches
from corrector_jax import config as configs
from corrector_jax import losses, optimizer, reader_losses, rng, sweep
from corrector_jax.cache import TargetCache
from corrector_jax.models import corrector as correctors
from corrector_jax.models.corrector import Corrector, Nystrom
from corrector_jax.models.dual_encoder import DualEncoder, Encode, Encoder, rematerialised
from corrector_jax.models.family import Axes
from corrector_jax.models.reader import Reader
from corrector_jax.negatives import (
    BestCandidates,
    Candidates,
    GumbelTopK,
    InBatch,
    Joined,
    Mined,
    Proposal,
    TopK,
    TwoLevel,
    Uniform,
)
from corrector_jax.sharding import Placement, make_placement, rules_of
from corrector_jax.state import CorrectorState, TrainState, init_corrector, init_state
from corrector_jax.steps.cache_policy import CachePolicy, Keep, Rolling, WriteBack
from corrector_jax.steps.candidates_step import ask_cache, ask_index
from corrector_jax.steps.fit_step import fit_step
from corrector_jax.steps.lengths_step import lengths_step, measure
from corrector_jax.steps.method import Method
from corrector_jax.steps.probe_step import probe_step
from corrector_jax.steps.reader_step import Answering, answer_step, given_step, read_step
from corrector_jax.steps.train_step import train_step
from corrector_jax.types import Array, PyTree, UserError

TOWERS = ("shared", "query", "target")
"""Names at the top of the parameters that are encoders."""


class Stage(NamedTuple):
    """Steps of one kind.

    Attributes:
      start: the first of them.
      step: the step, jitted for the mesh; state and cache are donated.
      with_grad: targets that each of them encodes with gradient.
      without_grad: and without.
      rewritten: targets that each of them encodes for the cache alone.
    """

    start: int
    step: Wrapped
    with_grad: int
    without_grad: int
    rewritten: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A strategy, an encoder and N targets on a mesh.

    Attributes:
      config: the configuration.
      size: N.
      place: the mesh.
      model: the dual encoder.
      method: the strategy as the step sees it.
      learning_rate: of the encoders, by update of the run.
      tx: the task optimizer.
      given_tx: the same while a reader learns to read: only it moves.
      corrector_tx: the corrector's optimizer.
      answering: how a reader's answers train; None where positives do.
    """

    config: ConfigDict
    size: int
    place: Placement
    model: DualEncoder
    method: Method
    learning_rate: optax.Schedule
    tx: optax.GradientTransformation
    given_tx: optax.GradientTransformation
    corrector_tx: optax.GradientTransformation
    answering: Answering | None = None

    @property
    def targets_per_query(self) -> int:
        """Targets that a training step encodes with gradient for each query."""
        if self.answering:
            return self.answering.passages
        return 1 + self.method.proposal.draws

    @property
    def encoded_per_step(self) -> int:
        """Targets encoded with gradient by one training step."""
        return int(self.config.train.batch_size * self.targets_per_query)

    @property
    def num_mined(self) -> int:
        """Mined negatives that a batch has for each query."""
        only = isinstance(self.method.proposal, Mined)
        return int(self.config.negatives.draws if only else self.config.negatives.mined)

    @property
    def num_candidates(self) -> int:
        """Candidates that a batch has for each query, found on the host."""
        wanted = configs.chosen(self.config)["proposal"] == "scann"
        return min(self.config.negatives.candidates, self.size) if wanted else 0

    @property
    def uses_cache(self) -> bool:
        """Whether the strategy reads cached embeddings."""
        return self.method.proposal.reads_cache

    def init_corrector(self, step: int) -> CorrectorState:
        """A corrector at the identity, for the snapshot made before step `step`."""
        return init_corrector(
            rng.key(self.config.seed, "corrector", step),
            corrector=self.method.corrector,
            tx=self.corrector_tx,
            dim=self.model.dim,
            ring=self.config.corrector.updates - 1 if self.method.corrector.learns else 0,
            rows=self.encoded_per_step + self.method.uniform_rows,
        )

    def start(self, encoder_params: PyTree, reader_params: PyTree = None) -> TrainState:
        """Step 0, created already split over the mesh.

        Args:
          encoder_params: one tower's parameters on the host; None = random.
          reader_params: the reader's, where there is one; likewise.
        """
        params = None
        if encoder_params is not None:
            params = self.model.from_encoder_params(encoder_params)
        return self._placed_initial(params, reader_params)

    def empty_cache(self) -> TargetCache:
        """A cache of the right shape with nothing in it."""
        return caches.create(
            self.size,
            self.model.dim,
            dtype=self.config.cache.dtype,
            block_rows=self.config.negatives.block_rows,
            place=self.place,
            lengths=self.method.corrector.has_lengths,
        )

    @functools.cached_property
    def _placed_initial(self) -> Wrapped:
        return jax.jit(self.initial, out_shardings=self.state_sharding)

    @functools.cached_property
    def state_sharding(self) -> TrainState:
        """Where the leaves of the training state live."""
        state: TrainState = jax.eval_shape(self.initial, None)
        everywhere: Any = self.place.everywhere
        # Together: what does not learn has no state in the optimizer, for no rule to match.
        learned = self.place.parameters({"params": state.params, "opt_state": state.opt_state})
        return TrainState(
            step=everywhere,
            params=learned["params"],
            opt_state=learned["opt_state"],
            corrector=jax.tree.map(lambda _: everywhere, state.corrector),
        )

    def require_shares(self) -> None:
        """Refuses a batch that cannot be trained on.

        Raises:
          UserError: the mesh cannot share the batch, or a chunk of it, evenly.
        """
        shares = self.place.num_shares
        for key in ("batch_size", "chunk"):
            if self.config.train[key] % shares:
                raise UserError(
                    f"config.train.{key} is {self.config.train[key]}, which {shares} shares of the "
                    f"mesh (data x fsdp) do not divide: write a multiple of {shares}"
                )

    def train_step(self) -> Wrapped:
        """The train step, jitted for the mesh; state and cache are donated."""
        step = functools.partial(
            train_step,
            model=self.model,
            method=self.method,
            tx=self.tx,
            corrector_tx=self.corrector_tx,
            place=self.place,
        )
        out = (self.state_sharding, self.place.rows, self.place.everywhere)
        return self.place.jit_step(step, out, donate=(0, 1))

    def stages(self) -> tuple[Stage, ...]:
        """The steps of a run, kind by kind, in the order they come."""
        count, rows = self.config.train.batch_size, self.method.uniform_rows
        rewritten = self.method.cache_policy.rows
        if not self.answering:
            return (Stage(0, self.train_step(), self.encoded_per_step, rows, rewritten),)
        given, drawn = self.config.reader.given_steps, self.method.proposal.draws
        more = count * drawn if drawn > self.answering.passages else 0  # to choose among
        last = Stage(given, self.answer_step(), self.encoded_per_step, rows + more, rewritten)
        return (Stage(0, self.given_step(), 0, 0, 0), last) if given else (last,)

    def answer_step(self) -> Wrapped:
        """The step that learns from answers, jitted for the mesh; state and cache are donated."""
        step = functools.partial(
            answer_step,
            model=self.model,
            answering=self._answering,
            method=self.method,
            tx=self.tx,
            corrector_tx=self.corrector_tx,
            place=self.place,
        )
        out = (self.state_sharding, self.place.rows, self.place.everywhere)
        return self.place.jit_step(step, out, donate=(0, 1))

    def given_step(self) -> Wrapped:
        """The step of a reader that learns to read, jitted likewise."""
        step = functools.partial(
            given_step, answering=self._answering, tx=self.given_tx, place=self.place
        )
        out = (self.state_sharding, self.place.rows, self.place.everywhere)
        return self.place.jit_step(step, out, donate=(0, 1))

    @functools.cached_property
    def read_step(self) -> Wrapped:
        """The step that answers, jitted for the mesh: tokens of answers on every device."""
        reader = self.config.reader
        step = functools.partial(
            read_step,
            answering=self._answering,
            length=reader.answer_max_len,
            beams=reader.beams,
            place=self.place,
        )
        return self.place.jit_step(step, self.place.everywhere)

    @property
    def _answering(self) -> Answering:
        if self.answering is None:
            raise TypeError("there is no reader to answer")
        return self.answering

    def fit_step(self) -> Wrapped:
        """The step that fits a kernel corrector, jitted for the mesh; the state is donated.

        Raises:
          TypeError: the corrector is not fitted but learned.
        """
        if not isinstance(self.method.corrector, Nystrom):
            raise TypeError(f"{self.method.corrector} has no landmarks to fit")
        step = functools.partial(
            fit_step, model=self.model, corrector=self.method.corrector, place=self.place
        )
        return self.place.jit_step(step, self.state_sharding, donate=(0,))

    def lengths_step(self) -> Wrapped:
        """The step that measures lengths, jitted for the mesh; state and cache are donated."""
        out = (self.state_sharding, self.place.rows)
        return self.place.jit_step(self._measuring(lengths_step), out, donate=(0, 1))

    def measure_lengths(self) -> Wrapped:
        """`lengths_step.measure`, jitted for the mesh: (psi, cache) -> cache, which is donated."""
        return self.place.jit_step(self._measuring(measure), self.place.rows, donate=(1,))

    def _measuring(self, step: Callable[..., Any]) -> Callable[..., Any]:
        rows = _tile_rows(self.config, 1, self.method.corrector, self.model)
        return functools.partial(
            step, corrector=self.method.corrector, tile_rows=rows, place=self.place
        )

    def ask_index(self) -> Wrapped:
        """`ask_index`, jitted for the mesh: (state, batch) -> [B, D] on every device."""
        step = functools.partial(ask_index, model=self.model, proposal=self._sweeping)
        return self.place.jit_step(step, self.place.everywhere)

    def ask_cache(self) -> Wrapped:
        """`ask_cache`, jitted for the mesh: (state, cache, batch) -> [B, K] on every device."""
        step = functools.partial(ask_cache, model=self.model, proposal=self._sweeping)
        return self.place.jit_step(step, self.place.everywhere)

    @property
    def _sweeping(self) -> TopK:
        """What finds the candidates where there is no index."""
        rows = _tile_rows(self.config, self.num_candidates, self.method.corrector, self.model)
        return TopK(
            draws=self.num_candidates,
            beta=self.method.beta,
            corrector=self.method.corrector,
            block_rows=self.config.negatives.block_rows,
            tile_rows=rows,
            place=self.place,
        )

    def probe_step(self) -> Wrapped:
        """The probe step, jitted for the mesh; the state is donated."""
        step = functools.partial(
            probe_step,
            beta=self.method.beta,
            model=self.model,
            corrector=self.method.corrector,
            place=self.place,
        )
        out = (self.state_sharding, self.place.everywhere, self.place.everywhere)
        return self.place.jit_step(step, out, donate=(0,))

    def initial(self, params: PyTree, reader_params: PyTree = None) -> TrainState:
        """Step 0 as a pure function of encoders' and reader's parameters; None = random ones."""
        if params is None:
            params = self.model.init(rng.key(self.config.seed, "parameters"))
        if self.answering:
            if reader_params is None:
                reader_params = self.answering.reader.init(rng.key(self.config.seed, "reader"))
            params = {**params, "reader": reader_params}
        return init_state(params, self.init_corrector(0), tx=self.tx)


def make_program(
    config: ConfigDict, encoder: Encoder, size: int, place: Placement, reader: Reader | None = None
) -> Program:
    """What a configuration says to compile.

    Args:
      config: validated.
      encoder: one tower.
      size: N.
      place: the mesh.
      reader: who answers, where the configuration names one.

    Returns:
      The program; nothing is compiled or put on a device yet.

    """
    train, given = config.train, config.reader.given_steps if reader else 0
    model = DualEncoder(
        encoder,
        shared=config.model.shared_towers,
        learn_beta=config.model.learn_beta,
        frozen=_FROZEN[config.reader.moves] if reader else frozenset(),
    )
    whole = dataclasses.replace(place, rules=rules_of(model.axes()))
    model = dataclasses.replace(model, wrap=_wrap(config, whole))
    learning_rate = optimizer.schedule(
        train.schedule,
        peak=train.learning_rate,
        warmup=train.warmup // train.accumulate,
        steps=(train.steps - given) // train.accumulate,
    )
    tx = given_tx = _task_optimizer(config, learning_rate)
    if reader:
        of_reader = _task_optimizer(config, _reader_rate(config))
        then = of_reader if config.reader.learns else optimizer.held(of_reader)
        frozen = _frozen_names(config)
        given_tx = optimizer.beside_reader(optimizer.held(tx), of_reader, frozen=frozen)
        tx = optimizer.beside_reader(tx, then, frozen=frozen)
        of_encoders = _below(f"({'|'.join(TOWERS)})", model.axes())
        whole = dataclasses.replace(
            place, rules=rules_of({**of_encoders, **_below("reader", reader.config.axes())})
        )
        reading = dataclasses.replace(place, rules=rules_of(reader.config.axes()))
        reader = dataclasses.replace(reader, wrap=_wrap(config, reading))
    return Program(
        config=config,
        size=size,
        place=whole,
        model=model,
        method=_method(config, size, model, whole),
        learning_rate=optimizer.delayed(learning_rate, given // train.accumulate),
        tx=tx,
        given_tx=given_tx,
        corrector_tx=optimizer.corrector_optimizer(
            peak=config.corrector.learning_rate, warmup=config.corrector.warmup
        ),
        answering=_answering(config, size, reader) if reader else None,
    )


_FROZEN = {
    "both": frozenset[str](),
    "query": frozenset({"target"}),
    "none": frozenset({"query", "target"}),
}
"""Word of config.reader.moves -> sides that no gradient reaches."""


def _frozen_names(config: ConfigDict) -> tuple[str, ...]:
    """Parameters at the top that no gradient reaches: weight decay must not move them either."""
    return {"both": (), "query": ("target",), "none": (*TOWERS, "beta")}[config.reader.moves]


def _task_optimizer(config: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    train = config.train
    return optimizer.task_optimizer(
        rate, clip=train.clip, weight_decay=train.weight_decay, accumulate=train.accumulate
    )


def _reader_rate(config: ConfigDict) -> optax.Schedule:
    train, reader = config.train, config.reader
    return optimizer.schedule(
        train.schedule,
        peak=reader.learning_rate,
        warmup=reader.warmup // train.accumulate,
        steps=(train.steps if reader.learns else reader.given_steps) // train.accumulate,
    )


def _below(top: str, axes: Axes) -> Axes:
    """The axes of parameters that stand below a name, so that no other's are meant."""
    return {f"{top}/(.*/)?({pattern})": names for pattern, names in axes.items()}


def _answering(config: ConfigDict, size: int, reader: Reader) -> Answering:
    keys = config.reader
    loss = functools.partial(
        reader_losses.RETRIEVER_LOSSES[keys.loss],
        retriever_temperature=keys.retriever_temperature,
        reader_temperature=keys.reader_temperature,
        unit=keys.unit,
    )
    return Answering(
        reader=reader,
        loss=loss,
        # REALM's loss trains the reader itself.
        fused=1.0 if keys.learns and keys.loss != "marginal" else 0.0,
        passages=min(keys.passages, size),
        passage_len=keys.passage_max_len,
        given=min(keys.given, size),
        learns=keys.learns,
    )


def placement(config: ConfigDict, devices: list[Any] | None = None) -> Placement:
    """The mesh that a configuration names.

    Args:
      config: validated.
      devices: those of a topology; None = jax's own, as many as `mesh.devices` says.

    Raises:
      UserError: there are not enough devices, or the axes do not divide them.
    """
    mesh = config.mesh
    if devices is None:
        available = jax.device_count()
        if mesh.devices > available:
            raise UserError(
                f"config.mesh.devices is {mesh.devices} but jax sees {available} "
                f"{jax.devices()[0].platform} device(s): write {available} or less, or 0 for all"
            )
        if mesh.devices and jax.process_count() > 1 and mesh.devices != available:
            raise UserError(
                f"config.mesh.devices is {mesh.devices} of the {available} devices of "
                f"{jax.process_count()} processes: write 0, and start as many as there shall be"
            )
    count = len(devices) if devices is not None else mesh.devices or jax.device_count()
    if count % (mesh.fsdp * mesh.tensor):
        raise UserError(
            f"config.mesh.fsdp x config.mesh.tensor is {mesh.fsdp} x {mesh.tensor}, which does "
            f"not divide the {count} devices: write numbers whose product does"
        )
    return make_placement(devices or mesh.devices, fsdp=mesh.fsdp, tensor=mesh.tensor)


def _wrap(config: ConfigDict, place: Placement) -> Callable[[Encode], Encode]:
    """Parameters gathered for use; less memory at the price of work, as the configuration asks."""

    def wrap(inner: Encode) -> Encode:
        def whole(parameters: PyTree, tokens: Array) -> Array:
            return inner(place.gathered(parameters), tokens)

        encode: Encode = whole
        if config.train.remat:
            encode = rematerialised(encode)
        if config.train.chunk:
            encode = place.in_chunks(encode, config.train.chunk)
        return encode

    return wrap


def _method(config: ConfigDict, size: int, model: DualEncoder, place: Placement) -> Method:
    words = configs.chosen(config)
    strategy = configs.STRATEGIES[config.strategy]
    corrector = correctors.make(
        words["corrector"],
        hidden=config.corrector.hidden,
        landmarks=min(config.corrector.landmarks, size),
        ridge=config.corrector.ridge,
        normalize=model.encoder.normalize,
    )
    policies: dict[str, CachePolicy] = {
        "keep": Keep(),
        "write_back": WriteBack(place),
        "rolling": Rolling(min(config.refresh.rows, size), model, place),
    }
    estimator = words["estimator"]
    in_batch = words["proposal"] == "in_batch"
    drift = {"mse": (1.0, 0.0), "kl": (0.0, 1.0), "both": (1.0, config.corrector.kl_weight)}
    mse_weight, kl_weight = drift[config.corrector.loss]
    return Method(
        beta=config.model.beta,
        proposal=_proposal(config, words["proposal"], size, corrector, model, place),
        estimator=losses.ESTIMATORS[estimator],
        shared=estimator == "balanced" or config.loss.shared or in_batch,
        positives=estimator == "truncated",
        corrector=corrector,
        cache_policy=policies[strategy.cache],
        in_batch=config.negatives.in_batch,
        max_relative_score=config.negatives.max_relative_score,
        uniform_rows=config.corrector.uniform_rows if corrector.learns else 0,
        mse_weight=mse_weight,
        kl_weight=kl_weight,
    )


def _proposal(
    config: ConfigDict,
    word: str,
    size: int,
    corrector: Corrector,
    model: DualEncoder,
    place: Placement,
) -> Proposal:
    negatives, draws, reader = config.negatives, config.negatives.draws, config.reader
    if reader.weights:
        draws = min(reader.rerank or reader.passages, size)
    tile_rows = _tile_rows(config, draws if word == "two_level" else 1, corrector, model)
    made: dict[str, Proposal] = {"uniform": Uniform(draws, size), "mined": Mined(draws)}
    made["in_batch"] = InBatch()
    for name, kind in (("two_level", TwoLevel), ("gumbel_topk", GumbelTopK), ("topk", TopK)):
        made[name] = kind(
            draws, config.model.beta, corrector, negatives.block_rows, tile_rows, place
        )
    made["scann"] = Candidates(
        draws, config.model.beta, corrector, negatives.tail, size, tile_rows, place
    )
    if reader.weights:
        made["scann"] = BestCandidates(draws, config.model.beta, corrector, tile_rows, place)
    proposal = made[word]
    return Joined(proposal, Mined(negatives.mined)) if negatives.mined else proposal


def _tile_rows(config: ConfigDict, draws: int, corrector: Corrector, model: DualEncoder) -> int:
    """Rows of the cache that a device scores at once."""
    return int(config.cache.tile_rows) or sweep.tile_rows(
        config.cache.sweep_mib << 20,
        batch=config.train.batch_size,
        dim=model.dim,
        hidden=corrector.width(model.dim),
        draws=draws,
        block_rows=config.negatives.block_rows,
    )
