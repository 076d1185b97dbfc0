# The targets below explain themselves: make help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
DATA ?=
# One more than the processors of a small machine: tests of servers wait a third of their time.
PROCESSES ?= 3
RANDOM_SECRETS := $(addprefix secrets/,store_password control_key grafana_password)

.DEFAULT_GOAL := help
.PHONY: help setup secrets redis demo test unit lint types format check clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## Make the environment in .venv (Python 3.10 to 3.12; PYTHON=... chooses one)

$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py $(wildcard liber_runtime/native/*.cpp liber_runtime/native/*.h)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 12) else \
	  "error: $(PYTHON) is Python %d.%d; LIBER runs on 3.10 to 3.12: make PYTHON=python3.11 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable '.[serve,kafka,redis,llm,local,tallrec,build,bench,test,lint]'
	@touch $@

demo: setup  ## Run LIBER end to end: DATA=path/to/ml-100k, or the generated sample without it
	$(BIN)/liber demo $(if $(DATA),--data '$(DATA)') --output '$(RUN)'

redis:  ## Install redis-server (Debian, as root or with sudo) where it is missing; its tests are skipped without it
	@command -v redis-server >/dev/null || { \
	  as_root=''; [ "$$(id -u)" = 0 ] || as_root='sudo -n'; \
	  install="$$as_root apt-get install --yes --quiet --no-install-recommends redis-server"; \
	  $$install || { $$as_root apt-get update --quiet && $$install; }; } >/dev/null 2>&1 \
	  || echo 'redis-server cannot be installed here; the tests of stores in Redis are skipped'

secrets: $(RANDOM_SECRETS) secrets/redis_users secrets/writer_api_key  ## Make what compose.yaml keeps secret, in secrets/

# The directory is closed to others; the files are not, for services run as users of their own.
$(RANDOM_SECRETS):
	@mkdir -p -m 700 secrets
	@head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n' > $@

# The user health may ask Redis whether it is up, with any password. The default user keeps all its rights: Redis reads its
# append-only file as that user, and skips what that user may not do.
secrets/redis_users: secrets/store_password
	@{ echo "user default on #$$(sha256sum < $< | cut -d ' ' -f 1) ~* &* +@all"; \
	  echo 'user health on nopass resetkeys resetchannels -@all +ping'; } > $@

secrets/writer_api_key:
	@mkdir -p -m 700 secrets
	@touch $@

test: setup redis  ## Run all tests, those on the real Triton included (LIBER_DATA=path/to/ml-100k adds those on real data)
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

unit: setup redis  ## Run the tests that start no Triton
	$(BIN)/python -m pytest tests/unit tests/contract

lint: setup  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## Check types
	$(BIN)/mypy

format: setup  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types test  ## Everything CI runs

clean:  ## Remove the environment and all runs
	rm -rf $(VENV) runs
