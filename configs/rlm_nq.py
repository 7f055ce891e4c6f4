"""Natural Questions answered by T5-base, its retriever trained through the answers alone.

python -m corrector_jax.main --config=configs/nq.py --mode=prepare_data
python -m corrector_jax.main --config=configs/rlm_nq.py
"""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The retriever and the data of nq.py beside it; 20 passages a question."""
    c: ConfigDict = run_path(str(Path(__file__).with_name("nq.py")))["get_config"]()
    c.reader.weights = "google-t5/t5-base"
    c.reader.passages = 20
    c.reader.loss = "pdist"
    c.reader.query_prefix = "question: "
    c.reader.passage_prefix = "context: "
    c.reader.query_max_len = 32
    c.reader.passage_max_len = 192  # a title and 100 words
    c.reader.answer_max_len = 16
    c.reader.learning_rate = 5e-5
    c.reader.warmup = 500
    c.train.batch_size = 64
    c.train.chunk = 256
    c.train.steps = 10_000
    c.train.warmup = 500
    c.train.learning_rate = 1e-5
    c.corrector.probe_every = 500
    return c
