# Everything runs from here on a Linux machine with Rust (Cargo.toml says which), Python >= 3.10, a C compiler and make.
#
#   make demo                trains a model that does not fit its budgets, and compares it with a run that fits
#   make test                every test; in parts: make test-rust, make test-python
#   make test-fast           the Python tests in host memory, without the slow ones: some minutes on two cores
#   make test-rust ARGS=...  only these, such as ARGS="--lib policy::" or ARGS="--test store"
#   make test-python ARGS=.. only these, such as ARGS="-k clip" or ARGS=tests/python/gradients/test_clipping.py
#   make test-hangs          close, unwrap, exit, fork and signal handlers beside each kind of wait
#   make memcheck            unit tests of memory, pools and I/O under valgrind; needs valgrind
#   make fmt                 formats Rust and Python
#   make lint                every check of style, types and spelling; in parts: lint-rust lint-python lint-text
#   make docs                the pages of docs/ and an API reference as a site in target/site
#   make deny                licences and security advisories of the crates; needs cargo-deny
#   make wheel wheel-test    a wheel for PyPI in dist/, then the same wheel tried in an environment of its own; make sdist
#   make test-integrations   Hugging Face's Trainer, accelerate, TRL, PEFT and Lightning, in their newest and their oldest supported versions
#   make bench gpu-test bench-gpu soak test-oldest clean
#
# Options:
#   PYTHON=python3.12        the interpreter that .venv is made from
#   VENV=system              use PYTHON as it is, with torch, maturin, pytest, ... installed there; nothing is installed
#   PROFILE=dev              builds with the checks of debug builds, and sooner; the default is release
#   PIP_ARGS=...             more options for pip, such as an index of CPU-only torch wheels
#   DEMO_ARGS=...            options of examples/demo.py, such as "--steps 20"; also GPU_TEST_ARGS, SOAK_ARGS, BENCH_GPU_ARGS

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
CARGO ?= cargo
PROFILE ?= release
PIP_ARGS ?=
DEMO_ARGS ?=
ARGS ?=
GPU_TEST_ARGS ?=
SOAK_ARGS ?=
BENCH_GPU_ARGS ?=
SIM_SEEDS ?= 100000
# processes that share the Python tests; on two processors, two of them work where others wait for a disk or a child
TEST_JOBS ?= 4

STAMPS := target/make
LOCK := requirements-dev.lock

ifeq ($(VENV),system)
PY := $(PYTHON)
ENVIRONMENT := $(STAMPS)/system-python
BUILT := $(STAMPS)/package-system-$(PROFILE)
export PYTHONPATH := python$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.installed
BUILT := $(STAMPS)/package-$(PROFILE)
endif

# What the extension module is made of; Python files need no build.
SOURCES := Cargo.toml Cargo.lock pyproject.toml $(shell find src kernels -type f 2>/dev/null | sort)

# The oldest Rust that builds this.
RUST := $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

say = @printf '\033[1m==> %s\033[0m\n' "$(1)"

.PHONY: help demo test test-rust test-python test-fast test-hangs test-oldest test-integrations fmt lint lint-rust lint-python lint-text deny bench
.PHONY: memcheck wheel wheel-test sdist docs gpu-test bench-gpu soak package clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

## What has to be there -----------------------------------------------------------------------------------------------

