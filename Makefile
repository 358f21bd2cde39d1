# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# At these network sizes a second thread costs more than it brings.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test test-slow check results ablations precision safety-gym bench bench-data \
	bench-assess bench-record clean

help:
	@echo "make demo    install, then build the dataset, pretrain, fine-tune twice, and compare"
	@echo "make test    install, then run the fast test suite"
	@echo "make test-slow  what is promised, with a hundred kills and the like, as a table"
	@echo "make check   formatting, lint and types as well as the fast tests"
	@echo "make setup   only install, into $(VENV), with the versions of constraints.txt"
	@echo "make results the results section of the README: a suite of methods, ten seeds (hours)"
	@echo "make ablations  two questions to those results (a quarter of an hour)"
	@echo "make precision  does bfloat16 learn as well? five paired seeds (a quarter of an hour)"
	@echo "make safety-gym  data and results on two tasks of Safety-Gymnasium (an hour and a quarter)"
	@echo "make bench   updates a second beside four others (forty minutes, 3 GB of disk)"
	@echo "make bench-data  ten million transitions: conversion, and random batches (4 GB of disk)"
	@echo "make bench-assess  do the intervals of assess hold the truth? (an hour)"
	@echo "make bench-record  the share of a run that ledger and checkpoints take (a quarter of an hour)"
	@echo "make clean   remove $(VENV), build products and caches; runs/ stays"
	@echo "Another interpreter: make setup PYTHON=python3.12"

setup: $(INSTALLED)

# The stamp makes this run once, and again after a change of what is to be installed.
# Safety-Gymnasium's own pins, of 2023, cannot be met: pip check names them, and they do not matter.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Python 3.11 or newer is needed, for example: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev,safety-gym]"
	$(BIN)/python -m pip install --no-deps safety-gymnasium==1.0.0
	@touch $@

demo: setup
	$(BIN)/safe-offrl demo

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m "slow or promise"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

# The results section of the README: every method of the suite, ten paired seeds, hours on 2 cores.
# The same command goes on after anything; METHODS and SEEDS narrow it. Runs go to
# runs/benchmark-point, tables, chart and page to docs/results.
RUN := $(BIN)/safe-offrl
RESULTS := runs/benchmark-point/PointHazard-v0
METHODS ?=
SEEDS ?= 0,1,2,3,4,5,6,7,8,9
FIVE := 0 1 2 3 4
OFF := --no-kl --no-safety-constraint --no-shield

results: setup
	@mkdir -p docs/results
	$(RUN) benchmark --suite point --seeds $(SEEDS) $(if $(METHODS),--methods $(METHODS))
	cp $(RESULTS).* docs/results

# Two questions to the results (after `make results`): the other agents' pretrained policies, and how
# much of the difference is the narrower exploration alone. Runs go to runs/ablations.
ABLATIONS := runs/ablations

ablations: setup
	printf '%s\n' cql calql | xargs -P 2 -I{} sh -ec '\
		$(RUN) pretrain --agent {} --runs $(ABLATIONS) --name pretrained-{}; \
		$(RUN) evaluate pretrained-{} --episodes 1000 --runs $(ABLATIONS)'
	printf '%s\n' $(FIVE) | xargs -P 2 -I{} sh -ec '\
		$(RUN) finetune $(RESULTS)/pretrained-ours/{} --budget 50k --seed {} $(OFF) \
			learner.target_entropy=-1 --runs $(ABLATIONS) --name rlpd-narrow-{}; \
		$(RUN) evaluate rlpd-narrow-{} --episodes 500 --runs $(ABLATIONS)'
	$(RUN) compare $(RESULTS)/pretrained-ours/0 $(ABLATIONS)/pretrained-* > docs/results/agents.txt
	$(RUN) compare $(FIVE:%=$(RESULTS)/rlpd/%) $(ABLATIONS)/rlpd-narrow-* \
		--group-by learner.target_entropy > docs/results/exploration.txt
	@cat docs/results/agents.txt docs/results/exploration.txt

# What products in bfloat16 do to the results (after `make results`): the same seeds once more.
PRECISION := runs/precision

