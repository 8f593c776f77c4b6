"""What is collected, and where notebooks write while they are tested."""

import os
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent


def pytest_configure(config):
    """Everything that temi writes goes to a temporary place, never into the user's runs."""
    config.temi_home = tempfile.mkdtemp(prefix="temi-test-")
    os.environ["TEMI_HOME"] = config.temi_home


def pytest_unconfigure(config):
    shutil.rmtree(config.temi_home, ignore_errors=True)


def pytest_ignore_collect(collection_path):
    """Of all notebooks, only the numbered ones are the book's: no output of papermill."""
    if collection_path.suffix == ".ipynb":
        return not collection_path.match("notebooks/[0-9][0-9]_*.ipynb") or None
    return None
