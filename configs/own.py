"""Your own data, in any of the layouts of docs/data.md: `--config.data.path=DIR_OR_FILE`."""

from ml_collections import ConfigDict

from corrector_jax import config


def get_config() -> ConfigDict:
    """Two layers of MiniLM on short texts: about 7,000 targets take minutes on two cores."""
    c = config.default()
    c.data.path = "data"
    c.data.holdout = 0.1  # where the data have neither dev nor test
    c.model.layers = 2
    c.data.query_max_len = 24
    c.data.target_max_len = 32  # raise both lengths for longer texts
    c.train.steps = 200
    c.train.warmup = 20
    c.train.learning_rate = 1e-4
    c.negatives.draws = 4
    c.corrector.updates = 4
    c.corrector.probe_every = 25
    c.corrector.probe_targets = 512
    c.corrector.probe_queries = 128
    return c
