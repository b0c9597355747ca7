# `make repro` and `make test` need nothing but Python 3.11, git and make: both set themselves up.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
STUDIO_PORT ?= 7860
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DO_NOT_TRACK := 1
export MLFLOW_DISABLE_TELEMETRY := true
# Nothing here uses jobs, and their executors would be several more processes that start with the server
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := false
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_HOME := $(CURDIR)/.prefect
# Every stage is a process: where this is set, each would compile all that it imports anew, for seconds
unexport PYTHONDONTWRITEBYTECODE
UI_PORT ?= 5000
SERVE_PORT ?= 5001
IMAGES ?=
OPTIONS ?=
MODEL ?=
NAME =  # of the command line alone: some shells have a variable of this name
FOLDER =
DATASET_NAME := "from pathlib import Path; from tessera import params; print(params.read(Path('params.yaml')).dataset.name)"
BIND = "import socket; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(('127.0.0.1', $(1)))"
# $(1): the variable of a port, $(2): who may have it
require_free = @python -c $(call BIND,$($(1))) 2>/dev/null || { echo "make $@ cannot listen on 127.0.0.1:$($(1)): expected a \
free port ($(2)); stop what uses it, or choose another: make $@ $(1)=$$(($($(1)) + 10))" >&2; exit 2; }
.DEFAULT_GOAL := help
.PHONY: help setup start repro demo test check ui studio serve plots results docs map stack stack-down stack-status bench lock data-mnist data-fashion-mnist data-cifar10 data-emoji weights tokenizer clean

help:  ## show this list
	@grep -E '^[a-z0-9 -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 20

setup: .venv/.ready  ## build .venv from the hash-locked requirements

.venv/.ready: requirements.lock requirements-bootstrap.lock
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --require-hashes -r requirements-bootstrap.lock
	.venv/bin/uv pip install --quiet --python .venv/bin/python --require-hashes -r requirements.lock
	touch $@

# The core's packages alone, where nothing is installed yet
DEMO := $(if $(wildcard .venv/.ready),.venv,.venv-demo)
.venv-demo/.ready: requirements-core.lock requirements-bootstrap.lock
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python -m pip install --quiet --require-hashes -r requirements-bootstrap.lock
	.venv-demo/bin/uv pip install --quiet --python .venv-demo/bin/python --require-hashes -r requirements-core.lock
	touch $@

demo: $(DEMO)/.ready  ## draw digits into demo.png with weights that lie in the repository
	@$(DEMO)/bin/python -m tools.demo

start: setup  ## params.yaml for your own images: make start IMAGES=photographs; OPTIONS="--resolution 32 --minutes 10"
	@[ "$(IMAGES)" ] || { echo "make start needs a folder, tar or zip of images: make start IMAGES=photographs" >&2; exit 2; }
	@python -m tessera.start "$(IMAGES)" $(OPTIONS)

repro: setup  ## run the whole pipeline, print the table of systems and where their pictures lie
	python -m flows.reproduce
	@python -m tessera.tracking replay || true  # the tracker may be down; nothing is lost, replay later
	@echo; cat data/comparison/comparison.md; echo; python -m tessera.running.progress data/timings
	@echo "the whole run on one page: data/reports/report.html"

# Three, though there may be two cores: many tests wait, for servers, timeouts and each other's checkout. The longest begin first
test: setup  ## every test, on tiny data, in three processes of one thread each
	OMP_NUM_THREADS=1 pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

check: setup  ## style, import rules and contracts, in seconds
	ruff format --check . && ruff check . && mypy && lint-imports && pytest -q tests/contract

ui: setup  ## MLflow on http://127.0.0.1:5000 with every run; another port: make ui UI_PORT=5010
	$(call require_free,UI_PORT,if make stack runs then its MLflow is there: open that)
	@echo "systems and their figures: $$(python -m tessera.tracking view --server http://127.0.0.1:$(UI_PORT))"
	python -m serving.hosts mlflow server --workers 1 --host 127.0.0.1 --port $(UI_PORT) --backend-store-uri sqlite:///$(CURDIR)/mlflow.db

plots: setup  ## DVC's curves and pictures as a page that needs no internet
	@python -m tools.plots

serve: setup  ## images over HTTP on 127.0.0.1:5001 by the champion; MODEL=models:/NAME/VERSION, SERVE_PORT=5011
	$(call require_free,SERVE_PORT,a model may be served there by now)
	@if [ -z "$$MLFLOW_TRACKING_URI" ] && [ -f .stack/env ]; then . ./.stack/env; fi; \
	export MLFLOW_TRACKING_URI="$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db}"; \
	model="$(MODEL)"; [ "$$model" ] || model="models:/tessera-$$(python -c $(DATASET_NAME))@champion" || exit 2; \
	echo "serving $$model"; MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR=false exec python -m serving.images "$$model" --port $(SERVE_PORT)

# glibc gives large pictures back to the system when they are done with, instead of keeping their memory
studio: setup  ## draw and edit with the trained systems, on http://127.0.0.1:7860; STUDIO_PORT chooses another port
	@MALLOC_MMAP_THRESHOLD_=1000000 python -m studio.page --port $(STUDIO_PORT)

stack: setup  ## Prefect, MLflow and a worker in the background; what does not run is started
	@python -m flows.stack up

stack-down: setup  ## stop them, and the runs of the worker
	@python -m flows.stack down

stack-status: setup  ## which of them run, and where
	@python -m flows.stack status

results: setup  ## keep the evidence of the default run in docs/results, README's table with it
	python -m tools.results

docs: setup  ## build the site into site/, without the internet; a dead link is an error
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet
	@echo "open site/index.html"

map: setup  ## draw the rooms of the code and who imports whom into docs/floors.svg
	python -m tools.floors

bench: setup  ## our parts beside their peers', in one run
	python -m benchmarks.quantizer && python -m benchmarks.sampling && python -m benchmarks.frechet

lock: setup  ## resolve the dependencies of pyproject.toml anew
	uv pip compile pyproject.toml --all-extras --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet --output-file requirements.lock
	uv pip compile pyproject.toml --constraint requirements.lock --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet --output-file requirements-core.lock

data-mnist data-fashion-mnist data-cifar10 data-emoji: data-%: setup  ## download a data set into data/raw
	python data/download.py $*

weights: setup  ## download the Inception-v3 weights of the FID into data/weights, print the line for params.yaml
	python data/download.py inception

tokenizer: setup  ## a published tokenizer, and its lines for params.yaml: make tokenizer NAME=taesd downloads one, FOLDER=mine is there
	@[ "$(NAME)$(FOLDER)" ] || { echo "make tokenizer needs a NAME to download (python data/download.py --help) or a FOLDER that is there" >&2; exit 2; }
	@[ -z "$(NAME)" ] || python data/download.py "$(NAME)"
	@python -m tessera.sources.diffusers "$(or $(FOLDER),data/weights/$(NAME))"

clean:  ## remove what the pipeline made, keep the environment
	rm -rf .state $(addprefix data/,code comparison curves edits features images pictures priors reference previews reports samples timings tokenizers tokens)
