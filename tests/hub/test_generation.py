import json
from dataclasses import replace

import pytest

from fm_jax.core.errors import CheckpointError
from fm_jax.data.text import chat
from fm_jax.data.text import tokenizer as tokenizers
from fm_jax.hub import generation, pretrained
from fm_jax.hub.generation import Generation
from fm_jax.models.language.decoder import Decoder, tiny
from tests.hub.forms import draw, make

TEXTS = ["the cat sat on the mat", "a dog ran after the cat", "the mat is on the floor"] * 3
CHAT = {"eos_token_id": [7, 2], "pad_token_id": 3, "do_sample": True, "top_p": 0.9, "_from_model_config": True}


def contents(folder, name):
    return json.loads((folder / name).read_text())


def again(folder, target, **changed):
    """Load a folder and save it."""
    found = replace(pretrained.load(folder), **changed)
    pretrained.save(target, found.module, found.params, found.tokenizer, generation=found.generation)
    return found


def test_a_folder_that_is_loaded_and_saved_generates_as_before(tmp_path):
    make(tmp_path / "theirs", "llama", bos_token_id=None, eos_token_id=[2, 9], pad_token_id=None)
    (tmp_path / "theirs" / generation.FILE).write_text(json.dumps(CHAT))
    found = again(tmp_path / "theirs", tmp_path / "ours").generation
    assert (found.end_ids, found.pad_id, found.start_id) == ((7, 2), 3, None)
    written = contents(tmp_path / "ours", "config.json")
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (None, [2, 9], None)
    assert contents(tmp_path / "ours", generation.FILE) == CHAT
    assert pretrained.load(tmp_path / "ours").generation == found


def test_a_null_is_not_replaced_by_the_tokenizers_token(tmp_path):
    module = Decoder(replace(tiny(), vocab_size=288))
    tokenizer = tokenizers.train(TEXTS, 280)
    stated = Generation({"bos_token_id": None, "eos_token_id": [5, 6]})
    pretrained.save(tmp_path / "folder", module, draw(module), tokenizer, generation=stated)
    written = contents(tmp_path / "folder", "config.json")
    assert (written["bos_token_id"], written["eos_token_id"]) == (None, [5, 6])
    assert written["pad_token_id"] == tokenizer.pad_id  # not stated: the tokenizer's
    assert not (tmp_path / "folder" / generation.FILE).exists()


def test_settings_of_an_early_config_are_written_where_they_are_now(tmp_path):
    make(tmp_path / "theirs", "gpt2", eos_token_id=4, do_sample=True, max_length=50, top_k=None)
    again(tmp_path / "theirs", tmp_path / "ours")
    want = {"eos_token_id": 4, "do_sample": True, "max_length": 50}
    assert contents(tmp_path / "ours", generation.FILE) == want
    assert contents(tmp_path / "ours", "config.json")["eos_token_id"] == 4


def test_a_folder_that_says_nothing_stays_without(tmp_path):
    for name in ("gpt2", "resnet"):
        make(tmp_path / name, name)
        assert pretrained.load(tmp_path / name).generation is None


@pytest.mark.parametrize(
    ("ids", "settings", "want"),
    [
        ({"eos_token_id": 2}, None, ((2,), None, None)),
        ({"eos_token_id": 2}, {"eos_token_id": None}, ((), None, None)),
        ({"eos_token_id": 2, "pad_token_id": 1}, {"eos_token_id": [3]}, ((3,), 1, None)),
        ({"bos_token_id": 0, "pad_token_id": -1}, {}, ((), None, 0)),
    ],
)
def test_generation_config_wins_over_config(ids, settings, want):
    stated = Generation(ids, settings)
    assert (stated.end_ids, stated.pad_id, stated.start_id) == want
    assert generation.of_run({"generation": stated.describe()}) == stated
    assert generation.of_run({}) is None


@pytest.mark.parametrize("value", ["<s>", True, 1.5, [2, None], [[2]], {"id": 2}, [1] * 1001], ids=str)
def test_an_id_that_is_none_is_refused_by_name(value):
    with pytest.raises(CheckpointError, match=r"^config\.json: eos_token_id .* is neither a token id nor a list"):
        Generation({"eos_token_id": value})
    with pytest.raises(CheckpointError, match=r"^generation_config\.json: pad_token_id"):
        Generation({}, {"pad_token_id": value})


def test_a_damaged_file_is_refused_and_can_be_left_out(tmp_path):
    make(tmp_path, "gpt2", eos_token_id=4)
    for damage, word in (
        ("[1]", "not a JSON object"),
        ('{"top_p": NaN}', "not JSON"),
        ('{"eos_token_id": "x"}', "neither"),
    ):
        (tmp_path / generation.FILE).write_text(damage)
        with pytest.raises(CheckpointError, match=word) as caught:
            pretrained.load(tmp_path)
        assert generation.FILE in str(caught.value)
    assert pretrained.load(tmp_path, ignore=[generation.FILE]).generation == Generation({"eos_token_id": 4})


def test_the_chat_template_and_null_tokens_stay_with_the_tokenizer(tmp_path):
    tokenizers.train(TEXTS, 280).save(tmp_path / "theirs")
    assert tokenizers.load(tmp_path / "theirs").special("start") == tokenizers.load(tmp_path / "theirs").end_id
    config = contents(tmp_path / "theirs", "tokenizer_config.json")
    config |= {"bos_token": None, "chat_template": "old", "model_max_length": 77}
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "theirs" / chat.FILE).write_text("{{ messages }}\n")
    tokenizer = tokenizers.load(tmp_path / "theirs")
    with pytest.raises(tokenizers.DataError, match="no start token"):
        tokenizer.special("start")
    tokenizer.save(tmp_path / "ours")
    assert contents(tmp_path / "ours", "tokenizer_config.json") == {**config, "chat_template": "{{ messages }}\n"}
