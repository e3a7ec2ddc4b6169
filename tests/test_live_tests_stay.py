"""How many comparisons with live torch there are: counted in the source, for most machines cannot run them.

A number here may rise, and never fall without a reason in the commit that lowers it.
"""

import ast
from pathlib import Path

import pytest

PARITY = Path(__file__).parent / "parity"
NAMED = {  # file, the dictionary that a test is parametrised with -> its entries
    ("peers", "CASES"): 13,
    ("encoder_peers", "CASES"): 20,
    ("t5_peers", "CASES"): 6,
    ("conv_peers", "CASES"): 9,
    ("vit_peers", "CASES"): 12,
    ("test_decoder", "MUTANTS"): 17,
    ("test_encoder", "MUTANTS"): 16,
    ("test_t5", "MUTANTS"): 11,
    ("test_t5", "CODE"): 3,
    ("test_conv_nets", "MUTANTS"): 10,
    ("test_vit", "MUTANTS"): 18,
    ("test_vit", "BROKEN"): 7,
}
TESTS = {
    "test_conv_nets": 14, "test_decoder": 2, "test_encoder": 7, "test_harness": 3, "test_hub": 12,
    "test_preprocessing": 4, "test_t5": 9, "test_tokenizer": 4, "test_transfer": 1, "test_vit": 12,
}  # fmt: skip


def parsed(name):
    return ast.parse((PARITY / f"{name}.py").read_text()).body


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_no_case_and_no_mutant_is_lost(file, name):
    given = [
        node.value
        for node in parsed(file)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and target.id == name
    ]
    assert [len(value.keys) for value in given if isinstance(value, ast.Dict)] == [NAMED[file, name]]


def test_no_live_test_is_lost():
    files = {file.stem for file in PARITY.glob("test_*.py")}
    found = {
        name: sum(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in parsed(name))
        for name in files
    }
    assert found == TESTS
