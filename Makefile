# make demo    pre-train, fine-tune and segment synthetic CT on the CPU, ending with demo/out/report.html   (FRESH=1 starts over)
# make test    all tests
# make check   formatting, lint and all tests
# make test-legacy   weights of the real MONAI 1.4.0 compute the same here (an environment of its own, .venv-legacy)
# Each sets up its own virtual environment first; PYTHON=python3.12 chooses the interpreter (3.11 or newer).

PYTHON ?= python3
VENV ?= .venv
LEGACY_VENV ?= .venv-legacy
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-legacy check lint clean
.DEFAULT_GOAL := demo

$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

demo: $(INSTALLED)
	$(VENV)/bin/python -m demo.run $(if $(FRESH),--fresh)

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

$(LEGACY_VENV)/.installed:
	$(PYTHON) -m venv $(LEGACY_VENV)
	$(LEGACY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check monai==1.4.0 torch==2.13.0 einops==0.8.2
	touch $@

test-legacy: $(INSTALLED) $(LEGACY_VENV)/.installed
	LEGACY_PYTHON=$(abspath $(LEGACY_VENV))/bin/python $(VENV)/bin/python -m pytest tests/legacy

lint: $(INSTALLED)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

check: lint test

clean:
	rm -rf $(VENV) $(LEGACY_VENV) demo/out *.egg-info .pytest_cache .ruff_cache
