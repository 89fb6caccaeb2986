# Two commands, each enough by itself on a machine that has Python 3.11+ and make:
#   make demo    sets up, then runs the main job on the bundled weights
#   make check   sets up, then lints, types and runs the unit tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo check check-all lint setup wheel bench gpu-run reproduce clean

demo: setup
	$(BIN)/carim-aug demo --out demo

# Two processes of one thread each: the networks of tests are too small for more.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

check: lint
	$(PYTEST)

# As CI does it: trainings, examples and slow tests too.
check-all: lint
	$(PYTEST) -m "not gpu and not network"

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

bench: setup
	for f in tests/benchmarks/*.py; do echo "== $$f"; $(BIN)/python $$f || exit 1; done

# From images to weights on a rented GPU: make gpu-run DATA=folder [MINUTES=25] [OUT=runs/gpu] [ARGS="--ct-nodules FILE"]
MINUTES ?= 25
OUT ?= runs/gpu
gpu-run: setup
	$(BIN)/python -m train.gpu_run --data "$(DATA)" --out "$(OUT)" --minutes $(MINUTES) $(ARGS)

# Every table and figure of Ann (2021) from images, each step resuming:
#   make reproduce DATA=folder [SET=mini|thesis|tiny] [RUNS=runs/reproduction] [PART=test|val] [CT="--ct-nodules FILE"]
SET ?= mini
RUNS ?= runs/reproduction
PART ?= test
mini := usual chexnet128
thesis := usual chexnet
tiny := tiny tiny
RECIPE = $(BIN)/python -m train.$(1) --data "$(DATA)"
reproduce: setup
	test "$(SET)" != thesis || test -f "$(DATA)/split.csv" || $(call RECIPE,common.splits)
	$(call RECIPE,classifier.encoders) --preset $(word 1,$($(SET))) --out $(RUNS)/encoders
	$(call RECIPE,classifier) $(CT) --preset $(word 2,$($(SET))) --out $(RUNS)/chexnet
	$(call RECIPE,classifier) --preset $(word 2,$($(SET))) --seed 1 --set nodules=0.0 superimposed=0.0 --out $(RUNS)/unseen
	$(call RECIPE,reproduction.baselines) $(CT) --preset $(SET) --classifier $(RUNS)/chexnet/classifier.safetensors \
		--out $(RUNS)/table1
	$(call RECIPE,reproduction.table2.start) --preset $(SET) --out $(RUNS)/start
	$(call RECIPE,reproduction.table2) $(CT) --preset $(SET) --start $(RUNS)/start/classifier.safetensors \
		--without $(RUNS)/table1/carim-without/export --full $(RUNS)/table1/carim/export --out $(RUNS)/table2
	$(call RECIPE,reproduction.report) --preset $(word 1,$($(SET))) --sections reproduction --test $(PART) \
		--encoders $(RUNS)/encoders --table1 $(RUNS)/table1 --table2 $(RUNS)/table2 --table2-part $(PART) \
		--classifiers carim=$(RUNS)/chexnet/classifier.safetensors unseen=$(RUNS)/unseen/classifier.safetensors \
		--out $(RUNS)/report

wheel: setup
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
