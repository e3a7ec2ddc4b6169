"""Every model against what torch computed once: no torch needed.

Each NAME.npz has a NAME.py beside it, which says how its models are compared: GOLDEN (what is stored), CASES and
TOLERANCE, `load` and `distances`, WRONG (mutants that must be seen), `covered`, TRAINED, cases that are compared in
training too, and for `make.py` what it keeps of a case (`kept`) and `beside` them.
"""

import importlib
from pathlib import Path

import pytest

from tests.close import small

STORED = sorted(Path(__file__).parent.glob("*.npz"))
FILES = {file.stem: importlib.import_module(f"tests.goldens.{file.stem}") for file in STORED}
CASES = [(name, case) for name, file in FILES.items() for case in file.GOLDEN.peers]
TRAINED = [(name, case) for name, file in FILES.items() for case in getattr(file, "TRAINED", ())]
WRONG = [(name, wrong) for name, file in FILES.items() for wrong in file.WRONG]
SLOW = {("yolox", "yolox-depthwise")}  # they take long to compile; so do yolox's steps and wrong variants


def marked(pairs, slow=()):
    """Mark what is slow."""
    return [pytest.param(*pair, marks=[pytest.mark.slow] * (pair in SLOW or pair[0] in slow)) for pair in pairs]


def test_nothing_is_lost():
    assert all(set(file.CASES) == set(file.GOLDEN.peers) for file in FILES.values())
    assert len(CASES) >= 38 and len(TRAINED) >= 5 and len(WRONG) >= 14


@pytest.mark.parametrize(("name", "case"), marked(CASES))
def test_outputs_loss_and_gradients_are_torchs(name, case):
    file = FILES[name]
    found = file.distances(case, *file.load(case))
    print(case, found)
    small(max(found.values()), file.TOLERANCE)


@pytest.mark.parametrize(("name", "case"), marked(TRAINED, ["yolox"]))
def test_a_step_in_training_is_torchs(name, case):
    file = FILES[name]
    found = file.distances(case, *file.load(case), train=True)
    print(case, found)
    small(max(found.values()), getattr(file, "TRAINED_TOLERANCE", file.TOLERANCE))


@pytest.mark.parametrize(("name", "wrong"), marked(WRONG, ["yolox"]))
def test_a_wrong_variant_is_seen(name, wrong):
    """WRONG names how many tolerances off a mutant is at least, and what it leaves as it was."""
    file = FILES[name]
    case, change, seen, same = file.WRONG[wrong]
    model, params, places = file.load(case)
    found = file.distances(case, change(model), params, places)
    assert all(found[what] > times * file.TOLERANCE for what, times in seen.items()), found
    for what in same:
        small(found[what], file.TOLERANCE)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "yolox")) for name in FILES])
def test_every_form_is_covered(name):
    file = FILES[name]
    file.covered([file.load(case)[0] for case in file.GOLDEN.peers])
