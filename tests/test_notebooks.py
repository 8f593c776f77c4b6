"""The notebooks' form, and that papermill runs them as the text promises."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))
TAGS = {"parameters", "check", "hide-cell", "hide-input", "nbval-ignore-output"}
TRAIN = ROOT / "notebooks" / "05_train.ipynb"
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(home|root|tmp|work|Users|mnt|opt|var)/")


def texts(output) -> str:
    data = output.get("data", {})
    plain = "".join(data.get("text/plain", "")) if "image/png" not in data else ""
    return output.get("text", "") + plain


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def test_form(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert [cell for cell in code_cells(notebook) if "parameters" in tags(cell)]
    for cell in notebook.cells:
        assert cell.source.strip()
        assert tags(cell) <= TAGS
        assert not cell.get("attachments")
    for cell in code_cells(notebook):
        assert "parameters" in tags(cell) or cell.source.count("\n") < 12, cell.source
    first, last = notebook.cells[0].source, notebook.cells[-1].source
    assert first.startswith("# ")
    assert "After this chapter you can" in first
    assert "## What was shown" in last


def test_stored_outputs(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert all(cell.execution_count for cell in code_cells(notebook))
    assert outputs
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
    assert not MACHINE_PATH.search(json.dumps(notebook))


def test_claims_are_checked_and_outputs_compared(notebook):
    """Half of the text outputs or more are compared; what is not has a check behind it."""
    cells = code_cells(notebook)
    ignored = [
        "nbval-ignore-output" in tags(cell) for cell in cells if any(map(texts, cell.outputs))
    ]
    assert sum(ignored) <= len(ignored) / 2
    last_ignored = max(
        (i for i, c in enumerate(cells) if "nbval-ignore-output" in tags(c)), default=-1
    )
    assert last_ignored < 0 or any("assert " in cell.source for cell in cells[last_ignored:])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_small_and_in_the_book(path):
    assert path.stat().st_size < 400_000
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]
    pages = [chapter["file"] for part in parts for chapter in part["chapters"]]
    assert f"notebooks/{path.stem}" in pages


def test_the_book_is_read_in_an_afternoon():
    """Code and text at 230 words a minute: a chapter in 25 minutes, all of them in three hours."""
    notebooks = [nbformat.read(path, as_version=4) for path in NOTEBOOKS]
    words = [sum(len(cell.source.split()) for cell in notebook.cells) for notebook in notebooks]
    assert max(words) < 25 * 230
    pages = [path.read_text() for path in ROOT.glob("*.md")]
    assert sum(words) + sum(len(page.split()) for page in pages) < 180 * 230


@pytest.mark.parametrize("folder", [".", "notebooks"])
def test_papermill_runs_from_root_and_from_the_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TEMI_HOME", str(tmp_path))
    command = [sys.executable, "-m", "papermill", str(TRAIN), str(tmp_path / "out.ipynb")]
    options = ["-p", "beta", "0.7", "-p", "num_heads", "4", "-p", "epochs", "2"]
    subprocess.run([*command, *options], cwd=ROOT / folder, check=True, capture_output=True)
    (results,) = tmp_path.glob("runs/digits-pixels-num_heads4-beta0.7-epochs2/final_results.json")
    config = json.loads(results.read_text())["config"]
    assert (config["beta"], config["num_heads"], config["epochs"]) == (0.7, 4, 2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bta", 0.7, "bta=0.7: there is no such parameter here (did you mean 'beta'?)"),
        ("resume", "gone.pth", "resume='gone.pth': there is no such checkpoint"),
        ("force_recompute", "false", "force_recompute='false': True or False is allowed"),
        ("epochs", 1e2, "epochs=100.0: a whole number from 1 is allowed"),
        ("batch_size", 4000, "batch_size=4000: at most 1797 is allowed with 1797 images"),
    ],
)
def test_papermill_stops_at_bad_parameters(name, value, message, tmp_path, monkeypatch):
    monkeypatch.setenv("TEMI_HOME", str(tmp_path))
    with pytest.raises(papermill.PapermillExecutionError) as error:
        papermill.execute_notebook(
            TRAIN, tmp_path / "out.ipynb", {name: value}, progress_bar=False, log_output=False
        )
    assert error.value.evalue.startswith(message)
    assert "\n" not in error.value.evalue
    assert [path.name for path in tmp_path.iterdir()] == ["out.ipynb"]


def pytest_in(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "--nbval", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def small_project(tmp_path):
    """This project's pytest settings over one test and three notebooks, two of them not its own."""
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("tests", "notebooks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("def test_a():\n    pass\n")
    cell = nbformat.v4.new_code_cell("print(1 + 1)", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="2\n")]
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata=nbformat.read(TRAIN, 4).metadata)
    for name in ("out.ipynb", "notebooks/out.ipynb", "notebooks/01_a.ipynb"):
        nbformat.write(notebook, tmp_path / name)
    return tmp_path


def test_pytest_collects_the_book_alone(small_project):
    result = pytest_in(small_project, "--collect-only")
    collected = [line for line in result.stdout.splitlines() if "::" in line]
    assert collected == ["tests/test_a.py::test_a", "notebooks/01_a.ipynb::Cell 0"]


def test_nbval_fails_when_a_stored_output_does_not_hold(small_project):
    assert pytest_in(small_project).returncode == 0
    file = small_project / "notebooks" / "01_a.ipynb"
    file.write_text(file.read_text().replace('"2\\n"', '"3\\n"'))
    assert pytest_in(small_project).returncode == 1
