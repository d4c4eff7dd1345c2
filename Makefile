# make demo    pre-train, fine-tune and segment synthetic CT on the CPU, ending with demo/out/report.html   (FRESH=1 starts over)
# make test    all tests
# make check   formatting, lint and all tests
# Each sets up its own virtual environment first; PYTHON=python3.12 chooses the interpreter (3.11 or newer).

PYTHON ?= python3
VENV ?= .venv
INSTALLED = $(VENV)/.installed

.PHONY: demo test check lint clean
.DEFAULT_GOAL := demo

$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

demo: $(INSTALLED)
	$(VENV)/bin/python -m demo.run $(if $(FRESH),--fresh)

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

lint: $(INSTALLED)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

check: lint test

clean:
	rm -rf $(VENV) demo/out *.egg-info .pytest_cache .ruff_cache
