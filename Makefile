# The study by name: `make` lists what there is. Everything runs in a virtual environment that the
# first target to need it sets up, from the pinned versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
NOTEBOOKS := notebooks/*.ipynb
STRIP := $(BIN)/nbstripout --keep-id --extra-keys "metadata.papermill cell.metadata.papermill metadata.widgets"

# Threads that wait for others should sleep: spinning, they slow down what runs beside them.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup book serve test test-book bench links lint format strip clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Install everything into .venv (the other targets do so when it is needed)

# torch comes first and by its pin alone: left to the resolver, other versions would be tried, and
# each brings gigabytes of CUDA.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	@echo "Installing into .venv: some minutes, of which most are torch"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[book,dev]'
	@touch $@

book: $(INSTALLED) ## Run the notebooks that changed and build the book into _build/html
	@$(BIN)/python -m doit
	@echo "The book: $(CURDIR)/_build/html/index.html"

serve: book ## Build the book and serve it on this machine, at port 8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html 8000

# A worker a core, four at most for the sake of memory.
WORKERS := -n auto --maxprocesses 4 --dist worksteal

test: $(INSTALLED) ## Run the tests, less those of the built book; ARGS="-k name" for some of them
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

test-book: book ## Build the book and look at every page in Chromium: links, formulas, contrast, phones
	$(BIN)/python -m pytest $(WORKERS) -m browser tests $(ARGS)

links: book ## Check the book's links to other sites, over the network
	$(BIN)/jupyter-book build _build/stage --builder linkcheck --path-output _build/linkcheck

bench: $(INSTALLED) ## Time the package against plain ways of the same, in ratios (minutes)
	$(BIN)/python -m pytest benchmarks/bench_*.py -p no:randomly -s --benchmark-enable --benchmark-timer=time.process_time $(ARGS)

lint: $(INSTALLED) ## Check style, and that notebooks hold no outputs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(STRIP) --verify $(NOTEBOOKS)

format: $(INSTALLED) strip ## Put style right, and strip notebooks of outputs
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

strip: $(INSTALLED) ## Strip notebooks of outputs and of traces of their runs
	$(STRIP) $(NOTEBOOKS)

clean: ## Remove what was built and cached; .venv stays
	rm -rf _build .benchmarks .pytest_cache .ruff_cache .hypothesis .coverage
