"""The BERT family's config.json and names, in both directions; tensors are those of the golden file's tiny models."""

import json
import re

import numpy as np
import pytest

from fm_jax.core import tree
from fm_jax.core.errors import CheckpointError
from fm_jax.hub import families, table
from fm_jax.hub.fields import Fields
from fm_jax.hub.files.weights import Arrays
from fm_jax.hub.language import bert
from fm_jax.models.language.encoder import Encoder, roberta_base
from tests.goldens.stored import Golden

GOLDEN = Golden("encoder")
PEERS = GOLDEN.peers


def module(config):
    fields = Fields(config, "config.json")
    found = bert.module(fields)
    fields.close()
    return found


def read(model, given):
    return table.read(bert.table(model), families.abstract(model), Arrays(given))


@pytest.mark.parametrize("case", PEERS)
def test_a_config_comes_back_as_the_module_it_was_written_from(case):
    model = module(PEERS[case]["config"])
    config = bert.fields(model)
    assert config["architectures"] == PEERS[case]["config"]["architectures"]
    again = module(json.loads(json.dumps(config)))
    assert type(again) is type(model)
    assert again.backbone.cfg == model.backbone.cfg
    assert bert.kind_of(again) is bert.kind_of(model) is bert.OF_TYPE[config["model_type"]]


@pytest.mark.parametrize("case", PEERS)
def test_tensors_come_back_under_their_names(case):
    model, given = module(PEERS[case]["config"]), GOLDEN.numbered(case)
    written = dict(table.write(bert.table(model), read(model, given)))
    assert written.keys() == given.keys()
    for name, tensor in given.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def same_parameters(one, two):
    one, two = tree.flatten(one), tree.flatten(two)
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[path], err_msg=path)


def test_the_first_files_called_a_norms_parameters_gamma_and_beta():
    model, given = module(PEERS["bert-pretraining"]["config"]), GOLDEN.numbered("bert-pretraining")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in given.items()
    }
    assert old.keys() != given.keys()
    same_parameters(read(model, old), read(model, given))


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_any_mixture_of_old_names_and_missing_prefixes_is_read(prefix, old):
    model, given = module(PEERS["bert-pretraining"]["config"]), GOLDEN.numbered("bert-pretraining")
    mixed = given
    if not prefix:
        mixed = {name.removeprefix("bert."): tensor for name, tensor in mixed.items()}
    if old:
        words = ((r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta"))
        for word, other in words:
            mixed = {re.sub(word, other, name): tensor for name, tensor in mixed.items()}
    assert (mixed.keys() == given.keys()) == (prefix and not old)
    same_parameters(read(model, mixed), read(model, given))


def test_stored_copies_of_tied_tensors_must_be_equal():
    model, given = module(PEERS["bert-pretraining"]["config"]), GOLDEN.numbered("bert-pretraining")
    copy = {
        **given,
        "cls.predictions.decoder.weight": given["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": given["cls.predictions.bias"],
        "bert.embeddings.position_ids": np.arange(32)[None],
    }
    same_parameters(read(model, copy), read(model, given))
    copy["cls.predictions.decoder.bias"] = copy["cls.predictions.decoder.bias"] + 1
    with pytest.raises(CheckpointError, match=r"cls.predictions.decoder.bias differs from cls.predictions.bias"):
        read(model, copy)


def test_a_masked_word_model_reads_a_file_that_was_pretrained_on_pairs_too():
    """The published bert-base files name BertForMaskedLM, and hold pooler and next-sentence head beside it."""
    config, given = dict(PEERS["bert-pretraining"]["config"]), GOLDEN.numbered("bert-pretraining")
    both = read(module(config), given)
    words = read(module({**config, "architectures": ["BertForMaskedLM"]}), given)
    same_parameters(words, {name: node for name, node in both.items() if name != "next"})


@pytest.mark.parametrize("prefix", ["", "bert.", "electra."])
def test_a_bare_model_is_read_with_or_without_a_prefix_and_without_its_pooler(prefix):
    given = GOLDEN.numbered("bert-labels")
    base = {name.removeprefix("bert."): tensor for name, tensor in given.items() if name.startswith("bert.")}
    model = module({**PEERS["bert-labels"]["config"], "architectures": ["BertModel"]})
    assert isinstance(model, Encoder)
    whole = read(module(PEERS["bert-labels"]["config"]), given)
    without = {prefix + name: tensor for name, tensor in base.items() if "pooler" not in name}
    same_parameters(read(model, without), whole["backbone"])
    if prefix != "electra.":
        same_parameters(read(model, {prefix + name: tensor for name, tensor in base.items()}), whole["backbone"])


def test_published_configs_give_the_published_sizes():
    """RoBERTa base as its config.json has it, fields of the library that wrote it included."""
    config = {
        "architectures": ["RobertaForMaskedLM"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 0,
        "eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
        "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 514,
        "model_type": "roberta", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
        "type_vocab_size": 1, "vocab_size": 50265,
    }  # fmt: skip
    assert module(config).backbone.cfg == roberta_base()


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("bert-labels", {"position_embedding_type": "relative_key"}, 'only "absolute" is supported'),
        ("bert-labels", {"is_decoder": True}, "is_decoder is true"),
        ("bert-labels", {"hidden_act": "swish"}, "hidden_act 'swish' is not supported"),
        ("bert-labels", {"rotary": 1}, "rotary .* is unknown"),
        ("bert-labels", {"architectures": ["BertForMultipleChoice"]}, "is BertForMultipleChoice; supported are"),
        ("bert-labels", {"architectures": None}, "architectures is empty; supported are"),
        ("bert-pretraining", {"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ("roberta-words", {"hidden_act": "relu"}, "has gelu in its head, and relu in its layers"),
        ("electra-replaced", {"hidden_act": "relu"}, "a discriminator with relu"),
        ("albert-words", {"num_hidden_groups": 2}, "num_hidden_groups is 2"),
        ("bert-labels", {"num_attention_heads": 3}, "is not divisible by the number of heads, 3"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(case, changes, message):
    with pytest.raises(CheckpointError, match=message):
        module({**PEERS[case]["config"], **changes})
