"""From a configuration to everything a loop works with."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from corrector_jax import cache as caches
from corrector_jax import config as configs
from corrector_jax import digest, paths, rng, snapshot, weights
from corrector_jax.cache import TargetCache, TargetTokens
from corrector_jax.data import dataset, mined, order, sources, tokenize
from corrector_jax.data.dataset import RetrievalData
from corrector_jax.data.published import folder_of
from corrector_jax.data.token_table import TokenTable, token_table
from corrector_jax.embed import Embedder
from corrector_jax.models import pretrained
from corrector_jax.models.bert import BertConfig
from corrector_jax.models.dual_encoder import DualEncoder, Encoder, Projection
from corrector_jax.models.family import Family
from corrector_jax.program import Program, make_program, placement
from corrector_jax.reading import GIVEN, Questions, answerable, ask, load_reader
from corrector_jax.refresh_policy import RefreshPolicy
from corrector_jax.sharding import Placement
from corrector_jax.state import TrainState
from corrector_jax.steps.reader_step import Tables
from corrector_jax.types import Array, Batch, PyTree, UserError
from corrector_jax.writer import say

RANDOM_MAX_LEN = 128
"""Tokens of a text where neither the configuration nor published weights say."""

LENGTH_MULTIPLE = 8
"""Token tables are no wider than their longest text, rounded up to this many tokens."""


@dataclasses.dataclass(frozen=True)
class Tokenization:
    """How texts become tokens: the configuration, and where it is silent, the weights.

    Attributes:
      tokenizer: the tokenizer.
      query_prefix: put before every query.
      target_prefix: put before every target.
      query_max_len: tokens of a query, special tokens included.
      target_max_len: likewise of a target.
    """

    tokenizer: tokenize.TextTokenizer
    query_prefix: str
    target_prefix: str
    query_max_len: int
    target_max_len: int

    def targets(self, texts: Sequence[str]) -> np.ndarray:
        """[n, T] tokens of targets, T = `target_max_len`."""
        return self.tokenizer.encode(texts, max_len=self.target_max_len, prefix=self.target_prefix)

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """[n, T] int32 tokens of queries, T = `query_max_len`."""
        tokens = self.tokenizer.encode(texts, max_len=self.query_max_len, prefix=self.query_prefix)
        return tokens.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What the encoder came with: the trained one goes out in the same clothes.

    Attributes:
      source: where the weights came from, in words.
      config: the content of `config.json`; empty for random weights.
      names: of the published tensors.
      beside: tensors that are carried along unused.
      tokenizer_json: the content of `tokenizer.json`.
      tokenizer_files: of the files beside it, by name.
    """

    source: str
    config: dict[str, Any]
    names: frozenset[str]
    beside: dict[str, np.ndarray]
    tokenizer_json: str
    tokenizer_files: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(Program):
    """Everything that stays the same during a run.

    Attributes:
      data: targets, queries and judgements.
      dev_split: evaluated during training, and where probe queries come from.
      final_split: evaluated before and after training.
      tokens: the token table.
      embedder: embeds targets with the model.
      query_tokens: split name -> [n, T] int32.
      query_lengths: [n] int32, tokens of the training queries.
      query_widths: what batches of them are cut to.
      known: [n, K] int32, known positives of the training queries, -1 pads.
      mined: per training query, the rows of its mined negatives; empty where none are wanted.
      probe_queries: [Q, T] int32 on the mesh, queries never trained on.
      probe_ids: [U] int32 on the mesh, the probe's targets.
      tokenization: how texts become tokens.
      origin: what the encoder came with.
      encoder_params: one tower's parameters at the start, on the host; None = random.
      made_by: what rows of the cache depend on beside the weights: field -> word or number.
      questions: the data as the reader reads it; None where there is none.
    """

    data: RetrievalData
    dev_split: str
    final_split: str
    tokens: TargetTokens
    embedder: Embedder
    query_tokens: dict[str, np.ndarray]
    query_lengths: np.ndarray
    query_widths: tuple[int, ...]
    known: np.ndarray
    mined: Sequence[np.ndarray]
    probe_queries: Array
    probe_ids: Array
    tokenization: Tokenization
    origin: Origin
    encoder_params: PyTree
    made_by: dict[str, Any]
    questions: Questions | None = None

    @property
    def tables(self) -> TargetTokens | Tables:
        """What a training step reads of the corpus."""
        return Tables(self.tokens, self.questions.passages) if self.questions else self.tokens

    def stage_of(self, step: int) -> tuple[str, int]:
        """The split that a step's queries are of, and the first step that asks them."""
        given = self.config.reader.given_steps if self.questions else 0
        return (GIVEN, 0) if step < given else ("train", given)

    def queries_of(self, step: int) -> tuple[str, np.ndarray]:
        """The split of a step's queries, and which of them they are, [B] int64."""
        split, first = self.stage_of(step)
        config, size = self.config, len(self.data.splits[split].texts)
        return split, order.batch_rows(
            step - first, num_queries=size, batch_size=config.train.batch_size, seed=config.seed
        )

    def batch(self, step: int) -> Batch:
        """The batch of a step, of B queries [B, T], on the host: of the seed and the step alone."""
        (split, first), seed = self.stage_of(step), self.config.seed
        batch = order.make_batch(
            step,
            query_tokens=self.query_tokens[split],
            positives=self.data.splits[split].positives,
            known=self.known if split == "train" else self._known_given,
            batch_size=self.config.train.batch_size,
            seed=seed,
            lengths=self.query_lengths if split == "train" else None,
            widths=self.query_widths,
            mined=self.mined,
            num_mined=self.num_mined,
            first=first,
        )
        if not self.questions:
            return batch
        _, rows = self.queries_of(step)
        batch = batch._replace(asked=self.questions.asked(split, rows, seed=seed, step=step))
        if split == GIVEN:
            return batch
        # What is positive is for the evaluation: the step must not know.
        nobody = np.full((len(rows), 1), -1, np.int32)
        return batch._replace(positive=nobody[:, 0], known=nobody)

    @functools.cached_property
    def _known_given(self) -> np.ndarray:
        return self.data.known_positives(GIVEN)

    @functools.cached_property
    def refresh_policy(self) -> RefreshPolicy:
        """When the cache is re-embedded; asked before every step."""
        return configs.refresh_policy_of(self.config)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of all that is trained on: token table, query tokens, judgements."""
        digest = hashlib.sha256(self.tokens.fingerprint.encode())
        for name, split in sorted(self.data.splits.items()):
            digest.update(f"{name} {self.query_tokens[name].shape}".encode())
            digest.update(np.ascontiguousarray(self.query_tokens[name]).tobytes())
            digest.update(self.data.known_positives(name).tobytes())
            digest.update("\n".join(split.query_ids).encode())
        for rows in self.mined:
            digest.update(np.asarray(rows, np.int32).tobytes() + b";")
        if self.questions:
            digest.update(self.questions.fingerprint.encode())
        return digest.hexdigest()

    def init_state(self) -> TrainState:
        """Step 0, on the mesh."""
        reader_params = self.questions.loaded.params if self.questions else None
        return self.start(self.encoder_params, reader_params)

    def weights_digest(self, params: PyTree) -> str:
        """Names the parameters that targets are embedded with: 64 hex digits."""
        return digest.of(params["shared" if self.model.shared else "target"])

    def load_cache(self, empty: TargetCache, params: PyTree) -> TargetCache:
        """The snapshot at `cache.path`, where it is what a pass over the corpus would make now.

        Args:
          empty: a cache of the wanted shape, storage dtype and sharding.
          params: the encoders' parameters.

        Returns:
          The cache, as written before step 0.

        Raises:
          UserError: there is no snapshot, it is damaged, or something else made it.
        """
        path = self.config.cache.path
        try:
            cache = snapshot.load(
                paths.make(path),
                empty,
                made_by={**self.made_by, "weights": self.weights_digest(params)},
                remedy="drop --config.cache.path to embed the corpus anew",
            )
        except snapshot.DamagedError as error:
            raise UserError(
                f"config.cache.path is not a snapshot ({error}): write RUN/cache/STEP of another "
                "run, or drop it to embed the corpus anew"
            ) from error
        return dataclasses.replace(cache, written_at=jnp.minimum(cache.written_at, 0))


def make_job(config: ConfigDict) -> Job:
    """Loads data and weights, tokenizes, and builds what the configuration names.

    Args:
      config: validated.

    Returns:
      The job.

    Raises:
      UserError: data, weights and configuration do not fit together.
    """
    place = placement(config)
    data = load_data(config)
    final_split = dataset.eval_split(data, config.data.eval_split)
    require_train(data)
    tokenization, encoder, encoder_params, origin = load_encoder(config)
    loaded = load_reader(config, origin.tokenizer_json) if config.reader.weights else None
    if loaded:
        data = answerable(config, data, loaded.tokenizer)
    say(_describe(data))
    if "dev" not in data.splits:
        say(f"no dev split: evaluations during training and the probe use {final_split}")
    tokenizer = tokenization.tokenizer
    tokens, lengths = _token_table(config, data, tokenization, place)
    query_tokens = {name: tokenization.queries(split.texts) for name, split in data.splits.items()}
    lengths_of = {
        name: tokenize.lengths(table, tokenizer.pad_id) for name, table in query_tokens.items()
    }
    widest = max(_width(found, tokenization.query_max_len) for found in lengths_of.values())
    query_tokens = {name: table[:, :widest] for name, table in query_tokens.items()}
    program = make_program(config, encoder, tokens.size, place, loaded.reader if loaded else None)
    questions = None
    if loaded:
        questions = ask(
            config, data, loaded, tokens,
            tokenizer=tokenizer, prefix=tokenization.target_prefix, place=place,
        )  # fmt: skip
    dev_split = "dev" if "dev" in data.splits else final_split
    probe_queries, probe_ids = _probe(config, query_tokens[dev_split], tokens.size, place)
    return Job(
        **{field.name: getattr(program, field.name) for field in dataclasses.fields(program)},
        data=data,
        dev_split=dev_split,
        final_split=final_split,
        tokens=tokens,
        embedder=Embedder(program.model, tokens, lengths, program.place, config.eval.batch_size),
        query_tokens=query_tokens,
        query_lengths=lengths_of["train"],
        query_widths=order.bucket_widths(
            lengths_of["train"],
            batch_size=config.train.batch_size,
            multiple=LENGTH_MULTIPLE,
        ),
        known=data.known_positives("train"),
        mined=_mined(config, data) if program.num_mined else (),
        probe_queries=probe_queries,
        probe_ids=probe_ids,
        tokenization=tokenization,
        origin=origin,
        encoder_params=encoder_params,
        made_by={
            "tokenizer": tokenizer.fingerprint,
            "template": config.data.target_template,
            "prefix": tokenization.target_prefix,
            "length": tokenization.target_max_len,
            "family": type(encoder.config).__name__.removesuffix("Config"),
            "layers": encoder.config.num_layers,
            "pooling": encoder.pooling,
            "projection": encoder.project.dim if encoder.project else 0,
            "normalize": encoder.normalize,
            "dtype": encoder.dtype,
            "corpus": data.fingerprint(),
        },
        questions=questions,
    )


def require_train(data: RetrievalData) -> None:
    """Refuses data without a train split.

    Raises:
      UserError: there is none.
    """
    if "train" not in data.splits:
        raise UserError(
            f"{data.name} has no train split to train on: add one (train.jsonl, qrels/train.tsv, "
            "as the layout has it), or raise config.data.max_targets if it is set"
        )


def load_data(config: ConfigDict, max_bad_rows: int = 0) -> RetrievalData:
    """Reads the data that the configuration names.

    Args:
      config: validated.
      max_bad_rows: how many bad rows are skipped, if more than the configuration allows.

    Raises:
      UserError: it is not there, or something is wrong with it.
    """
    path = config.data.path
    if config.data.published:
        path = folder_of(config.data.published, path)
        if not paths.make(path).exists():
            raise UserError(
                f"{config.data.published} is not in {config.data.path!r} yet: run the same command "
                "with --mode=prepare_data first"
            )
    return sources.load(
        path,
        layout="tfds" if config.data.published else config.data.layout,
        target_template=config.data.target_template,
        holdout=config.data.holdout,
        max_targets=config.data.max_targets,
        max_queries=config.data.max_queries,
        cache_dir=config.data.cache_dir,
        max_bad_rows=max(max_bad_rows, config.data.max_bad_rows),
    )


def load_tokens(config: ConfigDict, data: RetrievalData, tokenization: Tokenization) -> TokenTable:
    """The corpus as tokens, [N, T], made before or now."""
    return token_table(
        data.target_texts,
        tokenization.tokenizer,
        name=data.name,
        content_fingerprint=data.fingerprint(),
        template=config.data.target_template,
        prefix=tokenization.target_prefix,
        max_len=tokenization.target_max_len,
        folder=sources.cache_folder(config.data.cache_dir) / "tokens",
    )


def prepare(config: ConfigDict) -> None:
    """Reads and tokenizes the data, so that a run finds it done."""
    data = load_data(config)
    say(_describe(data))
    tokenization, *_ = load_encoder(config)
    load_tokens(config, data, tokenization)


def full_encoder(job: Job) -> tuple[Embedder, PyTree]:
    """The same published encoder with all its layers, to compare with.

    Args:
      job: the job.

    Returns:
      An embedder over the same tokens, and the parameters on the mesh.
    """
    files = weights.find(job.config.model.weights)
    published = pretrained.encoder_config(files.config)
    config = pretrained.replace(published, pad_id=job.model.encoder.config.pad_id)
    project = files.dense.project if files.dense else None
    model = DualEncoder(job.model.encoder.clone(config=config, project=project))
    params = model.from_encoder_params(_published_params(files, published))
    embedder = dataclasses.replace(job.embedder, model=model)
    return embedder, job.place.put_everywhere(params)


def load_encoder(config: ConfigDict) -> tuple[Tokenization, Encoder, PyTree, Origin]:
    """Finds or makes the encoder that a configuration names.

    Args:
      config: validated.

    Returns:
      How it reads texts, one tower, that tower's parameters on the host (None = random), and what
      it came with.

    Raises:
      UserError: there is no such encoder, or it does not fit the configuration.
    """
    model, data = config.model, config.data
    params, pooling, normalize, project = None, "mean", True, None
    prefixes = {"query": "", "target": ""}
    lengths = {"query": data.query_max_len, "target": data.target_max_len}
    family: Family
    if model.weights == "random":
        text = weights.find_tokenizer(model.tokenizer)
        tokenizer = tokenize.TextTokenizer(text)
        lengths = {side: length or RANDOM_MAX_LEN for side, length in lengths.items()}
        family = BertConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=model.hidden,
            num_layers=model.layers or 2,
            num_heads=model.heads,
            intermediate_size=model.intermediate,
            max_positions=max(lengths.values()),
        )
        origin = Origin("random weights", {}, frozenset(), {}, text, {})
        if model.projection:
            project = Projection(model.projection)
    else:
        files = weights.find(model.weights)
        tokenizer = tokenize.TextTokenizer(files.tokenizer_json)
        family = pretrained.encoder_config(files.config, layers=model.layers)
        params = _published_params(files, family)
        pooling, normalize = files.pooling, files.normalize
        project = files.dense.project if files.dense else None
        prefixes = {"query": files.query_prefix, "target": files.target_prefix}
        longest = min(files.max_len, family.max_positions)
        lengths = {side: length or longest for side, length in lengths.items()}
        if tokenizer.vocab_size > family.vocab_size:
            raise UserError(
                f"{model.weights}: the tokenizer has {tokenizer.vocab_size} tokens but the encoder "
                f"{family.vocab_size}: give tokenizer and weights of one model"
            )
        origin = Origin(
            source=files.source,
            config=files.config,
            names=frozenset(files.tensors),
            beside=pretrained.beside(files.tensors, pretrained.encoder_config(files.config)),
            tokenizer_json=files.tokenizer_json,
            tokenizer_files=files.tokenizer_files,
        )
        if model.projection:
            project = Projection(model.projection, bias=False)
            params["projection"] = _random_projection(config.seed, family.hidden_size, project)
    for side, length in lengths.items():
        if length > family.max_positions:
            raise UserError(
                f"config.data.{side}_max_len is {length} but the encoder reads at most "
                f"{family.max_positions} tokens: write {family.max_positions} or less"
            )
        if length <= tokenizer.special:
            given = data[f"{side}_max_len"]
            whose = f"config.data.{side}_max_len" if given else f"the length of {model.weights}"
            raise UserError(
                f"{whose} is {length} tokens, which hold no text beside {tokenizer.special} "
                f"special ones: write a larger config.data.{side}_max_len"
            )
    for side, written in (("query", data.query_prefix), ("target", data.target_prefix)):
        if not written and prefixes[side]:
            say(
                f"every {side} is read after {prefixes[side]!r}, as the weights ask for: "
                f"--config.data.{side}_prefix=none leaves it out"
            )
        prefixes[side] = "" if written == "none" else written or prefixes[side]
    encoder = Encoder(
        # The table is padded with the tokenizer's id, whatever config.json says.
        config=pretrained.replace(family, pad_id=tokenizer.pad_id),
        pooling=model.pooling or pooling,
        normalize={"": normalize, "yes": True, "no": False}[model.normalize],
        dtype=model.dtype,
        project=project,
    )
    tokenization = Tokenization(
        tokenizer, prefixes["query"], prefixes["target"], lengths["query"], lengths["target"]
    )
    return tokenization, encoder, params, origin


def _published_params(files: weights.EncoderFiles, family: Family) -> PyTree:
    """One tower's parameters on the host, the layer after pooling among them."""
    params = pretrained.params_from(files.tensors, family)
    if files.dense:
        params["projection"] = {"kernel": files.dense.kernel}
        if files.dense.bias is not None:
            params["projection"]["bias"] = files.dense.bias
    return params


