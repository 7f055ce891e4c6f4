"""Texts to token tables: a thin, exact wrapper of a `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import tokenizers

from corrector_jax.types import UserError, brief

_CHUNK = 1024  # texts tokenized at once: bounds memory, since each keeps its overflow
_PAD_WORDS = ("[PAD]", "<pad>", "<|pad|>")  # BERT, T5 and RoBERTa, others


class TextTokenizer:
    """A tokenizer that ignores the lengths its file happens to fix.

    Attributes:
      vocab_size: one more than the largest id.
      pad_id: the id that fills rows up.
      special: how many tokens it puts around a text.
      fingerprint: sha256, in hex, of the tokenizer.json.
    """

    def __init__(self, tokenizer_json: str | bytes):
        """Makes the tokenizer from the content of a tokenizer.json.

        Raises:
          UserError: the content is no tokenizer, or names no padding token.
        """
        content = tokenizer_json.encode() if isinstance(tokenizer_json, str) else tokenizer_json
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
            self.vocab_size = max(vocabulary.values()) + 1
            # What does not fit together comes up with the first text.
            most = max([*self._tokenizer.encode("a").ids, *self._tokenizer.encode("").ids, 0])
        except Exception as error:  # the library raises nothing more precise
            what = brief(error, 160)
            raise UserError(f"The tokenizer.json is not one ({what}): give a valid one.") from error
        self.fingerprint = hashlib.sha256(content).hexdigest()
        padding = self._tokenizer.padding
        words = [word for word in _PAD_WORDS if word in vocabulary]
        if not padding and not words:
            raise UserError(
                f"The tokenizer.json has no padding token: give it one of {', '.join(_PAD_WORDS)}."
            )
        self.pad_id: int = padding["pad_id"] if padding else vocabulary[words[0]]
        self._tokenizer.no_padding()
        self.special: int = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if max(self.pad_id, most) >= self.vocab_size:
            raise UserError(
                f"The tokenizer.json writes the token {max(self.pad_id, most)} and has "
                f"{self.vocab_size}: give a valid one."
            )

    def encode(self, texts: Sequence[str], *, max_len: int, prefix: str = "") -> np.ndarray:
        """Tokenizes texts, special tokens included.

        Args:
          texts: n texts.
          max_len: T; longer texts lose their end, not their special tokens.
          prefix: put before every text.

        Returns:
          [n, T], padded with `pad_id`; uint16 where the vocabulary allows, else int32.

        Raises:
          UserError: T leaves no room beside the special tokens.
        """
        if max_len <= self.special:
            raise UserError(
                f"A length of {max_len} tokens holds no text beside {self.special} special tokens: "
                "write a larger one."
            )
        self._tokenizer.enable_truncation(max_len)
        dtype = np.uint16 if self.vocab_size <= 2**16 else np.int32
        tokens = np.full((len(texts), max_len), self.pad_id, dtype)
        for start in range(0, len(texts), _CHUNK):
            chunk = [prefix + text for text in texts[start : start + _CHUNK]]
            for row, encoding in enumerate(self._tokenizer.encode_batch_fast(chunk), start):
                ids = encoding.ids
                tokens[row, : len(ids)] = ids
        return tokens

    def bare(self, texts: Sequence[str], *, max_len: int, prefix: str = "") -> np.ndarray:
        """Tokenizes texts without special tokens.

        Args:
          texts: n texts.
          max_len: T; longer texts lose their end.
          prefix: put before every text.

        Returns:
          [n, T] int32, padded with `pad_id`.
        """
        self._tokenizer.no_truncation()
        tokens = np.full((len(texts), max_len), self.pad_id, np.int32)
        for start in range(0, len(texts), _CHUNK):
            chunk = [prefix + text for text in texts[start : start + _CHUNK]]
            found = self._tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
            for row, encoding in enumerate(found, start):
                ids = encoding.ids[:max_len]
                tokens[row, : len(ids)] = ids
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids [T], special ones left out."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def word(self, token: int) -> str:
        """What a token id is called in the vocabulary."""
        return str(self._tokenizer.id_to_token(token))

    @property
    def end_id(self) -> int:
        """The special token that ends every text.

        Raises:
          UserError: none does.
        """
        special = self._tokenizer.encode("").ids
        if not special:
            raise UserError(
                "The tokenizer.json ends no text with a special token, which an answer needs: "
                "give one that does, such as BERT's or T5's."
            )
        return int(special[-1])

    def count(self, texts: Sequence[str], *, prefix: str = "") -> np.ndarray:
        """How many tokens texts have, special tokens included, with nothing cut off.

        Args:
          texts: n texts.
          prefix: put before every text.

        Returns:
          [n] int32.
        """
        self._tokenizer.no_truncation()
        counts = np.zeros(len(texts), np.int32)
        for start in range(0, len(texts), _CHUNK):
            chunk = [prefix + text for text in texts[start : start + _CHUNK]]
            for row, encoding in enumerate(self._tokenizer.encode_batch_fast(chunk), start):
                counts[row] = len(encoding)
        return counts


def lengths(tokens: np.ndarray, pad_id: int) -> np.ndarray:
    """How many tokens each row of [n, T] holds before its padding: [n] int32."""
    place = np.arange(1, tokens.shape[1] + 1, dtype=np.int32)
    return np.max(np.where(tokens != pad_id, place[None, :], 0), axis=1, initial=0)


def token_fingerprint(
    tokenizer: TextTokenizer, *, prefix: str, max_len: int, content_fingerprint: str
) -> str:
    """Sha256, in hex, of all that a token table depends on.

    Args:
      tokenizer: what made it.
      prefix: put before every text.
      max_len: T.
      content_fingerprint: stands for the texts, as `RetrievalData.fingerprint()`.
    """
    parts = [tokenizer.fingerprint, prefix, max_len, content_fingerprint]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
