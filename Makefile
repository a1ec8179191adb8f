# make help lists the targets. Every target sets up what it needs: .venv is made once, and again when
# pyproject.toml or constraints.txt changes.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
EXTRAS ?= lab,batch,adapters,test,site
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

GPU_PYTHON ?= python3
GPU_JOBS ?= 8
SLOW ?=
LEAVE ?=

PRESET ?= quick
LABEL ?= $(PRESET)
GPUS ?= 0
JOBS ?= $(if $(filter 0 1 2,$(GPUS)),2,$(GPUS))
# One more than two cores, since tests of batches, set-ups and clusters mostly wait for what they have started.
TEST_JOBS ?= $(if $(filter command,$(firstword $(origin JOBS))),$(JOBS),3)
GPU ?= $(if $(filter-out 0,$(GPUS)),1,0)
ID ?=
ARGS ?=
PRESETS ?= paper mpnet mpnet_clean minilm minilm_clean ratings gemma
WITHIN ?= 600
ROUNDS ?= 20
BUSY ?=

# pip without what leads it out of .venv: with PYTHONPATH it takes packages of other places for installed, and installs none.
PIP := PIP_USER=0 $(BIN)/python -I -m pip

# One thread a process and parallel over processes: two-thread torch beside another process is 2x to 27x slower.
export OMP_NUM_THREADS = 1
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"

# By the environment, since a shell would take off the quotes inside of it.
export COMPRESSIBLE_ARGS = $(ARGS)
export GIVEN_PRESET = $(PRESET)
export GIVEN_LABEL = $(LABEL)
export GIVEN_JOBS = $(JOBS)
export GIVEN_GPUS = $(GPUS)
export GIVEN_ID = $(ID)

.PHONY: help setup figures figure paper lint test tests test-gpu lab site list claims notebooks nbval clean \
	distclean everything verify release
.DEFAULT_GOAL := help

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20
	@echo "  variables: PRESET=$(PRESET) LABEL=$(LABEL) JOBS=$(JOBS) GPUS=$(GPUS) (figures), GPU=1 (set-up with CUDA),"
	@echo "             ID=paper/name, ARGS='-p name value -f file.yaml', PYTHON=$(PYTHON)"

setup: $(STAMP)  ## make .venv and install everything (once)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(\
		f"Python >= 3.11 is needed, $(PYTHON) is {v[0]}.{v[1]}: try make PYTHON=python3.11")'
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "$(PYTHON) has no venv module: on Debian or Ubuntu, apt-get install python3-venv" >&2; exit 1; }
# An interrupt may leave one without pip, a removed Python one that does not run.
	@if ! $(BIN)/python -c '' 2>/dev/null; then \
		$(PYTHON) -m venv $$(test -f $(VENV)/pyvenv.cfg && echo --clear) $(VENV); \
	elif ! $(PIP) --version >/dev/null 2>&1; then $(BIN)/python -I -m venv $(VENV); fi
	@$(BIN)/python -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(\
		f"$(VENV) has Python {v[0]}.{v[1]}, expected 3.11 or later: make distclean removes it")'
	@$(MAKE) --no-print-directory torch-$(if $(filter 0,$(GPU)),cpu,gpu)
	$(PIP) install -q -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

# The CPU build is ten times smaller. It is taken from PyTorch's index when that answers within 5 s and pip is
# not already set up to look elsewhere (TORCH_INDEX=... on the command line overrules that).
.PHONY: torch-cpu torch-gpu
torch-cpu:
	@if $(BIN)/python -I -c 'import torch' 2>/dev/null; then exit 0; fi; \
	if [ "$(origin TORCH_INDEX)" = file ] && $(PIP) config list | grep -E 'index-url|find-links' >/dev/null; \
	then echo "PyTorch: from where pip is set up to look"; exit 0; fi; \
	if $(BIN)/python -c 'import signal, urllib.request as u; signal.alarm(5); u.urlopen("$(TORCH_INDEX)/torch/")' \
		>/dev/null 2>&1; \
	then $(PIP) install -q --no-deps --index-url $(TORCH_INDEX) "$$(grep ^torch== constraints.txt)" \
		|| echo "PyTorch: no CPU build there, taking pip's default"; \
	else echo "PyTorch: its CPU index does not answer, taking pip's default"; fi

torch-gpu:
	@if $(PIP) freeze | grep -q '^torch==.*+cpu'; \
	then $(PIP) uninstall -q -y torch; fi

figures: $(STAMP)  ## all figures of a preset: PRESET, JOBS, GPUS, ARGS
	@seen=$$(nvidia-smi -L 2>/dev/null | grep -c ^GPU); if [ "$$GIVEN_GPUS" = 0 ] && [ "$${seen:-0}" -gt 0 ]; then \
		echo "$$seen GPUs of this machine are hidden from the notebooks: GPUS=$$seen shows them" >&2; fi
	@$(RUN) python -m compressible build --preset="$$GIVEN_PRESET" --label="$$GIVEN_LABEL" \
		--jobs="$$GIVEN_JOBS" --gpus="$$GIVEN_GPUS" $$GIVEN_ID

