# make demo   sets everything up and runs the whole chain on built-in data (results in runs/demo)
# make test   sets everything up, checks style and types, and runs the tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test setup clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/python demo/quickstart.py

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; choose one with: make PYTHON=python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || \
	  { echo "error: $(PYTHON) cannot make a virtual environment (on Debian: apt install python3-venv)" >&2; exit 2; }
	$(BIN)/pip install --quiet -c constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
