"""The command that generates text: what the model reads, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.language import generate
from fm_jax.core.errors import ConfigError
from fm_jax.data.text import tokenizer
from fm_jax.hub import pretrained
from fm_jax.hub.generation import Generation
from fm_jax.models.language import decoder, encoder
from fm_jax.models.language.masked_lm import MaskedLM
from fm_jax.tasks.init import Init
from tests.data.text.test_chat import TEXTS, save
from tests.hub.forms import draw


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.Tokenizer:
    return tokenizer.load(save(tmp_path_factory.mktemp("words")))


def model(words: tokenizer.Tokenizer, ends: Generation | None = None) -> pretrained.Pretrained:
    return pretrained.Pretrained(decoder.Decoder(decoder.tiny()), {}, words, generation=ends)


def test_a_prompt_is_text_unless_it_is_asked_otherwise(words: tokenizer.Tokenizer) -> None:
    cfg = generate.Config(prompt="<|im_end|>the cat")
    assert 301 not in generate.prompt_ids(cfg, model(words), words)
    assert generate.prompt_ids(replace(cfg, special=True), model(words), words)[0] == 301


def test_a_chat_has_its_turns_and_ends_where_the_answer_begins(words: tokenizer.Tokenizer) -> None:
    pytest.importorskip("jinja2")
    cfg = generate.Config(prompt="the <|im_end|>cat", chat=True, system="be brief")
    text = words.decode(generate.prompt_ids(cfg, model(words), words), keep_special=True)
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>") and text.endswith("<|im_start|>assistant\n")
    counts = [generate.prompt_ids(replace(cfg, special=special), model(words), words).count(301) for special in (0, 1)]
    assert counts == [2, 3]


def test_an_empty_prompt_is_the_start_of_a_text(words: tokenizer.Tokenizer) -> None:
    cfg = generate.Config()
    assert generate.prompt_ids(cfg, model(words), words) == [words.start_id]
    assert generate.prompt_ids(cfg, model(words, Generation({"bos_token_id": 7})), words) == [7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": "x"}, "system is a message of a chat; set chat true"),
        ({"top_p": 0.9}, "top_k and top_p have no effect at temperature 0"),
        ({"top_k": 5}, "top_k and top_p have no effect at temperature 0"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
    ],
)
def test_settings_without_effect_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate.Config(**change)  # type: ignore[arg-type]


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    bert = MaskedLM(encoder.Encoder(encoder.tiny()))
    trained = tokenizer.train_wordpiece(TEXTS, 60)
    pretrained.save(tmp_path / "bert", bert, draw(bert), trained)
    with pytest.raises(ConfigError, match="is a MaskedLM; generation of text needs a decoder"):
        generate.run(generate.Config(Init(tmp_path / "bert"), "x"), tmp_path / "run")
