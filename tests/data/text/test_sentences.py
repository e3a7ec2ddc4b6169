import numpy as np
import pytest

from fm_jax.data.text import sentences
from fm_jax.data.text.sentences import Sentences

TEXT = 'First one.  Second (see "that".) Third, e.g. this!\n\nA title\n\n  \n- an item of 3.5 kg? Yes.\n'


class Texts(list[str]):
    fingerprint = "texts"


def test_sentences_end_at_stops_and_empty_lines() -> None:
    assert sentences.split(TEXT) == [
        "First one.",
        '  Second (see "that".)',
        " Third, e.g. this!",
        "\n\nA title",
        "\n\n  \n- an item of 3.5 kg?",
        " Yes.\n",
    ]


def test_joined_they_are_the_text_and_none_is_blank() -> None:
    rng = np.random.default_rng(0)
    for length in range(400):
        text = "".join(rng.choice(list("aB. \n!)\t"), length % 60))
        found = sentences.split(text)
        assert "".join(found) == (text if text.strip() else "") and all(one.strip() for one in found)


def test_an_empty_sentence_closes_every_document() -> None:
    found = Sentences(Texts(["One. Two.", "", " \n", "Three."]))
    assert [found[i] for i in range(len(found))] == ["One.", " Two.", "", "", "", "Three.", ""]
    assert found.fingerprint == "texts-sentences"
    with pytest.raises(IndexError):
        found[7]
