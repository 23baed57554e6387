# `make demo` runs the demo job, `make test` runs all tests. Both install what they need into .venv
# and start a private RabbitMQ. The first installation takes a minute or two, mostly for downloads.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Show progress on a terminal, and only errors elsewhere.
PIP_FLAGS := --disable-pip-version-check $(shell test -t 2 || echo --quiet)

# Without the cache of compiled modules, each of the many processes would compile all of them again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-fast test-long coverage check browser bench bench-flower chaos format lock clean

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fluffle needs Python 3.11 or newer: make install PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	@echo "installing the $$(grep -c == requirements.lock) packages of requirements.lock" \
		"into .venv; the first time takes one or two minutes ..."
	@$(BIN)/python -m pip install $(PIP_FLAGS) -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation --editable .
	@touch $(STAMP)
	@echo "installed; from now on, 'make demo' and 'make test' start at once"

demo: install
	$(BIN)/python examples/demo.py

# Tests mostly wait for a broker or a process, so run several at once. All jobs share a RabbitMQ.
JOBS ?= 4

# The slowest tests come first, in the order of `testpaths`, so that no job is left alone with them.
test: install check browser
	$(BIN)/python -m pytest -m "not long" --numprocesses $(JOBS) --dist worksteal $(ARGS)

# The fast tests: the pure core and federations in one process, without a broker, JAX or a terminal,
# and with fewer examples of each property.
SLOW := $(addprefix unit/,attacked_training cli demo doctests drawing flax_parts flax_task \
	front_door history_chart letters letters_images letters_scores local_rules mutants node \
	printing private rabbitmq_connection results rounds_machine run_store sentences \
	server_steps sklearn_task statistics strategy_names task_arguments task_loading torch_task) \
	$(addprefix federation/,adapters local references statistics torch user_files)
FAST := $(filter-out $(foreach name,$(SLOW),tests/$(dir $(name))test_$(notdir $(name)).py),\
	$(wildcard tests/unit/test_*.py tests/federation/test_*.py))

test-fast: export HYPOTHESIS_PROFILE ?= fast
# These never wait, so one for each CPU.
test-fast: JOBS = logical
test-fast: install
	$(BIN)/python -m pytest -q --numprocesses $(JOBS) --dist worksteal $(FAST) $(ARGS)

# Branch coverage of the pure core, with the lines that no test reaches.
PURE := fluffle_coordinator.machine fluffle_coordinator.strategy fluffle_common.tensors \
	fluffle_common.protocol

coverage: install
	$(BIN)/python -m pytest -q --numprocesses $(JOBS) $(FAST) \
		$(addprefix tests/unit/test_,private.py server_steps.py statistics.py strategy_names.py) --cov-branch \
		$(PURE:%=--cov=%) --cov-report=term-missing:skip-covered --cov-fail-under=97 $(ARGS)

# Before a release: all tests, with the long times of the faults, coverage, and a hundred random
# faults.
test-long: export FULL = 1
test-long: test coverage chaos
	$(BIN)/python -m pytest -m long $(ARGS)

# The tests of the live page need Chromium; install it if it is missing and we have the rights.
browser:
	@sh tests/install_chromium.sh

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

FAULTS ?= 100
SEED ?= 7

chaos: install
	$(BIN)/python -m tests.faults.chaos --faults $(FAULTS) --seed $(SEED)

bench: install
	$(BIN)/python -m benchmarks $(ARGS)

# The comparison with Flower uses its published package, in a separate environment that also has the
# libraries of fluffle's tasks. No test uses it.
FLOWER := .venv-flower
FLOWER_STAMP := $(FLOWER)/.installed

$(FLOWER_STAMP): requirements.lock Makefile
	@echo "installing Flower into $(FLOWER); this takes one or two minutes ..."
	@test -x $(FLOWER)/bin/python || $(PYTHON) -m venv $(FLOWER)
	@$(FLOWER)/bin/python -m pip install $(PIP_FLAGS) 'flwr[simulation]==1.42.0' \
		$(shell grep -E '^(blake3|flax|jax|jaxlib|msgpack|numpy|optax|pillow|pydantic|safetensors)==' \
		requirements.lock)
	@touch $(FLOWER_STAMP)

bench-flower: install $(FLOWER_STAMP)
	$(BIN)/python -m benchmarks.flower --size-mb 0.1,1.36,10,100 --clients 3 $(ARGS)
	$(BIN)/python -m benchmarks.flower --size-mb 1.36 --clients 10,30 $(ARGS)
	$(BIN)/python -m benchmarks.flower --letters $(ARGS)
	$(BIN)/python -m benchmarks.flower --simulation $(ARGS)

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Pin the newest versions on the configured package index. The index is not named in the file.
lock: install
	@echo "asking the package index for the newest versions; this takes about a minute ..."
	@$(BIN)/python -m pip install --quiet --dry-run --upgrade --ignore-installed \
		--report .venv/lock.json '.[all]' --group dev hatchling editables
	$(BIN)/python -c "import json; \
		packages = [each['metadata'] for each in json.load(open('.venv/lock.json'))['install']]; \
		pins = sorted({f\"{p['name'].lower()}=={p['version']}\" for p in packages}); \
		print('# Exact versions of everything that fluffle, its tests and its build need; made by \`make lock\`.'); \
		print('\n'.join(p for p in pins if not p.startswith('fluffle==')))" > requirements.lock

clean:
	-test -x $(BIN)/fluffle && $(BIN)/fluffle broker down
	rm -rf .venv .fluffle build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
