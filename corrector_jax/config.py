"""Every configuration key, once, with its default and what it means; and what cannot be.

A file in configs/ is `get_config()`: this default with a few keys set. An empty string or a zero
means "let the strategy, the weights or the data decide" where the comment says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from corrector_jax import refresh_policy
from corrector_jax.reader_losses import RETRIEVER_LOSSES
from corrector_jax.refresh_policy import RefreshPolicy
from corrector_jax.strategies import INDEXED, SAMPLED, STRATEGIES
from corrector_jax.types import UserError

WORDS: dict[str, tuple[str, ...]] = {
    "strategy": tuple(STRATEGIES),
    "data.layout": (
        *("", "beir", "msmarco", "dpr", "tevatron", "flag_embedding", "fid", "columns"),
        *("text_files", "tfds"),
    ),
    "data.published": ("", "nq", "msmarco", "triviaqa", "hotpotqa"),
    "data.eval_split": ("auto", "dev", "test"),
    "model.pooling": ("", "mean", "cls", "last"),
    "model.normalize": ("", "yes", "no"),
    "model.dtype": ("float32", "bfloat16"),
    "cache.dtype": ("float32", "bfloat16", "int8"),
    "corrector.kind": ("", "identity", "linear", "mlp", "nystrom"),
    "corrector.loss": ("mse", "kl", "both"),
    "negatives.proposal": ("", *INDEXED),
    "loss.estimator": ("", *SAMPLED),
    "reader.loss": tuple(RETRIEVER_LOSSES),
    "reader.unit": ("token", "sequence"),
    "reader.moves": ("both", "query", "none"),
    "refresh.policy": ("", "never", "every", "schedule", "adaptive", "always"),
    "train.schedule": ("linear", "cosine", "constant"),
    "eval.corpus": ("full", "sample", "corrected"),
    "eval.search": ("exact", "scann"),
}

FREE = (
    "eval.",
    "log.",
    "checkpoint.",
    "compile.",
    "embed.",
    "export.",
    "mine.",
    "search.",
    "serve.",
    "profile.",
    "mesh.",
    "cache.",
    "data.cache_dir",
    "data.holdout",  # what it holds out is part of the data, which must agree
    "data.layout",
    "data.max_bad_rows",
    "data.verify",
    "reader.beams",
    "reader.read",
    "train.chunk",
    "train.max_skipped",
    "train.remat",
)
"""Keys that do not shape the training state: they may differ when a run is resumed."""


def default() -> ConfigDict:
    """The default of every key. Keys that are not here are errors.

    Returns:
      A locked ConfigDict: a misspelt key raises.
    """
    c = ConfigDict()
    c.seed = 0  # every random choice is a function of it, of a stream's name and of the step
    # in_batch | uniform | mined | stale | corrected | nystrom | refreshed | oracle | streaming |
    # rolling: docs/method.md, 8
    c.strategy = "corrected"

    c.data = ConfigDict()
    c.data.path = ""  # a folder or file; empty = Python functions of the installed packages
    c.data.published = ""  # nq | msmarco | triviaqa | hotpotqa: see docs/published_data.md
    c.data.verify = True  # published files must have the known md5 and number of rows
    c.data.layout = ""  # how it is laid out (docs/data.md); empty = look, and say
    c.data.max_bad_rows = 0  # rows of the source that may be skipped; one more is an error
    c.data.cache_dir = ""  # texts and tokens, made once; empty = corrector_jax in ~/.cache
    c.data.target_template = "{title} {text}"  # how a title and a text become one target
    c.data.query_prefix = ""  # put before every query; empty = as the weights say, none = nothing
    c.data.target_prefix = ""  # put before every target; likewise
    c.data.query_max_len = 32  # tokens of a query, special tokens included; 0 = as the weights say
    c.data.target_max_len = 64  # tokens of a target; likewise
    c.data.holdout = 0.0  # share of the train queries that become dev, if there is no dev and test
    c.data.max_targets = 0  # keep only so many targets, chosen by hash; 0 = all
    c.data.max_queries = 0  # keep so many queries of dev and of test, chosen by hash; 0 = all
    c.data.eval_split = "auto"  # split of the last evaluation: auto (test, else dev) | dev | test

    c.model = ConfigDict()
    c.model.weights = "all-MiniLM-L6-v2"  # folder, hub id, or "random"
    c.model.tokenizer = "all-MiniLM-L6-v2"  # only where weights are random: whose tokenizer
    c.model.layers = 0  # keep the first k layers; 0 = all (random weights: 2)
    c.model.pooling = ""  # mean | cls | last; empty = as the weights say
    c.model.projection = 0  # D: a new dense layer after pooling, random; 0 = as the weights say
    c.model.normalize = ""  # unit vectors: yes | no; empty = as the weights say
    c.model.shared_towers = True  # one encoder for queries and targets, or one each
    c.model.beta = 20.0  # inverse temperature: logits are beta <f(x), g(y)>
    c.model.learn_beta = False  # learn it with the weights, from there on
    c.model.dtype = "float32"  # compute dtype; parameters are float32
    c.model.hidden = 128  # random weights only: width D
    c.model.heads = 4  # random weights only
    c.model.intermediate = 512  # random weights only

    c.cache = ConfigDict()
    c.cache.path = ""  # begin with the snapshot there (RUN/cache/STEP) instead of embedding
    c.cache.dtype = "float32"  # how stale rows are stored: float32 | bfloat16 | int8
    c.cache.sweep_mib = 64  # what the sweep may hold on a device at once: memory, never results
    c.cache.tile_rows = 0  # rows scored at once on a device; 0 = as many as sweep_mib allows

    c.corrector = ConfigDict()
    # identity | linear | mlp | nystrom; empty = the strategy's (corrected: mlp)
    c.corrector.kind = ""
    c.corrector.hidden = 0  # width of the mlp; 0 = D
    c.corrector.learning_rate = 1e-3  # of Adam; its own, not falling
    c.corrector.warmup = 100  # updates of the learning rate's ramp, after every reset too
    c.corrector.updates = 1  # per step; the others are on the last steps' pairs
    c.corrector.loss = "mse"  # mse | kl | both
    c.corrector.kl_weight = 0.0  # lambda of "both": MSE + lambda KL
    c.corrector.lengths_every = 20  # linear, of unit vectors: steps between measuring its lengths
    c.corrector.uniform_rows = 0  # uniform targets encoded per step for the drift loss
    c.corrector.landmarks = 1024  # nystrom: uniform targets whose drift is interpolated
    c.corrector.fit_every = 100  # nystrom: steps between encoding them anew
    c.corrector.ridge = 1e-2  # nystrom: lambda of the kernel ridge regression
    c.corrector.probe_every = 100  # steps between probes, which open the gate
    c.corrector.probe_targets = 1024  # uniform targets encoded at a probe
    c.corrector.probe_queries = 256  # held-out queries of a probe

    c.negatives = ConfigDict()
    c.negatives.proposal = ""  # two_level | gumbel_topk | topk | scann; empty = the strategy's
    c.negatives.draws = 8  # m, draws per query
    c.negatives.candidates = 256  # scann: K, targets per query that the index finds
    c.negatives.tail = 1024  # scann: M, uniform targets per batch that stand for all others
    c.negatives.mined = 0  # and so many of those found beforehand (truncated only)
    c.negatives.in_batch = False  # and the positives of the batch's other queries (truncated only)
    c.negatives.path = ""  # a file of mined negatives (docs/data.md); empty = the data's own
    c.negatives.max_relative_score = 0.0  # drop those above this share of s+, as 0.95; 0 = none
    c.negatives.block_rows = 64  # R, rows of a sampling block

    c.index = ConfigDict()  # ScaNN's, for negatives.proposal=scann and eval.search=scann:
    c.index.leaves = 0  # parts that targets are clustered into; 0 = from N; 1 = none, exact
    c.index.searched = 0  # of these, looked into for a query; 0 = from leaves and K
    c.index.reorder = 0  # targets scored exactly for a query; 0 = four times as many as wanted

    c.loss = ConfigDict()
    # truncated | single | weighted | balanced | kool; empty = the strategy's (docs/estimators.md)
    c.loss.estimator = ""
    c.loss.shared = False  # truncated only: pool all draws and positives of the batch

    c.reader = ConfigDict()  # who answers from what is retrieved, and trains the retriever by it:
    # folder or hub id of a T5, or "random"; empty = no reader: positives train
    c.reader.weights = ""
    c.reader.layers = 2  # random weights only: of the encoder and of the decoder
    c.reader.hidden = 128  # random weights only: width
    c.reader.heads = 4  # random weights only
    c.reader.intermediate = 512  # random weights only
    c.reader.passages = 8  # K, passages read for a question
    c.reader.loss = "pdist"  # what the retriever learns by: pdist | emdr2 | marginal
    c.reader.unit = "token"  # emdr2 and marginal sum passages out of each: token | sequence
    c.reader.retriever_temperature = 1.0  # of scores over the K passages, which beta multiplied
    c.reader.reader_temperature = 1.0  # pdist: of the reader's likelihoods
    c.reader.moves = "both"  # towers that learn from answers: both | query | none
    c.reader.learns = True  # whether the reader does too, not only in given_steps
    c.reader.rerank = 0  # L, targets encoded anew, of which the best K are read; 0 = K are drawn
    c.reader.given_steps = 0  # first steps, in which the reader alone learns, on given passages
    c.reader.given_share = 0.0  # share of the training questions that are asked in them alone
    c.reader.given = 1  # passages of those steps: a known positive, the rest uniform
    c.reader.learning_rate = 1e-4  # its peak; the schedule is train.schedule
    c.reader.warmup = 100  # steps of linear rise of it
    c.reader.query_prefix = ""  # put before every question for the reader
    c.reader.passage_prefix = ""  # put before every passage for the reader
    c.reader.query_max_len = 32  # tokens of a question for the reader
    c.reader.passage_max_len = 64  # tokens of a passage for the reader, special tokens included
    c.reader.answer_max_len = 16  # tokens of an answer, its end included; longer ones are left out
    c.reader.read = 0  # passages that evaluations read; 0 = K
    c.reader.beams = 1  # answers followed at once when answering; 1 = greedy

    c.refresh = ConfigDict()
    # never | every | schedule | adaptive | always; empty = the strategy's, or by what is set below
    c.refresh.policy = ""
    c.refresh.every = 0  # steps between refreshes
    c.refresh.schedule = ""  # another interval in each stretch: 0-1000:500,1000-end:2000
    c.refresh.threshold = 0.0  # adaptive: relative squared error at a probe that asks for one
    c.refresh.rows = 0  # rolling: targets re-embedded at every step

    c.train = ConfigDict()
    c.train.steps = 1000  # in all; a run of another number is another run, but for "constant"
    c.train.batch_size = 32  # queries per step, over all devices
    c.train.learning_rate = 2e-5  # its peak
    c.train.warmup = 100  # steps of linear rise of the learning rate
    c.train.schedule = "linear"  # linear | cosine | constant
    c.train.weight_decay = 0.0  # of AdamW
    c.train.clip = 1.0  # largest global gradient norm; 0 = no clip
    c.train.accumulate = 1  # steps whose gradients make one update
    c.train.chunk = 0  # texts encoded at once, over all devices (GradCache); 0 = all of a step's
    c.train.remat = False  # attention and activations are computed again backwards, not kept
    c.train.max_skipped = 10  # steps with a loss or gradient not finite before training stops

    c.eval = ConfigDict()
    c.eval.every = 0  # steps between evaluations on dev; 0 = only before and after
    c.eval.corpus = "full"  # those evaluations rank: full | sample | corrected
    c.eval.sample_targets = 4096  # uniform targets beside the judged ones, for "sample"
    c.eval.batch_size = 128  # targets embedded at once, over all devices
    c.eval.top_k = 100  # results kept per query; recall@100 needs 100
    c.eval.search = "exact"  # --mode=evaluate: exact | scann, and how much of the exact it finds
    c.eval.bm25 = True  # BM25 on the same queries
    c.eval.full_encoder = False  # also the untouched encoder with all its layers

    c.mine = ConfigDict()  # --mode=mine: negatives of the train split, for negatives.path
    c.mine.source = "bm25"  # what ranks: bm25, encoder (model.weights), a run's folder, a TREC file
    c.mine.output = ""  # where to; empty = negatives.trec in the workdir
    c.mine.depth = 200  # targets ranked for each query, known positives among them
    c.mine.skip = 0  # so many of the best are left out: they may be positives that nobody knows
    c.mine.keep = 50  # and so many of those behind them are kept
    c.mine.max_relative_score = 0.0  # drop those above this share of the positive's score; 0 = none
    c.mine.margin = 0.0  # drop those not so far below the positive's score; 0 = none

    c.embed = ConfigDict()
    c.embed.path = ""  # --mode=embed: a corpus.jsonl or its folder; empty = the run's own targets
    c.embed.output = ""  # where to; empty = embeddings/NAME of the workdir
    c.embed.shard_rows = 65536  # targets of a shard: what a killed process may lose
    c.embed.part = 0  # this process makes every parts-th shard, from part on
    c.embed.parts = 1  # processes that share the work

    c.export = ConfigDict()
    c.export.path = ""  # --mode=export: where to; empty = final/ of the workdir

    c.search = ConfigDict()
    c.search.show = "both"  # both (before, final) | all | before | stale | corrected | final
    c.search.count = 5  # targets shown of each

    c.serve = ConfigDict()
    c.serve.host = "127.0.0.1"  # who may ask: this machine alone; 0.0.0.0 = whoever reaches it
    c.serve.port = 8350  # 0 = any that is free
    c.serve.count = 10  # targets shown of each model

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 1000  # steps
    c.checkpoint.keep = 2  # the newest ones
    c.checkpoint.keep_every = 0  # and those of every so many steps; 0 = none of them
    c.checkpoint.keep_best = False  # and the one with the best mrr@10 on dev, by eval.every

    c.log = ConfigDict()
    c.log.every = 10  # steps between lines of metrics.jsonl
    c.log.tensorboard = True  # events beside metrics.jsonl
    c.log.report = True  # report.html and its pictures, at the end

    c.profile = ConfigDict()
    c.profile.steps = ""  # trace these, as 20:25 (25 not among them), into profile/; empty = none

    c.compile = ConfigDict()  # --mode=compile, which needs no data:
    c.compile.targets = 0  # N; 0 = of the published set
    c.compile.known = 32  # K, known positives of the query that has most
    c.compile.queries = 4096  # Q, evaluated at once

    c.mesh = ConfigDict()
    c.mesh.devices = 0  # devices to use; 0 = all
    c.mesh.fsdp = 1  # of these, so many share the width of parameters and optimizer state
    c.mesh.tensor = 1  # and so many the heads and inner width of every layer
    c.mesh.timeout = 1800.0  # seconds without a step after which another process is given up
    return c.lock()


get_config = default
"""This file as a file of configs/: what modes start from that take a run's own configuration."""


