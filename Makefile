# Set-up and every task of the project. `make quickstart` and `make test` work on a fresh machine
# that has Python >= 3.11 (with venv) and a package index.
#
#   make quickstart                 install, then train the MoE and its dense twin on real text
#   make reproduce                  claims of papers, each brought to a verdict: hours, resumable
#   make test                       install the test extra, then ruff, mypy and every unmarked test
#   make test PYTHON=python3.12     the same in an environment of that interpreter's own
#   make test-fast                  the tests of routing, dispatch and layers, for after each edit: 2 minutes
#   make test-first-losses          the first 20 losses of small runs against those recorded
#   make test-slow                  the tests marked `slow` (100 random kills, KILLS=10 for fewer; two trainers)
#   make test-layouts               every mesh, transport, router and dispatch against the serial layer
#   make test-routers                every router class trains a small model on real text
#   make test-all-routers            every entry of the catalogue does
#   make test-parity                transformers' routers and models computed anew, against the committed files
#   make test-huggingface           200 random checkpoints of all families against transformers 5 and 4.57
#   make test-tpu                   programs for TPUs, compiled by libtpu on this machine
#   make test-gpu                   programs for NVIDIA GPUs, compiled by XLA's plugin on this machine
#   make test-pods                  published giants, compiled for their machines, against their budgets
#   make test-browser               reports in a headless browser, which it installs on Debian
#   make test-wheel                 the built wheel and examples/my_project in an environment of their own
#   make install EXTRA=gpu          an environment for NVIDIA GPUs (EXTRA=tpu: for TPUs)
#   make install-gpu-compiler       .venv-gpu, which compiles for NVIDIA GPUs where there is none

PYTHON ?= python3
EXTRA ?=
WORKDIR ?= runs/quickstart
# One environment per interpreter, so that PYTHON=python3.12 never reuses another's.
VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
# A constraints file pins every version and leaves the choice of extras to setup.py.
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint requirements.lock
# What moe_jax/huge_pages.py would start its scripts again for.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# Files are given out in the order of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: install install-test install-gpu-compiler quickstart reproduce test test-fast test-first-losses test-slow test-layouts test-routers test-all-routers test-parity test-huggingface test-tpu test-gpu test-pods test-browser test-wheel lint lock clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "PYTHON=$(PYTHON) does not run or is older than Python 3.11; name one that does: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps keep a second `make` from asking the package index again.
$(VENV)/.installed$(if $(EXTRA),-$(EXTRA)): setup.py requirements.lock | $(BIN)/python
	$(PIP) --editable .$(if $(EXTRA),[$(EXTRA)])
	@touch $@

$(VENV)/.installed-test: setup.py requirements.lock | $(BIN)/python
	$(PIP) --editable .[test]
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed$(if $(EXTRA),-$(EXTRA))

install-test: $(VENV)/.installed-test

# An environment of its own, because where no GPU is, JAX complains of the plugin at every start. What it
# does not have it takes from $(VENV).
$(VENV)-gpu/.installed: setup.py requirements.lock $(VENV)/.installed-test
	$(BIN)/python -m venv --without-pip $(VENV)-gpu
	$(BIN)/python -c 'import pathlib, sysconfig; ours = sysconfig.get_path("purelib"); \
	  (next(pathlib.Path("$(VENV)-gpu").glob("lib/python*/site-packages")) / "ours.pth").write_text( \
	  f"import site; site.addsitedir({ours!r})\n")'
	$(BIN)/pip --python $(VENV)-gpu/bin/python --disable-pip-version-check install --quiet \
	  --constraint requirements.lock --editable .[gpu-compiler]
	@touch $@

install-gpu-compiler: $(VENV)-gpu/.installed

quickstart: install
	$(BIN)/python experiments/quickstart.py --workdir=$(WORKDIR)

# Both can be interrupted; prepared datasets are kept, and so are finished runs.
reproduce: install
	$(foreach dataset,debian_text fashion_mnist glyphs,$(BIN)/python experiments/prepare_data.py --dataset=$(dataset) &&) true
	$(BIN)/python experiments/reproduce.py

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST) --ignore=tests/first_losses

# Without what runs one layer on many meshes.
test-fast: install-test
	$(PYTEST) tests/layers tests/dispatch tests/routing tests/test_special_functions.py \
	  --ignore=tests/layers/test_layouts.py --ignore=tests/layers/test_moe_routers.py --ignore=tests/layers/test_moe_communication.py \
	  --deselect=tests/layers/test_feed_forward.py::test_experts_follow_the_formula_on_every_mesh

