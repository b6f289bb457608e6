# Each target sets up what it needs: `make demo` and `make test` run on a fresh machine with only Python and make.
# Overridable: PYTHON (the interpreter behind the environment), VENV, WORKERS (test processes), ARGS (for pytest).

VENV ?= .venv
WORKERS ?= 2
ARGS ?=
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)

PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt
STAMPS := $(VENV)/.stamps

.DELETE_ON_ERROR:
.PHONY: help demo walk table frontier reproduce test families benchmarks lint docs wheel-check clean distclean

help:
	@echo "make demo         see a vision-language model forget a concept (sets up $(VENV) first)"
	@echo "make test         the tests (sets up $(VENV) first)"
	@echo "make walk         what a newcomer does, step by step: docs/walk.md"
	@echo "make table        the table of results in the README"
	@echo "make frontier     every score with every edit, at equal retention: about an hour"
	@echo "make reproduce    the paper's tables and figures, claim by claim: about half an hour"
	@echo "make families     measure every model family, write docs/families.md"
	@echo "make benchmarks   every benchmark at a size that takes seconds: that they run, not how fast"
	@echo "make lint         ruff, pyright (strict), import-linter"
	@echo "make docs         the documentation, into site/"
	@echo "make wheel-check  build the wheel, use it from a clean environment elsewhere"
	@echo "make clean        remove what was built; distclean removes $(VENV) too"

# Set-up: torch first, then the package with the extras a target needs. A stamp says that a step is done; it is
# redone when the pins or the requirements change.

$(STAMPS)/torch: constraints.txt
	$(if $(strip $(PYTHON)),,$(error no Python of 3.11 or later found; name one: make PYTHON=/path/to/python3))
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sauce_hooks needs Python 3.11 or later, not " + sys.version.split()[0])'
	@echo "setting up $(VENV), once: this takes some minutes"
	$(PIP_INSTALL) torch
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/run: $(STAMPS)/torch pyproject.toml constraints.txt
	$(PIP_INSTALL) -e .
	@touch $@

$(STAMPS)/dev: $(STAMPS)/torch pyproject.toml constraints.txt
	$(PIP_INSTALL) -e '.[dev]'
	$(PIP_INSTALL) --no-deps lmms-eval # what its core needs is in the extra; docs/lmms-eval.md says why
	@touch $(STAMPS)/run $@

$(STAMPS)/docs: $(STAMPS)/torch pyproject.toml constraints.txt
	$(PIP_INSTALL) -e '.[docs]'
	@touch $(STAMPS)/run $@

demo: $(STAMPS)/run
	$(VENV)/bin/sauce-hooks demo

# Without an environment at first: setting it up is a part of the walk.
walk:
	VENV=$(VENV) $(PYTHON) tests/walk.py

table: $(STAMPS)/run
	$(VENV)/bin/sauce-hooks table

frontier: $(STAMPS)/run
	$(VENV)/bin/sauce-hooks frontier

reproduce: $(STAMPS)/dev
	$(VENV)/bin/sauce-hooks reproduce all

# One thread a process: the test processes share the cores already.
test: $(STAMPS)/dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) $(ARGS)

# The support table; a test compares it with what it measures.
families: $(STAMPS)/dev
	OMP_NUM_THREADS=1 $(PY) tests/support_table.py

benchmarks: $(STAMPS)/dev
	@set -e; for name in erasure training trainers pipeline concepts; do \
		echo "== benchmarks/$$name.py --small"; OMP_NUM_THREADS=1 $(PY) benchmarks/$$name.py --small >/dev/null; done

lint: $(STAMPS)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports

docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# The package as a stranger gets it: sdist and wheel, the same files when built again elsewhere and later; a clean
# environment with the lowest supported versions and no extra; another directory; the tests that the sdist brings.
WHEEL_TESTS := eraser rows activations sae laws bank

wheel-check: $(STAMPS)/dev
	@set -e; \
	tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; mkdir "$$tmp/elsewhere" "$$tmp/source"; \
	$(PY) -m build --outdir "$$tmp/dist" >/dev/null; \
	tar -xzf "$$tmp"/dist/*.tar.gz -C "$$tmp/source" --strip-components 1; \
	find "$$tmp/source" -exec touch -d 2001-01-01 {} +; \
	$(PY) -m build --outdir "$$tmp/again" "$$tmp/source" >/dev/null; \
	for file in "$$tmp"/dist/*; do cmp "$$file" "$$tmp/again/$$(basename "$$file")"; done; \
	echo "wheel-check: builds are reproducible"; \
	$(PY) -m venv "$$tmp/env"; \
	pip="$$tmp/env/bin/python -m pip install -q --disable-pip-version-check -c constraints-lowest.txt"; \
	$$pip torch; \
	$$pip "$$tmp"/dist/*.whl; \
	cd "$$tmp/elsewhere"; \
	"$$tmp/env/bin/python" -I -c "$$WHEEL_CHECK"; \
	"$$tmp/env/bin/sauce-hooks" --help >/dev/null; \
	"$$tmp/env/bin/python" "$$tmp/source/examples/baselines.py" >said 2>&1; \
	grep -oF "pip install 'sauce-hooks[baselines]'" said; \
	cd "$(CURDIR)"; $$pip pytest pytest-xdist hypothesis beartype; \
	cd "$$tmp/source"; \
	OMP_NUM_THREADS=1 "$$tmp/env/bin/python" -m pytest -q -n $(WORKERS) -m "not slow" -k "not pixtral" $(WHEEL_TESTS:%=tests/test_%.py); \
	echo "wheel-check: ok"

define WHEEL_CHECK
import pathlib, sys
import sauce_hooks as sh
home = pathlib.Path(sh.__file__).resolve().parent
assert home.is_relative_to(pathlib.Path(sys.prefix).resolve()), f"imported from {home}, not from the wheel"
assert (home / "py.typed").is_file(), "the wheel lacks py.typed"
model, processor, sae = sh.scenes.load()
print("wheel-check: loaded", type(model).__name__, type(processor).__name__, type(sae).__name__)
endef
export WHEEL_CHECK

clean:
	rm -rf build dist site .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