def validate(config: ConfigDict) -> None:
    """Says what is impossible or contradictory, and what to write instead.

    Args:
      config: the whole configuration.

    Raises:
      UserError: one sentence, naming the key.
    """
    missing = dict(flat(default())).keys() - dict(flat(config)).keys()
    if missing:
        raise UserError(
            f"the configuration has no {min(missing)}: start from corrector_jax.config.default() "
            "and set keys of it, as the files of configs/ do"
        )
    check_values(config)
    _validate_together(config)


def check_values(config: ConfigDict) -> None:
    """Says which value no key may have, whatever the others are.

    What a finished run was made with is held against this alone: rules on what goes together have
    become more since.

    Raises:
      UserError: one sentence, naming the key.
    """
    for key, words in WORDS.items():
        value = get(config, key)
        if value not in words:
            shown = ", ".join(word or "'' (let others decide)" for word in words)
            raise UserError(f"config.{key} is {value!r}: write one of {shown}")
    for key, least in _LEAST.items():
        if get(config, key) < least:
            raise UserError(f"config.{key} is {get(config, key)}: write {least} or more")
    if not 0 <= config.data.holdout <= 0.5:
        raise UserError(
            f"config.data.holdout is {config.data.holdout}: write a share from 0 (none) to 0.5"
        )
    for key in ("data.query_max_len", "data.target_max_len"):
        if get(config, key) and get(config, key) < 3:
            raise UserError(
                f"config.{key} is {get(config, key)}: write 3 or more, or 0 for what the weights "
                "say"
            )
    for key in _POSITIVE:
        if not get(config, key) > 0:
            raise UserError(f"config.{key} is {get(config, key)}: write a number above 0")


