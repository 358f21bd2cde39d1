# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# At these network sizes a second thread costs more than it brings.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test test-slow check results records certificates ablations agents \
	agents-discrete guard margin precision two-limits \
	bench bench-data bench-assess bench-record peers clean

help:
	@echo "make demo    install, then build the dataset, pretrain, fine-tune twice, and compare"
	@echo "make test    install, then run the fast test suite"
	@echo "make test-slow  what is promised, with a hundred kills and the like, as a table"
	@echo "make check   formatting, lint and types as well as the fast tests"
	@echo "make setup   only install, into $(VENV), with the versions of constraints.txt"
	@echo "make results the results of the README: a suite of methods (hours); SUITE=point or SUITE=safety"
	@echo "make ablations, agents, agents-discrete, guard, margin, precision or two-limits  the suites of a further question each (hours)"
	@echo "make records keep what is finished of a suite under docs/results/records"
	@echo "make certificates  certify the final policies of those results (a minute)"
	@echo "make bench   updates a second beside four others (forty minutes, 3 GB of disk)"
	@echo "make peers   our learners beside d3rlpy's: returns, and updates a second (two hours)"
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

# The results of the README: every method of a suite, paired seeds, hours on 2 cores. The same command
# goes on after anything; METHODS and SEEDS narrow it. Runs go to runs/benchmark-SUITE; tables, charts
# and pages go to docs/results, those of a further question to docs/results/SUITE. `make records` keeps
# what is finished, a seed an archive: settings, ledger, decisions and evaluation of every run (settings
# name no path outside of the runs). `make results` begins with what the archives hold, so that it goes
# on on another machine.
SUITE ?= point
METHODS ?=
SEEDS ?=
WORKERS ?= 2
SUITE_RUNS := runs/benchmark-$(SUITE)
PAGES := docs/results$(if $(filter-out point safety,$(SUITE)),/$(SUITE))
RECORDS := docs/results/records
RECORD_FILES := run.json config.yaml versions.json ledger.jsonl iterations.jsonl evaluation.json \
	replay.json
RUN := $(BIN)/safe-offrl

results: setup
	@mkdir -p $(SUITE_RUNS)
	for archive in $(wildcard $(RECORDS)/$(SUITE)-seed-*.tar.xz); do \
		tar -xJf $$archive -C $(SUITE_RUNS) --skip-old-files; done
	$(RUN) benchmark --suite $(SUITE) --workers $(WORKERS) \
		$(if $(SEEDS),--seeds $(SEEDS)) $(if $(METHODS),--methods $(METHODS))
	@mkdir -p $(PAGES)
	for page in $(SUITE_RUNS)/*.html; do cp $${page%.html}.* $(PAGES); done

# Further questions: what narrower exploration and the other agents do, the guard, a margin, bfloat16.
ablations agents agents-discrete guard margin precision two-limits:
	$(MAKE) results SUITE=$@

# Of runs that have ended and been evaluated, but for pretrained policies, which weigh a hundredfold.
records:
	@mkdir -p $(RECORDS)
	cd $(SUITE_RUNS) && for seed in $$(ls -d */*/[0-9]* | xargs -n 1 basename | sort -u); do \
		for run in $$(grep -l '"status": "finished"' */*/$$seed/run.json | grep -v /pretrained-); do \
			run=$${run%/run.json}; \
			if [ -f $$run/evaluation.json ]; then ls $(RECORD_FILES:%=$$run/%) 2>/dev/null; fi; \
		done | tar -cJf $(abspath $(RECORDS))/$(SUITE)-seed-$$seed.tar.xz --mtime=@0 \
			--owner=0 --group=0 --numeric-owner -T -; \
	done

# What can be proved of ours (after `make results` has run it here: the records hold no policy). Each final
# policy is played once until "below 5 %" is shown or refuted; who has a certificate keeps it.
CERTIFIED := runs/benchmark-point/PointHazard-v0

certificates: setup
	for run in $(CERTIFIED)/ours/[0-9]*; do \
		[ -d $$run/certificates ] || $(RUN) certify $$run --epsilon 0.05 >&2 || [ $$? = 3 ] || exit 1; \
		echo "$${run#$(CERTIFIED)/}: $$($(RUN) verify $$run/certificates/1/certificate.json | tail -n 1)"; \
	done > docs/results/certificates.txt
	@cat docs/results/certificates.txt

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

bench: $(D3RLPY)/.installed
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install torch==2.13.0
	$(PEERS)/bin/python -m pip install -c constraints.txt -e ".[bench]"
	$(PEERS)/bin/python benchmarks/speed/bench.py --d3rlpy $(D3RLPY)/bin/python
	$(PEERS)/bin/python benchmarks/speed/loop.py
	$(PEERS)/bin/python benchmarks/speed/growth.py

$(D3RLPY)/.installed:
	$(PYTHON) -m venv $(D3RLPY)
	$(D3RLPY)/bin/python -m pip install torch==2.13.0
	$(D3RLPY)/bin/python -m pip install d3rlpy==2.8.1
	@touch $@

# Is what we learn as good as d3rlpy's? The same command goes on after anything; narrow it with
# PEERS_ARGS="--algorithms iql cql --seeds 0 --steps 1000 --out runs/peers".
PEERS_ARGS ?=

peers: setup $(D3RLPY)/.installed
	$(BIN)/python -m benchmarks.peers.compare --d3rlpy $(D3RLPY)/bin/python $(PEERS_ARGS)

clean:
	rm -rf $(VENV) $(PEERS) $(D3RLPY) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
