"""The files around the code: what lies at the top, and what other programs read."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TOP = {
    *("README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "SECURITY.md"),
    *("pyproject.toml", "requirements.lock", "launch.sh", "fm_jax", "experiments", "tests"),
}
MADE = {"runs", "build", "dist"}  # by runs and tools, and ignored by git


def test_nothing_else_lies_at_the_top() -> None:
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".") and path.suffix != ".egg-info"}
    assert names - MADE == TOP


@pytest.mark.parametrize(
    "path", [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml"], ids=lambda p: p.name
)
def test_what_other_programs_read_is_yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_workflow_runs_all_of_ci_and_the_default_tests_on_every_supported_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    whole, others = workflow["jobs"]["all"], workflow["jobs"]["default-tests"]
    assert whole["steps"][-1]["run"] == ".ci/run" and (ROOT / ".ci/run").stat().st_mode & 0o111
    assert others["steps"][-1]["run"] == "./launch.sh test"
    first = whole["steps"][1]["with"]["python-version"]
    assert [first, *others["strategy"]["matrix"]["python"]] == ["3.11", "3.12", "3.13"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={first}"


def test_the_commit_hooks_are_the_locked_tools_that_ci_runs() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    entries = [hook["entry"].split()[:2] for hook in repository["hooks"]]
    assert entries == [[".venv/bin/ruff", "check"], [".venv/bin/ruff", "format"], [".venv/bin/mypy"]]
    locked = re.findall(r"^(ruff|mypy)==", (ROOT / ".lock/dev.txt").read_text(), re.M)
    assert {*locked} == {"ruff", "mypy"}


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


def test_type_checkers_see_the_annotations_of_an_installed_package() -> None:
    assert (ROOT / "fm_jax/py.typed").exists()
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tool["setuptools"]["package-data"] == {"fm_jax": ["py.typed"]}
