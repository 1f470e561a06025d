# On a fresh machine, `make demo` and `make test` do everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := outputs/digits
PIP_OPTIONS ?=
DEMO_TOKENIZER_OPTIONS ?=
DEMO_AR_OPTIONS ?=
BENCH_OPTIONS ?=

.PHONY: install demo test test-all test-serve test-versions check bench clean

install: $(VENV)/.installed

# editable, with all versions pinned by constraints.txt. PyPI's torch for Linux brings CUDA; on a machine without a GPU,
# make install PIP_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu" saves gigabytes
$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) -c constraints.txt -e ".[demo,dev]"
	touch $@

demo: install
	@echo "1 of 3: the tokenizer, which takes longest"
	$(BIN)/python examples/train.py tokenizer --preset digits --output_dir $(OUT)/tokenizer \
		--overwrite_output_dir $(DEMO_TOKENIZER_OPTIONS)
	@echo "2 of 3: the language model"
	$(BIN)/python examples/train.py ar --preset digits --tokenizer $(OUT)/tokenizer --output_dir $(OUT)/pipeline \
		--overwrite_output_dir $(DEMO_AR_OPTIONS)
	@echo "3 of 3: metrics and pictures"
	$(BIN)/python examples/evaluate_digits.py --pipeline $(OUT)/pipeline --output_dir $(OUT)

# one process per core: small models gain nothing from threads. test: what is quick, and one end-to-end run
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist loadgroup

test: install
	$(PYTEST) -m "not slow"

test-all: install
	$(PYTEST)

# the server on Ray Serve, which `install` leaves out: Ray and what it needs take 300 MB
test-serve: install
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) -c constraints.txt -e ".[serve]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/serving

# a few tests with the newest releases that setup.py allows, and with its lower bounds
test-versions: install
	PYTHON=$(PYTHON) PIP_OPTIONS="$(PIP_OPTIONS)" bash .ci/versions newest
	PYTHON=$(PYTHON) PIP_OPTIONS="$(PIP_OPTIONS)" bash .ci/versions lowest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src

# a quarter of an hour on two cores; BENCH_OPTIONS="--preset B --batch_sizes 1" for less
bench: install
	$(BIN)/python benchmarks/speed.py $(BENCH_OPTIONS)

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-lowest outputs build
