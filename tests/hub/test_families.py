import re
from types import MappingProxyType

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.core import meta

from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError
from fm_jax.core.mesh import MeshConfig, make_mesh
from fm_jax.core.types import backbone
from fm_jax.hub import families, table
from fm_jax.hub.example import Size
from fm_jax.hub.fields import Fields
from fm_jax.hub.files.weights import Arrays, Spec
from tests.hub.forms import FEW, FORMS, build, draw
from tests.parity.all_families import FAMILIES


def form(module):
    """Return all that decides what a module computes."""
    heads = {name: value for name, value in vars(module).items() if isinstance(value, int | str | float | bool)}
    return type(module), backbone(module).cfg, {name: heads[name] for name in heads if name not in ("name", "parent")}


@pytest.mark.parametrize("name", FORMS)
def test_the_config_that_a_module_gives_builds_the_module_again(name):
    module, family = build(FORMS[name])
    data = family.fields(module)
    if name in ("gpt2-labels", "llama-labels"):
        with pytest.raises(CheckpointError, match="pad_token_id is missing"):
            build(data)
        data |= {"pad_token_id": 0}
    again, found = build(data)
    assert found is family is families.writing(module)
    assert form(again) == form(module)
    assert found.fields(again) | {"pad_token_id": 0} == family.fields(module) | {"pad_token_id": 0}


def test_every_family_has_a_parity_file_with_a_form_of_each_of_its_kinds():
    kinds = {family.__name__.rpartition(".")[2]: set(family.KINDS) for family in families.FAMILIES}
    assert {name: {config["model_type"] for config in file.FORMS.values()} for name, file in FAMILIES.items()} == kinds
    assert len(FORMS) == sum(len(file.FORMS) for file in FAMILIES.values()) and set(FEW) <= set(FORMS)


def test_every_model_type_has_one_family():
    assert len(families.BY_KIND) == sum(len(family.KINDS) for family in families.FAMILIES)


@pytest.mark.parametrize("name", FORMS)
def test_one_family_alone_writes_a_module_under_the_name_it_is_read_by(name):
    module, family = build(FORMS[name])
    assert [each for each in families.FAMILIES if each.writes(module)] == [family]
    data = family.fields(module)
    assert data["architectures"][0].startswith(family.KINDS[data["model_type"]])


@pytest.mark.parametrize("name", FORMS)
def test_an_example_is_what_the_module_reads_and_every_site_is_one_of_its_own(name):
    """Of the smallest and of a larger size; the ids stay inside the vocabulary, and padding is where it is said."""
    module, family = build(FORMS[name])
    assert set(family.sites(module).values()) <= set(module.sites)
    for size in (Size(), Size(3, 6, pad=2)):
        inputs, inside = family.example(module, np.random.default_rng(0), size)
        assert {len(array) for array in inputs.values()} == {size.rows}
        assert jax.eval_shape(lambda inputs=inputs: module.init(jax.random.key(0), **inputs))["params"]
        if inside is not None:
            tokens = inputs.get("source", inputs["tokens"])
            assert ((tokens == size.pad) == ~inside).all() and tokens.max() < backbone(module).cfg.vocab_size
            assert inside.sum(axis=1).tolist() == ([1] if size == Size() else [6, 4, 2])


@pytest.mark.parametrize("name", FEW)
def test_every_parameter_has_one_place_and_every_place_a_parameter(name):
    module, family = build(FORMS[name])
    params = draw(module)
    written = dict(table.write(family.table(module), params))
    assert table.specs(family.table(module), params) == {key: Spec(x.dtype.name, x.shape) for key, x in written.items()}
    assert sum(x.size for x in written.values()) == tree.count(params)
    back = table.read(family.table(module), families.abstract(module), Arrays(written))
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("name", ["gpt2-labels", "bert-pretraining", "t5"])
def test_abstract_parameters_are_those_of_init(name):
    module, family = build(FORMS[name])
    inputs = family.example(module, np.random.default_rng(0), Size()).inputs
    real = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), **inputs)["params"])
    assert jax.tree.map(lambda x: x.shape, families.abstract(module)) == jax.tree.map(lambda x: x.shape, real)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = families.abstract(module, "bfloat16", mesh)
    assert {leaf.dtype for leaf in jax.tree.leaves(placed)} == {np.dtype("bfloat16")}
    assert any(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in jax.tree.leaves(placed))


@pytest.mark.parametrize("name", ["gpt2", "bert-pretraining"])
def test_a_family_whose_config_tells_all_is_not_asked_what_the_file_holds(name):
    module, family = build(FORMS[name])
    assert families.settled(family, module, Arrays({})) is module


