"""The live comparison with other libraries: every test here has the mark `parity` and needs what NEEDS names.

Where something is missing a file is not collected at all, so that it may import what it compares with at its top;
`pytest -m parity` then fails for want of tests instead of passing.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NEEDS = {
    "test_tokenizer.py": ("transformers",),
    "test_chat.py": ("torch", "transformers", "jinja2"),
    "test_gguf.py": ("torch", "transformers", "gguf"),
    "test_harness.py": ("torch", "transformers", "lm_eval"),
}
USUAL = ("torch", "transformers")


def _missing(file):
    return [name for name in NEEDS.get(file.name, USUAL) if find_spec(name) is None]


_WANTED = {file.name: _missing(file) for file in sorted(HERE.glob("test_*.py"))}
collect_ignore = [name for name, missing in _WANTED.items() if missing]


def pytest_report_header():
    if collect_ignore:
        wanted = sorted({name for absent in _WANTED.values() for name in absent})
        return f"{len(collect_ignore)} files of tests/parity are left out: pip install {' '.join(wanted)}"


@pytest.hookimpl(tryfirst=True)  # before -m chooses by mark
def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.parity)
