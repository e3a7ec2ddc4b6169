"""Write the index in experiments/README.md: each experiment with its docstring's first line and first command.

Run it after a docstring's first lines changed, or an experiment was added or moved: `python .ci/index.py`. A test
compares.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "experiments" / "README.md"
BEGIN, END = "<!-- index: written by .ci/index.py -->", "<!-- end of index -->"


def main() -> None:
    """Replace what stands between the two marks."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(before + BEGIN + "\n" + index() + END + after, encoding="utf-8")


def index() -> str:
    """Return a table for each folder of experiments, the top one first."""
    experiments = README.parent
    modules = [path for path in sorted(experiments.rglob("*.py")) if path.stem != "__init__"]
    folders = sorted({path.parent for path in modules})
    return "".join(
        f"\n{title(folder)}| experiment | what it does | first command |\n|---|---|---|\n"
        + "".join(row(path) for path in modules if path.parent == folder)
        for folder in folders
    )


def title(folder: Path) -> str:
    """Return a folder's heading with its docstring; the top folder needs none."""
    if folder == README.parent:
        return ""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    return f"### {folder.relative_to(README.parent).as_posix()}\n\n{text.splitlines()[0]}\n\n"


def row(path: Path) -> str:
    """Return a module's line of the table."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    where = path.relative_to(README.parent).as_posix()
    says = text.splitlines()[0].replace("|", "\\|")
    return f"| [{path.stem}]({where}) | {says} | `{next(commands(text))}` |\n"


def commands(text: str) -> Iterator[str]:
    """Yield the commands that a docstring gives, without their comments."""
    for line in text.splitlines():
        if found := re.match(r"\s+((?:\./launch\.sh local|python -m) experiments\.[^#]*)", line):
            yield found[1].strip()


if __name__ == "__main__":
    main()
