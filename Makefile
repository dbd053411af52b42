# On a Debian machine, as root: `make demo` shows what this is for, `make test` tests it all. Both
# set up what they need first, once.

PYTHON ?= python3
BIN := .venv/bin
export PYTHON
export EXTBRIDGE_GUEST := $(CURDIR)/.guest

# Stamps are named for the content that they stand for: a checkout changes times, not content.
digest = $(shell sha256sum $(1) | sha256sum | cut -c 1-16)
SOURCES := $(sort $(shell find cni -type f -not -path '*/.*' -not -path '*/__pycache__/*' \
	-not -path '*.egg-info/*' -not -path 'cni/extbridge/shim/*'))
TOOLS := .venv/tools-$(call digest,pyproject.toml)
IMAGE := .venv/image-$(call digest,pyproject.toml setup.py README.md LICENSE Dockerfile .dockerignore \
	tools/build-image $(SOURCES))
WHEEL := .venv/wheel-$(call digest,pyproject.toml setup.py README.md LICENSE $(SOURCES))

.PHONY: demo test bench docs setup image stubs debian clean

demo: setup
	$(BIN)/extbridge demo

# The tests import the wheel that was built and installed, and run the image, not the source tree.
test: setup image
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest

# Asserts nothing. OPTIONS=--quick for a first look, OPTIONS=--help for the others.
bench: setup
	$(BIN)/python -m tests.bench $(OPTIONS)

# The pages that are made of the code.
docs: setup
	$(BIN)/python tools/docs.py

setup: debian $(WHEEL)

debian:
	@tools/setup-debian

$(TOOLS): | debian
	@echo "setup: libraries and tools from PyPI into .venv"
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"setup: Python 3.11 or \
	later is needed, and $(PYTHON) is {sys.version.split()[0]}: make PYTHON=...")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
	print(*p["build-system"]["requires"], *p["project"]["dependencies"], \
	*p["project"]["optional-dependencies"]["dev"], sep="\n")' >.venv/requirements.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check -r .venv/requirements.txt
	@rm -f .venv/tools-*
	@touch $@

$(WHEEL): $(TOOLS)
	@echo "setup: building the wheel and installing it into .venv"
	@# A former build's leftovers would be packed again.
	@rm -rf build dist .venv/wheel-*
	@$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@$(BIN)/pip install --quiet --no-deps --force-reinstall dist/*.whl
	@rm -rf build cni/*.egg-info
	@touch $@

# Python for the messages of kubelet's device plugin API, beside their .proto. STUBS is the folder.
STUBS ?= cni
stubs:
	$(BIN)/python -m grpc_tools.protoc --proto_path=cni --python_out=$(STUBS) --pyi_out=$(STUBS) \
		cni/extbridge/kube/proto/*.proto

image: setup $(IMAGE)

$(IMAGE): $(WHEEL)
	@rm -f .venv/image-*
	@tools/build-image
	@touch $@

clean:
	rm -rf .venv .guest .image build dist cni/*.egg-info cni/extbridge/shim .hypothesis .*_cache
	find cni tests -name __pycache__ -prune -exec rm -rf {} +
