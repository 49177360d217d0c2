# make train   set up, then train the demo on the embedded data (five minutes on two cores)
# make test    set up, then run every test (those that need a GPU only where one is)
# make lint    formatting, linting, types
# make clean   remove what was built
#
# PYTHON=python3      use the environment that is there and install nothing
# TORCH_INDEX=URL     where pip finds torch's CPU wheels (machines without a GPU; see README)

VENV := $(CURDIR)/.venv
PYTHON ?=
ifeq ($(PYTHON),)
  BIN := $(VENV)/bin/
  PY := $(BIN)python
  READY := $(VENV)/.ready
else
  PY := $(PYTHON)
  BIN := $(dir $(shell command -v $(PYTHON)))
  READY := check
endif
export TORCH_EXTENSIONS_DIR ?= $(VENV)/torch_extensions
export PATH := $(if $(BIN),$(BIN):)$(PATH)
NATIVE := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.hpp)
PYTHON_FILES := laclip kernels tests benchmarks examples requirements setup.py

.PHONY: train test lint clean check

train: $(READY)
	@$(if $(shell $(PY) requirements/check.py --gpu && echo yes),,DS_ACCELERATOR=cpu )$(BIN)deepspeed --quiet laclip/train.py --deepspeed_config configs/deepspeed/zero1.json

test: $(READY)
	$(PY) -m pytest tests

lint: $(READY)
	$(PY) -m ruff format --check $(PYTHON_FILES)
	$(PY) -m ruff check $(PYTHON_FILES)
	$(PY) -m mypy
	$(BIN)clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.hpp tests/csrc/*.cpp)

check:
	@$(PY) requirements/check.py
	@$(PY) -c "import laclip._native" 2>/dev/null || { echo "laclip set-up: the extension is not built here. Run: $(PYTHON) -m pip install --no-build-isolation --no-deps -e ." >&2; exit 1; }

$(VENV)/.packages: requirements/common.txt requirements/cpu.txt requirements/cuda.txt requirements/install.sh
	@requirements/install.sh $(VENV)
	@touch $@

$(VENV)/.ready: $(VENV)/.packages $(NATIVE)
	@echo "laclip set-up: building laclip._native"
	@out=$$($(BIN)pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e . 2>&1) \
	  || { echo "$$out" >&2; exit 1; }
	@$(PY) requirements/build_deepspeed_op.py
	@touch $@

clean:
	rm -rf build .venv laclip.egg-info laclip/_native*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
