"""The notebooks run from top to bottom, and are saved with what they print."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"\]\(([^)]+)\)")


def name(path: Path) -> str:
    return path.stem


def shape(notebook: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return each cell's kind and the kinds of its outputs: what no machine changes."""
    cells = notebook["cells"]
    return [(cell["cell_type"], [part["output_type"] for part in cell.get("outputs", [])]) for cell in cells]


def printed(notebook: dict[str, Any]) -> str:
    parts = [part for cell in notebook["cells"] for part in cell.get("outputs", [])]
    return "".join(line for part in parts for line in part.get("text", []))


def test_both_are_there() -> None:
    assert [path.name for path in PATHS] == ["finetune_public_model.ipynb", "read_and_patch.ipynb"]


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_a_notebook_is_saved_after_one_run_from_top_to_bottom(path: Path) -> None:
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell["outputs"]) for cell in code) > len(code) // 2
    assert not re.search(r"(^|[\s'\"])/\w+/", printed(notebook)), "prints a path of the machine that ran it"


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=name)
def test_a_notebook_runs_and_gives_the_kinds_of_output_that_it_was_saved_with(path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the notebooks draw with matplotlib: pip install matplotlib")
    saved = json.loads(path.read_text())
    ran = runpy.run_path(str(ROOT / ".ci" / "notebooks.py"))["execute"](saved)
    assert shape(ran) == shape(saved)
    if path.stem == "read_and_patch":
        assert "answer: 2" in printed(ran)  # the clean key: it has learnt the task
    else:
        assert "largest difference of the logits: 0.0" in printed(ran)
