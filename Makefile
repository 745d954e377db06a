# Headrace's targets. `make help` lists them; W names a workload of conf/, ARGS is passed to the job.
W ?= digits
ARGS ?=
FORMAT ?= text
PORT ?= 5000
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.setup-$(shell cat constraints.txt pyproject.toml | sha256sum | cut -c1-16)
STAGES := ingest features mine tune classic train evaluate register score
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYSPARK_PYTHON ?= $(CURDIR)/$(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help doctor setup demo run plan watch profile layout audit $(STAGES) leaderboard rollback clean ui test test-faults test-faults-strategies check check-fast format docs bench bench-loader bench-features bench-assignment bench-comm bench-auto simulate

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z$$()A-Z -]+:.*## / {sub(/\$$\(STAGES\)/, "<stage>", $$1); printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  stages: $(STAGES)"
	@echo "  workloads: $(notdir $(basename $(wildcard conf/*.yaml)))   (W=$(W))"

doctor:  ## Check Python, Java, memory, disk, ports and versions
	@$(PYTHON) jobs/doctor.py

setup: $(STAMP)  ## Virtual environment, pinned packages, Delta jars; once
$(STAMP):
	@$(PYTHON) jobs/doctor.py --quiet
	@$(PYTHON) jobs/setup.py $(STAMP)

demo: $(STAMP)  ## The whole chain on 1,797 real digits, from set-up to champion
	@$(PYTHON) jobs/doctor.py --quiet
	@$(BIN)/python jobs/demo.py conf/digits.yaml $(ARGS)

run: $(STAMP)  ## Every stage that the workload declares; what is up to date is skipped
	@$(BIN)/python jobs/run.py conf/$(W).yaml $(ARGS)

plan: $(STAMP)  ## What the training would do: rows, memory, time, and what stands in its way (FORMAT=json)
	@$(BIN)/python jobs/plan.py conf/$(W).yaml --format $(FORMAT) $(ARGS)

watch: $(STAMP)  ## A training under way, live: each rank's place, pace and memory, and who is in trouble (RUN=id, ARGS=--once)
	@$(BIN)/python jobs/watch.py conf/$(W).yaml $(if $(RUN),--run $(RUN)) --format $(FORMAT) $(ARGS)

audit: $(STAMP)  ## What trained a run (RUN=id), or which models saw a row (ROW=key)
	@$(BIN)/python jobs/audit.py conf/$(W).yaml $(if $(RUN),--run $(RUN)) $(if $(ROW),--row "$(ROW)") $(ARGS)

profile: $(STAMP)  ## What Spark did in the last run: stages, shuffles, spills, skew (FORMAT=json)
	@$(BIN)/python jobs/spark_profile.py conf/$(W).yaml --format $(FORMAT) $(ARGS)

layout: $(STAMP)  ## Rewrite any Delta table so that it streams (ARGS="SOURCE TARGET")
	@$(BIN)/python jobs/layout.py conf/$(W).yaml $(ARGS)

$(STAGES): $(STAMP)  ## One stage of the workload
	@$(BIN)/python jobs/$@.py conf/$(W).yaml $(ARGS)

leaderboard: $(STAMP)  ## The candidates of the last evaluation (FORMAT=json)
	@$(BIN)/python jobs/leaderboard.py conf/$(W).yaml --format $(FORMAT) $(ARGS)

rollback: $(STAMP)  ## Move the champion back to the version before (ARGS="--to 2")
	@$(BIN)/python jobs/rollback.py conf/$(W).yaml $(ARGS)

clean: $(STAMP)  ## Remove the workload's tables, receipts, checkpoints, saved models and event logs
	@$(BIN)/python jobs/clean.py conf/$(W).yaml $(ARGS)

ui: $(STAMP)  ## MLflow's pages on 127.0.0.1 (PORT=5000)
	@$(BIN)/python jobs/ui.py --port $(PORT)

test: $(STAMP)  ## The tests
	@$(PYTHON) jobs/doctor.py --quiet
	@$(BIN)/python -m pytest $(ARGS)

test-faults: $(STAMP)  ## Ctrl-C and kill -9 in every stage, of ranks and inside a checkpoint, at random moments
	@$(BIN)/python -m pytest -m faults $(ARGS)

test-faults-strategies: $(STAMP)  ## kill -9 of any process of any strategy, twenty times each, at random moments
	@$(BIN)/python -m pytest -m faults_strategies -rA $(ARGS)

check: check-fast  ## Format, lint, types, import layers, generated files
	@$(BIN)/mypy

check-fast: $(STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports
	@$(BIN)/python -m pipelines.config.reference --check

format: $(STAMP)  ## Write the code in its format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: $(STAMP)  ## Write conf/schema.json and docs/config.md from the config models
	@$(BIN)/python -m pipelines.config.reference

bench: $(STAMP)  ## Speed and memory, as ratios; tables in build/bench
	@$(BIN)/python -m benchmarks.all $(ARGS)

bench-loader: $(STAMP)  ## Loaders side by side, and what the lanes promise
	@$(BIN)/python -m benchmarks.loader $(ARGS)

bench-features: $(STAMP)  ## The features stage against its peers, and as rows grow (ARGS="--rows 20000")
	@$(BIN)/python -m benchmarks.features $(ARGS)

bench-assignment: $(STAMP)  ## The exact solver: seconds, gaps, and the greedy rules beside it
	@$(BIN)/python -m benchmarks.assignment

bench-comm: $(STAMP)  ## Strategies and hooks on links of 1 Gbit/s, 100 and 20 Mbit/s, and the cost model's error; as root
	@$(BIN)/python -m benchmarks.comm $(ARGS)

bench-auto: $(STAMP)  ## What train.strategy: auto takes on these links, beside the best; as root
	@$(BIN)/python -m benchmarks.auto

simulate: $(STAMP)  ## What each strategy would do on 2 to 1,024 nodes, by the cost model that bench-comm fitted (ARGS=--help)
	@$(BIN)/python -m pipelines.train.simulate $(ARGS)
