# `make train` and `make test` need nothing else done first. `make` alone lists what there is.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINES := .venv-engines
ARGS ?=

# Where this is set, every process would compile torch and transformers anew when it starts.
unexport PYTHONDONTWRITEBYTECODE

# uv resolves and installs much faster than pip; it does not read pip's find-links by itself.
define install
$(BIN)/python -m pip install --quiet --disable-pip-version-check uv \
&& UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" UV_CONSTRAINT=constraints.txt UV_PYTHON_DOWNLOADS=never \
   $(BIN)/uv pip install --quiet --python $(BIN)/python -e '$(1)' \
|| { echo "uv is not to be had or failed: installing with pip, which takes longer" >&2; \
     $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '$(1)'; }
endef

.PHONY: help install train evidence test test-engines lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## make .venv and install vcpo in it

train: install ## train, evaluate, write the report; make train ARGS="sort --pipeline.lag 4"
	$(BIN)/vcpo train $(ARGS)

evidence: install ## the quick form of the experiments behind docs/evidence; less than an hour on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.evidence --quick $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bank --quick
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed_to_target --quick

test: $(VENV)/.installed-test ## run the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup $(ARGS)

test-engines: $(VENV)/.installed-test $(ENGINES)/.installed ## run the tests against real vLLM, in an environment of its own
	OMP_NUM_THREADS=1 VCPO_ENGINES_PYTHON=$(CURDIR)/$(ENGINES)/bin/python \
	$(BIN)/pytest engine_tests -n 2 --dist loadgroup $(ARGS)

lint: $(VENV)/.installed-dev ## ruff (rules and format) and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

clean: ## remove .venv, .venv-engines, caches and builds; runs stay
	rm -rf $(VENV) $(ENGINES) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "vcpo needs Python 3.11 or newer as $(PYTHON); or say: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	|| { rm -rf $(VENV); echo "cannot make $(VENV): install Python's venv (Debian, Ubuntu: python3-venv)" >&2; exit 1; }

# One stamp for each set of packages: made once, and again when the versions wanted change.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing vcpo into $(VENV)"
	@$(call install,.)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing what the tests need"
	@$(call install,.[test])
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what development needs"
	@$(call install,.[dev])
	@touch $@

# vLLM wants older transformers than vcpo, and packages that must be left out, which pip cannot: uv alone.
$(ENGINES)/.installed: engine_tests/requirements.txt engine_tests/overrides.txt | $(BIN)/python
	@echo "installing vLLM into $(ENGINES)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@test -x $(ENGINES)/bin/python || $(BIN)/python -m venv --without-pip $(ENGINES)
	@UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" UV_PYTHON_DOWNLOADS=never \
	$(BIN)/uv pip install --quiet --python $(ENGINES)/bin/python \
	  --override engine_tests/overrides.txt --requirement engine_tests/requirements.txt
	@touch $@
