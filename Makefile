# Every target is one line of `make help`. `make train` and `make test` set everything up themselves.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Index of PyTorch's wheels, such as https://download.pytorch.org/whl/cpu for those without CUDA; empty: pip's own.
TORCH_INDEX ?=
PIP_INSTALL = $(BIN)/pip install --disable-pip-version-check --constraint constraints.txt
# Most of a test is waiting for something to start; many tests start several ranks themselves.
TEST_WORKERS ?= 2
# Tests must not depend on what else the machine's Python warns about.
export PYTHONWARNINGS := ignore
# Some containers set it. Each of the test workers would then compile every module and rewrite every test, in every run.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup train test test-slow test-slurm test-slurm-slow test-latest lint format parity parity-recompute bench bench-memory bench-plan bench-step bench-generate bench-speculation bench-cache bench-fp8 bench-convert bench-quantised bench-checkpoint bench-faults bench-optimizers gpu-check dryrun clean

help: ## Show this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## Make .venv with everything, tests included (quick when nothing changed)

# What training needs; the stamp of the rest is .ready.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "error: this is Python %d.%d; name one from 3.11 to 3.13, such as PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch from $(or $(TORCH_INDEX),the default index). Without a GPU, CPU wheels may be a smaller download: TORCH_INDEX, see README.md"
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP_INSTALL) --editable .
	@echo "Installed in $(VENV): $$(du -sh $(VENV) | cut -f 1)"
	@touch $@

$(VENV)/.ready: $(VENV)/.installed
	@echo "Installing what tests and conversions are compared with"
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

train: $(VENV)/.installed ## Train a small MoE on real text over 4 ranks (tp=2 pp=2 ep=2) and show that it learned
	$(BIN)/moe-train experiment=tiny_tp2_pp2_ep2 run_dir=runs/make-train resume=never

test: setup ## Run the test suite (its longest cases: make test-slow)
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal -m "not slow and not slurm"

test-slow: setup ## Run the tests that take minutes
	$(BIN)/python -m pytest -q -m "slow and not slurm"

test-slurm: setup ## Train through a private real Slurm (as root; installs it with apt where it is missing)
	MOE_SLURM_INSTALL=1 $(BIN)/python -m pytest -q tests/slurm -m "not slow"

test-slurm-slow: setup ## The same with time limits, crashed nodes and requeues, which take minutes
	MOE_SLURM_INSTALL=1 $(BIN)/python -m pytest -q tests/slurm -m slow

test-latest: ## Run the parity smoke with python3.12 and the newest supported megatron-core
	@py=$$(PYTHON_LATEST="$(PYTHON_LATEST)" bash tests/find_python312.sh) || { echo "no python3.12 found: skipped (set PYTHON_LATEST=/path/to/python3.12)"; exit 0; }; \
	$(MAKE) --no-print-directory test-smoke VENV=.venv-latest PYTHON="$$py"

.PHONY: test-smoke
test-smoke: setup
	$(BIN)/python -c 'from importlib.metadata import version; print("megatron-core", version("megatron-core"), "torch", version("torch"))'
	$(BIN)/python -m pytest -q tests/distributed tests/parallel tests/model tests/checkpoint/test_reshard.py -m "not slow"

lint: setup ## Check style (ruff, shellcheck) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck launch/train.sbatch launch/data.sbatch .ci/run tests/*.sh
	$(BIN)/mypy

format: setup ## Rewrite the code in its style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Those that need more than `make setup` gives come last.
bench: bench-step bench-generate bench-speculation bench-cache bench-checkpoint bench-memory bench-plan bench-fp8 bench-convert bench-quantised bench-faults bench-optimizers ## Run every bench- target, one after the other (hours)

bench-convert: setup ## Measure conversion against cp and transformers (needs mpi4py and mpich); writes bench/results/convert.json
	$(BIN)/python -m bench.bench_convert

bench-quantised: setup ## Measure bits, perplexity and memory of quantised exports; writes bench/results/quantised_exports.json
	$(BIN)/python -m bench.bench_quantised

parity: setup ## Compare losses and gradients of every layout with one rank; writes bench/results/parity.json
	$(BIN)/python -m bench.parity

parity-recompute: setup ## Compare gradients of every layout and recomputation set, bit by bit; writes bench/results/recompute.json
	$(BIN)/python -m bench.recompute

bench-memory: setup ## Compare predicted memory with what runs here keep; writes bench/results/memory.json
	$(BIN)/python -m bench.bench_memory

bench-plan: setup ## Compare predicted with measured step times of small layouts here; writes bench/results/plan.json
	$(BIN)/python -m bench.bench_plan

bench-step: setup ## Compare our training step with that of transformers on this CPU; writes bench/results/step.json
	$(BIN)/python -m bench.bench_step

bench-generate: setup ## Compare our generation with that of transformers on this CPU; writes bench/results/generate.json
	$(BIN)/python -m bench.bench_generate

bench-speculation: setup ## Compare generation with and without speculation; writes bench/results/speculation.json
	$(BIN)/python -m bench.bench_speculation

bench-cache: setup ## Measure what each format of the KV cache costs in perplexity; writes bench/results/cache_formats.json
	$(BIN)/python -m bench.bench_cache

bench-fp8: setup ## Compare losses of emulated FP8 with bf16 over 300 steps; writes bench/results/fp8_loss.json
	$(BIN)/python -m bench.bench_fp8_loss

bench-checkpoint: setup ## Measure how long training waits for a checkpoint; writes bench/results/checkpoint.json
	$(BIN)/python -m bench.bench_checkpoint

bench-faults: setup ## Inject faults into small runs here and see them recover; writes bench/results/faults.json
	$(BIN)/python -m bench.bench_faults

bench-optimizers: setup ## Compare Muon on 12 layouts and with AdamW, and QK-Clip (Python 3.12); writes bench/results/optimizers.json
	$(BIN)/python -m bench.bench_optimizers

gpu-check: setup ## Check training on a GPU against the CPU, predictions and bf16, in under 8 minutes; writes bench/results/gpu_check.json
	$(BIN)/python -m bench.gpu_check

dryrun: setup ## Build all 1,024 distinct ranks of DeepSeek-V3 on 2,048 GPUs and add up their parameters
	$(BIN)/moe-dryrun model=deepseek_v3 parallel=deepseek_v3_h800
	$(BIN)/moe-dryrun model=deepseek_v3 parallel=deepseek_v3_h800 model.mtp_num_layers=0

clean: ## Remove what can be made again (not runs/, and not your own datasets in data/)
	rm -rf .venv .venv-latest data/stdlib-* .pytest_cache .mypy_cache .ruff_cache *.egg-info build
