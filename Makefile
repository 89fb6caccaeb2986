# Two commands, each enough by itself on a machine that has Python 3.11+ and make:
#   make demo    sets up, then runs the main job on the bundled weights
#   make check   sets up, then lints, types and tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo check lint test setup wheel bench gpu-run reproduce clean

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

# Every table and figure of the source from films, each step resuming:
#   make reproduce DATA=folder [SET=mini|thesis] [RUNS=runs/reproduction] [CT="--ct-nodules FILE"]
SET ?= mini
RUNS ?= runs/reproduction
PART ?= test
mini := usual chexnet128
thesis := usual chexnet
tiny := tiny tiny
FILMS = --data "$(DATA)"
reproduce: setup
	test "$(SET)" != thesis || test -f "$(DATA)/split.csv" || $(BIN)/python -m train.common.splits $(FILMS)
	$(BIN)/python -m train.classifier.encoders $(FILMS) --preset $(word 1,$($(SET))) --out $(RUNS)/encoders
	$(BIN)/python -m train.classifier $(FILMS) $(CT) --preset $(word 2,$($(SET))) --out $(RUNS)/chexnet
	$(BIN)/python -m train.classifier $(FILMS) --preset $(word 2,$($(SET))) --seed 1 --out $(RUNS)/unseen \
		--set nodules=0.0 superimposed=0.0 map_weight=0.0
	$(BIN)/python -m train.reproduction.baselines $(FILMS) $(CT) --preset $(SET) --classifier $(RUNS)/chexnet/classifier.safetensors \
		--out $(RUNS)/table1
	$(BIN)/python -m train.reproduction.table2.start $(FILMS) --preset $(SET) --out $(RUNS)/start
	$(BIN)/python -m train.reproduction.table2 $(FILMS) $(CT) --preset $(SET) --start $(RUNS)/start/classifier.safetensors \
		--without $(RUNS)/table1/carim-without/export --full $(RUNS)/table1/carim/export --out $(RUNS)/table2
	$(BIN)/python -m train.reproduction.report $(FILMS) --preset $(word 1,$($(SET))) --sections reproduction --test $(PART) \
		--encoders $(RUNS)/encoders --table1 $(RUNS)/table1 --table2 $(RUNS)/table2 --table2-part $(PART) \
		--classifiers carim=$(RUNS)/chexnet/classifier.safetensors \
		unseen=$(RUNS)/unseen/classifier.safetensors --out $(RUNS)/report

wheel: setup
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
