# Each target does the set-up that it needs: a virtual environment with the locked dependencies and the package.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SNAKEMAKE := $(BIN)/snakemake
SMK := Snakefile $(wildcard workflow/rules/*.smk)

.PHONY: setup demo test test-slurm check bench schema clean lock

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make setup: Python 3.11 or newer is needed; name one with: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@echo "setting up $(VENV): about 3 GB, two minutes on a fast network"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup
	$(SNAKEMAKE) --profile profiles/local
	@echo
	@echo "The report is at results/demo/report.html, the table at results/demo/table.md. To go on:"
	@echo "  source $(BIN)/activate"
	@echo "  python -m medmask plan --configfile config/papers/noisy_labels_small.yaml"
	@echo "  snakemake --profile profiles/local --configfile config/papers/noisy_labels_small.yaml --config data_root=DATA"

test: setup
	$(BIN)/python -m pytest -m "not slurm" -n 2 --dist loadfile

# On a cluster of its own, which is left up (tests/slurm/cluster.sh down ends it); skipped where there can be none
test-slurm: setup
	@tests/slurm/cluster.sh up || test $$? = 3
	$(BIN)/python -m pytest tests/slurm --durations=0 --durations-min=5

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check $(SMK)
	$(BIN)/python tests/workflow/lint.py

bench: setup
	$(BIN)/python -m pytest bench

schema: setup
	$(BIN)/python -m medmask schema

lock: setup
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --extra dev --generate-hashes --no-annotate --no-header \
		--no-emit-index-url pyproject.toml -o requirements.lock

clean:
	rm -rf results work logs .snakemake .pytest_cache .mypy_cache .ruff_cache
