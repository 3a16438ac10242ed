# Every target sets up what it needs: a venv for each Python, with the pinned dependencies.

PYTHON ?= python3
PORT ?= 8000
VENV := .venv/$(notdir $(PYTHON))
BIN := $(VENV)/bin
READY := $(VENV)/.installed
VENDOR := chat/api/static/vendor
# The Markdown parser of the chat page, and the libraries that its bundle contains.
VENDORED := entities@8.1.0 linkify-it@6.1.0 markdown-it@15.0.3 mdurl@2.1.0 punycode.js@2.3.1 uc.micro@3.0.0

.PHONY: help demo run test test-integration bench soak check audit vendor clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s%s\n", $$1, $$2 }'
	@echo "PYTHON=python3.13 uses another Python, PORT=9000 another port."

demo: $(READY)  ## the service on port 8000, with a stand-in for Groq
	@PORT=$(PORT) exec $(BIN)/python -m tests.demo

run: $(READY)  ## the service on port 8000, with the real Groq
	@PORT=$(PORT) exec $(BIN)/python server.py

test: $(READY)  ## all tests, four files at a time; COVERAGE=1 adds the coverage and the slow tests
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(if $(filter 1,$(COVERAGE)),--cov --cov-report=term-missing)

test-integration: $(READY)  ## the tests against the real Groq; they need GROQ_API_KEY
	$(BIN)/python -m pytest tests/test_integration.py

bench: $(READY)  ## the benchmark: the service beside a naive relay, in less than five minutes
	$(BIN)/python -m bench.run

soak: $(READY)  ## ten minutes of faults with 200 clients, after which nothing may be left over
	$(BIN)/python -m bench.soak

check: $(READY)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(VENV)-audit/.installed  ## check the dependencies for known vulnerabilities
	.ci/audit $(VENV)-audit/bin/python

vendor:  ## fetch the chat page's Markdown parser from npm anew, and verify it
	@set -e; packages=$$(mktemp -d); trap 'rm -r "$$packages"' EXIT; \
	npm pack --silent --pack-destination "$$packages" $(VENDORED) > /dev/null; \
	tar xzf "$$packages"/markdown-it-*.tgz -C $(VENDOR) --strip-components 3 package/dist/browser/markdown-it.esm.min.mjs; \
	for package in "$$packages"/*.tgz; do \
		echo "== $$(basename "$$package" .tgz)"; \
		tar xzOf "$$package" --wildcards 'package/LICENSE*'; \
	done > $(VENDOR)/LICENSES.txt; \
	cd $(VENDOR); sed -n 's/^    \([0-9a-f]\{64\}  \)/\1/p' README.md | sha256sum --check

clean:  ## remove what the other targets created
	rm -rf .venv .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(READY): requirements.txt requirements-dev.txt bench/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -r bench/requirements.txt
	touch $@

$(VENV)-audit/.installed: requirements-audit.txt
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@
