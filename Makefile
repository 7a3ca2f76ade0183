# Two commands do everything: `make serve` and `make test`. `make help` lists the rest.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.PHONY: help env fork serve demo test lint patches verify upstream clean
.PHONY: gate gate-starts tools wheel smoke release publish port watch rehearse bench nightly

# The first Python the base has a wheel for; PYTHON= names another.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.10,$(if $(shell $(p) -c 'import sys; print((3, 10) <= sys.version_info < (3, 14) or "")' 2>/dev/null),$(p))) python3)
PORT ?= 30000
MODEL ?=
TO ?=
TAG ?=
SHAPE ?= 26b-a4b
LOADS ?=
UPSTREAM ?= https://github.com/sgl-project/sglang
VENV := $(CURDIR)/.venv/bin
FORK := "$(VENV)/python" -m fork

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

env:
	@"$(PYTHON)" python/fork/env.py

fork: env ## Write python/sglang: the pinned base and the patch series as commits
	@$(FORK) checkout

serve: fork ## Serve Gemma 4 on 127.0.0.1 (PORT=30000; MODEL=a checkpoint, else a tiny one)
	@$(FORK) serve --port "$(PORT)" --model "$(MODEL)"

demo: fork ## Serve, ask one question, stream the answer, stop
	@$(FORK) demo --port "$(PORT)" --model "$(MODEL)"

test: verify lint ## Run every test (FILES= names some)
	@"$(VENV)/python" -m pytest $(or $(FILES),test)

lint: fork ## Check the style of our files and of the lines our patches add
	@$(FORK) lint

patches: env ## Export the commits of python/sglang to patches/
	@$(FORK) export

verify: env ## Prove that patches/ is exactly what python/sglang holds, and applies
	@$(FORK) verify

upstream: env ## Write dist/upstream/: each patch with its tests, for git am upstream
	@$(FORK) upstream

rehearse: env ## Apply dist/upstream/ to SGLang's own repository at the tag (UPSTREAM=)
	@$(FORK) rehearse --repository "$(UPSTREAM)"

bench: fork ## Serve the base and the fork with small numbers: dist/bench/ (SHAPE=, LOADS=)
	@"$(VENV)/python" benchmark/gemma4/run.py --quick --shape "$(SHAPE)" $(if $(LOADS),--loads "$(LOADS)") --out dist/bench

nightly: fork ## Run the property tests with ten times the examples
	@HYPOTHESIS_PROFILE=nightly "$(VENV)/python" -m pytest -m hypothesis test

# What needs the commands alone, and not the engine with its 10 GB.
TOOLS := .cache/tools/bin/python
COMMANDS = cd python && "$(CURDIR)/$(TOOLS)" -m fork

tools:
	@cmp --silent <($(TOOLS) -VV 2>&1) <("$(PYTHON)" -VV) || "$(PYTHON)" -m venv --clear .cache/tools
	$(TOOLS) -m pip --quiet --disable-pip-version-check install --upgrade "pip>=25.1"
	$(TOOLS) -m pip --quiet --disable-pip-version-check install --group python/pyproject.toml:tools

port: tools ## Say which patches apply to the newest SGLang (TO= names a release)
	@$(COMMANDS) port --to "$(TO)"

watch: tools
	@$(COMMANDS) watch

wheel: tools ## Build the wheel of this Python, as a release does: dist/release/
	@$(TOOLS) -m pip --disable-pip-version-check wheel --no-deps --wheel-dir dist/release ./python

smoke: tools ## Install that wheel where nothing else is, and have it answer
	@$(COMMANDS) smoke --port "$(PORT)"

release: tools ## Add the sdist, the patches, notes and checksums to the wheels
	@$(COMMANDS) release --tag "$(TAG)"

publish: tools
	@$(COMMANDS) publish

# On a runner's own Python, before anything is installed.
gate:
	@cd python && "$(PYTHON)" -m fork.gate

gate-starts:
	@cd python && "$(PYTHON)" -m fork.gate starts

clean: ## Remove what can be made again; keeps python/sglang and .venv
	@rm -rf dist .cache
