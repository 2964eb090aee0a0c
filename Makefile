# Each target stands alone on a fresh machine with Python 3.11 and make: the first one makes .venv from the lock file.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# More options for the demo, e.g. make demo OVERRIDES="max_steps=60 seed=1"
OVERRIDES ?=

.PHONY: demo test test-slurm lint lock

demo: .venv/ready
	$(BIN)/python run.py experiment=demo $(OVERRIDES)

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Real SLURM daemons on this machine, as root; missing ones are installed with apt-get, and everything is taken down again at the end.
test-slurm: .venv/ready
	$(BIN)/python -m pytest tests/slurm --slurm

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

# Pin everything anew, for every supported Python, from setup.cfg.
lock: .venv/ready
	$(BIN)/uv pip compile --universal --python-version 3.11 setup.cfg --extra dev --no-header --no-annotate --upgrade -o requirements.lock

.venv/ready: requirements.lock
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	touch .venv/ready
