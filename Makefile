# make demo   the whole funnel on a simulated world, from nothing to served feeds and a report
# make test   lint, types, layers and the whole suite
PY := .venv/bin/python

.PHONY: demo test test-slow lint install clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# make/make/p' Makefile

.venv/.installed: requirements/cpu.txt pyproject.toml scripts/install
	scripts/install
	@touch $@

.venv/.installed-dev: requirements/cpu.txt requirements/dev.txt pyproject.toml scripts/install
	scripts/install --dev
	@touch .venv/.installed $@

install: .venv/.installed

SCALE ?= smoke
demo: .venv/.installed
	.venv/bin/reelrank demo --scale $(SCALE)

lint: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports
	.venv/bin/pyright

test: lint
	$(PY) -m pytest -q -m "not slow"

test-slow: .venv/.installed-dev
	$(PY) -m pytest -q -m slow

clean:
	rm -rf .venv runs
