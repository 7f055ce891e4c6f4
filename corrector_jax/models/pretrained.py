"""Published BERT weights, in the tree of `bert.Bert`. Reads no file: `weights.py` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from corrector_jax.models.bert import BertConfig
from corrector_jax.types import PyTree, UserError

# Where BERT stands among the tensors: alone, under a task's head, inside a wrapper.
_PREFIXES = ("", "bert.", "model.")
_WORDS = "embeddings.word_embeddings.weight"
# our name of a part of a layer -> the published one
_DENSE = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "norm": "output.LayerNorm"}


def bert_config(hf_config: Mapping[str, Any], *, layers: int = 0) -> BertConfig:
    """The sizes that a published `config.json` states.

    Args:
      hf_config: the content of `config.json`.
      layers: keep only the first so many layers; 0 keeps all.

    Returns:
      The config of `bert.Bert`.

    Raises:
      UserError: another architecture than BERT with exact gelu and absolute positions, a key is
        missing or not a number, or fewer than `layers` layers are there.
    """
    for key, wanted, default in (
        ("model_type", "bert", None),
        ("hidden_act", "gelu", "gelu"),
        ("position_embedding_type", "absolute", "absolute"),
    ):
        found = hf_config.get(key, default)
        if found != wanted:
            raise UserError(
                f"The encoder's config.json says {key} {found!r}, but only {wanted!r} is "
                f"supported; choose a BERT encoder, for example all-MiniLM-L6-v2."
            )

    def number(key: str, kind: type = int, default: float | None = None) -> Any:
        value = hf_config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or value != kind(value):
            raise UserError(
                f"The encoder's config.json gives {value!r} for {key}, which must be "
                f"{'a whole number' if kind is int else 'a number'}."
            )
        return kind(value)

    available = number("num_hidden_layers")
    if not 0 <= layers <= available:
        raise UserError(
            f"The encoder has {available} layers, so its first {layers} cannot be kept; write a "
            f"number from 1 to {available}, or 0 for all."
        )
    return BertConfig(
        vocab_size=number("vocab_size"),
        hidden_size=number("hidden_size"),
        num_layers=layers or available,
        num_heads=number("num_attention_heads"),
        intermediate_size=number("intermediate_size"),
        max_positions=number("max_position_embeddings"),
        type_vocab_size=number("type_vocab_size", default=2),
        layer_norm_eps=number("layer_norm_eps", float, 1e-12),
        pad_id=number("pad_token_id", default=0),
    )


def bert_params(tensors: Mapping[str, np.ndarray], config: BertConfig) -> PyTree:
    """The parameters of `bert.Bert` (and of `dual_encoder.Encoder`) from published tensors.

    Tensors that `config` has no place for are left alone: the pooler, heads, position ids, layers
    beyond the first `config.num_layers`.

    Args:
      tensors: name -> array of any float dtype, matrices [out, in]; names may start with "bert." or
        "model.", and layer norms may be called gamma and beta, as in the first conversions.
      config: the sizes.

    Returns:
      A tree of float32 arrays on the host.

    Raises:
      UserError: tensors are missing, or have another shape than `config` says.
    """
    tensors = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        ): tensor
        for name, tensor in tensors.items()
    }
    prefix = next((p for p in _PREFIXES if p + _WORDS in tensors), "")
    places = list(_places(config))
    missing = [prefix + name for _, name, _ in places if prefix + name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"The encoder's weights lack the tensor {missing[0]}{more}; give the weights of a "
            f"BERT encoder of {config.num_layers} layers or more."
        )
    params: dict[str, Any] = {}
    for path, name, shape in places:
        tensor = tensors[prefix + name]
        if tensor.shape != shape:
            raise UserError(
                f"The encoder's tensor {prefix}{name} has shape {tensor.shape}, but its "
                f"config.json asks for {shape}; give weights and config of the same model."
            )
        if path[-1] == "kernel":
            tensor = tensor.T
        *parents, leaf = path
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = np.ascontiguousarray(tensor, np.float32)
    return params


def _places(config: BertConfig) -> Iterator[tuple[tuple[str, ...], str, tuple[int, ...]]]:
    """Every leaf: its path in our tree, its published name, its published shape."""
    width, inner = config.hidden_size, config.intermediate_size
    for ours, theirs, rows in (
        ("word", "word", config.vocab_size),
        ("position", "position", config.max_positions),
        ("type", "token_type", config.type_vocab_size),
    ):
        yield ("embeddings", ours), f"embeddings.{theirs}_embeddings.weight", (rows, width)
    yield from _norm(("embeddings", "norm"), "embeddings.LayerNorm", width)
    for i in range(config.num_layers):
        for ours, theirs in _DENSE.items():
            path, name = (f"layer_{i}", ours), f"encoder.layer.{i}.{theirs}"
            out = inner if ours == "up" else width
            # Published matrices are [out, in].
            yield (*path, "kernel"), f"{name}.weight", (out, inner if ours == "down" else width)
            yield (*path, "bias"), f"{name}.bias", (out,)
        for ours, theirs in _NORMS.items():
            yield from _norm((f"layer_{i}", ours), f"encoder.layer.{i}.{theirs}", width)


def _norm(
    path: tuple[str, ...], name: str, width: int
) -> Iterator[tuple[tuple[str, ...], str, tuple[int, ...]]]:
    yield (*path, "scale"), f"{name}.weight", (width,)
    yield (*path, "bias"), f"{name}.bias", (width,)
