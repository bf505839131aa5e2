# Everything runs from `.venv`, which `make setup` makes from the lock file.
.DEFAULT_GOAL := help
.PHONY: help setup up demo test check format cluster cluster-load cluster-down manifests bench bench-kubernetes lock docs clean
PYTHON ?= python3
BIN := .venv/bin

help:  ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/installed  ## make .venv with everything for users and developers

.venv/installed: requirements.lock pyproject.toml scripts/setup
	@PYTHON=$(PYTHON) scripts/setup
	@touch $@

up: setup  ## run all of CloudAI on this machine, in the foreground
	@exec $(BIN)/cloudai up $(ARGS)

demo: setup  ## start CloudAI, run real tasks, show their logs, stop
	@$(BIN)/python -m scripts.demo

test: setup  ## install what the tests need and run all of them
	@scripts/provision
	@$(BIN)/python -m tests.cluster.binaries
	@$(BIN)/python -m pytest -n 2 $(ARGS)

check: setup  ## format, lint, strict types, import contracts, generated documents
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/python scripts/docs.py --check

format: setup  ## format the code and mend what the linter can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: setup  ## write the generated documents anew
	@$(BIN)/python scripts/docs.py

cluster: setup  ## start a Kubernetes to try things on (the first time it is built, about ten minutes)
	@scripts/provision
	@$(BIN)/python -m tests.cluster up

cluster-load: setup  ## give its real node an image: docker save IMAGE | make cluster-load
	@$(BIN)/python -m tests.cluster load

cluster-down: setup  ## end the Kubernetes that `make cluster` started
	@$(BIN)/python -m tests.cluster down

manifests: setup  ## write manifests/ anew from the chart
	@cp manifests/crds/tasks.yaml charts/cloudai/files/tasks.yaml
	@$(BIN)/python -m tests.kube.manifests

bench: setup  ## measure, side by side in one run
	@$(BIN)/python -m tests.bench $(ARGS)

bench-kubernetes: setup  ## the same on a Kubernetes of its own, against Jobs and bare Pods
	@scripts/provision
	@$(BIN)/python -m tests.cluster.binaries
	@$(BIN)/python -m tests.bench.kubernetes $(ARGS)

lock: setup  ## resolve requirements.lock anew from pyproject.toml
	@$(BIN)/uv pip compile --universal --all-extras --generate-hashes --upgrade \
	  --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" pyproject.toml -o requirements.lock
	@echo hatchling | $(BIN)/uv pip compile --universal --extra kubernetes --extra postgres --extra redis --generate-hashes \
	  -c requirements.lock --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" pyproject.toml - \
	  -o requirements-image.lock

clean:  ## remove what was built
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
