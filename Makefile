# Two commands carry the project: `make train` and `make test`. Both make their own environment first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Tests share out over two processes; each starts ranks of its own. WORKERS= runs them one after the other.
WORKERS ?= -n 2 --dist worksteal

.PHONY: setup train test test-slow test-gpu gpu-check gpu-check-libraries lint docs clean

setup: $(STAMP)

# Installed again only when the dependencies change.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Halocline needs Python 3.11 or newer; say make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@# Its Python alone, 1 MB: the tests run it over a twin of its compiled core. Where that is installed, this is a no-op.
	$(BIN)/python -m pip install --quiet --no-deps 'transformer-engine==2.20.2'
	@touch $@

# ARGS are settings, for example: make train ARGS='run.dir=runs/wide model.hidden_size=192'
train: $(STAMP)
	$(BIN)/python -m launch local experiment=first_run $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -m 'not slow and not gpu' $(WORKERS) $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m 'slow and not gpu' $(WORKERS) $(ARGS)

# Needs a Hopper GPU and the extra [cuda].
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu $(ARGS)

# What one GPU finds, in at most 8 minutes (docs/gpu_check.md). It takes the Python that is there and needs no network: the
# libraries that such a machine may lack are put into a folder by the second target, elsewhere, and brought along: all of
# them Python alone, for which hypothesis is an older one.
CHECK_LIBRARIES := gpu-check/libraries
gpu-check:
	PYTHONPATH=$(CURDIR):$(CURDIR)/$(CHECK_LIBRARIES) $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check $(ARGS)

gpu-check-libraries:
	$(PYTHON) -m pip install --quiet --upgrade --no-deps --target $(CHECK_LIBRARIES) 'hydra-core>=1.3.2,<1.4' \
	  'omegaconf>=2.3,<2.4' 'antlr4-python3-runtime==4.9.3' 'pytest>=9,<10' pluggy iniconfig pygments \
	  'hypothesis==6.150.0' sortedcontainers tqdm packaging

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tables of settings in docs/, from the dataclasses that own them.
docs: $(STAMP)
	$(BIN)/python -m launch.pages

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
