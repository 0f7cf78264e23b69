# Every target brings the machine to what it needs first (scripts/setup); that takes no time when nothing is missing.
#
#   make demo [TOPOLOGY=sites|cluster] [ONCE=1] [PORT_BASE=n]        make test [TESTS="tests/unit -k ids"]
#   make test-containers [CONTAINER_TESTS="tests/containers/test_image.py"]        needs Docker with Compose
#   make lint    make format    make bench [BENCH="..."]     make lock [UPGRADE=1]    make clean

TESTS ?= tests/unit tests/integration tests/system
CONTAINER_TESTS ?= tests/containers
# Most system tests wait for timeouts and for servers to start, so two share two cores well. 0: none beside pytest.
TEST_PROCESSES ?= 2
# Most container tests wait for containers to be ready. 0 as above.
CONTAINER_PROCESSES ?= 3
PYTHON := .venv/bin/python
# Tests and demos start hundreds of processes; none of them should compile all of skipbus anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-containers lint format bench lock clean

# make hands TOPOLOGY, ONCE and PORT_BASE on by itself. The line stays without shell syntax: a shell in between would
# die of Ctrl-C before the demo has ended.
demo:
	@scripts/setup python servers curl
	@$(PYTHON) -m sandbox.demo

test:
	@scripts/setup python servers curl stunnel haproxy clients
	@$(PYTHON) -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(TESTS)

# A missing engine fails the run; it is not installed here, because it would be the whole machine's.
# The tests end what they start, and say what is left, so they need no reaper beside them.
test-containers:
	@scripts/setup python
	@PYTHON=$(PYTHON) PROCESSES=$(CONTAINER_PROCESSES) TESTCONTAINERS_RYUK_DISABLED=true \
	    scripts/test-containers $(CONTAINER_TESTS)

lint:
	@scripts/setup python
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy --strict

format:
	@scripts/setup python
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench:
	@scripts/setup python servers wrk stunnel
	@$(PYTHON) -m bench $(BENCH)

lock:
	@scripts/setup python
	PYTHON=$(PYTHON) scripts/lock

clean:
	rm -rf .venv .venv-clients .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
