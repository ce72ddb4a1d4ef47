# Everything a reader or CI needs. `make` alone lists the targets. GNU make 3.81 or newer.

PYTHON ?= python3
# The tested versions. On a machine that must keep its own: make CONSTRAINTS= ...
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
PIP_QUIET := $(if $(CI),--quiet)
NOTEBOOKS := $(wildcard notebooks)

.PHONY: help install demo gallery app docs test lab notebooks full train-tiny tables bench doctor lint clean
.DEFAULT_GOAL := help

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## make .venv and install the library with its tested versions

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@echo "Setting up $(VENV); the first time this takes some minutes."
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(PIP_QUIET) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[dev]"
	@touch $@

# By the environment, so that no character of a file's name means anything to make or the shell.
demo: export DEMO_IMAGE := $(value IMAGE)
demo: $(INSTALLED) ## one image -> 3D Gaussians; IMAGE=my.png for your own picture, ELEVATION=auto or degrees
	$(PY) -m gsv3d_lib demo $(if $(value IMAGE),--image="$$DEMO_IMAGE") $(if $(ELEVATION),--elevation=$(ELEVATION))

gallery: $(INSTALLED) ## gallery.html: many objects, two side by side; THINGS="my_pictures runs/demo"
	$(PY) -m gsv3d_lib gallery $(or $(THINGS),data/images) --out gallery.html

# What the Makefile installs beyond .venv's own packages, on first use.
$(VENV)/.docs $(VENV)/.app: $(VENV)/.%: $(INSTALLED)
	$(PY) -m pip install $(PIP_QUIET) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[$*]"
	@touch $@

# The page listens on the loopback address alone: no other machine can reach it.
app: $(VENV)/.app ## a page in the browser: drop a picture, correct its mask, turn the object
	JUPYTER_PATH=notebooks/app $(PY) -m voila notebooks/app.ipynb --template=gsv3d --Voila.ip=127.0.0.1

docs: $(VENV)/.docs ## the website, in build/site; open build/site/index.html
	$(PY) -m sphinx -W --keep-going -q -b html -c docs -d build/doctrees . build/site

test: $(INSTALLED) ## every test and every notebook, offline
	HF_HUB_OFFLINE=1 $(PY) -m pytest -q -n $(WORKERS) --dist loadscope \
		--nbval-lax --nbval-current-env --nbval-cell-timeout=300 tests $(NOTEBOOKS)

lab: $(INSTALLED) ## JupyterLab on the notebooks; its options in ARGS: --no-browser, in a container --allow-root
	$(PY) -m jupyterlab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks/00_from_one_image_to_3d.ipynb $(ARGS)

notebooks: $(INSTALLED) ## run every notebook in place: outputs, time and memory; and the pictures of the README
	$(PY) tools/refresh.py
	$(PY) tools/thumbnails.py
	$(PY) tools/refresh.py --hero docs/images/hero.webp

full: $(INSTALLED) ## one notebook with a parameter set: make full NB=07 PARAMS=paper
	$(if $(NB),,$(error say which notebook and parameter set, such as: make full NB=07 PARAMS=tiny))
	$(PY) -m gsv3d_lib run $(NB) --params $(or $(PARAMS),tiny) $(ARGS)

train-tiny: $(INSTALLED) ## train all stages at tiny scale on procedural objects, into runs/tiny
	$(PY) -m gsv3d_lib make_dataset --procedural 300 --seed 0 --out data/cache/procedural
	$(PY) -m gsv3d_lib train --preset tiny --data data/cache/procedural --out runs/tiny

tables: $(INSTALLED) ## write the generated tables of README and docs again
	$(PY) tools/tables.py

bench: $(INSTALLED) ## speed of the rasterisers, then of training steps and generation, on this machine
	$(PY) benchmarks/rasterizer.py
	$(PY) benchmarks/chain.py

doctor: $(INSTALLED) ## what this machine has, what falls back, and how to fix it
	$(PY) -m gsv3d_lib doctor

lint: $(INSTALLED) ## ruff: rules and format; pyright: types of the core
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m basedpyright --pythonpath $(PY)

clean: ## remove caches and build leftovers; keeps .venv, runs and data
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .numba_cache
	find gsv3d_lib tests tools benchmarks notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
