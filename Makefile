# make demo   set up, generate text with the shipped model, compare with DynamicCache, draw map.png
# make test   set up, lint, check types, run the tests
# make bench  every benchmark in its quick form; one: .venv/bin/python -m bench NAME
# make gpu    tests and benchmarks that need a CUDA device
# make aot    compile every Triton kernel for three GPU generations, and compare with the table
# make fuzz   the storm, ten million random operations, and the state machines
# make model  train the shipped model again
# make kvpress  the presses of NVIDIA kvpress over our cache, in an environment of its own

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PINS := .ci/constraints.txt
ON_DEVICE := gpu_vmm decode prefill append cascade masked
export SEES_A_DEVICE := import sys, hypothesis, numpy, pytest, rich, torch, triton, typer; \
	import cuda.bindings; assert torch.cuda.is_available(); print(sys.executable)

.PHONY: demo test bench gpu aot fuzz model types kvpress
.DELETE_ON_ERROR:

demo: .venv/run.stamp
	$(BIN)/vattn generate --compare --plot map.png

test: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/mypy & types=$$!; \
	$(BIN)/python -m pytest -n 2 --dist loadfile; tests=$$?; \
	wait $$types && exit $$tests

bench: .venv/dev.stamp
	$(BIN)/python -m bench all --quick

# A Python whose torch sees the device is taken as it is; elsewhere .venv is set up.
gpu:
	@mkdir -p bench/results
	python=$$($(PYTHON) -c "$$SEES_A_DEVICE" 2>/dev/null) || \
		{ $(MAKE) .venv/dev.stamp && python=$(BIN)/python; } || exit 1; \
	$$python -m pytest -m gpu || exit 1; \
	for name in $(ON_DEVICE); do \
		$$python -m bench $$name --json > bench/results/$$name.jsonl || exit 1; done

aot: .venv/dev.stamp
	$(BIN)/python -m bench aot

fuzz: .venv/dev.stamp
	$(BIN)/python -m pytest tests -m fuzz

model: .venv/dev.stamp
	$(BIN)/python -m bench.model.train --out build/model

types: .venv/dev.stamp
	$(BIN)/mypy

kvpress: .venv-kvpress/stamp
	.venv-kvpress/bin/python -m pytest tests/test_press.py -p no:cacheprovider
	.venv-kvpress/bin/python -m bench kvpress --quick

.venv-kvpress/stamp: .ci/kvpress.txt
	@echo 'setting up .venv-kvpress: torch is most of it, so the first time takes a few minutes'
	$(PYTHON) -m venv .venv-kvpress
	.venv-kvpress/bin/python -m pip install --quiet --no-compile -r .ci/kvpress.txt
	touch $@

.venv/run.stamp: pyproject.toml $(PINS) | .venv/bin/python
	@echo 'setting up .venv: torch is most of it, so the first time takes a few minutes'
	$(BIN)/python -m pip install --quiet --no-compile -c $(PINS) -e '.[hf,cli,plot,cpu]'
	touch $@

.venv/dev.stamp: pyproject.toml $(PINS) | .venv/bin/python
	@echo 'setting up .venv: torch is most of it, so the first time takes a few minutes'
	$(BIN)/python -m pip install --quiet --no-compile -c $(PINS) -e '.[hf,cli,plot,cpu,dev]'
	touch $@ .venv/run.stamp

# Some systems ship Python without ensurepip: their pip fills the environment from outside.
.venv/bin/python:
	@test -n "$(PYTHON)" || { echo 'vattn needs Python >= 3.11: install it, or say make PYTHON=/path/to/python' >&2; exit 1; }
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv \
		&& $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