def _validate_together(config: ConfigDict) -> None:
    if config.train.warmup >= config.train.steps:
        raise UserError(
            f"config.train.warmup is {config.train.warmup} of {config.train.steps} steps: write "
            "fewer than config.train.steps"
        )
    if config.data.published and not config.data.path:
        raise UserError(
            f"config.data.published is {config.data.published!r} but config.data.path is empty: "
            "write the folder that holds it, or that --mode=prepare_data shall fill"
        )
    if config.reader.weights:
        _validate_reader(config)
    _validate_strategy(config)
    _validate_corrector(config)
    if config.loss.shared and (estimator := chosen(config)["estimator"]) != "truncated":
        raise UserError(
            f"config.loss.shared pools positives, which only 'truncated' allows, but the estimator "
            f"is {estimator!r}: drop it or write --config.loss.estimator=truncated"
        )
    if config.eval.corpus == "corrected" and not STRATEGIES[config.strategy].uses_cache:
        raise UserError(
            f"config.eval.corpus is 'corrected' but strategy {config.strategy!r} has no cache to "
            "rank: write 'full' or 'sample'"
        )
    if config.eval.search != "exact":
        raise UserError(
            "config.eval.search is 'scann' but what a run finds of itself is exact: write it with "
            "--mode=evaluate alone"
        )
    saves, evaluates = config.checkpoint.every, config.eval.every
    if config.checkpoint.keep_best and (not evaluates or saves % evaluates):
        raise UserError(
            "config.checkpoint.keep_best needs an evaluation at every save, but config.eval.every "
            f"is {evaluates} and config.checkpoint.every {saves}: write one that divides the other"
        )
    if config.strategy == "in_batch" and config.train.batch_size < 2:
        raise UserError(
            "config.train.batch_size is 1 but the negatives of 'in_batch' are the other queries' "
            "positives: write 2 or more"
        )
    if config.eval.full_encoder and config.model.weights == "random":
        raise UserError(
            "config.eval.full_encoder compares with published weights but config.model.weights is "
            "'random': write False"
        )
    _validate_mine(config)
    profiled(config)
    tile = config.cache.tile_rows
    if 0 < tile < config.negatives.block_rows:
        raise UserError(
            f"config.cache.tile_rows is {tile}, less than one sampling block: write "
            f"{config.negatives.block_rows} or more, or a smaller config.negatives.block_rows"
        )
    if config.train.steps % config.train.accumulate:
        raise UserError(
            f"config.train.steps is {config.train.steps}, not a multiple of "
            f"config.train.accumulate ({config.train.accumulate}): the last gradients would be lost"
        )


