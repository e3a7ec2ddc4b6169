"""Tokenizers of GGUF metadata: the same ids as the tokenizer whose vocabulary and merges were written."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest

from fm_jax.core.errors import CheckpointError, DataError
from fm_jax.data.text import tokenizer as tokenizers
from fm_jax.hub import gguf_tokenizer, pretrained
from fm_jax.tasks import language
from tests.data.text.test_tokenizer_families import TEXTS, metaspace
from tests.hub.test_gguf_model import write

SAMPLES = ["The CAT  sat.", "naïve\n漢字 act_3(self) 😀", "a", "", "unheard-of wörds: don't!", " leading", "cat" * 30]
GGML = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


def of(inner, kinds, **more):
    """Return the metadata of a library tokenizer; `kinds` are those of tokens that are not normal."""
    model = json.loads(inner.to_str())["model"]
    tokens = sorted(inner.get_vocab(), key=inner.get_vocab().get)
    data = {
        "tokens": tokens,
        "token_type": np.array([kinds.get(token, NORMAL) for token in tokens], np.int32),
        "merges": [" ".join(merge) for merge in model["merges"]],
        **more,
    }
    return {GGML + name: value for name, value in data.items() if value is not None}


@pytest.fixture(scope="module")
def trained():
    return tokenizers.train(TEXTS, 340)


def byte_level(trained, **more):
    ids = {"bos_token_id": trained.end_id, "eos_token_id": trained.end_id, "padding_token_id": trained.pad_id}
    kinds = {tokenizers.END: CONTROL, tokenizers.PAD: CONTROL}
    return of(trained._inner, kinds, **({"model": "gpt2", "pre": "gpt-2"} | ids | more))


def pieces(**more):
    """Return the metadata of LLaMA's kind of tokenizer, with scores for its merges."""
    inner = metaspace("BPE")
    kinds = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL} | {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    scores = -np.arange(inner.get_vocab_size(), dtype=np.float32)
    return of(inner, kinds, **({"model": "llama", "merges": None, "scores": scores} | more))


def read(metadata, architecture="llama"):
    return gguf_tokenizer.read(metadata, "model.gguf", architecture)


def test_a_byte_level_tokenizer_has_the_ids_and_special_tokens_of_the_one_it_was_made_of(trained, tmp_path):
    found = read(byte_level(trained))
    for text in SAMPLES:
        assert found.encode(text).tolist() == trained.encode(text).tolist()
        assert found.decode(found.encode(text)) == text
    assert (found.end_id, found.pad_id, found.special("start")) == (trained.end_id, trained.pad_id, trained.end_id)
    assert found.decode([trained.end_id]) == "" and found.encode(tokenizers.END).size > 1
    found.save(tmp_path)
    again = tokenizers.load(tmp_path)
    assert again.fingerprint == found.fingerprint and again.end_id == found.end_id


def test_a_sentencepiece_tokenizer_has_the_ids_of_the_one_it_was_made_of():
    theirs, found = metaspace("BPE"), read(pieces())
    for text in SAMPLES:
        assert found.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids
        assert found.encode_pair(text).ids.tolist() == theirs.encode(text).ids
        assert found.decode(found.encode(text)) == text
    assert [found.special(role) for role in ("unknown", "start", "end")] == [0, 1, 2]


def merged(text, scores):
    """Merge as SentencePiece does: of all neighbours that form a piece the best, the leftmost first."""
    symbols = list(text.replace(" ", "▁"))
    while True:
        best = [(scores[a + b], -at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not best:
            return symbols
        at = -max(best)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]


def test_scores_merge_as_in_sentencepiece():
    rng = np.random.default_rng(0)
    letters = "▁abc"
    words = {"".join(rng.choice(list(letters), size)) for size in rng.integers(2, 6, 120)}
    vocab = ["<unk>", "<s>", "</s>", *letters, *sorted(words)]
    scores = -rng.permutation(len(vocab)).astype(np.float32)
    kinds = np.array([UNKNOWN, CONTROL, CONTROL] + [NORMAL] * (len(vocab) - 3), np.int32)
    data = {"model": "llama", "tokens": vocab, "scores": scores, "token_type": kinds, "add_space_prefix": False}
    found = read({GGML + name: value for name, value in data.items()})
    by_token = {token: float(score) for token, score in zip(vocab[3:], scores[3:], strict=True)}
    for size in rng.integers(1, 40, 60):
        text = "".join(rng.choice(list(" abc"), size))
        assert [found.token(index) for index in found.encode(text)] == merged(text, by_token)


TEXT = "I'LL pay 12345 €!\n\n  x'll CamelCase"
SPLITS = {
    "gpt-2": "I|'|LL| pay| 12345| €!|\n\n | x|'ll| CamelCase",
    "smollm": "I|'|LL| pay| |1|2|3|4|5| €!|\n\n | x|'ll| CamelCase",
    "llama-bpe": "I|'LL| pay| |123|45| €!\n\n| | x|'ll| CamelCase",
    "qwen2": "I|'LL| pay| |1|2|3|4|5| €!\n\n| | x|'ll| CamelCase",
    "tekken": "I|'LL| pay| |1|2|3|4|5| €!\n\n| | x|'ll| Camel|Case",
}


@pytest.mark.parametrize("name", SPLITS)
def test_text_is_split_as_the_name_says(trained, name):
    inner = read(byte_level(trained, pre=name))._inner
    spans = [span for _, span in inner.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert "|".join(TEXT[start:stop] for start, stop in spans) == SPLITS[name]


def test_only_qwen_composes_characters_and_only_llama_3_takes_whole_words_first(trained):
    qwen, gpt = read(byte_level(trained, pre="qwen2")), read(byte_level(trained))
    assert qwen.encode("e\u0301").tolist() == gpt.encode("\u00e9").tolist() != gpt.encode("e\u0301").tolist()
    more = byte_level(trained)
    tokens = [*more[GGML + "tokens"], "zqzq"]
    more |= {GGML + "tokens": tokens, GGML + "token_type": np.ones(len(tokens), np.int32)}
    assert read(more | {GGML + "pre": "llama-bpe"}).encode("zqzq").tolist() == [len(tokens) - 1]
    assert read(more).encode("zqzq").size > 1


def test_gpt2s_files_need_not_name_their_splitting(trained):
    for pre in (None, "default"):
        assert read(byte_level(trained, pre=pre), "gpt2").fingerprint == read(byte_level(trained)).fingerprint
        with pytest.raises(DataError, match=r"tokenizer\.ggml\.pre 'default' is not known; known are gpt-2"):
            read(byte_level(trained, pre=pre))


def test_tokens_of_the_user_are_never_split_and_control_tokens_are_never_read_from_text(trained):
    data = byte_level(trained)
    tokens = [*data[GGML + "tokens"], "<think>", "<|im_end|>"]
    kinds = np.array([*data[GGML + "token_type"], USER, CONTROL], np.int32)
    found = read(data | {GGML + "tokens": tokens, GGML + "token_type": kinds})
    ids = found.encode("a<think>b<|im_end|>")
    assert len(tokens) - 2 in ids and len(tokens) - 1 not in ids
    assert found.decode(ids) == "a<think>b<|im_end|>"
    assert found.decode([len(tokens) - 2, len(tokens) - 1]) == "<think>"


def test_spaces_that_are_a_users_token_are_one_token():
    data = pieces(add_space_prefix=False)
    tokens = [*data[GGML + "tokens"], "  "]
    kinds = np.array([*data[GGML + "token_type"], USER], np.int32)
    scores = np.array([*data[GGML + "scores"], 0], np.float32)
    found = read(data | {GGML + "tokens": tokens, GGML + "token_type": kinds, GGML + "scores": scores})
    assert found.encode("a  cat").tolist() == [found._inner.token_to_id(token) for token in ("a", "  ", "cat")]
    assert found.decode(found.encode("a  cat")) == "a  cat"


@pytest.mark.parametrize("start", [None, True, False])
@pytest.mark.parametrize("end", [None, True])
def test_texts_begin_and_end_as_the_file_says(trained, start, end):
    for made, pre, usual in ((pieces, {}, True), (byte_level, {"pre": "llama-bpe"}, True), (byte_level, {}, False)):
        data = made(*(() if made is pieces else (trained,)), **pre, add_bos_token=start, add_eos_token=end)
        found = read(data)
        bare, framed = found.encode("cat"), found.encode_pair("cat").ids
        begins, ends = usual if start is None else start, bool(end)
        wanted = [*([found.special("start")] * begins), *bare, *([found.end_id] * ends)]
        assert framed.tolist() == wanted
        second = found.encode_pair("cat", "at")
        assert second.ids.tolist() == wanted + found.encode_pair("at").ids.tolist()
        assert second.types.tolist() == [0] * len(wanted) + [1] * (len(second.ids) - len(wanted))


def test_the_chat_template_is_written_beside_the_tokenizer(trained, tmp_path):
    read(byte_level(trained) | {"tokenizer.chat_template": "{{ messages }}"}).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}" and config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["eos_token"] == tokenizers.END and config["add_bos_token"] is False


def test_a_file_without_a_tokenizer_has_none():
    assert read({}) is None and read({GGML + "model": "no_vocab"}) is None


REFUSED = {
    "kind": ({"model": "rwkv"}, "tokenizer.ggml.model 'rwkv' is not supported, only gpt2 and llama are; put"),
    "kind of many": ({"model": ["gpt2"]}, "tokenizer.ggml.model is .* not str"),
    "split": ({"pre": "deepseek-llm"}, "pre 'deepseek-llm' is not known; known are .*; put|: put the model's"),
    "no tokens": ({"tokens": None}, "tokens is missing"),
    "tokens of numbers": ({"tokens": np.ones(3)}, "tokens is not a list of texts"),
    "nested tokens": ({"tokens": [["a"]]}, "tokens is not a list of texts"),
    "two ids": ({"tokens": ["a", "b", "a"], "token_type": None}, "'a' has two ids, 0 and 2"),
    "no merges": ({"merges": None}, "merges is missing"),
    "merge of one": ({"merges": ["a"]}, "the merge 'a' is not of two tokens into one"),
    "merge of unknown": ({"merges": ["\u4e00 \u4e8c"]}, "is not of two tokens into one"),
    "kinds": ({"token_type": np.ones(3, np.int32)}, "token_type is not one number for each of 340 tokens"),
    "end": ({"eos_token_id": 340}, "eos_token_id is 340, but there are 340 tokens"),
    "end a text": ({"eos_token_id": "2"}, "eos_token_id is '2', not int"),
    "begins with none": ({"add_bos_token": True, "bos_token_id": None}, "add_bos_token is true, but there is no bos"),
    "begins": ({"add_bos_token": 1}, "add_bos_token is '1', not bool"),
}  # fmt: skip
PIECES = {
    "no scores": ({"scores": None}, "scores and tokenizer.ggml.merges are missing"),
    "few scores": ({"scores": np.zeros(2)}, "scores is not one number for each"),
    "a token without end": (
        {"tokens": ["<unk>", "a" * 10**6], "token_type": None, "scores": np.zeros(2)},
        "1000000 char",
    ),
    "normalised": ({"remove_extra_whitespaces": True}, "normalises texts"),
    "charsmap": ({"precompiled_charsmap": np.ones(3, np.uint8)}, "normalises texts"),
}


@pytest.mark.parametrize("case", [*REFUSED, *PIECES])
def test_a_tokenizer_that_is_not_sound_or_not_known_is_refused_by_name(trained, case):
    more, said = (REFUSED | PIECES)[case]
    with pytest.raises(DataError, match=said) as error:
        read(pieces(**more) if case in PIECES else byte_level(trained, **more))
    assert str(error.value).startswith("model.gguf: ") and "\n" not in str(error.value)


# -- in a model --------------------------------------------------------------------------------------------------------


def with_tokenizer(folder, trained, rows=340, **more):
    data = byte_level(trained, **more)
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in data.items()}
    return write(folder, "llama", more=plain, vocab_size=rows)[2]


def test_a_model_file_brings_its_tokenizer_and_a_tokenizer_json_beside_it_wins(trained, tmp_path):
    file = with_tokenizer(tmp_path, trained)
    other = tokenizers.train(TEXTS, 300)
    other.save(tmp_path)
    assert pretrained.load(tmp_path, shapes=True).tokenizer.fingerprint == other.fingerprint
    found = language.load(file, shapes=True).tokenizer  # as --init.from opens it
    assert found.encode("The cat").tolist() == trained.encode("The cat").tolist()


def test_a_tokenizer_that_cannot_be_read_is_refused_until_one_is_put_beside_the_file(trained, tmp_path):
    file = with_tokenizer(tmp_path, trained, pre="unheard-of")
    for source in (file, tmp_path):
        with pytest.raises(
            CheckpointError, match=r"'unheard-of' is not known.* put the model's tokenizer\.json beside"
        ):
            pretrained.load(source)
    trained.save(tmp_path)
    assert pretrained.load(tmp_path, shapes=True).tokenizer.vocab_size == 340


def test_more_tokens_than_rows_of_the_embedding_are_refused(trained, tmp_path):
    with pytest.raises(CheckpointError, match=re.escape("340 tokens, but the model's embedding has 339 rows")):
        pretrained.load(with_tokenizer(tmp_path, trained, rows=339))
