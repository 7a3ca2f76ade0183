# Two commands do everything: `make serve` and `make test`. `make help` lists the rest.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
# Else each of the servers that tests start compiles the engine anew.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help env tools fork edit serve demo test prove lint patches verify upstream
.PHONY: rehearse bench nightly port wheel smoke release clean
.PHONY: gate gate-starts watch publish publish-check

# The series of patches/ that is meant: the living one unless SERIES= names another.
SERIES ?= v0.5.23
# The first Python its base has a wheel for; PYTHON= names another.
PYTHONS := $(shell sed -nE 's/^\#.*-cp([0-9])([0-9]+)-cp.*/\1.\2/p' 'patches/$(SERIES)/base.txt' 2>/dev/null | sort -uV)
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
PYTHON ?= $(firstword $(foreach p,python3 $(addprefix python,$(PYTHONS)),$(if $(filter $(PYTHONS),$(call version,$(p))),$(p))) python3)
PORT ?= 30000
MODEL ?=
PATCH ?=
SINCE ?=
TO ?=
TAG ?=
SHAPE ?= 26b-a4b
LOADS ?=
UPSTREAM ?= https://github.com/sgl-project/sglang
# What needs the engine is run by its environment, the rest by one of a few MB.
VENV := $(CURDIR)/.venvs/$(SERIES)
ENGINE = "$(VENV)/bin/python"
GEMMA4 = PYTHONPATH="$(CURDIR)/benchmark$${PYTHONPATH:+:$$PYTHONPATH}" $(ENGINE) -m gemma4
TOOLS := .cache/tools/bin/python
FORK = -m fork --series "$(SERIES)"
COMMANDS = cd python && "$(CURDIR)/$(TOOLS)" $(FORK)

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

env:
	@"$(PYTHON)" python/fork/env.py "$(SERIES)"

tools:
	@"$(PYTHON)" python/fork/env.py tools

fork: tools ## Write python/sglang: the pinned base and the patch series as commits
	@$(COMMANDS) checkout

edit: tools ## The same, and say where a change of one patch is committed (PATCH=)
	@$(COMMANDS) edit "$(PATCH)"

serve: env fork ## Serve Gemma 4 on 127.0.0.1 (PORT=30000; MODEL=a checkpoint, else a tiny one)
	@$(GEMMA4) launch --port "$(PORT)" --model "$(MODEL)"

demo: env fork ## Serve, ask one question, stream the answer, stop
	@$(GEMMA4) demo --port "$(PORT)" --model "$(MODEL)"

test: env ## Run every test (FILES= names some; SERIES= another series)
	@$(ENGINE) $(FORK) verify
	$(ENGINE) $(FORK) lint
	$(ENGINE) $(FORK) test $(FILES)

prove: env ## Prove that each patch's tests fail without it (PATCH= names one, SINCE= a commit)
	@$(ENGINE) $(FORK) prove $(if $(SINCE),--since "$(SINCE)",$(PATCH))

lint: env ## Check the style of our files and of the lines our patches add
	@$(ENGINE) $(FORK) lint

patches: tools ## Export the commits of python/sglang to patches/
	@$(COMMANDS) export

# Modules are imported where there is the environment to import them in.
verify: $(if $(wildcard .venvs/$(SERIES)/fork.stamp),env,tools) ## Prove that patches/ is exactly what python/sglang holds, and applies
	@cd python && $(if $(wildcard .venvs/$(SERIES)/fork.stamp),$(ENGINE),"$(CURDIR)/$(TOOLS)") $(FORK) verify

upstream: tools ## Write dist/upstream/: each patch with its tests, for git am upstream (PATCH= one alone)
	@$(COMMANDS) upstream $(PATCH)

rehearse: tools ## Apply dist/upstream/ to SGLang's own repository at the tag (UPSTREAM=)
	@$(COMMANDS) rehearse --repository "$(UPSTREAM)"

bench: env fork ## Serve the base and the fork with small numbers: dist/bench/ (SHAPE=, LOADS=)
	@$(GEMMA4) serve --quick --shape "$(SHAPE)" $(if $(LOADS),--loads "$(LOADS)") --out dist/bench

nightly: env fork ## Run the property tests with ten times the examples
	@HYPOTHESIS_PROFILE=nightly $(ENGINE) -m pytest -m hypothesis test

port: tools ## Say which patches apply to the newest SGLang (TO= names a release)
	@$(COMMANDS) port --to "$(TO)"

# With the tools that python/tools.txt pins by their hashes, and nothing else.
wheel: tools ## Build the wheel of this Python, as a release does: dist/wheels/
	@$(TOOLS) -m pip --disable-pip-version-check wheel --no-deps --no-index --no-build-isolation --config-settings series="$(SERIES)" --wheel-dir dist/wheels ./python

smoke: tools ## Install that wheel where nothing else is, and have it answer
	@$(COMMANDS) smoke --port "$(PORT)"

release: tools ## Write dist/release/: the wheels, sdist, patches, notes and checksums
	@$(COMMANDS) release --tag "$(TAG)"

# What holds a token that can write, or decides what does: on a runner's own Python, where
# nothing is installed.
publish:
	@cd python && "$(PYTHON)" -m fork.ci.publish

publish-check:
	@cd python && "$(PYTHON)" -m fork.ci.publish check

watch:
	@cd python && "$(PYTHON)" -m fork.ci.watch

gate:
	@cd python && "$(PYTHON)" -m fork.ci.gate

gate-starts:
	@cd python && "$(PYTHON)" -m fork.ci.gate starts

clean: ## Remove what can be made again; keeps python/sglang and .venvs
	@rm -rf dist .cache
