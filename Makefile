# Two commands for a newcomer: `make demo` and `make test`. Each makes .venv and builds first.

PYTHON ?= python3
comma := ,
BIN := .venv/bin
# nvcc from the package index where there is none.
EXTRAS := demo,test$(if $(shell command -v nvcc),,$(comma)nvcc)
SOURCES := $(wildcard csrc/*.* csrc/*/*.*)
HOST := $(wildcard tests/cuda_host/*.h tests/cuda_host/*.cpp tests/cuda_host/c10/cuda/*.h)

.PHONY: demo test bench peers sanitize lint format clean

demo: .venv/installed
	$(BIN)/python -m dropinf demo

test: .venv/installed lint
	$(BIN)/python -m pytest

bench: .venv/installed
	mkdir -p build
	$(BIN)/python -m pytest bench --benchmark-json=build/bench.json
	$(BIN)/python bench/report.py build/bench.json

# Packages that `make bench` then compares with. Bergson asks for torchvision, which does not import
# beside a CPU build of torch and takes transformers down with it; so: what Bergson imports, by name,
# and then Bergson alone.
peers: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt dattri \
	    datasets jaxtyping ml_dtypes peft petname scipy simple-parsing torchopt
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps bergson
	$(BIN)/python -c 'import bergson, dattri.algorithm, transformers'

# The CUDA kernels on the host under AddressSanitizer and ThreadSanitizer, and faults that they must see.
HOST_TESTS := tests/test_sampled_outer.py tests/test_sampled_embedding.py tests/test_sampled_conv.py \
    tests/test_gather_grads.py tests/test_gram.py tests/test_damped_cholesky.py \
    tests/test_cholesky_solve.py tests/test_score_topk.py
runtime = LD_PRELOAD=$$($(CXX) -print-file-name=$(1).so) DROPINF_SANITIZE=$(2)

sanitize: .venv/installed
	$(call runtime,libasan,address) ASAN_OPTIONS=detect_leaks=0 \
	    $(BIN)/python -m pytest -q -k cuda-host $(HOST_TESTS)
	$(call runtime,libtsan,thread) TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1" \
	    $(BIN)/python -m pytest -q -k cuda-host $(HOST_TESTS)
	DROPINF_SANITIZE=planted $(BIN)/python -m pytest -q tests/test_planted_faults.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(SOURCES) $(HOST)

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(HOST)

clean:
	rm -rf .venv build *.egg-info dropinf/_C*.so dropinf/_build_failure.txt

# Without build isolation, so that the extension is built against the torch that is installed.
.venv/installed: pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade -c constraints.txt setuptools wheel ninja pybind11 torch numpy
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@
