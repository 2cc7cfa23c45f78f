# make demo: the whole loop on captioned shapes. make test: everything that CI runs. Both are quick the second time.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-long docs check clean install
.DELETE_ON_ERROR:

demo: .venv/.installed
	$(BIN)/latentmill demo

test: .venv/.installed-test
	scripts/check

test-long: .venv/.installed-test
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt stlpips-pytorch
	$(BIN)/python -m pytest -m long
	$(BIN)/python scripts/break_promises.py

# The site of docs/ into build/site, strictly: a link to nothing is an error. Nothing is fetched.
docs: .venv/.installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: test

install: .venv/.installed

# The two stamps are as old as the files that say what to install.
.venv/.installed: pyproject.toml constraints.txt scripts/install.py
	$(PYTHON) scripts/install.py
	@touch $@

.venv/.installed-test: pyproject.toml constraints.txt scripts/install.py
	$(PYTHON) scripts/install.py --test
	@touch $@ .venv/.installed

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find latentmill pipeline preprocess tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Kept: .venv (rm -rf .venv) and runs (rm -rf runs)."
