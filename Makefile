SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

# The first interpreter that is new enough and can make environments; the tested version comes first.
CANDIDATES := python3.11 python3.12 python3.13 python3 python3.14 python
CAN_RUN := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(CANDIDATES); do "$$p" -c '$(CAN_RUN)' >/dev/null 2>&1 && echo "$$p" && break; done)
PYTEST_ARGS ?=

# Two workers of one thread each: the tests are many and small, and one thread repeats itself to the bit. One that has
# nothing left takes over tests of the other: those that start processes take the longest, and come last.
PYTEST := -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)
export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help env demo extension lint test test-all test-floor test-latest mutants aot explore bench bench-ops gpu-bench gpu-test gpu-train clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F '|' '{ printf "make %-12s %s\n", $$1, $$2 }'

env: .venv/.stamp ## the environment of every day, .venv, with the versions of constraints.txt

# One thread: the matmuls of a model this small are over before a second thread has joined in.
demo: extension ## SELM from end to end on a small model: three iterations in under three minutes on a CPU
	.venv/bin/selm-fast run tiny --output_dir runs/demo

# The extension knows the sources that it was built from.
BUILT := -c 'import sys; from selm_fast.ops import extension; sys.exit(not extension.available())'

extension: .venv/.stamp ## builds csrc/ again where it changed
	$(call extension,.venv)

# Types are checked beside the rest, for they take the longest.
lint: .venv/.stamp ## ruff, mypy and the layers
	@.venv/bin/mypy & types=$$!; .venv/bin/ruff check && .venv/bin/ruff format --check && .venv/bin/lint-imports && wait $$types

test: lint extension ## lint, then every test but the slow ones
	.venv/bin/python $(PYTEST)

test-all: lint extension ## lint, then every test
	.venv/bin/python $(PYTEST) -m ""

test-floor: .venv-floor/.stamp ## tests at the oldest versions that work
	$(call extension,.venv-floor)
	.venv-floor/bin/python $(PYTEST) -m "not slow and not peer"

test-latest: ## tests at the newest versions there are
	$(call environment,.venv-latest,,$(EXTRAS))
	.venv-latest/bin/python $(PYTEST)

mutants: extension ## breaks the kernels one by one, to see a test turn red each time (ONLY=text chooses some)
	.venv/bin/python -m tests.mutants.run $(ONLY)

aot: .venv/.stamp ## compiles every Triton kernel for sm_80, sm_90 and sm_100, without a GPU: registers, spills, shared memory
	TRITON_INTERPRET=0 .venv/bin/python -m benchmarks.aot

explore: extension ## SELM, DPO and XPO where the true reward is known: about a thousand small runs, under twenty minutes on two cores
	.venv/bin/python -m benchmarks.exploration

# All cores: it is a measurement.
bench-ops: extension ## times the kernels beside their peers on this machine and writes benchmarks/results/
	env -u OMP_NUM_THREADS -u MKL_NUM_THREADS .venv/bin/python -m benchmarks.bench_ops

# The interpreter that is given, or python3: it has torch already, and nothing is installed.
GPU_PYTHON = $(if $(filter default undefined file,$(origin PYTHON)),python3,$(PYTHON))

# All cores, as for every measurement.
bench: extension ## trains beside TRL and plain torch on this machine, in under ten minutes, and renders the results (DATA=folder of real rows, ROUNDS=)
	env -u OMP_NUM_THREADS -u MKL_NUM_THREADS .venv/bin/python -m benchmarks.bench $(if $(DATA),--data "$(DATA)") $(if $(ROUNDS),--rounds $(ROUNDS))
	.venv/bin/python -m benchmarks.report

gpu-bench: ## the same on one NVIDIA GPU, nothing installed (PART=peers|ladder|scaling, SHAPE=1b|8b-quarter, DATA=, WHEELS=folder of what is missing, PYTHON=)
	env -u OMP_NUM_THREADS -u MKL_NUM_THREADS "$(GPU_PYTHON)" benchmarks/bench.py --device cuda \
		$(if $(PART),--part $(PART)) $(if $(SHAPE),--shape $(SHAPE)) $(if $(DATA),--data "$(DATA)") $(if $(WHEELS),--wheels "$(WHEELS)")

gpu-test: ## on a machine with an NVIDIA GPU: builds, runs the gpu tests and times the kernels (PYTHON=its python with torch)
	env -u OMP_NUM_THREADS -u MKL_NUM_THREADS "$(GPU_PYTHON)" benchmarks/gpu_test.py

gpu-train: ## real steps of Llama-3-8B and of a 1B model on one NVIDIA GPU, nothing installed (PART=8b, 1b or 8b-selective; DATA=, WHEELS=, PYTHON=)
	env -u OMP_NUM_THREADS -u MKL_NUM_THREADS "$(GPU_PYTHON)" benchmarks/gpu_train.py \
		$(if $(PART),--part $(PART)) $(if $(DATA),--data "$(DATA)") $(if $(WHEELS),--wheels "$(WHEELS)")

clean: ## removes the environments, builds and caches
	rm -rf .venv .venv-floor .venv-latest build dist *.egg-info selm_fast/_C-*.so
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find selm_fast tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Variables, because a comma in the arguments of `call` would end one.
EXTRAS := datasets,tensorboard,peer,blender,dev
EXTRAS_FLOOR := datasets,tensorboard,test

.venv/.stamp: pyproject.toml setup.py constraints.txt
	$(call environment,.venv,-c constraints.txt,$(EXTRAS))

.venv-floor/.stamp: pyproject.toml setup.py constraints-floor.txt
	$(call environment,.venv-floor,-c constraints-floor.txt,$(EXTRAS_FLOOR))

# $(call extension,FOLDER)
define extension
	@$(1)/bin/python $(BUILT) || $(1)/bin/python -m pip install -q --no-build-isolation --no-deps -e .
endef

# $(call environment,FOLDER,OPTIONS OF PIP,EXTRAS). torch comes before the package, whose extension is built against it.
define environment
	@[ -n "$(PYTHON)" ] || { echo "error: no Python >= 3.11 with venv among: $(CANDIDATES); give one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "error: $(PYTHON) is Python %d.%d; selm_fast needs 3.11 or newer" % v[:2])'
	"$(PYTHON)" -m venv --clear $(1)
	$(1)/bin/python -m pip install -q $(2) setuptools wheel
	$(1)/bin/python -m pip install -q $(2) torch
	$(1)/bin/python -m pip install -q $(2) --no-build-isolation -e '.[$(3)]'
	@touch $(1)/.stamp
endef
