import numpy as np
import pytest

from fm_jax.core.errors import DataError
from fm_jax.evals.features import zero_shot
from tests.close import close


def test_prompts_are_every_class_in_every_template():
    assert zero_shot.prompts(["cat", "a {dog}"], ["a {}.", "{}!"]) == ["a cat.", "cat!", "a a {dog}.", "a {dog}!"]
    assert zero_shot.prompts(["cat"]) == ["a photo of a cat."]


def test_a_class_is_the_mean_direction_of_its_prompts():
    """The longer vector of a class counts no more than the shorter one."""
    vectors = np.array([[3, 0], [0, 1], [-1, 0], [-5, 0]], np.float32)
    classes = zero_shot.class_vectors(vectors, 2)
    close(classes, np.array([[0.5**0.5, 0.5**0.5], [-1, 0]]))
    scores = zero_shot.cosines(np.array([[1.0, 1.0], [-4.0, 0.1]]), classes)
    assert scores.argmax(axis=1).tolist() == [0, 1]
    close(scores[0], np.array([1, -(0.5**0.5)]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zero_shot.prompts([]), "0 classes"),
        (lambda: zero_shot.prompts(["a", " "]), "class 1 has an empty name"),
        (lambda: zero_shot.prompts(["a", "b", "a"]), "'a' is named twice"),
        (lambda: zero_shot.prompts(["a"], ["a photo"]), "must have one place"),
        (lambda: zero_shot.class_vectors(np.ones((3, 2)), 2), "prompts of 2 classes"),
        (lambda: zero_shot.cosines(np.ones((3, 2)), np.ones((2, 3))), r"\(3, 2\) and \(2, 3\)"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()
