PYTHON ?= python3
VENV := .venv

.PHONY: demo test test-all test-faults lint docs libtpu gpu-compiler

# Trains on the embedded cartoon faces and leaves pictures in logs/faces.
# Large pages (glibc 2.35 or later) spare a CPU some of the step's time.
demo: $(VENV)/installed
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
	  $(VENV)/bin/python main.py --config=configs/faces.py --workdir=logs/faces

# A file's tests share what they set up, so each file goes to one worker;
# tests/conftest.py puts the long ones first.
PYTEST = $(VENV)/bin/python -m pytest --numprocesses=2 --dist=loadfile \
  --no-loadscope-reorder

# About 10 minutes on two cores.
test: $(VENV)/installed-for-tests
	$(PYTEST)

# The slow tests too: about 50 minutes.
test-all: $(VENV)/installed-for-tests
	$(PYTEST) -m 'not faults'

# Kills, stops and starves runs, and gives them damaged files; ends with a
# table. As root it also fills a disk. Takes minutes.
test-faults: $(VENV)/installed-for-tests
	XLA_FLAGS= $(VENV)/bin/python -m pytest -m faults

# The compiler for TPUs, in the version that JAX asks for, for
# benchmarks/tpu_compile.py and its test. In a folder of its own: beside JAX it
# would have each start look for a TPU.
libtpu: .libtpu/installed

.libtpu/installed: $(VENV)/installed
	@echo 'Installing libtpu (700 MB) …'
	$(VENV)/bin/python -m pip install --quiet --no-deps --upgrade \
	  --target=.libtpu "$$($(VENV)/bin/python -c "import importlib.metadata; \
	  print(next(r.split(';')[0] for r in importlib.metadata.requires('jax') \
	  if r.startswith('libtpu')))")"
	touch $@

# JAX's plugin for CUDA, in JAX's version, for benchmarks/gpu_compile.py and its
# test: it compiles where there is no GPU, and no library of CUDA's.
gpu-compiler: .gpu_compiler/installed

.gpu_compiler/installed: $(VENV)/installed
	@echo 'Installing the compiler for GPUs (400 MB) …'
	version=$$($(VENV)/bin/python -c 'import jax; print(jax.__version__)') \
	  && $(VENV)/bin/python -m pip install --quiet --no-deps --upgrade \
	  --target=.gpu_compiler jax-cuda13-plugin==$$version \
	  jax-cuda13-pjrt==$$version
	touch $@

# The documentation as a site, in .site; its links are checked.
docs: $(VENV)/installed-for-docs
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 \
	  $(VENV)/bin/mkdocs build --strict --quiet
	@ls .site/assets/stylesheets/main.*.css > /dev/null  # The theme's.
	@echo 'The site is .site/index.html.'

lint: $(VENV)/installed-for-tests
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/python -m mypy

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo 'Needs Python 3.11 to 3.13: make demo PYTHON=python3.11' >&2; \
	  exit 1; }
	@echo 'Installing (2.6 GB) …'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-for-docs: $(VENV)/installed docs/requirements.txt
	$(VENV)/bin/python -m pip install --quiet -r docs/requirements.txt
	touch $@

$(VENV)/installed-for-tests: $(VENV)/installed tests/requirements.txt
	@echo 'Installing the requirements of the tests …'
	$(VENV)/bin/python -m pip install --quiet -r tests/requirements.txt
	touch $@
