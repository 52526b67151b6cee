# demo | test | ptx | lint | bench | wheels | gpu (gpu-test, gpu-contrast, gpu-rest) | gpu-ablate | ablate. Each installs what it needs into .venv from constraints.txt first.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= benchmarks/out
DEMO := data/demo$(addprefix -,$(DEMO_TRAIN))

.PHONY: demo test test-slow security ptx sanitize lint bench wheels gpu gpu-build gpu-test gpu-contrast gpu-rest gpu-ablate ablate install install-train matrix wheels-release clean

# What the trainer needs, without compiling anything: files are compiled as they are imported, C++ with the rest below.
install-train: .venv/.train
.venv/.train: pyproject.toml constraints.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt torch "setuptools>=77" wheel
	DREAMLIP_NO_EXTENSION=1 $(BIN)/python -m pip install -q --no-compile --no-build-isolation -c constraints.txt -e ".[train]"
	touch $@

install: .venv/.installed
.venv/.installed: .venv/.train $(wildcard csrc/*)
	$(BIN)/python -m pip install -q -c constraints.txt ninja
	DREAMLIP_NO_CUDA=1 DREAMLIP_REQUIRE_EXTENSION=1 $(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e ".[train,log,recaption,ray,hub,benchmark,dev]"
	touch $@

demo: install-train
	$(BIN)/dreamlip-train prepare scenes --output $(DEMO)/scenes --num-train $(or $(DEMO_TRAIN),4000) --num-val 200
	$(BIN)/dreamlip-train prepare folder --captions $(DEMO)/scenes/train/captions.csv --images $(DEMO)/scenes/train/images --shard-size 100 --output $(DEMO)/shards/train
	$(BIN)/dreamlip-train prepare folder --captions $(DEMO)/scenes/val/captions.csv --images $(DEMO)/scenes/val/images --masks $(DEMO)/scenes/val/masks --output $(DEMO)/shards/val
	$(BIN)/dreamlip-train train demo --run-dir $(or $(DEMO_RUN),runs/demo) --data.shards $(DEMO)/shards/train --data.val-shards $(DEMO)/shards/val $(DEMO_FLAGS)

# Three processes of one thread each for two cores: tests wait for children, servers and disks a quarter of their time,
# and processes that each use all cores would slow one another many times over. Bytecode is written, also where the
# environment says otherwise: each of the many processes that tests start would compile the package again.
test: install
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-slow: install
	$(BIN)/python -m pip install -q -c constraints.txt accelerate datasets lightning pandas sentence-transformers  # the integrations extra
	$(BIN)/python -m pytest -m "slow and not gpu"

# Every kernel's compiled code, executed on the CPU (tests/support/ptx), and compiled for every architecture: no spills,
# tensor cores, shared memory in bounds. make test runs a part of both.
ptx: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/kernels/ptx tests/kernels/test_compile_only.py -m "not gpu"

# Hostile names, pictures, weights and models: nothing of it runs (SECURITY.md). Part of `make test` too.
security: install
	$(BIN)/python -m pytest tests/security tests/train/checkpoint/test_torchscript.py

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, each instruction set.
TORCH = $(shell $(BIN)/python -c "import torch, pathlib; print(pathlib.Path(torch.__file__).parent)")
sanitize: install
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover -Wno-psabi -Icsrc -isystem $(TORCH)/include -isystem $(TORCH)/include/torch/csrc/api/include \
		tests/csrc/sanitize.cpp csrc/patch_pool_cpu.cpp -o build/sanitize -L$(TORCH)/lib -Wl,-rpath,$(TORCH)/lib -lc10 -ltorch_cpu -ltorch
	for capability in default avx2 avx512; do ATEN_CPU_CAPABILITY=$$capability ASAN_OPTIONS=detect_leaks=0 build/sanitize || exit 1; done

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.* tests/csrc/*.*)
	! grep -nE '.{121}' csrc/* tests/csrc/*
	$(BIN)/python docs/make_api.py --check
	$(BIN)/python docs/check_pages.py

# PEER=my_loss.py:my_loss adds a loss of your own (docs/extending.md).
bench: install
	mkdir -p $(OUT)
	$(BIN)/python -m pytest benchmarks $(addprefix --peer ,$(PEER)) --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-json=$(OUT)/benchmarks.json
	$(BIN)/python benchmarks/plot_contrastive.py $(OUT)/benchmarks.json $(OUT)/contrastive.png

# The kernels' tests under every version that the metadata promises; MATRIX="--torch 2.6" for a part of it.
matrix:
	$(PYTHON) release/matrix.py $(MATRIX)

# The source archive, a wheel with the CPU kernels for this Python, and one with the CUDA kernels where nvcc is; tried in
# new environments. What an older checkout left in build/ would be packed too.
wheels-release: install
	rm -rf dist build/lib* build/bdist* build/temp*
	$(BIN)/python -m pip install -q -c constraints.txt build
	$(BIN)/python -m build -q --sdist --no-isolation
	DREAMLIP_NO_CUDA=1 DREAMLIP_REQUIRE_EXTENSION=1 $(BIN)/python -m pip wheel -q . --no-deps --no-build-isolation -w dist
	if [ -n "$(CUDA_HOME)" ]; then DREAMLIP_LOCAL_VERSION=cuda DREAMLIP_REQUIRE_EXTENSION=1 \
		$(BIN)/python -m pip wheel -q . --no-deps --no-build-isolation -w dist/cuda; fi
	$(BIN)/python release/try_dist.py dist

# For a GPU machine without a package index: what its benchmarks, and an ablation, need beside torch. The gpu targets
# install what lies in wheels/. DeepSpeed has no wheel to download; what is built here holds for every Python.
wheels: install
	$(BIN)/python -m pip download -q -d wheels --no-deps --only-binary=:all: --python-version $(or $(GPU_PYTHON),3.12) -c constraints.txt \
		open_clip_torch ftfy regex wcwidth webdataset braceexpand simplejpeg inf-cl pytest-xdist execnet \
		tyro docstring_parser typeguard hjson msgpack py-cpuinfo py-cpuinfo2 pydantic pydantic_core annotated-types typing-inspection einops \
		torchvision duckdb pyarrow pillow rich markdown-it-py mdurl pygments \
		matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil tzdata packaging memeff siglip-kernel \
		timm safetensors huggingface-hub click hf-xet httpx2 httpcore2 h11 anyio idna truststore pyyaml tqdm psutil pytest pytest-benchmark pytest-timeout iniconfig pluggy
	DS_BUILD_OPS=0 $(BIN)/python -m pip wheel -q -w wheels --no-deps --no-build-isolation -c constraints.txt deepspeed

# On a machine with a CUDA device: everything this repository can say about it, into OUT. Each target ends inside nine
# minutes, and every step within its seconds; OUT/log.txt and OUT.tar are complete after each, whenever the machine goes.
STEP := OUT=$(OUT) bash benchmarks/step.sh
PYTEST_GPU := python3 -m pytest -m gpu -n 12

gpu: gpu-test gpu-contrast gpu-rest

gpu-build:
	if [ -d wheels ]; then $(STEP) wheels 60 python3 -m pip install -q --no-index --no-deps wheels/*.whl; fi
	$(STEP) build 140 python3 setup.py build_ext --inplace

# CUDA's tests first: Triton compiles for minutes.
gpu-test: gpu-build
	-$(STEP) tests_cuda 110 $(PYTEST_GPU) tests/kernels/*/test_*_gpu.py -k cuda
	-$(STEP) tests_triton 180 $(PYTEST_GPU) tests/kernels/*/test_*_gpu.py -k "not cuda"
	-$(STEP) tests_train 50 python3 -m pytest -m gpu tests/train/*/test_*_gpu.py
	! grep '^=== .* failed' $(OUT)/log.txt

gpu-contrast: gpu-build
	-$(STEP) contrastive_on_device 70 python3 benchmarks/contrastive_on_device.py --profile
	-$(STEP) contrastive 120 python3 -m pytest benchmarks/bench_contrastive.py --budget 80 --benchmark-only --benchmark-json=$(OUT)/contrastive.json
	-python3 benchmarks/plot_contrastive.py $(OUT)/contrastive.json $(OUT)/contrastive.png
	-$(STEP) tune_float16 100 python3 benchmarks/tune_contrastive.py --dtype float16
	-$(STEP) tune_float32 70 python3 benchmarks/tune_contrastive.py --dtype float32
	! grep '^=== .* failed' $(OUT)/log.txt

# The sanitizers watch kernels that are compiled already: their seconds are not for a compiler.
gpu-rest: gpu-build
	for name in grouping:30 sigmoid:15 train_step:40 pipeline:15; do \
		$(STEP) $${name%:*} $$(($${name#*:} + 20)) python3 -m pytest benchmarks/bench_$${name%:*}.py --budget $${name#*:} --benchmark-only --benchmark-json=$(OUT)/$${name%:*}.json; done; true
	-$(STEP) small_tests 60 python3 -m pytest tests/kernels/*/test_*_gpu.py -m sanitizer -n 12
	-for tool in memcheck racecheck; do \
		$(STEP) $$tool 65 compute-sanitizer --tool $$tool --error-exitcode 9 python3 -m pytest tests/kernels/*/test_*_gpu.py -m sanitizer -x; done
	! grep '^=== .* failed' $(OUT)/log.txt

# The paper's ablations on the built-in scenes: a night on two CPU cores; eight runs at a time on a machine with a GPU.
ablate: install
	$(BIN)/dreamlip-train ablate --output $(or $(ABLATION),runs/ablation) --jobs 2 $(ABLATE_FLAGS)

# Says what the machine lacks before it begins; `make wheels` brings most of it.
gpu-ablate:
	if [ -d wheels ]; then $(STEP) wheels 60 python3 -m pip install -q --no-index --no-deps wheels/*.whl; fi
	python3 -c "import importlib.util as u, sys; \
		need = 'torch torchvision numpy deepspeed tyro rich duckdb pyarrow PIL matplotlib open_clip webdataset simplejpeg'.split(); \
		lacks = [name for name in need if u.find_spec(name) is None]; \
		sys.exit(f'gpu-ablate needs {lacks}, which are not installed: put their wheels into wheels/ (make wheels)' if lacks else 0)"
	python3 -m dreamlip_train ablate --output $(OUT)/ablation --jobs 8 --seeds 2 --steps 300 $(ABLATE_FLAGS)

clean:
	rm -rf .venv build dist *.egg-info data runs
