"""MS MARCO passage ranking: 502,939 training queries, 8,841,823 passages.

python -m corrector_jax.main --config=configs/msmarco.py --mode=prepare_data
python -m corrector_jax.main --config=configs/msmarco.py
"""

from ml_collections import ConfigDict

from corrector_jax import config


def get_config() -> ConfigDict:
    """Ten epochs, judged on the small dev set of 6,980 queries; sized like nq.py beside it."""
    c = config.default()
    c.data.path = "data"
    c.data.published = "msmarco"
    c.data.cache_dir = "data/cache"
    c.data.query_max_len = 32
    c.data.target_max_len = 128
    c.model.weights = "sentence-transformers/gtr-t5-base"
    c.model.dtype = "bfloat16"
    c.model.beta = 100.0  # the temperature of 0.01 that GTR was trained with
    c.train.batch_size = 512
    c.train.chunk = 1536  # a third of the targets of a step: it fits with room to spare
    c.train.remat = True
    c.train.steps = 9830
    c.train.warmup = 500
    c.train.learning_rate = 2e-5
    c.negatives.draws = 8
    c.negatives.block_rows = 128
    c.corrector.kind = "linear"  # half the mlp's sweep, as good in docs/results.md
    c.corrector.probe_every = 500
    c.cache.dtype = "bfloat16"
    c.cache.sweep_mib = 256
    c.eval.bm25 = False  # 8.8M texts are more than it can index
    c.eval.batch_size = 4608
    return c
