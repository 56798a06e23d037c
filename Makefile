# A user's entry points; `make` alone lists them.
PYTHON ?= python3.11
BIN := .venv/bin
MODEL := build/demo-model
# Of `make model`: llama, qwen2, qwen3, mistral, smollm3 or glm.
FAMILY := llama

# Threads that spin while they wait take the core from those that work: on two busy cores
# torch then took four times as long.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup model vocabularies demo test test-full test-share bench docs lint data clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.done ## make .venv with everything that training, checking and testing need

model: $(if $(filter llama,$(FAMILY)),$(MODEL),build/$(FAMILY)-model)/made-with.json ## make the demo's small Llama, or with FAMILY=qwen3 another

vocabularies: .venv/.done ## fetch the vocabularies of Qwen and Llama 3, for the long tests of tokenizers
	$(BIN)/python scripts/fetch_vocabularies.py build/vocabularies

# What is proven is arithmetic, whatever device is there.
demo: export JAX_PLATFORMS := cpu
demo: export CUDA_VISIBLE_DEVICES :=
demo: $(MODEL)/made-with.json ## train a small model on both backends and prove the two runs equal
	rm -rf build/demo
	$(BIN)/jaxtrain train configs/demo.yaml --out build/demo/jax
	$(BIN)/torchtrain train configs/demo.yaml --out build/demo/torch
	$(BIN)/parity check configs/demo.yaml --out build/demo/parity

test: lint $(MODEL)/made-with.json ## lint, type-check and run the tests but the long ones
	$(call run-tests,-m "not full")

test-full: lint $(MODEL)/made-with.json vocabularies ## the same with the long tests
	$(call run-tests,)

# The minutes are about as the groups of tests are long.
test-share: $(MODEL)/made-with.json ## 25 minutes of the long tests: another share for each SHARE, a commit say
	$(call run-tests,-m full --share '$(SHARE)',--minutes 14,--minutes 3,--minutes 7)

# JAX and torch never share a process: what imports a backend runs on its own. 1: options of all groups, 2 to 4: of each.
define run-tests
$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(1) $(2) tests --ignore tests/backends --ignore tests/torchtrain
TWINTRAIN_BACKEND=jax $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(1) $(3) tests/backends
TWINTRAIN_BACKEND=torch $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(1) $(4) tests/backends tests/torchtrain
endef

bench: $(MODEL)/made-with.json ## time both backends, torch eager and the Trainer, in turns
	$(BIN)/python benchmarks/beside_trainer.py

docs: $(MODEL)/made-with.json ## measure the pages of docs/ again that hold results
	$(BIN)/python benchmarks/memory_and_traffic.py --page docs/memory-and-traffic.md
	$(BIN)/python benchmarks/pipeline_schedules.py --page docs/pipeline.md
	$(BIN)/python benchmarks/learning_curves.py --page docs/learning-curves.md
	rm -rf build/tasks
	$(BIN)/python benchmarks/tasks.py --steps 60 --page docs/tasks.md
	$(BIN)/parity faults --precision fp64 --precision fp32 --precision bf16 --page docs/faults.md
	$(BIN)/parity faults --of generation --page docs/faults-of-generation.md
	$(BIN)/parity matrix
	$(BIN)/parity matrix --families
	$(BIN)/python -m trainspec.imports.page docs/migrate.md

lint: setup ## ruff and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --threads 2

data: setup ## make configs/data again from docstrings of this Python and names of CLDR
	$(BIN)/python scripts/make_demo_data.py
	$(BIN)/python scripts/make_task_data.py

clean: ## remove what was built and cached; runs/ and .venv stay
	rm -rf build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/.done: pyproject.toml
	@echo "Installing into .venv: takes a few minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[jax,torch,dev]'
	@touch $@

$(MODEL)/made-with.json: scripts/make_demo_model.py configs/data/text-train.txt | .venv/.done
	$(BIN)/python scripts/make_demo_model.py $(MODEL)
	@touch $@

build/%-model/made-with.json: scripts/make_demo_model.py configs/data/text-train.txt | .venv/.done
	$(BIN)/python scripts/make_demo_model.py build/$*-model --family $*
	@touch $@
