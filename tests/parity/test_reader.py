"""The reader against T5ForConditionalGeneration: logits, gradients, answers, and the folder."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file
from transformers.modeling_outputs import BaseModelOutput

from corrector_jax import answering, model_folder, weights
from corrector_jax.checkpoint import Position
from corrector_jax.export import write_final
from corrector_jax.job import make_job
from corrector_jax.models import pretrained
from corrector_jax.models.reader import Reader, pack
from tests import oracle, tiny
from tests.parity.published import VOCAB
from tests.parity.test_families import assert_close, tokens_of

SIZES = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "num_layers": 2,
    "num_decoder_layers": 1,  # no more: the cache of transformers has room for `num_layers`
    "num_heads": 4,
    "d_kv": 12,
    "d_ff": 48,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 20,
}
KINDS = {"1.0": {}, "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}}
LENGTH = 24  # more than the decoder tells apart by its buckets
PASSAGES = tokens_of([30, 3, 17, 1, 9, 26], VOCAB)
ANSWERS = tokens_of([LENGTH, 5, 1, 16, 2, 9], VOCAB, seed=1)


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """A folder as transformers reads it, and its model; 1.1 has a head of its own."""
    folder = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**SIZES, **KINDS[request.param])
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "shared" in name else 0.2))
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    if request.param == "1.1":
        head = 0.5 * torch.randn_like(model.shared.weight)
        model.lm_head.weight = torch.nn.Parameter(head)
    # Answers of random models never end: what ends them is a word that comes at different places.
    texts = generate(model, eos_token_id=None)
    firsts = {word: {text.index(word) for text in texts if word in text} for word in texts[0]}
    model.config.eos_token_id = max(firsts, key=lambda word: len(firsts[word]))
    model.generation_config = transformers.GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder)
    tiny.write_tokenizer(folder / "words")
    (folder / "words" / "tokenizer.json").rename(folder / "tokenizer.json")
    return folder, load(folder)


def generate(model, **options) -> list[list[int]]:
    """What transformers answers, without the token it starts from."""
    ids = torch.tensor(PASSAGES, dtype=torch.long)
    mask = (ids != 0).long()
    found = model.generate(ids, attention_mask=mask, max_new_tokens=LENGTH, **options)
    return found[:, 1:].tolist()


def load(folder) -> transformers.T5ForConditionalGeneration:
    return transformers.T5ForConditionalGeneration.from_pretrained(
        folder, local_files_only=True
    ).eval()


def ours(folder):
    files = weights.find_reader(str(folder))
    config = pretrained.reader_config(files.config, files.tensors)
    return files, Reader(config), pretrained.params_from(files.tensors, config)


def theirs(model) -> torch.Tensor:
    """Logits [B, T, V] of one passage a question."""
    ids = torch.tensor(PASSAGES, dtype=torch.long)
    inputs = model._shift_right(torch.tensor(ANSWERS, dtype=torch.long))
    return model(input_ids=ids, attention_mask=(ids != 0).long(), decoder_input_ids=inputs).logits


@functools.partial(oracle.jit, static_argnums=0)
def logits_and_gradients(reader, params, direction):
    def value(params):
        passages = reader.encode(params, PASSAGES[:, None])
        logits = reader.logits(params, passages, ANSWERS)
        return (logits * direction).sum(), logits

    return jax.grad(value, has_aux=True)(params)


def test_logits_and_gradients(made):
    folder, model = made
    _, reader, params = ours(folder)
    wanted = theirs(model)
    direction = np.random.default_rng(1).normal(size=wanted.shape).astype(np.float32)
    direction *= (ANSWERS != 0)[:, :, None]
    grads, logits = logits_and_gradients(reader, params, direction)
    found = wanted.detach().numpy()
    assert np.abs(found[0] - found[1]).max() > 0.1  # texts are told apart
    np.testing.assert_allclose(logits, found, rtol=0, atol=1e-4)
    model.zero_grad()
    (wanted * torch.tensor(direction)).sum().backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    assert_close(grads, pretrained.params_from(gradients, reader.config))


@functools.partial(oracle.jit, static_argnums=0)
def encode(reader, params, tokens):
    return reader.encode(params, tokens)


@functools.partial(oracle.jit, static_argnums=(0, 3))
def answer(reader, params, passages, beams):
    return reader.answer(params, passages, length=LENGTH, beams=beams)


def answers(reader, params, *, beams=1) -> list[list[int]]:
    passages = encode(reader, params, PASSAGES[:, None])
    return np.asarray(answer(reader, params, passages, beams)).tolist()


def to_end(texts: list[list[int]], end: int) -> list[list[int]]:
    """Without what fills rows up: transformers takes the end token where padding is 0."""
    return [text[: text.index(end) + 1] if end in text else text for text in texts]


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_answers(made, beams):
    folder, model = made
    _, reader, params = ours(folder)
    end = reader.config.end_id
    wanted = to_end(generate(model, num_beams=beams), end)
    assert len({len(text) for text in wanted}) > 1
    assert to_end(answers(reader, params, beams=beams), end) == wanted


def test_fused(made):
    """Two passages a question: the decoder of transformers over what its encoder made of both."""
    folder, model = made
    _, reader, params = ours(folder)
    ids = torch.tensor(PASSAGES, dtype=torch.long)
    mask = (ids != 0).long()
    states = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    both = BaseModelOutput(states.reshape(3, -1, states.shape[-1]).detach())
    passages = encode(reader, params, PASSAGES.reshape(3, 2, -1))
    wanted = model.generate(
        encoder_outputs=both,
        attention_mask=mask.reshape(3, -1),
        max_new_tokens=LENGTH,
        num_beams=2,
        output_scores=True,
        return_dict_in_generate=True,
    )
    texts = to_end(wanted.sequences[:, 1:].tolist(), reader.config.end_id)
    found = np.asarray(answer(reader, params, passages, 2))
    assert to_end(found.tolist(), reader.config.end_id) == texts
    each = jax.nn.log_softmax(oracle.jit(reader.logits)(params, passages, found))
    chosen = np.take_along_axis(np.asarray(each), found[:, :, None], axis=-1)[:, :, 0]
    score = [chosen[i, : len(text)].mean() for i, text in enumerate(texts)]
    np.testing.assert_allclose(score, wanted.sequences_scores, rtol=0, atol=1e-4)


def test_import_and_export_is_tensor_identical(made, tmp_path):
    folder, model = made
    files, reader, params = ours(folder)
    clothes = model_folder.Clothes(
        config=files.config,
        names=frozenset(files.tensors),
        beside=pretrained.beside(files.tensors, reader.config),
        tokenizer_json=files.tokenizer_json,
        tokenizer_files=files.tokenizer_files,
        pad_token="[PAD]",
    )
    model_folder.write_reader(tmp_path, params, config=reader.config, clothes=clothes, card="")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name])
    again = load(tmp_path)
    assert torch.equal(theirs(again), theirs(model))
    assert generate(again, num_beams=2) == generate(model, num_beams=2)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)
    words = tokenizers.Tokenizer.from_str(files.tokenizer_json)
    assert found("ba be").input_ids == words.encode("ba be").ids


def test_what_a_run_exports_answers_as_the_run_does(tmp_path):
    """The folder beside the encoders, from the passages that the run itself would read."""
    job = make_job(tiny.config(tmp_path, reader=True, reader__answer_max_len=LENGTH))
    numbers = np.random.default_rng(6)
    state = jax.device_get(job.init_state())

    def large(path, leaf):
        """Parameters whose answers differ from question to question."""
        name, noise = jax.tree_util.keystr(path), numbers.normal(size=leaf.shape)
        found = 1 + 0.2 * noise if "norm" in name else (0.2 if "word" in name else 0.5) * noise
        return found.astype(leaf.dtype)

    reader = jax.tree_util.tree_map_with_path(large, state.params["reader"])
    params = state.params | {"reader": reader}
    model = load(write_final(job, params, tmp_path / "run", Position()) / "reader")
    known = job.data.known_positives("test")[:, :1]
    texts = answering.read(job, params, "test", known, known >= 0)
    packed = pack(job.questions.questions["test"], passages_of(job, known), pad_id=0)
    ids = torch.tensor(np.asarray(packed)[:, 0], dtype=torch.long)
    found = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=LENGTH)
    assert [job.questions.text(np.array(row)) for row in found[:, 1:].tolist()] == texts
    assert len(set(texts)) > 3


def passages_of(job, rows):
    """[Q, 1, T] tokens of passages."""
    table = np.asarray(job.questions.passages.ids)[rows[:, 0]]
    return table[:, None, : job.config.reader.passage_max_len].astype(np.int32)
