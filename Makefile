# make quickstart | test | test-slow | test-slurm | soak | lint | venv | minkowski | clean
# ARGS="…" is handed on:           make quickstart ARGS="sparse.backend=dense out=runs/other"
# VENV=… names another environment, PYTHON=… the interpreter that makes it.
# The tests run in several processes of one thread each; ARGS="-n 0" runs them in one, with torch's own threads.

PYTHON ?= python3
ifeq ($(VENV),)
override VENV := .venv
endif
PY := $(VENV)/bin/python
STAMP := $(VENV)/.fcmae-installed
# Small models gain nothing from threads, and the threads of two processes slow each other down.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -q -n auto --maxprocesses 4 --dist loadfile

.PHONY: quickstart test test-slow test-slurm soak lint venv minkowski clean

quickstart: venv
	$(PY) -m fcmae.pretrain configs/pretrain/quickstart.yaml $(ARGS)

test: venv
	$(PYTEST) -m "not slow and not slurm and not soak" $(ARGS)

test-slow: venv
	$(PYTEST) -m slow $(ARGS)

# A real two-node cluster on this machine; needs root, slurm-wlm and munge.
test-slurm: venv
	$(PY) -m pytest -q -m slurm $(ARGS)

# Faults by the hundred, for half an hour or two hours; ARGS=--short: a few minutes. What they count goes to runs/soak.
soak: venv
	$(PYTEST) -m soak tests/soak $(ARGS)

lint: venv
	$(PY) -m ruff check . $(ARGS)

# MinkowskiEngine into the environment, built for its torch; ARGS=--cpu-only leaves CUDA out.
minkowski: venv
	$(PY) -m fcmae.minkowski.build $(ARGS)

venv: $(STAMP)

# An editable install points at one checkout: an environment that last served another one is installed into again.
ifneq ($(shell cat "$(STAMP)" 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

$(PY):
	@command -v "$(PYTHON)" >/dev/null \
	    || { echo "$(PYTHON) not found: install Python 3.10 or newer, or name one with PYTHON=…" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "$(PYTHON) is older than Python 3.10: name a newer one with PYTHON=…" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null \
	    || { echo "$(PYTHON) cannot make environments: install its venv and pip (Debian: apt install python3-venv)" >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"

# Order-only: the interpreter's own date says nothing about what is installed.
$(STAMP): pyproject.toml setup.py | $(PY)
	@$(PY) -m pip --version >/dev/null 2>&1 \
	    || { echo "$(VENV) has no pip: run $(PY) -m ensurepip, or remove that folder" >&2; exit 1; }
	@for attempt in 1 2 3; do \
	    $(PY) -m pip install --retries 10 -e ".[dev]" && break; \
	    [ $$attempt -lt 3 ] || { echo "installing failed three times: see pip's message above" >&2; exit 1; }; \
	    sleep 5; \
	done
	@echo "$(CURDIR)" > $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find fcmae kernels tests configs slurm -name __pycache__ -type d -prune -exec rm -rf {} +
