# Every target sets up what it needs in a local virtual environment; a second call only checks
# that nothing changed. The log of the set-up is in $(VENV)/setup.log.

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
# TorchRec asks for a CUDA build of FBGEMM, so it comes without what it asks for.
TORCHREC := fbgemm-gpu-cpu==1.8.0 torchrec==1.8.0 tensordict pyvers pyre-extensions \
	typing-inspect mypy-extensions orjson cloudpickle
BENCH_SUITE ?= quick
BENCH_ARGS ?=
GPU_ARGS ?=
PYTEST_ARGS ?=
export MAX_JOBS ?= 2
# Compiling the CUDA kernels takes minutes and serves nobody on a machine without a GPU;
# AMTL_CUDA=auto or on builds them all the same, and the tests compile them by themselves.
export AMTL_CUDA ?= $(if $(wildcard /dev/nvidia0),auto,off)

PY := $(VENV)/bin/python
# cmake and ninja come with it, and a fresh machine has no others.
export PATH := $(PATH):$(abspath $(VENV))/bin
LOG := $(VENV)/setup.log
QUIET_PIP := $(PY) -m pip install --quiet --disable-pip-version-check
SOURCES := CMakeLists.txt setup.py $(shell find csrc bench/peer -type f -not -name "*.so")
CPP := $(shell find csrc bench/peer examples -name '*.cpp' -o -name '*.c' -o -name '*.h' -o -name '*.cuh' -o -name '*.cu')

define quietly
@$(1) >>$(LOG) 2>&1 || { tail -n 40 $(LOG); echo "The set-up failed; the whole log is $(LOG)."; exit 1; }
endef

.PHONY: demo test soak lint format bench docs gpu wheel clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo "make demo    train on real data, print AUC and memory, write a report and a packed model"
	@echo "make test    the test suite"
	@echo "make soak    all of what the tests sample: walks, damaged files, lookups; an hour and more"
	@echo "make lint    ruff, clang-format, mypy"
	@echo "make bench   the quick benchmark suite"
	@echo "make docs    the documentation, into site/"
	@echo "make gpu     prove and measure on this machine's GPU, ten minutes at a time"
	@echo "make clean   remove builds and the virtual environment"

# What pip does not bring, said before anything is fetched.
define LACKING
import os, shutil, sys, sysconfig
from importlib.util import find_spec
headers = os.path.join(sysconfig.get_path("include"), "Python.h")
lacking = {
    "Python 3.10 or later (PYTHON=... names another)": sys.version_info < (3, 10),
    "the venv of Python (Debian and Ubuntu: python3-venv)": not find_spec("ensurepip"),
    "the headers of Python (python3-dev)": not os.path.exists(headers),
    "a C++17 compiler (g++)": not shutil.which(os.environ.get("CXX", "c++").split()[0]),
}
lacking = [name for name, lacks in lacking.items() if lacks]
sys.exit("The set-up needs " + " and ".join(lacking) + ": install that first." if lacking else 0)
endef
export LACKING

# torch first and pinned: a range would be met by whatever build is newest.
$(VENV)/.torch:
	@command -v "$(PYTHON)" >/dev/null || { echo "There is no $(PYTHON) here: PYTHON=... names another."; exit 1; }
	@$(PYTHON) -c "$$LACKING"
	@echo "Setting up $(VENV): once, a few minutes, and 5 GB where $(TORCH) brings what GPUs need"
	@echo "(TORCH=... names another build) ..."
	@$(PYTHON) -m venv $(VENV)
	$(call quietly,$(QUIET_PIP) --upgrade pip)
	$(call quietly,$(QUIET_PIP) "$(TORCH)" "setuptools>=77" wheel "cmake>=3.25" ninja "pybind11>=2.13")
	@touch $@

$(VENV)/.build: $(VENV)/.torch pyproject.toml $(SOURCES)
	@echo "Building the operators (minutes; $(LOG) tells more) ..."
	$(call quietly,$(QUIET_PIP) --no-build-isolation --no-deps --editable .)
	@touch $@

$(VENV)/.extra-%: $(VENV)/.build pyproject.toml
	@echo "Installing what '$*' needs ..."
	$(call quietly,$(QUIET_PIP) --no-build-isolation --editable ".[$*]")
	@touch $@

demo: $(VENV)/.extra-demo
	@OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/amtl demo

# Not every Python and processor has builds of them.
$(VENV)/.torchrec: $(VENV)/.extra-test
	@$(QUIET_PIP) --no-deps $(TORCHREC) >>$(LOG) 2>&1 || \
		echo "FBGEMM and TorchRec cannot be installed here: tests that need them are skipped."
	@touch $@

test: $(VENV)/.torchrec
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# What `make test` runs a sample of, whole: about an hour and a half on two cores. Hypothesis prints
# how to repeat a failure; damage needs its seed.
SAMPLED = $(shell grep -rl --include='test_*.py' -e mark.every -e AMTL_SOAK -e AMTL_DAMAGE tests)
soak: $(VENV)/.extra-test
	@seed=$$(date +%s); echo "AMTL_DAMAGE_SEED=$$seed"; OMP_NUM_THREADS=1 AMTL_SOAK=1 \
		AMTL_DAMAGE=1500 AMTL_DAMAGE_SEED=$$seed $(PY) -m pytest -n 2 --dist load $(SAMPLED) \
		$(PYTEST_ARGS)

lint: $(VENV)/.extra-demo $(VENV)/.extra-lint
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	@$(PY) -m mypy

format: $(VENV)/.extra-lint
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@$(VENV)/bin/clang-format -i $(CPP)

bench: $(VENV)/.extra-bench
	@$(PY) -m bench run --suite $(BENCH_SUITE) $(BENCH_ARGS)

docs: $(VENV)/.extra-docs
	@$(PY) -m mkdocs build --strict --quiet
	@echo "site/index.html"

gpu:
	@$(PYTHON) -m bench gpu $(GPU_ARGS)

wheel: $(VENV)/.torch
	@$(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist site *.egg-info $(VENV) amtl_kernels/*.so
