# Two commands, each enough by itself on a machine that has Python 3.11+ and make:
#   make demo    sets up, then runs the main job on the bundled weights
#   make check   sets up, then lints, types and tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo check lint test setup wheel bench gpu-run clean

demo: setup
	$(BIN)/carim-aug demo --out demo

check: lint test

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: setup
	$(BIN)/python -m pytest -q

bench: setup
	for f in tests/benchmarks/*.py; do echo "== $$f"; $(BIN)/python $$f || exit 1; done

# From films to weights on a rented GPU: make gpu-run DATA=folder [MINUTES=25] [OUT=runs/gpu] [ARGS="--ct-nodules FILE"]
MINUTES ?= 25
OUT ?= runs/gpu
gpu-run: setup
	$(BIN)/python -m train.gpu_run --data "$(DATA)" --out "$(OUT)" --minutes $(MINUTES) $(ARGS)

wheel: setup
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
