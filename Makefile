# Two commands on a fresh machine: `make demo` and `make test`. Every target first creates the environment in .venv.
# For contributors: `make quick` before a commit, `make docs`, and `make torture` (an hour: docs/torture.md).
# `make peers` installs the other loaders that `benchmark.py loader` measures.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: demo test quick lint docs peers torture environment

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OUTPUT := output/demo
VIDEO := data/demo/videos/val/00089_right.mp4

# Runs $(2); if it fails, the last line names the step $(1).
step = { $(2); } || { code=$$?; echo "make $@: failed at: $(1)" >&2; exit $$code; }

demo: $(READY)
	@echo "== 1/4 demo videos"
	@$(call step,rendering the demo videos,test -f data/demo/val.csv || $(BIN)/python prepare.py demo --out data/demo)
	@echo "== 2/4 training"
	@$(call step,training,$(BIN)/python train.py -c configs/demo.yaml --resume)
	@echo "== 3/4 evaluation with three crops"
	@$(call step,evaluation,$(BIN)/python evaluate.py -w $(OUTPUT)/best.safetensors -c configs/demo.yaml \
	    | tee $(OUTPUT)/evaluation.txt)
	@echo "== 4/4 prediction"
	@$(call step,prediction,$(BIN)/python predict.py -w $(OUTPUT)/best.safetensors $(VIDEO) \
	    --picture $(OUTPUT)/prediction.png)
	@echo
	@echo "make demo: done. On videos that it never trained on: $$(tail -n 1 $(OUTPUT)/evaluation.txt)"
	@echo "  best weights   $(OUTPUT)/best.safetensors"
	@echo "  TensorBoard    $(BIN)/tensorboard --logdir $(OUTPUT)/tensorboard"
	@echo "  prediction     $(OUTPUT)/prediction.png"

TESTS := $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

test: lint docs
	@$(call step,mypy,$(BIN)/mypy)
	@$(call step,the tests,$(TESTS))
	@echo "make test: passed"

quick: lint
	@$(call step,the fast tests,$(TESTS) -m 'not slow')

lint: $(READY)
	@$(call step,ruff format,$(BIN)/ruff format --check .)
	@$(call step,ruff,$(BIN)/ruff check .)

docs: $(READY)
	@$(call step,the API reference,$(BIN)/python -m docs.build output/docs)

peers: $(READY) requirements-peers.txt
	@$(call step,installing the peers,$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-peers.txt)
	@echo "make peers: installed; $(BIN)/python benchmark.py loader my_videos measures them"

torture: $(READY)
	@$(BIN)/python -m tests.torture $(TORTURE)
	@$(BIN)/python -m tests.torture.files $(TORTURE_FILES)

environment: $(READY)

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "make: '$(PYTHON)' must be Python 3.11 or newer: apt install python3 (or make PYTHON=python3.12 ...)" >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "make: Python's venv module is missing: apt install python3-venv" >&2; exit 1; }
	@echo "== creating the environment in .venv (once)"
	@$(call step,creating the environment in .venv,$(PYTHON) -m venv .venv && \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt)
	@touch $@
