# Each target makes what it needs, the environment included. On Windows or without make: the plain lines stand in README.md.
PYTHON ?= python3
BIN = .venv/bin
LESSON ?=

.PHONY: quickstart test test-llama test-lm-eval lab write text export store figures address lint wheel

quickstart: .venv/.ok            ## train a small model on tales and let it tell some
	OMP_NUM_THREADS=1 $(BIN)/python -m minillm quickstart

test: .venv/.test                ## every test and every lesson
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests notebooks --nbval-lax --nbval-current-env --nbval-cell-timeout=600

test-llama: .venv/.llama         ## our GGUF files in llama.cpp itself, which is built first: about four minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_gguf.py

test-lm-eval: .venv/.lm-eval     ## our models in lm-evaluation-harness
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_harness.py

lab: .venv/.ok                   ## the lessons in JupyterLab
	$(BIN)/jupyter lab notebooks

text: .venv/.test                ## notebooks -> .build/*.py to edit; LESSON=05 for one
	$(BIN)/python tools/lessons.py text $(LESSON)

write: .venv/.test               ## .build/*.py -> notebooks
	$(BIN)/python tools/lessons.py write $(LESSON)

export: .venv/.test              ## notebooks -> minillm/*.py
	$(BIN)/python tools/lessons.py export $(LESSON)

store: .venv/.test               ## execute notebooks in place and clean what is stored
	OMP_NUM_THREADS=1 $(BIN)/python tools/lessons.py store $(LESSON)

figures: .venv/.test             ## pictures of the stored lessons -> .build/figures, the README's -> plots/
	$(BIN)/python tools/lessons.py figures $(LESSON)

address: .venv/.test             ## URL=https://... : one repository address everywhere
	$(BIN)/python tools/lessons.py address $(URL)

lint: .venv/.test
	$(BIN)/python -m ruff check .

.venv/.ok: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	$(BIN)/python -m pip install -q --no-deps -e .
	@touch $@

.venv/.test: .venv/.ok requirements-test.txt
	$(BIN)/python -m pip install -q -r requirements-test.txt
	@touch $@

.venv/.llama: .venv/.test
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF" $(BIN)/python -m pip install -q llama-cpp-python
	@touch $@

.venv/.lm-eval: .venv/.test
	$(BIN)/python -m pip install -q lm-eval
	@touch $@
