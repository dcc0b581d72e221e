# `make demo` and `make test` need Python 3.11 or newer and nothing else; both install into .venv on their first run.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-web test-lowest test-newest test-lmms test-serving test-gpu test-learning default-checkpoint fuzz conformance conformance-peers lint types format docs dist clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-20s %s\n", $$1, $$2 }'

demo: $(INSTALLED) ## Describe pictures, answer questions, draw, and show which patches became tokens
	$(BIN)/lavit demo --output out/demo.png

test: $(INSTALLED) ## Run all tests
	$(BIN)/pytest -n 2 --dist loadfile --ignore tests/learning --ignore tests/fuzz --ignore tests/conformance --ignore tests/lmms --ignore tests/engines --ignore tests/web --ignore tests/gpu

test-web: $(INSTALLED) ## Open the page of `lavit demo --web` in Chromium, which has to be there with its driver
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[test,test-web]'
	$(BIN)/pytest -q tests/web

test-lowest: ## Run all tests with the lowest versions that setup.cfg allows
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

test-newest: ## Run all tests with the newest versions there are, of all but PyTorch
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=constraints-newest.txt

test-learning: $(INSTALLED) ## Train small models for some minutes: does every stage learn?
	$(BIN)/pytest -n 2 --dist worksteal tests/learning

fuzz: $(INSTALLED) ## Try odd inputs, damaged files and kills for some minutes; with FUZZ=full, many more
	FUZZ=$(FUZZ) $(BIN)/pytest -n 2 tests/fuzz

conformance: $(INSTALLED) ## Run transformers' own tests on the classes here; downloads the tests
	$(BIN)/python tests/conformance/sources.py
	$(BIN)/pytest -q -n 2 tests/conformance --ignore tests/conformance/peers

conformance-peers: $(INSTALLED) ## Run the same tests on Emu3, Janus and Chameleon, for comparison
	$(BIN)/python tests/conformance/sources.py
	-$(BIN)/pytest -q -n 2 tests/conformance/peers --tb=no

# lmms-eval needs much, so it has an environment of its own. PyPI has torchvision for PyTorch with CUDA alone; lmms-eval
# runs without, but not with one that does not fit.
test-lmms: ## Run a task of lmms-eval on LaVIT; installs lmms-eval
	$(MAKE) install VENV=.venv-lmms
	.venv-lmms/bin/python -m pip install --disable-pip-version-check 'lmms-eval>=0.7.3' \
		$$(grep -E '^(torch|transformers)==' $(CONSTRAINTS))
	.venv-lmms/bin/python -c 'import torchvision' 2> /dev/null || .venv-lmms/bin/python -m pip uninstall --yes torchvision
	.venv-lmms/bin/pytest -q tests/lmms

# So have vLLM, for a CPU here, and llama.cpp, of which there are wheels. vLLM brings torchvision and torchcodec for CUDA, which
# do not run here, and asks for a transformers older than this package does, which it runs with all the same.
test-serving: ## Run vLLM and llama.cpp on the default checkpoint, for some minutes; installs them
	test -x .venv-serving/bin/python || $(PYTHON) -m venv .venv-serving
	.venv-serving/bin/python -m pip install --disable-pip-version-check --requirement tests/engines/requirements.txt
	.venv-serving/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	.venv-serving/bin/python -m pip install --disable-pip-version-check --no-deps transformers==5.20.2 --editable .
	.venv-serving/bin/pytest -q tests/engines

# PyTorch with CUDA has to be in the environment: make test-gpu VENV=DIRECTORY.
test-gpu: $(INSTALLED) ## Run the tests for a GPU; without one they say that they were skipped
	$(BIN)/pytest -q -rs tests/gpu

lint: $(INSTALLED) ## Check style and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell *.md docs src tests examples benchmarks

types: $(INSTALLED) ## Check types
	$(BIN)/mypy

format: $(INSTALLED) ## Reformat the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Hours on two cores. On a GPU: WORLD=emoji, whose recipe has not been run yet.
WORLD ?= emoji-small
ifeq ($(WORLD),emoji)
RECIPE := examples/lavit_emoji/recipe.yaml
CARD := examples/lavit_emoji/model_card.md
else
RECIPE := examples/lavit_emoji/small.yaml
CARD := examples/lavit_emoji/small/model_card.md
endif
TRAINED := out/lavit-$(WORLD)

default-checkpoint: $(INSTALLED) ## Train a LaVIT of emoji from nothing, and measure it; run it again after an interruption
	$(BIN)/python examples/worlds/train.py --recipe $(RECIPE) --output_dir $(TRAINED)
	$(BIN)/python examples/worlds/assemble.py --trained $(TRAINED) --output_dir $(TRAINED)/checkpoint --decoder_guidance 2
	$(BIN)/lavit evaluate $(TRAINED)/checkpoint --data $(WORLD) --task all --split validation --split held_out \
		--split unseen_artist --num-drawings 200 --steps 20 --batch-size 64 --output $(TRAINED)/evaluation
	$(BIN)/python examples/worlds/write_card.py --checkpoint $(TRAINED)/checkpoint --name lavit-$(WORLD) \
		--text $(CARD) --metrics $(TRAINED)/evaluation/metrics.json

docs: $(INSTALLED) ## Build the documentation as a site, into out/site
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: ## Build the wheel and the source distribution, check them, and try the wheel in an environment of its own
	rm -rf dist .venv-dist
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --disable-pip-version-check build twine
	.venv-dist/bin/python -m build
	.venv-dist/bin/twine check --strict dist/*
	.venv-dist/bin/python -m pip install --disable-pip-version-check --constraint $(CONSTRAINTS) dist/*.whl
	cd examples/images && ../../.venv-dist/bin/lavit caption scene.png

install: $(INSTALLED) ## Install into .venv (the other commands do it by themselves)

clean: ## Remove .venv and everything made by tools
	rm -rf $(VENV) .venv-lowest .venv-newest .venv-lmms .venv-serving .venv-dist build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .cache out

# The stamp makes a second run start at once; a change of the requirements installs again.
$(INSTALLED): setup.cfg pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[test]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "lavit-hf needs Python 3.11 or newer, but '$(PYTHON)' is missing or older." \
		"Name one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs the package python3-venv." >&2; exit 1; }
