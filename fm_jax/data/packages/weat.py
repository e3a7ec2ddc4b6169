"""The word sets of the Word Embedding Association Test (Caliskan et al. 2017), and word2vec vectors of their words.

word_sets.json: {set: [words]}. tests.json: the ten tests [{"name", "targets": [set, set], "attributes": [set, set]}].
Sets and vectors differ in upper case for some names, and most names of tests 3 to 5 have no vector.
words.txt: one word a line; vectors.safetensors: "vectors", float32 [words, 300], in the same order.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.core import json_file
from fm_jax.core.errors import DataError

# name -> target sets, attribute sets; numbers as in the paper's table 1
TESTS = {
    "flowers and insects": (("flowers", "insects"), ("pleasant_5", "unpleasant_5a")),
    "instruments and weapons": (("instruments", "weapons"), ("pleasant_5", "unpleasant_5b")),
    "names 3": (("european_american_names_5", "african_american_names_5"), ("pleasant_5", "unpleasant_5b")),
    "names 4": (("european_american_names_7", "african_american_names_7"), ("pleasant_5", "unpleasant_5b")),
    "names 5": (("european_american_names_7", "african_american_names_7"), ("pleasant_9", "unpleasant_9")),
    "career and family": (("male_names", "female_names"), ("career", "family")),
    "maths and arts": (("math", "arts"), ("male_terms", "female_terms")),
    "science and arts": (("science", "arts_2"), ("male_terms_2", "female_terms_2")),
    "disease": (("mental_disease", "physical_disease"), ("temporary", "permanent")),
    "age": (("young_people_names", "old_people_names"), ("pleasant_9", "unpleasant_9")),
}
_MAX_WORDS, _MAX_SIZE = 1_000_000, 10_000


def convert(packages: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write sets, tests, words and vectors; return their numbers."""
    from safetensors.numpy import save_file

    folder = packages["wefe"] / "wefe/datasets/data"
    sets = word_sets(folder / "WEAT.json")
    words, vectors = vectors_of(folder / "weat_w2v____old.txt")
    tests = [{"name": name, "targets": targets, "attributes": parts} for name, (targets, parts) in TESTS.items()]
    (out / "word_sets.json").write_text(json.dumps(sets, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (out / "tests.json").write_text(json.dumps(tests, indent=1) + "\n", "utf-8")
    (out / "words.txt").write_text("".join(f"{word}\n" for word in words), "utf-8")
    save_file({"vectors": np.ascontiguousarray(vectors)}, out / "vectors.safetensors")
    known = set(words)
    lacking = {word for part in sets.values() for word in part if not {word, word.lower()} & known}
    counts = {"sets": len(sets), "words": len(words), "dimensions": vectors.shape[1]}
    return counts | {"set_words_without_vector": len(lacking)}


def word_sets(path: Path) -> dict[str, list[str]]:
    """Return {set: words}.

    Raises:
        DataError: not an object of lists of words, or a set that a test needs is missing.
    """
    sets = json_file.parse(json_file.contents(path, DataError), path.name, DataError)
    lists = list(sets.values()) if isinstance(sets, dict) else [None]
    if not all(isinstance(words, list) and words and all(isinstance(word, str) for word in words) for words in lists):
        raise DataError(f"{path.name} is not an object of lists of words")
    needed = {name for pairs in TESTS.values() for pair in pairs for name in pair}
    if missing := needed - set(sets):
        raise DataError(f"{path.name} has no set {min(missing)}")
    return sets


def vectors_of(path: Path) -> tuple[list[str], np.ndarray]:
    """Return words and float32 [words, dimensions] of word2vec's text format, whose first line has both numbers.

    Raises:
        DataError: the numbers do not fit the lines, a number is not finite, or a word comes twice.
    """
    lines = path.read_text("utf-8").splitlines()
    head = lines[0].split() if lines else []
    if len(head) != 2 or not all(part.isdigit() and len(part) < 8 for part in head):
        raise DataError(f"{path.name}:1: not two numbers, words and dimensions")
    count, size = map(int, head)
    if count > _MAX_WORDS or size > _MAX_SIZE or count != len(lines) - 1 or not count * size:
        raise DataError(f"{path.name} has {len(lines) - 1} vectors; its first line says {count} of {size}")
    words, rows = [], np.empty((count, size), np.float32)
    for number, line in enumerate(lines[1:]):
        word, *cells = line.split()
        try:
            numbers = [float(cell) for cell in cells]
        except ValueError:
            raise DataError(f"{path.name}:{number + 2}: not a number among the {len(cells)}") from None
        if len(numbers) != size or not all(map(math.isfinite, numbers)):
            raise DataError(f"{path.name}:{number + 2}: {len(numbers)} numbers instead of {size}, or one not finite")
        words.append(word)
        rows[number] = numbers
    if len(set(words)) != count:
        raise DataError(f"{path.name} has a word twice")
    return words, rows
