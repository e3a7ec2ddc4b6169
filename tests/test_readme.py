"""The README's tables: each cell that names a test names one that is there and speaks of what the cell says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")


def families() -> dict[str, list[tuple[str, str]]]:
    """Row -> its (word, file) cells."""
    table = README.split("| family | loads |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {row[0]: [pair for cell in row[1:] for pair in LINK.findall(cell)] for row in rows}


@pytest.mark.parametrize("family", families())
def test_every_cell_of_a_family_is_a_test_that_speaks_of_it(family: str) -> None:
    links = families()[family]
    assert len(links) >= 5
    for word, file in links:
        assert word in (ROOT / file).read_text(), f"{file} does not say {word}"


def test_every_link_leads_somewhere() -> None:
    broken = [file for _, file in LINK.findall(README) if "://" not in file and not (ROOT / file).exists()]
    assert not broken


def test_every_experiment_is_in_the_house() -> None:
    missing = [
        path.name for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__" and path.name not in README
    ]
    assert not missing
