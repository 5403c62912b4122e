# Everything runs in .venv, which any target makes when it is missing. Needs make and Python 3.10 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
READY := $(VENV)/.ready
export PATH := $(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false
.PHONY: help demo test lab check docs site refresh gpu bench phone
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(READY): settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'tinyclip needs Python 3.10 or newer; name one with: make PYTHON=python3.12 ...'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(READY)

demo: $(READY) ## compress a small CLIP, offline, in minutes: demo/report.html
	@[ ! -e demo ] || { old=demo-$$(date +%Y%m%d-%H%M%S); mv demo $$old; echo "the last demo is now in $$old"; }
	tinyclip demo --folder demo

test: $(READY) ## every notebook cell that is not flagged, then pytest, then a browser, all of them: CPU, no network
	python tools/test.py

lab: $(READY) ## open the notebooks in JupyterLab
	jupyter lab nbs

refresh: $(READY) ## re-run a notebook and keep its outputs: make refresh NB=nbs/losses/03_mimicking.ipynb FLAGS='slow'
	python tools/refresh.py $(NB) --flags '$(FLAGS)' && nbdev_export --path $(NB) && nbdev_clean --fname $(NB)

check: $(READY) ## what must hold before a commit: export, tests, nothing out of step
	ruff format -q . && nbdev_export && nbdev_clean
	$(MAKE) test
	git diff --exit-code -- tinyclip nbs

gpu: $(READY) ## the cells and tests that need a GPU or minutes
	nbdev_test --n_workers 1 --flags 'cuda slow' && python -m pytest -q tests -m cuda

# LiteRT's converter pins older packages, so it lies in an environment of its own, on top of the other one.
PHONE := .venv-phone
$(PHONE)/.ready: $(READY)
	$(PYTHON) -m venv $(PHONE)
	$(BIN)/python -c 'import sysconfig as s; print("import site; site.addsitedir(%r)" % s.get_path("purelib"))' > "$$($(PHONE)/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))')/below.pth"
	$(PHONE)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[phone]'
	@touch $@

phone: $(PHONE)/.ready ## the cells and tests of the export for phones, in .venv-phone
	$(PHONE)/bin/python -c "from nbdev.test import nbdev_test; nbdev_test('nbs/zoo/14_litert.ipynb', flags='litert', n_workers=0)"
	$(PHONE)/bin/python -m pytest -q tests/test_litert.py

# What trains for long stays out (methods, leaps, mask_phase, embedded_teacher, flickr8k, landing, dashboard; take_away needs the students of methods): each says in its first lines how to run it.
SHARED ?= ../shared
bench: $(READY) ## time loss, step and loader into results/, half an hour; with a GPU into results/*-cuda
	python benchmarks/loss_memory.py --sizes 1024 2048 4096 8192 16384 32768
	python benchmarks/step.py
	python benchmarks/cached_step.py
	python benchmarks/masked_step.py
	python benchmarks/released_sizes.py
	python benchmarks/scaling.py
	python benchmarks/flat.py
	@if [ -d $(SHARED)/data/flickr8k ]; then python benchmarks/loader.py --shared $(SHARED); else echo 'The loader was not timed: it reads the photographs of $(SHARED)/data/flickr8k. Say where they are: make bench SHARED=folder'; fi

site: $(READY) ## process the website into _proc and check it: links, outputs, titles; no quarto needed
	python tools/site.py

# The page Try it runs on packages of npm; a folder that holds them does, too: make docs RUNTIME=folder
RUNTIME ?= npm
docs: $(READY) ## the website, into _docs; needs quarto and npm on PATH
	@command -v quarto >/dev/null || { echo 'quarto is not on PATH: install it from quarto.org, then run make docs again'; exit 1; }
	python tools/site.py && python tools/small_plotly.py _proc && cd _proc && quarto render --no-cache && rm -rf ../_docs && mv _docs ..
	python tools/try_it.py _docs/try_it --runtime $(RUNTIME)
