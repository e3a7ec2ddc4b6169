"""What a config.json leaves out means the default of transformers' class; what it sets to null, what the class makes of
that. Configs alone are compared: no model is built.

A field without which a model cannot be told, such as its width, is not guessed: it is refused as missing.
"""

import json
from dataclasses import replace

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError

from fm_jax.core.errors import CheckpointError
from fm_jax.hub import families
from fm_jax.hub.fields import Fields
from fm_jax.models.language.encoder_decoder import EncoderDecoder
from tests.hub.forms import FORMS

ELSEWHERE = {"yolov3", "yolox", "faster_rcnn"}  # transformers has none of these model types
FIRST = {  # one form of each of the others
    config["model_type"]: config for config in reversed(FORMS.values()) if config["model_type"] not in ELSEWHERE
}
BOOKKEEPING = {"architectures", "id2label", "label2id", "model_type", "transformers_version"}


def built(config):
    """Return the module of a config; None if it is refused."""
    try:
        module = families.build(Fields(json.loads(json.dumps(config)), "config.json"))[1]
    except CheckpointError:
        return None
    # whether a T5's head is tied is settled by its weights, whatever its config says
    return module.clone(cfg=replace(module.cfg, tied=False)) if isinstance(module, EncoderDecoder) else module


def whole(config):
    """Return the config with all that transformers' class adds to it; None if the class refuses it."""
    try:
        return transformers.AutoConfig.for_model(**config).to_dict()
    except (StrictDataclassError, TypeError, ValueError) as error:
        assert config is not FIRST[config["model_type"]], error
        return None


def missing(config):
    """Return what the error says is missing, or "" if the config is read or refused for another reason."""
    try:
        families.build(Fields(config, "config.json"))
    except CheckpointError as error:
        return str(error).removesuffix(" is missing").rpartition(" ")[2] if str(error).endswith(" is missing") else ""
    return ""


def test_every_model_type_has_a_form():
    assert FIRST.keys() == families.BY_KIND.keys() - ELSEWHERE


@pytest.mark.parametrize("kind", FIRST)
def test_what_is_left_out_is_the_classes_default(kind):
    form = FIRST[kind]
    assert built(form) is not None and built(form) == built(whole(form))
    seen = 0
    for name in form.keys() - BOOKKEEPING:
        less = {key: value for key, value in form.items() if key != name}
        if missing(less) == name or (full := whole(less)) is None:
            continue
        assert built(less) == built(full), name
        seen += 1
    assert seen or kind == "gpt2"  # its form says nothing but its sizes


@pytest.mark.parametrize("kind", FIRST)
def test_null_is_what_the_class_makes_of_it(kind):
    form = FIRST[kind]
    for name in whole(form).keys() - BOOKKEEPING:
        null = {**form, name: None}
        if missing(null) != name and (full := whole(null)) is not None:
            assert built(null) == built(full), name


def test_the_window_of_a_mistral_is_4096_unless_it_is_null():
    form = {key: value for key, value in FIRST["mistral"].items() if key != "sliding_window"}
    assert whole(form)["sliding_window"] == built(form).cfg.attention.windows[0] == 4096
    assert whole({**form, "sliding_window": None})["sliding_window"] is None
    assert built({**form, "sliding_window": None}).cfg.attention.windows == (0,)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_the_windows_of_a_qwen_begin_at_layer_28_unless_the_config_says_otherwise(kind):
    deep = {**FIRST[kind], "num_hidden_layers": 30, "use_sliding_window": True}
    for more in ({}, {"sliding_window": 8}, {"max_window_layers": 3}, {"sliding_window": None}):
        full = whole({**deep, **more})
        size = full["sliding_window"] or 0
        kinds = [size if layer == "sliding_attention" else 0 for layer in full["layer_types"]]
        assert list(built({**deep, **more}).cfg.attention.windows) == kinds