def in_words(config: ConfigDict) -> str:
    """One line on what trains: what the strategy left open has been chosen."""
    words, strategy = chosen(config), STRATEGIES[config.strategy]
    loss = config.reader.loss if config.reader.weights else words["estimator"]
    parts = [f"strategy: {config.strategy}", f"negatives by {words['proposal']}", f"loss {loss}"]
    if strategy.uses_cache:
        parts += [f"corrector {words['corrector']}", f"refresh {words['refresh']}"]
    return ", ".join(parts)


def chosen(config: ConfigDict) -> dict[str, str]:
    """The words the strategy and the overrides add up to.

    Args:
      config: the configuration.

    Returns:
      {"proposal", "corrector", "refresh", "estimator"}.
    """
    strategy, refresh = STRATEGIES[config.strategy], config.refresh
    asked = [word for word, key in _REFRESHED_BY.items() if refresh[key]]
    allowed = [word for word in asked if word in strategy.refreshes]
    proposal = config.negatives.proposal or ("topk" if config.reader.weights else "")
    proposal = proposal or strategy.proposals[0]
    estimator = {"gumbel_topk": "kool", "topk": "truncated"}.get(proposal, strategy.estimators[0])
    if config.negatives.mined or config.negatives.in_batch:
        estimator = "truncated"
    return {
        "proposal": proposal,
        "corrector": config.corrector.kind or strategy.correctors[0],
        "refresh": refresh.policy or (allowed or strategy.refreshes)[0],
        "estimator": config.loss.estimator or estimator,
    }


