"""The main job: a retriever for Python functions, trained in minutes on two cores."""

from ml_collections import ConfigDict

from corrector_jax import config


def get_config() -> ConfigDict:
    """Two layers of MiniLM, short texts, a corrector over a cache that is never refreshed."""
    c = config.default()
    c.model.layers = 2
    c.data.query_max_len = 24
    c.data.target_max_len = 48
    c.train.steps = 150
    c.train.batch_size = 32
    c.train.warmup = 10
    c.train.learning_rate = 1e-4
    c.negatives.draws = 4
    c.negatives.block_rows = 32
    c.corrector.updates = 4
    c.corrector.probe_every = 25
    c.corrector.probe_targets = 512
    c.corrector.probe_queries = 128
    c.eval.full_encoder = True
    c.checkpoint.every = 50
    return c
