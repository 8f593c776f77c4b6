"""The files around the code agree with each other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SYSTEMS = ("linux", "darwin", "win32")


def locked(python: str, system: str) -> dict[str, str]:
    """Name -> version of what the lock holds for one Python on one system."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": system,
        "platform_system": {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[system],
        "os_name": "nt" if system == "win32" else "posix",
        "platform_machine": "arm64" if system == "darwin" else "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    entries = [Requirement(line) for line in lines if line and not line.startswith(("#", " "))]
    here = [r for r in entries if r.marker is None or r.marker.evaluate(environment)]
    assert len({r.name for r in here}) == len(here)
    return {r.name: str(r.specifier).removeprefix("==") for r in here}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_lock_holds_every_dependency_within_its_range(python, system):
    versions = locked(python, system)
    extras = PROJECT["optional-dependencies"].values()
    for line in [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]:
        requirement = Requirement(line)
        if requirement.name == "temi":
            continue
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        assert versions[requirement.name] in requirement.specifier


def test_conda_installs_the_project_itself():
    """One list of dependencies: environment.yml holds Python, pip, and this project."""
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python, pip, section = dependencies
    version = python.removeprefix("python=")
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(version)
    assert pip == "pip"
    constraint, project = section["pip"]
    assert (ROOT / constraint.removeprefix("--constraint ")).exists()
    extras = re.fullmatch(r"--editable \.\[(.+)\]", project)[1].split(",")
    assert set(extras) == set(PROJECT["optional-dependencies"])


def test_conda_and_make_install_the_same():
    install = re.search(r"--constraint .*", (ROOT / "Makefile").read_text())[0].replace('"', "")
    assert install == " ".join(
        yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    )


def test_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    paper = citation["preferred-citation"]
    assert paper["title"] in (ROOT / "references.bib").read_text()


def test_importing_temi_imports_nothing_heavy():
    code = (
        "import sys, temi; print([m for m in ('torch', 'sklearn', 'pandas') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_every_public_name_can_be_imported():
    import temi

    for name in temi.__all__:
        assert getattr(temi, name) is not None
