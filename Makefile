# make demo   trains, samples and compares on handwritten digits
# make test   runs the tests
# make test-all  runs all tests, the slow notebooks too
# make test-core  runs half of them, which need neither torch nor TensorFlow
# make test-newest  runs the tests with the newest packages that are allowed
# make test-install  builds the wheel and tries it outside of the clone
# make lint   ruff, basedpyright, shellcheck and hadolint
# make docs   renders the API reference into docs/api
# make soak   kills a training run 20 times; it must not show in the results
# make address TO=me/tensorar_jax  sets where the repository is, everywhere
# All make a virtual environment first: .venv, or .venv-3.12 for another Python,
# as in `PYTHON=python3.12 make test`.
PYTHON ?= python3
VENV ?= $(patsubst %-3,%,$(patsubst python%,.venv-%,$(notdir $(PYTHON))))
BIN := $(VENV)/bin
# Bytecode of all packages would take 180 MB; Python writes what it imports.
PIP := $(BIN)/pip install -q --no-compile
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

demo: $(VENV)/installed
	$(BIN)/python -m tensorar_jax.main --config=configs/digits.py

test: $(VENV)/installed-test
	$(PYTEST)

test-all: $(VENV)/installed-test
	$(PYTEST) -m ""

# Reading PyTorch's files takes torch, which for Python 3.12 has gigabytes.
CORE_TESTS := tests/method tests/nn tests/training tests/experiment \
  tests/contract tests/e2e/story_test.py
test-core: $(VENV)/installed-core
	$(PYTEST) -m "not slow and not torch" $(CORE_TESTS)

test-newest: BIN := .venv-newest/bin
test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	$(BIN)/pip install -q --no-compile -e '.[dev]'
	$(PYTEST)

test-install:
	.ci/install $(PYTHON)

SLUG = $(shell sed -n 's|^Repository = "https://github.com/\(.*\)"|\1|p' pyproject.toml)
address:
	git grep -lF '$(SLUG)' | xargs sed -i 's|$(SLUG)|$(TO)|g'

soak: $(VENV)/installed
	$(BIN)/python -m studies.soak --kills=20

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/shellcheck -x launch/*.sh notebooks/*.sh .ci/*
	$(BIN)/hadolint launch/Dockerfile

# pdoc is the lightest renderer of Markdown docstrings: no theme, no site to
# configure, and signatures show their jaxtyping shapes. Each module is named,
# since the package itself shows only its public API.
MODULES := $(sort $(subst /,.,$(patsubst %/__init__,%,$(basename \
  $(shell find tensorar_jax -name '*.py')))))
docs: $(VENV)/installed-docs
	rm -rf docs/api
	JAX_PLATFORMS=cpu $(BIN)/python -W ignore -m pdoc --docformat google \
	  -o docs/api $(MODULES)

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt -e .
	touch $@

$(VENV)/installed-test: requirements-test.txt $(VENV)/installed
	$(PIP) -r requirements-test.txt
	touch $@

$(VENV)/installed-core: requirements-test.txt $(VENV)/installed
	$(PIP) -c requirements-test.txt pytest pytest-xdist beartype tensorboard
	touch $@

$(VENV)/installed-docs: requirements-test.txt $(VENV)/installed
	$(PIP) -c requirements-test.txt pdoc
	touch $@

.PHONY: demo test test-all test-core test-newest test-install address soak lint docs
