from collections import Counter

import numpy as np
import pytest

from fm_jax.core.errors import DataError
from fm_jax.data import text
from fm_jax.data.corpus import Corpus


def _rows(source: text.Blocks | text.Packed) -> list[text.Row]:
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("length", [7, 64, 10_000_000])
def test_every_token_but_the_first_is_a_target_once_and_in_order(small: Corpus, length: int) -> None:
    stream = small.tokens("validation")[:]
    rows = _rows(text.Blocks(small.tokens("validation"), length))
    assert {row["tokens"].shape for row in rows} == {(length,)}
    used = [row["weights"] > 0 for row in rows]
    assert (
        np.concatenate([row["targets"][mine] for row, mine in zip(rows, used, strict=True)]).tolist()
        == stream[1:].tolist()
    )
    assert (
        np.concatenate([row["tokens"][mine] for row, mine in zip(rows, used, strict=True)]).tolist()
        == stream[:-1].tolist()
    )
    assert sum(row["weights"].sum() for row in rows) == len(stream) - 1
    assert all((row["targets"][:-1] == row["tokens"][1:]).all() for row in rows[:-1])


def test_fields_have_the_types_that_the_models_take(small: Corpus) -> None:
    for source in (text.Blocks(small.tokens("test"), 16, apart=True), text.Packed(small.tokens("test"), 16)):
        kinds = {name: value.dtype.name for name, value in source[0].items()}
        assert kinds.pop("weights") == "float32" and set(kinds.values()) == {"int32"}
        assert set(kinds) == {"tokens", "targets", "segments", "positions"}


def test_blocks_kept_apart_number_documents_and_restart_positions(small: Corpus) -> None:
    tokens = small.tokens("test")
    plain, apart = text.Blocks(tokens, 50), text.Blocks(tokens, 50, apart=True)
    assert plain.fingerprint != apart.fingerprint
    for one, other in zip(_rows(plain), _rows(apart), strict=True):
        assert all((one[name] == other[name]).all() for name in one)
        segment, position = 1, 0
        for i, token in enumerate(other["tokens"]):
            if other["weights"][i] == 0:
                segment, position = 0, 0
            elif token == tokens.index.end_id and i:
                segment, position = segment + 1, 0
            assert (other["segments"][i], other["positions"][i]) == (segment, position)
            position += 1


@pytest.mark.parametrize("length", [5, 64, 4096])
def test_packing_loses_no_token_and_crosses_no_document(small: Corpus, length: int) -> None:
    tokens = small.tokens("test")
    stream = tokens[:]
    wanted: Counter[tuple[int, ...]] = Counter()
    for start, stop in zip(tokens.starts, tokens.starts[1:], strict=False):
        document = stream[start : stop + 1].tolist()  # with both end tokens
        wanted.update(tuple(document[i : i + length + 1]) for i in range(0, len(document) - 1, length))
    found: Counter[tuple[int, ...]] = Counter()
    for row in _rows(text.Packed(tokens, length)):
        for segment in range(1, row["segments"].max() + 1):
            mine = np.flatnonzero(row["segments"] == segment)
            assert (np.diff(mine) == 1).all() and (row["positions"][mine] == np.arange(len(mine))).all()
            assert (row["targets"][mine[:-1]] == row["tokens"][mine[1:]]).all()
            found[(*row["tokens"][mine].tolist(), int(row["targets"][mine[-1]]))] += 1
        assert ((row["segments"] > 0) == (row["weights"] > 0)).all()
    assert found == wanted


def test_rows_beyond_the_end_are_refused(small: Corpus) -> None:
    for source in (small.blocks("test", 64), small.packed("test", 64)):
        with pytest.raises(IndexError):
            source[len(source)]


def test_labelled_texts_are_padded_and_cut(small: Corpus) -> None:
    texts, labels = ["short", "a much longer text " * 20, "middle sized"], [2, 0, 1]
    found = text.Labelled(texts, labels, small.tokenizer, length=12, num_classes=3)
    assert len(found) == 3 and found.cropped == 1
    for index, row in enumerate(found[i] for i in range(3)):
        ids = small.tokenizer.encode(texts[index])[:12]
        assert row["length"] == len(ids) and row["label"] == labels[index] and row["weights"] == 1
        assert row["tokens"][: len(ids)].tolist() == ids.tolist()
        assert (row["tokens"][len(ids) :] == small.tokenizer.pad_id).all() and len(row["tokens"]) == 12
    other = text.Labelled(texts, [2, 0, 0], small.tokenizer, length=12, num_classes=3)
    assert other.fingerprint != found.fingerprint


def test_rows_say_what_their_ids_and_labels_must_be_below(small: Corpus) -> None:
    size = small.tokenizer.vocab_size
    found = text.Labelled(["a"], [0], small.tokenizer, length=4, num_classes=3)
    assert found.limits == {"tokens": size, "label": 3}
    assert small.packed("test", 8).limits == small.blocks("test", 8).limits == {"tokens": size, "targets": size}


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [([], [], "0 texts and 0 labels"), (["a"], [0, 1], "1 texts and 2 labels"), (["a", ""], [0, 1], "text 1 is empty")],
)
def test_labelled_texts_that_do_not_fit_are_refused(
    small: Corpus, texts: list[str], labels: list[int], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        text.Labelled(texts, labels, small.tokenizer, length=8, num_classes=2)


def test_rows_without_room_are_refused(small: Corpus) -> None:
    with pytest.raises(DataError, match="at least 1 token, not 0"):
        small.blocks("train", 0)
