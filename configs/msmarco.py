"""MS MARCO passage ranking: 502,939 training queries, 8,841,823 passages.

python -m corrector_jax.main --config=configs/msmarco.py --mode=prepare_data
python -m corrector_jax.main --config=configs/msmarco.py
"""

from ml_collections import ConfigDict

from corrector_jax import config


def get_config() -> ConfigDict:
    """Ten epochs, judged on the small dev set of 6,980 queries; sized for an accelerator."""
    c = config.default()
    c.data.path = "data"
    c.data.published = "msmarco"
    c.data.cache_dir = "data/cache"
    c.data.query_max_len = 32
    c.data.target_max_len = 128
    c.train.batch_size = 128
    c.train.steps = 39_300
    c.train.warmup = 1000
    c.train.learning_rate = 2e-5
    c.negatives.draws = 8
    c.corrector.probe_every = 500
    c.cache.dtype = "bfloat16"
    c.eval.bm25 = False  # 8.8M texts are more than it can index
    c.eval.batch_size = 1024
    return c
