# `make demo` and `make test` set everything up themselves; the first run takes a few minutes, later ones start at once.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: demo test test-all lint format docs sanitize clean setup help

# Importing torch, vLLM and megatron-core from source alone takes ten seconds more in every process.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= $(or $(shell command -v python3.11),python3)
BIN := .venv/bin
PACKAGES := .venv/.packages
READY := .venv/.ready
NATIVE := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h csrc/*.cuh)
SANITIZED := build/sanitize
BASE_MODEL := runs/arithmetic-sft/hf/config.json
# More overrides for the demo: make demo ARGS="train.seed=1 run_dir=runs/seed-1"
ARGS ?=

demo: $(READY) $(BASE_MODEL)  ## train a small model with RL and show what it learned
	@run=runs/arithmetic; n=1; \
	while [ -e $$run/hf/config.json ]; do n=$$((n + 1)); run=runs/arithmetic-$$n; done; \
	[ $$n -eq 1 ] || echo "runs/arithmetic holds a finished demo and stays as it is; this one goes to $$run."; \
	for arg in $(ARGS); do case $$arg in run_dir=*) run=$${arg#run_dir=};; esac; done; \
	$(BIN)/megatron-rl train -c configs/arithmetic.yaml $(ARGS) run_dir=$$run; \
	$(BIN)/megatron-rl report $$run

# Order-only: a model that is there is not made again because a package was updated.
$(BASE_MODEL): | $(READY)
	$(BIN)/megatron-rl sft -c configs/arithmetic-sft.yaml

# Files go to the workers in the order of tests/conftest.py.
test: $(READY)  ## the tests, without those that take minutes
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-all: $(READY)  ## all tests
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)  ## ruff, its formatter in check mode, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## put imports and lines in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site needs no network, neither to be built nor to be read.
docs: $(READY)  ## the site of docs/ in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The CPU cores of csrc, without torch or Python, under the address and undefined-behaviour sanitizers.
sanitize: $(SANITIZED)/verify_driver $(SANITIZED)/logprobs_driver $(SANITIZED)/int8_driver  ## the CPU cores of csrc under the sanitizers
	for driver in $^; do $$driver; done

$(SANITIZED)/%_driver: csrc/tests/%_driver.cpp csrc/tests/driver.h $(NATIVE) Makefile
	@mkdir -p $(SANITIZED)/$*
	@flags="-std=c++17 -O1 -g -ffp-contract=off -fno-omit-frame-pointer -fsanitize=address,undefined"; \
	flags="$$flags -fno-sanitize-recover=all -Icsrc"; \
	compile() { echo "compiling $$1"; $(CXX) $$flags $${@:2} -c $$1 -o $(SANITIZED)/$*/$$(basename $$1).o; }; \
	case $* in verify) simd=scan; core="verify_cpu problems";; logprobs) simd=logprobs; core=logprobs_cpu;; \
		int8) simd=; core=int8_cpu;; esac; \
	if [ -n "$$simd" ] && [ "$$(uname -m)" = x86_64 ]; then \
		compile csrc/$${simd}_avx512.cpp -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c; \
		compile csrc/$${simd}_avx2.cpp -mavx2 -mfma -mf16c; \
	fi; \
	for name in $${simd:+$${simd}_portable capability} $$core; do compile csrc/$$name.cpp; done; \
	compile $<; \
	$(CXX) $$flags -pthread $(SANITIZED)/$*/*.o -o $@

setup: $(READY)  ## a virtual environment with pinned packages, and the native extension

$(PACKAGES): requirements-cpu.lock
	@fail() { tail -n 20 .venv/setup.log; exit 1; }; \
	echo "setup 1/3: virtual environment in .venv ($(PYTHON))"; \
	$(PYTHON) -m venv .venv; \
	echo "setup 2/3: pinned packages (about two minutes; log in .venv/setup.log)"; \
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-compile --no-deps \
		-r requirements-cpu.lock > .venv/setup.log 2>&1 || fail; \
	$(BIN)/python -c "import torch" 2>> .venv/setup.log || { \
		echo "torch does not load: pip has probably chosen its CUDA build. Let PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS"; \
		echo "point to the CPU builds of torch, remove .venv and try again."; exit 1; }
	@touch $@

$(READY): $(PACKAGES) setup.py $(NATIVE)
	@fail() { tail -n 20 .venv/setup.log; exit 1; }; \
	echo "setup 3/3: megatron-rl and its native extension"; \
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e . >> .venv/setup.log 2>&1 || fail
	@touch $@

clean:  ## remove what was built; .venv and runs/ stay
	rm -rf build .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | awk -F'\t' '{printf "make %-10s %s\n", $$1, $$2}'
