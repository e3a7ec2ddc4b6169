"""What belongs to a model besides its weights: a folder that is loaded and saved says the same to transformers."""

import json

import pytest
import transformers

from fm_jax.data.text import tokenizer as tokenizers
from fm_jax.hub import generation, pretrained
from tests.hub.forms import FORMS, build, draw

TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
SETTINGS = {"eos_token_id": [5, 6], "pad_token_id": 7, "do_sample": True, "top_p": 0.75, "repetition_penalty": 1.5}


@pytest.mark.parametrize("file", [True, False])
def test_generation_and_chat_template_go_with_a_folder(file, tmp_path):
    module, _ = build({**FORMS["llama"], "vocab_size": 288})
    tokenizer = tokenizers.train(["the cat sat on the mat", "a dog ran after the cat"] * 3, 280)
    ids = {"bos_token_id": None, "eos_token_id": [5, 6], "pad_token_id": 7}
    pretrained.save(
        tmp_path / "theirs", module, draw(module), tokenizer, generation=generation.Generation(ids, SETTINGS)
    )
    config = json.loads((tmp_path / "theirs" / "tokenizer_config.json").read_text()) | {"bos_token": None}
    config |= {} if file else {"chat_template": TEMPLATE}
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(config))
    if file:
        (tmp_path / "theirs" / "chat_template.jinja").write_text(TEMPLATE)
    found = pretrained.load(tmp_path / "theirs")
    pretrained.save(tmp_path / "ours", found.module, found.params, found.tokenizer, generation=found.generation)

    def said(folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        words = transformers.AutoTokenizer.from_pretrained(folder)
        chat = words.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False)
        settings = {name: getattr(model.generation_config, name) for name in SETTINGS}
        config = {name: getattr(model.config, name) for name in ids}
        return settings, config, chat, words.bos_token, words.eos_token

    theirs, ours = said(tmp_path / "theirs"), said(tmp_path / "ours")
    assert ours == theirs
    assert ours[:4] == (SETTINGS, ids, "<|user|>the cat", None)
