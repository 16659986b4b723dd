# Two commands do everything: `make repro` and `make test`. Each sets up .venv first if that has not been done.
# Only relative paths below: the project may lie in a folder whose name contains spaces.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help repro tokenizer test lab study paper-dry-run lint lock clean

# The interpreter that .venv is made with; the first suitable one of these unless given: make repro PYTHON=/path/to/python3.12
PYTHON ?=
CANDIDATES := python3 python3.13 python3.12 python3.11 python

# Exact versions of all packages; `make LOCK=` in an empty environment takes the newest instead.
LOCK ?= requirements.lock

# Tests run in this many processes with one thread each; the pipeline test, the longest, fills one of them.
TEST_WORKERS ?= 2

# Stages and kernels find the project's interpreter as plain `python`.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1
unexport PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 24

# `dvc repro` of the stages that are not up to date, after saying which and why; as many at a time as
# there are cores (JOBS=1: one). With one thread each they take less time than one after another with
# all threads, and results do not depend on the number of cores.
repro: .venv/installed ## run every stage of the pipeline that is not up to date, then see reports/index.html
	python -m workbook.run_stages dvc.yaml $(if $(JOBS),--jobs $(JOBS)) --alone throughput

tokenizer: .venv/installed ## train only SIT-SC-5 of the pipeline
	OMP_NUM_THREADS=1 python -m dvc repro train_tokenizer@sit5_sc-seed0

test: lint ## check style and types, then run the tests
	OMP_NUM_THREADS=1 python -m pytest -n $(TEST_WORKERS) --dist worksteal

lab: .venv/installed ## open JupyterLab on the notebooks
	python -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

# Results are of two processes of one thread each; what is finished stays so when it is interrupted.
study: .venv/installed ## run what the study has no result of yet: seeds, steps, orders, ablations (14 hours for all)
	python -m workbook.run_stages study/dvc.yaml --jobs 2 --alone efficiency
	python -m workbook.study # the list of results
	python -m dvc repro tokenizer_recipe ablations scaling report

# On a CPU LAYERS=1 takes an hour or two, the whole depth many hours and 42 GB of memory.
paper-dry-run: .venv/installed ## run all stages with the paper's shapes on eight images (LAYERS=1: stacks of that depth)
	python scripts/paper_dry_run.py $(if $(LAYERS),--layers $(LAYERS))

lint: .venv/installed ## check style and types
	python -m ruff check --quiet .
	python -m ruff format --quiet --check .
	pyrefly check --output-format min-text --summary=none --min-severity error

lock: .venv/installed ## renew requirements.lock, the exact versions that are installed
	python -m pip install --quiet --disable-pip-version-check uv && mkdir -p build
	python -m uv pip compile --quiet --universal --python-version 3.11 --upgrade --no-header --no-annotate \
	  --extra lab --extra test pyproject.toml --output-file build/requirements.lock
	(head -n 1 requirements.lock; cat build/requirements.lock) > build/new.lock && mv build/new.lock requirements.lock

clean: ## remove the environment, models, codes and intermediate files (results and DVC's cache stay)
	rm -rf .venv build models codes samples scratch weights .ckpt reports/failed .pytest_cache .ruff_cache .hypothesis *.egg-info

# Modules are compiled here, on all cores: pip takes one, and where Python is told not to (PYTHONDONTWRITEBYTECODE, as in many containers), every
# process would compile what it imports, which takes three times as long as importing it. A few files of other Pythons cannot be compiled.
.venv/installed: pyproject.toml $(LOCK)
	@set -eu; \
	if [ -L .venv ]; then echo ".venv is a link, perhaps to another checkout's, which an installation would redirect here: remove the link." >&2; exit 1; fi; \
	suitable() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
	if ! suitable .venv/bin/python; then \
	  chosen="$(PYTHON)"; \
	  if [ -z "$$chosen" ]; then \
	    for name in $(CANDIDATES); do if suitable "$$name"; then chosen="$$name"; break; fi; done; \
	    if [ -z "$$chosen" ]; then \
	      echo "This project needs Python 3.11 or newer and found none: install one, or name it: make PYTHON=/path/to/python3" >&2; \
	      exit 1; \
	    fi; \
	  elif ! suitable "$$chosen"; then \
	    echo "$$chosen is not Python 3.11 or newer: install one, or name another: make PYTHON=/path/to/python3" >&2; exit 1; \
	  fi; \
	  "$$chosen" -m venv --clear .venv || { \
	    echo "Python's venv module did not work. On Debian or Ubuntu: apt install python3-venv" >&2; rm -rf .venv; exit 1; }; \
	fi; \
	echo "Installing $(if $(LOCK),the versions of $(LOCK),the newest releases) into .venv: a few gigabytes, some minutes the first time."; \
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $(if $(LOCK),-c $(LOCK)) -e '.[lab,test]'; \
	.venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true; \
	echo "$(or $(LOCK),the newest releases)" > .venv/installed
