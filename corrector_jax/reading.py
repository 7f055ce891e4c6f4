"""What answering adds to a job: the reader, its own table of the corpus, questions and answers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from corrector_jax import cache as caches
from corrector_jax import weights
from corrector_jax.cache import TargetTokens
from corrector_jax.data import dataset, order, sources, tokenize
from corrector_jax.data.dataset import RetrievalData, Split
from corrector_jax.data.token_table import token_table
from corrector_jax.data.tokenize import TextTokenizer
from corrector_jax.model_folder import Clothes
from corrector_jax.models import pretrained
from corrector_jax.models.reader import Reader, ReaderConfig
from corrector_jax.models.t5 import T5Config
from corrector_jax.sharding import Placement
from corrector_jax.types import Asked, PyTree, UserError
from corrector_jax.writer import say

GIVEN = "given"
"""The split of questions that are asked while passages are given, and never afterwards."""


@dataclasses.dataclass(frozen=True)
class LoadedReader:
    """A reader, and what it came with.

    Attributes:
      reader: the model.
      params: its parameters at the start, on the host; None = random.
      tokenizer: how it reads texts.
      clothes: what it goes out in again.
      source: where it came from, in words.
    """

    reader: Reader
    params: PyTree
    tokenizer: TextTokenizer
    clothes: Clothes
    source: str


@dataclasses.dataclass(frozen=True)
class Questions:
    """The data as the reader reads it.

    Attributes:
      loaded: the reader.
      passages: the corpus as its tokens.
      questions: split name -> [n, T] int32, without special tokens.
      answers: of the splits that train: name -> for each question its answers, [a, T'] int32.
    """

    loaded: LoadedReader
    passages: TargetTokens
    questions: dict[str, np.ndarray]
    answers: dict[str, Sequence[np.ndarray]]

    def asked(self, split: str, rows: np.ndarray, *, seed: int, step: int) -> Asked:
        """What the queries [B] of a step ask, and one answer of each, [B, T] and [B, T']."""
        answer = order.choose_answer(rows, self.answers[split], seed=seed, step=step)
        return Asked(self.questions[split][rows], answer)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of all that the reader is trained on."""
        digest = hashlib.sha256(self.passages.fingerprint.encode())
        for name, table in sorted(self.questions.items()):
            digest.update(f"{name} {table.shape}".encode() + table.tobytes())
        for name, lists in sorted(self.answers.items()):
            digest.update(name.encode())
            for rows in lists:
                digest.update(rows.tobytes() + b";")
        return digest.hexdigest()

    def text(self, answer: np.ndarray) -> str:
        """An answer [T] up to its end token, as a text."""
        ids, config = answer.tolist(), self.loaded.reader.config
        ids = ids[: ids.index(config.end_id)] if config.end_id in ids else ids
        return self.loaded.tokenizer.decode([i for i in ids if i != config.encoder.pad_id])


def load_reader(config: ConfigDict, tokenizer_json: str) -> LoadedReader:
    """Finds or makes the reader that a configuration names.

    Args:
      config: validated, with a reader.
      tokenizer_json: the content of the retriever's, which a random reader shares.

    Returns:
      The reader.

    Raises:
      UserError: there is no such reader, or its tokenizer is not its own.
    """
    name, dtype = config.reader.weights, config.model.dtype
    if name == "random":
        tokenizer = TextTokenizer(tokenizer_json)
        found = random_reader(config, tokenizer)
        clothes = Clothes({}, frozenset(), {}, tokenizer_json, {}, tokenizer.word(tokenizer.pad_id))
        return LoadedReader(Reader(found, dtype), None, tokenizer, clothes, "random weights")
    files = weights.find_reader(name)
    tokenizer = TextTokenizer(files.tokenizer_json)
    found = pretrained.reader_config(files.config, files.tensors)
    if tokenizer.vocab_size > found.encoder.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {tokenizer.vocab_size} tokens but the reader "
            f"{found.encoder.vocab_size}: give tokenizer and weights of one model"
        )
    if tokenizer.pad_id != found.encoder.pad_id:
        raise UserError(
            f"{name}: the tokenizer pads with {tokenizer.pad_id} but the reader with "
            f"{found.encoder.pad_id}: give tokenizer and weights of one model"
        )
    if tokenizer.end_id != found.end_id:
        raise UserError(
            f"{name}: the tokenizer ends a text with {tokenizer.end_id} but the reader an answer "
            f"with {found.end_id}: give tokenizer and weights of one model"
        )
    clothes = Clothes(
        config=files.config,
        names=frozenset(files.tensors),
        beside=pretrained.beside(files.tensors, found),
        tokenizer_json=files.tokenizer_json,
        tokenizer_files=files.tokenizer_files,
        pad_token=tokenizer.word(tokenizer.pad_id),
    )
    params = pretrained.params_from(files.tensors, found)
    return LoadedReader(Reader(found, dtype), params, tokenizer, clothes, files.source)


def random_reader(config: ConfigDict, tokenizer: TextTokenizer) -> ReaderConfig:
    """The sizes of a reader that starts from nothing, with the retriever's tokenizer."""
    reader = config.reader
    sizes = T5Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=reader.hidden,
        num_layers=reader.layers,
        num_heads=reader.heads,
        head_size=reader.hidden // reader.heads,
        intermediate_size=reader.intermediate,
        pad_id=tokenizer.pad_id,
    )
    start, end = tokenizer.pad_id, tokenizer.end_id
    return ReaderConfig(sizes, reader.layers, start_id=start, end_id=end)


def answerable(config: ConfigDict, data: RetrievalData, tokenizer: TextTokenizer) -> RetrievalData:
    """The questions with an answer short enough; some of train set aside, to be given passages.

    Args:
      config: validated, with a reader.
      data: with answers.
      tokenizer: the reader's.

    Returns:
      The same corpus, with a split `GIVEN` where passages are given.

    Raises:
      UserError: no question of a split has an answer, or none is left.
    """
    longest, splits = config.reader.answer_max_len, {}
    for name, split in data.splits.items():
        if not len(split.answers):
            raise UserError(
                f"the {name} questions of {data.name} have no answers, which config.reader.weights "
                "asks for: give data with answers, or drop the reader"
            )
        held = [bool(len(_tokens(some, tokenizer, longest))) for some in split.answers]
        rows = np.flatnonzero(held)
        if len(rows) < len(held):
            say(
                f"{len(held) - len(rows):,} of {len(held):,} {name} questions are left out: no "
                f"answer of theirs has {longest} tokens or fewer (config.reader.answer_max_len)"
            )
        if len(rows):
            splits[name] = dataset.keep_queries(split, rows.tolist())
    if "train" in splits and config.reader.given_share:
        splits |= _set_aside(splits.pop("train"), config.reader.given_share)
    missing = [name for name in data.splits if not splits.get(name)]
    if missing or (config.reader.given_share and not splits.get(GIVEN)):
        raise UserError(
            f"no {(missing or [GIVEN])[0]} question of {data.name} is left: write a larger "
            "config.reader.answer_max_len, or another config.reader.given_share"
        )
    return dataclasses.replace(data, splits=splits)


def ask(
    config: ConfigDict,
    data: RetrievalData,
    loaded: LoadedReader,
    tokens: TargetTokens,
    *,
    tokenizer: TextTokenizer,
    prefix: str,
    place: Placement,
) -> Questions:
    """Tokenizes questions, answers and, where it must be, the corpus once more.

    Args:
      config: validated, with a reader.
      data: of `answerable`.
      loaded: the reader.
      tokens: the retriever's table, which serves the reader too if it says the same.
      tokenizer: the retriever's.
      prefix: what the retriever reads before every target.
      place: the mesh.

    Returns:
      What the reader reads.
    """
    reader, own = config.reader, loaded.tokenizer
    alike = own.fingerprint == tokenizer.fingerprint and prefix == reader.passage_prefix
    # One cut shorter later would have lost its end token.
    if not alike or reader.passage_max_len != tokens.ids.shape[1]:
        table = token_table(
            data.target_texts,
            own,
            name=data.name,
            content_fingerprint=data.fingerprint(),
            template=config.data.target_template,
            prefix=reader.passage_prefix,
            max_len=reader.passage_max_len,
            folder=sources.cache_folder(config.data.cache_dir) / "tokens",
            keys="reader.passage",
        )
        tokens = caches.create_tokens(
            table.ids,
            fingerprint=table.fingerprint,
            pad_id=own.pad_id,
            block_rows=config.negatives.block_rows,
            place=place,
        )
    questions = {
        name: own.bare(split.texts, max_len=reader.query_max_len, prefix=reader.query_prefix)
        for name, split in data.splits.items()
    }
    # A batch has one width: what no question needs is cut off for all of them.
    widest = max(int(tokenize.lengths(table, own.pad_id).max()) for table in questions.values())
    return Questions(
        loaded=loaded,
        passages=tokens,
        questions={name: table[:, : max(widest, 1)] for name, table in questions.items()},
        answers={
            name: [_tokens(some, own, reader.answer_max_len) for some in data.splits[name].answers]
            for name in ("train", GIVEN)
            if name in data.splits
        },
    )


def _tokens(answers: Sequence[str], tokenizer: TextTokenizer, longest: int) -> np.ndarray:
    """[a, longest] int32: those of the answers that fit with their end, each once."""
    rows = tokenizer.bare(answers, max_len=longest)
    lengths = tokenize.lengths(rows, tokenizer.pad_id)
    rows[np.arange(len(rows)), np.minimum(lengths, longest - 1)] = tokenizer.end_id
    return np.unique(rows[(lengths > 0) & (lengths < longest)], axis=0)


def _set_aside(split: Split, share: float) -> dict[str, Split]:
    """A share of a split's questions, chosen by hash: the same on every machine."""
    far = np.array([dataset.stable_hash(f"given {one}") / 2**64 for one in split.query_ids])
    rows = {"train": far >= share, GIVEN: far < share}
    return {
        name: dataset.keep_queries(split, np.flatnonzero(chosen).tolist())
        for name, chosen in rows.items()
        if chosen.any()
    }
