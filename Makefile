# make demo   installs into .venv and shows speculative decoding on the embedded pair
# make test   the same .venv with the tools of a developer: linter, types, tests
# make monitoring-test   the alert rules: unit tests, then every fault on a real Prometheus (needs Debian's packages)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test monitoring-test clean

demo: $(VENV)/installed
	@echo
	@echo "== greedy: the same tokens as plain decoding, and how much sooner =="
	$(BIN)/dspark generate "What drinks do you have?" --temperature 0 --dtype float32 --max-tokens 160 --compare
	@echo
	@echo "== sampled at temperature 1 with a seed: still the same tokens =="
	$(BIN)/dspark generate "Tom has 3 apples and buys 4 more. How many apples does he have?" --temperature 1 --seed 7 --dtype float32 --max-tokens 160 --compare
	@echo
	@echo "== next: serve it to any OpenAI client, and chat with it at http://127.0.0.1:8000/ =="
	@echo "$(PIP) install -e '.[serve]' && $(BIN)/dspark serve"

test: export OMP_NUM_THREADS = 1
test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

monitoring-test: $(VENV)/installed-dev
	promtool check rules monitoring/prometheus/rules.yml
	promtool test rules monitoring/prometheus/rules_test.yml
	amtool check-config monitoring/alertmanager/alertmanager.yml
	$(BIN)/python monitoring/exercise.py

# pip comes last when a virtual environment is made: without it, an earlier attempt was cut short.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(BIN)/pip
	$(PIP) install -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/pip
	$(PIP) install -e ".[dev]"
	@touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
