# make demo    set up .venv and run the main job: KFC beside SGD and AdamW on scikit-learn's digits
# make test    set up .venv and run lint, types and tests
# make docs    set up .venv and build the site, docs/_build/html; its examples run
# make fuzz    properties of random networks and programs, for MINUTES=20
#
# The set-up is done once, and again only after pyproject.toml has changed. EXTRAS=trainers installs
# the trainers of others too, whose tests are skipped without them; a comma parts several extras.

PYTHON ?= python3
MINUTES ?= 20
EXTRAS ?=
VENV := .venv
BIN := $(VENV)/bin
comma := ,
READY := $(VENV)/ready$(addprefix -,$(EXTRAS))
TYPED := .mypy_cache/installed

.DEFAULT_GOAL := help
.PHONY: help demo test tests-alone docs site lint types fuzz clean

help:
	@sed -n 's/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

demo: $(READY)
	@echo "==> classifying digits by KFC and by SGD"
	@$(BIN)/kfc-fx train
	@echo "==> an autoencoder of the digits, by KFC, SGD and AdamW"
	@$(BIN)/kfc-fx train --model digits-autoencoder --optimizers kfc,sgd,adamw --epochs 80 \
		--plot runs/autoencoder.png

test: lint tests-alone

tests-alone: $(READY)
	@echo "==> tests"
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 4 --dist worksteal

docs:
	@$(MAKE) --no-print-directory EXTRAS=docs site

site: $(READY)
	@echo "==> site: docs/_build/html"
	@OMP_NUM_THREADS=1 $(BIN)/sphinx-build --quiet --fail-on-warning --keep-going \
		--doctree-dir docs/_build/doctrees docs docs/_build/html

fuzz: $(READY)
	@$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

lint: $(READY)
	@echo "==> lint: ruff check"
	@$(BIN)/ruff check .
	@echo "==> format: ruff format --check"
	@$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

types: $(READY)
	@echo "==> types: mypy"
	@# kernels/ and tools/ are installed inside the package: mypy finds them in a folder of links
	@# that is laid out like the installed one
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/kfc_fx
	@ln -s $(CURDIR)/kfc_fx/* $(CURDIR)/kernels $(CURDIR)/tools $(TYPED)/kfc_fx
	@cd $(TYPED) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache -p kfc_fx

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "$(PYTHON) is not Python 3.11 or newer, which kfc_fx needs:" \
			"name one, as in make PYTHON=python3.12" >&2; exit 1; }
	@echo "==> setting up $(VENV) with $$($(PYTHON) --version) (once; some minutes to download torch)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev$(addprefix $(comma),$(EXTRAS))]'
	@touch $@

clean:
	@echo "==> removing $(VENV), caches and runs"
	@rm -rf docs/_build docs/gallery docs/sg_execution_times.rst
	@rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
