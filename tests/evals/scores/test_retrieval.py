import numpy as np
import pytest

from fm_jax.core.errors import DataError
from fm_jax.evals.scores.retrieval import recalls
from tests.close import close

SCORES = np.array([[0.9, 0.1, 0.8, 0.2], [0.3, 0.7, 0.95, 0.1], [0.2, 0.5, 0.4, 0.6]])


def test_both_directions_by_hand():
    found = recalls(SCORES, np.array([0, 0, 1, 2]), (1, 2, 9))
    # images: the best of 0's texts is the first of all, 1's is, 2's is
    assert (found["image_to_text@1"], found["image_to_text_median_rank"]) == (1.0, 1.0)
    # texts: 0 is first with image 0, 1 third of three, 2 and 3 first
    assert (found["text_to_image@1"], found["text_to_image@2"]) == (0.75, 0.75)
    assert not any(name.endswith("@9") for name in found)


def test_ranks_are_those_of_sorting():
    rng = np.random.default_rng(0)
    scores, image_of = rng.normal(size=(30, 40)), rng.integers(0, 30, 40)
    found = recalls(scores, image_of)
    order = np.argsort(-scores, axis=1)
    asked = sorted(set(image_of.tolist()))  # some images have no text
    for k in (1, 5, 10):
        want = np.mean([any(image_of[text] == image for text in order[image, :k]) for image in asked])
        close(found[f"image_to_text@{k}"], want)
        close(found[f"text_to_image@{k}"], np.mean([
            image_of[text] in np.argsort(-scores[:, text])[:k] for text in range(40)
        ]))  # fmt: skip


def test_a_model_that_cannot_tell_finds_nothing():
    found = recalls(np.zeros((20, 20)), np.arange(20))
    assert found["image_to_text@1"] == found["text_to_image@10"] == 0 and found["text_to_image_median_rank"] == 20


@pytest.mark.parametrize(
    ("scores", "image_of", "ks", "message"),
    [
        (SCORES, np.arange(3), (1,), r"image_of \(3,\)"),
        (SCORES, np.array([0, 1, 2, 3]), (1,), "images 0 to 2"),
        (SCORES * np.nan, np.zeros(4, int), (1,), "12 of 12 scores are NaN"),
        (SCORES, np.zeros(4, int), (0,), "at least 1"),
    ],
)
def test_what_cannot_be_is_refused(scores, image_of, ks, message):
    with pytest.raises(DataError, match=message):
        recalls(scores, image_of, ks)
