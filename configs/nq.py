"""Natural Questions over DPR's Wikipedia: 58,880 training questions, 21,015,324 passages.

python -m corrector_jax.main --config=configs/nq.py --mode=prepare_data
python -m corrector_jax.main --config=configs/nq.py
"""

from ml_collections import ConfigDict

from corrector_jax import config


def get_config() -> ConfigDict:
    """Forty epochs, as DPR trains; sized for an accelerator."""
    c = config.default()
    c.data.path = "data"
    c.data.published = "nq"
    c.model.weights = "sentence-transformers/gtr-t5-base"
    c.model.dtype = "bfloat16"
    c.data.cache_dir = "data/cache"
    c.data.query_max_len = 32
    c.data.target_max_len = 128  # passages have 100 words
    c.train.batch_size = 128
    c.train.steps = 18_400
    c.train.warmup = 1000
    c.train.learning_rate = 2e-5
    c.negatives.draws = 8
    c.corrector.probe_every = 500
    c.cache.dtype = "bfloat16"
    c.eval.bm25 = False  # 21M texts are more than it can index
    c.eval.batch_size = 1024
    return c
