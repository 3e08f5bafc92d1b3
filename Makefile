# Two commands from a fresh clone: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= python3
# SYSTEM=1 keeps the torch, Triton and NumPy that $(PYTHON) already has (a GPU machine's, say).
ifdef SYSTEM
VENV := .venv-system
else
VENV := .venv
endif
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt
STAMP := $(VENV)/.installed
SMOLLM2 := checkpoints/smollm2-135m
# Two test processes side by side would fight over the cores; each keeps to one thread.
TEST_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo demo-smollm2 test test-gpu lint format clean

help:  ## this list
	@echo "draftnorm: make TARGET [SYSTEM=1] [PYTHON=python3.12]"
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 24
	@echo "SYSTEM=1 uses the torch that is installed instead of downloading one."

demo: $(STAMP)  ## speculate with the embedded pair on the CPU, compared with plain decoding
	$(BIN)/draftnorm speculate --device cpu

demo-smollm2: $(SMOLLM2)/config.json  ## the same with SmolLM2-135M, fetched once, and an n-gram drafter
	$(BIN)/draftnorm speculate --target $(SMOLLM2) --draft ngram --device cpu --compare

test: $(STAMP)  ## run the tests that need no GPU
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -q -rs --durations=5

test-gpu: $(STAMP)  ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -q -rs -m gpu

lint: $(STAMP)  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environments and what a build left; checkpoints stay
	rm -rf .venv .venv-system build dist *.egg-info .pytest_cache .ruff_cache

$(SMOLLM2)/config.json: | $(STAMP)
	$(BIN)/draftnorm fetch smollm2-135m --output $(SMOLLM2)

# A second call finds the stamp and installs nothing, until what it depends on changes.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "draftnorm needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -1). Try: make PYTHON=python3.12" >&2; exit 1; }
ifdef SYSTEM
	@$(PYTHON) -c 'import torch, triton, numpy; print("using torch", torch.__version__, "of", torch.__path__[0])' || \
	  { echo "SYSTEM=1 needs torch, triton and numpy in '$(PYTHON)'; leave SYSTEM out to install them" >&2; exit 1; }
	$(PYTHON) -m venv --system-site-packages $(VENV)
	@# $(PYTHON) may itself live in a virtual environment, whose packages venv does not pass on.
	@$(PYTHON) -c 'import sysconfig; print(*{sysconfig.get_path(k) for k in ("purelib", "platlib")}, sep="\n")' \
	  > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"
	grep -vE '^(torch|triton|numpy|cuda|nvidia)\b' constraints.txt > $(VENV)/constraints.txt
else
	@echo "Setting up $(VENV). The largest download is torch: about 3 GB as the CUDA build that pip takes by default on"
	@echo "Linux, about 0.2 GB as the CPU build. For the CPU build, stop here and set PIP_EXTRA_INDEX_URL to the index of the"
	@echo "CPU wheels (PyTorch's page \"Start Locally\" names it), or, if torch is installed already, run make SYSTEM=1."
	$(PYTHON) -m venv $(VENV)
	cp constraints.txt $(VENV)/constraints.txt
endif
	$(PIP) -e '.[fetch,plot,dev]'
ifdef SYSTEM
	@# It may be $(PYTHON)'s already, but then its command is not in $(BIN).
	$(PIP) --ignore-installed --no-deps ruff
endif
	@# A real SentencePiece model to test with; nothing of the package is imported, so its dependencies are not needed.
	$(PIP) --no-deps mistral-common
	@touch $@
