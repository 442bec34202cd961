# clerk-sync, for those who work on it. `make` lists the verbs; each sets up what it needs.

BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help install run demo test check fmt chart k8s bench lock clean

help: ## List these verbs
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

install: $(READY) ## Set up .venv with everything, from the lock files

run: install ## Start the service on an SQLite database, with a development secret
	@exec $(BIN)/python -m tests.run_local

demo: install ## Show a user's whole story: created, updated, late, deleted
	@$(BIN)/python -m tests.demo

test: check ## Check, get the test databases, run every test (ARGS="-k name" for some)
	$(BIN)/python -m tests.provision
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile $(ARGS)

check: install ## Format, lint, types, layers and YAML, without changing anything
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/yamllint --strict .
	$(if $(wildcard Dockerfile),$(BIN)/hadolint Dockerfile)
	$(if $(wildcard .github/workflows),$(BIN)/actionlint)

fmt: install ## Format, and fix what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

chart: install ## Rewrite what follows from the chart: its schema, README tables, golden manifests
	$(BIN)/python -m tests.chart.generate

k8s: install ## Rewrite what k8s/, for Kustomize, has of the chart
	$(BIN)/python -m tests.k8s.generate

bench: install ## Measure events and walks beside the baselines (ARGS="--help")
	$(BIN)/python -m tests.bench $(ARGS)

LOCK := $(BIN)/uv pip compile pyproject.toml --quiet --upgrade --universal \
  --python-version 3.11 --generate-hashes --no-header

lock: install ## Rewrite the lock files with the newest versions that pyproject.toml allows
	$(LOCK) --output-file requirements.lock
	$(LOCK) --group dev --constraint requirements.lock --output-file requirements-dev.lock

clean: ## Remove everything that the other verbs made here
	rm -rf .venv .dev .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find service tests -name __pycache__ -prune -exec rm -rf {} +

$(READY): pyproject.toml requirements-dev.lock tests/venv.sh
	@sh tests/venv.sh .venv
	$(PIP) install --require-hashes --requirement requirements-dev.lock
	$(PIP) install --no-deps --editable .
	@touch $@