.PHONY: need-rust need-python
need-rust:
	@command -v $(CARGO) >/dev/null || { echo "error: cargo is not installed, and funicular is built with Rust $(RUST) or newer. Install Rust from https://rustup.rs, open a new shell, run make again." >&2; exit 1; }
	@found=$$($(CARGO) --version) || { echo "error: $(CARGO) --version failed; its message is above. rust-toolchain.toml names the toolchain; to install it: rustup toolchain install stable" >&2; exit 1; }; \
	    found=$$(echo "$$found" | cut -d' ' -f2); oldest=$$(printf '%s\n' "$(RUST)" "$${found%%-*}" | sort -V | head -n1); [ "$$oldest" = "$(RUST)" ] \
	    || { echo "error: cargo $$found is too old; funicular is built with Rust $(RUST) or newer. With rustup: rustup update stable. Without: install Rust from https://rustup.rs." >&2; exit 1; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || { echo "error: no C compiler; Rust needs one to link. Install one (Debian, Ubuntu: apt install gcc) and run make again." >&2; exit 1; }

need-python:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not installed. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $$($(PYTHON) -V) is too old; Python 3.10 or newer is needed. Name one: make PYTHON=/path/to/python3" >&2; exit 1; }

# uv installs what a lock file names in a fraction of pip's time. It reads neither pip's options nor its configuration, so where these name an
# index, and where uv cannot be had or fails, pip does it. Bytecode is made here: made by an import amid a test, its warnings would be errors.
install_quickly = { [ -z "$(PIP_ARGS)" ] && ! $1/bin/python -m pip config list | grep index >/dev/null \
    && $1/bin/python -m pip install --disable-pip-version-check --quiet "$$(grep '^uv==' $(LOCK))" \
    && UV_HTTP_TIMEOUT=180 $1/bin/uv pip install --python $1/bin/python --compile-bytecode -r $2; }

# The virtual environment: made again from nothing when it is broken, brought up to date when the lock file changes. Rust is
# checked first: without it the 5 GB would be installed in vain.
$(VENV)/.installed: $(LOCK) | need-rust need-python
	$(call say,Python environment in $(VENV) from $(LOCK) (about 5 GB with torch; a minute or several the first time))
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) has no venv module. Install it (Debian, Ubuntu: apt install python3-venv), or use an environment of your own: make VENV=system PYTHON=/path/to/python3" >&2; exit 1; }
	@[ ! -e $(VENV) ] || [ -e $(VENV)/pyvenv.cfg ] || { echo "error: $(VENV) exists and is not a virtual environment. Move it away, or name another folder: make VENV=/path/to/folder" >&2; exit 1; }
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(call install_quickly,$(VENV),$(LOCK)) \
	    || $(VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) -r $(LOCK) \
	    || { echo "error: installing the packages failed; pip's message is above. Without access to PyPI, use an environment of your own: make VENV=system PYTHON=/path/to/python3" >&2; exit 1; }
	@touch $@

$(STAMPS)/system-python: | need-rust need-python
	@$(PYTHON) -c 'import torch' 2>/dev/null || { echo "error: VENV=system, but $(PYTHON) cannot import torch. Install torch >= 2.4 there, or leave out VENV=system." >&2; exit 1; }
	@mkdir -p $(@D) && touch $@

# The extension module and the package, installed so that edits of Python files count at once.
$(STAMPS)/package-$(PROFILE): $(SOURCES) $(VENV)/.installed | need-rust
	$(call say,building funicular ($(PROFILE)))
	@PIP_QUIET=1 VIRTUAL_ENV=$(abspath $(VENV)) PATH="$(abspath $(VENV))/bin:$$PATH" maturin develop --profile $(PROFILE) --locked
	@mkdir -p $(@D) && rm -f $(STAMPS)/package-* && touch $@

# With the system's Python nothing is installed: the module is built by cargo and put beside the package's Python files.
$(STAMPS)/package-system-$(PROFILE): $(SOURCES) $(STAMPS)/system-python | need-rust
	$(call say,building funicular ($(PROFILE)) beside python/funicular)
	@PYO3_BUILD_EXTENSION_MODULE=1 PYO3_PYTHON=$$(command -v $(PYTHON)) $(CARGO) build --profile $(PROFILE) --locked --package funicular-python
	@cp target/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))/libfunicular_python.so python/funicular/_core.abi3.so
	@rm -f $(STAMPS)/package-* && touch $@

package: $(BUILT)

# Unit tests have the library compiled once more, and LLVM takes four fifths of that time to optimize: plain, they run a little longer. All other
# tests share the library with the extension module.
UNIT_TESTS := --lib --config profile.test.package.funicular.opt-level=0
OTHER_TESTS := --bins --test '*'

## What to run --------------------------------------------------------------------------------------------------------

demo: package
	@$(PY) examples/demo.py $(DEMO_ARGS)

test: test-rust test-python

ifeq ($(ARGS),)
test-rust: need-rust
	$(call say,Rust tests)
	@$(CARGO) test --locked $(OTHER_TESTS)
	@$(CARGO) test --locked $(UNIT_TESTS)
	@$(CARGO) test --locked --doc
else
test-rust: need-rust
	$(call say,Rust tests)
	@$(CARGO) test --locked $(ARGS)
endif

# The files with tests that judge by times: to collect all takes ten seconds.
TIMING = $(shell grep -rl "mark\.timing" tests/python --include="test_*.py")

