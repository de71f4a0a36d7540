# `make demo` and `make test` do everything, set-up included. PYTHON names another interpreter (3.11 or newer), VENV
# another place for the virtual environment, PIP_FLAGS more flags for pip (constraints, say).
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
BIN = $(VENV)/bin

.PHONY: demo test test-all lint docs wheel bench assets results clean

demo: $(VENV)/demo assets
	$(BIN)/python -m elder_jax prune --config=smollm2_135m_demo

# Half of the tests' time is the compiler's; what it made is kept in ~/.cache/elder_jax/tests.
test: $(VENV)/test lint assets
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n auto --dist loadfile -m 'not slow'

# All: also the real SmolLM2, a thousand cases of each fuzz test, every family in full, real processes.
test-all: $(VENV)/test lint assets
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n auto --dist loadfile

lint: $(VENV)/test docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/ty check --python $(VENV) elder_jax

# The wheel and the source archive, in dist/.
wheel: $(VENV)/test
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

# The site, into site/; a broken link or anchor fails. The generated parts of docs/ are written by python -m benchmarks.docs.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

assets: $(VENV)/demo
	$(BIN)/python -m benchmarks.assets

# On a CPU, in under 15 minutes: steps against PyTorch in both types, what a step does, where the time of the demo goes.
SMOLLM2 = $$HOME/.cache/elder_jax/SmolLM2-135M-Instruct.Q4_1.gguf
STEPS = forward,gates,full
bench: $(VENV)/test assets
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.steps --model=$(SMOLLM2) --nocompiled --rounds=2 --cases=$(STEPS)
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.steps --model=$(SMOLLM2) --nocompiled --rounds=2 --cases=$(STEPS) --dtype=bfloat16
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.profile_step --model=$(SMOLLM2) --cases=forward,full --dtype=bfloat16
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.job

# WIKITEXT is a folder with WikiText-2's valid.txt and test.txt; rows that are done are not done again.
results: $(VENV)/demo
	$(BIN)/python -m benchmarks.assets --gemma
	$(BIN)/python -m benchmarks.results --model=$(SMOLLM2) \
	  --gemma=$$HOME/.cache/elder_jax/gemma-3-270m-Q4_K_M.gguf --wikitext=$(WIKITEXT) --news=$$HOME/.cache/elder_jax/lee_news.txt

$(VENV)/python-checked:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "elder_jax needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@echo "making the virtual environment $(VENV)"
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/demo: $(VENV)/python-checked setup.py
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -e '.[demo]'
	touch $@

$(VENV)/test: $(VENV)/demo setup.py
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -e '.[demo,test]'
	touch $@

$(VENV)/docs: $(VENV)/test setup.py
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -e '.[demo,test,docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
