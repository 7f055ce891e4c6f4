"""Random small encoders in sentence-transformers folders, written by its own code."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.dense import Dense
from sentence_transformers.base.modules.normalize import Normalize
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.modules.pooling import Pooling
from tokenizers import Tokenizer

from tests import tiny

VOCAB = 4 + len(tiny.WORDS)
MAX_LEN = 48
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "num_layers": 2,
    "num_heads": 4,
    "d_kv": 12,
    "d_ff": 48,
}
# Under this tokenizer [PAD] is 0 for every family; the position offset of RoBERTa follows its pad.
FAMILIES = {
    "bert": transformers.BertConfig(**_BERT),
    "roberta": transformers.RobertaConfig(**_BERT, pad_token_id=0, type_vocab_size=1),
    "xlm-roberta": transformers.XLMRobertaConfig(**_BERT, pad_token_id=0, type_vocab_size=1),
    "t5": transformers.T5Config(**_T5),
    "t5-gated-gelu": transformers.T5Config(
        **_T5,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=12,
        relative_attention_max_distance=20,
    ),
    "t5-gated-silu": transformers.T5Config(**_T5, feed_forward_proj="gated-silu"),
    "modernbert": transformers.ModernBertConfig(
        **(_BERT | {"num_hidden_layers": 4}),
        local_attention=8,
        pad_token_id=0,
        cls_token_id=2,
        bos_token_id=2,
        sep_token_id=3,
        eos_token_id=3,
    ),
}


def write_encoder(folder: Path, family: str) -> Path:
    """A random encoder as transformers saves it, its weights large enough to tell texts apart."""
    config = FAMILIES[family]
    kind = transformers.T5EncoderModel if family.startswith("t5") else transformers.AutoModel
    torch.manual_seed(0)
    model = kind.from_config(config) if kind is transformers.AutoModel else kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "embed" in name else 0.2))
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny.write_tokenizer(folder / "words")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(folder / "words" / "tokenizer.json")),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=MAX_LEN,
    ).save_pretrained(folder)
    return folder


def write_folder(
    folder: Path,
    family: str,
    *,
    pooling: str = "mean",
    dense: tuple[int, bool, torch.nn.Module] | None = None,
    normalize: bool = True,
    prompts: dict[str, str] | None = None,
) -> Path:
    """A sentence-transformers folder of `write_encoder` and the modules after it."""
    transformer = Transformer(str(write_encoder(folder / "encoder", family)))
    modules: list[torch.nn.Module] = [transformer, Pooling(32, pooling)]
    if dense:
        width, bias, activation = dense
        modules.append(Dense(32, width, bias=bias, activation_function=activation))
    if normalize:
        modules.append(Normalize())
    model = SentenceTransformer(modules=modules, prompts=prompts, device="cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        model.save_pretrained(str(folder / "model"))
    return folder / "model"


def load(folder: Path) -> SentenceTransformer:
    """The folder as a user of sentence-transformers loads it: no network, on the CPU."""
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True).eval()
