"""The main job: a retriever for Python functions, trained in minutes on two cores."""

from ml_collections import ConfigDict

from corrector_jax import config


def get_config() -> ConfigDict:
    """Two layers of MiniLM, short texts, a corrector over a cache that is never refreshed."""
    c = config.default()
    c.model.layers = 2
    c.data.target_max_len = 32
    c.train.steps = 70
    c.train.batch_size = 32
    c.train.warmup = 10
    c.train.learning_rate = 1e-4
    c.negatives.draws = 4
    c.negatives.block_rows = 32
    c.corrector.updates = 8
    c.corrector.probe_every = 15
    c.corrector.probe_targets = 512
    c.corrector.probe_queries = 128
    c.eval.every = 15
    c.eval.corpus = "corrected"  # costs no encodes
    c.eval.full_encoder = True
    c.checkpoint.every = 20
    return c
