# make demo   trains, samples and compares on handwritten digits
# make test   runs the tests
# make test-all  runs all tests, the slow notebooks too
# make test-install  builds the wheel and tries it outside of the clone
# make lint   ruff and shellcheck
# make docs   renders the API reference into docs/api
# make soak   kills a training run 20 times; it must not show in the results
# All make .venv first if it is not there.
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/installed
	$(BIN)/python -m tensorar_jax.main --config=configs/digits.py

test: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m ""

test-install:
	.ci/install $(PYTHON)

soak: .venv/installed
	$(BIN)/python -m studies.soak --kills=20

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck -x launch/*.sh .ci/*

# pdoc is the lightest renderer of Markdown docstrings: no theme, no site to
# configure, and signatures show their jaxtyping shapes. Each module is named,
# since the package itself shows only its public API.
MODULES := $(sort $(subst /,.,$(patsubst %/__init__,%,$(basename \
  $(shell find tensorar_jax -name '*.py')))))
docs: .venv/installed-docs
	rm -rf docs/api
	JAX_PLATFORMS=cpu $(BIN)/python -W ignore -m pdoc --docformat google \
	  -o docs/api $(MODULES)

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/installed-test: requirements-test.txt requirements.txt .venv/installed
	$(BIN)/pip install -q -r requirements-test.txt
	touch $@

.venv/installed-docs: requirements-docs.txt requirements.txt .venv/installed
	$(BIN)/pip install -q -r requirements-docs.txt
	touch $@

.PHONY: demo test test-all test-install soak lint docs
