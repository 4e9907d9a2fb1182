# `make demo` needs nothing but Python 3.11; `make test` is what a change must pass. An active virtualenv is used as it is,
# `make VENV=folder test` uses another one, otherwise .venv is made here.
VENV    ?= $(or $(VIRTUAL_ENV),.venv)
PYTHON  ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN     := $(VENV)/bin
HERE    := $(shell pwd | cksum | cut -d' ' -f1)
CORE    := $(VENV)/.vfmvae-core-$(HERE)
DEV     := $(VENV)/.vfmvae-dev-$(HERE)
RECIPE  := settings.ini setup.py pyproject.toml
# more words for pip, such as --index-url of an index with CPU-only builds
PIP_ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help env dev demo train bench gpu test test-all lint notebooks pytest lab readme pages docs hooks export clean
.DELETE_ON_ERROR:

help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/\t/' | expand -t 12

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo 'no Python >= 3.11 found; install one or call make PYTHON=...'; exit 1; }
	$(PYTHON) -m venv $(VENV)

# the newest stamp says for which recipe the environment was last made
$(CORE): $(RECIPE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -e .
	@touch $@

$(DEV): $(RECIPE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -e '.[dev]'
	@touch $(CORE) $@

env: $(CORE)     ## the virtualenv with the library
dev: $(DEV)      ## the same with all that tests and notebooks need

demo: $(CORE)    ## a first look, on your images with IMAGES=folder
	$(BIN)/vfmvae demo $(if $(IMAGES),--data "$(IMAGES)")

# more words for the command, such as ARGS='--vfm siglip2-b --size 256 --num-images 100000 --dry-run'
ARGS ?=
train: $(CORE)   ## train a tokenizer, on your images with IMAGES=folder
	$(BIN)/vfmvae train-tokenizer $(if $(IMAGES),--data "$(IMAGES)") --out outputs/tokenizer.safetensors $(ARGS)

bench: $(DEV)    ## speed of the decoder, of training steps, of CKNNA (as ratios), of the labs and of opening large sets
	$(BIN)/python benchmarks/speed.py $(ARGS)
	$(BIN)/python benchmarks/sets.py

# with the Python at hand (or PYTHON=...), in which nothing is installed; PARTS='decode flow' for some, VFMVAE_SMOKE=1 without a card
PARTS ?=
gpu:             ## what only a graphics card can tell, into data/results/gpu_<card>.json
	$(PYTHON) benchmarks/gpu.py $(PARTS) $(ARGS)

# mypy takes one core of two, so the notebooks begin beside it; pytest has the last word, even under make -j
test: $(DEV)     ## everything a change must pass
	@$(MAKE) --no-print-directory -j2 lint notebooks
	@$(MAKE) --no-print-directory pytest

test-all: export VFMVAE_TEST_ALL = 1
test-all: test   ## the same, each question asked of every member of its kind, not of one

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/mypy

notebooks: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2

# a file of tests stays in one process, whose module fixtures it shares; in the order of the files, so that the long ones do not come last
pytest: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lab: $(DEV)      ## the notebooks in JupyterLab
	$(BIN)/jupyter lab $(firstword $(wildcard nbs/index.ipynb nbs/00_core.ipynb))

export: $(DEV)   ## notebooks to modules, notebooks clean
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

readme: $(DEV)   ## README.md from nbs/index.ipynb
	$(BIN)/jupyter nbconvert --to markdown --output-dir . --output README --NbConvertApp.output_files_dir=data/readme --log-level WARN \
	  --RegexRemovePreprocessor.patterns='^#\|\s*hide' \
	  --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags=remove-input nbs/index.ipynb
	sed -E 's#\(\.\./(data/|docs/|CONTRIBUTING)#(\1#g; s#\]\((([0-9]+|learn/|paper/|train/)[a-z0-9_]+\.ipynb)\)#](nbs/\1)#g; s#!\[(jpeg|png)\]#![picture made by the code of nbs/index.ipynb]#' README.md > README.md.new && mv README.md.new README.md

pages: $(DEV)    ## all pages executed again, trainings at their smoke size, with the results that are there; ARGS='nbs/...' for some
	OMP_NUM_THREADS=1 $(BIN)/python docs/pages.py $(ARGS)
	@$(MAKE) --no-print-directory readme

docs: $(DEV)     ## a page for each notebook and module in _docs, with a search box and an index of names, made without a network
	$(BIN)/python docs/build.py $(ARGS)

hooks: $(DEV)    ## before each commit: export, clean, ruff
	@printf '%s\n' '#!/bin/sh' '# made by: make hooks' 'before=$$(git diff | cksum)' '$(abspath $(BIN))/nbdev-export && $(abspath $(BIN))/nbdev-clean && $(abspath $(BIN))/ruff check --quiet || exit 1' \
	  'test "$$before" = "$$(git diff | cksum)" || { echo "notebooks were exported or cleaned: git add them and commit again"; exit 1; }' > "$$(git rev-parse --git-path hooks)/pre-commit"
	@chmod +x "$$(git rev-parse --git-path hooks)/pre-commit"

clean:           ## build products away; the environment and the runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache _proc _docs
	find nbs vfmvae tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
