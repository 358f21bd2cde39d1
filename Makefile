# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# At these network sizes a second thread costs more than it brings.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test check results ablations clean

help:
	@echo "make demo    install, then build the dataset, pretrain, fine-tune twice, and compare"
	@echo "make test    install, then run the fast test suite"
	@echo "make check   formatting, lint and types as well as the fast tests"
	@echo "make setup   only install, into $(VENV), with the versions of constraints.txt"
	@echo "make results the results section of the README (half an hour)"
	@echo "make ablations  two questions to those results (a quarter of an hour)"
	@echo "make clean   remove $(VENV), build products and caches; runs/ stays"
	@echo "Another interpreter: make setup PYTHON=python3.12"

setup: $(INSTALLED)

# The stamp makes this run once, and again after a change of what is to be installed.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Python 3.11 or newer is needed, for example: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup
	$(BIN)/safe-offrl demo

test: setup
	$(BIN)/python -m pytest -m "not slow"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

# The results section of the README: 5 paired seeds, about half an hour on 2 cores. Runs go to
# runs/results (remove it first), table and chart to docs/results.
SEEDS ?= 0 1 2 3 4
RESULTS := runs/results
OFF := --no-kl --no-accident-constraint --no-shield
RUN := $(BIN)/safe-offrl

results: setup
	@mkdir -p docs/results
	@$(RUN) collect
	printf '%s\n' $(SEEDS) | xargs -P 2 -I{} sh -ec '\
		$(RUN) pretrain --seed {} --runs $(RESULTS) --name pretrained-{}; \
		$(RUN) evaluate pretrained-{} --episodes 1000 --runs $(RESULTS)'
	printf '%s\n' $(SEEDS) | xargs -P 2 -I{} sh -ec '\
		$(RUN) finetune pretrained-{} --budget 50k --seed {} --runs $(RESULTS) --name constrained-{}; \
		$(RUN) evaluate constrained-{} --episodes 500 --runs $(RESULTS); \
		$(RUN) finetune pretrained-{} --budget 50k --seed {} $(OFF) --runs $(RESULTS) --name rlpd-{}; \
		$(RUN) evaluate rlpd-{} --episodes 500 --runs $(RESULTS)'
	$(RUN) compare $(RESULTS)/* --png docs/results/point_hazard.png > docs/results/point_hazard.txt
	@cat docs/results/point_hazard.txt

# Two questions to the results (after `make results`): the other agents' pretrained policies, and how
# much of the difference is the narrower exploration alone. Runs go to runs/ablations.
ABLATIONS := runs/ablations

ablations: setup
	printf '%s\n' cql calql | xargs -P 2 -I{} sh -ec '\
		$(RUN) pretrain --agent {} --runs $(ABLATIONS) --name pretrained-{}; \
		$(RUN) evaluate pretrained-{} --episodes 1000 --runs $(ABLATIONS)'
	printf '%s\n' $(SEEDS) | xargs -P 2 -I{} sh -ec '\
		$(RUN) finetune $(RESULTS)/pretrained-{} --budget 50k --seed {} $(OFF) \
			learner.target_entropy=-1 --runs $(ABLATIONS) --name rlpd-narrow-{}; \
		$(RUN) evaluate rlpd-narrow-{} --episodes 500 --runs $(ABLATIONS)'
	$(RUN) compare $(RESULTS)/pretrained-0 $(ABLATIONS)/pretrained-* > docs/results/agents.txt
	$(RUN) compare $(RESULTS)/rlpd-* $(ABLATIONS)/rlpd-narrow-* \
		--group-by learner.target_entropy > docs/results/exploration.txt
	@cat docs/results/agents.txt docs/results/exploration.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
