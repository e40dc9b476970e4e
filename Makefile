# Every target sets itself up on a bare machine with Python 3.11 or newer and a C compiler.
#
#   make setup    .venv with the pinned dependencies, and the small model in .models/
#   make demo     three sites on this machine, a real model over them, one of them killed in mid-stream
#   make test     all tests
#   make check    ruff, mypy, import-linter
#   make bench    measured figures; `make bench ARGS="--json FILE"` writes them down
#   make proto    regenerate mesh/wire from proto/
#   make clean    remove what was built; `make distclean` also .venv and .models
#
# PYTHON=... chooses the interpreter, TORCH="torch==2.13.0 --index-url URL" another build of PyTorch (CPU only, CUDA,
# ROCm), EXTRAS=dev leaves UCX out where its wheels do not exist.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
MODEL := .models/SmolLM2-135M-Instruct
TORCH ?= torch==2.13.0
EXTRAS ?= dev,ucx
ARGS ?=
PYTHON ?= $(shell scripts/find_python)

# The small model is only ever read from the folder: no library may look for a hub.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test check bench format proto clean distclean

setup: $(VENV)/.installed $(MODEL)/.complete

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer was found; name one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# PyTorch first and alone: with it in place the rest installs nothing of its size again.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.created
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

$(MODEL)/.complete: scripts/fetch_small_model.py | $(VENV)/.installed
	$(BIN)/python scripts/fetch_small_model.py
	@touch $@

demo: setup
	$(BIN)/mesh demo $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/generate_wire.py

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find mesh transport topology simulations benchmarks tests scripts -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .models
