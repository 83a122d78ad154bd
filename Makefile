# Everything runs in a private .venv: versions by constraints.txt, and but for torch and its CUDA packages
# the very files by the hashes in *.lock. `make` alone prints the list of targets.
# The set-up is repeated only when pyproject.toml, constraints.txt, a lock or this folder's path changes.

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# The Python that makes .venv. Only a fresh .venv asks for it.
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$name && break; done)
# An index to take torch from; empty = PyPI. https://download.pytorch.org/whl/cpu saves gigabytes without a GPU.
TORCH_INDEX ?=

# .venv is not movable and holds an editable install, so the path is a part of the key.
LOCKS := requirements.lock requirements-dev.lock
KEY := $(shell (cat pyproject.toml constraints.txt $(LOCKS); pwd) | cksum | cut -d ' ' -f 1)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# A file that is not the one we tested is refused. --no-deps: a lock is complete, but for torch.
HASHED_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --require-hashes --no-deps
UV_VERSION := 0.13.9

.DEFAULT_GOAL := help
.PHONY: help up test lint gpu docs lock setup setup-dev clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

up: setup ## train a small model through all three nodes; options: make up ARGS="--steps 200"
	@$(BIN)/trainer-node up $(ARGS)

test: setup-dev ## run the whole test suite; a part of it: make test ARGS="-k bus"
	@$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile $(ARGS)

lint: setup-dev ## ruff (rules and format) and mypy --strict on common/
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

# In pieces of at most 8 minutes: exit code 3 of the script means that the same command has more to do.
gpu: setup-dev ## with a GPU: its tests, benchmarks and race, 8 minutes at a time; to the end: make gpu ARGS=--all
	@$(BIN)/python -m tests.gpu.evidence $(ARGS)

API := trainer_node.hybrid trainer_node.race.library trainer_node.integrations.hf_trainer \
	trainer_node.integrations.lightning_callback common.messages common.settings common.bus common.recording common.features
docs: setup-dev ## the API reference, made of the docstrings, into site/
	@$(BIN)/python -m pdoc --docformat restructuredtext --output-directory site $(API)
	@echo "open site/index.html"

# Without torch, whose file depends on where it is taken from (TORCH_INDEX), and what only its CUDA build needs.
lock: setup ## write the *.lock files anew from pyproject.toml and constraints.txt; needs the network
	@[ -x $(VENV)/lock/bin/uv ] || { $(BIN)/python -m venv $(VENV)/lock && \
		$(VENV)/lock/bin/python -m pip install --disable-pip-version-check --quiet uv==$(UV_VERSION); }
	@for lock in $(LOCKS); do \
		case $$lock in *-dev*) extra="--extra dev --extra race";; *) extra=;; esac; \
		$(VENV)/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
			--custom-compile-command "make lock" $$extra -c constraints.txt pyproject.toml > $(VENV)/lock/whole && \
		awk '/^[a-z]/ { torch = /^(torch==|triton==|cuda-|nvidia-)/ && !/^nvidia-ml-py/ } !torch' \
			$(VENV)/lock/whole > $$lock || exit 1; \
	done

clean: ## remove .venv, build leftovers and caches; keeps runs/
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: $(VENV)/.ready-$(KEY)

setup-dev: $(VENV)/.ready-dev-$(KEY)

# What torch needs is in the lock too, so that only torch itself and its CUDA packages come without a hash.
# torch is not quiet: it is nearly all of the waiting, and its download bar is the only sign of life.
$(VENV)/.ready-$(KEY):
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(MAKE) --no-print-directory $(VENV)/new
	@echo "==> Installing the packages, each with the hash in requirements.lock. Set-up needs the network only now."
	@$(HASHED_INSTALL) -r requirements.lock
	@echo "==> Installing torch (large; once)"
	@if [ -z "$(TORCH_INDEX)" ] && [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
		echo "    No GPU seen: 'make $(MAKECMDGOALS) TORCH_INDEX=https://download.pytorch.org/whl/cpu' avoids the CUDA libraries."; fi
	@$(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@$(PIP_INSTALL) --quiet --no-build-isolation -e .
	@rm -f $(VENV)/.ready-* && touch $@

$(VENV)/.ready-dev-$(KEY): | $(VENV)/.ready-$(KEY)
	@echo "==> Installing the test tools"
	@$(HASHED_INSTALL) -r requirements-dev.lock
	@$(PIP_INSTALL) --quiet --no-build-isolation -e '.[dev]'
	@touch $@

.PHONY: $(VENV)/new
$(VENV)/new:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
		"make: Python 3.11 or newer is needed (found: '$(PYTHON)'). Install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "==> Creating $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv --clear $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); echo \
		"make: $(PYTHON) cannot create $(VENV). On Debian and Ubuntu: apt install python3-venv; else check the disk and the folder's rights" >&2; exit 1; }
