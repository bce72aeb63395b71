# The one task vocabulary: by hand, in hooks and in CI.
PYTHON ?= python3
# An index of PyPI's files is all that is needed; `uv` is used where it is, else brought into a folder of its own.
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
BIN := .venv/bin
NAME ?=
DATA ?=
SHORT ?=
ENVIRONMENTS := $(sort $(basename $(notdir $(wildcard infra/locks/*.in))))
# Many tests wait for processes that they start, so `make test` runs two halves at once; this is one of them.
FIRST_HALF := $(filter-out %/test_choose.py %/test_searching.py,$(wildcard tests/flows/test_*.py))

.PHONY: help setup environment demo check test test-first-half test-second-half test-slow bench lock clean
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.ready ## install the locked versions into .venv

.uv/bin/uv:
	$(PYTHON) -m venv .uv && .uv/bin/python -m pip install --quiet uv

.venv/.ready: requirements.lock pyproject.toml | $(filter .uv/bin/uv,$(UV))
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); sys.exit(0 if ok else "visionloop needs Python 3.11, 3.12 or 3.13, $(PYTHON) is " + sys.version.split()[0] + "; name another: make setup PYTHON=python3.12")'
	@test -x $(BIN)/python || $(UV) venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv
	@# Compiled once: every command is a process of its own, and spends more on its imports than on anything else.
	$(UV) pip sync --compile-bytecode --python $(BIN)/python requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

environment: | $(filter .uv/bin/uv,$(UV)) ## make environment NAME=litert (or coreml): a converter's own libraries, in .venv-NAME
	@test -f "infra/locks/$(NAME).in" || { echo "there is no environment '$(NAME)'; valid: $(ENVIRONMENTS)" >&2; exit 2; }
	$(UV) venv --quiet --clear --python $(BIN)/python .venv-$(NAME)
	$(UV) pip sync --quiet --require-hashes --compile-bytecode --python .venv-$(NAME)/bin/python infra/locks/$(NAME).txt
	@# The last step: an environment without it was not finished, and one whose lock differs is an old one.
	@cp infra/locks/$(NAME).txt .venv-$(NAME)/.lock

demo: setup ## the main job on real digits, in the scratch workspace .demo
	$(BIN)/visionloop demo

check: setup ## lint, strict types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: setup ## everything that takes minutes or less, in two halves at once; each is shown when it has ended
	infra/browser.sh
	@echo "two halves of the tests run at once, for ten to fifteen minutes; each is shown when it has ended"
	@VISIONLOOP_BROWSER_DEMANDED=1 $(MAKE) --no-print-directory --jobs=2 --output-sync=target --keep-going \
		test-first-half test-second-half

test-first-half:
	$(BIN)/pytest -m "not slow" $(FIRST_HALF)

test-second-half:
	$(BIN)/pytest -m "not slow" $(FIRST_HALF:%=--ignore=%)

test-slow: setup ## the long proofs: kill at every stage, resumption, real servers
	infra/browser.sh
	VISIONLOOP_BROWSER_DEMANDED=1 $(BIN)/pytest -m slow

bench: setup ## make bench NAME=frozen_training [DATA=folder] [SHORT=1]; one JSON line last
	@$(BIN)/python -m bench "$(NAME)" $(if $(DATA),--data "$(DATA)") $(if $(SHORT),--short)

lock: ## resolve requirements.lock anew, and what a serving environment takes of it
	$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --upgrade \
		--extra loop --extra dev --extra pretrained --custom-compile-command "make lock" -o requirements.lock pyproject.toml
	@$(MAKE) --no-print-directory infra/locks/serve.txt $(ENVIRONMENTS:%=lock-%)

# The same versions, without a library that trains, judges or registers.
infra/locks/serve.txt: requirements.lock pyproject.toml | $(filter .uv/bin/uv,$(UV))
	$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --constraint requirements.lock \
		--extra serve --custom-compile-command "make lock" -o $@ pyproject.toml

# What converters need beside the torch of requirements.lock, which writes what they read.
lock-%: | $(filter .uv/bin/uv,$(UV))
	(cat infra/locks/$*.in; grep -o '^torch==[0-9.]*' requirements.lock) | $(UV) pip compile --quiet --universal \
		--python-version 3.11 --generate-hashes --no-emit-index-url --upgrade --no-annotate --custom-compile-command "make lock" \
		-o infra/locks/$*.txt -

clean: ## remove what can be made again
	@test ! -d .demo/.visionloop || $(BIN)/visionloop down -w .demo
	rm -rf .venv .venv-* .uv .demo build .mypy_cache .ruff_cache .import_linter_cache
