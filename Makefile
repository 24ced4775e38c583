# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv first if it is not there.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-all faults lint bench evidence setup clean

demo: .venv/ready
	$(BIN)/rankwise demo

test: .venv/ready
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/ready
	$(BIN)/python -m pytest

# plants one fault at a time in a copy of the tree and runs the tests that must notice it
faults: .venv/ready
	$(BIN)/python tools/faults.py --json benchmarks/results/faults.json

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/ready
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.evidence_steps

# hours on 2 cores, minutes on a GPU; goes on where it was stopped
evidence: .venv/ready
	$(BIN)/python -m benchmarks.evidence
	$(BIN)/python -m benchmarks.ranks
	$(BIN)/python -m benchmarks.compositions
	$(BIN)/python -m benchmarks.evidence --report

setup: .venv/ready

# torch first and alone: an open range would bring in the build with all of CUDA
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,test,lint]"
	touch .venv/ready

clean:
	rm -rf .venv build runs .pytest_cache
