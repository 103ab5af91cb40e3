# Everything that a contributor or CI runs. `make help` lists the targets; each sets up .venv first, once.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints/cpu.txt
# A package index to take torch from. On Linux PyPI's torch brings CUDA libraries of several GB; for the CPU build alone:
#   make venv TORCH_INDEX=https://download.pytorch.org/whl/cpu
# That index takes part for torch itself only: what torch needs comes from PyPI, where the pins hold.
TORCH_INDEX ?=
PYTEST_ARGS ?=
# Test processes; each has one torch thread.
TEST_WORKERS ?= 2
DEMO_ARGS ?=
TINY_OUT ?= outputs/tiny_weights

BIN := $(VENV)/bin
READY := $(VENV)/.installed
DOCS_READY := $(VENV)/.docs-installed
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check

# The ends of the ranges in pyproject.toml. What is tested there is what depends on other packages: every method on every
# family (torch, diffusers, transformers), adapters (peft), stock pipelines, videos and Parquet (av, pyarrow), configs and
# flags (pydantic, tyro), whole runs, checkpoints, locks (filelock), the metrics (scikit-learn), the live page (starlette, uvicorn). Older and newer packages
# warn of more than the pinned ones, so warnings are no errors there.
VERSION_TESTS := $(addprefix fastvideo/tests/, distillation/test_golden_losses.py distillation/test_lora.py \
	distillation/test_wan_parity.py distillation/test_exact_resume.py inference/test_export.py data/test_clips.py \
	data/test_parquet.py training/test_config.py training/test_flags.py training/test_run.py evaluation/test_metrics.py \
	distillation/test_text_encoder.py test_doctor.py test_mount.py live/test_server.py)
COMPILE := $(VENV)/bin/uv pip compile --quiet --no-annotate --no-header --extra dev --python-platform x86_64-manylinux_2_28

.DEFAULT_GOAL := help
.PHONY: help venv test field-cases test-slow test-nightly test-extras test-lowest test-newest test-versions constraints lint format types contracts shape docs docs-check layers check demo demo-stream demo-families tiny tiny-stream tiny-families clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## set up .venv with the pinned CPU packages (once; again when the pins or pyproject.toml change)

$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "setting up $(VENV) (torch first; a few minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --constraint $(CONSTRAINTS) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX) )torch
	@$(PIP) --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

test: $(READY) ## run the fast tests (one topic: make test PYTEST_ARGS="-k dmd2")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not nightly" -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

field-cases: $(READY) ## run the kept cases of what people brought: odd captions, videos, weights, numbers, ...
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not nightly" fastvideo/tests/field_cases -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

test-slow: $(READY) ## run the tests marked slow: layouts against one process, torchrun, lost ranks, compilation, ...
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow and not nightly" -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

test-nightly: $(READY) ## run the tests marked nightly: every training to the truth, every layout x method, ...
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m nightly --timeout 0 -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

test-extras: $(READY) ## run the tests of 8-bit optimizer states and quantised roles, with torchao, bitsandbytes and gguf beside the other packages
	@$(PIP) --constraint $(CONSTRAINTS) --no-deps --upgrade --target $(VENV)/extras torchao bitsandbytes gguf
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/extras $(BIN)/python -m pytest -q $(addprefix fastvideo/tests/distillation/, test_eight_bit.py test_quantised.py test_gguf.py)

test-versions: test-lowest test-newest ## test both ends of the ranges of versions (about 7 GB of packages each)

test-lowest: $(VENV)/lowest/.installed ## test the lowest versions that are allowed
	$(call test-with,lowest)

test-newest: $(VENV)/newest/.installed ## test the newest versions that are allowed
	$(call test-with,newest)

test-with = OMP_NUM_THREADS=1 $(VENV)/$(1)/bin/python -m pytest -q -o filterwarnings=ignore -p no:cacheprovider \
	-m "not slow and not nightly" -n $(TEST_WORKERS) --dist loadfile $(VERSION_TESTS)

$(VENV)/%/.installed: constraints/%.txt pyproject.toml $(READY)
	@echo "setting up $(VENV)/$* (a few minutes, once)"
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)/$*
	@$(BIN)/uv pip install --quiet --python $(VENV)/$*/bin/python --constraint constraints/$*.txt --editable '.[dev]'
	@touch $@

constraints: $(READY) ## compile constraints/lowest.txt, newest.txt and gpu.txt anew from the ranges in pyproject.toml
	$(COMPILE) --resolution lowest-direct --python-version 3.11 pyproject.toml > $(VENV)/lowest.txt
	$(COMPILE) --python-version 3.11 pyproject.toml > $(VENV)/newest.txt
	$(filter-out --extra dev,$(COMPILE)) --constraint $(CONSTRAINTS) --python-version 3.11 pyproject.toml > $(VENV)/gpu.txt
	for set in lowest newest gpu; do \
		{ grep '^#' constraints/$$set.txt; cat $(VENV)/$$set.txt; } > $(VENV)/$$set.new && mv $(VENV)/$$set.new constraints/$$set.txt; \
	done

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY) ## mypy --strict on the library's core
	$(BIN)/mypy --strict fastvideo/distillation

contracts: $(READY) ## who may import whom
	$(BIN)/lint-imports --no-cache

$(DOCS_READY): $(READY)
	@$(PIP) --constraint $(CONSTRAINTS) --editable '.[docs]'
	@touch $@

docs: $(DOCS_READY) ## build the pages into site/; a broken link or a page outside the navigation fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

layers: $(READY) ## draw the layers in docs/architecture.md anew from the code
	$(BIN)/python -m tools.layers

shape: ## how much one has to read: lines, files and repetitions, with their budgets (no .venv needed)
	$(PYTHON) tools/shape.py

docs-check: $(READY) ## run the code in the docs, check its commands and links
	$(BIN)/python -m pytest -q fastvideo/tests/test_docs.py

check: test lint types contracts ## test, lint, types and contracts

demo: $(READY) ## distil, evaluate and write outputs/demo/report.html
	$(BIN)/python -m fastvideo.demo $(DEMO_ARGS)

demo-stream: $(READY) ## distil a student that streams, measure it, write outputs/demo_stream/report.html
	$(BIN)/python -m fastvideo.demo_stream $(DEMO_ARGS)

demo-families: $(READY) ## distil students under a teacher of images too, measure them, write outputs/demo_families/report.html
	$(BIN)/python -m fastvideo.demo_families $(DEMO_ARGS)

tiny: $(READY) ## rebuild the embedded weights from nothing into TINY_OUT
	$(BIN)/python -m tools.tiny_world --out $(TINY_OUT)

tiny-stream: $(READY) ## rebuild the embedded streaming pipeline from the shipped one into TINY_OUT
	$(BIN)/python -m tools.tiny_world --family stream --out $(TINY_OUT)

tiny-families: $(READY) ## rebuild the embedded teachers of the soft world into TINY_OUT/soft and TINY_OUT/stills
	$(BIN)/python -m tools.tiny_world --family soft --out $(TINY_OUT)/soft
	$(BIN)/python -m tools.tiny_world --family stills --out $(TINY_OUT)/stills

clean: ## remove caches and build products; .venv and outputs/ stay
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