# Compiled as users compile: the tests' settings would change the last bits.
test-first-losses: install-test
	$(BIN)/python -m pytest tests/first_losses

test-slow: install-test
	$(BIN)/python -m pytest -m slow

test-layouts: install-test
	$(BIN)/python -m pytest -n 2 -m "layouts or not layouts" tests/layers/test_layouts.py

test-routers: install-test
	# At LLVM's level 1 these runs compile faster and step as fast: 97 s instead of 117 s for three.
	XLA_FLAGS=--xla_backend_optimization_level=1 $(BIN)/python -m pytest -n 2 -m "routers and not all_routers"

test-all-routers: install-test
	XLA_FLAGS=--xla_backend_optimization_level=1 $(BIN)/python -m pytest -n 2 -m routers

# PyTorch's own index has CPU builds, which are smaller; pip finds it where PIP_EXTRA_INDEX_URL names it.
test-parity: install-test
	$(PIP) --editable .[parity]
	$(BIN)/python tests/parity/generate.py --check
	$(BIN)/python tests/parity/models/generate.py --check
	$(BIN)/python tests/parity/models/load_ours.py
	$(BIN)/python -m tests.huggingface.generated --check
	$(BIN)/python -m tests.huggingface.compare --first=180 --cases=20

# transformers 4 needs older libraries than those of requirements.lock, so it has an environment of its own.
.venv-transformers4/.installed: setup.py
	$(PYTHON) -m venv .venv-transformers4
	.venv-transformers4/bin/pip --disable-pip-version-check install --quiet --editable .[transformers4]
	@touch $@

test-huggingface: install-test .venv-transformers4/.installed
	$(PIP) --editable .[parity]
	$(BIN)/python -m tests.huggingface.generated --check
	$(BIN)/python -m tests.huggingface.compare --old=.venv-transformers4/bin/python --check
	$(BIN)/python -m tests.huggingface.irrelevant

# libtpu is a compiler for TPUs that needs none, but exists for one platform only.
test-tpu: install-test
ifeq ($(shell uname -sm),Linux x86_64)
	$(MAKE) install EXTRA=tpu
	$(BIN)/python -m pytest -m tpu tests/tpu tests/pods
else
	@echo "make test-tpu needs libtpu, which exists for Linux on x86_64 only; nothing was tested."
endif

# Other packages of NVIDIA than the assembler's would hide that something needs them.
test-gpu: install-gpu-compiler
ifeq ($(shell uname -s),Linux)
	@! find $(VENV)/lib $(VENV)-gpu/lib -maxdepth 3 -name 'nvidia_*-info' ! -name 'nvidia_cuda_nvcc_*' | grep . \
	  || { echo "make test-gpu compiles without CUDA's libraries, but these packages are installed"; exit 1; }
	$(VENV)-gpu/bin/python -m pytest -n 2 --dist loadfile -m gpu tests/gpu tests/pods
else
	@echo "make test-gpu needs XLA's plugin for CUDA, which exists for Linux only; nothing was tested."
endif

test-pods: install-test
ifeq ($(shell uname -sm),Linux x86_64)
	$(MAKE) install EXTRA=tpu
	$(BIN)/python -m pytest -n 2 -m pods tests/pods
else
	@echo "make test-pods needs libtpu, which exists for Linux on x86_64 only; nothing was tested."
endif

# The built wheel and the example project in an environment of their own, without the checkout.
test-wheel:
	rm -rf .venv-wheel build && $(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir .venv-wheel/dist .
	cp -r examples/my_project .venv-wheel/my_project
	.venv-wheel/bin/pip --disable-pip-version-check install --quiet --constraint requirements.lock \
	  "$$(ls .venv-wheel/dist/*.whl)[notebooks]" ".venv-wheel/my_project[test]"
	cd .venv-wheel/my_project && ../bin/python -m pytest -q tests
	cd .venv-wheel/my_project && ../bin/jupyter execute notebook.ipynb

# Debian's browser and its driver, where they are missing and this user may install them.
test-browser: install-test
	{ command -v chromium && command -v chromedriver; } >/dev/null \
	  || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; } \
	  || { echo "make test-browser needs chromium and chromedriver; install Debian's chromium and chromium-driver"; exit 1; }
	$(PIP) --editable .[browser]
	$(BIN)/python -m pytest -m browser tests/browser

lock:
	uv pip compile setup.py --extra test --extra browser --extra notebooks --extra vowels --extra gpu --extra tpu --extra gcs --universal --python-version 3.11 --upgrade \
	  --no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock" --output-file requirements.lock

clean:
	rm -rf .venv .venv-* .jax_cache .pytest_cache .mypy_cache .ruff_cache *.egg-info
