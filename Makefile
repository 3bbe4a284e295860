# make demo   pictures of all six modalities from the embedded model, offline once the packages are installed
# make test   style, types and tests
# make space  the pages to generate and rate images, at http://127.0.0.1:7860
# make test-diffusers   loading, saving and publishing with the older diffusers that are admitted
# make lint   style and types
# make clean  removes .venv and what the other targets made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

export HF_HUB_OFFLINE := 1

.PHONY: demo test test-diffusers space lint clean

demo: $(VENV)/.installed
	@rm -rf demo
	$(BIN)/minim generate --prompts-file docs/demo.csv --num-images 2 --seed 0 --output-dir demo
	@echo "The pictures: $(CURDIR)/demo/grid.png, and one by one in $(CURDIR)/demo (listed in data.csv)"

space: $(VENV)/.installed-space
	$(BIN)/python space/app.py

# One thread a worker: on two cores, tests that share them are slower than tests side by side. And one worker more than
# cores, since tests of servers and browsers wait.
test: lint
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n 3 --dist worksteal

test-diffusers: $(VENV)/.installed-test
	@set -e; for version in 0.40.0 0.41.0; do \
		$(PIP) install --no-deps --upgrade --target build/diffusers-$$version diffusers==$$version; \
		PYTHONPATH=build/diffusers-$$version OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist worksteal \
			tests/test_hub_loading.py tests/publishing/test_push_to_hub.py tests/test_pipeline_loading.py; \
	done

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .ruff_cache

# Where Python comes without ensurepip (Debian's), pip outside of the environment puts one into it.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@touch $@

# Without build isolation an unchanged environment needs no network to install again.
$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing packages into $(VENV); on a fresh machine this takes some minutes"
	$(PIP) install "setuptools>=77"
	$(PIP) install --no-build-isolation --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --no-build-isolation --constraint constraints.txt --editable ".[test]"
	@touch $@

$(VENV)/.installed-space: $(VENV)/.installed space/requirements.txt
	$(PIP) install --constraint constraints.txt --requirement space/requirements.txt
	@touch $@
