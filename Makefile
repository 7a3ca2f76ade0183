# Two commands do everything: `make serve` and `make test`. `make help` lists the rest.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.PHONY: help env fork serve demo test lint patches verify upstream clean

# The first Python the base has a wheel for; PYTHON= names another.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.10,$(if $(shell $(p) -c 'import sys; print((3, 10) <= sys.version_info < (3, 14) or "")' 2>/dev/null),$(p))) python3)
PORT ?= 30000
MODEL ?=
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

clean: ## Remove what can be made again; keeps python/sglang and .venv
	@rm -rf dist .cache