def test_a_family_whose_config_leaves_something_open_is_asked():
    module, _ = build(FORMS["gpt2"])
    asked = []

    class File:
        module = fields = table = writes = example = sites = staticmethod(lambda *_: None)
        KINDS = MappingProxyType({})
        settle = staticmethod(lambda *given: asked.append(given) or "settled")

    weights = Arrays({})
    assert families.settled(File(), module, weights) == "settled"
    assert asked == [(module, weights)]


def test_an_unknown_model_type_is_refused_with_those_that_are_known():
    for data, word in (({"model_type": "mamba"}, "'mamba'"), ({}, "model_type is missing")):
        with pytest.raises(CheckpointError, match=re.escape(word)) as caught:
            families.reading(Fields(data, "config.json"))
        assert "gpt2, gpt_neo, llama" in str(caught.value)


def test_a_module_of_no_family_is_refused():
    with pytest.raises(CheckpointError, match="transformers has no class for a Dense"):
        families.writing(nn.Dense(3))


# (form, change of its config, what the message must name)
UNSUPPORTED = [
    ("gpt2", {"activation_function": "swish"}, "activation_function 'swish'"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is false"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
    ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings is false"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is true"),
    ("gpt2", {"embd_pdrop": 0.3}, "embd_pdrop is 0.3"),
    ("gpt2", {"n_head": 3}, "16 is not divisible by the number of heads, 3"),
    ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ("gpt2", {"rotary_dim": 4}, "rotary_dim (4) is unknown"),
    ("gpt2", {"n_layer": "3"}, "n_layer is '3', not int"),
    ("gpt2", {"n_embd": None}, "n_embd is missing"),
    ("gpt2", {"architectures": ["GPT2DoubleHeadsModel"]}, "GPT2DoubleHeadsModel"),
    ("gpt2-labels", {"pad_token_id": None}, "pad_token_id is missing"),
    ("neo", {"attention_types": [[["global", "local"], 1]]}, "attention_types"),
    ("neo", {"attention_types": [[["global", "sparse"], 2]]}, "attention_types"),
    ("neo", {"attention_types": [[["global"], "four"]]}, 'attention_types [[["global"], "four"]] is not a list'),
    ("neo", {"attention_types": [4]}, "attention_types [4] is not a list"),
    ("llama", {"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
    ("llama", {"attention_bias": True}, "attention_bias is true"),
    ("llama", {"mlp_bias": True}, "mlp_bias is true"),
    ("llama", {"sliding_window": 8}, "sliding_window is 8"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type 'longrope'"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}}, "mscale"),
    ("llama", {"architectures": ["LlamaModel"]}, "LlamaModel"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"num_key_value_heads": 3}, "num_heads 4 must be a multiple of num_kv_heads 3"),
    ("llama", {"vocab_size": 0}, "vocab_size must be at least 1"),
    ("llama", {"num_hidden_layers": 1_000_000_000}, "num_hidden_layers is 1000000000, which is out of range"),
    ("qwen2", {"vocab_size": 10**13}, "vocab_size is 10000000000000"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor is missing"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "two"}}, "factor is 'two', not float"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor 0.5"),
    ("llama", {"rope_theta": 0.5}, "base 0.5"),
    ("qwen2-windows", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ("gemma", {"hidden_activation": "silu"}, "hidden_activation 'silu'"),
    ("bert-words", {"hidden_act": "swish"}, "hidden_act 'swish'"),
    ("bert-words", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ("bert-words", {"is_decoder": True}, "is_decoder is true"),
    ("bert-words", {"architectures": ["BertForMultipleChoice"]}, "BertForMultipleChoice"),
    ("bert-words", {"tie_word_embeddings": False}, "tie_word_embeddings is false"),
    ("albert", {"num_hidden_groups": 2}, "num_hidden_groups is 2"),
    ("t5", {"feed_forward_proj": "gated-swish"}, "gated-swish"),
]


@pytest.mark.parametrize(("name", "change", "word"), UNSUPPORTED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_not_supported_is_refused_by_name(name, change, word):
    with pytest.raises(CheckpointError, match=re.escape(word)) as caught:
        build({**FORMS[name], **change})
    assert "\n" not in str(caught.value)


def test_all_that_is_wrong_stands_in_one_message():
    change = {"scale_attn_weights": False, "rotary_dim": 4, "tie_word_embeddings": False}
    with pytest.raises(CheckpointError) as caught:
        build({**FORMS["gpt2"], **change})
    assert all(name in str(caught.value) for name in change)


@pytest.mark.parametrize("name", FORMS)
def test_fields_without_effect_are_passed_over(name):
    module, _ = build({**FORMS[name], "torch_dtype": "float16", "transformers_version": "4.40.0", "top_k": 50})
    assert form(module) == form(build(FORMS[name])[0])
