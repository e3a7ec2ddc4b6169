"""Tokenizers of every family: as ours are learnt, as other tools write them, and as they must not be."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.text import tokenizer
from fm_jax.data.text.tokenizer import Tokenizer

TEXTS = [f"The cat sat on the Mat, number {i}; naïve act_{i % 7}(self): return {i * i}!" for i in range(300)]


@pytest.fixture(scope="module")
def wordpiece() -> Tokenizer:
    return tokenizer.train_wordpiece(TEXTS, 120)


@pytest.fixture(scope="module")
def t5() -> Tokenizer:
    return tokenizer.train(TEXTS, 320, sentinels=10)


def written(folder: Path, inner: Any, config: dict[str, Any] | None = None) -> Path:
    inner.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_level(post: bool) -> Any:
    """Return the tokenizer of GPT-2 or, with its frame, RoBERTa."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if post else ["<|endoftext|>"]
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXTS, trainer)
    if post:
        inner.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return inner


def metaspace(model: str) -> Any:
    """Return the tokenizer of T5 ("Unigram") or LLaMA ("BPE")."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

    if model == "Unigram":
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁the", -2.0), ("▁", -3.0), ("cat", -3.0)]
        inner = tokenizers.Tokenizer(models.Unigram(pieces, 2))
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        inner.decoder = decoders.Metaspace()
        inner.add_special_tokens([*("<pad>", "</s>", "<unk>"), *(f"<extra_id_{i}>" for i in (2, 1, 0))])
        inner.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
        return inner
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])}
    vocab |= {token: len(vocab) + i for i, token in enumerate(["▁", "a", "c", "t", "at", "cat", "▁cat"])}
    merges = [("a", "t"), ("c", "at"), ("▁", "cat")]
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(parts)
    inner.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    inner.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B:1", [("<s>", 1)])
    return inner


def test_berts_folder_opens_without_a_word_on_its_special_tokens(wordpiece: Tokenizer, tmp_path: Path) -> None:
    wordpiece.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 512}')
    found = tokenizer.load(tmp_path)
    roles = [found.special(role) for role in ("pad", "unknown", "cls", "sep", "mask")]
    assert roles == [0, 1, 2, 3, 4] and (found.pad_id, found.end_id, found.special("start")) == (0, 3, 2)
    found.save(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 512 and config["mask_token"] == "[MASK]" and "eos_token" not in config


def test_a_pair_is_framed_and_typed_as_bert_does(wordpiece: Tokenizer) -> None:
    first, second = "The CAT  unsat", "naïve mat."
    found = wordpiece.encode_pair(first, second)
    shown = [wordpiece.token(index) for index in found.ids]
    middle = shown.index("[SEP]")
    assert shown[0] == "[CLS]" and shown[-1] == "[SEP]" and shown.count("[SEP]") == 2
    assert found.types.tolist() == [0] * (middle + 1) + [1] * (len(shown) - middle - 1)
    assert found.parts.tolist() == [-1] + [0] * (middle - 1) + [-1] + [1] * (len(shown) - middle - 2) + [-1]
    assert ((found.words == -1) == (found.parts == -1)).all()
    assert sorted(set(found.words.tolist())) == list(range(-1, 6))  # the cat unsat | naive mat .
    for part, text in enumerate((first, second)):
        for word in set(found.words[found.parts == part].tolist()):
            offsets = found.offsets[found.words == word]
            assert text[offsets[0, 0] : offsets[-1, 1]].lower() in ("the", "cat", "unsat", "naïve", "mat", ".")
    alone = wordpiece.encode_pair(first)
    assert alone.ids.tolist() == found.ids[: middle + 1].tolist() and not alone.types.any()


def test_a_batch_of_pairs_equals_pairs_by_themselves(wordpiece: Tokenizer) -> None:
    batch = wordpiece.encode_pairs(TEXTS[:3], TEXTS[3:6])
    for found, first, second in zip(batch, TEXTS[:3], TEXTS[3:6], strict=True):
        single = wordpiece.encode_pair(first, second)
        assert all((getattr(found, name) == getattr(single, name)).all() for name in vars(single))
    with pytest.raises(DataError, match="3 first texts and 2 second"):
        wordpiece.encode_pairs(TEXTS[:3], TEXTS[:2])


def test_case_and_accents_go_only_where_asked(wordpiece: Tokenizer) -> None:
    assert wordpiece.encode("NAÏVE Cat").tolist() == wordpiece.encode("naive cat").tolist()
    cased = tokenizer.train_wordpiece(TEXTS, 120, lowercase=False)
    assert cased.encode("Cat").tolist() != cased.encode("cat").tolist()
    assert wordpiece.decode(wordpiece.encode("the cat sat")) == "the cat sat"


def test_special_tokens_in_a_text_are_text(wordpiece: Tokenizer, t5: Tokenizer) -> None:
    assert not {0, 2, 3, 4} & set(wordpiece.encode("[CLS] [MASK] [SEP] [PAD]").tolist())
    assert not set(t5.sentinels) & set(t5.encode("<extra_id_0> </s>").tolist())


def test_wordpiece_is_learnt_the_same_in_any_process(wordpiece: Tokenizer) -> None:
    code = f"from fm_jax.data.text import tokenizer\nprint(tokenizer.train_wordpiece({TEXTS!r}, 120).fingerprint)\n"
    env = {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == wordpiece.fingerprint


def test_words_begin_where_the_tokenizers_own_splitting_says(wordpiece: Tokenizer) -> None:
    found = wordpiece.encode_pair(TEXTS[0] + " unsat 12345 _x")
    inside = found.parts == 0
    begins = np.diff(found.words[inside], prepend=-1) > 0
    assert (wordpiece.begins_word[found.ids[inside]] == begins).all() and not begins.all()


def test_t5s_layout_has_its_sentinels_last_and_descending(t5: Tokenizer) -> None:
    assert t5.vocab_size == 320 and t5.sentinels == list(range(319, 309, -1))
    assert [t5.token(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"] and (t5.pad_id, t5.end_id) == (0, 1)
    found = t5.encode_pair("the cat", "a mat")
    assert found.ids.tolist() == [*t5.encode("the cat"), 1, *t5.encode("a mat"), 1]
    assert t5.decode(t5.encode("naïve\n 漢 😀")) == "naïve\n 漢 😀"
    with pytest.raises(ConfigError, match=r"vocab_size 260 is too small; .* need 269"):
        tokenizer.train(TEXTS, 260, sentinels=10)


def test_sentinels_and_word_starts_are_found_again_in_a_worker(t5: Tokenizer) -> None:
    assert t5.begins_word[t5.encode(" the")[0]] and t5.sentinels
    again = copy.copy(t5)  # as pickle does it
    assert "sentinels" not in vars(again) and again.sentinels == t5.sentinels
    assert not set(t5.sentinels) & set(copy.deepcopy(t5).encode("<extra_id_0>").tolist())


def test_a_tokenizer_without_a_role_says_so_when_asked(t5: Tokenizer, tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import models

    with pytest.raises(DataError, match="no mask token"):
        t5.special("mask")
    written(tmp_path, tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, [])), {"eos_token": "</s>"})
    found = tokenizer.load(tmp_path)
    assert found.encode("ab").tolist() == [0, 1] and found.sentinels == []
    for ask in (lambda: found.end_id, lambda: found.pad_id):
        with pytest.raises(DataError, match=r"tokenizer\.json has no end token '</s>'"):
            ask()


def test_gpt2_and_roberta_open(tmp_path: Path) -> None:
    gpt2 = tokenizer.load(written(tmp_path, byte_level(post=False), {"model_max_length": 1024}))
    assert gpt2.end_id == gpt2.pad_id == gpt2.special("start") == 0
    assert gpt2.encode_pair("the cat").ids.tolist() == gpt2.encode("the cat").tolist()
    roberta = tokenizer.load(written(tmp_path, byte_level(post=True)))
    assert [roberta.special(role) for role in ("start", "pad", "end", "unknown", "mask")] == [0, 1, 2, 3, 4]
    assert (roberta.special("cls"), roberta.special("sep")) == (0, 2)
    found = roberta.encode_pair("the cat", "a mat")
    assert found.ids.tolist() == [0, *roberta.encode("the cat"), 2, 2, *roberta.encode("a mat"), 2]
    assert not found.types.any() and set(found.parts.tolist()) == {-1, 0, 1}


def test_t5_and_llama_open(tmp_path: Path) -> None:
    t5 = tokenizer.load(written(tmp_path, metaspace("Unigram"), {"eos_token": "</s>", "pad_token": "<pad>"}))
    assert (t5.pad_id, t5.end_id, t5.special("unknown"), t5.sentinels) == (0, 1, 2, [8, 7, 6])
    assert t5.encode_pair("the cat").ids.tolist() == [3, 4, 5, 1]
    llama = tokenizer.load(written(tmp_path, metaspace("BPE"), {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
    assert (llama.special("start"), llama.end_id, llama.pad_id, llama.special("unknown")) == (1, 2, 2, 0)
    ids = llama.encode_pair("cat é").ids
    assert ids[0] == 1 and llama.token(ids[1]) == "▁cat" and llama.decode(ids) == "cat é"


def test_a_tokenizer_larger_than_the_embedding_is_refused(t5: Tokenizer) -> None:
    tokenizer.check_vocabulary(t5, 320)
    tokenizer.check_vocabulary(t5, 384)
    with pytest.raises(DataError, match="320 tokens, but the model's embedding has 319 rows"):
        tokenizer.check_vocabulary(t5, 319)


BROKEN: dict[str, tuple[Any, str]] = {
    "not_json": ("{", "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "list": ("[]", "holds a list"),
    "no_model": ("{}", "is not a tokenizer"),
    "unknown_model": ({"model": {"type": "Oracle", "vocab": {"a": 0}}}, "is not a tokenizer"),
    "huge_id": ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 4_000_000_000}, "merges": []}}, "id 4000000000"),
    "gap": ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 2}, "merges": []}}, "id 2, outside 0 … 1"),
    "negative": ({"model": {"type": "BPE", "vocab": {"a": 0, "b": -1}, "merges": []}}, "id -1, outside"),
    "text_id": ({"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}}, "id '0', outside"),
    "shared": ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}, "id 0 to both 'a' and 'b'"),
    "twice": ('{"model": {"type": "BPE", "vocab": {"a": 0, "a": 1}, "merges": []}}', "'a' occurs twice"),
    "odd": ({"model": {"type": "Unigram", "vocab": [1, 2]}}, "cannot read its vocabulary"),
    "merge": ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "z"]]}}, "is not a tokenizer"),
    "added": (
        {"added_tokens": [{"id": 1, "content": "a"}], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
        "'a' two ids, 0 and 1",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_unsound_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    (tmp_path / "tokenizer.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        tokenizer.load(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value) and "\n" not in str(caught.value)


def test_names_that_are_no_object_are_refused(t5: Tokenizer, tmp_path: Path) -> None:
    t5.save(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text("[]")
    with pytest.raises(DataError, match=r"special_tokens_map\.json holds a list"):
        tokenizer.load(tmp_path)


def test_a_pattern_that_makes_the_library_panic_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers

    inner = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    found = tokenizer.load(written(tmp_path, inner))
    with pytest.raises(DataError, match=r"tokenizer\.json cannot encode: .*retry-limit"):
        found.encode("a" * 40 + "b")
    assert "panicked" in capfd.readouterr().err  # it was one, and the process lives


def test_an_interrupt_stays_one() -> None:
    from fm_jax.data.text.tokenizer_file import guard

    with pytest.raises(KeyboardInterrupt), guard("x"):
        raise KeyboardInterrupt
