"""Published weights <-> our tree, for every family. Reads no file: `weights.py` does."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from corrector_jax.models.bert import BertConfig
from corrector_jax.models.family import Family, Place, Placed
from corrector_jax.models.modernbert import ModernBertConfig
from corrector_jax.models.reader import ReaderConfig
from corrector_jax.models.t5 import T5Config
from corrector_jax.types import PyTree, UserError, brief, shown

FAMILIES: dict[str, type[Family]] = {
    "bert": BertConfig,
    "roberta": BertConfig,
    "xlm-roberta": BertConfig,
    "camembert": BertConfig,
    "modernbert": ModernBertConfig,
    "t5": T5Config,
}
"""By the model_type of a published `config.json`."""

# What stands beside an encoder and is none of it: poolers and heads of other tasks, counted rows.
_BESIDE = re.compile(
    r"(pooler|cls|lm_head|classifier|qa_outputs|score|head|decoder)\.|(.*\.)?(position_ids|token_type_ids)$"
)
# The first conversions of T5 gave its decoder a table that nothing reads.
_BESIDE_READER = re.compile(r".*EncDecAttention\.relative_attention_bias\.weight$")


def encoder_config(hf_config: Mapping[str, Any], *, layers: int = 0) -> Family:
    """The sizes that a published `config.json` states.

    Args:
      hf_config: the content of `config.json`.
      layers: keep only the first so many layers; 0 keeps all.

    Returns:
      The config of the family that its model_type names.

    Raises:
      UserError: no such family is there, or not in this form; a key is missing or not a number; or
        fewer than `layers` layers are there.
    """
    kind = hf_config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"The encoder's config.json says model_type {shown(kind)}, but only "
            f"{', '.join(map(repr, FAMILIES))} are supported; choose one of them, for example "
            "all-MiniLM-L6-v2."
        )
    config = FAMILIES[kind].read(hf_config)
    if not 0 <= layers <= config.num_layers:
        raise UserError(
            f"The encoder has {config.num_layers} layers, so its first {layers} cannot be kept; "
            f"write a number from 1 to {config.num_layers} as config.model.layers, or 0 for all."
        )
    return replace(config, num_layers=layers) if layers else config


def replace(config: Family, **changes: Any) -> Family:
    """The same sizes but for some."""
    changed: Family = dataclasses.replace(config, **changes)  # type: ignore[type-var]
    return changed


def reader_config(hf_config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> ReaderConfig:
    """The sizes of a published reader.

    Args:
      hf_config: the content of `config.json`.
      tensors: name -> array [...], as published; only they say whether the head is a table of its
        own.

    Returns:
      Its config, for `params_from` too.

    Raises:
      UserError: it is no T5 with both halves, or a key is missing or not a number.
    """
    kind = hf_config.get("model_type")
    if kind != "t5":
        raise UserError(
            f"The reader's config.json says model_type {shown(kind)}, but only 't5' is supported; "
            "choose a T5 with encoder and decoder, for example google-t5/t5-base."
        )
    tied = ReaderConfig.read(hf_config, tied=True)
    words, *_ = tied.places()
    names = _names(words, _prefix(tensors, tied), tensors)
    head = next((name for name in names if name.endswith("lm_head.weight")), names[0])
    same = head == names[0] or np.array_equal(tensors[head], tensors[names[0]])
    return tied if same else dataclasses.replace(tied, tied=False)


def params_from(tensors: Mapping[str, np.ndarray], config: Placed) -> PyTree:
    """The parameters of a family's module (and of `Encoder`), or of a reader, from its tensors.

    Tensors that `config` has no place for are left alone; see `beside`.

    Args:
      tensors: name -> array of any float dtype, matrices [out, in]; names may share a prefix such
        as "bert." or "model.".
      config: the sizes.

    Returns:
      A tree of float32 arrays on the host.

    Raises:
      UserError: tensors are missing, have another shape than `config` says, or differ where they
        have to be copies of one.
    """
    prefix = _prefix(tensors, config)
    places = {place: _names(place, prefix, tensors) for place in config.places()}
    missing = [names[0] for names in places.values() if names[0] not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"The model's weights lack the tensor {missing[0]}{more}; give the weights of the "
            f"model that its config.json describes, with {config.num_layers} layers or more."
        )
    params: dict[str, Any] = {}
    for place, (name, *copies) in places.items():
        tensor = tensors[name]
        if tensor.shape != place.shape:
            raise UserError(
                f"The model's tensor {name} has shape {tensor.shape}, but its config.json asks for "
                f"{place.shape}; give weights and config of the same model."
            )
        for copy in copies:
            if not np.array_equal(tensors[copy], tensor):
                raise UserError(
                    f"The model's tensors {name} and {copy} differ, and only models in which they "
                    "are the same are supported; choose another model."
                )
        *parents, leaf = place.path
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = np.ascontiguousarray(tensor.T if leaf == "kernel" else tensor, np.float32)
    return params


def tensors_from(
    params: PyTree, config: Placed, *, like: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Published tensors from parameters: the exact inverse of `params_from`.

    Args:
      params: the tree, on the host or a device; leaves beyond the family's own are left alone.
      config: the sizes.
      like: names of the tensors the parameters came from, whose prefix and aliases are kept; empty
        = the usual names.

    Returns:
      Name -> float32 array on the host, matrices [out, in].
    """
    prefix = _prefix(like, config)
    tensors: dict[str, np.ndarray] = {}
    for place in config.places():
        leaf = params
        for part in place.path:
            leaf = leaf[part]
        array = np.asarray(leaf, np.float32)
        array = np.ascontiguousarray(array.T if place.path[-1] == "kernel" else array)
        tensors |= dict.fromkeys(_names(place, prefix, like), array)
    return tensors


def beside(tensors: Mapping[str, np.ndarray], config: Placed) -> dict[str, np.ndarray]:
    """The tensors that a model carries along and does not use, such as BERT's pooler.

    Args:
      tensors: name -> array [...], as published.
      config: the sizes with all layers.

    Returns:
      Those that are no parameter of ours, in their own dtype; the decoder of what is used as an
      encoder is left out.

    Raises:
      UserError: one of them is of no known kind, so that leaving it out would change what comes
        out.
    """
    reader = isinstance(config, ReaderConfig)
    known = _BESIDE_READER if reader else _BESIDE
    prefix = _prefix(tensors, config)
    placed = {name for place in config.places() for name in _names(place, prefix, tensors)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in placed}
    strange = [
        name
        for name in rest
        if name.startswith(prefix) and not known.match(name.removeprefix(prefix))
    ]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise UserError(
            f"The model's weights hold the tensor {brief(strange[0])}{more}, for which the "
            "architecture in its config.json has no place; give weights and config of the same "
            "model."
        )
    return {
        name: tensor
        for name, tensor in rest.items()
        if reader or not name.startswith((prefix + "decoder.", "decoder."))
    }


def _prefix(names: Iterable[str], config: Placed) -> str:
    """What published names begin with, found by the table of words, the first of all places.

    An encoder may be published alone, under a task's head, or inside a wrapper.
    """
    words = next(iter(config.places()))
    wanted = tuple(name for name in (words.name, words.alias) if name)
    found = [
        name.removesuffix(tail)
        for name in names
        for tail in wanted
        if name == tail or name.endswith("." + tail)
    ]
    return min(found, key=len, default="")


def _names(place: Place, prefix: str, there: Collection[str]) -> list[str]:
    """The names of `there` that a place goes by; its usual name where there is none."""
    every = [prefix + name for name in (place.name, place.alias, *place.copies) if name]
    return [name for name in every if name in there] or every[:1]
