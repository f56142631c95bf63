# One command each; every target sets up what it needs. Nothing is installed twice: .venv/.ready records the requirements.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.PHONY: setup demo test check unit bench chaos e2e-cluster lock clean

setup: .venv/.ready

.venv/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "Unfreeze needs Python 3.11: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(BIN)/uv || { echo "Setting up .venv (once) ..."; $(PYTHON) -m venv .venv && $(BIN)/pip install -q uv; }
	@# compiled once here, in half a minute: a command starts a dozen processes, each of which would compile its imports where Python may not write them
	@$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -r requirements.txt
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	@touch $@

demo: setup
	@$(BIN)/unfreeze demo

test: setup
	@scripts/install-test-tools
	$(BIN)/pytest -m "not slow and not exhaustive"
	@# a process each: Ray keeps one cluster's settings for as long as a process lives
	@for suite in tests/contract/test_ray_work.py tests/integration/test_*.py tests/slow/test_*.py; do echo "$$suite"; $(BIN)/pytest $$suite || exit 1; done

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -m "not slow and not exhaustive"

bench: setup
	@$(BIN)/python benchmarks/everything.py $(ARGS)

chaos: setup
	@scripts/install-test-tools
	@$(BIN)/python -W ignore benchmarks/chaos.py $(ARGS)

e2e-cluster: setup
	@scripts/install-test-tools iproute2
	@$(BIN)/python -m tests.e2e.own_world $(BIN)/pytest tests/e2e/test_cluster.py $(ARGS)

lock: setup
	$(BIN)/uv pip compile -q --no-header --no-annotate --no-emit-index-url --no-emit-find-links --extra dev --python-version 3.11 pyproject.toml -o requirements.txt

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