def _random_projection(seed: int, width: int, project: Projection) -> PyTree:
    """A random layer after published weights: {"kernel": [width, D] float32}."""
    init = jax.nn.initializers.lecun_normal()
    return {"kernel": np.asarray(init(rng.key(seed, "projection"), (width, project.dim)))}


def _token_table(
    config: ConfigDict, data: RetrievalData, tokenization: Tokenization, place: Placement
) -> tuple[TargetTokens, np.ndarray]:
    table = load_tokens(config, data, tokenization)
    tokens = caches.create_tokens(
        table.ids[:, : _width(table.lengths, table.ids.shape[1])],
        fingerprint=table.fingerprint,
        pad_id=tokenization.tokenizer.pad_id,
        block_rows=config.negatives.block_rows,
        place=place,
    )
    return tokens, table.lengths


def _probe(
    config: ConfigDict, queries: np.ndarray, size: int, place: Placement
) -> tuple[Array, Array]:
    """A fixed sample of queries and targets, the same on any mesh: the gate hangs on it."""
    chosen = np.random.default_rng([config.seed, 2])
    rows = chosen.choice(
        len(queries), min(config.corrector.probe_queries, len(queries)), replace=False
    )
    ids = chosen.choice(size, min(config.corrector.probe_targets, size), replace=False)
    return place.put_everywhere(queries[rows]), place.put_everywhere(np.sort(ids).astype(np.int32))


