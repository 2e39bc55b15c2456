PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The tests' tensors are tiny: threads would only wait for one another. So each core has tests of
# its own, up to eight, which take about a gigabyte each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

.PHONY: setup demo test test-all lint api docs build gpu

setup: $(STAMP)

# Without a GPU driver the CUDA build of torch runs on the CPU, so that one set of pins serves all machines.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1 -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/tekfac train

test: setup
	$(PYTEST) -m 'not slow'

test-all: setup
	$(PYTEST) --durations=10

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The public interface on file, which a test compares with the package.
api: setup
	$(BIN)/python tests/public_api.py > tests/public_api.txt

# The site in build/site, for any browser; open its index.html.
docs: setup
	rm -rf build/site
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -qEW --keep-going -c docs/site -d build/doctrees . build/site

# Everything that is to be known on a GPU, in eight minutes; with Python alone it makes .venv first.
# `make gpu GPU='--data cifar10.npz'` has it train on that; $OUT is where the report goes.
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU)

# Wheel and sdist in dist/, whole and working where the source is not seen.
build: setup
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*
	$(BIN)/python .ci/check_dist.py
