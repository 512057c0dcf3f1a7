# `make demo` and `make test` do all their own setting up; see `make help`.

VENV ?= .venv
# Interpreters to make the environment with, the first that will do; say PYTHON=... to choose one.
PYTHON ?= python3 python3.13 python3.12 python3.11 python3.10 python
# Further arguments of the command behind a target: make demo ARGS="--help".
ARGS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal --durations=15

INSTALLED := $(VENV)/.peftfast-installed
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))

export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test lint aot bench traffic examples gpu clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##  *\(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) \
	  | while IFS='|' read -r target text; do printf '  make %-10s %s\n' "$$target" "$$text"; done

demo: $(INSTALLED)  ## fine-tune a small encoder twice, plain and patched, and compare
	$(VENV)/bin/peftfast demo $(ARGS)

test: $(INSTALLED)  ## the test suite; without a GPU, kernels run in Triton's interpreter
	$(RUN) -m pytest benchmarks/tests
	$(RUN) -m pytest $(PYTEST_ARGS) $(ARGS)

lint: $(INSTALLED)  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m mypy

aot: $(INSTALLED)  ## compile every kernel for every architecture, without a GPU
	$(RUN) -m peftfast_kernels.aot $(ARGS)

bench: $(INSTALLED)  ## benchmarks of the ops on the CPU, and the bytes that they move
	$(RUN) -m pytest benchmarks --benchmark-only $(ARGS)
	$(RUN) -m benchmarks traffic lora_linear

traffic: $(INSTALLED)  ## only the bytes that they move, in Triton's interpreter
	$(RUN) -m benchmarks traffic lora_linear $(ARGS)

examples: $(INSTALLED)  ## run every example
	@set -e; for example in examples/*.py; do \
	  echo "$$example"; $(RUN) "$$example"; done

# Runs on whatever Python is current and installs nothing: a machine with a GPU brings its own torch.
gpu:  ## GPU tests and benchmarks, with the current Python
	PYTHONPATH="$(CURDIR):$(CURDIR)/kernels$${PYTHONPATH:+:$$PYTHONPATH}" \
	  $(firstword $(PYTHON)) -m benchmarks gpu $(ARGS)

venv: $(INSTALLED)  ## the environment alone, in .venv

clean:  ## remove the environment, build artefacts and caches
	rm -rf $(VENV) build dist *.egg-info peftfast/native/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find peftfast kernels benchmarks examples tests -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/*/*) | $(RUN)
	$(PIP) install -c constraints.txt setuptools
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

$(RUN):
	@for python in $(PYTHON); do \
	  if "$$python" -c '$(USABLE)' 2>/dev/null; then \
	    echo "$$python -m venv $(VENV)"; exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo 'peftfast needs Python 3.10 or later with its venv module, and none of these is one:' >&2; \
	echo '  $(PYTHON)' >&2; \
	echo 'Install one (on Debian and Ubuntu: apt-get install python3 python3-venv),' >&2; \
	echo 'or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3' >&2; \
	exit 1
