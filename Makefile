# make demo    run the whole pipeline on the built-in data set (a few minutes on 2 cores)
# make test    lint, type check, and the tests of a few minutes
# make test-all    make test, then the tests that it leaves out (under half an hour together)
# make gpu     check and measure the GPU path on this machine's GPU, in 10 minutes
# make docs    write docs/reference/grid-file.md and cluster-profile.md from the models
# make cluster start a Slurm cluster of 4 nodes on this machine, as root
# make mutants MODULE=jobs/losses/functional.py    what do the tests overlook? (CONTRIBUTING.md)
# demo, test, test-all and mutants set up .venv first; a second run reuses it.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test test-all gpu lint docs mutants venv cluster clean

demo: $(READY)
	$(BIN)/python -m pipeline.submit all configs/demo.toml --wait --cluster local

test: lint
	$(BIN)/python -m pytest -n 3 -m "not slow" --fuzz-cases 300

test-all: test
	$(BIN)/python -m pytest -n 4 -m "slow or fuzz"

gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu_check

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.prose

docs: $(READY)
	$(BIN)/python -m tests.reference

mutants: $(READY)
	$(BIN)/python -m tests.mutants $(MODULE)

venv: $(READY)

cluster:
	@tests/cluster/cluster up 4
	@echo "4 nodes are up, in the partitions batch and urgent. To use them:"
	@echo "    $$(tests/cluster/cluster env)"
	@echo "    sinfo"
	@echo "    .venv/bin/python -m pipeline.submit all configs/demo.toml --cluster test-cluster"
	@echo "Fail and revive nodes with tests/cluster/cluster; 'tests/cluster/cluster down' ends it all."

# The stamp is made last, so that an interrupted installation is taken up again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; install one and run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { test "$$(id -u)" = 0 && tests/cluster/apt-install "$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; } || { echo "error: $(PYTHON) cannot make virtual environments; install your system's python3-venv package" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing lossgrid and what it needs into .venv (once; some GB for torch)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[mpi,dev]'
	@touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache mutants