def _mined(config: ConfigDict, data: RetrievalData) -> Sequence[np.ndarray]:
    """Per training query, the rows of its mined negatives."""
    split, path = data.splits["train"], config.negatives.path
    found: Sequence[np.ndarray] = split.negatives
    if path:
        place = paths.make(path)
        if not place.is_file():
            raise UserError(
                f"config.negatives.path is {path!r}, which is not a file: write a TREC run of the "
                "training queries, or have one made with --mode=mine"
            )
        found, rows = mined.read(place, split, data.target_ids, config.data.max_bad_rows)
        if rows.refused:
            first = next(iter(rows.refused.values())).message
            say(f"{path}: skipped {len(rows.refused):,} bad row(s); the first: {first}")
    counts = np.array([len(rows) for rows in found])
    if not counts.any():
        raise UserError(
            f"mined negatives are wanted but {path or data.name} names none for any training "
            "query: have them mined with --mode=mine, and write the file as "
            "--config.negatives.path"
        )
    say(
        f"mined negatives: {(counts > 0).sum():,} of {len(split.texts):,} training queries have "
        f"some, {counts[counts > 0].mean():.1f} each"
    )
    return found


def _width(lengths: np.ndarray, limit: int) -> int:
    return min(limit, -(-int(lengths.max()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)


def _describe(data: RetrievalData) -> str:
    queries: dict[str, Any] = {name: len(split.texts) for name, split in data.splits.items()}
    counts = ", ".join(f"{count:,} {name}" for name, count in queries.items())
    return f"data: {data.name}, {len(data.target_ids):,} targets, queries: {counts}"
