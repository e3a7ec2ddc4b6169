"""Run the notebooks and save them with their outputs: `python .ci/notebooks.py`. Jupyter is not needed.

A notebook is JSON; its code cells are run in order in one namespace. Their printed output is saved, and every
matplotlib figure that they leave open.
"""

import base64
import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "experiments" / "notebooks"


def main() -> None:
    """Run and save the notebooks named on the command line, or all."""
    for path in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        notebook = execute(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def execute(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return a notebook with new outputs of its code cells; the first exception stops it."""
    import matplotlib

    matplotlib.use("agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            printed = io.StringIO()
            source = compile("".join(cell["source"]), f"<cell {count}>", "exec")
            with contextlib.redirect_stdout(printed):
                exec(source, namespace)  # noqa: S102  # our own cells: running them is the purpose
            text = [{"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)}]
            cell = {**cell, "execution_count": count, "outputs": [*(text if printed.getvalue() else []), *figures()]}
        cells.append(cell)
    return {**notebook, "cells": cells}


def figures() -> Iterator[dict[str, Any]]:
    """Yield every open figure as a notebook output, and close it."""
    from matplotlib import pyplot

    for number in pyplot.get_fignums():
        file = io.BytesIO()
        pyplot.figure(number).savefig(file, format="png", dpi=80, bbox_inches="tight")
        pyplot.close(number)
        data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["<Figure>"]}
        yield {"output_type": "display_data", "data": data, "metadata": {}}


if __name__ == "__main__":
    main()
