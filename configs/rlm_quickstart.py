"""Retrieval learned through answers alone, in minutes on two cores, without any download.

python -m corrector_jax.main --config=configs/rlm_quickstart.py
"""

from ml_collections import ConfigDict

from corrector_jax import config


def get_config() -> ConfigDict:
    """The question is a docstring's sentence, the passages functions, the answer the name.

    A reader that starts from nothing first learns to copy the name out of the passage it is given;
    the functions of those steps are never asked for afterwards.
    """
    c = config.default()
    c.model.layers = 2
    c.data.query_max_len = 24
    c.data.target_max_len = 24  # the line that holds the name, and some of what is done
    c.negatives.block_rows = 32
    c.reader.weights = "random"
    c.reader.layers = 2
    c.reader.hidden = 128
    c.reader.heads = 4
    c.reader.intermediate = 256
    c.reader.query_max_len = 8
    c.reader.passage_max_len = 24
    c.reader.answer_max_len = 6  # names of five word pieces
    c.reader.passages = 6
    c.reader.read = 1
    c.reader.given_steps = 500
    c.reader.given_share = 0.5
    c.reader.learns = False  # what is retrieved teaches a reader this small to guess
    c.reader.learning_rate = 2e-3
    c.reader.warmup = 50
    c.train.steps = 660
    c.train.batch_size = 32
    c.train.warmup = 10
    c.train.learning_rate = 1e-4
    c.corrector.updates = 8
    c.corrector.probe_every = 25
    c.corrector.probe_targets = 512
    c.corrector.probe_queries = 128
    c.eval.every = 0
    c.eval.bm25 = False
    c.checkpoint.every = 220
    return c
