# make studio   start the studio in a web page            make lint     style and import rules
# make test     run the tests (minutes)                   make format   rewrite the style
# make test-all also the long sweeps                      make type     static types
# make test-firefox  the tests of the page in Firefox
# make docs     the pages of docs/ into build/site      make bench    all figures anew, hours, into build/bench
#
# Every target keeps to its own .venv and installs only when pyproject.toml or constraints.txt changed.
# torch is the CPU build where there is no NVIDIA GPU; TORCH_INDEX=cpu, =pypi or =URL chooses (tools/torch_index.py).
# ARGS are handed on: make studio ARGS="--port 7861", make test ARGS="tests/models -x".

VENV := .venv
BIN := $(VENV)/bin
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$python -c "$(SUITABLE)" 2>/dev/null && echo $$python && break; done)
INSTALL := $(BIN)/python -m tools.install
# One thread a test process: with several of them, threads of torch would only get into each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: studio test test-all test-firefox lint format type docs bench bench-gpu clean

studio: $(VENV)/installed-studio
	$(BIN)/tessera studio $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(PYTEST) -m "not slow and not gpu and not network" $(ARGS)

test-all: $(VENV)/installed-dev
	$(PYTEST) --timeout 3600 -m "not network" $(ARGS)

test-firefox: $(VENV)/installed-dev
	TESSERA_BROWSER=firefox $(PYTEST) -m "browser" $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(VENV)/installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/installed-dev
	$(BIN)/mkdocs build --strict $(ARGS)

# Rivals take part where the extra "bench" is installed. ARGS="--smoke" only shows that all of it runs.
BENCHES := image start costs cache cache-time clips kv shortcuts attention attention-corrections attention-plan \
	quantization quantization-quality quantization-mixed speed-up speed-up-shapes
BENCHES_GPU := attention-gpu quantization-gpu

bench: $(VENV)/installed-dev
	mkdir -p build/bench
	for one in $(BENCHES); do \
		OMP_NUM_THREADS=1 $(BIN)/tessera bench $$one --output build/bench/$$one.json $(ARGS) || exit 1; done

bench-gpu: $(VENV)/installed-dev
	mkdir -p build/bench
	for one in $(BENCHES_GPU); do \
		$(BIN)/tessera bench $$one --output build/bench/$$one.json $(ARGS) || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: needs Python 3.11 to 3.14 with its venv module;" \
		"on Debian and Ubuntu: apt-get install python3 python3-venv;" \
		"elsewhere name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-studio: pyproject.toml constraints.txt | $(BIN)/python
	@$(INSTALL) studio,train
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@$(INSTALL) studio,train,dev
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
		$(MAKE) --no-print-directory chromium
	@touch $@

# The browser tests drive a chromium of the system; without one they are skipped and say so.
.PHONY: chromium
chromium:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing chromium for the browser tests"; \
		{ timeout 60 apt-get -qq -o Acquire::Retries=0 update && \
		  DEBIAN_FRONTEND=noninteractive timeout 240 apt-get -qq -y --no-install-recommends install chromium; } \
		>/dev/null 2>&1 || echo "chromium could not be installed: the browser tests will be skipped"; \
	else \
		echo "no chromium found: the browser tests will be skipped"; \
	fi