precision: setup
	printf '%s\n' $(FIVE) | xargs -P 2 -I{} sh -ec '\
		$(RUN) pretrain --seed {} precision=bf16 --runs $(PRECISION) --name pretrained-{}; \
		$(RUN) evaluate pretrained-{} --episodes 1000 --runs $(PRECISION); \
		$(RUN) finetune pretrained-{} precision=bf16 --budget 50k --accept-risk --seed {} \
			--runs $(PRECISION) --name constrained-{}; \
		$(RUN) evaluate constrained-{} --episodes 500 --runs $(PRECISION)'
	( $(RUN) compare $(FIVE:%=$(RESULTS)/pretrained-ours/%) $(PRECISION)/pretrained-* --group-by precision; \
		$(RUN) compare $(FIVE:%=$(RESULTS)/ours/%) $(PRECISION)/constrained-* --group-by precision \
	) > docs/results/precision.txt
	@cat docs/results/precision.txt

# Two tasks of Safety-Gymnasium from nothing: data, 3 paired seeds, constrained and RLPD. Runs and
# data go to runs/safety-gym (remove it first), tables and charts to docs/results.
TASKS := SafetyPointGoal1-v0 SafetyPointCircle1-v0
TASK_SEEDS ?= 0 1 2
TASK_RUNS := runs/safety-gym

safety-gym: setup
	@mkdir -p docs/results $(TASK_RUNS)
	set -e; for task in $(TASKS); do \
		$(RUN) collect --env $$task --out $(TASK_RUNS)/$$task.hdf5; \
		$(RUN) inspect $(TASK_RUNS)/$$task.hdf5 --png docs/results/$$task-data.png \
			> docs/results/$$task-data.txt; \
	done
	for seed in $(TASK_SEEDS); do for task in $(TASKS); do echo $$task $$seed; done; done \
		| xargs -P 2 -L 1 sh -ec ' \
		runs=$(TASK_RUNS)/$$0; \
		$(RUN) pretrain --env $$0 --dataset $(TASK_RUNS)/$$0.hdf5 --seed $$1 \
			--runs $$runs --name pretrained-$$1; \
		$(RUN) evaluate pretrained-$$1 --episodes 50 --runs $$runs; \
		$(RUN) finetune pretrained-$$1 --budget 50k --accept-risk --seed $$1 --runs $$runs --name constrained-$$1; \
		$(RUN) evaluate constrained-$$1 --episodes 50 --runs $$runs; \
		$(RUN) finetune pretrained-$$1 --budget 50k --seed $$1 $(OFF) --runs $$runs --name rlpd-$$1; \
		$(RUN) evaluate rlpd-$$1 --episodes 50 --runs $$runs'
	set -e; for task in $(TASKS); do \
		$(RUN) compare $(TASK_RUNS)/$$task/* --png docs/results/$$task.png \
			> docs/results/$$task.txt; \
		cat docs/results/$$task.txt; \
	done

bench-data: setup
	$(BIN)/python benchmarks/large_dataset.py

# Coverage on an environment whose accident probability is known.
bench-assess: setup
	$(BIN)/python benchmarks/assess_coverage.py > docs/results/assess.txt
	@cat docs/results/assess.txt

# What the record costs, in a run of 50k steps; on the disk that the runs folder is on.
bench-record: setup
	$(BIN)/python benchmarks/record_keeping.py --folder runs > docs/results/record_keeping.txt
	@cat docs/results/record_keeping.txt

# Peers in environments of their own: their pins are not ours. d3rlpy's exclude our Gymnasium.
PEERS := .venv-peers
D3RLPY := .venv-d3rlpy

bench:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install torch==2.13.0
	$(PEERS)/bin/python -m pip install -c constraints.txt -e ".[bench]"
	$(PYTHON) -m venv $(D3RLPY)
	$(D3RLPY)/bin/python -m pip install torch==2.13.0
	$(D3RLPY)/bin/python -m pip install d3rlpy==2.8.1
	$(PEERS)/bin/python benchmarks/speed/bench.py --d3rlpy $(D3RLPY)/bin/python
	$(PEERS)/bin/python benchmarks/speed/loop.py
	$(PEERS)/bin/python benchmarks/speed/growth.py

clean:
	rm -rf $(VENV) $(PEERS) $(D3RLPY) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
