# Every target sets itself up: a virtual environment in .venv, torch first, then the pinned rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROMPT ?=
QUESTION := What are three tips for staying healthy?
# The starter model, downloaded once; where that is not possible, the bundled one.
MODEL = $$($(BIN)/mistral-7b pull starter >/dev/null && echo starter || \
	{ echo "Using the bundled model, a base model of Python code, in its place." >&2; echo demo; })

.DEFAULT_GOAL := help
.PHONY: help run chat serve check check-types check-core test lint site gpu-check demo

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/'

run: $(STAMP)  ## ask the starter model a question (first downloads it: 93 MB); PROMPT="..." to ask another
	@model=$(MODEL); if [ $$model = demo ]; then \
	  $(BIN)/mistral-7b generate demo $(if $(PROMPT),--prompt="$$PROMPT") </dev/null; \
	else \
	  prompt="$${PROMPT:-$(QUESTION)}"; printf '> %s\n' "$$prompt"; \
	  $(BIN)/mistral-7b run starter --temperature 0 --max-tokens 512 --verbose -- "$$prompt"; \
	fi

chat: $(STAMP)  ## chat with the starter model on the terminal
	@model=$(MODEL); $(BIN)/mistral-7b chat $$model

serve: $(STAMP)  ## serve the starter model over HTTP, with a chat page
	@model=$(MODEL); $(BIN)/mistral-7b serve $$model

test: $(STAMP)  ## run the whole test suite, two files at a time
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile

# What a change of the core most likely breaks: seconds for each file.
CORE := tests/test_attention.py tests/test_cache.py tests/test_equivalence.py tests/test_example_loop.py \
	tests/test_imports.py tests/test_errors.py tests/test_surgery.py tests/kernels/test_attend.py tests/kernels/test_backend.py \
	tests/sampling tests/text/test_tool_calls.py tests/engine/test_pages.py tests/engine/test_llm.py tests/checkpoint/test_tensor_names.py

check: $(STAMP)  ## lint, types and the tests of the core, within a minute on two cores
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory -j2 check-types check-core

check-types:
	@$(BIN)/mypy

check-core:
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(CORE)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

site: $(STAMP)  ## build the documentation into build/site, offline; any warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Open build/site/index.html, or, to search it too: $(BIN)/python -m http.server -d build/site"

gpu-check: $(STAMP)  ## the tests, exactness and speed on the accelerator that is present; a table last
	$(BIN)/python experiments/gpu_check.py

demo: $(STAMP)  ## make the bundled model again from the standard library (hours); puts it in place
	$(BIN)/python examples/make_demo.py --install

export PROMPT

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("mistral_7b needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once; torch first) ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
