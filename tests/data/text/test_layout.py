from collections import Counter

import numpy as np
import pytest

from fm_jax.core.errors import DataError
from fm_jax.data.text import layout, tokenizer
from fm_jax.data.text.corpus import Corpus
from fm_jax.data.text.encoded import Encoded
from fm_jax.data.text.tokenizer import Tokenizer


def _rows(source: layout.Blocks | layout.Packed) -> list[layout.Row]:
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("length", [7, 64, 10_000_000])
def test_every_token_but_the_first_is_a_target_once_and_in_order(small: Corpus, length: int) -> None:
    stream = small.tokens("validation")[:]
    rows = _rows(layout.Blocks(small.tokens("validation"), length))
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
    for source in (layout.Blocks(small.tokens("test"), 16, apart=True), layout.Packed(small.tokens("test"), 16)):
        kinds = {name: value.dtype.name for name, value in source[0].items()}
        assert kinds.pop("weights") == "float32" and set(kinds.values()) == {"int32"}
        assert set(kinds) == {"tokens", "targets", "segments", "positions"}


def test_blocks_kept_apart_number_documents_and_restart_positions(small: Corpus) -> None:
    tokens = small.tokens("test")
    plain, apart = layout.Blocks(tokens, 50), layout.Blocks(tokens, 50, apart=True)
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
    for row in _rows(layout.Packed(tokens, length)):
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
    found = layout.Labelled(texts, labels, small.tokenizer, length=12, num_classes=3)
    assert len(found) == 3 and found.truncated == 1
    for index, row in enumerate(found[i] for i in range(3)):
        ids = small.tokenizer.encode(texts[index])[:12]
        assert row["length"] == len(ids) and row["label"] == labels[index] and row["weights"] == 1
        assert row["tokens"][: len(ids)].tolist() == ids.tolist()
        assert (row["tokens"][len(ids) :] == small.tokenizer.pad_id).all() and len(row["tokens"]) == 12
    other = layout.Labelled(texts, [2, 0, 0], small.tokenizer, length=12, num_classes=3)
    assert other.fingerprint != found.fingerprint


@pytest.fixture(scope="module")
def framed() -> Tokenizer:
    words = "one two three four five six seven eight nine ten"
    return tokenizer.train_wordpiece([f"{words} {words}"] * 3, 60)


def test_texts_are_framed_by_their_tokenizer_and_cut_within_the_frame(framed: Tokenizer) -> None:
    texts = ["one two", "one two three four five six seven"]
    found = layout.Labelled(texts, [0, 1], framed, length=8, num_classes=2)
    short, long = (found[i] for i in range(2))
    cls, sep = framed.special("cls"), framed.special("sep")
    assert short["tokens"].tolist()[: short["length"]] == [cls, *framed.encode(texts[0]).tolist(), sep]
    assert long["tokens"].tolist() == [cls, *framed.encode(texts[1]).tolist()[:6], sep]
    assert not long["types"].any() and found.truncated == 1


def test_pairs_are_told_apart_by_their_types(framed: Tokenizer) -> None:
    one, two = (layout.Labelled(["one"], [0], framed, second=[s], length=24, num_classes=1) for s in ("two", "six"))
    whole = framed.encode_pair("one", "two")
    row = one[0]
    assert row["tokens"].tolist()[: row["length"]] == whole.ids.tolist()
    assert row["types"].tolist()[: row["length"]] == whole.types.tolist() and whole.types.any()
    assert one.fingerprint != two.fingerprint
    with pytest.raises(DataError, match="second text 0 is empty"):
        layout.Labelled(["one"], [0], framed, second=[""], length=24, num_classes=1)


def test_pairs_of_a_tokenizer_without_a_frame_are_parted_by_its_end(small: Corpus) -> None:
    words = small.tokenizer
    row = layout.Labelled(["one"], [0], words, second=["two"], length=24, num_classes=1)[0]
    wanted = [*words.encode("one").tolist(), words.end_id, *words.encode("two").tolist()]
    assert row["tokens"].tolist()[: row["length"]] == wanted


@pytest.mark.parametrize(
    ("first", "second", "kept"), [(9, 2, (5, 2)), (2, 9, (2, 5)), (9, 9, (3, 4)), (3, 9, (3, 4)), (2, 3, (2, 3))]
)
def test_of_a_pair_the_longer_text_is_cut_first(first: int, second: int, kept: tuple[int, int]) -> None:
    parts = np.array([-1, *[0] * first, -1, *[1] * second, -1], np.int32)
    none = np.zeros(len(parts), np.int32)
    places = layout.shortened(Encoded(none, none, none, none, parts), 10)
    assert (np.bincount(parts[places] + 1).tolist()) == [3, *kept]
    wanted = [0, *range(1, 1 + kept[0]), first + 1, *range(first + 2, first + 2 + kept[1]), first + second + 2]
    assert places.tolist() == wanted  # from the beginning of each


def test_a_frame_that_fills_the_row_is_refused(framed: Tokenizer) -> None:
    with pytest.raises(DataError, match="length 2 leaves no room for text beside 2 special tokens"):
        layout.Labelled(["one"], [0], framed, length=2, num_classes=1)
    with pytest.raises(DataError, match="length 4 leaves no room for text beside 3 special tokens"):
        layout.Labelled(["one"], [0], framed, second=["two"], length=4, num_classes=1)


def test_a_label_outside_the_classes_is_named(small: Corpus) -> None:
    for label in (3, -1):
        with pytest.raises(DataError, match=f"text 1 has label {label}, outside 0 to 2"):
            layout.Labelled(["a", "b"], [0, label], small.tokenizer, length=4, num_classes=3)


def test_rows_say_what_their_ids_and_labels_must_be_below(small: Corpus) -> None:
    size = small.tokenizer.vocab_size
    found = layout.Labelled(["a"], [0], small.tokenizer, length=4, num_classes=3)
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
        layout.Labelled(texts, labels, small.tokenizer, length=8, num_classes=2)


def test_rows_without_room_are_refused(small: Corpus) -> None:
    with pytest.raises(DataError, match="at least 1 token, not 0"):
        small.blocks("train", 0)
