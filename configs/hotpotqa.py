"""HotpotQA as BEIR has it: 85,000 training questions with two positives, 5,233,329 passages.

python -m corrector_jax.main --config=configs/hotpotqa.py --mode=prepare_data
python -m corrector_jax.main --config=configs/hotpotqa.py
"""

from ml_collections import ConfigDict

from corrector_jax import config


def get_config() -> ConfigDict:
    """Twenty epochs; questions that join two facts are longer. Sized for an accelerator."""
    c = config.default()
    c.data.path = "data"
    c.data.published = "hotpotqa"
    c.data.cache_dir = "data/cache"
    c.data.query_max_len = 64
    c.data.target_max_len = 128
    c.train.batch_size = 128
    c.train.steps = 13_300
    c.train.warmup = 1000
    c.train.learning_rate = 2e-5
    c.negatives.draws = 8
    c.corrector.probe_every = 500
    c.cache.dtype = "bfloat16"
    c.eval.bm25 = False  # 5.2M texts are more than it can index
    c.eval.batch_size = 1024
    return c