figure: $(STAMP)  ## one figure: ID=kwon2024/05_completion, ARGS='-p seed 1'
	@test -n "$$GIVEN_ID" || { echo "make figure needs ID=paper/name; make list shows them" >&2; exit 2; }
	@$(MAKE) --no-print-directory figures

paper:  ## all figures with the papers' own parameters
	@$(MAKE) --no-print-directory figures PRESET=paper

lint: $(STAMP)  ## ruff, format, imports between the rooms, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# The figures of a test go to a folder of their own, so that the checkout stays as it was.
test: lint tests  ## lint, unit tests, every notebook against its stored outputs

# LEAVE='batch build': without these files of tests; TEST_JOBS: processes.
# In the order of the files: by their numbers of tests, few long ones would come last, beside nothing.
tests: $(STAMP)
	@figures=$$(mktemp -d); trap 'rm -rf "$$figures"' EXIT; \
	$(RUN) COMPRESSIBLE_FIGURES="$$figures/figures" HF_HUB_OFFLINE=1 python -m pytest tests notebooks -q \
		--nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg \
		--nbval-kernel-startup-timeout 180 -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(LEAVE:%=--ignore=tests/test_%.py)

# On a GPU host as it is: PyTorch, Triton and pytest are all that these need, and nothing is set up.
test-gpu:  ## the tests of a GPU, a minute or two: GPU_PYTHON, SLOW=1 (all of them), GPU_JOBS (with pytest-xdist)
	@export PYTHONPATH=lib$${PYTHONPATH:+:$$PYTHONPATH}; \
	spread=$$($(GPU_PYTHON) -c 'import xdist' 2>/dev/null && echo "-n $(GPU_JOBS) --dist worksteal"); \
	$(GPU_PYTHON) -m pytest -q -m "cuda$(if $(SLOW),, and not slow)" --durations=10 $$spread \
		$$(grep -l "mark.cuda" tests/test_*.py)

lab: $(STAMP)  ## JupyterLab on the notebooks
	$(RUN) jupyter lab --notebook-dir notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

site: $(STAMP)  ## static, offline site in build/site/html: gallery, notebooks, claims, reference; executes nothing
	@$(RUN) python -m compressible site

# In calls of WITHIN minutes, each of which goes on where the last one ended: exit status 2 of make says to call again.
everything: $(STAMP)  ## all presets of a release, what is made left alone: PRESETS, JOBS, GPUS, WITHIN (minutes)
	@ended=$$(( $$(date +%s) + 60 * $(WITHIN) )); failed=0; for preset in $(PRESETS); do \
		left=$$(( (ended - $$(date +%s)) / 60 )); [ $$left -gt 0 ] || { echo "time is up: the same command goes on" >&2; exit 75; }; \
		$(RUN) python -m compressible build --preset $$preset --jobs $(JOBS) --gpus $(GPUS) --resume --within $$left $(ID); status=$$?; \
		case $$status in 0) ;; 75|130) exit $$status ;; *) failed=1 ;; esac; done; exit $$failed

verify: $(STAMP)  ## records against code, data, environment, commit and files, with the reasons
	@$(BIN)/python -m compressible environment; $(BIN)/python -m compressible list --check

# The wheel is tried in an empty environment before the files are left: it takes minutes.
release: $(STAMP)  ## source, wheel, site and records with checksums in dist/: ARGS=--draft where records are stale
	@$(PIP) install -q -c constraints.txt -e ".[release]"
	@$(RUN) python -m compressible release $(ARGS)
	@$(BIN)/python tests/installed_wheel.py "$$(ls -t dist/*/*.whl | head -1)"

list: $(STAMP)  ## ids, presets, expected minutes, state
	@$(BIN)/python -m compressible list

claims: $(STAMP)  ## the papers' statements and how they came out
	@$(BIN)/python -m compressible claims

notebooks: $(STAMP)  ## re-execute the committed notebooks in place, with their defaults
	@$(RUN) python -m compressible notebooks $(ID)

nbval: $(STAMP)  ## nbval of all notebooks ROUNDS times in a row: ROUNDS, JOBS, BUSY=1 (beside other work)
	@$(RUN) bash benchmarks/nbval_repeatedly.sh -j $(JOBS) $(if $(BUSY),-b) $(ROUNDS) $(if $(ID),notebooks/$(ID).ipynb)

# In build/lib, which `pip install .` leaves, a module that goes stays, and the next such call installs it again.
clean:  ## remove quick figures, leftovers of failed runs and installations, and tool caches
	rm -rf figures/quick figures/*/failed figures/*/executed figures/*/.staging-* figures/*/.batch .snakemake .pytest_cache \
		.ruff_cache build/lib build/bdist.*
	find lib tests notebooks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## also remove .venv
	rm -rf $(VENV)
