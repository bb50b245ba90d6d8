# The verbs of loramux. Each sets up what it needs; nothing else has to be typed first.
#
#   make serve       start the server on the built-in demo model, http://127.0.0.1:8000
#   make test        every property once, at small size (about ten minutes on two cores)
#   make demo        talk to a running server: upload an adapter, one mixed batch, side by side
#   make help        all of them

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

# Without an NVIDIA driver the CUDA build of PyTorch is gigabytes for nothing: take the CPU build
# from this index. Set TORCH_INDEX to a mirror, or to nothing to use your default index.
TORCH_PIN := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif

PIP := $(BIN)/python -m pip --disable-pip-version-check
# constraints.txt, without Triton where PyTorch wants one of its own: the CUDA build does.
PINS := $(VENV)/constraints.txt

.PHONY: help install serve test test-all test-slice check audit demo bench load gpu-check image clean

help:
	@sed -n 's/^#   //p' $(MAKEFILE_LIST)
	@echo "make test-all    full sweeps, kills and soak (any length)"
	@echo "make check       formatting, lint, types, layers"
	@echo "make audit       known advisories against constraints.txt; needs the network"
	@echo "make bench       throughput against transformers+PEFT, on this machine"
	@echo "make load        a scenario of loadtests/serving/scenarios, open loop (SCENARIO=knee)"
	@echo "make image       a container image (TARGET=cpu or cuda); deploy/ says how to run it"
	@echo "make gpu-check   everything a GPU can show; needs one"

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP) install -q --retries 0 --timeout 15 --index-url $(TORCH_INDEX) $(TORCH_PIN) || )$(PIP) install -q $(TORCH_PIN)
	@if $(PIP) show torch | grep -q '^Requires:.*triton'; \
	  then sed '/^triton==/d' constraints.txt; else cat constraints.txt; fi > $(PINS)
	@touch $@

$(VENV)/.serve: $(VENV)/.torch pyproject.toml
	$(PIP) install -q -c $(PINS) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml clients/python/pyproject.toml
	$(PIP) install -q -c $(PINS) -e '.[dev]' -e clients/python
	@touch $@ $(VENV)/.serve

install: $(VENV)/.serve

serve: $(VENV)/.serve
	$(BIN)/loramux serve $(ARGS)

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(VENV)/.dev
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.dev
	$(PYTEST) -m "not gpu" $(ARGS)

# One part of what only test-all runs, but for what alone takes too long: SLICE=3/8 is the fourth eighth.
SLICE ?= 0/8
test-slice: $(VENV)/.dev
	$(PYTEST) -m "slow and not long and not gpu" --slice $(SLICE) $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: $(VENV)/.dev
	@echo "asking PyPI for advisories: this needs the network"
	$(BIN)/python -m pip_audit --strict --disable-pip --no-deps --requirement constraints.txt $(ARGS)

demo: $(VENV)/.dev
	$(BIN)/python -m loramux.demo $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python loadtests/serving/throughput.py $(ARGS)

SCENARIO ?= skewed
load: $(VENV)/.dev
	$(BIN)/python loadtests/serving/load.py loadtests/serving/scenarios/$(SCENARIO).toml $(ARGS)

gpu-check: $(VENV)/.dev
	$(BIN)/python loadtests/gpu/check.py $(ARGS)

# TARGET=cpu or cuda; needs Docker.
TARGET ?= cpu
image:
	docker build -f deploy/Dockerfile --target $(TARGET) -t loramux:$(TARGET) \
	  --build-arg REVISION=$$(git rev-parse --short HEAD) \
	  --build-arg VERSION=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' server/loramux/__init__.py) .

clean:
	rm -rf $(VENV) data
	rm -rf kernels/loramux_kernels/__pycache__/compiled-*
