"""A folder in BEIR layout, `--config.data.path=DIR`: own.py with the layout given."""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As own.py beside it, but nothing is guessed: what is missing for BEIR is named."""
    c: ConfigDict = run_path(str(Path(__file__).with_name("own.py")))["get_config"]()
    c.data.layout = "beir"
    return c
