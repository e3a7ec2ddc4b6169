"""Word sets, tests and vectors: rows in the order of the words, and damage named."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from fm_jax.core.errors import DataError
from fm_jax.data.packages import weat

NAMES = sorted({name for pairs in weat.TESTS.values() for pair in pairs for name in pair})
SETS = {name: [f"{name}_a", "word"] for name in NAMES}
VECTORS = "3 2\nrose 0.5 -1\nword 1e-3 2\nfourth 3 4\n"


def put(root, sets=None, vectors=VECTORS):
    folder = root / "wefe/datasets/data"
    folder.mkdir(parents=True)
    (folder / "WEAT.json").write_text(json.dumps(SETS) if sets is None else sets)
    (folder / "weat_w2v____old.txt").write_text(vectors)
    (root / "out").mkdir()
    return {"wefe": root}, root / "out"


def test_the_vectors_are_in_the_order_of_the_words(tmp_path):
    packages, out = put(tmp_path)
    counts = weat.convert(packages, out)
    assert counts == {"sets": len(NAMES), "words": 3, "dimensions": 2, "set_words_without_vector": len(NAMES)}
    assert (out / "words.txt").read_text().splitlines() == ["rose", "word", "fourth"]
    vectors = load_file(out / "vectors.safetensors")["vectors"]
    np.testing.assert_array_equal(vectors, np.array([[0.5, -1], [1e-3, 2], [3, 4]], np.float32))
    sets = json.loads((out / "word_sets.json").read_text())
    tests = json.loads((out / "tests.json").read_text())
    assert sets == SETS and len(tests) == 10
    assert all(name in sets for test in tests for name in (*test["targets"], *test["attributes"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sets": "{"}, "WEAT.json is not JSON"),
        ({"sets": "[]"}, "is not an object of lists"),
        ({"sets": '{"flowers": [1]}'}, "is not an object of lists"),
        ({"sets": '{"flowers": ["rose"]}'}, "WEAT.json has no set"),
        ({"vectors": ""}, ":1: not two numbers"),
        ({"vectors": "many 2\n"}, ":1: not two numbers"),
        ({"vectors": "2 2\nrose 1 2\n"}, "has 1 vectors; its first line says 2 of 2"),
        ({"vectors": "9999999 9999999\nrose 1 2\n"}, "its first line says 9999999"),
        ({"vectors": "1 2\nrose 1\n"}, ":2: 1 numbers instead of 2"),
        ({"vectors": "1 2\nrose 1 inf\n"}, ":2: 2 numbers instead of 2, or one not finite"),
        ({"vectors": "1 2\nrose 1 two\n"}, ":2: not a number"),
        ({"vectors": "2 1\nrose 1\nrose 2\n"}, "has a word twice"),
    ],
)
def test_damage_is_named(changes, message, tmp_path):
    packages, out = put(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        weat.convert(packages, out)
