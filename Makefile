# Releases of PyTorch and the others, besides those of constraints.txt: files in tests/constraints/.
RELEASES := oldest torch-2.9 torch-2.11 newest

.PHONY: demo test quick docs release ecosystem fidelity refinement speed datasets gpu coverage operators zoo fuzz capture low-precision narrow \
	soak clean $(RELEASES:%=test-%)

# The tests start many processes, and each would compile the sources again.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
# Has PyTorch with CUDA; docs/gpu.md says what else.
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
INSTALL := $(BIN)/python $(PIP) -c constraints.txt

demo: $(VENV)/.demo
	$(BIN)/python -m fxshap.demo

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.tools.house_words
	$(BIN)/pytest -n 2 --dist worksteal

# What a contributor runs before a commit, in under a minute: a part of the tests.
QUICK := docs/test_docs.py docs/test_figures.py ops report rules/test_softmax.py test_module.py testing verification
quick: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m tests.tools.house_words
	$(BIN)/pytest -n 2 --dist worksteal $(QUICK:%=tests/%)

docs: $(VENV)/.docs
	$(BIN)/python -m tests.tools.stamps
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html
	$(BIN)/python -m tests.tools.notebooks docs/guides/gallery

# The figures are those of the sources, and the wheel is one that a user can install.
release: $(VENV)/.release
	$(BIN)/python -m tests.tools.stamps --strict
	rm -rf build dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m tests.tools.release dist

ecosystem: $(VENV)/.ecosystem
	$(BIN)/pytest tests/ecosystem

fidelity: $(VENV)/.test
	-$(BIN)/python -m benchmarks.accuracy.fidelity
	$(BIN)/python -m benchmarks.accuracy.trained

refinement: $(VENV)/.test
	-$(BIN)/python -m benchmarks.accuracy.coalitions
	$(BIN)/python -m benchmarks.accuracy.patches
	$(BIN)/python -m benchmarks.accuracy.variances
	$(BIN)/python -m benchmarks.accuracy.local_averages
	$(BIN)/python -m benchmarks.accuracy.refinement
	$(BIN)/python -m benchmarks.accuracy.curves
	$(BIN)/python -m benchmarks.performance.refinement

speed: $(VENV)/.speed
	$(BIN)/python -m benchmarks.performance.speed --memory --growth --page docs/speed.md
	$(BIN)/python -m benchmarks.performance.explainer --page docs/speed.md

datasets: $(VENV)/.test
	$(BIN)/python -m benchmarks.performance.datasets --page docs/datasets.md

gpu:
	$(GPU_PYTHON) -m benchmarks.performance.gpu --page docs/gpu.md

coverage: $(VENV)/.zoo
	$(BIN)/python -m benchmarks.coverage

zoo: coverage

operators: $(VENV)/.test
	$(BIN)/python -m benchmarks.coverage.operators

fuzz: $(VENV)/.test
	$(BIN)/python -m tests.property networks --page docs/reliability.md

capture: $(VENV)/.zoo
	$(BIN)/python -m benchmarks.performance.capture

low-precision: $(VENV)/.test
	$(BIN)/python -m benchmarks.accuracy.low_precision

narrow: low-precision

soak: $(VENV)/.test
	$(BIN)/python -m benchmarks.performance.soak --page docs/reliability.md

# The tests that depend on releases, with others. `make test-oldest PYTHON=...` runs another Python.
test-oldest: PYTHON := python3.10
test-torch-2.9 test-torch-2.11: PYTHON := python3.12
test-newest: PYTHON := python3.13

$(RELEASES:%=test-%): test-%: $(VENV)-%/.test
	$(VENV)-$*/bin/python -m tests.tools.versions --page docs/versions.md

clean:
	rm -rf $(VENV) $(RELEASES:%=$(VENV)-%) build dist docs/_build docs/guides/gallery *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# Stamps: the environment, torch in it (first, so that nothing else picks its version), one per group
# of pyproject.toml, with the extras of setup.cfg that it needs.
EXTRAS := cli,demo
$(VENV)/.test $(VENV)/.ecosystem: EXTRAS := cli,demo,draw,ray,zarr
$(VENV)/.docs: EXTRAS := cli,demo,examples

$(VENV)/.pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) 'pip>=25.1'
	touch $@

$(VENV)/.torch: $(VENV)/.pip constraints.txt
	$(INSTALL) torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch setup.cfg pyproject.toml
	$(INSTALL) -e '.[demo]'
	touch $@

$(VENV)/.test $(VENV)/.docs $(VENV)/.speed $(VENV)/.release: $(VENV)/.%: $(VENV)/.torch setup.cfg pyproject.toml
	$(INSTALL) -e '.[$(EXTRAS)]' --group $*
	touch $@

# The vision zoos come without their dependencies, which would replace torch.
$(VENV)/.zoo: $(VENV)/.speed
	$(INSTALL) -e '.[$(EXTRAS)]' --group zoo
	$(INSTALL) --no-deps torchvision timm
	touch $@

# Nor do the attribution tools, which ask for torchvision.
$(VENV)/.ecosystem: $(VENV)/.torch setup.cfg pyproject.toml
	$(INSTALL) -e '.[$(EXTRAS)]' --group ecosystem
	$(INSTALL) --no-deps torchvision zennit grad-cam ttach opencv-python-headless torchcam
	touch $@

# Environments of other releases: one takes several GB, because older releases of PyTorch come with CUDA.
$(RELEASES:%=$(VENV)-%/.test): $(VENV)-%/.test: tests/constraints/%.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python $(PIP) 'pip>=25.1'
	$(VENV)-$*/bin/python $(PIP) -c $< torch
	$(VENV)-$*/bin/python $(PIP) -c $< -e '.[cli,demo,draw,ray,zarr]' --group test
	touch $@