def profiled(config: ConfigDict) -> range:
    """The steps to trace; none where none are asked for.

    Raises:
      UserError: they cannot be read, lie outside the run, or are of two kinds.
    """
    text = config.profile.steps
    if not text:
        return range(0)
    first, colon, last = str(text).partition(":")
    if colon and first.isdecimal() and last.isdecimal():
        steps = range(int(first), int(last))
        given = config.reader.given_steps if config.reader.weights else 0
        if steps and steps.start < given < steps.stop:
            raise UserError(
                f"config.profile.steps is {text!r}, steps of two kinds: end at step {given}, where "
                "config.reader.given_steps ends, or begin there"
            )
        if steps and steps.stop <= config.train.steps:
            return steps
    raise UserError(
        f"config.profile.steps is {text!r} of {config.train.steps} steps: write the first and the "
        "one after the last, as 20:25"
    )


def refresh_policy_of(config: ConfigDict) -> RefreshPolicy:
    """When the cache is re-embedded.

    Raises:
      UserError: the schedule cannot be read.
    """
    refresh = config.refresh
    made: dict[str, Callable[[], RefreshPolicy]] = {
        "never": refresh_policy.Never,
        "every": lambda: refresh_policy.every(refresh.every),
        "always": lambda: refresh_policy.every(1),
        "schedule": lambda: refresh_policy.parse(refresh.schedule),
        "adaptive": lambda: refresh_policy.Adaptive(
            refresh.threshold, config.corrector.probe_every
        ),
    }
    return made[chosen(config)["refresh"]]()


