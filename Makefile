# Two commands for a newcomer: `make demo` and `make test`. Each makes .venv and builds first.

PYTHON ?= python3
comma := ,
BIN := .venv/bin
# Of pyproject.toml, beside the demo's; nvcc from the package index where there is none.
EXTRAS := docs,test,arrow,dask,faiss$(if $(shell command -v nvcc),,$(comma)nvcc)
SOURCES := $(wildcard csrc/*.* csrc/*/*.*)
# The oldest Triton that pyproject.toml allows, which is torch 2.11's; like there, on Linux.
OLD_TRITON := $(if $(filter Linux,$(shell uname -s)),build/triton-3.6.0)
HOST := $(wildcard tests/cuda_host/*.h tests/cuda_host/*.cpp tests/cuda_host/c10/cuda/*.h) \
    $(wildcard bench/gpu/*.cu bench/gpu/*/*.cuh)

# `make gpu` makes no .venv: it uses what is installed beside a CUDA build of torch, and no network.
GPU_PYTHON ?= python3
PART ?=

.PHONY: demo docs test test-more experiments bench bench-check gpu peers sanitize lint format wheel clean

demo: .venv/built
	$(BIN)/python -m dropinf demo

# Two processes, each of which takes whole files: what a file makes for all its tests is made once.
pytest := $(BIN)/python -m pytest -n 2 --dist loadfile

test: .venv/installed lint
	$(pytest)

# The manual, into build/site; a warning is an error. The variable silences the theme's advertisement of its successor.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# The tests that take long and that few changes concern; of nearly every feature `make test` has a quick one.
test-more: .venv/installed $(OLD_TRITON)
	$(pytest) -m more

# All of bench/experiments in tiny sizes, each in about a minute; without --quick they make bench/results/.
EXPERIMENTS := quality mislabeled retrain sources stability spectrum bounds beyond_classification frontier
experiments: .venv/installed
	set -e; for name in $(EXPERIMENTS); do $(BIN)/python bench/experiments/$$name.py --quick; done

bench: .venv/installed
	mkdir -p build
	$(BIN)/python -m pytest bench --benchmark-json=build/bench.json
	$(BIN)/python bench/report.py build/bench.json
	$(BIN)/python bench/bench_host.py --json build/host.json
	$(BIN)/python -m dropinf bench --preset full --out bench/results/microbenchmark

# What became slower since the results that are committed, by ratios; two minutes.
bench-check: .venv/installed
	$(BIN)/python -m dropinf bench --preset quick --out build/microbenchmark/quick \
	    --against bench/results/microbenchmark/quick/results.json

# A Triton beside the one in .venv, for tests/kernels/test_triton_compile.py.
build/triton-%: | .venv/installed
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $@.part triton==$*
	mv $@.part $@

gpu: build/gpu-kernels
	PYTHONPATH=.:bench $(GPU_PYTHON) -m gpu.run $(PART)

build/gpu-kernels: setup.py $(SOURCES)
	DROPINF_CUDA=1 $(GPU_PYTHON) setup.py build_ext --inplace
	ln -sfn ../triton_kernels dropinf/triton_kernels
	mkdir -p build
	touch $@

# Packages that `make bench` and frontier.py then compare with. Bergson and Kronfluence ask for torchvision,
# which does not import beside a CPU build of torch and takes transformers down with it; so: what they
# import, by name, and then they alone.
peers: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt dattri opacus traker \
	    datasets einconv einops jaxtyping ml_dtypes opt_einsum peft petname scipy simple-parsing torchopt
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps bergson kronfluence
	$(BIN)/python -c 'import bergson, dattri.algorithm, kronfluence.analyzer, transformers'

# The CUDA kernels on the host under AddressSanitizer and ThreadSanitizer, and then faults in a copy of
# them, which both must find. The C++ library is loaded first, or exceptions would not be known to
# the sanitizers; reports go past pytest.
HOST_TESTS := $(addprefix tests/ops/test_,sampled_outer.py sampled_embedding.py sampled_conv.py \
    sampled_norm.py gather_grads.py gram.py damped_cholesky.py cholesky_solve.py score_topk.py large_offsets.py)
preloaded = LD_PRELOAD="$$($(CXX) -print-file-name=$(1).so) $$($(CXX) -print-file-name=libstdc++.so.6)"
on_host = $(BIN)/python -m pytest -q --capture=sys -k cuda-host $(HOST_TESTS)

sanitize: .venv/installed
	$(call preloaded,libasan) DROPINF_SANITIZE=address ASAN_OPTIONS=detect_leaks=0 $(on_host)
	$(call preloaded,libtsan) DROPINF_SANITIZE=thread \
	    TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1" $(on_host)
	DROPINF_SANITIZE=planted $(BIN)/python -m pytest -q -m more tests/kernels/test_planted_faults.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(SOURCES) $(HOST)

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(HOST)

# An sdist, and from it a wheel for the Python and the torch of .venv.
wheel: .venv/installed
	rm -f dist/*.tar.gz
	$(BIN)/python setup.py -q sdist --dist-dir dist
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz

clean:
	rm -rf .venv build dist *.egg-info dropinf/_C*.so dropinf/_build_failure.txt \
	    dropinf/triton_kernels

# Without build isolation, so that the extension is built against the torch that is installed.
.venv/built: pyproject.toml setup.py constraints.txt $(SOURCES)
	@echo "Some minutes: torch and the demo's packages go into .venv, and the kernels are built."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade -c constraints.txt setuptools wheel ninja pybind11 torch numpy
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[demo]'
	touch $@

# What all but the demo needs. dropinf is there by now: pip adds the packages of its extras, and builds nothing again.
.venv/installed: .venv/built
	@echo "Some minutes: the packages of tests, manual and worked examples go into .venv."
	$(BIN)/python -m pip install -q -c constraints.txt 'dropinf[$(EXTRAS)]'
	touch $@
