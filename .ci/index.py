"""Write the index in experiments/README.md: each experiment with its docstring's first line and first command.

Run `python .ci/index.py` after the first lines of a docstring changed, or an experiment was added or moved. A test
checks that the index is up to date.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "experiments" / "README.md"
BEGIN, END = "<!-- index: written by .ci/index.py -->", "<!-- end of index -->"


def main() -> None:
    """Replace the text between the two marks."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(before + BEGIN + "\n" + index() + END + after, encoding="utf-8")


def index() -> str:
    """Return a table for each folder of experiments, starting with the top folder."""
    experiments = README.parent
    modules = [path for path in sorted(experiments.rglob("*.py")) if not path.stem.startswith("_")]
    folders = sorted({path.parent for path in modules})
    return "".join(
        f"\n{title(folder)}| experiment | what it does | first command |\n|---|---|---|\n"
        + "".join(row(path) for path in modules if path.parent == folder)
        for folder in folders
    )


def title(folder: Path) -> str:
    """Return a folder's heading with its docstring; "" for the top folder."""
    if folder == README.parent:
        return ""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    return f"### {folder.relative_to(README.parent).as_posix()}\n\n{text.splitlines()[0]}\n\n"


def row(path: Path) -> str:
    """Return a module's row of the table."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    where = path.relative_to(README.parent).as_posix()
    summary = text.splitlines()[0].replace("|", "\\|")
    return f"| [{path.stem}]({where}) | {summary} | `{next(commands(text))}` |\n"


def commands(text: str) -> Iterator[str]:
    """Yield the commands in a docstring, without their comments."""
    for line in text.splitlines():
        if match := re.match(r"\s+((?:\./launch\.sh local|python -m) experiments\.[^#]*)", line):
            yield match[1].strip()


if __name__ == "__main__":
    main()
