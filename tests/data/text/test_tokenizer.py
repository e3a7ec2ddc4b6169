import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fm_jax.core.errors import ConfigError, DataError
from fm_jax.data.text import tokenizer
from fm_jax.data.text.tokenizer import END, PAD, Tokenizer

TEXTS = [f"the cat sat on the mat, number {i}; def act_{i % 7}(self): return {i * i}" for i in range(200)]


@pytest.fixture(scope="module")
def learned() -> Tokenizer:
    return tokenizer.train(TEXTS, 300)


def test_any_text_comes_back_as_it_was(learned: Tokenizer) -> None:
    rng = random.Random(0)
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    texts = ["", " ", "\r\n\t\0", "naïve 漢字 😀  x", END, f"a{PAD}b"]
    texts += ["".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(50)) for _ in range(50)]
    for text, ids in zip(texts, learned.encode_batch(texts), strict=True):
        assert learned.decode(ids, keep_special=True) == text
        assert ids.dtype == np.int32 and (ids == learned.encode(text)).all()


def test_text_never_becomes_a_special_token(learned: Tokenizer) -> None:
    ids = learned.encode(f"one {END} two {PAD}")
    assert learned.end_id not in ids and learned.pad_id not in ids
    assert learned.decode([learned.end_id, *ids, learned.pad_id]) == f"one {END} two {PAD}"


def test_special_tokens_are_there_and_different(learned: Tokenizer) -> None:
    assert (learned.token(learned.end_id), learned.token(learned.pad_id)) == (END, PAD)
    assert learned.vocab_size == 300


def test_the_same_texts_give_the_same_tokenizer_in_any_order_and_any_process(learned: Tokenizer) -> None:
    assert tokenizer.train(reversed(TEXTS), 300).fingerprint == learned.fingerprint
    code = f"from fm_jax.data.text import tokenizer\nprint(tokenizer.train({TEXTS!r}, 300).fingerprint)\n"
    env = {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == learned.fingerprint
    assert tokenizer.train(TEXTS[:150], 300).fingerprint != learned.fingerprint


def test_what_is_saved_loads_equal_and_opens_in_the_library_itself(learned: Tokenizer, tmp_path: Path) -> None:
    import tokenizers

    learned.save(tmp_path)
    again = tokenizer.load(tmp_path)
    assert (again.fingerprint, again.end_id, again.pad_id) == (learned.fingerprint, learned.end_id, learned.pad_id)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.encode("the cat\n 😀").ids == learned.encode("the cat\n 😀").tolist()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["pad_token"]) == (END, PAD)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("written", ["<s>", {"content": "<s>", "lstrip": False}])
def test_another_tools_names_for_its_special_tokens_are_read(written: object, tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import models

    inner = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    inner.add_special_tokens(["<s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": written, "pad_token": None}))
    found = tokenizer.load(tmp_path)
    assert (found.vocab_size, found.end_id, found.pad_id) == (3, 2, 2)
    found.save(tmp_path / "again")
    again = tokenizer.load(tmp_path / "again")
    assert (again.end_id, again.fingerprint) == (2, found.fingerprint)


@pytest.mark.parametrize(
    ("config", "start"),
    [
        ({}, 3),  # as GPT-2's folder, which says nothing
        ({"bos_token": None}, 0),
        ({"bos_token": "a"}, 1),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, 0),  # has no start token of its own
        ({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "b"}, 2),
    ],
)
def test_a_start_token_that_is_stated_as_none_is_none(config: dict[str, object], start: int, tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import models

    inner = tokenizers.Tokenizer(models.BPE({"</s>": 0, "a": 1, "b": 2}, []))
    inner.add_special_tokens(["</s>", "<s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer.load(tmp_path).start_id == start  # the end token if there is none


def test_bytes_per_token_counts_bytes(learned: Tokenizer) -> None:
    assert tokenizer.bytes_per_token(learned, ["漢"]) == 1.0
    assert tokenizer.bytes_per_token(learned, TEXTS) > 1.5


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size 200 is too small; .* need 258"):
        tokenizer.train(TEXTS, 200)


def test_byte_level_vocabularies_stay_as_they_were(learned: Tokenizer) -> None:
    told = "\n".join(learned.token(index) for index in range(300))
    assert (
        hashlib.sha256(told.encode()).hexdigest()[:16] == "10ddc20b20b93767"
    )  # tokens on disk and checkpoints hang on it
    assert learned.encode_pair(TEXTS[0]).ids.tolist() == learned.encode(TEXTS[0]).tolist()  # and have no frame


@pytest.mark.parametrize("texts", [[], ["ab"]])
def test_too_little_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(DataError, match="the text gives 258 tokens, not vocab_size 300"):
        tokenizer.train(texts, 300)


def test_ids_beyond_the_vocabulary_have_no_text_and_negative_ones_are_refused(learned: Tokenizer) -> None:
    ids = learned.encode("the cat")
    with pytest.warns(UserWarning, match="token id 300 is beyond the tokenizer, which has 300 tokens"):
        assert learned.decode([*ids[:1], 300, *ids[1:], 2**31]) == "the cat"
    with pytest.raises(DataError, match="token id -1 is outside the vocabulary of 300"):
        learned.decode([0, -1])


def test_missing_and_damaged_files_are_named(learned: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer.json does not exist"):
        tokenizer.load(tmp_path)
    learned.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json is not JSON"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json is not a tokenizer"):
        tokenizer.load(tmp_path)
