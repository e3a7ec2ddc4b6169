"""How many comparisons with live torch there are: counted here, for most machines cannot run them.

A number here may rise, and never fall without a reason in the commit that lowers it.
"""

import ast
from pathlib import Path

import pytest

from tests.parity.all_families import FAMILIES, FAMILY

PARITY = Path(__file__).parent / "parity"
CASES = {
    "gpt2": 6, "llama": 18, "bert": 22, "t5": 6, "resnet": 7, "efficientnet": 4, "vit": 12, "faster_rcnn": 0,
    "yolox": 0, "yolov3": 0, "clip": 7,
}  # fmt: skip
MUTANTS = {
    "gpt2": 11, "llama": 18, "bert": 18, "t5": 11, "resnet": 8, "efficientnet": 3, "vit": 18, "faster_rcnn": 0,
    "yolox": 0, "yolov3": 0, "clip": 16,
}  # fmt: skip
NAMED = {  # file, wrong programs -> how many
    ("test_t5", "CODE"): 3,
    ("test_vit", "BROKEN"): 7,
    ("detectors/test_yolox", "WRONG_ASSIGNMENTS"): 5,
    ("detectors/test_yolox", "WRONG_MODELS"): 6,
    ("detectors/test_faster_rcnn", "WRONG"): 14,
    ("detectors/test_faster_rcnn", "CODE"): 6,
}
TESTS = {
    "test_adapters": 2, "test_benchmarks": 4, "test_bert": 5, "test_chat": 4, "test_clip": 5, "test_conv_nets": 12,
    "detectors/test_yolov3": 9,
    "test_defaults": 5, "test_folder": 1, "test_gguf": 6, "test_harness": 4, "test_hub": 13, "test_live": 2,
    "test_preprocessing": 4, "test_rope": 2, "test_t5": 7, "test_tokenizer": 4, "test_transfer": 1, "test_vit": 10,
    "detectors/test_yolox": 11,
    "detectors/test_faster_rcnn": 11,
}  # fmt: skip


def parsed(name):
    return ast.parse((PARITY / f"{name}.py").read_text()).body


def test_no_case_and_no_mutant_is_lost():
    assert {name: len(file.CASES) for name, file in FAMILIES.items()} == CASES
    assert {name: len(file.MUTANTS) for name, file in FAMILIES.items()} == MUTANTS
    assert len(FAMILY) == sum(CASES.values())  # no name twice


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_no_wrong_program_is_lost(file, name):
    given = [
        node.value
        for node in parsed(file)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and target.id == name
    ]
    assert [len(value.keys) for value in given if isinstance(value, ast.Dict)] == [NAMED[file, name]]


def test_no_live_test_is_lost():
    files = {str(file.relative_to(PARITY).with_suffix("")) for file in PARITY.rglob("test_*.py")}
    found = {
        name: sum(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in parsed(name))
        for name in files
    }
    assert found == TESTS
