# Everything happens in .venv/; nothing is installed outside of it but system packages, and those only as root.
#
#   make install   the virtual environment with locked packages, and the native core in release mode
#   make demo      the whole life of a replica on a real disk
#   make test      every test            (PYTEST_ARGS="tests/test_merkle.py -x" for some of them)
#   make explore   power cuts in random lives of a store, for SECONDS_TO_EXPLORE
#   make lint      every static check
#   make bench     what bounds the machine, the cycles, and peers that are installed: results in .bench/
#   make bench-full  the same at 4 GiB with every peer (as root it installs them)
#   make lock      renew requirements.lock from pyproject.toml
#   make clean     remove what the above made

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON := $(BIN)/python
NATIVE := replica/_native.abi3.so
NATIVE_SOURCES := $(shell find native/src -name '*.rs') native/Cargo.toml native/Cargo.lock
PYTEST_ARGS ?=
SECONDS_TO_EXPLORE ?= 600

export VIRTUAL_ENV := $(CURDIR)/$(VENV)
empty :=
RUST := $(subst $(empty) $(empty),:,$(strip $(HOME)/.cargo/bin $(wildcard /usr/lib/rust-1.*/bin)))
export PATH := $(CURDIR)/$(BIN):$(PATH):$(RUST):/usr/sbin:/sbin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport CONDA_PREFIX PYTHONHOME PYTHONPATH

.PHONY: install system test explore lint demo bench bench-full lock clean
.DELETE_ON_ERROR:

install: $(NATIVE)

system:
	@tools/install-packages.sh

$(VENV)/.made: | system
	@tools/make-venv.sh $(VENV)
	@touch $@

$(VENV)/.packages: requirements.lock $(VENV)/.made
	@echo "installing the locked packages into $(VENV)"
	@$(PYTHON) -m pip install --quiet --require-hashes --requirement requirements.lock
	@touch $@

# Built by maturin into the source tree and installed as an editable package, with the command `replica`. Nothing is
# looked up here: what pyproject.toml asks for and the lock does not have is an error.
$(NATIVE): $(NATIVE_SOURCES) pyproject.toml $(VENV)/.packages
	@echo "building the native core"
	@$(PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
	@$(PYTHON) -m pip check --quiet
	@$(PYTHON) -m compileall -q replica
	@touch $@

test: install
	$(PYTHON) -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

explore: install
	$(PYTHON) tools/explore.py --seconds $(SECONDS_TO_EXPLORE)

lint: install
	ruff check .
	ruff format --check .
	mypy
	stubtest --concise replica._native
	lint-imports
	cd native && cargo fmt --check
	cd native && cargo clippy --quiet --locked --all-targets -- -D warnings
	cd native && PYO3_PYTHON=$(VIRTUAL_ENV)/bin/python cargo clippy --quiet --locked --features python -- -D warnings
	cd native && cargo test --quiet --locked

demo: install
	$(PYTHON) tools/demo.py

bench: install
	$(PYTHON) -m bench

bench-full: install
	@tools/install-packages.sh --bench
	@$(PYTHON) -m pip install --quiet 'matplotlib>=3.9'
	$(PYTHON) -m bench --full

lock: $(VENV)/.made
	@$(PYTHON) -m pip install --quiet uv
	uv pip compile --quiet --upgrade --generate-hashes --universal --python-version 3.11 --group dev \
	    --no-emit-index-url --no-header --no-annotate pyproject.toml --output-file requirements.lock

clean:
	rm -rf $(VENV) $(NATIVE) native/target demo .bench build dist *.egg-info \
	    .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
	find replica bench tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
