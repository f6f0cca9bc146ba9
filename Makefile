# make serve: the demo model on 127.0.0.1:8080. make test: the tests. Both make .venv first if need be.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
ARGS ?=
SECONDS ?= 600
SEED ?= 0
WORKERS ?= 2

# MLX's CPU wheel on Linux is slow without OpenBLAS; elsewhere this is empty.
PRELOAD = env $$($(PY) -c 'from penstock.platform import engine_environment as e; print(*(f"{k}={v}" for k, v in e({}).items() if "MALLOC" not in k))')

.PHONY: serve test test-clients test-clients-slow test-dashboard test-chaos test-metal test-storm test-conformance fuzz venv install lint format bench demo-model docs lock

serve: venv
	@exec $(VENV)/bin/penstock serve --demo $(ARGS)

test: venv
	@$(PRELOAD) $(PY) -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

test-clients: venv
	@$(PRELOAD) $(PY) -m pytest -m clients $(ARGS)

test-clients-slow: venv
	@$(PRELOAD) $(PY) -m pytest -m clients_slow $(ARGS)

test-dashboard: venv
	@$(PY) -m pytest -m browser $(ARGS)

test-storm: venv
	@$(PRELOAD) $(PY) -m pytest -m storm -s $(ARGS)

test-conformance: venv
	@$(PRELOAD) $(PY) -m pytest -m conformance $(ARGS)

fuzz: venv
	@$(PRELOAD) nice $(PY) -m tests.fuzz --seconds $(SECONDS) --seed $(SEED) $(ARGS)

test-chaos: venv
	@$(PRELOAD) $(PY) -m pytest -m chaos -s $(ARGS)

test-metal:
	@if [ "$$(uname -s)" = Darwin ]; then $(MAKE) venv && $(PY) -m pytest -m metal $(ARGS); \
	else echo "make test-metal runs on a Mac: these tests need Apple's GPU."; fi

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements.lock requirements-cpu.lock requirements-cuda13.lock .ci/venv
	@PYTHON=$(PYTHON) .ci/venv $(VENV)

install:
	@.ci/install

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: venv
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: venv
	@$(PRELOAD) $(PY) -m bench.serve $(ARGS)

demo-model: venv
	@$(PRELOAD) $(PY) -m tools.demo_model $(ARGS)

docs: venv
	$(PY) -m tools.options_page > docs/options.md

lock:
	.ci/lock
