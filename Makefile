# make demo    trains on a few photographs; shows pictures, tables and plots (under 6 minutes with set-up, on 2 cores)
# make demo-generate  trains a small VQ-VAE-2 and priors over its codes, and draws pictures from them (a few minutes)
# make test    runs the tests
# make bench   runs the benchmarks
# make clean   removes what was built, .venv too
#
# Each does its own set-up in .venv; the first run downloads PyTorch. Settings: PYTHON=python3.12, DEMO_ARGS="...",
# TEST_ARGS="-k nearest", BENCH_ARGS="-k nearest", CONSTRAINTS= (the newest version of everything).
SHELL := /bin/bash
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo demo-generate test bench clean
demo: .venv/demo.stamp
	$(BIN)/python -m vqfast.cli.demo $(DEMO_ARGS)

demo-generate: .venv/demo.stamp
	$(BIN)/python -m vqfast.cli.demo_generate $(DEMO_ARGS)

# Two processes of one thread each; a file stays in one process, and tests that need threads ask for them.
test: .venv/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile $(TEST_ARGS)

bench: .venv/test.stamp
	$(BIN)/pytest bench --benchmark-only $(BENCH_ARGS)

clean:
	rm -rf .venv build dist vqfast.egg-info vqfast/*.so .pytest_cache

.venv/torch.stamp: $(CONSTRAINTS) .ci/check_machine
	@.ci/check_machine $(PYTHON)
	@echo "Setting up .venv, which downloads PyTorch. To choose its build yourself, install it into .venv first."
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(PIP) "setuptools>=77" ninja pybind11 torch
	@touch $@

.venv/demo.stamp: .venv/torch.stamp $(SOURCES)
	$(PIP) --no-build-isolation -e ".[train,metrics]"
	@touch $@

.venv/test.stamp: .venv/torch.stamp $(SOURCES)
	$(PIP) --no-build-isolation -e ".[test,bench]"
	@touch $@ .venv/demo.stamp
