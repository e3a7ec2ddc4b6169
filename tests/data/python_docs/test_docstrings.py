from pathlib import Path

import numpy as np
import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.python_docs import dataset, docstrings, library, masking
from fm_jax.data.python_docs.docstrings import Examples
from fm_jax.data.python_docs.masking import CLASSES, MASK

ONLY = ("email", "http", "queue", "textwrap", "wsgiref")


@pytest.fixture(scope="module")
def generated() -> list[tuple[str, str, str, int]]:
    return list(masking.generate(library.read(ONLY)))


def _examples(per_class: int = 5) -> Examples:
    labels = np.tile(np.arange(len(CLASSES), dtype=np.int32), per_class)
    return Examples(tuple(f"text {i}" for i in range(len(labels))), labels, ("m",) * len(labels))


def test_a_draw_has_as_many_of_each_class_and_the_larger_contains_the_smaller() -> None:
    examples = _examples()
    two, four = (docstrings.few(examples, n, seed=3) for n in (2, 4))
    assert set(two.counts().values()) == {2} and set(four.counts().values()) == {4}
    assert set(two.texts) < set(four.texts)
    assert docstrings.few(examples, 2, seed=3).texts == two.texts
    assert docstrings.few(examples, 2, seed=4).texts != two.texts


def test_more_labels_than_there_are_is_refused() -> None:
    with pytest.raises(DataError, match="cannot draw 6 examples per class: asyncio has only 5"):
        docstrings.few(_examples(), 6, seed=0)


def test_a_draw_follows_the_classes_of_its_examples() -> None:
    labels = np.array([0, 0, 1, 1], np.int32)
    examples = Examples(("a", "b", "c", "d"), labels, ("",) * 4, classes=("no", "yes"))
    assert docstrings.few(examples, 1, seed=0).counts() == {"no": 1, "yes": 1}
    with pytest.raises(DataError, match="other has only 0"):
        docstrings.few(Examples(("a", "b", "c", "d"), labels, ("",) * 4, ("no", "yes", "other")), 1, seed=0)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split 'dev'; it has train, validation, test"):
        docstrings.load("dev", tmp_path)


def test_the_built_set_holds_what_was_generated(tmp_path: Path, generated: list[tuple[str, str, str, int]]) -> None:
    builder = dataset.build(tmp_path, "docstrings", only=ONLY)
    assert tuple(builder.info.features["label"].names) == CLASSES
    rows = dataset.rows(builder, "validation")
    found = [(row["module"].decode(), row["text"].decode(), int(row["label"])) for row in rows]
    assert found == [rest for split, *fields in generated if split == "validation" for rest in [tuple(fields)]]


@pytest.mark.slow
def test_every_class_has_enough_examples_in_every_split(tmp_path: Path) -> None:
    train, validation, test = (docstrings.load(split, tmp_path) for split in library.SPLITS)
    assert len(CLASSES) >= 10
    assert min(train.counts().values()) >= 32
    assert min(validation.counts().values()) >= 5
    assert min(test.counts().values()) >= 10
    pretraining = " ".join(" ".join(m.text.split()) for m in library.read() if m.split == "train")
    assert not [text for text in test.texts if MASK not in text and " ".join(text.split()) in pretraining]