def get(config: ConfigDict, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def flat(config: ConfigDict | dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value)."""
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def to_json(config: ConfigDict) -> str:
    """The configuration as readable JSON, for `config.json`."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """The configuration that `to_json` wrote; keys that are new since keep their default.

    Raises:
      UserError: it is another's, or no configuration can be as it says.
    """
    config = default()
    known = dict(flat(config))
    try:
        keys = list(flat(json.loads(text, parse_constant=_constant)))
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"config.json is not what a run wrote ({error}): put it back") from error
    for key, value in keys:
        if key not in known:
            shown = repr(key)[:80]
            raise UserError(f"config.json has the key {shown}, which this version does not know")
        if not _of_a_kind(value, known[key]):
            raise UserError(f"config.json: {key} is {repr(value)[:80]}: put it back")
        *sections, name = key.split(".")
        (get(config, ".".join(sections)) if sections else config)[name] = value
    return config


def _constant(name: str) -> float:
    """A number that JSON has no way to write: a limit may be infinite, nothing is NaN."""
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)


def _of_a_kind(value: object, default: object) -> bool:
    """Whether a key that has this default may have this value.

    A ConfigDict takes None for a text, and a whole number for a float.
    """
    if isinstance(value, int) and abs(value) >= 2**63:
        return False
    if isinstance(default, float):
        return type(value) in (int, float)
    if isinstance(default, str):
        # Halves of surrogate pairs, but for the bytes of a file's name that are not UTF-8.
        return value is None or (
            isinstance(value, str) and not re.search("[\ud800-\udc7f\udd00-\udfff]", value)
        )
    return type(value) is type(default)


def refuse_other_run(config: ConfigDict, saved: ConfigDict, workdir: str) -> None:
    """Refuses to resume a run under a configuration that shapes another training state.

    Args:
      config: what is asked for now.
      saved: what the workdir was made with.
      workdir: named in the message.

    Raises:
      UserError: the keys that differ, and what to do.
    """
    before, now = dict(flat(saved)), dict(flat(config))
    differ = [key for key in now if not key.startswith(FREE) and now[key] != before.get(key)]
    grows = now["train.steps"] >= before["train.steps"]
    if grows and now["train.schedule"] == "constant" and "train.steps" in differ:
        differ.remove("train.steps")  # nothing done so far depends on how long it goes on
    if differ:
        shown = ", ".join(f"{key} ({before.get(key)!r} there, {now[key]!r} now)" for key in differ)
        raise UserError(
            f"{workdir} holds a run with another configuration: {shown}; give the same values to "
            "resume it, or another --workdir"
        )


_REFRESHED_BY = {"every": "every", "schedule": "schedule", "adaptive": "threshold"}
"""Refresh policy -> the key of config.refresh that it reads."""

_LEAST = {
    "seed": 0,
    "data.max_bad_rows": 0,
    "data.max_targets": 0,
    "data.max_queries": 0,
    "model.layers": 0,
    "model.projection": 0,
    "model.hidden": 1,
    "model.heads": 1,
    "model.intermediate": 1,
    "cache.sweep_mib": 1,
    "cache.tile_rows": 0,
    "corrector.hidden": 0,
    "corrector.landmarks": 1,
    "corrector.lengths_every": 1,
    "corrector.fit_every": 1,
    "corrector.warmup": 0,
    "corrector.updates": 1,
    "corrector.uniform_rows": 0,
    "corrector.probe_every": 0,
    "corrector.probe_targets": 1,
    "corrector.probe_queries": 1,
    "negatives.draws": 1,
    "negatives.candidates": 1,
    "negatives.tail": 1,
    "index.leaves": 0,
    "index.searched": 0,
    "index.reorder": 0,
    "negatives.mined": 0,
    "negatives.max_relative_score": 0.0,
    "negatives.block_rows": 1,
    "reader.layers": 1,
    "reader.hidden": 1,
    "reader.heads": 1,
    "reader.intermediate": 1,
    "reader.passages": 1,
    "reader.rerank": 0,
    "reader.given_steps": 0,
    "reader.given_share": 0.0,
    "reader.given": 1,
    "reader.warmup": 0,
    "reader.query_max_len": 1,
    "reader.passage_max_len": 3,
    "reader.answer_max_len": 2,
    "reader.read": 0,
    "reader.beams": 1,
    "refresh.every": 0,
    "refresh.threshold": 0.0,
    "refresh.rows": 0,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.warmup": 0,
    "train.weight_decay": 0.0,
    "train.clip": 0.0,
    "train.accumulate": 1,
    "train.chunk": 0,
    "train.max_skipped": 0,
    "eval.every": 0,
    "eval.sample_targets": 1,
    "eval.batch_size": 1,
    "eval.top_k": 100,
    "mine.depth": 1,
    "mine.skip": 0,
    "mine.keep": 1,
    "mine.max_relative_score": 0.0,
    "mine.margin": 0.0,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "checkpoint.keep_every": 0,
    "log.every": 1,
    "compile.targets": 0,
    "compile.known": 1,
    "compile.queries": 1,
    "mesh.devices": 0,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
}

_POSITIVE = (
    "mesh.timeout",
    "model.beta",
    "train.learning_rate",
    "corrector.learning_rate",
    "corrector.ridge",
    "reader.learning_rate",
    "reader.retriever_temperature",
    "reader.reader_temperature",
)


def _validate_strategy(config: ConfigDict) -> None:
    strategy = STRATEGIES[config.strategy]
    allowed = {
        "negatives.proposal": strategy.proposals,
        "corrector.kind": strategy.correctors,
        "refresh.policy": strategy.refreshes,
        "loss.estimator": strategy.estimators,
    }
    for key, words in allowed.items():
        value = get(config, key)
        if value and value not in words:
            raise UserError(
                f"config.{key} is {value!r}, which strategy {config.strategy!r} does not allow: "
                f"write {' or '.join(map(repr, words))}, leave it empty, or change config.strategy"
            )
    refresh = chosen(config)["refresh"]
    for word, key in _REFRESHED_BY.items():
        value = config.refresh[key]
        if refresh == word and not value:
            shown = {"every": "500", "schedule": refresh_policy.EXAMPLE, "threshold": "0.05"}[key]
            raise UserError(
                f"strategy {config.strategy!r} refreshes the cache by {word!r} but config.refresh."
                f"{key} is {value!r}: write it, as in --config.refresh.{key}={shown}"
            )
        if refresh != word and value:
            raise UserError(
                f"config.refresh.{key} is {value!r}, which only policy {word!r} reads, but "
                f"strategy {config.strategy!r} has policy {refresh!r}: drop it, or write another "
                "config.refresh.policy or config.strategy"
            )
    if refresh == "adaptive" and not config.corrector.probe_every:
        raise UserError(
            "config.refresh.policy 'adaptive' decides by the probe but config.corrector."
            "probe_every is 0: write how many steps lie between probes"
        )
    if (strategy.cache == "rolling") != bool(config.refresh.rows):
        raise UserError(
            f"config.refresh.rows is {config.refresh.rows}, but strategy {config.strategy!r} "
            + (
                "re-embeds so many targets at every step: write 1 or more"
                if strategy.cache == "rolling"
                else "re-embeds none within steps: drop it"
            )
        )
    policy, steps = refresh_policy_of(config), config.train.steps
    # An interval longer than the run is a long run cut short to try it; these are mistakes.
    if refresh in ("schedule", "adaptive") and policy.shortest(steps) >= steps:
        raise UserError(
            f"strategy {config.strategy!r} refreshes the cache by {refresh!r} but not once in "
            f"{steps} steps: refresh earlier"
            + (", by a smaller config.corrector.probe_every" if refresh == "adaptive" else "")
        )
    _validate_draws(config)


def _validate_draws(config: ConfigDict) -> None:
    words, negatives = chosen(config), config.negatives
    proposal, estimator = words["proposal"], words["estimator"]
    if (estimator == "kool") != (proposal == "gumbel_topk") and estimator != "truncated":
        raise UserError(
            f"config.loss.estimator {estimator!r} does not fit draws by {proposal!r}: 'kool' goes "
            "with --config.negatives.proposal=gumbel_topk and that with 'kool' or 'truncated' alone"
        )
    if negatives.max_relative_score > 1:
        raise UserError(
            f"config.negatives.max_relative_score is {negatives.max_relative_score}, above the "
            "positive's own score: write a share up to 1, as 0.95, or 0 to drop none"
        )
    joined = [key for key in ("mined", "in_batch") if negatives[key]]
    if estimator != "truncated" and (proposal == "topk" or joined):
        what = f"config.negatives.{joined[0]}" if joined else "config.negatives.proposal 'topk'"
        raise UserError(
            f"{what} gives negatives without a probability, which only the estimator 'truncated' "
            f"takes, but config.loss.estimator is {estimator!r}: write 'truncated' or drop it"
        )
    if proposal == "mined" and negatives.mined:
        raise UserError(
            "config.negatives.mined joins mined negatives to others but strategy 'mined' has "
            "nothing else: write their number as config.negatives.draws"
        )
    if negatives.path and not negatives.mined and proposal != "mined":
        raise UserError(
            f"config.negatives.path is {negatives.path!r} but nothing reads it: write "
            "--config.strategy=mined, or --config.negatives.mined=1 to join one to the draws"
        )
    if negatives.in_batch and (proposal == "in_batch" or config.loss.shared):
        already = "config.loss.shared" if config.loss.shared else "strategy 'in_batch'"
        raise UserError(
            f"config.negatives.in_batch pools the batch's positives, as {already} does: drop it"
        )


def _validate_reader(config: ConfigDict) -> None:
    reader, steps = config.reader, config.train.steps
    if not STRATEGIES[config.strategy].uses_cache:
        able = " or ".join(repr(name) for name, one in STRATEGIES.items() if one.uses_cache)
        raise UserError(
            f"config.reader.weights names a reader but strategy {config.strategy!r} has no cache "
            f"to find passages in: write {able}"
        )
    if config.negatives.proposal == "two_level":
        raise UserError(
            "config.negatives.proposal is 'two_level', which may draw a passage twice, but a "
            "reader reads distinct ones: write 'topk', 'gumbel_topk' or 'scann'"
        )
    unread = ("loss.estimator", "loss.shared", "negatives.mined", "negatives.in_batch")
    for key in (*unread, "negatives.path", "negatives.max_relative_score"):
        if get(config, key):
            raise UserError(
                f"config.{key} is {get(config, key)!r}, which only a retriever trained from "
                "positives reads, but config.reader.weights names a reader: drop one of them"
            )
    if 0 < reader.rerank <= reader.passages:
        raise UserError(
            f"config.reader.rerank chooses {reader.passages} passages among {reader.rerank}: write "
            "more than config.reader.passages, or 0"
        )
    wanted = reader.rerank or reader.passages
    if config.negatives.proposal == "scann" and config.negatives.candidates < wanted:
        raise UserError(
            f"config.negatives.candidates is {config.negatives.candidates} but {wanted} passages "
            f"are wanted of them: write {wanted} or more"
        )
    if reader.moves == "query" and config.model.shared_towers:
        raise UserError(
            "config.reader.moves is 'query' but queries and targets share one encoder: write "
            "--config.model.shared_towers=False"
        )
    if bool(reader.given_steps) != bool(reader.given_share):
        raise UserError(
            f"config.reader.given_steps is {reader.given_steps} and config.reader.given_share "
            f"{reader.given_share}: write both, or neither"
        )
    if reader.weights == "random" and not (reader.learns or reader.given_steps):
        raise UserError(
            "config.reader.learns is False and config.reader.weights 'random', a reader that would "
            "never learn to read: write config.reader.given_steps and config.reader.given_share"
        )
    if reader.given_share >= 1:
        raise UserError(
            f"config.reader.given_share is {reader.given_share}, which leaves no question to "
            "retrieve for: write less than 1"
        )
    if reader.given_steps + config.train.warmup >= steps or reader.warmup >= steps:
        raise UserError(
            f"config.reader.given_steps is {reader.given_steps}, config.train.warmup "
            f"{config.train.warmup} and config.reader.warmup {reader.warmup} of {steps} steps: "
            "write more config.train.steps"
        )
    if reader.given_steps and not reader.learns and reader.warmup >= reader.given_steps:
        raise UserError(
            f"config.reader.warmup is {reader.warmup} of the {reader.given_steps} steps in which "
            "the reader learns (config.reader.learns is False): write less"
        )
    if reader.given_steps % config.train.accumulate:
        raise UserError(
            f"config.reader.given_steps is {reader.given_steps}, not a multiple of "
            f"config.train.accumulate ({config.train.accumulate}): write one"
        )
    if reader.weights == "random" and reader.hidden % reader.heads:
        raise UserError(
            f"config.reader.heads is {reader.heads}, which does not divide config.reader.hidden "
            f"({reader.hidden}): write a divisor"
        )


def _validate_mine(config: ConfigDict) -> None:
    mine = config.mine
    if mine.skip + mine.keep > mine.depth:
        raise UserError(
            f"config.mine.depth ranks {mine.depth} targets a query but config.mine.skip + "
            f"config.mine.keep is {mine.skip} + {mine.keep}: write a larger depth, or fewer"
        )
    if mine.max_relative_score > 1:
        raise UserError(
            f"config.mine.max_relative_score is {mine.max_relative_score}, above the positive's "
            "own score: write a share up to 1, or 0 to drop none"
        )


def _validate_corrector(config: ConfigDict) -> None:
    corrector, words = config.corrector, chosen(config)
    if words["corrector"] in ("linear", "mlp"):
        life = refresh_policy_of(config).shortest(config.train.steps)
        if not 0 < corrector.probe_every < life:
            raise UserError(
                f"config.corrector.probe_every is {corrector.probe_every} but a snapshot of the "
                f"cache lives {life} steps, so the corrector would never be used: write 1 to "
                f"{life - 1}"
            )
    if words["corrector"] == "nystrom" and corrector.fit_every >= config.train.steps:
        raise UserError(
            f"config.corrector.fit_every is {corrector.fit_every} of {config.train.steps} steps, "
            "so the corrector would never be fitted: write fewer than config.train.steps"
        )
    if corrector.loss == "kl" and corrector.uniform_rows:
        raise UserError(
            f"config.corrector.uniform_rows is {corrector.uniform_rows} but loss 'kl' reads only "
            "the task's candidates: write 0 or --config.corrector.loss=both"
        )
    if corrector.loss == "both" and not corrector.kl_weight > 0:
        raise UserError(
            "config.corrector.loss is 'both' (MSE + lambda KL) but lambda is not set: write "
            "--config.corrector.kl_weight with a number above 0"
        )
    if corrector.loss != "both" and corrector.kl_weight:
        raise UserError(
            f"config.corrector.kl_weight is {corrector.kl_weight} but only loss 'both' reads it: "
            "write 0 or --config.corrector.loss=both"
        )
    if corrector.loss == "kl" and chosen(config)["estimator"] == "single":
        raise UserError(
            "config.corrector.loss 'kl' cannot see a shift common to all targets, so log Z would "
            "be wrong for the estimator 'single': write 'mse' or 'both', or another estimator"
        )
    if corrector.loss == "kl" and words["proposal"] == "scann":
        raise UserError(
            "config.corrector.loss 'kl' cannot see a shift common to all targets, so candidates "
            "and the uniform sample beside them would be weighed wrongly under "
            "config.negatives.proposal 'scann': write 'mse' or 'both', or another proposal"
        )
    if corrector.loss != "mse" and corrector.updates > 1:
        raise UserError(
            f"config.corrector.updates is {corrector.updates} but only loss 'mse' can learn from "
            "earlier steps' pairs: write 1 or --config.corrector.loss=mse"
        )
