# Everything runs in a private .venv, pinned by constraints.txt. `make` alone prints this list of targets.
# The set-up is repeated only when pyproject.toml, constraints.txt or this folder's path changes.

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# The Python that makes .venv. Only a fresh .venv asks for it.
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$name && break; done)
# An index to take torch from; empty = PyPI. https://download.pytorch.org/whl/cpu saves gigabytes without a GPU.
TORCH_INDEX ?=

# .venv is not movable and holds an editable install, so the path is a part of the key.
KEY := $(shell (cat pyproject.toml constraints.txt; pwd) | cksum | cut -d ' ' -f 1)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help up test lint setup setup-dev clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

up: setup ## train a small model through all three nodes; options: make up ARGS="--steps 200"
	@$(BIN)/trainer-node up $(ARGS)

test: setup-dev ## run the whole test suite; a part of it: make test ARGS="-k bus"
	@$(BIN)/python -m pytest $(ARGS)

lint: setup-dev ## ruff (rules and format) and mypy --strict on common/
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

clean: ## remove .venv, build leftovers and caches; keeps runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: $(VENV)/.ready-$(KEY)

setup-dev: $(VENV)/.ready-dev-$(KEY)

# torch first and not quiet: it is nearly all of the waiting, and its download bar is the only sign of life.
# setuptools comes with it, pinned, so that our own package builds without another download.
$(VENV)/.ready-$(KEY):
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(MAKE) --no-print-directory $(VENV)/new
	@echo "==> Installing torch (large; once). Set-up needs the network only now."
	@if [ -z "$(TORCH_INDEX)" ] && [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
		echo "    No GPU seen: 'make $(MAKECMDGOALS) TORCH_INDEX=https://download.pytorch.org/whl/cpu' avoids the CUDA libraries."; fi
	@$(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch setuptools
	@echo "==> Installing the rest of the packages"
	@$(PIP_INSTALL) --quiet --no-build-isolation -e .
	@rm -f $(VENV)/.ready-* && touch $@

$(VENV)/.ready-dev-$(KEY): | $(VENV)/.ready-$(KEY)
	@echo "==> Installing the test tools"
	@$(PIP_INSTALL) --quiet --no-build-isolation -e '.[dev]'
	@touch $@

.PHONY: $(VENV)/new
$(VENV)/new:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
		"make: Python 3.11 or newer is needed (found: '$(PYTHON)'). Install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "==> Creating $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv --clear $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); echo \
		"make: $(PYTHON) cannot create $(VENV). On Debian and Ubuntu: apt install python3-venv; else check the disk and the folder's rights" >&2; exit 1; }
