"""Detectors beside torchvision and libreyolo, in a process of their own, which has both on PYTHONPATH.

Without them no file here is collected, and `pytest -m parity tests/parity/detectors` then fails for want of tests.
"""

from importlib.util import find_spec

NEEDS = ("torch", "torchvision", "libreyolo")
MISSING = [name for name in NEEDS if find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_report_header():
    if MISSING:
        return f"tests/parity/detectors is left out, because {', '.join(MISSING)} cannot be imported; see .ci/run"
