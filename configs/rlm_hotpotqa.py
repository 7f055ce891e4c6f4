"""HotpotQA answered by T5-base, its retriever trained through the answers alone.

python -m corrector_jax.main --config=configs/hotpotqa.py --mode=prepare_data
python -m corrector_jax.main --config=configs/rlm_hotpotqa.py
"""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """rlm_nq.py beside it over the data of hotpotqa.py."""
    c: ConfigDict = run_path(str(Path(__file__).with_name("rlm_nq.py")))["get_config"]()
    data: ConfigDict = run_path(str(Path(__file__).with_name("hotpotqa.py")))["get_config"]()
    c.data = data.data
    c.reader.query_max_len = data.data.query_max_len
    return c
