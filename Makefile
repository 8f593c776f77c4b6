# Each target first makes .venv where it is missing or older than the lock.
PYTHON ?= python3
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
RUN := runs/digits-pixels
NOTEBOOKS := $(wildcard notebooks/[0-9][0-9]_*.ipynb)

.PHONY: train test kill-test book links notebooks results run-times lock lint clean
.DELETE_ON_ERROR:

train: .venv/ready  ## cluster the digits; after an interrupt: make train ARGS="-p resume auto"
	$(BIN)/papermill notebooks/05_train.ipynb train.part.ipynb -p run_dir $(RUN) $(ARGS)
	mv train.part.ipynb $(RUN)/train.ipynb
	@$(BIN)/python -c "import temi; print(temi.summary('$(RUN)'))"

test: .venv/ready  ## unit tests, and every notebook against its stored outputs
	$(BIN)/pytest --nbval

kill-test: .venv/ready  ## a hundred trainings killed at random moments, and resumed
	TEMI_KILLS=100 $(BIN)/pytest tests/test_resume.py

book: .venv/ready  ## the book, warnings as errors: _build/html/index.html
	$(BIN)/jupyter-book build . --all -W -n --keep-going

links: .venv/ready  ## addresses outside the book, over the network: _build/linkcheck/output.txt
	$(BIN)/jupyter-book build . --builder linkcheck --keep-going

notebooks: .venv/ready  ## run all notebooks again and store their outputs
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --coalesce-streams \
		--ExecutePreprocessor.record_timing=False $(NOTEBOOKS)
	$(BIN)/jupyter nbconvert --to notebook --inplace --coalesce-streams $(NOTEBOOKS)

results: .venv/ready  ## tables and figures of the digits in results/; ablations that are there stay
	$(BIN)/python benchmarks/digits_scores.py
	$(BIN)/python benchmarks/ablations.py $(ABLATIONS)

run-times: .venv/ready  ## run every chapter once, and store seconds, memory and versions
	$(BIN)/python benchmarks/run_times.py

lock: .venv/ready  ## resolve the ranges of pyproject.toml for all Pythons and systems
	$(BIN)/pip install uv
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 \
		--upgrade --no-annotate --custom-compile-command "make lock" -o requirements.lock

lint: .venv/ready  ## style, and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv _build

.venv/ready: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint requirements.lock --editable ".[notebooks,lite,large,book,test]"
	@touch $@
