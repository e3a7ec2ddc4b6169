"""Every family: the files LANGUAGE/FAMILY.py and VISION/FAMILY.py, over which hub, golden and live tests loop.

A file needs no torch to be imported. It holds
    FORMS, FEW       tiny configs of every form, and one of each way of naming and storing (tests/hub)
    CASES            name -> what the peer is built of
    peer(case)       the peer, a model of torch, with every tensor moved away from its start
    batch(case)      the rows on which both are compared
    theirs, ours     the answers to them (see distances.py), `ours` as a jitted function of our parameters
    tensors(peer)    the weights by name
    INSIDES          masks of real tokens
    TOLERANCE        how far the answers may be apart; FRESH = False where only a moved model can be compared
    MUTANTS          name -> (case, (our module, parameters) -> the same, one of them wrong)
"""

import importlib
from pathlib import Path

FAMILIES = {
    file.stem: importlib.import_module(f"tests.parity.{file.parent.name}.{file.stem}")
    for file in sorted(Path(__file__).parent.glob("*/*.py"))
    if file.parent.name != "detectors"  # their peers live in a process of their own
}
FAMILY = {case: file for file in FAMILIES.values() for case in file.CASES}  # case -> its family's file
MUTANTS = {f"{name}: {mutant}": how for name, file in FAMILIES.items() for mutant, how in file.MUTANTS.items()}
