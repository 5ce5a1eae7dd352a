# Two commands: `make quickstart` and `make test`. Each makes its own virtual environment when there is none.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
# The torch to install. Where no GPU is found its CPU build is preferred, if a configured package index has one.
TORCH ?= torch==2.13.0
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

BIN := $(VENV)/bin
# Of the torch that was asked for: another one is installed in its place.
INSTALLED := $(VENV)/.installed-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)
CODE := modeling_t3d examples conversion benchmarks tests setup.py

.PHONY: quickstart ablation test test-all lint clean

$(INSTALLED): setup.py Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if [ -z "$$(command -v nvidia-smi)" ]; then \
		$(BIN)/pip install -q "$(TORCH)+cpu" 2>/dev/null || $(BIN)/pip install -q "$(TORCH)"; \
	else $(BIN)/pip install -q "$(TORCH)"; fi
	$(BIN)/pip install -q -e ".[all,dev]"
	rm -f $(VENV)/.installed-*
	touch $@

# Phantoms as NIfTI files, pre-training from their manifest, evaluation of the saved folder: the steps of any project.
QUICKSTART := outputs/quickstart
quickstart: $(INSTALLED)
	$(BIN)/python examples/make_phantoms.py --output $(QUICKSTART)/phantoms --train 2400 --validation 100 --test 300 \
		--masks test --uncompressed --num-workers $(WORKERS)
	$(BIN)/accelerate launch --num_processes 1 --num_cpu_threads_per_process $(WORKERS) \
		examples/pretrain.py --config examples/configs/quickstart.yaml --resume
	$(BIN)/python examples/evaluate_phantoms.py --model $(QUICKSTART)/run/model \
		--manifest $(QUICKSTART)/phantoms/manifest.csv --output $(QUICKSTART)/evaluation --num-probe 300 \
		--num-workers $(WORKERS)

ablation: $(INSTALLED)
	$(BIN)/python examples/ablation.py --output outputs/ablation --results benchmarks/ablation \
		--table benchmarks/ablation.md $(ABLATION)

lint: $(INSTALLED)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -m "not slow" --durations=15

# Transformers' own common tests, which only its source distribution holds; of the version that is installed.
TRANSFORMERS_SOURCE ?= $(VENV)/transformers-source
$(VENV)/transformers-source: $(INSTALLED)
	rm -rf $@ $@.partial && mkdir -p $@.partial
	$(BIN)/pip download -q --no-deps --no-binary transformers -d $@.partial \
		transformers==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("transformers"))')
	tar -xf $@.partial/transformers-*.tar.gz -C $@.partial --strip-components 1
	mv $@.partial $@

# The long checks too; what the last complete run said is committed.
test-all: lint $(TRANSFORMERS_SOURCE)
	mkdir -p outputs
	set -o pipefail; OMP_NUM_THREADS=1 TRANSFORMERS_SOURCE=$(abspath $(TRANSFORMERS_SOURCE)) $(BIN)/pytest -n $(WORKERS) --durations=30 | tee outputs/test-all.log
	printf 'commit %s, %s, %s cores\n%s\n' "$$(git rev-parse --short HEAD)" "$$(date -u +%F)" "$$(nproc)" \
		"$$(tail -n 1 outputs/test-all.log)" > tests/last_full_run.txt

clean:
	rm -rf $(VENV) build *.egg-info