ifeq ($(ARGS),)
test-python: package
	$(call say,Python tests)
	@$(PY) -m pytest tests/python -n $(TEST_JOBS) --dist worksteal -m "not timing" $(if $(CI),--durations=15)
	@$(PY) -m pytest $(TIMING) -q -m timing
else
test-python: package
	@$(PY) -m pytest $(ARGS)
endif

# Quick feedback: one placement, no slow tests, and without the files that mostly start programs of their own, ask a disk or take many steps, which take longer
# than all others together. Several ranks, the training frameworks and `make test-hangs` have lanes of their own. `make test` is what counts.
SLOW_FILES := $(foreach name,address_space admission budgets can_fail checkpoint_async checkpoint_cli checkpoint_faults checkpoint_tiers cli compile \
    examples gradients_on_disk growth import nothing_hangs plan ranks torch_adamw, $(wildcard tests/python/*/test_$(name).py))
SLOW_FOLDERS := $(addprefix tests/python/,integrations ranks)

test-fast: package
	$(call say,Python tests in host memory, without the slow ones)
	@$(PY) -m pytest tests/python -q -n $(TEST_JOBS) --dist worksteal --worlds=host -m "not slow and not timing" \
	    $(addprefix --ignore=,$(SLOW_FILES) $(SLOW_FOLDERS)) $(ARGS)

# Close, unwrap, exit, fork and signal handlers beside each kind of wait; with FUNICULAR_TEST_DEVICE=cuda on a GPU.
test-hangs: package
	$(call say,nothing hangs)
	@$(PY) -m pytest tests/python/windows/test_nothing_hangs.py -n $(TEST_JOBS)

# Unsafe memory under memcheck, which hides AVX-512. Not here: tests/io_engines.rs, which hangs under valgrind 3.19 in its first test.
MEMCHECK := memory::slots memory::copy memory::page optim::pool io::requests io::transfer io::fault device::host
HOST_TARGET = $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p' | tr a-z- A-Z_)

memcheck: need-rust
	@command -v valgrind >/dev/null || { echo "error: valgrind is not installed. Install it (Debian, Ubuntu: apt install valgrind) and run make again." >&2; exit 1; }
	$(call say,unit tests under valgrind)
	@CARGO_TARGET_$(HOST_TARGET)_RUNNER="valgrind --quiet --error-exitcode=9 --leak-check=no" $(CARGO) test --locked --lib -- --test-threads 1 $(MEMCHECK)

# The oldest torch that pyproject.toml allows, in an environment of its own.
OLDEST ?= .venv-oldest
$(OLDEST)/.installed: | need-python
	$(call say,Python environment in $(OLDEST) with torch 2.4 (about 5 GB))
	@$(PYTHON) -m venv --clear $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) "torch==2.4.1" numpy "transformers<4.50" \
	    safetensors hypothesis pytest pytest-timeout pytest-xdist tomli
	@touch $@

test-oldest: package $(OLDEST)/.installed
	$(call say,Python tests with torch 2.4)
	@sed -n 's/^\(tests[^ ]*\) *#.*/--deselect=\1/p' tests/oldest.txt | PYTHONPATH=python xargs $(OLDEST)/bin/python -m pytest tests/python \
	    -n $(TEST_JOBS) -m "not timing" -W ignore::FutureWarning -p no:cacheprovider

# The training frameworks, each in the newest and in the oldest supported version. `make test` runs what needs no more than accelerate.
INTEGRATIONS ?= .venv-integrations
INTEGRATIONS_OLDEST ?= .venv-integrations-oldest
INTEGRATION_TESTS := tests/python/integrations $(addprefix tests/python/tools/test_trainer_,documents.py examples.py)

$(INTEGRATIONS)/.installed: requirements-integrations.lock | need-python
$(INTEGRATIONS_OLDEST)/.installed: requirements-integrations-oldest.lock | need-python
$(INTEGRATIONS)/.installed $(INTEGRATIONS_OLDEST)/.installed:
	$(call say,Python environment in $(@D) from $< (about 6 GB))
	@$(PYTHON) -m venv --clear $(@D)
	@$(call install_quickly,$(@D),$<) || $(@D)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) -r $<
	@touch $@

test-integrations: package $(INTEGRATIONS)/.installed $(INTEGRATIONS_OLDEST)/.installed
	$(call say,training frameworks, the newest versions)
	@PYTHONPATH=python $(INTEGRATIONS)/bin/python -m pytest $(INTEGRATION_TESTS) -n $(TEST_JOBS) -p no:cacheprovider $(ARGS)
	$(call say,training frameworks, the oldest versions)
	@PYTHONPATH=python $(INTEGRATIONS_OLDEST)/bin/python -m pytest $(INTEGRATION_TESTS) -n $(TEST_JOBS) -p no:cacheprovider $(ARGS)

fmt: $(ENVIRONMENT) need-rust
	@$(CARGO) fmt --all
	@$(PY) -m ruff check --quiet --select I --fix .
	@$(PY) -m ruff format .

lint: lint-rust lint-python lint-text

# What maturin tells pyo3: in another environment clippy would have cargo check pyo3 once more, and compile it again for the next wheel.
AS_MATURIN = $(addprefix PYO3_BUILD_EXTENSION_MODULE=1 PYO3_CONFIG_FILE=$(CURDIR)/,$(firstword $(wildcard target/maturin/pyo3-config-*.txt)))

# In CI after the package, whose environment clippy is to take; tidy is one of the tests there.
lint-rust: need-rust $(if $(CI),package)
	$(call say,Rust lints)
	@$(CARGO) fmt --all --check
	@env $(AS_MATURIN) $(CARGO) clippy --locked --workspace --all-targets --quiet -- -D warnings
	@env $(AS_MATURIN) $(CARGO) clippy --locked --workspace --all-targets --quiet --no-default-features -- -D warnings
	@RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps --quiet
	$(if $(CI),,@$(CARGO) test --locked --quiet --test tidy)

lint-python: package
	$(call say,Python lints)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -m mypy.stubtest funicular._core --allowlist tests/stubtest-allowlist.txt --mypy-config-file tests/stubtest.toml

TYPOS := $(if $(filter system,$(VENV)),typos,$(VENV)/bin/typos)

lint-text: $(ENVIRONMENT)
	$(call say,spelling)
	@command -v $(TYPOS) >/dev/null || { echo "error: typos is not installed. Install it for $(PYTHON): pip install typos" >&2; exit 1; }
	@$(TYPOS)

# Not part of `make lint`: cargo-deny is built from source, and the advisories come from the network.
deny: need-rust
	@$(CARGO) deny --version >/dev/null 2>&1 || { echo "error: cargo-deny is not installed. Install it: cargo install --locked cargo-deny" >&2; exit 1; }
	$(call say,licences and advisories of the crates)
	@$(CARGO) deny --locked --all-features check

# mkdocs reads the Python files without importing them: no torch, no build, and no network once it is installed.
DOCS_VENV ?= .venv-docs
DOCS_LOCK := requirements-docs.lock

$(DOCS_VENV)/.installed: $(DOCS_LOCK) | need-python
	$(call say,Python environment in $(DOCS_VENV) from $(DOCS_LOCK) (50 MB))
	@$(PYTHON) -m venv --clear $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -r $(DOCS_LOCK)
	@touch $@

docs: $(DOCS_VENV)/.installed
	$(call say,pages in target/site)
	@$(DOCS_VENV)/bin/python -m mkdocs build --strict --quiet

# Those that need no GPU.
BENCHES := $(addprefix benches/,adamw_vs_torch.py checkpoint.py host_step.py plan_truth.py)

bench: package
	$(call say,benchmarks)
	@$(CARGO) bench --locked
	@for file in $(BENCHES); do echo "--- $$file"; $(PY) "$$file"; done

# Wheels are built by maturin in a small environment of its own, with zig as the linker: so they run wherever glibc is as old as
# MANYLINUX says, even if this machine's is newer. TARGET is another machine's, such as aarch64-unknown-linux-gnu, whose
# standard library `rustup target add` installs.
WHEEL_VENV ?= .venv-wheel
WHEEL_LOCK := requirements-wheel.lock
MANYLINUX := manylinux_2_28
TARGET ?=

$(WHEEL_VENV)/.installed: $(WHEEL_LOCK) | need-rust need-python
	$(call say,Python environment in $(WHEEL_VENV) from $(WHEEL_LOCK) (300 MB))
	@$(PYTHON) -m venv --clear $(WHEEL_VENV)
	@$(WHEEL_VENV)/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -r $(WHEEL_LOCK)
	@touch $@

IN_WHEEL_VENV = VIRTUAL_ENV=$(abspath $(WHEEL_VENV)) PATH="$(abspath $(WHEEL_VENV))/bin:$$PATH"

wheel: $(WHEEL_VENV)/.installed need-rust
	$(call say,wheel)
	@rm -rf dist/*.whl
	@$(IN_WHEEL_VENV) maturin build --release --locked --zig --compatibility $(MANYLINUX) --out dist $(if $(TARGET),--target $(TARGET))
	@$(WHEEL_VENV)/bin/python tests/wheel/audit.py --platform $(MANYLINUX) dist/*.whl

sdist: $(WHEEL_VENV)/.installed
	$(call say,source distribution)
	@rm -rf dist/*.tar.gz
	@$(IN_WHEEL_VENV) maturin sdist --out dist
	@ls -l dist/*.tar.gz

# In an environment that has what pip installs with the wheel and nothing else, without Rust on the PATH.
wheel-test: need-python
	@ls dist/*.whl >/dev/null 2>&1 || { echo "error: there is no wheel in dist/. Build it first: make wheel" >&2; exit 1; }
	$(call say,the wheel in an environment of its own (about 5 GB with torch))
	@$(PYTHON) tests/wheel/try.py --pip-args="$(PIP_ARGS)" dist/*.whl

# A test that finds no GPU fails here instead of being skipped.
gpu-test: need-python
	@nvidia-smi -L 2>/dev/null | grep -q GPU || { echo "error: make gpu-test needs a CUDA device; nvidia-smi finds none. On a machine without one, run make test." >&2; exit 1; }
	@$(MAKE) --no-print-directory package
	@$(PY) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || { echo "error: make gpu-test: torch of $(PY) cannot use the GPU. Install a CUDA build of torch that suits the driver: nvidia-smi shows its version." >&2; exit 1; }
	$(call say,device conformance on the GPU)
	@FUNICULAR_REQUIRE_CUDA=1 $(CARGO) test --release --locked --test device_conformance
	$(call say,Python tests on the GPU)
	@FUNICULAR_REQUIRE_CUDA=1 FUNICULAR_TEST_DEVICE=cuda $(PY) -m pytest tests/python --full $(GPU_TEST_ARGS)

# Lines go to standard output and into $(OUT), if that is set.
bench-gpu: package
	@nvidia-smi -L 2>/dev/null | grep -q GPU || { echo "error: make bench-gpu needs a CUDA device; nvidia-smi finds none. To try its program without one: $(PY) benches/gpu_campaign.py --device host" >&2; exit 1; }
	@$(PY) benches/gpu_campaign.py $(BENCH_GPU_ARGS)

soak: package
	@[ -e tests/python/soak.py ] || { echo "error: tests/python/soak.py does not exist." >&2; exit 1; }
	$(call say,simulation of the scheduler: $(SIM_SEEDS) seeds)
	@FUNICULAR_SIM_SEEDS=$(SIM_SEEDS) $(CARGO) test --locked --quiet --test sim
	$(call say,soak: two hundred processes killed amid saves)
	@$(PY) -W ignore tests/python/kill_saves.py 200
	$(call say,soak: processes that save to one path and read it meanwhile)
	@$(PY) -W ignore tests/python/saves_beside.py 1000
	$(call say,soak: several ranks - all kinds of training and fifty ranks killed)
	@$(PY) -W ignore tests/python/ranks_soak.py 50
	$(call say,soak: threads that read the model and add to gradients beside training)
	@$(PY) -W ignore tests/python/threads_soak.py 60
	$(call say,soak: all cases of the products of which make test takes some)
	@$(PY) -m pytest tests/python --full -m "covering or gradients or io_engines" -n $(TEST_JOBS)
	$(call say,soak: signal handlers that use the model at every point)
	@FUNICULAR_EVERY_POINT=1 $(PY) -m pytest tests/python/windows/test_handlers.py --full -n $(TEST_JOBS) --timeout 20000
	$(call say,soak: thousands of steps in which nothing may grow)
	@$(PY) tests/python/soak.py $(SOAK_ARGS)

# .venv stays: it costs a download. Remove it by hand to start from nothing.
clean:
	@rm -rf target dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis python/funicular/*.so
	@find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
