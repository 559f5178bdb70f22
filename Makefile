# make demo: install, quantize the real Gemma 3 270M, complete a prompt.   make test: every check of the project.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Python compiles what is imported, when it first is; pip would compile all modules of all packages, for minutes.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt
# the tests start hundreds of processes, each of which would compile the package's Python again
unexport PYTHONDONTWRITEBYTECODE
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-fast test-thorough lint check docs fuzz sanitize wheels clean

demo: $(INSTALLED)
	$(BIN)/gemma-awq quantize --force
	$(BIN)/gemma-awq run --max-new-tokens 48 "The three primary colours are"

test: lint check

# What to run at each save; make test runs the rest too.
test-fast: lint
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not demo"

# For a nightly job: every place where make test tries a sample. An hour or more.
test-thorough: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --thorough --fuzz-cases $(CASES)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# a file's tests in one process, because they share what was made for them; the order is that of tests/conftest.py
check: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 40 --durations-min 4

# build/site: the pages of docs/, as mkdocs.yml lays them out; a link that leads nowhere is an error
docs: $(INSTALLED)
	$(BIN)/zensical build --strict --clean

# CASES=20000 SEED=1 make fuzz
CASES ?= 2000
SEED ?= 1

fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz --cases $(CASES) --seed $(SEED)

sanitize: $(INSTALLED)
	$(BIN)/python -m tests.fuzz.sanitizers --cases $(CASES) --seed $(SEED)

# dist: the source archive, a wheel for every platform, and one with compiled kernels for each of these (in minutes)
PLATFORMS ?= linux-x86_64 linux-arm64 macos-arm64 windows-x86_64
BUILD = env -u CXX $(BIN)/python -m hatchling build -d dist

wheels: $(INSTALLED)
	$(BIN)/python -m pip install --quiet ziglang==0.17.1
	$(BUILD)
	for platform in $(PLATFORMS); do GEMMA_AWQ_WHEEL=$$platform $(BUILD) -t wheel || exit 1; done

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e ".[full,demo,test,examples,docs]"
	touch $@

clean:
	rm -rf $(VENV) build/site .cache .pytest_cache .hypothesis .mypy_cache .ruff_cache
