# A fresh machine needs Python 3.11+ and make; everything else goes into .venv through constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: help install demo test lint format results bench clean

help:
	@echo "make demo     run the synthetic study and say where the figures are (about 4 minutes)"
	@echo "make test     formatter, linter, type checker, tests and doctests (under 10 minutes)"
	@echo "make install  only make .venv with the command metanudge"
	@echo "make results  run everything behind results/ again (several hours)"
	@echo "make lint | format | bench | clean"

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e .
	@touch $@

# the extras, each once
.venv/.%: .venv/.installed
	$(PIP) -e '.[$*]'
	@touch $@

demo: install
	$(BIN)/metanudge reproduce synthetic

test: lint .venv/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

results: demo .venv/.mnist1d .venv/.peft
	$(BIN)/metanudge reproduce solves
	$(BIN)/metanudge reproduce sinusoid
	$(BIN)/metanudge reproduce mnist1d
	$(BIN)/metanudge reproduce mnist1d --only sharpness
	$(BIN)/metanudge reproduce memory

bench: .venv/.bench
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/overhead.py

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
