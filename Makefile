# Everything runs in a virtual environment that is built when it is first needed. It takes make, Python 3.11 or newer with its venv module,
# and a package index that pip can reach.

VENV ?= .venv
PY := $(VENV)/bin/python
BUILT := $(VENV)/.built
PYTHON ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
# How many files of tests run at the same time. Many of them start processes of their own: more than two want more memory, too.
WORKERS ?= 2
# Seconds after which `make sweep` starts no further test; 0 runs them all.
SWEEP_SECONDS ?= 0

# One thread per process: demo and tests start up to eight ranks on whatever cores there are.
export OMP_NUM_THREADS ?= 1
export SWEEP_SECONDS
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help env demo demo-experts demo-mindspore test sweep faults bench-load bench-save bench-plan lint format clean
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BUILT): pyproject.toml requirements-dev.txt
	@set -e; \
	found=; bare=; \
	for candidate in $(PYTHON) python3.11 python3 python3.12 python3.13; do \
		"$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
		if "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then found=$$candidate; break; fi; \
		bare=$$candidate; \
	done; \
	if [ -z "$$found" ] && [ -n "$$bare" ]; then \
		echo "$$bare can't make a virtual environment: its modules venv and ensurepip are missing." >&2; \
		echo "On Debian and Ubuntu: apt-get install python3-venv. Then call make again." >&2; exit 1; \
	elif [ -z "$$found" ]; then \
		echo "No Python of version 3.11 or newer was found (tried:$(if $(PYTHON), $(PYTHON)) python3.11 python3 python3.12 python3.13)." >&2; \
		echo "Install one, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	echo "Building $(VENV) with $$found ($$("$$found" -c 'import platform; print(platform.python_version())')): some minutes, once."; \
	"$$found" -m venv $(VENV)
	@$(PY) -m pip install --quiet --requirement requirements-dev.txt
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

env: $(BUILT) ## build the virtual environment in .venv, unless it is up to date
	@echo "$(VENV) is ready."

demo: $(BUILT) ## train on 8 ranks, kill, resume on 4, 1 and 8, and compare the losses
	@$(PY) examples/demo/run.py

demo-experts: $(BUILT) ## the same for a model with experts, and for hybrid sharding (some minutes)
	@$(PY) examples/experts/run.py

demo-mindspore: $(BUILT) ## train under MindSpore on 2 ranks, kill, resume on 1, go on in PyTorch, and compare the losses
	@$(PY) examples/mindspore/run.py

test: $(BUILT) ## run the tests and the checks of the code (some 15 minutes on 2 cores; WORKERS=4: as many files of them at a time)
	@$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

sweep: $(BUILT) ## run the long property and fault runs (SWEEP_SECONDS=1200: as many as fit)
	@$(PY) -m pytest -m "sweep or property" --hypothesis-profile=sweep --timeout=900 $(PYTEST_ARGS)

faults: $(BUILT) ## try every fault of the proofs, and write the counts into the README (some 30 minutes; kills at system calls take strace)
	@FAULTS_FILE=docs/faults.json $(PY) -m pytest -m fault --timeout=3600 $(PYTEST_ARGS)
	@$(PY) -m docs.make_faults

bench-load: $(BUILT) ## measure loading beside torch's own and a plain copy: numbers and a picture in output/bench (some 10 minutes)
	@$(PY) -m benchmarks.load $(BENCH_ARGS)

bench-save: $(BUILT) ## measure saving beside torch's own, a plain write and a copy in memory (some 10 minutes)
	@$(PY) -m benchmarks.save $(BENCH_ARGS)

bench-plan: $(BUILT) ## measure planning alone: DeepSeek-V3's tensors on 16,384 ranks (some minutes, 8 GB of memory)
	@$(PY) -m benchmarks.plan $(BENCH_ARGS)

lint: $(BUILT) ## check style, types and the import rules only
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/pyright --pythonpath $(PY)
	@$(VENV)/bin/lint-imports --no-cache --no-logo

format: $(BUILT) ## lay out the code as `make lint` wants it
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean: ## remove the virtual environment, caches and what the demo wrote
	@rm -rf $(VENV) build dist output .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
