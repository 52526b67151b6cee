# demo | test | ptx | lint | bench | wheels | gpu | gpu-ablate | ablate. Each installs what it needs into .venv from constraints.txt first.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= benchmarks/out
DEMO := data/demo$(addprefix -,$(DEMO_TRAIN))

.PHONY: demo test test-slow security ptx sanitize lint bench wheels gpu gpu-ablate ablate install matrix wheels-release clean

install: .venv/.installed
.venv/.installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch ninja "setuptools>=77" wheel
	DREAMLIP_NO_CUDA=1 DREAMLIP_REQUIRE_EXTENSION=1 $(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e ".[train,log,recaption,ray,benchmark,dev]"
	touch $@

demo: install
	$(BIN)/dreamlip-train prepare scenes --output $(DEMO)/scenes --num-train $(or $(DEMO_TRAIN),6000) --num-val 200
	$(BIN)/dreamlip-train prepare folder --captions $(DEMO)/scenes/train/captions.csv --images $(DEMO)/scenes/train/images --shard-size 100 --output $(DEMO)/shards/train
	$(BIN)/dreamlip-train prepare folder --captions $(DEMO)/scenes/val/captions.csv --images $(DEMO)/scenes/val/images --masks $(DEMO)/scenes/val/masks --output $(DEMO)/shards/val
	$(BIN)/dreamlip-train train demo --run-dir $(or $(DEMO_RUN),runs/demo) --data.shards $(DEMO)/shards/train --data.val-shards $(DEMO)/shards/val $(DEMO_FLAGS)

# Two processes of one thread each: tests wait a lot, and two that both use all cores would slow each other many times over.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: install
	$(BIN)/python -m pip install -q -c constraints.txt accelerate datasets lightning pandas sentence-transformers  # the integrations extra
	$(BIN)/python -m pytest -m "slow and not gpu"

# Every kernel's compiled code, executed on the CPU (tests/support/ptx); make test runs a part of it.
ptx: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/kernels/ptx -m "not gpu"

# Hostile names, pictures, weights and models: nothing of it runs (SECURITY.md). Part of `make test` too.
security: install
	$(BIN)/python -m pytest tests/security

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
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.* tests/csrc/*.*)
	! grep -nE '.{121}' csrc/* tests/csrc/*
	$(BIN)/python docs/make_api.py --check

bench: install
	mkdir -p $(OUT)
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-group-by=func,param:shape,param:phase --benchmark-columns=median,iqr,rounds --benchmark-json=$(OUT)/benchmarks.json
	$(BIN)/python benchmarks/plot_contrastive.py $(OUT)/benchmarks.json $(OUT)/contrastive.png

# The kernels' tests under every version that the metadata promises; MATRIX="--torch 2.6" for a part of it.
matrix:
	$(PYTHON) release/matrix.py $(MATRIX)

# The source archive, a wheel with the CPU kernels for this Python, and one with the CUDA kernels where nvcc is; tried in new environments.
wheels-release: install
	rm -rf dist
	$(BIN)/python -m pip install -q -c constraints.txt build
	$(BIN)/python -m build -q --sdist --no-isolation
	DREAMLIP_NO_CUDA=1 DREAMLIP_REQUIRE_EXTENSION=1 $(BIN)/python -m pip wheel -q . --no-deps --no-build-isolation -w dist
	if [ -n "$(CUDA_HOME)" ]; then DREAMLIP_LOCAL_VERSION=cuda DREAMLIP_REQUIRE_EXTENSION=1 \
		$(BIN)/python -m pip wheel -q . --no-deps --no-build-isolation -w dist/cuda; fi
	$(BIN)/python release/try_dist.py dist

# For a GPU machine without a package index: what its training benchmarks need beside torch. `make gpu` installs what lies in wheels/.
wheels: install
	$(BIN)/python -m pip download -q -d wheels --no-deps --only-binary=:all: --python-version $(or $(GPU_PYTHON),3.12) -c constraints.txt \
		open_clip_torch ftfy regex wcwidth webdataset braceexpand simplejpeg inf-cl

# On a machine with a CUDA device: everything this repository can say about it, into files under OUT.
gpu:
	mkdir -p $(OUT)
	if [ -d wheels ]; then python3 -m pip install -q --no-index --no-deps wheels/*.whl; fi
	python3 setup.py build_ext --inplace 2>&1 | tail -n 40 | tee $(OUT)/build.txt
	timeout -s INT -k 15 130 python3 -m pytest tests/kernels/test_*_gpu.py -m gpu 2>&1 | tee $(OUT)/tests.txt
	timeout -s INT -k 15 40 python3 -m pytest tests/train/*/test_*_gpu.py -m gpu 2>&1 | tee $(OUT)/tests_train.txt
	for name in contrastive:110 grouping:30 train_step:70 pipeline:15; do \
		timeout 170 python3 -m pytest benchmarks/bench_$${name%:*}.py --budget $${name#*:} --benchmark-only --benchmark-json=$(OUT)/$${name%:*}.json 2>&1 | tee $(OUT)/$${name%:*}.txt; done
	-python3 benchmarks/plot_contrastive.py $(OUT)/contrastive.json $(OUT)/contrastive.png
	for tool in memcheck racecheck; do \
		timeout -k 5 30 compute-sanitizer --tool $$tool --error-exitcode 9 python3 -m pytest tests/kernels/test_*_gpu.py -m sanitizer -x > $(OUT)/$$tool.txt 2>&1; echo "$$tool: $$?"; done

# The paper's ablations on the built-in scenes: a night on two CPU cores; eight runs at a time on a machine with a GPU.
ablate: install
	$(BIN)/dreamlip-train ablate --output $(or $(ABLATION),runs/ablation) --jobs 2 $(ABLATE_FLAGS)

gpu-ablate:
	python3 -m dreamlip_train ablate --output $(OUT)/ablation --jobs 8 --seeds 2 --steps 300 $(ABLATE_FLAGS)

clean:
	rm -rf .venv build dist *.egg-info data runs
