# For developers of clerk-sync. `make` lists the targets; each sets up what it needs.

BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help install run demo test check fmt docs generate chart k8s image test-image cluster test-cluster test-evening bench lock release clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

install: $(READY) ## Create .venv from the lock files

run: install ## Start the service on an SQLite database, with a development secret
	@exec $(BIN)/python -m tools.run

demo: install ## Demonstrate a user's life: created, updated, a late event, deleted
	@$(BIN)/python -m tools.demo

test: check ## Run `check`, then every test, with the test databases (ARGS="-k name" for some)
	$(BIN)/python -m tools.provision
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile $(ARGS)

check: install ## Check format, lint, types, layers and YAML, without changing anything
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/yamllint --strict .
	$(BIN)/hadolint Dockerfile
	$(BIN)/actionlint
	$(BIN)/zizmor --offline --quiet --persona pedantic .github

fmt: install ## Format the code, and apply the linter's fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install ## Build the site in docs/_build, with warnings as errors
	$(BIN)/sphinx-build --builder dirhtml --fail-on-warning --keep-going --quiet docs docs/_build

generate: install ## Regenerate the reference pages, the alert rules and the dashboard
	$(BIN)/python -m monitoring
	$(BIN)/python -m tools.metrics_reference
	$(BIN)/python -m tools.cli_reference
	$(BIN)/python -m tools.sql_reference

chart: install ## Regenerate the chart's schema, README tables and golden manifests
	$(BIN)/python -m tests.chart.generate

k8s: install ## Regenerate the parts of k8s/ that come from the chart
	$(BIN)/python -m tests.k8s.generate

VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' service/clerk_sync/__init__.py)
IMAGE = clerk-sync:$(VERSION)
RUNNING = for name in docker podman buildah; do $$name info >/dev/null 2>&1 && echo $$name && break; done
ENGINE = $(eval ENGINE := $$(shell $$(RUNNING)))$(ENGINE)
# Times are the commit's, not the clock's: what is built from it again is the same.
COMMIT = $(shell TZ=UTC git log -1 --date=iso-strict-local --format='$(1)' 2>/dev/null)
EPOCH = $(or $(call COMMIT,%ct),$(shell date +%s))
STAMP = $(if $(filter docker,$(ENGINE)),--build-arg SOURCE_DATE_EPOCH=$(EPOCH),--timestamp $(EPOCH))

image: ## Build the container image clerk-sync:VERSION (IMAGE=name, ENGINE=podman, ARGS="--no-cache")
	@test -n "$(ENGINE)" || { echo "Neither Docker nor podman nor buildah runs here: start one." >&2; exit 1; }
	$(ENGINE) build --tag $(IMAGE) $(STAMP) --build-arg VERSION=$(VERSION) \
	  --build-arg REVISION=$(call COMMIT,%H) --build-arg CREATED=$(call COMMIT,%cd) $(ARGS) .

test-image: install ## Build the image, and run it as a cluster would (TEST_IMAGE=name to test another)
	$(BIN)/python -m tools.provision
	$(BIN)/python -m pytest tests/image $(ARGS)

test-evening: install ## Make every alert fire on a running service, in about seven minutes
	$(BIN)/python -m tools.provision
	$(BIN)/python -m pytest --numprocesses 0 --capture no tests/monitoring/evening.py

cluster: install ## Run a Kubernetes control plane until Ctrl-C (built once from Go modules)
	@exec $(BIN)/python -m tests.cluster.control_plane

test-cluster: install ## Test the chart on the cluster in KUBECONFIG (ARGS="-k name" for some)
	$(BIN)/python -m tools.provision
	$(BIN)/python -m pytest tests/cluster --numprocesses 2 --dist loadfile --timeout 600 $(ARGS)

bench: install ## Benchmark events, backfill and reconcile against the baselines (ARGS="--help")
	$(BIN)/python -m bench $(ARGS)

LOCK := $(BIN)/uv pip compile pyproject.toml --extra otel --quiet --upgrade --universal \
  --python-version 3.11 --generate-hashes --no-header

lock: install ## Update the lock files to the newest versions that pyproject.toml allows
	$(LOCK) --output-file requirements.lock
	$(LOCK) --group dev --constraint requirements.lock --output-file requirements-dev.lock

release: install ## Set VERSION=x.y.z everywhere, and date the changelog
	$(BIN)/python -m tools.release $(VERSION)

clean: ## Remove everything that the other targets created here
	rm -rf .venv .dev docs/_build .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find service tests tools monitoring bench -name __pycache__ -prune -exec rm -rf {} +

$(READY): pyproject.toml requirements-dev.lock tools/venv.sh
	@sh tools/venv.sh .venv
	@echo "Installing what requirements-dev.lock lists, once: some minutes, 600 MiB in .venv."
	$(PIP) install --require-hashes --requirement requirements-dev.lock
	$(PIP) install --no-deps --editable .
	@touch $@
