"""Writes an encoder as the folder that sentence-transformers loads; `weights.py` reads one.

    modules.json, config.json, model.safetensors, tokenizer.json, 1_Pooling/, 2_Dense/, README.md

Two towers are two such folders, query/ and target/, each of which can be loaded alone, and beside
them a Router, which sentence-transformers (5 and later) loads as one model. A reader is the folder
that transformers loads as a T5ForConditionalGeneration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy

from corrector_jax import paths
from corrector_jax.models.dual_encoder import Encoder
from corrector_jax.models.pretrained import tensors_from
from corrector_jax.models.reader import ReaderConfig
from corrector_jax.paths import AnyPath
from corrector_jax.types import PyTree

# Versions of sentence-transformers from 2 on know these names.
_MODULE = "sentence_transformers.models."
_ACTIVATIONS = {
    "identity": "torch.nn.modules.linear.Identity",
    "tanh": "torch.nn.modules.activation.Tanh",
}
_POOLINGS = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}


@dataclass(frozen=True)
class Clothes:
    """What a model needs beside its parameters to be a published one.

    Attributes:
      config: the content of `config.json` it came with; empty for random weights.
      names: of the tensors it came with, which keep their names.
      beside: name -> tensor that is carried along unused.
      tokenizer_json: the content of `tokenizer.json`.
      tokenizer_files: of the files beside it, by name.
      pad_token: the token that fills rows up.
      query_prefix: put before every query by an encoder.
      target_prefix: put before every target by an encoder.
    """

    config: Mapping[str, Any]
    names: frozenset[str]
    beside: Mapping[str, np.ndarray]
    tokenizer_json: str
    tokenizer_files: Mapping[str, str]
    pad_token: str
    query_prefix: str = ""
    target_prefix: str = ""


def write(
    folder: AnyPath,
    towers: Mapping[str, PyTree],
    *,
    encoder: Encoder,
    clothes: Clothes,
    max_len: Mapping[str, int],
    card: str,
) -> None:
    """Writes one tower, or two and their Router.

    Args:
      folder: made if it is not there; files of the same names are replaced.
      towers: of `DualEncoder.towers`, on the host: {"shared": tree}, or {"query", "target"}.
      encoder: the tower's module.
      clothes: what it came with.
      max_len: the longest text in tokens, under the same keys.
      card: the content of `README.md`.
    """
    files: dict[str, bytes] = {}
    for name, tree in towers.items():
        below = "" if name == "shared" else f"{name}/"
        content = _tower(tree, encoder=encoder, clothes=clothes, max_len=max_len[name])
        files |= {below + path: data for path, data in content.items()}
    if "shared" not in towers:
        files |= _router(encoder, clothes)
    files["README.md"] = card.encode()
    for path, data in files.items():
        paths.write(folder / path, data)


def write_reader(
    folder: AnyPath, tree: PyTree, *, config: ReaderConfig, clothes: Clothes, card: str
) -> None:
    """Writes a reader as the folder that transformers loads.

    Args:
      folder: made if it is not there; files of the same names are replaced.
      tree: the parameters of `Reader`, on the host.
      config: its sizes.
      clothes: what it came with.
      card: the content of `README.md`.
    """
    what = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    symbols = {
        "decoder_start_token_id": config.start_id,
        "eos_token_id": config.end_id,
        "pad_token_id": config.encoder.pad_id,
    }
    tensors = tensors_from(tree, config, like=clothes.names) | dict(clothes.beside)
    files = {
        "config.json": _json(_config(what, clothes) | config.write()),
        "generation_config.json": _json(symbols),
        "model.safetensors": _safetensors(tensors),
        **_tokenizer(clothes, {}),
        "README.md": card.encode(),
    }
    for path, data in files.items():
        paths.write(folder / path, data)


def _tower(tree: PyTree, *, encoder: Encoder, clothes: Clothes, max_len: int) -> dict[str, bytes]:
    """Path -> content of one encoder."""
    tensors = tensors_from(tree, encoder.config, like=clothes.names) | dict(clothes.beside)
    mode = _POOLINGS[encoder.pooling]
    modes = {f"pooling_mode_{name}": name == mode for name in _POOLINGS.values()}
    files = {
        "config.json": _json(
            _config({"model_type": "bert", "architectures": ["BertModel"]}, clothes)
            | encoder.config.write()
        ),
        "model.safetensors": _safetensors(tensors),
        **_tokenizer(clothes, {"model_max_length": max_len}),
        "sentence_bert_config.json": _json({"max_seq_length": max_len, "do_lower_case": False}),
        "config_sentence_transformers.json": _json(_prompts(clothes)),
        "1_Pooling/config.json": _json(
            {"word_embedding_dimension": encoder.config.hidden_size, **modes}
        ),
    }
    if encoder.project:
        files["2_Dense/config.json"] = _json(
            {
                "in_features": encoder.config.hidden_size,
                "out_features": encoder.project.dim,
                "bias": encoder.project.bias,
                "activation_function": _ACTIVATIONS[encoder.project.activation],
            }
        )
        dense = {"linear.weight": np.ascontiguousarray(np.asarray(tree["projection"]["kernel"]).T)}
        if encoder.project.bias:
            dense["linear.bias"] = np.asarray(tree["projection"]["bias"])
        files["2_Dense/model.safetensors"] = _safetensors(dense)
    files["modules.json"] = _json(
        [
            {"idx": i, "name": str(i), "path": path, "type": _MODULE + kind}
            for i, (kind, path) in enumerate(_modules(encoder))
        ]
    )
    return files


def _modules(encoder: Encoder) -> list[tuple[str, str]]:
    """(kind, folder) of the modules, in order."""
    kinds = ["Pooling"] + ["Dense"] * bool(encoder.project) + ["Normalize"] * encoder.normalize
    return [("Transformer", ""), *((kind, f"{i}_{kind}") for i, kind in enumerate(kinds, 1))]


def _router(encoder: Encoder, clothes: Clothes) -> dict[str, bytes]:
    """Path -> content of what makes one model of query/ and target/."""
    types: dict[str, str] = {}
    structure: dict[str, list[str]] = {}
    for route, tower in (("query", "query"), ("document", "target")):
        names = [f"{tower}/{path}".rstrip("/") for _, path in _modules(encoder)]
        types |= {
            name: _MODULE + kind for name, (kind, _) in zip(names, _modules(encoder), strict=True)
        }
        structure[route] = names
    parameters = {"default_route": "document", "allow_empty_key": True}
    return {
        "router_config.json": _json(
            {"types": types, "structure": structure, "parameters": parameters}
        ),
        "config_sentence_transformers.json": _json(_prompts(clothes)),
        "modules.json": _json([{"idx": 0, "name": "0", "path": "", "type": f"{_MODULE}Router"}]),
    }


def _config(what: dict[str, Any], clothes: Clothes) -> dict[str, Any]:
    config = what | dict(clothes.config)
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = "float32"
    return config


def _tokenizer(clothes: Clothes, changes: dict[str, Any]) -> dict[str, bytes]:
    """Path -> content of the tokenizer and of what is told of it."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": clothes.pad_token}
    published = dict(clothes.tokenizer_files)
    if "tokenizer_config.json" in published:
        config = json.loads(published["tokenizer_config.json"])
    published["tokenizer_config.json"] = _json(config | changes).decode()
    published["tokenizer.json"] = clothes.tokenizer_json
    return {name: text.encode() for name, text in published.items()}


def _prompts(clothes: Clothes) -> dict[str, Any]:
    return {
        "prompts": {"query": clothes.query_prefix, "document": clothes.target_prefix},
        "default_prompt_name": None,
        "similarity_fn_name": "dot",
    }


def _safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    return safetensors.numpy.save(tensors, metadata={"format": "pt"})


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
