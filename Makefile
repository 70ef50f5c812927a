# make quickstart   the main job, on the embedded corpus: pretrain, reward, REINFORCE, before and after
# make test         format, lint, types and tests
# PYTHON=python3.12 chooses the interpreter, RUN=runs/name the run's folder, ARGS="--seed 1" anything else.

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
ARGS ?=
BIN := $(VENV)/bin

.PHONY: quickstart test parity clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/installed
	@$(BIN)/python experiments/pipeline.py --run $(RUN) $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=5

# Against the models of transformers in PyTorch, and against the losses of TRL, which nothing else here needs; a test
# that is skipped fails. The tests say what TRL 1.16 does: with another version, read them again.
parity: $(VENV)/installed-test
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[parity]" "torch==2.13.0" "trl==1.16.0"
	RL_JAX_REQUIRE_PARITY=1 $(BIN)/python -m pytest -q tests/test_parity.py tests/test_trl.py

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'rl_jax needs Python 3.11 or newer; choose one: make PYTHON=python3.12')"
	@echo "Installing rl_jax into $(VENV) (about a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
