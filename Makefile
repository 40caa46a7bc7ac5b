# Every target does all of its own set-up: a virtual environment in .venv, installed once.
# torch comes first and alone, so that on a machine without a GPU its CPU build can be chosen by
# setting TORCH (for example TORCH="torch==2.13.0").

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
EXTRAS ?= dev
WORKERS ?= 2
ONE_THREAD = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

GPU_OUT ?= runs/gpu

.PHONY: demo test check aot lock bench gpu clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $(STAMP)

# Train dense, static, SET and RigL on real data; table, JSON and picture in runs/.
demo: $(STAMP)
	mkdir -p runs
	$(BIN)/sparsekern train --data digits --json runs/digits.json --picture runs/digits.png

# Everything that needs no GPU: kernels run in Triton's interpreter.
test: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest tests --ignore=tests/aot -n $(WORKERS) --dist worksteal

# Formatting, lint and types.
check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Compile every kernel for sm_80, sm_90 and sm_100, without a GPU, and look at the machine code.
aot: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest tests/aot -n $(WORKERS) --dist worksteal

# Compile them anew and write down what they use: tests/aot/kernels.lock.
lock: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m tests.aot.lock

# Measure this machine; results go to benchmarks/results/cpu/.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.cpu_speed
	$(BIN)/python -m benchmarks.cpu_conv_speed
	$(BIN)/python -m benchmarks.cpu_network_speed
	$(BIN)/python -m benchmarks.cpu_recurrent_speed
	$(BIN)/python -m benchmarks.scale

# Correctness and speed on this machine's GPU. No virtual environment: PYTHON must hold torch and
# triton already. Goes on where it stopped; GPU_OUT=benchmarks/results/NAME feeds the README.
gpu:
	$(PYTHON) -m benchmarks.gpu --out $(GPU_OUT)

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache *.egg-info
