# `make demo` and `make test` set everything up themselves; the first run takes a few minutes, later ones start at once.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: demo test test-all test-newest-megatron fuzz lint format docs sanitize clean setup help

# Importing torch, vLLM and megatron-core from source alone takes ten seconds more in every process.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= $(or $(shell command -v python3.11),python3)
BIN := .venv/bin
PACKAGES := .venv/.packages
READY := .venv/.ready
NATIVE := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h csrc/*.cuh)
SANITIZED := build/sanitize
MEGATRON_TESTS := tests/megatron_patches tests/models tests/trainer tests/test_train_step.py tests/test_convert.py \
	$(addprefix tests/drafting/test_,feature_tap.py online_drafter.py) tests/drafter/training/test_head_trainer.py \
	$(addprefix tests/drafter/idle_time/test_,pipeline_bubbles.py trainer_hook.py)
BASE_MODEL := runs/arithmetic-sft/hf/config.json
# Another release for the trainer's tests: make test-newest-megatron MEGATRON=0.18.2
MEGATRON ?= 0.19.2
TRITON := triton==3.7.1
OTHER_MEGATRON := .venv-megatron-$(MEGATRON)
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

# The property-based tests with so many cases each, most of which are several lines or rows: tens of thousands together.
# They are others each time; a failure prints its case and how to repeat it.
FUZZ_EXAMPLES ?= 4000
fuzz: $(READY)  ## minutes of odd and broken records, tables and configs (FUZZ_EXAMPLES=4000)
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/pytest -n 2 --dist load tests/fuzz

# What of the tests stands on megatron-core, except whole runs and those with engines.
test-newest-megatron: $(OTHER_MEGATRON)/.ready  ## the trainer's tests on another megatron-core (MEGATRON=0.19.2)
	PATH="$(CURDIR)/$(OTHER_MEGATRON)/bin:$$PATH" $(OTHER_MEGATRON)/bin/python -m pytest -n 2 --dist loadfile \
		--no-loadscope-reorder $(MEGATRON_TESTS)

# The packages of .venv with another megatron-core in front of them. From 0.17 on it asks for Python 3.12, but its code
# runs on 3.11, which .venv is for; from 0.18 on it imports triton (this one is what torch 2.13 names for CUDA).
$(OTHER_MEGATRON)/.ready: $(READY)
	@echo "setup: megatron-core $(MEGATRON) and the packages of .venv in $(OTHER_MEGATRON)"; \
	$(BIN)/python -m venv --clear --without-pip $(OTHER_MEGATRON); \
	packages() { $$1/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"; }; \
	echo "import site; site.addsitedir('$$(packages $(BIN)/..)')" > $$(packages $(OTHER_MEGATRON))/venv.pth; \
	$(BIN)/python -m pip --python $(OTHER_MEGATRON) install --disable-pip-version-check --progress-bar off --quiet \
		--no-compile --no-deps --ignore-requires-python --ignore-installed megatron-core==$(MEGATRON) $(TRITON)
	@touch $@

lint: $(READY)  ## ruff, its formatter in check mode, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## put imports and lines in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site needs no network, neither to be built nor to be read.
docs: $(READY)  ## the site of docs/ in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

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
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | awk -F'\t' '{printf "make %-20s  %s\n", $$1, $$2}'
