# make test | test-stand-in | test-vocabularies | kernel-report | demo | docs | docs-links | docs-benchmarks | bench |
#      bench-full | bench-explore | bench-peers | lint | format | test-sanitize | gpu-acceptance | clean
# Every target but gpu-acceptance sets up what it needs: a .venv in the project, everything else through pip by name.

PYTHON ?= python3
ITEMS ?= 1000000
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*/*) CMakeLists.txt pyproject.toml

.PHONY: test test-stand-in test-vocabularies kernel-report demo docs docs-links docs-benchmarks bench bench-full bench-explore \
  bench-peers lint format test-sanitize gpu-acceptance clean
.DELETE_ON_ERROR:

$(VENV)/test.stamp: requirements/test.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements/test.txt
	touch $@

$(VENV)/%.stamp: requirements/%.txt $(VENV)/test.stamp
	$(BIN)/pip install --quiet -r $<
	touch $@

# Editable: Python files are used where they lie; the extension is rebuilt when a source changes.
$(VENV)/build.stamp: $(SOURCES) $(VENV)/test.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# A second Triton beside the one that tests run on: it alone compiles for Blackwell.
$(VENV)/blackwell.stamp: requirements/blackwell.txt $(VENV)/test.stamp
	rm -rf $(VENV)/blackwell
	$(BIN)/pip install --quiet --no-deps --target $(VENV)/blackwell -r $<
	touch $@

BLACKWELL := URM_TRITON_BLACKWELL=$(CURDIR)/$(VENV)/blackwell

# The GPU's kernels run in Triton's interpreter, which is chosen when they are imported: processes of their own, two side
# by side, since it uses one processor.
INTERPRETED := TRITON_INTERPRET=1 $(BIN)/python -W ignore -m pytest -p no:warnings
FUNCTIONS := $(addprefix python_tests/test_,candidates.py explore.py noise.py partition.py partition_gradients.py \
  triton_functions.py)
test: $(VENV)/build.stamp $(VENV)/blackwell.stamp
	$(INTERPRETED) -k triton $(FUNCTIONS) > $(VENV)/functions.log 2>&1 & functions=$$!; \
	$(INTERPRETED) python_tests/test_triton.py python_tests/test_interpreter.py; status=$$?; \
	wait $$functions || status=$$?; cat $(VENV)/functions.log; exit $$status
	$(BLACKWELL) $(BIN)/python -m pytest python_tests

kernel-report: $(VENV)/build.stamp $(VENV)/blackwell.stamp
	$(BLACKWELL) $(BIN)/python bench/kernel_report.py

# On a device that is the CPU under another name: what mixes the CPU's tensors with a GPU's fails without a GPU, too.
test-stand-in: $(VENV)/build.stamp
	URM_TEST_DEVICE=stand_in $(BIN)/python -m pytest python_tests

# from_dense on the token embeddings of two language models, 180 MB of packages.
test-vocabularies: $(VENV)/build.stamp $(VENV)/vocabularies.stamp
	files=$$($(BIN)/python -m urm_kernels.testing.vocabularies) && \
	env $$files $(BIN)/python -m pytest python_tests/test_factorize.py -k vocabularies

demo: $(VENV)/build.stamp $(VENV)/demo.stamp
	$(BIN)/python -m urm_kernels.demo --items $(ITEMS)

# Needs no network once its tools are there: links within the pages are checked here, those to elsewhere by docs-links.
docs: $(VENV)/build.stamp $(VENV)/docs.stamp
	$(BIN)/python -m pytest --quiet python_tests/test_docs.py -k links
	$(BIN)/python -m sphinx -W --keep-going -n -q -E docs docs/_build/html

docs-links: $(VENV)/build.stamp $(VENV)/docs.stamp
	$(BIN)/python -m sphinx -b linkcheck -q -D nb_execution_mode=off docs docs/_build/links

# DEVICE=cuda measures on a GPU instead, with a python3 that has a CUDA build of torch, triton, pytest and
# pytest-benchmark, or with the .venv where there is one.
ifeq ($(DEVICE),cuda)
bench:
	DEVICE=cuda PYTHONPATH="$(CURDIR):$$PYTHONPATH" $$([ -x $(BIN)/python ] && echo $(BIN)/python || echo $(PYTHON)) -m pytest bench
else
bench: $(VENV)/build.stamp $(VENV)/bench.stamp
	$(BIN)/python -m pytest bench
endif

# Hours; stop it whenever you like, the next run goes on. GRID="--only 'N=1e6 fp32' --budget-minutes 30" does a part,
# PACKED_GRID likewise of the packed tables. Without the embeddings (no network, say) their cells are not measured.
bench-full: $(VENV)/build.stamp $(VENV)/bench.stamp $(VENV)/vocabularies.stamp
	files=$$($(BIN)/python -m urm_kernels.testing.vocabularies); \
	env $$files $(BIN)/python bench/packed_grid.py $(PACKED_GRID)
	$(BIN)/python bench/grid.py $(GRID)

# URM's own sampler beside the full scan. EXPLORE="--rows 100000 --k 100 --graph cosine euclidean" compares graphs.
bench-explore: $(VENV)/build.stamp $(VENV)/bench.stamp $(VENV)/vocabularies.stamp
	files=$$($(BIN)/python -m urm_kernels.testing.vocabularies); \
	env $$files $(BIN)/python bench/explore.py $(EXPLORE)

# Approximate peers at equal recall, half an hour of building indexes first. PEERS="--data clustered --only ScaNN".
bench-peers: $(VENV)/build.stamp $(VENV)/bench.stamp $(VENV)/peers.stamp $(VENV)/vocabularies.stamp
	files=$$($(BIN)/python -m urm_kernels.testing.vocabularies); \
	env $$files $(BIN)/python bench/peers.py $(PEERS)

docs-benchmarks: $(VENV)/build.stamp $(VENV)/bench.stamp
	$(BIN)/python bench/render.py

lint: $(VENV)/build.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*/*)

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*/*)

# The extension alone under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; the interpreter itself is not instrumented,
# so the runtime is preloaded and leaks of the interpreter are not reported.
test-sanitize: $(VENV)/build.stamp
	for kind in address undefined thread; do python_tests/sanitize.sh $$kind $(BIN) || exit 1; done

# With the .venv where there is one, else with a python3 that has a CUDA build of torch: which build suits the card is
# not for a Makefile to choose.
gpu-acceptance:
	@if [ -x $(BIN)/python ]; then $(BIN)/python bench/gpu_acceptance.py; else $(PYTHON) bench/gpu_acceptance.py; fi

clean:
	rm -rf $(VENV) build docs/_build
