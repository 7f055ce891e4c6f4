"""Natural Questions over DPR's Wikipedia: 58,880 training questions, 21,015,324 passages.

python -m corrector_jax.main --config=configs/nq.py --mode=prepare_data
python -m corrector_jax.main --config=configs/nq.py
"""

from ml_collections import ConfigDict

from corrector_jax import config


def get_config() -> ConfigDict:
    """Forty epochs, as DPR trains; sized for a TPU v5e slice of 16 (docs/scale.md has the plan)."""
    c = config.default()
    c.data.path = "data"
    c.data.published = "nq"
    c.data.cache_dir = "data/cache"
    c.data.query_max_len = 32
    c.data.target_max_len = 128  # passages have 100 words
    c.model.weights = "sentence-transformers/gtr-t5-base"
    c.model.dtype = "bfloat16"
    c.model.beta = 100.0  # the temperature of 0.01 that GTR was trained with
    c.train.batch_size = 512
    c.train.chunk = 1536  # a third of the targets of a step: it fits with room to spare
    c.train.remat = True
    c.train.steps = 4600
    c.train.warmup = 250
    c.train.learning_rate = 2e-5
    c.negatives.draws = 8
    c.negatives.block_rows = 128
    c.corrector.kind = "linear"  # half the mlp's sweep, as good in docs/results.md
    c.corrector.probe_every = 250
    c.cache.dtype = "bfloat16"
    c.cache.sweep_mib = 256
    c.eval.bm25 = False  # 21M texts are more than it can index
    c.eval.batch_size = 4608
    return c
