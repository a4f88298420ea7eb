# The commands of the project. Each sets up .venv first, if that is not done yet.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST := .venv-oldest-$(notdir $(PYTHON))

.DEFAULT_GOAL := help
# A hundred processes of the tests read what the first has compiled, which saves a third of the time.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help venv test quick mutants test-oldest test-serving check format docs demo bench clean

help:
	@echo 'make demo    a small model and real questions: compute an adapter, train it, dial it, export it, and write a page about it'
	@echo 'make test    run the tests'
	@echo 'make quick   run the tests of the packages that were changed since the last commit, without the slow ones'
	@echo 'make mutants plant 50 small faults drawn at random (N=50 SEED=7) and say how many the tests catch'
	@echo 'make test-oldest   the same with the oldest versions that pyproject.toml allows (PYTHON=python3.11 or newer)'
	@echo 'make test-serving  serve exported adapters in real engines; needs python3.11, a compiler and an hour'
	@echo 'make check   ruff, mypy --strict'
	@echo 'make format  let ruff rewrite the files'
	@echo 'make docs    build the documentation as a site, in docs/_build/html'
	@echo 'make bench   measure what the documentation claims about time and captured variance'
	@echo 'make venv    only create .venv and install into it (PYTHON=python3.12 picks the interpreter)'
	@echo 'make clean   remove .venv and caches'

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, and $(PYTHON) is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test,dev]'
	@touch $@

$(VENV)/.docs-installed: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

# The tests build what they need. The hub is never asked. One thread each, in one process more than there are cores, since
# tests wait for processes of their own: on one day all took 7 min 36 s so, and 9 min in two (on another 10 min 28 s).
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(1 + (os.cpu_count() or 1))')
test: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

quick: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.quick $(ARGS)

# The first time it measures which tests run which lines, in twice the time of `make test`.
N ?= 50
SEED ?= $(shell date +%s)
mutants: $(INSTALLED)
	$(BIN)/python -m benchmarks.mutants draw --n $(N) --seed $(SEED) --processes 2 $(ARGS)

# The floors of pyproject.toml, see tests/oldest.py. A torch of the interpreter's own is used as it is: Debian 13 has 2.6.0
# (apt-get install python3-torch libopenblas0-pthread, PYTHON=/usr/bin/python3.13), without libuv. Others get the newest.
$(OLDEST)/.installed: pyproject.toml tests/oldest.py
	$(PYTHON) -m venv --clear --system-site-packages $(OLDEST)
	$(OLDEST)/bin/python tests/oldest.py > $(OLDEST)/floors.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/floors.txt -e '.[demo,test]'
	@touch $@

# The examples' model is made anew: what one version of transformers saved, an older one need not read.
test-oldest: $(OLDEST)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 USE_LIBUV=0 LORA_INIT_CACHE=$(abspath $(OLDEST))/assets $(OLDEST)/bin/python -m pytest -n auto $(ARGS)

# By hand, not in CI. Each engine has an environment of its own in .venv-serving.
test-serving: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.serving $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A warning is an error: a broken link, a malformed docstring, a page that no table of contents names.
docs: $(VENV)/.docs-installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

demo: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(BIN)/python examples/demo.py $(ARGS)

bench: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.statistics $(ARGS)

clean:
	rm -rf $(VENV) .venv-oldest-* docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lora_init tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
